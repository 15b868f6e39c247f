"""The timing loop. One file that runs wherever Python, numpy and a runtime are: ``python runner.py JOB``, JSON itself.

It knows no model, data or metric: it opens a runtime's files, feeds them the arrays of an ``.npz``, and prints one JSON
document with raw nanoseconds. ``mode`` is "latency" (all artifacts in this one process, interleaved round by round, so
that the machine's drift hits all alike), "memory" (one artifact in a process of its own), "answers" (what it says),
"energy" (joules, after the timing) or "profile" (the time of one artifact's operators, where nothing else is timed).
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# Beside this file, in the package or in the folder that both were sent to.
meters, profilers = (
    importlib.import_module(f"{__package__}.{name}" if __package__ else name) for name in ("meters", "profilers")
)

WINDOW = 10
MOST_WINDOWS = 20
SLICES = 3


def main(text: str) -> None:
    job = json.loads(text)
    modes = {"latency": latency, "memory": memory, "answers": answers, "energy": energy, "profile": profile}
    with alone():
        result = modes[job["mode"]](job)
    json.dump(result, sys.stdout)


@contextmanager
def alone() -> Iterator[None]:
    """Within the context no other runner of this user works on this machine: two at once would slow each other down.

    The kernel lets go of the lock however its holder ends.
    """
    path = os.path.join(tempfile.gettempdir(), f"edgepress-{os.getuid()}.lock")  # noqa: PTH118 - for os.open
    lock = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    """What runs the artifact once on ``feeds``."""
    _, opener = RUNTIMES[artifact["runtime"]]
    return opener(artifact, threads, feeds)


def read_feeds(artifact: dict[str, Any]) -> dict[str, Any]:
    with np.load(artifact["feeds"], allow_pickle=False) as arrays:
        return dict(arrays)


def open_onnx(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    session = onnx_session(artifact, threads)
    return lambda: session.run(None, feeds)


def onnx_session(artifact: dict[str, Any], threads: int, trace: str = "") -> Any:
    """A session, which where there is a ``trace`` writes what it does to a file whose name begins so."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # An idle session's threads go on spinning for their next run, and take the CPUs from the session being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if trace:
        options.enable_profiling = True
        options.profile_file_prefix = trace
    return onnxruntime.InferenceSession(
        artifact["model"],
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=artifact["disabled_optimizers"],
    )


def open_openvino(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    request = openvino_model(artifact, threads).create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


def openvino_model(artifact: dict[str, Any], threads: int, **more: Any) -> Any:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **more}
    if artifact.get("inference_precision"):
        settings["INFERENCE_PRECISION_HINT"] = artifact["inference_precision"]
    if artifact.get("dynamic_quantization") is not None:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = artifact["dynamic_quantization"]
    return openvino.Core().compile_model(artifact["model"], "CPU", settings)


def open_executorch(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    import torch

    method = executorch_program(artifact, threads).load_method("forward")
    inputs = [torch.from_numpy(feeds[name]) for name in artifact["inputs"]]
    return lambda: method.execute(inputs)


def executorch_program(artifact: dict[str, Any], threads: int, **more: Any) -> Any:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    return Runtime.get().load_program(artifact["model"], **more)


RUNTIMES = {
    "onnx": ("onnxruntime", open_onnx),
    "openvino": ("openvino", open_openvino),
    "executorch": ("executorch.runtime", open_executorch),
}
"""By the word of the manifest, the package, which is imported where a job needs it, and what opens a file with it."""


def latency(job: dict[str, Any]) -> dict[str, Any]:
    """Rounds until ``min_queries`` are done or ``min_seconds`` for each artifact are over, but no fewer than 30."""
    runs = [open_model(artifact, job["threads"], read_feeds(artifact)) for artifact in job["artifacts"]]

    watch = meters.Watch()

    def tell(rounds: int) -> None:
        watch.look()  # between two rounds, where nothing is timed
        print("progress", rounds, job["min_queries"], file=sys.stderr, flush=True)

    samples = interleaved(runs, job["min_queries"], job["min_seconds"] * len(runs), tell)
    return {"samples_ns": samples, "watch": watch.result()}


def interleaved(
    runs: list[Callable[[], Any]], min_queries: int, budget: float, tell: Callable[[int], None] = lambda rounds: None
) -> list[list[int]]:
    """Nanoseconds of each call of each; no new round begins after ``budget`` seconds, but 30 rounds there are.

    Every round has an order of its own, by chance: what a call finds in the caches is not always of the same one.
    """
    chance = np.random.default_rng(0)
    for run in runs:
        warm_up(run)
    samples: list[list[int]] = [[] for _ in runs]
    begin = told = time.monotonic()
    gc.collect()
    gc.disable()
    rounds = 0
    while rounds < min_queries:
        for which in chance.permutation(len(runs)):
            start = time.perf_counter_ns()
            runs[which]()
            samples[which].append(time.perf_counter_ns() - start)
        rounds += 1
        now = time.monotonic()
        if rounds >= 30 and now - begin > budget:
            break
        if now - told > 0.5:
            told = now
            tell(rounds)
    gc.enable()
    return samples


def warm_up(run: Callable[[], Any]) -> None:
    """Run until the medians of two successive windows are within 3 %."""
    previous = 0.0
    for _ in range(MOST_WINDOWS):
        window = []
        for _ in range(WINDOW):
            start = time.perf_counter_ns()
            run()
            window.append(time.perf_counter_ns() - start)
        median = sorted(window)[WINDOW // 2]
        if abs(median - previous) < 0.03 * median:
            return
        previous = median


def memory(job: dict[str, Any]) -> dict[str, Any]:
    (artifact,) = job["artifacts"]
    feeds = read_feeds(artifact)
    importlib.import_module(RUNTIMES[artifact["runtime"]][0])  # what loading a model takes, not a library
    start = time.perf_counter_ns()
    run = open_model(artifact, job["threads"], feeds)
    load_ns = time.perf_counter_ns() - start
    for _ in range(3):
        run()
    return {"load_ns": load_ns, "peak_rss_bytes": peak_rss()}


def energy(job: dict[str, Any]) -> dict[str, Any]:
    """Millijoules of one run of each, all that the meter measures, over slices of ``seconds`` that take turns; None
    with the reason where there is no meter."""
    found, why = meters.find(job.get("root", "/"), gpu=job.get("device", "cpu") != "cpu")
    if not found:
        return {"millijoules": None, "why": why}
    chance = np.random.default_rng(0)
    runs = [open_model(artifact, job["threads"], read_feeds(artifact)) for artifact in job["artifacts"]]
    for run in runs:
        warm_up(run)
    spent, counts = [0.0] * len(runs), [0] * len(runs)
    with meters.reading(found) as joules:
        start, begin = joules(), time.monotonic()
        time.sleep(job["seconds"])
        idle = (joules() - start) / (time.monotonic() - begin)
        for _ in range(SLICES):
            for which in chance.permutation(len(runs)):
                start, end = joules(), time.monotonic() + job["seconds"]
                while time.monotonic() < end:
                    runs[which]()
                    counts[which] += 1
                spent[which] += joules() - start
    each = [1e3 * all_ / count for all_, count in zip(spent, counts)]  # noqa: B905 - Python 3.8
    return {"millijoules": each, "runs": counts, "meter": ", ".join(one.name for one in found), "idle_watts": idle}


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """The time of each operator over ``runs`` runs, as the runtime itself tells it, and of the whole runs.

    ``nodes`` are in the order in which they ran: ``name``, ``op``, ``kernel``, ``calls`` and ``ns`` of all runs, and
    under ``of`` the names of what the runtime fused into it, where it tells them.
    """
    (artifact,) = job["artifacts"]
    told, opener = PROFILERS[artifact["runtime"]]
    arrays = read_feeds(artifact)
    feeds = {name: arrays[name] for name in artifact["inputs"]}  # in order, where a runtime knows no names
    result: dict[str, Any] = told(partial(opener, artifact, job["threads"]), feeds, job["runs"])
    return result


PROFILERS: dict[str, tuple[Any, Any]] = {
    "onnx": (profilers.onnx, onnx_session),
    "openvino": (profilers.openvino, openvino_model),
    "executorch": (profilers.executorch, executorch_program),
}
"""What tells the time of a runtime's operators, by the word of the manifest, and what opens a file for it."""


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """What one artifact answers to each case of its feeds, named ``CASE.input.NAME``: shapes, and values evenly spaced.

    At most ``values`` of an answer, as ``reference.npz`` holds them.
    """
    (artifact,) = job["artifacts"]
    arrays = read_feeds(artifact)
    found = []
    for case in sorted({int(name.split(".", 1)[0]) for name in arrays}):
        marked = f"{case}.input."
        feeds = {name[len(marked) :]: array for name, array in arrays.items() if name.startswith(marked)}
        outputs = open_model(artifact, job["threads"], feeds)()
        outputs = list(outputs.values()) if hasattr(outputs, "values") else outputs
        found.append([{"shape": one.shape, "values": spaced(one, job["values"]).tolist()} for one in outputs])
    return {"answers": found}


def spaced(array: Any, values: int) -> Any:
    return array.reshape(-1)[:: max(1, -(-array.size // values))]


def peak_rss() -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1])
