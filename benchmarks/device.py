"""What a device is, and what is done on it over ssh. One file of Python 3.8's standard library, in ASCII.

It is not installed over there: ``targets/ssh.py`` sends it, and runs ``python3 device.py VERB ARGUMENT...``. Every verb
prints JSON objects, one a line, the last of which ends it, so that an answer that was cut short is known from a whole
one; and every verb may be said again after a lost connection, for it does nothing twice.

All that it writes is in one folder. The folder is removed when the connection is closed, and by a process left beside
it (``keep``) where nobody has asked for anything for long: a client that was lost leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import fcntl
    from importlib.metadata import PackageNotFoundError, version
except ImportError:  # Windows, or a Python older than 3.8
    sys.exit("edgepress measures on devices with a POSIX system and Python 3.8 or later")

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
PACKAGES = (
    *("edgepress", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "executorch", "tensorrt"),
    *("tensorrt_rtx", "torch", "transformers"),
)
PREFIX = "edgepress-"


# ---- what it is


def usable_cpus() -> int:
    """CPUs that this process may run on, by affinity and by its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def fingerprint(threads: int) -> dict[str, Any]:
    """The machine and its libraries, as plain data."""
    parts = [line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in parts}
    have = set((fields.get("flags") or fields.get("Features") or "").split())
    board = _read("/proc/device-tree/model").strip("\0 \n")  # ARM kernels give a processor's number, and no name
    return {
        "cpu": fields.get("model name") or board or platform.processor() or platform.machine(),
        "arch": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in have],
        "cpus": usable_cpus(),
        "physical_cpus": _physical_cpus(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "load_1min": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": packages(),
        "providers": providers(),
        "gpu": gpu(),
    }


def packages() -> dict[str, str]:
    """The versions of what is installed of ``PACKAGES``; ONNX Runtime's build for GPUs is ``onnxruntime`` too."""
    found = {name: known for name in PACKAGES for known in [_version(name)] if known}
    if "onnxruntime-gpu" in found:
        found.setdefault("onnxruntime", found["onnxruntime-gpu"])
    return found


def providers() -> list[str]:
    """What ONNX Runtime's build computes on besides the CPU: "cuda", "tensorrt". Its libraries tell, unloaded."""
    spec = find_spec("onnxruntime")
    places = list(spec.submodule_search_locations or ()) if spec else []
    start, shared = "libonnxruntime_providers_", "shared"
    names = [path.stem[len(start) :] for place in places for path in Path(place, "capi").glob(start + "*.so")]
    return sorted(name for name in names if name != shared)


@lru_cache(maxsize=None)  # noqa: UP033 - Python 3.8 has no other
def gpu() -> dict[str, Any] | None:
    """The first NVIDIA GPU, as its driver's own library tells, and the newest CUDA that the driver runs; or None."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, number, size, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    cuda.cuDriverGetVersion(ctypes.byref(number))
    driver = number.value
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
        capability.append(str(number.value))
    cuda.cuDeviceGetName(name, len(name), 0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), 0)
    return {
        "name": name.value.decode(errors="replace"),
        "count": count.value,
        "capability": ".".join(capability),
        "memory_bytes": size.value,
        "cuda": f"{driver // 1000}.{driver % 1000 // 10}",
    }


def gpu_without_driver() -> bool:
    """Whether an NVIDIA GPU is on the bus, whose driver then is what is missing."""
    found = Path("/sys/bus/pci/devices").glob("*/class")
    return any(_read(path).startswith("0x03") and "0x10de" in _read(path.parent / "vendor") for path in found)


def _physical_cpus() -> int | None:
    """Cores, where the kernel tells which CPUs share one."""
    folders = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology")
    cores = {tuple(_read(folder / name) for name in ("physical_package_id", "core_id")) for folder in folders}
    return len(cores) or None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- the folder


def probe(threads: str) -> None:
    """What the device is, and whether its Python leaves the installing of packages to the system (PEP 668)."""
    alone = sys.prefix == sys.base_prefix  # no virtual environment
    managed = alone and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    _end(environment=fingerprint(int(threads)), managed=managed)


def claim(base: str, lease: str) -> None:
    """A new folder in ``base``, or where temporary files are kept, with this file in it; ``lease`` is in seconds."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base or None))
    except OSError as error:
        _end(error=f"no folder can be made in {base or tempfile.gettempdir()} ({error.strerror})")
        return
    try:
        (folder / "device.py").write_text(globals()["source"], encoding="ascii")
        (folder / "keeper").write_text(str(_detached("keep", str(folder), lease)), encoding="ascii")
    except OSError as error:
        shutil.rmtree(str(folder), ignore_errors=True)
        _end(error=_full(error, folder.parent))
        return
    touch(str(folder))


def touch(folder: str) -> None:
    """Say that somebody is still there; ``folder`` in the answer is empty where it is too late."""
    alive = Path(folder, "device.py").is_file()
    if alive:
        Path(folder, "lease").touch()
    _end(folder=folder if alive else "")


def keep(folder: str, lease: str) -> None:
    """Remove ``folder`` once nobody has touched it for ``lease`` seconds, by a clock that nobody sets."""
    here = Path(folder)
    seen, since = 0.0, time.monotonic()
    while (here / "device.py").exists():
        now = (here / "lease").stat().st_mtime if (here / "lease").exists() else 0.0
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > float(lease):
            remove(folder)
            return
        time.sleep(min(20.0, float(lease) / 4))


def receive(folder: str, digest: str) -> None:
    """Standard input, as ``files/DIGEST`` of ``folder`` if that is its sha256; what came in part before is removed."""
    target = Path(folder, "files", digest)
    part = target.with_suffix(f".{os.getpid()}")  # one whose connection was lost may still be writing its own
    found = hashlib.sha256()
    try:
        target.parent.mkdir(exist_ok=True)
        for older in target.parent.glob(target.name + ".*"):
            older.unlink()
        with part.open("wb") as stream:
            for piece in iter(lambda: sys.stdin.buffer.read(1 << 20), b""):
                found.update(piece)
                stream.write(piece)
                Path(folder, "lease").touch()
        whole = found.hexdigest() == digest
        if whole:
            part.replace(target)
    except OSError as error:
        _end(error=_full(error, Path(folder)))
        return
    finally:
        with suppress(OSError):
            part.unlink()
    _end(whole=whole)


def link(folder: str, place: str, names: str) -> None:
    """Make ``names``, a JSON object of file names and sha256s, the files of ``place`` in ``folder``.

    Hard links, for ONNX Runtime wants external data to lie beside the model; copies where the disk knows no links.
    """
    there = Path(folder, place)
    there.mkdir(exist_ok=True)
    for name, digest in json.loads(names).items():
        target, source = there / name, Path(folder, "files", digest)
        if target.exists():
            target.unlink()
        try:
            os.link(str(source), str(target))
        except OSError:
            try:
                shutil.copyfile(str(source), str(target))
            except OSError as error:
                _end(error=_full(error, Path(folder)))
                return
    _end()


def drop(folder: str, names: str) -> None:
    """Remove ``names``, a JSON list of files and folders of ``folder``."""
    for name in json.loads(names):
        path = Path(folder, name)
        if path.is_dir():
            shutil.rmtree(str(path), ignore_errors=True)
        elif path.exists():
            path.unlink()
    _end()


def remove(folder: str) -> None:
    """End what still runs in ``folder``, and remove it."""
    if not Path(folder).name.startswith(PREFIX):
        _end(error=f"{folder} is not a folder of edgepress")
        return
    locks = [lock for lock in Path(folder).glob("*.lock") if _held(lock)]
    for path in (*locks, Path(folder, "keeper")):
        group = int(_read(path) or 0)
        if group and group != os.getpgrp():
            with suppress(OSError):
                os.killpg(group, signal.SIGKILL)
    for _ in range(20):  # what was killed may be writing its last file
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(folder).exists():
            break
        time.sleep(0.1)
    _end()


def _full(error: OSError, folder: Path) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder} cannot be written ({error.strerror})"
    return f"the disk that holds {folder} is full: {shutil.disk_usage(str(folder)).free / 1e6:.1f} MB are free"


# ---- what runs there


def start(folder: str, name: str, *command: str) -> None:
    """Run ``command`` in a process group of its own, which a lost connection does not end.

    It holds ``NAME.lock``: the kernel lets go of a lock however the last of its processes ends, so that who waits knows
    of every end.
    """
    try:
        with Path(folder, name + ".lock").open("x", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            group = _detached("work", folder, name, str(lock.fileno()), *command, keeping=[lock.fileno()])
            lock.write(str(group))
    except FileExistsError:
        _end()  # it was started before the connection was lost
        return
    except OSError as error:
        _end(error=_full(error, Path(folder)))
        return
    _end()


def work(folder: str, name: str, lock: str, *command: str) -> None:
    """Leave what ``command`` printed in ``NAME.out``, and then its exit code in ``NAME.code``."""
    here = Path(folder)
    with (here / (name + ".out")).open("wb") as out, (here / (name + ".err")).open("wb") as err:
        none, fds = subprocess.DEVNULL, [int(lock)]
        code = subprocess.call(command, stdin=none, stdout=out, stderr=err, pass_fds=fds)  # noqa: S603 - our own words
    part = here / (name + ".part")
    part.write_text(str(code), encoding="ascii")
    part.replace(here / (name + ".code"))


def watch(folder: str, name: str, offset: str, seconds: str) -> None:
    """Lines that the command says on stderr from ``offset`` on, until it ends or ``seconds`` are over.

    ``state`` is "running", "done" with the ``code`` and the ``output``, or "killed". It looks once a second, which is
    little beside what is timed.
    """
    here, at = Path(folder), int(offset)
    end = time.monotonic() + float(seconds)
    while True:
        (here / "lease").touch()
        held = _held(here / (name + ".lock"))  # looked at before the code, which is written while it is held
        code = _read(here / (name + ".code"))
        at = _tell(here / (name + ".err"), at, last=bool(code))
        if code or not held:
            state = "done" if code else "killed"
            _end(state=state, code=int(code or 0), offset=at, output=_read(here / (name + ".out")))
            return
        if time.monotonic() > end:
            _end(state="running", offset=at)
            return
        time.sleep(1.0 if at else 0.1)


def _tell(path: Path, at: int, *, last: bool) -> int:
    """Print the whole lines of ``path`` from ``at`` on; where the next begins."""
    if not path.exists():
        return at
    with path.open("rb") as stream:
        stream.seek(at)
        rest = stream.read()
    if not last:
        rest = rest[: rest.rfind(b"\n") + 1]
    for line in rest.decode("utf-8", "replace").splitlines():
        print(json.dumps({"line": line}), flush=True)
    return at + len(rest)


def _held(lock: Path) -> bool:
    try:
        with lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _detached(*words: str, keeping: list[int] | None = None) -> int:
    """This file once more, as a process that goes on when the connection ends, with the files ``keeping`` open."""
    none = subprocess.DEVNULL
    command = [sys.executable, str(Path(words[1], "device.py")), *words]
    started = subprocess.Popen(  # noqa: S603 - our own words
        command, stdin=none, stdout=none, stderr=none, start_new_session=True, pass_fds=keeping or []
    )
    return started.pid


def _end(**answer: Any) -> None:
    print(json.dumps({"end": True, **answer}), flush=True)


VERBS = (probe, claim, touch, keep, receive, link, drop, remove, start, work, watch)

if __name__ == "__main__":
    {verb.__name__: verb for verb in VERBS}[sys.argv[1]](*sys.argv[2:])
