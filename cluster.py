"""The cells of a sweep on the machines of a Ray cluster, one at a time on each.

A machine that compresses one cell and measures another would measure wrongly, so a machine, told by its address, is
given the next cell when it has ended the one before. A cell whose machine is lost goes to another. Where the folder of
runs is one that the machines share, cells work in it, and what a lost machine had finished of a cell is kept;
elsewhere they work in a folder of their own, which is brought home at the end.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import socket
import tempfile
import time
import uuid
import zipfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import UnavailableError
from .files import new_folder, write_text
from .recipe import Recipe
from .sweep import Cell, Ending, Endings, Tell, run

TRIES = 3
"""How many machines may be lost over one cell before it counts as failed."""
PATIENCE = 60
"""Seconds without any machine, after which the sweep ends; what is done is kept."""
DOUBT = 30
"""Seconds for which a node on which a cell was lost gets no other: Ray lists it for a while after it is gone."""
MARK = ".sweep"


def on_ray(cells: Sequence[Cell], runs: Path, tell: Tell, *, address: str) -> Endings:
    """Run ``cells`` on the cluster at ``address`` ("auto": the one on this machine).

    Raises UnavailableError where Ray is missing, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise UnavailableError("Ray is missing: pip install 'edgepress[ray]' brings it.") from error
    mine = not ray.is_initialized()
    if mine:
        try:
            if host := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):  # Ray itself knocks for minutes
                socket.create_connection((host[1].strip("[]"), int(host[2])), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except (OSError, OverflowError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise UnavailableError(
                f"No Ray cluster answers at '{address}': {said} 'ray start --head' begins one."
            ) from error
    mark = uuid.uuid4().hex
    write_text(runs / MARK, mark)
    try:
        yield from _dispatched(ray, deque(cells), runs.resolve(), mark, tell)
    finally:
        (runs / MARK).unlink(missing_ok=True)
        if mine:
            ray.shutdown()


def _dispatched(ray: Any, waiting: deque[Cell], runs: Path, mark: str, tell: Tell) -> Endings:
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    work = ray.remote(num_cpus=0, max_retries=0)(_work)
    at_work: dict[Any, tuple[Cell, str, str]] = {}
    lost: Counter[str] = Counter()
    doubted: dict[str, float] = {}
    last_seen = time.monotonic()
    while waiting or at_work:
        now = time.monotonic()
        machines = _machines([node for node in ray.nodes() if doubted.get(node["NodeID"], 0) < now])
        last_seen = now if machines or at_work else last_seen
        if now - last_seen > PATIENCE:
            raise UnavailableError("The Ray cluster has no machine any more; the same command goes on when it has.")
        busy = {address for _, address, _ in at_work.values()}
        for address in [one for one in machines if one not in busy]:
            if waiting:
                cell = waiting.popleft()
                there = NodeAffinitySchedulingStrategy(machines[address], soft=False)
                task = work.options(scheduling_strategy=there)
                begun = task.remote(cell.recipe.model_dump(mode="json"), str(runs), cell.key, mark)
                at_work[begun] = cell, address, machines[address]
                tell(cell.key, f"on {address}")
        if not at_work:
            time.sleep(1)
            continue
        ready, _ = ray.wait(list(at_work), timeout=1)
        for reference in ready:
            cell, address, node = at_work.pop(reference)
            try:
                ending, packed = ray.get(reference)
            except RayTaskError as error:  # its machine is well, but cannot do it
                ending, packed = Ending("failed", str(error).strip().rpartition("\n")[2], 0.0), None
            except RayError as error:
                lost[cell.key] += 1
                doubted[node] = time.monotonic() + DOUBT
                if lost[cell.key] < TRIES:
                    tell(cell.key, f"{address} was lost; waiting for another machine")
                    waiting.appendleft(cell)
                    continue
                said = next(iter(str(error).splitlines()), type(error).__name__)
                ending, packed = Ending("failed", f"Its machine was lost {TRIES} times: {said}", 0.0), None
            if packed is not None:
                _unpacked(packed, runs / cell.key)
            yield cell, replace(ending, node=address)


def _machines(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A living node of each address, of those that have CPUs to give: a head often has none."""
    able = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    return {node["NodeManagerAddress"]: node["NodeID"] for node in able}


def _work(asked: dict[str, Any], runs: str, key: str, mark: str) -> tuple[Ending, bytes | None]:
    """On a machine of the cluster: compress, in the shared folder where that is the driver's; else also what is to be
    brought home."""
    home = Path(runs)
    with suppress(OSError):
        if (home / MARK).read_text(encoding="utf-8") == mark:
            return run(Recipe.model_validate(asked), home / key, lambda said: None), None
    place = Path(tempfile.gettempdir()) / f"edgepress-sweep-{mark}"
    ending = run(Recipe.model_validate(asked), place / key, lambda said: None)
    packed = _packed(place / key)
    shutil.rmtree(place / key, ignore_errors=True)
    return ending, packed


def _packed(folder: Path) -> bytes:
    """The files of a run, without its stages, as a ZIP archive: what is in one lands in no other place than is said,
    which of tar archives not every Python 3.10 sees to."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", strict_timestamps=False) as archive:
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if name.parts[0] not in {"stages", "unfinished"}:
                archive.write(path, name)
    return packed.getvalue()


def _unpacked(packed: bytes, folder: Path) -> None:
    with new_folder(folder, ours=True) as place, zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(place)
