"""What calibration costs in memory: the peak of ``int8`` over the loaded model, against the number of rows.

    python benchmarks/studies/calibration_memory.py [--model zoo:minilm-reviews] [--rows 100,1000,10000] [-o out.json]

Every number of rows is a process of its own, which loads the model, answers one row, notes its resident set, makes the
rows and quantizes; the figure is the peak of the resident set from then on, less what was noted. Rows are the model's
training rows, from the first again where there are fewer. What ``-o`` has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of this process that are in memory now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def measured(model: str, scheme: str, rows: int) -> dict[str, Any]:
    import edgepress as ep
    from edgepress.benchmarks.runner import peak_rss
    from edgepress.compress import quantize as quantizers

    workload = ep.load(model)
    workload.forward(workload.example)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux forgets the peak so far
    pool = workload.data.train if len(workload.data.train) else workload.data.calibration
    sample = pool.pick([row % len(pool) for row in range(rows)])
    workload = replace(workload, data=replace(workload.data, calibration=sample))
    begin = time.perf_counter()
    quantizers.quantize(workload, scheme, rows=rows)
    seconds = time.perf_counter() - begin
    return {"rows": rows, "before_bytes": before, "over_bytes": peak_rss() - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--rows", default="100,1000,10000")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.model, options.scheme, options.one)))
        return
    facts = {"model": options.model, "scheme": options.scheme, "torch": version("torch")}
    document: dict[str, Any] = {**facts, "results": []}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if any(found[name] != value for name, value in facts.items()):
            raise SystemExit(f"{options.out} is of another model, scheme or torch; give another file with -o.")
        document = found
    done = {result["rows"] for result in document["results"]}
    for rows in (int(part) for part in options.rows.split(",")):
        if rows in done:
            continue
        own = [sys.executable, __file__, "--model", options.model, "--scheme", options.scheme, "--one", str(rows)]
        answer = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        document["results"].append(json.loads(answer.stdout.splitlines()[-1]))
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        last = document["results"][-1]
        print(f"{rows:6} rows: {last['over_bytes'] / 1e6:.0f} MB over the model, {last['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
