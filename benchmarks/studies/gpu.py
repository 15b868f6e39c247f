"""The zoo on an NVIDIA GPU: original, pruned and 2:4 sparse, in every precision, in three runtimes.

    python benchmarks/studies/gpu.py --out work --seconds 400            measure, and write work/<gpu>.json
    python benchmarks/studies/gpu.py --table benchmarks/results/<gpu>*.json > docs/gpu.md

Every variant of one model at one batch is measured in turn, round after round, so that drift hits all alike. A latency
is of one inference that is waited for, by the wall clock: once with inputs and outputs left on the GPU, and once with
the copies from and to the host's arrays. Texts are padded to ``--sequence`` tokens. Speedups are against the fastest
plain 16-bit form of the original in PyTorch. Parity is against the original in FP32 (without TF32) in PyTorch eager,
quality on all evaluation rows through the very form that is timed.

Rows are appended to ``rows.jsonl`` as they come, and the same call goes on where it was cut off. What cannot be had is
a row too, with the library's own sentence as its ``reason``. It ends by ``--seconds``; what comes first matters most.
``--device cpu`` is a dry run of the same lines, without graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import torch
from edgepress.benchmarks import compare, runner
from edgepress.benchmarks.environment import fingerprint
from edgepress.benchmarks.measurement import Measurement
from edgepress.benchmarks.studies.gpu_forms import (
    PLAIN,
    REFERENCE,
    VARIANTS,
    Feeds,
    Prepared,
    Unavailable,
    Variant,
    prepare_onnxruntime,
    prepare_tensorrt,
    prepare_torch,
    torch_module,
)
from edgepress.benchmarks.studies.gpu_table import table
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.prune.sparsity import sparsify
from edgepress.export import parity
from edgepress.models import checkpoint, metrics
from edgepress.models import workload as workloads
from numpy.typing import NDArray

MODELS = ("minilm-reviews", "vit-fashion", "dinov2-fashion")
LATE = "Not measured"
ROUNDS = 1000
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 8e-2}
"""Largest error of a plain precision, in units of the reference's largest output, beyond which a form is broken."""


class Broken(Exception):  # noqa: N818
    """The GPU answers nothing more in this process, as after an illegal access."""


# ---- one model


class Study:
    """The variants of one zoo model: its workloads, modules and artifacts, each made when it is first needed."""

    def __init__(self, name: str, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.name, self.arguments, self.say = name, arguments, say
        self.folder = (arguments.made or arguments.out / "made") / name
        self.original = ep.load(f"zoo:{name}")
        self.made: dict[Any, Any] = {}
        self.sequence = arguments.sequence if any(1 in axes for axes in self.original.input_axes.values()) else 0

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, or raises, the first time; the same again whenever it is asked for."""
        if key not in self.made:
            try:
                self.made[key] = make()
            except Exception as error:  # whatever a library says is what is recorded
                self.made[key] = error
        found = self.made[key]
        if isinstance(found, Exception):
            raise found
        return found

    def feeds(self, batch: int) -> Feeds:
        return parity.feeds(self.original, {"batch": batch, "sequence": self.sequence})

    def changed(self, change: str) -> Any:
        make = {"original": lambda: self.original, "pruned": self._pruned, "2:4": self._sparse}[change]
        return self.once(change, make)

    def _pruned(self) -> Any:
        """Half of the heads and of the channels of every layer, solved anew, then distilled on the GPU."""
        folder = self.folder / "pruned"
        if not folder.is_dir():
            start = time.monotonic()
            scores = ep.score(self.original, "masked_taylor", rows=128)
            cut = reconstruct(self.original, ep.prune(self.original, scores, ratio=0.5, uniform=True), rows=128)
            cut_after = time.monotonic() - start
            found = ep.recover(cut, self.original, steps=self.arguments.steps, batch=64, lr=5e-4)
            losses = [entry["loss"] for entry in found.trace]
            checkpoint.save(found.workload, folder)
            self.say(
                f"{self.name}: cut in {cut_after:.1f} s, distilled {len(losses)} steps in "
                f"{time.monotonic() - start - cut_after:.1f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}"
            )
        return checkpoint.read(folder, self.original.data)

    def _sparse(self) -> Any:
        folder = self.folder / "sparse"
        if not folder.is_dir():
            checkpoint.save(sparsify(self.original, "2:4"), folder)
        return checkpoint.read(folder, self.original.data)

    def prepare(self, variant: Variant, feeds: Feeds, stack: contextlib.ExitStack) -> Prepared:
        device = self.arguments.device
        if variant.runtime == "torch":
            workload = self.changed(variant.change)
            module = self.once((variant.change, variant.precision), lambda: torch_module(workload, variant, device))
            return prepare_torch(workload, variant, feeds, module=module, device=device)
        if variant.runtime == "tensorrt":
            first = self.once("the first engine", lambda: self._first_engine(feeds))
            workload = self.changed(variant.change)
            artifact = first if variant == first_engine() else self._artifact(variant, workload)
            return prepare_tensorrt(artifact, workload.params, feeds, stack=stack)
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            known = ", ".join(onnxruntime.get_available_providers())
            raise Unavailable(f"ONNX Runtime {onnxruntime.__version__} here has no CUDA provider (it has {known}).")
        workload = self.changed(variant.change)
        return prepare_onnxruntime(self._artifact(variant, workload), workload.params, feeds)

    def _first_engine(self, feeds: Feeds) -> Any:
        """The plainest engine, which tells whether the library runs on this card; where it does not, none is tried."""
        artifact = self._artifact(first_engine(), self.original)
        with contextlib.ExitStack() as stack:
            prepare_tensorrt(artifact, self.original.params, feeds, stack=stack).go()
        return artifact

    def _artifact(self, variant: Variant, workload: Any) -> Any:
        from edgepress.export.backends import onnx as onnx_backend
        from edgepress.plan import QuantizationPlan

        base = self.once(
            ("float graph", variant.change),
            lambda: onnx_backend.write(workload, QuantizationPlan("fp32"), self.folder / f"{variant.change[0]}-fp32"),
        )
        precise = variant.precision == "fp32"
        if precise and variant.runtime == "onnxruntime":
            return base

        def make() -> Any:
            plan = QuantizationPlan("fp32") if precise else ep.quantize(workload, variant.precision)
            folder = self.folder / f"{variant.change[0]}-{variant.precision}-{variant.runtime}"
            if variant.runtime == "onnxruntime":
                return onnx_backend.write(workload, plan, folder, base=base)
            from edgepress.export.backends import tensorrt  # type: ignore[attr-defined,unused-ignore]

            tuned = {"batch": 8, **({"sequence": self.sequence} if self.sequence else {})}
            return tensorrt.write(workload, plan, folder, base=base, tuned=tuned, sparse=variant.change == "2:4")

        return self.once((variant.change, variant.precision, variant.runtime), make)


def first_engine() -> Variant:
    return next(variant for variant in VARIANTS if variant.runtime == "tensorrt")


# ---- measuring


def measure(
    study: Study, batch: int, todo: list[Variant], deadline: float, environment: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one model at one batch, of the variants in ``todo``, interleaved."""
    arguments, feeds = study.arguments, study.feeds(batch)
    common = {"model": study.name, "batch": batch, "sequence": study.sequence}
    ready: list[tuple[Variant, Prepared, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        wanted: NDArray[Any] | None = None
        for variant in (variant for variant in VARIANTS if variant in {REFERENCE, PLAIN, *todo}):
            row = {**common, "name": variant.name, **{k: v for k, v in asdict(variant).items() if k != "seconds"}}
            left = deadline - time.monotonic() - arguments.group_seconds
            if variant is not REFERENCE and left < variant.seconds:
                yield {**row, "reason": f"{LATE}: {max(left, 0):.0f} s were left of the time given."}
                continue
            start, before = time.monotonic(), used(arguments.device)
            try:
                one = study.prepare(variant, feeds, stack)
                one.go()
                answer = one.whole(feeds)
            except Exception as error:  # the library's own sentence is the result
                study.say(f"{variant.name}, batch {batch}: {reason(error)}")
                yield {**row, "reason": reason(error).replace(f"{study.folder}/", "")}
                if broken(arguments.device):
                    raise Broken from error
                continue
            if wanted is None:
                wanted = answer
            row |= {"ready_s": round(time.monotonic() - start, 2), "gpu_bytes": used(arguments.device) - before}
            row["parity"] = differences(answer, wanted)
            limit = TOLERANCE.get(variant.precision) if variant.change == "original" else None
            if not np.isfinite(answer).all() or (limit and row["parity"]["max_rel"] > limit):
                yield {**row, "reason": f"It does not compute the same: {row['parity']}."}
                continue
            ready.append((variant, one, row))
        seconds = min(arguments.group_seconds, max(deadline - time.monotonic(), 1))
        samples = interleaved([one.go for _, one, _ in ready], seconds)
        copied = interleaved([partial(one.whole, feeds) for _, one, _ in ready], seconds / 4)
        qualities = judged(study, ready, batch, deadline) if batch == arguments.quality_batch else {}
        for row in finished(study, ready, (samples, copied), qualities, environment):
            if row["name"] in {variant.name for variant in todo}:
                yield row


def interleaved(calls: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Milliseconds of each call, in rounds, by the timing loop of all that edgepress measures."""
    taken = runner.interleaved(calls, ROUNDS, seconds)
    return [[ns / 1e6 for ns in samples] for samples in taken]


def finished(
    study: Study,
    ready: list[tuple[Variant, Prepared, dict[str, Any]]],
    times: tuple[list[list[float]], list[list[float]]],
    qualities: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """The rows of what was measured; ``times`` are the samples without and with the copies."""
    samples, copied = times
    taken = {
        variant: Measurement(
            name=variant.name,
            artifact="",
            target=study.arguments.device,
            precision=variant.precision,
            params=one.params,
            macs=study.changed(variant.change).macs,
            size_bytes=one.size_bytes,
            load_ms=None,
            peak_rss_bytes=None,
            batch=row["batch"],
            sequence=study.sequence,
            samples_ms=tuple(milliseconds),
            environment=environment,
        )
        for (variant, one, row), milliseconds in zip(ready, samples, strict=True)
    }
    plain = [v for v in taken if v.change == "original" and v.runtime == "torch" and v.precision in {"fp16", "bf16"}]
    fastest = min(plain or taken, key=lambda v: taken[v].p50)
    for (variant, _, row), whole in zip(ready, copied, strict=True):
        found = taken[variant]
        faster = None if variant == fastest else compare.speedup(taken[fastest], found)
        figures = compare.row(replace(found, quality=qualities.get(variant.name)), faster)
        yield {
            **row,
            **{key: value for key, value in figures.items() if key not in {"artifact", "load_ms", "peak_rss_bytes"}},
            "baseline": fastest.name,
            "rows_per_second": found.throughput,
            "with_copies_ms": {"p50": float(np.median(whole)), "n": len(whole)},
        }


def judged(study: Study, ready: list[tuple[Variant, Prepared, Any]], batch: int, deadline: float) -> dict[str, Any]:
    """The quality of each variant on the evaluation rows, all padded to the shape that it was prepared in."""
    rows, task = study.original.data.evaluation, study.original.task
    if study.arguments.quality_rows:
        rows = rows.take(study.arguments.quality_rows)
    found: dict[str, Any] = {}
    original = None
    for variant, one, _ in ready:
        if variant is not REFERENCE and time.monotonic() > deadline:
            break
        shape = study.feeds(batch)

        def run(arrays: Feeds, one: Prepared = one, shape: Feeds = shape) -> NDArray[Any]:
            count = len(next(iter(arrays.values())))
            full = {name: _fitted(arrays[name], like) for name, like in shape.items()}
            return one.whole(full)[:count]

        answers = metrics.predict(run, rows, task, batch=batch)
        if not np.isfinite(answers).all():
            continue
        original = answers if variant is REFERENCE else original
        metric = study.original.data.metric
        found[variant.name] = metrics.quality(
            metric,
            answers,
            metrics.wanted(rows, metric),
            original=None if variant is REFERENCE else original,
        )
    return found


def _fitted(array: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """``array`` filled up with zeros, rows and tokens, to the shape of ``like``; what is masked is not looked at."""
    room = [(0, most - size) for size, most in zip(array.shape, like.shape, strict=True)]
    filled = np.pad(array, room)
    if np.issubdtype(like.dtype, np.integer) and len(array) < len(like):
        filled[len(array) :] = filled[0]  # a row without a single token has no softmax
    return np.ascontiguousarray(filled.astype(like.dtype))


def differences(ours: NDArray[Any], theirs: NDArray[Any]) -> dict[str, float]:
    a, b = (x.astype(np.float64).ravel() for x in (ours, theirs))
    error = float(np.abs(a - b).max())
    return {
        "max_abs": error,
        "max_rel": error / max(float(np.abs(b).max()), 1e-12),
        "cosine": float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)),
    }


def used(device: str) -> int:
    """Bytes of the GPU's memory that are taken, by anyone."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def broken(device: str) -> bool:
    """Whether the last error is one that every later call repeats."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def reason(error: Exception) -> str:
    """The first sentence of what went wrong, with its kind where the library gives no words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else "no reason given"
    if said.startswith("backend=") and len(lines) > 1:  # Inductor's wrapper; what happened is behind it
        said = f"{said} {lines[1]}"
    known = isinstance(error, (Unavailable, ep_errors()))
    return said[:400] if known else f"{type(error).__name__}: {said[:400]}"


def ep_errors() -> type[Exception]:
    from edgepress.errors import EdgepressError

    return EdgepressError


def describe(device: str) -> dict[str, Any]:
    """The fingerprint of the machine, with its GPU, driver and the libraries that were looked for."""
    found = {**fingerprint(torch.get_num_threads()), "cuda": torch.version.cuda}
    for package in ("tensorrt", "tensorrt_rtx", "onnxruntime-gpu", "triton", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            found["packages"][package] = version(package)
    if "onnxruntime-gpu" in found["packages"]:  # it takes the place of the other
        found["packages"].pop("onnxruntime", None)
    if device == "cpu":
        return {**found, "gpu": "none"}
    properties = torch.cuda.get_device_properties(0)
    found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    found |= {"gpu_memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    found |= {"cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        told = subprocess.run(  # noqa: S603 - no user input in it
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],  # noqa: S607 - wherever the driver put it
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        found |= dict(zip(query.split(","), told.stdout.strip().split(", "), strict=False))
    return found


# ---- the program


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--made", type=Path, help="where models and engines are kept, default: in --out")
    parser.add_argument("--seconds", type=float, default=600, help="by when it ends, about")
    parser.add_argument("--models", type=_words, default=MODELS)
    parser.add_argument("--runtimes", type=_words, default=("torch", "tensorrt", "onnxruntime"))
    parser.add_argument("--skip", type=_words, default=(), help="forms: eager, graph, compile")
    parser.add_argument("--batches", type=_numbers, default=(1, 32, 8, 128))
    parser.add_argument("--compile-batches", type=_numbers, default=(1, 32))
    parser.add_argument("--quality-batch", type=int, default=32)
    parser.add_argument("--quality-rows", type=int, default=0, help="0: all")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--group-seconds", type=float, default=8, help="of measuring, for each model and batch")
    parser.add_argument("--steps", type=int, default=400, help="of distillation")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--table", type=Path, nargs="+", help="print the Markdown of these files, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        sys.stdout.write("\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.table))
        return
    study(arguments)


def study(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    deadline = start + arguments.seconds

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    workloads.MAX_BATCH = max(workloads.MAX_BATCH, *arguments.batches)  # what engines must take
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "rows.jsonl"
    environment = describe(arguments.device)
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    known = {(row["model"], row["batch"], row["name"]) for row in rows if not row.get("reason", "").startswith(LATE)}

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        latest = {(row["model"], row["batch"], row["name"]): row for row in rows}
        document = {"environment": environment, "rows": list(latest.values())}
        name = "".join(letter if letter.isalnum() else "-" for letter in environment["gpu"].lower())
        (arguments.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    for name in arguments.models:
        common = {"model": name, "name": "all", "runtime": "all", "batch": 0, "sequence": 0}
        try:
            model = Study(name, arguments, say)
        except Exception as error:  # a model that is not there does not keep the others from being measured
            say(f"{name}: {reason(error)}")
            record({**common, "reason": reason(error)})
            continue
        for batch in arguments.batches:
            todo = [one for one in VARIANTS if _asked(one, batch, arguments) and (name, batch, one.name) not in known]
            if not todo:
                continue
            if time.monotonic() > deadline:
                say("the time given is over")
                return
            say(f"{name}, batch {batch}")
            try:
                for row in measure(model, batch, todo, deadline, environment):
                    record(row)
            except Broken:  # a new process goes on without the variant that did it, whose reason is recorded
                left = str(deadline - time.monotonic())
                os.execv(sys.executable, [sys.executable, *sys.argv, "--seconds", left])  # noqa: S606
            except Exception as error:  # a batch that is too large for the card, for instance
                say(f"{name}, batch {batch}: {reason(error)}")
                record({**common, "batch": batch, "reason": reason(error)})
            if arguments.device != "cpu":
                torch.cuda.empty_cache()
    say("done")


def _asked(variant: Variant, batch: int, arguments: argparse.Namespace) -> bool:
    late = variant.form == "compile" and batch not in arguments.compile_batches
    return variant.runtime in arguments.runtimes and variant.form not in arguments.skip and not late


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    main()
