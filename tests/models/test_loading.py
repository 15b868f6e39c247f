"""What people have: shards, half precision, old ``.bin`` files, adapters, hub ids; and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.errors import InputError, UnavailableError
from edgepress.models import checkpoint, surgery
from edgepress.plan import PruningPlan, Unit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def _logits(workload: Any) -> torch.Tensor:
    with torch.no_grad():
        return workload.forward(workload.example)


@pytest.fixture
def decoder_folder(small_model: Any, tmp_path: Path) -> Path:
    """A decoder with grouped attention and tied embeddings, as ``save_pretrained`` leaves it."""
    small_model("llama").module.float().save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def test_a_folder_without_rows(decoder_folder: Path, here: Any, tmp_path: Path) -> None:
    """A model can be looked at, pruned by its weights and saved with no data at all."""
    seen = here("inspect", decoder_folder, "--json")
    assert seen.returncode == 0, seen.stderr
    assert [block["kv_heads"] for block in json.loads(seen.stdout)["blocks"]] == [3, 3]
    options = ("--method", "magnitude", "--recover", "none", "--ratio", "kv=0.34,ffn=0.5")
    done = here("prune", decoder_folder, *options, "--uniform", "-o", tmp_path / "plain", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quality"] is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (plain.config.num_key_value_heads, plain.config.num_attention_heads) == (2, 4)
    refused = here("score", decoder_folder, "--method", "fisher")
    assert refused.returncode == 2
    assert "needs rows" in refused.stderr


def test_shards_and_half_precision(decoder_folder: Path, tmp_path: Path) -> None:
    whole = _logits(ep.load(str(decoder_folder), max_length=12))
    model = AutoModelForCausalLM.from_pretrained(decoder_folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(_logits(ep.load(str(tmp_path / "shards"), max_length=12)), whole)
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        loaded = ep.load(str(tmp_path / str(dtype)), max_length=12)
        assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
        assert not torch.equal(_logits(loaded), whole)
        assert (_logits(loaded) - whole).abs().max() < 0.2 * whole.abs().max()


class _Payload:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


def test_bin_files_are_read_as_weights_only(decoder_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    whole = ep.load(str(decoder_folder), max_length=12)
    shutil.copytree(decoder_folder, "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="no weights"):
        ep.load("bin")
    torch.save(whole.module.state_dict(), "bin/pytorch_model.bin")
    assert torch.equal(_logits(ep.load("bin", max_length=12)), _logits(whole))
    Path("bin/pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": _Payload()}))
    with pytest.raises(InputError, match="holds more than tensors"):
        ep.load("bin")
    assert not Path("executed").exists()


def test_adapters_are_merged(model_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSequenceClassification.from_pretrained(model_folder)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    workload = ep.load(str(tmp_path / "adapter"), max_length=64)
    with torch.no_grad():
        theirs = adapted.eval()(**workload.example).logits
    torch.testing.assert_close(_logits(workload), theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(_logits(workload), _logits(ep.load(str(model_folder), max_length=64)))
    pruned = surgery.prune(workload, PruningPlan.of([Unit("head", 0, 1)]))
    again = checkpoint.read(checkpoint.save(pruned, tmp_path / "pruned"), workload.data)
    assert torch.equal(_logits(again), _logits(pruned))
    options = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({**options, "base_model_name_or_path": "/nowhere"})
    )
    with pytest.raises(InputError, match="adapts the model '/nowhere', which is not here"):
        ep.load(str(tmp_path / "adapter"))


def test_a_classifiers_adapter_brings_its_head(model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    encoder = AutoModelForSequenceClassification.from_pretrained(model_folder).bert
    encoder.save_pretrained(tmp_path / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, tmp_path / "encoder")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=2)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    rows = {"data": str(reviews_csv), "columns": {"text": "review", "label": "stars"}}
    workload = ep.load(str(tmp_path / "adapter"), max_length=64, **rows)
    assert workload.data.metric == "accuracy"
    with torch.no_grad():
        theirs = adapted(**workload.example).logits
    torch.testing.assert_close(_logits(workload), theirs, rtol=1e-4, atol=1e-5)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    some = {name: tensor for name, tensor in tensors.items() if "layer.1" not in name}
    save_file(some, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"not one of its base: they differ in '.*layer\.1\."):
        ep.load(str(tmp_path / "adapter"))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="it brings no head"):
        ep.load(str(tmp_path / "adapter"))
    classifier = AutoModelForSequenceClassification.from_pretrained(model_folder)
    prompt = PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    get_peft_model(classifier, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnavailableError, match="PROMPT_TUNING changes the inputs and no weights"):
        ep.load(str(tmp_path / "prompt"))


class _Hub(BaseHTTPRequestHandler):
    """The two calls of the hub's protocol that a download makes: the list of files, and a file."""

    def __init__(self, *args: Any, root: Path) -> None:
        self.root = root
        super().__init__(*args)

    def _answer(self) -> bytes | None:
        parts = self.path.split("?", maxsplit=1)[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "someone", "decoder"]:
            files = [{"rfilename": path.name} for path in sorted(self.root.iterdir())]
            body: Any = {"id": "someone/decoder", "sha": "0" * 40, "siblings": files, "private": False}
            return json.dumps(body if "tree" not in parts else self._tree()).encode()
        if parts[:3] == ["someone", "decoder", "resolve"] and (self.root / parts[-1]).is_file():
            return (self.root / parts[-1]).read_bytes()
        return None

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
            for path in sorted(self.root.iterdir())
        ]

    def _send(self, *, with_body: bool) -> None:
        body = self._answer()
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", f'"{self.path.rsplit("/", 1)[-1]}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)

    def do_GET(self) -> None:
        self._send(with_body=True)

    def do_HEAD(self) -> None:
        self._send(with_body=False)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(decoder_folder: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that finds a hub on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, root=decoder_folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
    server.shutdown()


def test_hub_ids(hub: dict[str, str], edgepress: Any) -> None:
    done = edgepress("inspect", "someone/decoder", "--json", env=hub)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "someone--decoder"
    missing = edgepress("inspect", "someone/nothing", env=hub)
    assert missing.returncode == 2
    assert "as a hub id it cannot be downloaded" in missing.stderr
    offline = edgepress("inspect", "someone/else", env={**hub, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 2
    assert len(offline.stderr.strip().splitlines()) <= 2


def test_code_in_a_folder_is_refused(decoder_folder: Path) -> None:
    (decoder_folder / "modeling_new.py").write_text("raise SystemExit(9)")
    with pytest.raises(InputError, match=r"brings its own code \(modeling_new\.py\)"):
        ep.load(str(decoder_folder))


MODELING = """
import torch
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedModel

Path({marker!r}).write_text("run")


class NewConfig(PretrainedConfig):
    model_type = "new"

    def __init__(self, vocab_size=2000, hidden_size=24, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class NewForSequenceClassification(PreTrainedModel):
    config_class = NewConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.inner = torch.nn.Linear(config.hidden_size, 16)
        self.head = torch.nn.Linear(16, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.relu(self.inner(self.embed(input_ids).mean(dim=1))))
"""


def test_code_in_a_folder_runs_only_where_it_is_trusted(
    edgepress: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    folder, marker = tmp_path / "new", tmp_path / "marker"
    folder.mkdir()
    (folder / "modeling_new.py").write_text(MODELING.format(marker=str(marker)))
    config = {"model_type": "new", "architectures": ["NewForSequenceClassification"], "vocab_size": 2000}
    auto = {"AutoConfig": "modeling_new.NewConfig"}
    auto["AutoModelForSequenceClassification"] = "modeling_new.NewForSequenceClassification"
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    shapes = {"embed.weight": (2000, 24), "inner.weight": (16, 24), "inner.bias": (16,)}
    shapes |= {"head.weight": (2, 16), "head.bias": (2,)}
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    data = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    refused = edgepress("prune", folder, *data, "-o", tmp_path / "pruned", env=environment)
    assert refused.returncode == 2
    assert "does not run without --trust-remote-code" in refused.stderr
    assert not marker.exists()
    done = edgepress(
        "prune", folder, *data, "--trust-remote-code", "-o", tmp_path / "pruned", "--json", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert json.loads(done.stdout)["params_after"] < json.loads(done.stdout)["params_before"]
    marker.unlink()
    with pytest.raises(InputError, match="does not run without --trust-remote-code"):
        ep.load(str(tmp_path / "pruned"))
    assert not marker.exists()
    trusted = edgepress("inspect", tmp_path / "pruned", "--rows", 0, "--trust-remote-code", env=environment)
    assert trusted.returncode == 0, trusted.stderr
    code = (tmp_path / "pruned" / "modeling_new.py").read_text()
    (tmp_path / "pruned" / "modeling_new.py").write_text(code.replace("import torch\n", "import torch\n1 / 0\n", 1))
    broken = edgepress("inspect", tmp_path / "pruned", "--rows", 0, "--trust-remote-code", env=environment)
    assert broken.returncode == 2
    assert "fails with ZeroDivisionError" in broken.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "No list of blocks"),
        ({"hidden_size": "64"}, "cannot be loaded: Validation error"),
        ({"intermediate_size": 9}, r"'.*(down|gate|up)_proj\.weight' is \[.*\], and config.json asks for \["),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "requires bitsandbytes"),
    ],
)
def test_a_configuration_that_does_not_fit(decoder_folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((decoder_folder / "config.json").read_text())
    (decoder_folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((InputError, UnavailableError), match=message):
        ep.load(str(decoder_folder))


def test_damaged_weights(decoder_folder: Path) -> None:
    weights = decoder_folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:-100], whole[100:]):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="cannot be loaded"):
            ep.load(str(decoder_folder))
    weights.unlink()
    (decoder_folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be loaded: EOFError"):
        ep.load(str(decoder_folder))


def test_another_library_is_one_sentence(decoder_folder: Path) -> None:
    config = json.loads((decoder_folder / "config.json").read_text())
    (decoder_folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(UnavailableError, match="'BertModel' is not supported with a LlamaConfig"):
        ep.load(str(decoder_folder))


PEAK = """
import resource, sys
import torch, transformers
import edgepress as ep
from edgepress.models import checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
workload = ep.load(sys.argv[1], max_length=8)
weights = 4 * workload.params
pruned = ep.prune(workload, ep.score(workload, "magnitude"), ratio=0.3, in_place=True)
assert 4 * pruned.params < 0.8 * weights
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, weights)
"""


def test_loading_and_pruning_in_place_hold_the_weights_once(tmp_path: Path) -> None:
    """Peak memory stays near the float32 weights, though they are stored in half of that: tensor by tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8, "intermediate_size": 2048}
    config = LlamaConfig(**sizes, vocab_size=1000, dtype="bfloat16")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "big")
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "big"], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 400e6
    assert grown < 1.35 * weights
