"""optimum-onnx: ORTQuantizer with its own configuration for AVX512-VNNI, dynamic and static."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from edgepress.benchmarks.peers.tools.job import Job, Made, main
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig


def tool(job: Job, made: Made) -> None:
    def write(path: Path, *, static: bool) -> None:
        quantizer = ORTQuantizer.from_pretrained(job.traced_model.parent, file_name=job.traced_model.name)
        settings = AutoQuantizationConfig.avx512_vnni(is_static=static, per_channel=True)
        ranges = None
        if static:
            rows = Dataset.from_list([{name: array[0].tolist() for name, array in row.items()} for row in job.rows()])
            ranges = quantizer.fit(
                rows,
                AutoCalibrationConfig.minmax(rows),
                str(path.parent / "augmented.onnx"),
                settings.operators_to_quantize,
            )
            (path.parent / "augmented.onnx").unlink(missing_ok=True)
        quantizer.quantize(settings, path.parent, file_suffix="", calibration_tensors_range=ranges)

    made.make("optimum-onnx, dynamic", "onnx", lambda path: write(path, static=False))
    made.make("optimum-onnx, static", "onnx", lambda path: write(path, static=True))


if __name__ == "__main__":
    main(tool)
