"""optimum-intel: OVQuantizer, its defaults for INT8 weights and activations, over NNCF."""

from __future__ import annotations

import json
from pathlib import Path

import nncf
import openvino
from edgepress.benchmarks.peers.tools.job import Job, Made, main
from optimum.intel import OVConfig, OVQuantizationConfig, OVQuantizer
from optimum.intel.openvino import OVModelForImageClassification, OVModelForSequenceClassification


def tool(job: Job, made: Made) -> None:
    def write(path: Path) -> None:
        place = job.out / "float"
        place.mkdir(exist_ok=True)
        openvino.save_model(
            openvino.convert_model(job.float_model), place / "openvino_model.xml", compress_to_fp16=False
        )
        (place / "config.json").write_text(json.dumps(job.facts["config"]), encoding="utf-8")
        of_texts = "input_ids" in job.facts["inputs"]
        kind = OVModelForSequenceClassification if of_texts else OVModelForImageClassification
        rows = list(job.rows())
        settings = OVConfig(quantization_config=OVQuantizationConfig(bits=8, num_samples=len(rows)))
        quantizer = OVQuantizer.from_pretrained(kind.from_pretrained(place, compile=False))
        quantizer.quantize(calibration_dataset=nncf.Dataset(rows), save_directory=path.parent, ov_config=settings)
        for ending in (".xml", ".bin"):
            (path.parent / f"openvino_model{ending}").rename(path.with_suffix(ending))

    made.make("optimum-intel", "openvino", write)


if __name__ == "__main__":
    main(tool)
