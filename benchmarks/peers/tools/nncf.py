"""nncf.quantize on OpenVINO, plain and with its preset for transformers; and the float model in OpenVINO's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import openvino
from edgepress.benchmarks.peers.tools.job import Job, Made, main


def tool(job: Job, made: Made) -> None:
    def save(model: Any, path: Path) -> None:
        openvino.save_model(model, path, compress_to_fp16=False)

    def quantized(kind: Any) -> Any:
        model, rows = openvino.convert_model(job.float_model), list(job.rows())
        return nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=len(rows))

    made.make("OpenVINO float", "openvino", lambda path: save(openvino.convert_model(job.float_model), path))
    made.make("NNCF", "openvino", lambda path: save(quantized(None), path))
    made.make("NNCF, transformer", "openvino", lambda path: save(quantized(nncf.ModelType.TRANSFORMER), path))


if __name__ == "__main__":
    main(tool)
