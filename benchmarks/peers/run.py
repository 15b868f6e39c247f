"""What peers reach on the same model, data, runtime versions and machine, from nothing, in one command.

    python benchmarks/peers/run.py quantization [--model zoo:minilm-reviews] [--threads 1,2] [-o result.json] [--quick]
    python benchmarks/peers/run.py pruning …            the options of pruning.py, in the environment made here

``quantization`` makes an environment for each peer below ``--cache`` (``environments.py``), has every tool quantize
the same float model with the same calibration rows there (``tools/``), and then measures all files interleaved in one
process (``quantization.py``). What is done is kept there and not done again: environments, files, and every figure.
Whoever is killed starts the same command again. The result is one JSON document, with the versions and the machine, of
which ``page.py`` makes docs/benchmarks.md.

``--quick`` goes through all of it with few settings, rows and rounds: a check of the harness, whose figures mean
nothing. Nothing but edgepress's own folder is needed to start: what is imported here is the standard library's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from edgepress.benchmarks.peers import environments
from edgepress.benchmarks.peers.environments import OURS, PEERS, ROOT, Environment, digest

HERE = "edgepress.benchmarks.peers"
OWN_CODE = ("compress", "export", "models")
"""The folders whose code decides what our files hold."""
DEFAULTS = {"rows": 128, "evaluation": 600, "queries": 150, "seconds": 5.0}
QUICK = {"rows": 8, "evaluation": 40, "queries": 10, "seconds": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("quantization")
    one.add_argument("--model", default="zoo:minilm-reviews")
    one.add_argument("--shapes", help="batch x tokens; of images batches alone (1x32,1x128,8x32,8x128; 1,8)")
    one.add_argument("--threads", default="1,2")
    one.add_argument("--peers", default=",".join(PEERS), help=f"those of {', '.join(PEERS)}; edgepress is always there")
    one.add_argument("--rows", type=int, help=f"of calibration ({DEFAULTS['rows']})")
    one.add_argument("--evaluation", type=int, help=f"rows that are judged ({DEFAULTS['evaluation']})")
    one.add_argument("--queries", type=int, help=f"rounds ({DEFAULTS['queries']})")
    one.add_argument(
        "--seconds", type=float, help=f"for each contender at each shape at most ({DEFAULTS['seconds']:g})"
    )
    one.add_argument("--also", metavar="NAME=FOLDER", action="append", default=[], help="an artifact, measured too")
    one.add_argument("--quick", action="store_true", help="few of everything, to check the harness")
    one.add_argument("-o", "--out", type=Path, required=True)
    two = commands.add_parser("pruning", add_help=False)
    for command in (one, two):
        command.add_argument("--cache", type=Path, default=_cache(), help="%(default)s")
    options, rest = parser.parse_known_args()
    if options.command == "pruning":
        environment = environments.prepare(OURS, options.cache / "environments")
        raise SystemExit(_run(_python(environment), options.cache, f"{HERE}.pruning", *rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    unknown = [name for name in options.peers.split(",") if name not in PEERS]
    if unknown:
        parser.error(f"there is no peer '{unknown[0]}' (known: {', '.join(PEERS)})")
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    quantization(options)


def quantization(options: argparse.Namespace) -> None:
    cache: Path = options.cache
    asked = dict.fromkeys([OURS, *options.peers.split(",")])
    found = [environments.prepare(name, cache / "environments") for name in asked]
    ours, there = found[0], [environment for environment in found if environment.python]
    python = _python(ours)
    facts = {"model": options.model, "rows": options.rows, "quick": options.quick}
    work = cache / "work" / f"{options.model.rpartition(':')[2]}-{digest(facts, ours.digest())}"
    job = work / "job"
    settings = ["--model", options.model, "--rows", str(options.rows), *(["--quick"] if options.quick else [])]
    if _run(python, cache, f"{HERE}.quantization", "prepare", str(job), *settings):
        raise SystemExit(f"The job of {options.model} could not be prepared; what is above says why.")
    folders, failed = [], []
    for environment in there:
        out = work / f"{environment.name}-{digest(environment.digest(), _code(environment.name))}"
        if not (out / "contenders.json").exists():
            print(f"{environment.name}: makes its files", file=sys.stderr, flush=True)
            if why := _error(_python(environment), cache, f"{HERE}.tools.{environment.name}", str(job), str(out)):
                failed.append({"tool": environment.name, "why": why})
                continue
        missed = json.loads((out / "contenders.json").read_text(encoding="utf-8"))["failed"]
        failed += [{"tool": environment.name, "name": name, "why": why} for name, why in missed.items()]
        folders.append(out)
    measured = work / f"measured-{digest([folder.name for folder in folders], options.evaluation, options.also)}"
    figures = [f"--{name}={getattr(options, name)}" for name in ("threads", "evaluation", "queries", "seconds")]
    figures += [f"--shapes={options.shapes}"] if options.shapes else []
    figures += [f"--also={one}" for one in options.also]
    part = measured / "document.json"
    argv = ["measure", str(job), *map(str, folders), *figures, "--kept", str(measured), "-o", str(part)]
    if _run(python, cache, f"{HERE}.quantization", *argv):
        raise SystemExit("The measuring ended with an error; what is above says why, and what is measured is kept.")
    document = json.loads(part.read_text(encoding="utf-8"))
    asked_for = {
        "threads": options.threads,
        "shapes": options.shapes,
        **{name: getattr(options, name) for name in DEFAULTS},
    }
    whole = {
        "model": options.model,
        "quick": options.quick,
        "settings": asked_for,
        "contenders": document["contenders"],
        "failed": failed + document["failed"],
        "environments": {environment.name: environment.to_json() for environment in found},
        "rows": document["rows"],
        "environment": document["environment"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(document['contenders'])} contenders, {len(document['rows'])} figures", file=sys.stderr)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgepress" / "peers"


def _python(environment: Environment) -> Path:
    if environment.python is None:
        raise SystemExit(f"The environment of {environment.name} could not be made: {environment.why}")
    return environment.python


def _code(name: str) -> str:
    """A digest of the code that a tool's files come from."""
    files = [Path(__file__).parent / "tools" / f"{part}.py" for part in (name, "job")]
    if name == OURS:
        files += sorted(path for folder in OWN_CODE for path in (ROOT / folder).rglob("*.py"))
    return digest([path.read_text(encoding="utf-8") for path in files])


def _start(python: Path, cache: Path, module: str, *arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
    """Run a module of the package as it is here, whatever the folder is called."""
    source = cache.resolve() / "source"
    source.mkdir(parents=True, exist_ok=True)
    link = source / "edgepress"
    if link.resolve() != ROOT:
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)
    own = {**os.environ, "PYTHONPATH": str(source)}
    command = [str(python), "-m", module, *arguments]
    return subprocess.Popen(command, env=own, stderr=stderr, text=True)  # noqa: S603


def _run(python: Path, cache: Path, module: str, *arguments: str) -> int:
    """The exit status."""
    return _start(python, cache, module, *arguments).wait()


def _error(python: Path, cache: Path, module: str, *arguments: str) -> str:
    """The last line that it says where it fails, and nothing where it does not; what it says is passed on."""
    process, last = _start(python, cache, module, *arguments, stderr=subprocess.PIPE), ""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    return last or "it ended without a word" if process.wait() else ""


if __name__ == "__main__":
    main()
