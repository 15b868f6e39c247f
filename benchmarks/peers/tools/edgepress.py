"""edgepress: its schemes of 8 bits with activations, on both runtimes. It runs in the measuring environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import edgepress as ep
from edgepress.benchmarks.peers.tools.job import Job, Made, main, slug
from edgepress.compress import quantize as quantizers
from edgepress.export.artifact import open_artifact
from edgepress.export.backends import onnx, openvino

SETTINGS: Mapping[str, dict[str, Any]] = {
    "int8": {},
    "int8, folded": {"smooth": "folded"},
    "int8, mse": {"observer": "mse"},
    "int8-dynamic": {},
}


def tool(job: Job, made: Made) -> None:
    whole = ep.load(job.facts["model"])
    calibration = whole.data.calibration.take(job.facts["rows"])  # those of rows.npz
    workload = replace(whole, data=replace(whole.data, calibration=calibration))
    base = open_artifact(job.float_model.parent)
    for name, options in SETTINGS.items():
        if job.facts["quick"] and options:
            continue
        scheme = name.split(",", maxsplit=1)[0]
        rows = {} if scheme == "int8-dynamic" else {"rows": job.facts["rows"]}
        plan = quantizers.quantize(workload, scheme, **rows, **options)
        places = {f"edgepress {name}": onnx}
        if name == "int8":  # the same plan on the other runtime
            places[f"edgepress {name}, OpenVINO"] = openvino
        for title, backend in places.items():
            folder = job.out / slug(title)
            artifact = open_artifact(folder) if folder.exists() else backend.write(workload, plan, folder, base=base)
            disabled = artifact.manifest.session.disabled_optimizers
            made.add(title, artifact.manifest.runtime, artifact.model_file, disabled=disabled)


if __name__ == "__main__":
    main(tool)
