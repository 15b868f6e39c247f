"""A device over ssh: the user's own OpenSSH client, one connection that all commands share, one folder over there.

Host keys, agents, jump hosts and aliases are what ``~/.ssh/config`` says; nothing is asked, and no check is switched
off. What is sent is named by its sha256 and checked on arrival, and does not go again while the connection lasts. A
process over there goes on when the connection is lost, and is waited for anew; see ``benchmarks/device.py``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

from ...errors import EdgepressError, InputError, UnavailableError, UsageError
from ...files import sha256
from .. import device

Progress = Callable[[int, int, str], None]
Line = Callable[[str], None]

ATTEMPTS = 8
"""To be answered, with pauses of 1, 2, 4 … and at most 30 seconds: a minute and a half together."""
LOOK_SECONDS = 30.0
LEASE_SECONDS = 900.0
"""After how long without a word the device removes what was sent to it."""
OPTIONS = {
    "BatchMode": "yes",  # an error, where a password would be asked for
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
}
SOURCE = Path(device.__file__)
PIPED = "import sys; source = sys.stdin.buffer.read().decode(); exec(source)"


@dataclass(frozen=True)
class Address:
    """A device, and there the Python that has a runtime, and the folder for temporary files, or "" for its own."""

    host: str
    user: str = ""
    port: int | None = None
    python: str = "python3"
    folder: str = ""

    @classmethod
    def parse(cls, authority: str, query: str) -> Address:
        """Of ``user@host:port`` and ``python=…&folder=…``, percent-encoded; UsageError for anything else."""
        match = re.fullmatch(r"(?:(\w[\w.+-]*)@)?(\w[\w.-]*|\[[0-9A-Fa-f:.%\w]+\])(?::(\d{1,5}))?", authority, re.ASCII)
        pairs = [part.partition("=") for part in query.split("&") if part]
        options = {name: unquote(value) for name, _, value in pairs}
        port = int(match[3]) if match and match[3] else None
        if not match or (port is not None and not 0 < port < 1 << 16):
            raise UsageError(f"'{authority}' is not a device such as pi@raspberry or pi@192.168.1.7:2222.")
        if not options.keys() <= {"python", "folder"} or any(not v or "\0" in v or "\n" in v for v in options.values()):
            raise UsageError(f"'?{query}' is not one of ?python=PATH, ?folder=PATH, or both with '&' between them.")
        return cls(match[2].strip("[]"), match[1] or "", port, **options)

    def __str__(self) -> str:
        """As ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    @property
    def query(self) -> str:
        said = {"python": "" if self.python == "python3" else self.python, "folder": self.folder}
        return "&".join(f"{name}={quote(value)}" for name, value in said.items() if value)

    @property
    def words(self) -> str:
        """What a user types to be there."""
        return f"ssh -p {self.port} {self}" if self.port else f"ssh {self}"


class _LostError(Exception):
    """The connection, with what ssh said last."""


_open: dict[Address, Device] = {}
_lock = threading.Lock()


@contextmanager
def connect(address: Address) -> Iterator[Device]:
    """The device at ``address``; within a connection to it that is open already, that one.

    Raises UsageError where the host is unknown, its key is not trusted, or ours is refused; UnavailableError where it
    does not answer, or has no Python.
    """
    with _lock:
        found = _open.get(address)
    if found:
        found.renew()
        yield found
        return
    found = Device(address)
    try:
        found.claim()
        with _lock:
            _open[address] = found
        yield found
    finally:
        with _lock:
            _open.pop(address, None)
        found.close()


@contextmanager
def visit(address: Address) -> Iterator[Device]:
    """The device for questions alone: nothing is written there."""
    found = Device(address)
    try:
        yield found
    finally:
        found.close()


class Device:
    """An open connection. ``put`` and ``run`` are those of any host."""

    def __init__(self, address: Address) -> None:
        if shutil.which("ssh") is None:
            raise UnavailableError("There is no ssh here: 'apt-get install openssh-client' brings it.")
        self.address = address
        self._local = Path(tempfile.mkdtemp(prefix="ep", dir="/tmp"))  # a socket's path is at most 104 long
        self._master: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._held: set[str] = set()
        self._stale: set[str] = set()
        self._places: dict[Path, str] = {}
        self._count = 0
        self._closed = False
        self.managed = False
        self.verified: set[str] = set()
        """Models, by sha256, that were held to their references here, on a device and in a form."""
        try:
            self._open_master()
        except BaseException:
            self.close()
            raise

    # ---- what a host does

    def environment(self, threads: int) -> dict[str, Any]:
        """The fingerprint of the device as it is now."""
        told = self._call("probe", threads)
        self.managed = bool(told["managed"])
        found: dict[str, Any] = told["environment"]
        return found

    def lack(self, packages: Sequence[str]) -> str:
        """That the device has not ``packages``, and the command that brings them."""
        said = f"There is no {' and no '.join(packages)} on {self.address}: '{self.adding(packages)}' brings it"
        return f"{said}, and ?python=venv/bin/python after the target uses it" if self.managed else said

    def adding(self, packages: Sequence[str]) -> str:
        """The command that brings ``packages`` to the device."""
        at, python, names = self.address, shlex.quote(self.address.python), " ".join(packages)
        if not self.managed:
            return f"{at.words} {python} -m pip install {names}"
        return f'{at.words} "{python} -m venv venv && venv/bin/python -m pip install {names}"'

    def put(self, folder: Path, names: Sequence[str] | None = None, progress: Progress | None = None) -> str:
        """The path over there of a folder with the files ``names`` of ``folder``, or all; what it has is not sent."""
        if folder.resolve() not in self._places:
            self._count += 1
            self._places[folder.resolve()] = f"place{self._count}"
        place = self._places[folder.resolve()]
        files = {name: folder / name for name in names or sorted(path.name for path in folder.iterdir())}
        sums = {name: sha256(path) for name, path in files.items()}
        self._stale -= {place, *(f"files/{digest}" for digest in sums.values())}
        for name, digest in sums.items():
            if digest not in self._held:
                self._send(files[name], digest, progress)
                self._held.add(digest)
        self._call("link", place, json.dumps(sums))
        return f"{self._folder}/{place}"

    def run(self, argv: Sequence[str], on_line: Line | None = None) -> bytes:
        """What ``argv`` prints over there; see ``local.py``. It survives a lost connection."""
        self._drop()
        self._count += 1
        name = f"job{self._count}"
        self._call("start", name, *(self.address.python if word == "python" else word for word in argv))
        lines: list[str] = []
        offset = 0

        def hear(said: Mapping[str, Any]) -> None:
            lines.append(str(said.get("line", "")))
            if on_line:
                on_line(lines[-1])

        while True:
            told = self._call("watch", name, offset, LOOK_SECONDS, on_line=hear)
            offset = int(told["offset"])
            if told["state"] != "running":
                break
        code, at = int(told["code"]), self.address
        if told["state"] == "killed" or code < 0:
            signal = f" by signal {-code}" if code else ""
            raise EdgepressError(
                f"The benchmark process on {at} was killed{signal}: where the device's memory ran out, "
                f"'{at.words} sudo dmesg' says so, and a smaller --batch or --seq needs less."
            )
        if code:
            why = next((line for line in reversed(lines) if line), "it said nothing")
            raise EdgepressError(f"The benchmark process on {at} ended with code {code}: {why}")
        return str(told["output"]).encode()

    # ---- the folder over there

    def claim(self) -> None:
        """Make the folder, which every ``put`` needs."""
        self._folder = self._call("claim", self.address.folder, LEASE_SECONDS)["folder"]
        self._held, self._places = set(), {}

    def renew(self) -> None:
        """A new measurement: what the last one needed goes, unless it is ``put`` again before the next ``run``."""
        if not self._call("touch", self._folder)["folder"]:
            self.claim()
        self._stale = {*self._places.values(), *(f"files/{digest}" for digest in self._held)}

    def close(self) -> None:
        """Remove the folder, or leave that to the device where it cannot be reached any more."""
        try:
            if self._folder:
                with suppress(EdgepressError, _LostError):
                    self._call("remove", attempts=2)
        finally:
            self._closed = True
            self._close_master()
            shutil.rmtree(self._local, ignore_errors=True)

    def _drop(self) -> None:
        if self._stale:
            self._call("drop", json.dumps(sorted(self._stale)))
            self._held -= {name.removeprefix("files/") for name in self._stale}
            self._places = {path: place for path, place in self._places.items() if place not in self._stale}
            self._stale = set()

    def _send(self, path: Path, digest: str, progress: Progress | None) -> None:
        size = path.stat().st_size

        def feed(stream: IO[bytes]) -> None:
            sent = 0
            with path.open("rb") as source:
                while piece := source.read(1 << 18):
                    stream.write(piece)
                    sent += len(piece)
                    if progress and size > 1 << 20:
                        progress(sent >> 20, size >> 20, f"MB sent to {self.address}")

        for _ in range(2):
            if self._call("receive", digest, feed=feed)["whole"]:
                return
        raise InputError(f"{path} does not arrive whole on {self.address}: its sha256 is another there, twice.")

    # ---- commands over the connection

    def _call(
        self,
        verb: str,
        *arguments: object,
        feed: Callable[[IO[bytes]], None] | None = None,
        on_line: Callable[[Mapping[str, Any]], None] | None = None,
        attempts: int = ATTEMPTS,
    ) -> dict[str, Any]:
        """The answer of a verb of ``device.py``; asked again, on a new connection, where that was lost."""
        python = self.address.python
        if verb in {"probe", "claim", "touch"}:  # for which there need be no folder
            words = [python, "-c", PIPED, verb, *map(str, arguments)]
            feed = _source
        else:
            words = [python, f"{self._folder}/device.py", verb, self._folder, *map(str, arguments)]
        answer: dict[str, Any] = {}
        for attempt in range(attempts):
            try:
                if attempt and not self._closed:
                    self._open_master()
                answer = self._once(shlex.join(words), feed, on_line)
                break
            except _LostError as lost:
                if self._closed:
                    raise EdgepressError(f"The connection to {self.address} was closed.") from lost
                if attempt == attempts - 1:
                    raise UnavailableError(
                        f"The connection to {self.address} was lost ({lost}), and came back in none of {attempts} "
                        f"attempts; what was sent there is removed by itself within {LEASE_SECONDS / 60:.0f} minutes."
                    ) from lost
                time.sleep(min(2.0**attempt, 30.0))
        if "error" in answer:
            raise UnavailableError(
                f"On {self.address} {answer['error']}: make room there, or name another folder with ?folder=PATH."
            )
        return answer

    def _once(
        self,
        command: str,
        feed: Callable[[IO[bytes]], None] | None,
        on_line: Callable[[Mapping[str, Any]], None] | None,
    ) -> dict[str, Any]:
        with (self._local / "said").open("w+b") as said:
            argv = [*self._ssh("no"), command]
            process = subprocess.Popen(  # noqa: S603 - words that are checked or quoted
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True, env=_english()
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it has ended, and its answer says why
                    if feed:
                        feed(process.stdin)
                    process.stdin.close()
                answer = None
                for line in process.stdout:
                    found = _object(line)
                    if found and found.get("end"):
                        answer = found
                    elif found and on_line:
                        on_line(found)
                code = process.wait()
            finally:
                process.kill()
                process.wait()
                with suppress(BrokenPipeError):
                    process.stdin.close()
                process.stdout.close()
            said.seek(0)
            last = said.read().decode(errors="replace")
        if answer is not None:
            return answer
        if code in {126, 127}:
            raise self._no_python()
        if code != 255 and code >= 0:
            raise EdgepressError(f"{self.address} answers with code {code}: {_last(last)}")
        raise _LostError(_last(last))

    def _no_python(self) -> UnavailableError:
        at = self.address
        return UnavailableError(
            f"There is no '{at.python}' on {at}: '{at.words} sudo apt-get install -y python3 python3-pip' brings "
            "Python, or ?python=PATH names it."
        )

    def _ssh(self, master: str) -> list[str]:
        """ssh's own words: as the ``master`` of the connection, or through it."""
        options = {**OPTIONS, "ControlMaster": master, "ControlPath": f"{self._local}/s", "ControlPersist": "no"}
        words = ["ssh", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        words += ["-p", str(self.address.port)] if self.address.port else []
        return [*words, "--", str(self.address)]

    def _open_master(self) -> None:
        """Connect, if the connection does not stand.

        The master is a process of ours in a session of its own: Ctrl-C does not end it before the folder is removed.
        What it runs ends with its standard input, and so with us, however we end.
        """
        socket, said = self._local / "s", self._local / "master"
        if self._master and self._master.poll() is None and socket.exists():
            return
        self._close_master()
        argv = [*self._ssh("yes"), "exec cat"]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        with said.open("wb") as stream:
            self._master = subprocess.Popen(  # noqa: S603 - words that are checked
                argv, stdin=pipe, stdout=none, stderr=stream, start_new_session=True, env=_english()
            )
        end = time.monotonic() + 60
        while not socket.exists() and self._master.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if not socket.exists():
            self._close_master()
            raise self._why(said.read_text(encoding="utf-8", errors="replace"))

    def _close_master(self) -> None:
        if self._master:
            self._master.terminate()
            try:
                self._master.wait(5)
            except subprocess.TimeoutExpired:
                self._master.kill()
                self._master.wait()
            if self._master.stdin:
                self._master.stdin.close()
        (self._local / "s").unlink(missing_ok=True)

    def _why(self, said: str) -> Exception:
        """What ssh's words come to. A host that once answered and now does not is only lost."""
        at = self.address
        port = f" -p {at.port}" if at.port else ""
        known = f"[{at.host}]:{at.port}" if at.port and at.port != 22 else at.host
        certain = {
            "IDENTIFICATION HAS CHANGED": (
                f"The host key of {at} is not the one in known_hosts: if the device was set up anew, "
                f"\"ssh-keygen -R '{known}'\" forgets the old one; if not, something else answers in its place."
            ),
            "Host key verification failed": (
                f"The host key of {at} is not known here: '{at.words}' shows it, and asks whether you trust it."
            ),
            "Permission denied": (
                f"{at} refuses your key: 'ssh-copy-id{port} {at}' brings it there, and 'ssh-add' unlocks it."
            ),
        }
        for word, sentence in certain.items():
            if word in said:
                return UsageError(sentence)
        if self._folder:
            return _LostError(_last(said))
        if "Could not resolve hostname" in said:
            return UsageError(f"There is no host '{at.host}': give its name or address so that '{at.words}' works.")
        return UnavailableError(f"{at} cannot be reached ({_last(said)}): '{at.words}' must work first.")


def _source(stream: IO[bytes]) -> None:
    stream.write(SOURCE.read_bytes())


def _object(line: bytes) -> dict[str, Any] | None:
    """A line of ``device.py``; None for what a login script says."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "ssh said nothing"


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
