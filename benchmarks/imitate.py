"""Run a command as a smaller machine would: on some CPUs alone, and within so much memory.

One file of Python 3.8's standard library, in ASCII, which goes to a device beside ``runner.py``:
``python imitate.py LIMITS COMMAND...``, JSON and the words of a command that prints JSON. It prints one JSON document:
``done``, what the command printed, and ``by``, what held its memory; or ``unfit``, why it did not fit in, or
``refused``, why it was not begun. Any other failure is the command's own, with its exit code.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GROUP = "edgepress-"


def main(limits: str, *command: str) -> int:
    wanted = json.loads(limits)
    cpus = set(wanted.get("cpus") or ())
    if cpus and not hasattr(os, "sched_setaffinity"):
        return tell(refused="its system cannot hold a process to some CPUs")
    if cpus:
        allowed = os.sched_getaffinity(0)
        if not cpus <= allowed:
            return tell(refused=f"CPU {min(cpus - allowed)} is not one of {ranges(allowed)}, which this machine gives")
        os.sched_setaffinity(0, cpus)
    memory = wanted.get("memory") or 0
    group = new_group(Path(wanted.get("root", "/")), memory) if memory else None
    try:
        return run(command, memory, group)
    finally:
        if group:
            leave(group)


def run(command: tuple[str, ...], memory: int, group: Path | None) -> int:
    code, printed, last = once(command, memory, group)
    by = ("cgroup" if group else "RLIMIT_DATA") if memory else None
    if code == 0:
        return tell(done=json.loads(printed), by=by)
    if group and killed(group):
        return tell(unfit="was ended by the kernel", by=by)
    # A program that gets no more memory may end in any way and say anything: whether that was it shows without a limit.
    if memory and not group and once(command, 0, None)[0] == 0:
        return tell(unfit=f"ended with '{last[-80:]}'", by=by)
    return code


def once(command: tuple[str, ...], memory: int, group: Path | None) -> tuple[int, bytes, str]:
    """The exit code, as a shell gives it, what was printed, and the last line on stderr, all of which is passed on."""

    def begin() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with us, however we end
        if memory and not group:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    last = ""
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(  # noqa: S603 - our own words
            command,
            stdout=out,
            stderr=subprocess.PIPE,
            preexec_fn=begin,  # noqa: PLW1509 - there are no threads
        )
        assert child.stderr is not None
        if group:  # what it took before this, starting Python, is little and is not counted
            (group / "cgroup.procs").write_text(str(child.pid), encoding="ascii")
        for raw in child.stderr:
            line = raw.decode(errors="replace").rstrip()
            last = line or last
            print(line, file=sys.stderr, flush=True)
        code = child.wait()
        if code < 0:
            last = signal.Signals(-code).name
            print(f"it was ended by {last}", file=sys.stderr, flush=True)
        out.seek(0)
        return (code if code >= 0 else 128 - code), out.read(), last


def new_group(root: Path, memory: int) -> Path | None:
    """A control group (version 2) that holds what is in it to ``memory`` bytes without swap; None where none may be
    made here, and the limit of a process's own data has to do.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
        own = base / next(line for line in lines if line.startswith("0::"))[3:].strip("/")
        # Beside us: a group that has processes gives its own children no controllers.
        parent = own.parent if own != base else base
        if "memory" not in (parent / "cgroup.subtree_control").read_text(encoding="ascii").split():
            return None
        for left in parent.glob(GROUP + "*"):  # by those that were killed; what is in use is not removed
            if left.name == GROUP + str(os.getpid()) or not alive(left.name[len(GROUP) :]):
                with suppress(OSError):
                    left.rmdir()
        group = parent / (GROUP + str(os.getpid()))
        group.mkdir()
    except (OSError, StopIteration):
        return None
    try:
        (group / "memory.max").write_text(str(memory), encoding="ascii")
        with suppress(OSError):  # a kernel without swap
            (group / "memory.swap.max").write_text("0", encoding="ascii")
        idle = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            (group / "cgroup.procs").write_text(str(idle.pid), encoding="ascii")  # whether we may move anything there
        finally:
            idle.kill()
            idle.wait()
    except OSError:
        leave(group)
        return None
    return group


def alive(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # another user's, or no process at all
        pass
    return True


def killed(group: Path) -> bool:
    events = (group / "memory.events").read_text(encoding="ascii") if (group / "memory.events").exists() else ""
    return any(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))


def leave(group: Path) -> None:
    for _ in range(20):  # what was killed may still be ending
        with suppress(OSError):
            group.rmdir()
        if not group.exists():
            return
        time.sleep(0.05)


def ranges(numbers: set[int]) -> str:
    """``0-3, 8``"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def tell(**answer: Any) -> int:
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
