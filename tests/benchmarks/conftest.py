"""A real browser, for the pages that edgepress writes; a real sshd, for devices; the peers, which are not shipped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import edgepress as ep
import edgepress.benchmarks
import pytest

edgepress.benchmarks.__path__.append(str(Path(__file__).parents[2] / "benchmarks"))  # an install may not have the peers


@pytest.fixture(scope="session")
def browser() -> Any:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None and not os.environ.get("EDGEPRESS_REQUIRE_BROWSER"):
        pytest.skip("Chromium is not installed; EDGEPRESS_REQUIRE_BROWSER=1 makes this an error")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Callable[..., tuple[Any, list[str]]]:
    """Opens a file; returns the page and, in a list that grows, everything it complains of or asks the network for."""

    def open_(path: Path, scheme: str = "light", width: int = 1280) -> tuple[Any, list[str]]:
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.on(
            "request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None
        )
        page.goto(path.as_uri())
        return page, complaints

    return open_


@pytest.fixture(scope="session")
def violations() -> Callable[[Any], list[str]]:
    """What axe-core has against a page, all its rules run."""
    if not os.environ.get("EDGEPRESS_REQUIRE_BROWSER"):
        pytest.importorskip("axe_playwright_python", reason="pip install -c constraints.txt -e '.[dev]'")
    from axe_playwright_python.sync_playwright import Axe

    def check(page: Any) -> list[str]:
        found = Axe().run(page).response["violations"]
        return [f"{one['id']}: {one['help']}: {node['html']}" for one in found for node in one["nodes"]]

    return check


# ---- a device over ssh

SSHD = shutil.which("sshd", path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/usr/local/sbin")))
HOSTS = {
    "device": {},
    "other": {},
    "raspberry": {"IdentityFile": "handy"},
    "jetson": {"IdentityFile": "handy"},
    "impostor": {"UserKnownHostsFile": "known_impostor"},
    "stranger": {"UserKnownHostsFile": "known_nobody"},
    "closed": {"IdentityFile": "nobody"},
    "nobody-there": {"Port": "1"},
}


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an sshd that runs as this user; ``bin/ssh`` in it is OpenSSH's with a configuration of its own."""
    if SSHD is None and not os.environ.get("EDGEPRESS_REQUIRE_SSHD"):
        pytest.skip("sshd is not installed (openssh-server); EDGEPRESS_REQUIRE_SSHD=1 makes this an error")
    assert SSHD is not None
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(
            mode=0o755, exist_ok=True
        )  # where root's sshd locks itself in; the service makes it too
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user", "nobody", "handy"):
        subprocess.run([shutil.which("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    public = {name: " ".join((folder / f"{name}.pub").read_text().split()[:2]) for name in ("host", "user", "handy")}
    own = f"echo welcome to {{the device}}; PATH={Path(sys.executable).parent}:$PATH; eval"
    forced = f'command="{own} \\"$SSH_ORIGINAL_COMMAND\\""'  # a login that talks, and whose python3 is this one
    (folder / "authorized_keys").write_text(f"{public['user']}\n{forced} {public['handy']}\n")
    (folder / "authorized_keys").chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    known = "".join(f"{name} {public['host']}\n" for name in HOSTS)
    (folder / "known_hosts").write_text(known)
    (folder / "known_impostor").write_text(known.replace(public["host"], public["user"]))
    config = []
    for name, changes in HOSTS.items():
        options = {"Port": str(port), "IdentityFile": "user", "UserKnownHostsFile": "known_hosts", **changes}
        files = {key: f"{folder}/{value}" for key, value in options.items() if key != "Port"}
        lines = {"HostName": "127.0.0.1", "HostKeyAlias": name, "IdentitiesOnly": "yes", **options, **files}
        config.append(f"Host {name}\n" + "".join(f"  {key} {value}\n" for key, value in lines.items()))
    (folder / "config").write_text("".join(config) + "Host *\n  GlobalKnownHostsFile /dev/null\n  IdentityAgent none\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail(f"sshd did not start: {(folder / 'log').read_text()}")
        yield folder
    finally:
        server.kill()
        server.wait()


@dataclass(frozen=True)
class There:
    """The device as the tests see it: its folder for temporary files lies on this machine too."""

    folder: Path

    def target(self, host: str = "device", word: str = "/cpu:1", python: str = sys.executable) -> str:
        return f"ssh://{host}{word}?python={quote(python)}&folder={quote(str(self.folder))}"

    @property
    def left(self) -> list[Path]:
        return list(self.folder.iterdir())

    def processes(self, word: str) -> list[int]:
        """Ids of those that run there, with ``word`` among their arguments."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.folder) in line and word in line and "sh\0-c" not in line:
                found.append(int(path.parent.name))
        return found

    def ended(self, word: str) -> bool:
        """Whether none of ``processes`` is left: what was killed takes a moment to go on a busy machine."""
        end = time.monotonic() + 30
        while self.processes(word) and time.monotonic() < end:
            time.sleep(0.1)
        return not self.processes(word)


@pytest.fixture
def there(sshd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> There:
    monkeypatch.setenv("PATH", f"{sshd}/bin{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "device"
    folder.mkdir()
    return There(folder)


@pytest.fixture(scope="session")
def artifacts(workload: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The tiny BERT in float, and with weights and activations in 8 bits."""
    folder = tmp_path_factory.mktemp("artifacts")
    first = ep.export(workload, folder / "fp32")
    return [first, ep.export(workload, folder / "int8", ep.quantize(workload))]
