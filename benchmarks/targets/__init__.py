"""Targets: where and how an artifact runs. A target is a runtime, a device, a number of threads, and a host.

A kind of host is one file with ``connect(address)``, a context manager whose ``put(folder)`` returns the folder's path
over there, whose ``run(argv)`` returns what the command printed, and whose ``environment(threads)`` tells what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from shutil import which
from types import ModuleType
from typing import Any, TypeVar

from ...errors import EdgepressError, UnavailableError, UsageError
from ..device import gpu, packages
from ..environment import usable_cpus
from ..imitation import Imitation, take
from ..runner import RUNTIMES
from . import missing
from .ssh import Address

TARGETS = ("local", "ssh")
WRITTEN_FOR = ("onnx", "openvino")
"""Runtimes that ``compress`` writes for, on the CPU; artifacts of others are measured too, on the CPU of any."""
RUNS_ON = {"onnx": "cpu cuda", "openvino": "cpu", "executorch": "cpu", "tensorrt": "cuda", "torch": "cpu cuda"}
"""The devices of each runtime."""
AT_HOME = ("torch", "tensorrt")
"""Runtimes that need edgepress itself, and run on this machine alone."""
TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch", "tensorrt": "TensorRT"}
TITLES |= {"torch": "PyTorch"}

THERE_IS = (
    "there is: cpu, cpu:N with a number of threads, cpu:openvino, cpu:openvino:N, cuda, cuda:tensorrt, and all of them "
    "on a device, as in ssh://user@host/cpu:2; here also tensorrt, torch, torch:compile, torch:cuda, torch:cuda:graph "
    "and torch:cuda:compile, the last five with fp16 or bf16, as in torch:cuda:fp16, and on the CPU with :N; "
    "?memory=512MB&cpus=0,1 after one imitates a smaller device"
)
WORD = re.compile(
    r"(?P<device>cpu)(:(?P<runtime>openvino))?(:(?P<threads>\d{1,4}))?"
    r"|(?P<device_>cuda)(:(?P<form_>tensorrt))?"
    r"|(?P<runtime_>tensorrt)"
    r"|(?P<torch>torch)(:(?P<gpu>cuda))?(:(?P<form>graph|compile))?(:(?P<precision>fp16|bf16))?"
    r"(:(?P<threads_>\d{1,4}))?"
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """``host`` names a file of this folder; ``threads`` is the size of the pool one operator is split over.

    ``runtime`` is what artifacts are written for; those that are there already run on their own, on the same
    ``device``, "cpu" or "cuda". ``form`` is a way in which the runtime runs, "" for its plain one,
    ``precision`` what PyTorch computes in. ``threads`` of a device is 0, all of its CPUs, until ``connect`` has asked.
    """

    host: str
    runtime: str
    device: str
    threads: int
    address: Address | None = None
    form: str = ""
    precision: str = "fp32"
    imitation: Imitation = field(default_factory=Imitation)

    def __str__(self) -> str:
        device = self.device if self.runtime in WRITTEN_FOR else ""
        runtime = "" if self.runtime == "onnx" else self.runtime
        gpu = "cuda" if self.runtime == "torch" and self.device == "cuda" else ""
        precision = "" if self.precision == "fp32" else self.precision
        threads = str(self.threads) if self.threads and self.device == "cpu" else ""
        word = ":".join(filter(None, (device, runtime, gpu, self.form, precision, threads)))
        queries = (self.address.query if self.address else "", self.imitation.query)
        query = "&".join(filter(None, queries))
        host = f"ssh://{self.address.authority}/" if self.address else ""
        return f"{host}{word}{'?' if query else ''}{query}"

    @property
    def where(self) -> str:
        """The host, for messages."""
        return str(self.address) if self.address else "this machine"

    def way(self, runtime: str) -> tuple[str, str]:
        """The form and the precision in which what is for ``runtime`` is run here, beside what the target is for."""
        return (self.form, self.precision) if runtime == self.runtime else ("", "fp32")


def get(host: str) -> ModuleType:
    """The module ``benchmarks/targets/<host>.py``."""
    if host not in TARGETS:
        raise UsageError(f"There is no kind of host '{host}' (known: {', '.join(TARGETS)}).")
    return import_module(f"{__name__}.{host}")


def parse(text: str) -> Target:
    """``cpu`` (all usable CPUs) or ``cpu:N`` threads, for ONNX Runtime; ``cpu:openvino`` or ``cpu:openvino:N``.

    ``cuda`` is ONNX Runtime on an NVIDIA GPU, ``cuda:tensorrt`` its TensorRT provider; ``tensorrt`` runs engines;
    ``torch``, ``torch:compile``, ``torch:cuda``, ``torch:cuda:graph`` and ``torch:cuda:compile`` run models that are
    not exported. On a device ``ssh://user@host:port/`` stands before the first four, and ``?python=PATH`` or
    ``?folder=PATH`` may follow; without a word after the host it is ``cpu``. ``?memory=512MB&cpus=0,1`` after either
    imitates a smaller device. UsageError for any other word, UnavailableError for what is missing here.
    """
    address, match, imitation = _read(text)
    if not match or (match["gpu"] and match["threads_"]) or (match["form"] == "graph" and not match["gpu"]):
        raise UsageError(f"There is no target '{text}' ({THERE_IS}).")
    threads = match["threads"] or match["threads_"]
    cpus = len(imitation.cpus) or usable_cpus()
    target = Target(
        host="ssh" if address else "local",
        runtime=match["runtime"] or match["runtime_"] or match["torch"] or "onnx",
        device=match["device"] or ("cpu" if match["torch"] and not match["gpu"] else "cuda"),
        threads=int(threads) if threads else 0 if address else cpus,
        address=address,
        form=match["form"] or match["form_"] or "",
        precision=match["precision"] or "fp32",
        imitation=imitation,
    )
    if not address:
        check(target)
        return _fitting(target, cpus)
    if target.runtime in AT_HOME:
        title = TITLES[target.runtime]
        raise UsageError(f"{title} is measured on this machine alone, not over ssh: install edgepress on {address}.")
    if threads == "0":
        raise UsageError(f"The target '{text}' asks for 0 threads.")
    return target


def to_write_for(text: str) -> Target:
    """The target ``text``, where artifacts can be written for it; UnavailableError where ``bench`` alone knows it."""
    _, match, _ = _read(text)
    if match and not match["device"]:
        raise UnavailableError(
            f"Writing for the target '{text}' is not available yet in this version; 'edgepress bench' measures on it."
        )
    return parse(text)


def _read(text: str) -> tuple[Address | None, re.Match[str] | None, Imitation]:
    """The device that a target is on, its word, or nothing where there is no such word, and what it imitates."""
    place, _, query = text.partition("?")
    imitation, query = take(query)
    device = re.fullmatch(r"ssh://([^/]*)(?:/(.*))?", place)
    if query and not device:
        raise UsageError(f"'?{query}' after the target '{place}' is not of ?memory=512MB and ?cpus=0,1.")
    address = Address.parse(device[1], query) if device else None
    return address, WORD.fullmatch((device[2] or "cpu") if device else place), imitation


def check(target: Target, runtime: str = "") -> None:
    """Raise UnavailableError where this machine lacks what runs the ``runtime``, or the target's own."""
    runtime = runtime or target.runtime
    lacks = missing.here(runtime, target.device, target.way(runtime)[0])
    if lacks:
        raise UnavailableError(f"The target '{target}' cannot run here: {missing.sentence(lacks)}")


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
            if missing.no_gpu(environment, target.device):
                raise UnavailableError(f"There is no NVIDIA GPU on {target.where}, or no driver of it.")
            lacks = (missing.there(environment, runtime, target.device) for runtime in runtimes)
            lacking = list(dict.fromkeys(name for of_one in lacks for name in of_one))
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


WORDS = (
    *(("onnx", "cpu", ""), ("openvino", "cpu", ""), ("executorch", "cpu", "")),
    *(("torch", "cpu", ""), ("torch", "cpu", "compile")),
    *(("onnx", "cuda", ""), ("onnx", "cuda", "tensorrt"), ("tensorrt", "cuda", "")),
    *(("torch", "cuda", ""), ("torch", "cuda", "graph"), ("torch", "cuda", "compile")),
)
"""What there is to run on a machine: runtime, device and form."""


def listing() -> list[dict[str, Any]]:
    """Every target, whether this machine can run it, in what versions, and if not what is missing, and what adds it."""
    cpus, installed = usable_cpus(), packages()
    rows: list[dict[str, Any]] = []
    for runtime, device, form in WORDS:
        lacks = missing.here(runtime, device, form)
        for n in sorted({1, cpus}) if device == "cpu" else [0]:
            named = "onnx" if runtime == "executorch" else runtime  # it has no word, and runs on any cpu
            place = f"{n} of {cpus} threads" if n else str((gpu() or {}).get("name"))
            note = missing.sentence(lacks) if lacks else ", ".join((place, *_forms(runtime, form), TITLES[runtime]))
            rows.append(_row(str(Target("local", named, device, n, form=form)), runtime, note, lacks, installed))
    ssh = [] if which("ssh") else [missing.Lack("an ssh client", "sudo apt-get install openssh-client")]
    note = missing.sentence(ssh) if ssh else "cpu and cuda on a device: 'edgepress targets ssh://user@host' asks it"
    return [*rows, _row("ssh://user@host/cpu:2", "onnx", note, ssh, {})]


def _forms(runtime: str, form: str) -> list[str]:
    said = {"compile": "torch.compile", "graph": "CUDA graph", "tensorrt": "TensorRT provider"}.get(form)
    return [said] if said else ["eager"] if runtime == "torch" else []


def _row(
    word: str, runtime: str, note: str, lacks: Sequence[missing.Lack], installed: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "target": word,
        "runtime": runtime,
        "available": not lacks,
        "note": note,
        "versions": missing.versions(installed, runtime),
        "missing": [{"what": lack.what, "command": lack.command or None} for lack in lacks],
    }


def listing_of(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the device ``text`` is, and every target on it, as :func:`listing` does for this machine."""
    target = parse(text)
    if not target.address:
        raise UsageError(f"'{text}' is not a device: give one as ssh://user@host, or nothing for this machine.")
    rows: list[dict[str, Any]] = []
    with get(target.host).visit(target.address) as device:
        environment = device.environment(0)
        cpus = environment["cpus"]
        for runtime, kind, form in (word for word in WORDS if word[0] not in {*AT_HOME, "executorch"} and not word[2]):
            package = RUNTIMES[runtime][0]
            lacks, said = [], []
            if missing.no_gpu(environment, kind):
                lacks.append(missing.Lack("an NVIDIA GPU", ""))
                said.append(f"There is no NVIDIA GPU on {target.where}, or no driver of it")
            if lacking := missing.there(environment, runtime, kind):
                lacks.append(missing.Lack(" and ".join(lacking), device.adding(lacking)))
                said.append(device.lack(lacking))
            for n in sorted({1, cpus}) if kind == "cpu" else [0]:
                place = f"{n} of {cpus} threads" if n else str((environment.get("gpu") or {}).get("name"))
                note = ". ".join(said) or f"{place}, {package} {environment['packages'].get(package)}"
                one = replace(target, runtime=runtime, device=kind, threads=n, form=form)
                rows.append(_row(str(one), runtime, note, lacks, environment["packages"]))
    return environment, rows


def _fitting(target: Target, cpus: int) -> Target:
    if not 1 <= target.threads <= cpus:
        raise UsageError(
            f"The target '{target}' asks for {target.threads} threads; {target.where} has {cpus} usable CPUs"
            f"{' by cpus=' if target.imitation.cpus else ''}."
        )
    return target
