"""The timing loop. One file that runs wherever Python, numpy and a runtime are: ``python runner.py JOB``, JSON itself.

It knows no model, data or metric: it opens a runtime's files, feeds them the arrays of an ``.npz``, and prints one JSON
document with raw nanoseconds. ``mode`` is "latency" (all artifacts in this one process, interleaved round by round, so
that the machine's drift hits all alike), "memory" (one artifact in a process of its own), "answers" (what it says),
"energy" (joules, after the timing) or "profile" (the time of one artifact's operators, where nothing else is timed).

"latency" knows the ``scenario``s of MLPerf Inference (Reddi et al. 2020, arXiv:1911.02549): "single-stream", one query
after the other, each timed alone; "offline", all queries are there at once, and the whole is timed; "server", queries
arrive at a ``rate``, at random, and wait their turn.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, TextIO

import numpy as np

# Beside this file, in the package or in the folder that both were sent to.
meters, profilers = (
    importlib.import_module(f"{__package__}.{name}" if __package__ else name) for name in ("meters", "profilers")
)

WINDOW = 10
MOST_WINDOWS = 20
LEAST = 30
"""Rounds that there are in any case."""
SETTLED_NS = 1_000_000
"""How long an artifact that takes turns runs untimed at the least. Of nine sessions of a model of 0.23 ms, on an AMD
EPYC, each took 30 % longer after one such run than after two, and 2 % longer after two than after eight."""
OPENINGS = 5
"""How often artifacts are opened in a run, where opening takes no longer than what is timed meanwhile."""
TURNS = 20
"""Of an offline or server run: an artifact serves one after the other, in turn with those of the others."""
SEGMENTS = 10
"""Of a run, for its intervals: long enough to be nearly independent, and enough of them for Student's t."""
CONFIDENCE = 0.99
"""Of the interval of a ratio: at 95 % one of twenty artifacts that are the same would be called faster or slower."""
FIRST_LOOK, GROWTH = 100, 1.5
"""Rounds before a run may end early, and by how much they grow from look to look."""
SPIN = 300_000
"""Nanoseconds before a query arrives in which the clock is watched: sleeping is less punctual."""

SLICES = 3
"""Of energy, for each artifact."""

clock = time.perf_counter_ns


def main(text: str, answer: TextIO) -> None:
    job = json.loads(text)
    modes = {"latency": latency, "memory": memory, "answers": answers, "energy": energy, "profile": profile}
    with alone():
        result = modes[job["mode"]](job)
    json.dump(result, answer)


@contextmanager
def alone() -> Iterator[None]:
    """Within the context no other runner of this user works on this machine: two at once would slow each other down.

    The kernel lets go of the lock however its holder ends.
    """
    path = lock_file()
    try:
        lock = os.open(str(path), os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        sys.exit(f"{path}, by which measurements take turns, cannot be opened ({error.strerror}): remove it")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def lock_file(users: str = "/run/user") -> Path:
    """The same for all of this user's processes, whatever they take for the folder of temporary files."""
    own = Path(users, str(os.getuid()))
    try:
        ours = own.is_dir() and own.stat().st_uid == os.getuid() and os.access(str(own), os.W_OK)
    except OSError:
        ours = False
    return (own if ours else Path("/tmp")) / f"edgepress-{os.getuid()}.lock"  # noqa: S108 - it is opened with care


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    """What runs the artifact once on ``feeds``."""
    _, opener = RUNTIMES[artifact["runtime"]]
    run: Callable[[], Any] = opener(artifact, threads, feeds)
    return run


def _of(runtime: str, name: str, *args: Any, **options: Any) -> Any:
    """What ``name`` of ``runtimes/RUNTIME.py`` gives; sent, that lies beside this file as ``runtime_RUNTIME.py``, for
    libraries are called RUNTIME."""
    module = f"{__package__}.runtimes.{runtime}" if __package__ else f"runtime_{runtime}"
    return getattr(importlib.import_module(module), name)(*args, **options)


def read_feeds(artifact: dict[str, Any]) -> dict[str, Any]:
    with np.load(artifact["feeds"], allow_pickle=False) as arrays:
        return dict(arrays)


RUNTIMES = {
    "onnx": ("onnxruntime", partial(_of, "onnx", "open_model")),
    "openvino": ("openvino", partial(_of, "openvino", "open_model")),
    "executorch": ("executorch.runtime", partial(_of, "executorch", "open_model")),
    "tensorrt": ("edgepress.export.backends.tensorrt", partial(_of, "tensorrt", "open_model")),
    "torch": ("edgepress.models.checkpoint", partial(_of, "torch", "open_model")),
}
"""By the word of the manifest, the package, which is imported where a job needs it, and what opens a file with it."""


def latency(job: dict[str, Any]) -> dict[str, Any]:
    """The queries of each artifact, in ``samples_ns``: at least 30, and ``min_queries`` or what ``min_seconds`` allow.

    Of an offline run they add up to its whole time. Else each is without ``clock_ns``, what timing itself takes.
    """
    feeds = [read_feeds(artifact) for artifact in job["artifacts"]]
    chance = np.random.default_rng(1)
    runs: list[Callable[[], Any]] = []
    pace = [0.0] * len(feeds)

    def reopen() -> float:
        """Open all artifacts, in an order by chance; the seconds it took."""
        begin = time.monotonic()
        runs.clear()  # nothing is in memory twice
        gc.collect()
        order = chance.permutation(len(feeds)).tolist()
        opened = {at: open_model(job["artifacts"][at], job["threads"], feeds[at]) for at in order}
        runs.extend(opened[at] for at in range(len(feeds)))
        pace[:] = [warm_up(run) for run in runs]
        return time.monotonic() - begin

    watch = meters.Watch()

    def tell(queries: int) -> None:
        watch.look()  # between two rounds, where nothing is timed
        print("progress", queries, job["min_queries"], file=sys.stderr, flush=True)

    cost, overhead = reopen(), clock_overhead()
    budget = job["min_seconds"] * len(runs)
    scenario, most = job.get("scenario", "single-stream"), job["min_queries"]
    if scenario == "single-stream":
        width = job.get("confidence_width")
        found = timed_rounds(runs, most, budget, tell, width=width, reopen=reopen, cost=cost)
    elif scenario == "offline":
        fitting = int(job["min_seconds"] * 1e9 / max(pace))
        found = offline(runs, max(LEAST, min(most, fitting)), budget, tell)
    else:
        fitting = int(job["min_seconds"] * job["rate"])
        arrivals = poisson(job["rate"], max(LEAST, min(most, fitting)), job["seed"])
        found = server(runs, arrivals, 2 * budget, tell)
    if scenario != "offline":
        found["samples_ns"] = [[max(1, ns - overhead) for ns in taken] for taken in found["samples_ns"]]
    return {"openings": 1, "early": False, "per_slice": 1, **found, "clock_ns": overhead, "watch": watch.result()}


def interleaved(
    runs: list[Callable[[], Any]], min_queries: int, budget: float, tell: Callable[[int], None] = lambda rounds: None
) -> list[list[int]]:
    """Nanoseconds of each call of each, after a warm-up, what timing itself takes included; see ``timed_rounds``."""
    for run in runs:
        warm_up(run)
    samples: list[list[int]] = timed_rounds(runs, min_queries, budget, tell)["samples_ns"]
    return samples


def timed_rounds(
    runs: list[Callable[[], Any]],
    min_queries: int,
    budget: float,
    tell: Callable[[int], None] = lambda rounds: None,
    *,
    width: float | None = None,
    reopen: Callable[[], float] | None = None,
    cost: float = 0.0,
) -> dict[str, Any]:
    """Each of ``runs`` timed once a round; no new round begins after ``budget`` seconds, but 30 rounds there are.

    Where there are several, each settles before it is timed: what is deployed finds its own weights in the caches,
    and after another's turn a small model would be slower by more than a large one. Every round has an order of its
    own, by chance.

    Where the memory of a model comes to lie makes it faster or slower, by more than many rounds leave in doubt
    (Mytkowicz et al. 2009, ASPLOS; Kalibera and Jones 2013, ISMM). So that it is part of what is measured, ``reopen``
    places all of them anew, four times during a run, unless that takes longer (``cost`` seconds, the last time) than
    what was timed since. It takes nothing of the budget.

    With a ``width`` the run may end ``early``: when the interval of each ratio to the first, or of the median of one
    alone, is narrower than this share of its value. It is looked at after ``looks`` rounds alone, at a confidence of
    1 - 0.05 / (number of looks) and no less than ``CONFIDENCE``, so that the chance of stopping at an interval that
    misses stays below 5 % over all of them together (Bonferroni's inequality).
    """
    chance = np.random.default_rng(0)
    checks = looks(min_queries) if width else []
    confidence = max(CONFIDENCE, 1 - 0.05 / len(checks)) if checks else 0.0
    samples: list[list[int]] = [[] for _ in runs]
    rounds, openings, early = 0, 1, False
    gc.collect()
    gc.disable()
    begin = since = told = time.monotonic()
    while rounds < max(min_queries, LEAST):
        for which in chance.permutation(len(samples)):
            if len(samples) > 1:
                settle(runs[which])
            samples[which].append(timed(runs[which]))
        rounds += 1
        now = time.monotonic()
        if rounds >= LEAST and now - begin > budget:
            break
        early = rounds in checks and precise(samples, width or 0.0, confidence)
        if early:
            break
        if now - told > 0.5:
            told = now
            tell(rounds)
        share = max(rounds / min_queries, (now - begin) / budget if budget else 1.0)
        if reopen and cost < now - since and openings / OPENINGS <= share < 1:
            cost = reopen()
            openings += 1
            since = time.monotonic()
            begin += since - now
    gc.enable()
    return {"samples_ns": samples, "openings": openings, "early": early}


def settle(run: Callable[[], Any]) -> None:
    """Run it untimed, once and until ``SETTLED_NS`` have passed: a small model takes some runs to be back in caches."""
    start = clock()
    run()
    while clock() - start < SETTLED_NS:
        run()


def timed(run: Callable[[], Any]) -> int:
    start = clock()
    run()
    return clock() - start


def clock_overhead() -> int:
    """Nanoseconds that ``timed`` finds for a call that does nothing: the median of 2,001."""
    return sorted(timed(nothing) for _ in range(2001))[1000]


def nothing() -> None:
    pass


def offline(
    runs: list[Callable[[], Any]], queries: int, budget: float, tell: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """All ``queries`` are there from the beginning and are answered one after the other, in ``slices``.

    A sample is the time from one answer to the next, so that those of a slice add up to all of its time.
    """
    samples: list[list[int]] = [[] for _ in runs]

    def serve(which: int, count: int) -> None:
        stamps = [clock()]
        for _ in range(count):
            runs[which]()
            stamps.append(clock())
        samples[which] += np.diff(stamps).tolist()

    return {"per_slice": slices(runs, serve, queries, budget, tell), "samples_ns": samples}


def server(
    runs: list[Callable[[], Any]],
    arrivals: list[int],
    budget: float,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Queries that come at ``arrivals``, in nanoseconds, and are answered one at a time, first come, first served.

    A sample is the time from when a query was due to its answer, the waiting included, however late it was begun; what
    the work alone took is in ``service_ns``. They are served in ``slices``: the clock of an artifact stands still while
    others have their turn, and what waited then goes on waiting.
    """
    samples: list[list[int]] = [[] for _ in runs]
    services: list[list[int]] = [[] for _ in runs]
    clocks = [0 for _ in runs]

    def serve(which: int, count: int) -> None:
        done = len(samples[which])
        begin = clock() - clocks[which]
        for due in arrivals[done : done + count]:
            wait(begin + due)
            start = clock()
            runs[which]()
            end = clock()
            services[which].append(end - start)
            samples[which].append(end - begin - due)
        clocks[which] = end - begin

    slices(runs, serve, len(arrivals), budget, tell)
    return {"samples_ns": samples, "service_ns": services}


def slices(
    runs: list[Callable[[], Any]],
    serve: Callable[[int, int], None],
    queries: int,
    budget: float,
    tell: Callable[[int], None],
) -> int:
    """Let each of ``runs`` have a slice of the ``queries`` in turn, in an order by chance; how many a slice has.

    20 slices are as good for pairs as rounds are, and long enough for a throughput. Before each comes what
    :func:`settle` runs, after which the caches are its own. No new round begins after ``budget`` seconds, but half of
    them there are.
    """
    chance = np.random.default_rng(0)
    count = max(1, queries // TURNS)
    gc.collect()
    gc.disable()
    begin = time.monotonic()
    for turn in range(-(-queries // count)):
        for which in chance.permutation(len(runs)):
            settle(runs[which])
            serve(which, count)
        tell((turn + 1) * count)
        if turn + 1 >= TURNS // 2 and time.monotonic() - begin > budget:
            break
    gc.enable()
    return count


def poisson(rate: float, count: int, seed: int) -> list[int]:
    """Nanoseconds at which ``count`` queries arrive, ``rate`` a second: a Poisson process, as in MLPerf's server."""
    gaps = np.random.default_rng(seed).exponential(1e9 / rate, count)
    arrivals: list[int] = gaps.cumsum().astype(np.int64).tolist()
    return arrivals


def wait(until: int) -> None:
    left = until - clock()
    if left > SPIN:
        time.sleep((left - SPIN) / 1e9)
    while clock() < until:
        pass


def warm_up(run: Callable[[], Any]) -> float:
    """Run until the medians of two successive windows are within 3 %; the last of them, in nanoseconds."""
    median = 0.0
    for _ in range(MOST_WINDOWS):
        previous, median = median, sorted(timed(run) for _ in range(WINDOW))[WINDOW // 2]
        if abs(median - previous) < 0.03 * median:
            break
    return median


# ---- how sure it is


def looks(most: int) -> list[int]:
    """After how many rounds a run looks whether it may end."""
    found = [FIRST_LOOK]
    while found[-1] * GROWTH < most:
        found.append(int(found[-1] * GROWTH))
    return found


def precise(samples: list[list[int]], width: float, confidence: float) -> bool:
    """Whether the interval of every ratio to the first, or of one alone, is narrower than ``width``, relatively."""
    first, *others = np.log(samples)
    found = [first - other for other in others] or [first]
    return all(2 * math.sinh(interval(centres(logs), confidence)[1]) < width for logs in found)


def centres(values: Any, centre: Callable[[Any], Any] = np.median) -> Any:
    """The medians of ten segments of a run, each of neighbouring rounds."""
    return np.array([centre(part) for part in np.array_split(values, SEGMENTS)])


def interval(values: Any, confidence: float) -> tuple[float, float]:
    """The mean of ``values``, one of each segment of a run in their order, and half the width of its interval.

    Samples of one run are no independent draws: a machine's clock and load drift. What is nearly independent are the
    estimates from long segments, and Student's interval of their mean holds even where some segments are noisier than
    others (batch means; Ibragimov and Mueller 2010, Journal of Business & Economic Statistics 28:4). Neighbouring
    segments that are still alike tell less: as in a first-order autoregression, their number is divided by
    (1 + r) / (1 - r), where r is their autocorrelation, corrected for its bias, and no less than 0.
    """
    count = len(values)
    mean = float(np.mean(values))
    off = np.asarray(values) - mean
    squares = float(off @ off)
    if not squares:
        return mean, 0.0
    alike = min(max(float(off[1:] @ off[:-1]) / squares + 1 / count, 0.0), 0.7)
    error = math.sqrt(squares / (count - 1) / count * (1 + alike) / (1 - alike))
    return mean, student(confidence, count - 1) * error


def student(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t, by the expansion of Abramowitz and Stegun, 26.7.5: scipy is not needed."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


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
    "onnx": (profilers.onnx, partial(_of, "onnx", "session")),
    "openvino": (profilers.openvino, partial(_of, "openvino", "compiled")),
    "executorch": (profilers.executorch, partial(_of, "executorch", "program")),
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
