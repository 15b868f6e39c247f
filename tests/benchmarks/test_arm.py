"""An emulated 64-bit ARM Linux as a device over ssh: it computes what the artifact computed here.

Its Python is Debian's, its ONNX Runtime the wheel that a Raspberry Pi would install. Times of an emulator mean nothing.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
from edgepress.benchmarks import load, targets

pytestmark = pytest.mark.slow

QEMU, DEBIAN = shutil.which("qemu-aarch64-static"), shutil.which("mmdebstrap")
NEEDED = ["python3-minimal", "libpython3.11-stdlib", "libstdc++6", "libgomp1"]
CORTEX_A76 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
"""A Raspberry Pi 5's. Else the emulator shows that of the host, over which ONNX Runtime stumbles as it looks at it."""


@pytest.fixture(scope="module")
def arm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python for aarch64, with numpy and this ONNX Runtime; to those who start it it is a program like any other."""
    if not (QEMU and DEBIAN):
        pytest.skip("qemu-aarch64-static or mmdebstrap is missing (Debian: qemu-user-static, mmdebstrap)")
    folder = tmp_path_factory.mktemp("arm")
    root, site = folder / "root", folder / "site"
    options = ["--quiet", "--variant=extract", "--architectures=arm64", f"--include={','.join(NEEDED)}"]
    subprocess.run([DEBIAN, *options, "bookworm", root, "http://deb.debian.org/debian"], check=True)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(CORTEX_A76)
    kinds = [word for glibc in ("2_28", "2_27", "2_17") for word in ("--platform", f"manylinux_{glibc}_aarch64")]
    wanted = ["numpy", f"onnxruntime=={version('onnxruntime')}"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *kinds]
    subprocess.run([*pip, "--python-version", "3.11", "-d", folder / "wheels", *wanted], check=True)
    for wheel in (folder / "wheels").iterdir():
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    python = folder / "python3"
    words = [QEMU, "-cpu", "cortex-a76", "-0", python, "-L", root, "-E", f"PYTHONHOME={root}/usr"]
    words += ["-E", f"PYTHONPATH={site}", root / "usr" / "bin" / "python3.11"]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.timeout(1800)
def test_an_arm_device_computes_the_same(
    there: Any, arm_python: Path, artifacts: list[Any], workload: Any, tmp_path: Path
) -> None:
    """ParityError where it does not: the references of all artifacts, in float and in 8 bits, are run there first."""
    static = ep.export(workload, tmp_path / "int8", ep.quantize(workload, "int8", rows=16, smooth="none"))
    target = there.target(python=str(arm_python))
    with targets.connect(targets.parse(target)) as (host, _):
        taken = load.benchmark([*artifacts, static], target=target, sequence=16, min_queries=30)
        assert len(host.verified) == 3
    assert [one.precision for one in taken] == ["fp32", "int8-dynamic", "int8"]
    assert all(len(one.samples) == 30 and one.peak_rss_bytes for one in taken)
    assert taken[0].environment["arch"] == "aarch64"
    assert "asimddp" in taken[0].environment["flags"]
    assert taken[0].environment["packages"]["onnxruntime"] == version("onnxruntime")
    assert there.left == []
