"""A decoder whose weights are more than a protobuf holds is exported, proven, hashed and verified."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "edgepress", *sys.argv[1:]], stdout=sys.stderr)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def _run(*args: str | Path) -> tuple[str, int]:
    """What a command prints, and its peak resident set in bytes."""
    command = [sys.executable, "-c", MEASURED, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split())
    assert code == 0, done.stderr
    return done.stderr[done.stderr.index("{") :], peak


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_more_than_two_gigabytes_of_weights(tmp_path: Path) -> None:
    from edgepress.models import zoo
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 1536, "num_hidden_layers": 18, "intermediate_size": 6144, "vocab_size": 4096}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=64, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    params = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * params > 2**31
    model.save_pretrained(tmp_path / "big")
    del model
    tokenizer = Path(zoo.__file__).parent / "weights/llama-stdlib/tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(tmp_path / "big")
    said, peak = _run("export", tmp_path / "big", "--json", "-o", tmp_path / "out")
    assert json.loads(said)["parity"]["max_rel"] < 1e-3
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert files["model.data"] > 2**31 > 100 * files["model.onnx"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"model.onnx", "model.data"} <= set(manifest["files"])
    told, needed = _run("export", "--verify", tmp_path / "out", "--json")
    assert json.loads(told)["cases"] > 0
    print(f"{params:,} parameters: exported in {peak / 2**30:.1f} GiB, verified in {needed / 2**30:.1f} GiB")
    assert peak < 6 * 4 * params
    assert needed < 3 * 4 * params
    shutil.rmtree(tmp_path / "out")
    engine = ("--to", "tensorrt", "--scheme", "fp16", "--capability", "sm89")
    said, peak = _run("export", tmp_path / "big", *engine, "--json", "-o", tmp_path / "engine")
    print(f"as an engine in {peak / 2**30:.1f} GiB")
    assert json.loads(said)["parity"]["max_rel"] < 1e-2
    files = {path.name: path.stat().st_size for path in (tmp_path / "engine").iterdir()}
    assert files["model.engine"] > 2 * params
    assert files["source.data"] > 2 * params
