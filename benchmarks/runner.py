"""The timing loop. One file that runs wherever Python, numpy and a runtime are: ``python runner.py JOB``, JSON itself.

It knows no model, data or metric: it opens a runtime's files, feeds them the arrays of an ``.npz``, and prints one JSON
document with raw nanoseconds. ``mode`` is "latency" (all artifacts in this one process, interleaved round by round, so
that the machine's drift hits all alike), "memory" (one artifact in a process of its own) or "answers" (what it says).
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
from typing import Any, TextIO

import numpy as np

WINDOW = 10
MOST_WINDOWS = 20


def main(text: str, answer: TextIO) -> None:
    job = json.loads(text)
    with alone():
        result = {"latency": latency, "memory": memory, "answers": answers}[job["mode"]](job)
    json.dump(result, answer)


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


def _open(runtime: str, artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    """By ``runtimes/NAME.py``; sent, it lies beside this file as ``runtime_NAME.py``, for libraries are called NAME."""
    name = f"{__package__}.runtimes.{runtime}" if __package__ else f"runtime_{runtime}"
    found: Callable[[], Any] = importlib.import_module(name).open_model(artifact, threads, feeds)
    return found


def read_feeds(artifact: dict[str, Any]) -> dict[str, Any]:
    with np.load(artifact["feeds"], allow_pickle=False) as arrays:
        return dict(arrays)


RUNTIMES = {
    "onnx": ("onnxruntime", partial(_open, "onnx")),
    "openvino": ("openvino", partial(_open, "openvino")),
    "executorch": ("executorch.runtime", partial(_open, "executorch")),
    "tensorrt": ("edgepress.export.backends.tensorrt", partial(_open, "tensorrt")),
    "torch": ("edgepress.models.checkpoint", partial(_open, "torch")),
}
"""By the word of the manifest, the package, which is imported where a job needs it, and what opens a file with it."""


def latency(job: dict[str, Any]) -> dict[str, Any]:
    """Rounds until ``min_queries`` are done or ``min_seconds`` for each artifact are over, but no fewer than 30."""
    runs = [open_model(artifact, job["threads"], read_feeds(artifact)) for artifact in job["artifacts"]]

    def tell(rounds: int) -> None:
        print("progress", rounds, job["min_queries"], file=sys.stderr, flush=True)

    return {"samples_ns": interleaved(runs, job["min_queries"], job["min_seconds"] * len(runs), tell)}


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
        outputs = [on_host(one) for one in (outputs.values() if hasattr(outputs, "values") else outputs)]
        found.append([{"shape": one.shape, "values": spaced(one, job["values"]).tolist()} for one in outputs])
    return {"answers": found}


def on_host(output: Any) -> Any:
    """An output as an array, wherever the runtime left it."""
    if hasattr(output, "is_cuda"):  # a tensor of PyTorch, whose own half precision arrays do not have
        output = output.float().cpu() if output.is_floating_point() else output.cpu()
    return output.numpy() if hasattr(output, "numpy") else output


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
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what libraries print is no part of it
        main(sys.argv[1], answer)
