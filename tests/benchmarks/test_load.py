"""What is measured side by side: artifacts of several kinds, each fed what it takes, and what fails says of which."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
from edgepress.benchmarks import load
from edgepress.benchmarks.imitation import DoesNotFitError, Imitation
from edgepress.cli import findings
from edgepress.export.artifact import Artifact, Axis, Input, open_artifact, seal

from .test_measure import made_up

QUICK: dict[str, Any] = {"target": "cpu:1", "sequence": 16, "min_queries": 40, "memory": False}


def renamed(artifact: Artifact, before: str, after: str) -> Artifact:
    """``artifact`` with an axis of another name."""

    def of(spec: Input) -> Input:
        axes = {
            place: Axis(name=after, min=a.min, max=a.max) if a.name == before else a for place, a in spec.axes.items()
        }
        return spec.model_copy(update={"axes": axes})

    inputs = {name: of(spec) for name, spec in artifact.manifest.inputs.items()}
    return replace(artifact, manifest=artifact.manifest.model_copy(update={"inputs": inputs}))


@pytest.fixture(scope="module")
def image(artifacts: list[Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What takes images, which have no tokens: the rectified."""
    folder = tmp_path_factory.mktemp("image") / "image"
    shutil.copytree(artifacts[0].folder, folder)
    sizes: list[Any] = ["batch", 3, 8, 8]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes) for name in ("pixels", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["pixels"], ["y"])], "g", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    taken = Input(dtype="float32", shape=(1, 3, 8, 8), axes={"0": Axis(name="batch", min=1, max=8)})
    seal(folder, artifacts[0].manifest.model_copy(update={"inputs": {"pixels": taken}}), {})
    return open_artifact(folder)


def test_each_is_fed_its_tokens_whatever_the_first_takes(artifacts: list[Artifact], image: Artifact) -> None:
    """A decoder's tokens are on an axis of their own name, and images have none; before, tokens were then none."""
    decoder = renamed(artifacts[0], "sequence", "decoder_sequence")
    assert load.arbitrary(decoder, 1, 16)["input_ids"].shape == (1, 16)
    taken = load.benchmark([image, artifacts[0], decoder], **QUICK)
    assert [one.sequence for one in taken] == [0, 16, 16]
    first, *others = ep.compare(taken)
    assert first["sequence"] == 0
    assert all(row["speedup"]["value"] > 0 for row in others)
    (alone,) = load.benchmark([decoder], **QUICK)
    assert alone.sequence == 16
    shortest = load.benchmark([decoder], **{**QUICK, "sequence": 1})[0]
    assert np.isfinite(shortest.p50)


def test_the_fastest_is_told_by_ratios_of_rounds(
    artifacts: list[Artifact], image: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The medians alone would call the first faster: the machine was slow in half of the rounds."""
    where: dict[str, Any] = {"target": "cpu:1", "batch": 1, "sequence": 16}
    assert load.fastest([artifacts[0], image, artifacts[0]], **where, rounds=30) == 1
    first = np.repeat([1.0, 3.0], [51, 49])
    other = 0.9 * first
    other[:2] = 3.0
    taken = [made_up(first), made_up(other), made_up(1.1 * first)]
    assert taken[0].p50 < taken[1].p50
    monkeypatch.setattr(load, "benchmark", lambda *_, **__: taken)
    assert load.fastest(artifacts, **where) == 1


def test_each_shape_has_what_was_seen_of_it(here: Any, image: Artifact) -> None:
    words = ("bench", image.folder, "--target", "cpu:1", "--queries", 40, "--batch")
    runs = json.loads(here(*words, "1,4", "--json").stdout)["runs"]
    assert [(one["batch"], one["sequence"]) for one in runs] == [(1, 0), (4, 0)]
    assert all(one["clock_overhead_ns"] > 0 and one["openings"] and one["watch"]["seconds"] > 0 for one in runs)
    assert runs[0]["watch"] != runs[1]["watch"]
    shown = here(*words, "1,4")
    assert len(re.findall(r"timing a query takes \d+ ns itself", shown.stdout)) == 2


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes the memory from an imitated device in the modes that it is called with; the others really run."""
    run = Imitation.run

    def of(*modes: str) -> None:
        def starved(self: Imitation, host: Any, place: str, command: Any, *rest: Any, **options: Any) -> Any:
            if any(f'"mode": "{mode}"' in command[-1] for mode in modes):
                raise DoesNotFitError("in 500 MB on the imitated device: held by cgroup it was ended by the kernel")
            return run(self, host, place, command, *rest, **options)

        monkeypatch.setattr(Imitation, "run", starved)

    return of


def test_without_memory_for_energy_and_profiles_the_latency_is_kept(
    artifacts: list[Artifact], short: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short("energy", "profile")
    taken = load.benchmark(artifacts[:1], energy=True, profile=True, **QUICK)
    (row,) = ep.compare(taken)
    assert len(taken[0].samples) == 40
    assert (row["energy_mj"], row["profile"]) == (None, None)
    assert row["energy_note"].startswith("not available: measuring it does not fit in 500 MB on the imitated device")
    findings.show(taken, [row])
    assert f"warning: {artifacts[0].folder} has no profile: telling it does not fit in" in capsys.readouterr().out
    assert findings.write_profiles([taken], tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_when_it_is_timed_is_named(artifacts: list[Artifact], short: Any) -> None:
    short("latency")
    with pytest.raises(DoesNotFitError, match=rf"^{artifacts[0].folder} does not fit in 500 MB .*kernel\.$"):
        load.benchmark(artifacts[:1], **QUICK)
    both = f"{artifacts[0].folder} and {artifacts[1].folder} do not fit, opened together, in 500 MB"
    unfit: list[str] = []
    assert load.fitting(artifacts, unfit, **QUICK) == []
    assert unfit[0].startswith(both)
