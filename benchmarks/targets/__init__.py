"""Targets: where and how an artifact runs. A target is a runtime, a device, a number of threads, and a host.

A kind of host is one file with ``connect(address)``, a context manager whose ``put(folder)`` returns the folder's path
over there, whose ``run(argv)`` returns what the command printed, and whose ``environment(threads)`` tells what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

from ...errors import EdgepressError, UnavailableError, UsageError
from ..environment import usable_cpus
from ..imitation import Imitation, take
from ..runner import RUNTIMES
from .ssh import Address

TARGETS = ("local", "ssh")
WRITTEN_FOR = ("onnx", "openvino")
"""Runtimes that a target can name; artifacts of others are measured too, on the CPU of any."""
PLANNED = {"cuda": "ONNX Runtime on an NVIDIA GPU", "tensorrt": "TensorRT"}

THERE_IS = (
    "there is: cpu, cpu:N with a number of threads, cpu:openvino, cpu:openvino:N, and all of them on a device, as in "
    "ssh://user@host/cpu:2; ?memory=512MB&cpus=0,1 after one imitates a smaller device"
)
NO_OPENVINO = "OpenVINO is missing: pip install 'edgepress[openvino]' brings it."

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """``host`` names a file of this folder; ``threads`` is the size of the pool one operator is split over.

    ``runtime`` is what artifacts are written for; those that are there already run on their own. ``threads`` of a
    device is 0, all of its CPUs, until ``connect`` has asked it.
    """

    host: str
    runtime: str
    device: str
    threads: int
    address: Address | None = None
    imitation: Imitation = field(default_factory=Imitation)

    def __str__(self) -> str:
        runtime = "" if self.runtime == "onnx" else f":{self.runtime}"
        threads = f":{self.threads}" if self.threads else ""
        queries = (self.address.query if self.address else "", self.imitation.query)
        query = "&".join(filter(None, queries))
        host = f"ssh://{self.address.authority}/" if self.address else ""
        return f"{host}{self.device}{runtime}{threads}{'?' if query else ''}{query}"

    @property
    def where(self) -> str:
        """The host, for messages."""
        return str(self.address) if self.address else "this machine"


def get(host: str) -> ModuleType:
    """The module ``benchmarks/targets/<host>.py``."""
    if host not in TARGETS:
        raise UsageError(f"There is no kind of host '{host}' (known: {', '.join(TARGETS)}).")
    return import_module(f"{__name__}.{host}")


def parse(text: str) -> Target:
    """``cpu`` (all usable CPUs) or ``cpu:N`` threads, for ONNX Runtime; ``cpu:openvino`` or ``cpu:openvino:N``.

    On a device ``ssh://user@host:port/`` stands before it, and ``?python=PATH`` or ``?folder=PATH`` may follow; without
    a word after the host it is ``cpu``. ``?memory=512MB&cpus=0,1`` after either imitates a smaller device.
    UnavailableError for what is only planned, or not installed here.
    """
    place, _, query = text.partition("?")
    imitation, query = take(query)
    device = re.fullmatch(r"ssh://([^/]*)(?:/(.*))?", place)
    address = Address.parse(device[1], query) if device else None
    word = (device[2] or "cpu") if device else place
    if query and not device:
        raise UsageError(f"'?{query}' after the target '{place}' is not of ?memory=512MB and ?cpus=0,1.")
    match = re.fullmatch(r"cpu(:openvino)?(?::(\d{1,4}))?", word)
    if match:
        runtime = "openvino" if match[1] else "onnx"
        threads = int(match[2]) if match[2] else None
        if address:
            if threads == 0:
                raise UsageError(f"The target '{text}' asks for 0 threads.")
            return Target("ssh", runtime, "cpu", threads or 0, address, imitation)
        if runtime == "openvino" and not find_spec("openvino"):
            raise UnavailableError(NO_OPENVINO)
        cpus = len(imitation.cpus) or usable_cpus()
        threads = cpus if threads is None else threads
        return _fitting(Target("local", runtime, "cpu", threads, imitation=imitation), cpus)
    for planned, what in PLANNED.items():
        if word == planned or word.split(":", maxsplit=1)[0] == planned:
            raise UnavailableError(f"The target '{text}' ({what}) is not available yet in this version ({THERE_IS}).")
    raise UsageError(f"There is no target '{text}' ({THERE_IS}).")


@contextmanager
def connect(target: Target, *runtimes: str) -> Iterator[tuple[Any, Target]]:
    """The host of ``target``, and the target with the number of threads that it has there.

    Raises UsageError where it has fewer CPUs, UnavailableError where a device lacks what measures ``runtimes``, and
    what ``ssh.connect`` does.
    """
    with get(target.host).connect(target.address) as host:
        if target.address:
            environment = host.environment(0)
            cpus = len(target.imitation.cpus) or environment["cpus"]
            target = _fitting(replace(target, threads=target.threads or cpus), cpus)
            lacking = list(dict.fromkeys(name for runtime in runtimes for name in _lacking(environment, runtime)))
            if lacking:
                raise UnavailableError(f"{host.lack(lacking)}.")
        yield host, target


def at_once(targets: Sequence[Target], work: Callable[[Target], Result]) -> list[Result]:
    """``work`` on each target: of different hosts at the same time, of one host one after the other.

    When one fails the others end what they are at; then the first error is raised.
    """
    by_host: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        by_host.setdefault(target.address.host.lower() if target.address else "", []).append(number)
    failed: list[Exception] = []
    done: dict[int, Result] = {}

    def one_host(numbers: list[int]) -> None:
        for number in numbers:
            if failed:
                return
            try:
                done[number] = work(targets[number])
            except Exception as error:
                failed.append(error)

    if len(by_host) > 1:
        pool = ThreadPoolExecutor(len(by_host))
        try:
            list(pool.map(one_host, by_host.values()))
        except BaseException as error:
            failed.append(EdgepressError(f"It was stopped by {type(error).__name__}."))
            raise
        finally:
            pool.shutdown(wait=False)  # where it was stopped, closing the connections ends what still runs
    else:
        one_host(list(range(len(targets))))
    if failed:
        raise failed[0]
    return [done[number] for number in range(len(targets))]


def listing() -> list[dict[str, Any]]:
    """Every target, whether this machine can run it, and if not what is missing."""
    cpus = usable_cpus()
    found = find_spec("openvino") is not None
    rows: list[dict[str, Any]] = []
    for n in sorted({1, cpus}):
        threads = f"{n} of {cpus} threads"
        rows.append({"target": f"cpu:{n}", "available": True, "note": f"{threads}, ONNX Runtime"})
        note = f"{threads}, OpenVINO" if found else NO_OPENVINO
        rows.append({"target": f"cpu:openvino:{n}", "available": found, "note": note})
    note = "the same on a device over ssh: 'edgepress targets ssh://user@host' asks it"
    rows.append({"target": "ssh://user@host/cpu:2", "available": True, "note": note})
    rows += [
        {"target": word, "available": False, "note": f"{what}: not available yet in this version"}
        for word, what in PLANNED.items()
    ]
    return rows


def listing_of(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the device ``text`` is, and every target on it, as :func:`listing` does for this machine."""
    target = parse(text)
    if not target.address:
        raise UsageError(f"'{text}' is not a device: give one as ssh://user@host, or nothing for this machine.")
    rows: list[dict[str, Any]] = []
    with get(target.host).visit(target.address) as device:
        environment = device.environment(0)
        cpus = environment["cpus"]
        for n in sorted({1, cpus}):
            for runtime in WRITTEN_FOR:
                package = RUNTIMES[runtime][0]
                lacking = _lacking(environment, runtime)
                note = f"{n} of {cpus} threads, {package} {environment['packages'].get(package)}"
                one = replace(target, runtime=runtime, threads=n)
                note = device.lack(lacking) if lacking else note
                rows.append({"target": str(one), "available": not lacking, "note": note})
    return environment, rows


def _fitting(target: Target, cpus: int) -> Target:
    if not 1 <= target.threads <= cpus:
        raise UsageError(
            f"The target '{target}' asks for {target.threads} threads; {target.where} has {cpus} usable CPUs"
            f"{' by cpus=' if target.imitation.cpus else ''}."
        )
    return target


def _lacking(environment: dict[str, Any], runtime: str) -> list[str]:
    """Packages that ``runtime`` needs; of one that cannot be measured at all, which ``load.benchmark`` says, none."""
    needed = ["numpy", RUNTIMES[runtime][0].partition(".")[0]] if runtime in RUNTIMES else []
    return [package for package in needed if package not in environment["packages"]]
