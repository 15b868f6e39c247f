"""What a runtime tells of the time of each operator. Python 3.8; it goes to a device beside ``runner.py``.

Every function gives ``runs``, the ``ns`` of all of them together, and ``nodes`` as ``runner.profile`` describes them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

WARM = 10
LONGEST_NS = 10_000_000_000
MLAS_INTEGER = (
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)
"""ONNX Runtime's operators whose CPU kernels call the integer GEMM of MLAS, its library of kernels."""


def repeated(run: Callable[[], Any], runs: int) -> tuple[int, int]:
    """Run ``runs`` times, but no longer than LONGEST_NS; how many it was, and their nanoseconds."""
    begin = time.perf_counter_ns()
    done = spent = 0
    while done < runs and spent < LONGEST_NS:
        run()
        done += 1
        spent = time.perf_counter_ns() - begin
    return done, spent


def onnx(opener: Callable[..., Any], feeds: dict[str, Any], runs: int) -> dict[str, Any]:
    """Of an ONNX Runtime session with a trace, which ``opener`` opens."""
    with tempfile.TemporaryDirectory() as folder:
        session = opener(trace=f"{folder}/trace")
        warm, _ = repeated(lambda: session.run(None, feeds), WARM)
        done, spent = repeated(lambda: session.run(None, feeds), runs)
        with Path(session.end_profiling()).open(encoding="utf-8") as lines:  # an event a line, and many of them
            nodes = onnx_nodes((line.strip("[], \n") for line in lines), skip=warm)
    return {"runs": done, "ns": spent, "nodes": nodes}


def onnx_nodes(lines: Iterable[str], skip: int) -> list[dict[str, Any]]:
    """The operators of a trace after its first ``skip`` runs; that of a loop or a branch without those inside it."""
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    ended: list[tuple[int, int]] = []
    for line in filter(None, lines):
        event = json.loads(line)
        if event["name"] == "model_run":
            skip -= 1
            ended = []
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            inside = 0
            while ended and ended[-1][0] >= event["ts"]:  # began later, and has ended before: it is part of this one
                inside += ended.pop()[1]
            ended.append((event["ts"], event["dur"]))
            if skip <= 0:
                about = event["args"]
                name = event["name"][: -len("_kernel_time")]
                node = nodes.setdefault(
                    (name, about["op_name"]),
                    {"name": name, "op": about["op_name"], "kernel": onnx_kernel(about), "calls": 0, "ns": 0},
                )
                node["calls"] += 1
                node["ns"] += 1000 * max(0, event["dur"] - inside)
    return list(nodes.values())


def onnx_kernel(about: dict[str, Any]) -> str:
    """The provider, the types that it was given first and gives, and whether MLAS multiplies integers in it: ONNX
    Runtime names its kernels by nothing else, and weights that it has packed are not among the inputs any more."""
    kinds = [[next(iter(one)) for one in about.get(f"{side}_type_shape", []) if one] for side in ("input", "output")]
    given, gives = (kind[0] if kind else "nothing" for kind in kinds)
    provider = about.get("provider", "").replace("ExecutionProvider", "")
    integer = ", MLAS integer product" if provider == "CPU" and about["op_name"] in MLAS_INTEGER else ""
    return f"{provider} {given} to {gives}{integer}"


def openvino(opener: Callable[..., Any], feeds: dict[str, Any], runs: int) -> dict[str, Any]:
    """Of a model that ``opener`` compiles, by OpenVINO's own counters.

    OpenVINO tells the mean of all runs since the model was compiled: what warming up took is taken off again.
    """
    compiled = opener(PERF_COUNT=True)
    request = compiled.create_infer_request()

    def run() -> None:
        request.infer(feeds, share_inputs=True, share_outputs=True)

    def told(count: int) -> list[float]:
        return [1e9 * one.real_time.total_seconds() * count for one in request.get_profiling_info()]

    warm, _ = repeated(run, WARM)
    before = told(warm)
    done, spent = repeated(run, runs)
    of = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        of[node.get_friendly_name()] = (
            about["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in about else []
        )
    nodes = [
        {
            "name": one.node_name,
            "op": one.node_type,
            "kernel": one.exec_type,
            "calls": done,
            "ns": max(0.0, after - earlier),
            "of": of.get(one.node_name, []),
        }
        for one, after, earlier in zip(request.get_profiling_info(), told(warm + done), before)  # noqa: B905
        if after > earlier
    ]
    return {"runs": done, "ns": spent, "nodes": nodes}


def executorch(opener: Callable[..., Any], feeds: dict[str, Any], runs: int) -> dict[str, Any]:
    """Of a program with a trace that ``opener`` loads, by ExecuTorch's own inspector: what XNNPACK computes, and the
    operators beside it. The file keeps no names of the model's layers."""
    import torch

    program = opener(enable_etdump=True)
    method = program.load_method("forward")
    inputs = [torch.from_numpy(array) for array in feeds.values()]
    warm, _ = repeated(lambda: method.execute(inputs), WARM)
    done, spent = repeated(lambda: method.execute(inputs), runs)
    with tempfile.TemporaryDirectory() as folder:
        program.write_etdump_result_to_file(f"{folder}/trace", f"{folder}/buffers")
        from executorch.devtools import Inspector

        blocks = Inspector(etdump_path=f"{folder}/trace").event_blocks
    nodes: list[dict[str, Any]] = []
    for event in (event for block in blocks if block.name == "Execute" for event in block.events):
        op, kernel = executorch_kernel(event.name, event.is_delegated_op)
        if op:
            taken = event.perf_data.raw[warm:]
            name = f"{len(nodes)} {event.name}"
            ns = 1e6 * sum(taken)
            nodes.append({"name": name, "op": op, "kernel": kernel, "calls": len(taken), "ns": ns})
    return {"runs": done, "ns": spent, "nodes": nodes}


def executorch_kernel(name: str, delegated: bool) -> tuple[str, str]:
    """The type and the kernel of an event such as "Fully Connected (NC, F32) GEMM #1" or "native_call_gelu.out"; of
    those that hold others nothing."""
    if delegated:
        op, _, kind = name.partition(" (")
        return op, f"XNNPACK {kind.rpartition(' #')[0].replace(')', '', 1) or 'operator'}"
    return (name[len("native_call_") :], "portable") if name.startswith("native_call_") else ("", "")
