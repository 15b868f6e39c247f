"""A decoder of a billion parameters is scored and pruned in bounded memory."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch

MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "edgepress", *sys.argv[1:]], stdout=sys.stderr)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_billion_parameters_within_12_gib(tmp_path: Path) -> None:
    from edgepress.models import zoo
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **heads, vocab_size=32_000, max_position_embeddings=64, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e9
    model.save_pretrained(tmp_path / "big")
    del model
    tokenizer = Path(zoo.__file__).parent / "weights/llama-stdlib/tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(tmp_path / "big")
    texts = [textwrap.shorten(inspect.getdoc(getattr(str, name)) or "", 200) for name in dir(str)]
    pd.DataFrame({"text": [text for text in texts if len(text) > 40]}).to_csv(tmp_path / "rows.csv", index=False)
    args = ["prune", tmp_path / "big", "--data", tmp_path / "rows.csv", "--columns", "text=text", "--method", "taylor"]
    command = [sys.executable, "-c", MEASURED, *args, "--ratio", "0.5", "--json", "-o", tmp_path / "pruned"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split())
    assert code == 0, done.stderr
    found = json.loads(done.stderr[done.stderr.index("{") :])
    assert found["params_after"] < 0.7 * found["params_before"]
    print(f"{found['params_before']:,} parameters: pruned in {peak / 2**30:.1f} GiB")
    assert peak < 12 * 2**30
