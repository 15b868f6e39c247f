"""Olive: its passes for static and dynamic INT8, the latter also after its own pass over onnxruntime.transformers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"  # read when it is imported

from edgepress.benchmarks.peers.tools.job import Job, Made, main
from olive.data.registry import Registry
from olive.workflows import run

ROWS = {
    "name": "rows",
    "load_dataset_config": {"type": "edgepress_rows"},
    "pre_process_data_config": {"type": "skip_pre_process"},
    "post_process_data_config": {"type": "skip_post_process"},
    "dataloader_config": {"batch_size": 1},
}
HERE = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}


def tool(job: Job, made: Made) -> None:
    @Registry.register_dataset()  # type: ignore[untyped-decorator]
    def edgepress_rows(**_: Any) -> list[Any]:
        return [({name: array[0] for name, array in feeds.items()}, 0) for feeds in job.rows()]

    def write(path: Path, passes: dict[str, Any]) -> None:
        run(
            {
                "input_model": {"type": "ONNXModel", "model_path": str(job.traced_model)},
                "systems": {"here": HERE},
                "host": "here",
                "target": "here",
                "data_configs": [ROWS],
                "passes": passes,
                "output_dir": str(path.parent),
                "cache_dir": str(job.out / "cache"),
            }
        )
        if not path.exists():
            raise FileNotFoundError("Olive wrote no model.onnx")

    dynamic = {"type": "OnnxDynamicQuantization", "per_channel": True}
    static = {"type": "OnnxStaticQuantization", "per_channel": True, "data_config": "rows"}
    made.make("Olive, dynamic", "onnx", lambda path: write(path, {"quantize": dynamic}))
    made.make("Olive, static", "onnx", lambda path: write(path, {"quantize": static}))
    if job.facts["num_heads"]:
        shape = {"num_heads": job.facts["num_heads"], "hidden_size": job.facts["hidden_size"]}
        family = "vit" if job.facts["family"] == "vit" else "bert"
        fuse = {"type": "OrtTransformersOptimization", "model_type": family, **shape}
        passes = {"fuse": fuse, "quantize": dynamic}
        made.make("Olive, transformers optimisation, dynamic", "onnx", lambda path: write(path, passes))
    shutil.rmtree(job.out / "cache", ignore_errors=True)


if __name__ == "__main__":
    main(tool)
