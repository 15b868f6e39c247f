"""What is traced: a workload's module in the shape that exports best, inputs to trace it with, and their free sizes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnavailableError
from ..models import tasks
from ..models.workload import MAX_BATCH, Workload, answer
from . import axes, cache, encoder_decoder
from .axes import TRACED


def program(workload: Workload, goal: str) -> Any:
    """The module as a program of PyTorch's own operators, for what is not made from an ONNX graph.

    It is traced with the most rows: what is made of it later takes a choice that PyTorch makes for few rows, such as an
    algorithm for convolutions, for a bound of their number. Raises UnavailableError where it cannot be traced, or a
    declared axis would not be free.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = torch.export.export(
                module(workload), inputs(workload, MAX_BATCH), dynamic_shapes={"inputs": sizes(workload)}, strict=False
            )
    except (RuntimeError, ValueError) as error:
        raise refusal(workload, error, goal) from error
    return found


def sizes(workload: Workload, *, bounded: bool = True) -> tuple[dict[int, Any], ...]:
    """The free sizes of each input by their place, within the declared range or, of steps after a past, not."""
    dims = {}
    for axis in (axis for of_input in workload.input_axes.values() for axis in of_input.values()):
        dims[axis.name] = torch.export.Dim(axis.name, min=axis.min, max=axis.max) if bounded else cache.dim(axis)
    return tuple({at: dims[axis.name] for at, axis in of_input.items()} for of_input in workload.input_axes.values())


def refusal(workload: Workload, error: BaseException, goal: str) -> UnavailableError:
    """What the tracer's ``error`` comes to: the axis that is not free, or what it says first."""
    if fixed := axes.violated(workload, error):
        return UnavailableError(fixed)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    why = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return UnavailableError(f"{workload.name} cannot be exported to {goal}: {why}")


def inputs(workload: Workload, rows: int = TRACED["batch"]) -> tuple[Tensor, ...]:
    """So many rows of the inputs that the graph is traced with, short where their length is free; a tensor each."""
    made = []
    for name, of_input in workload.input_axes.items():
        tensor = workload.example[name]
        if 1 in of_input:
            tensor = tensor[:, : TRACED.get(of_input[1].name)]
        made.append(torch.cat([tensor] * rows))
    return tuple(made)


class Answer(nn.Module):
    """A model as a function of tensors in the order of ``names``, returning its answer alone."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        cached = "use_cache" in inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if cached else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        return answer(self.model(**dict(zip(self.names, inputs, strict=True)), **self.options))


def module(workload: Workload) -> nn.Module:
    """A copy of the module in the shape that gives the leanest graph.

    Eager attention exports to two products and a softmax, which runtimes recognise. The padding mask is handed to the
    encoder as the additive bias [batch, 1, 1, sequence] that it becomes anyway; left to the library, a dozen index
    operators build it anew in every run. Raises UnavailableError where there are two answers, or one at a token.
    """
    if workload.task is tasks.RETRIEVAL:
        raise UnavailableError(f"{workload.name} has two towers, which are two graphs: the command export writes both.")
    pair = workload.skeleton.config.get("is_encoder_decoder") and "input_ids" in workload.example
    if pair and workload.task in {tasks.CLASSIFICATION, tasks.REGRESSION}:
        raise UnavailableError(f"{workload.name} looks for its text's end; its export is not available yet.")
    copied = copy.deepcopy(workload.module)
    for child in copied.modules():
        if hasattr(child, "set_attn_implementation"):
            child.set_attn_implementation("eager")  # type: ignore[operator]
    if encoder_decoder.is_part(workload):
        return encoder_decoder.of_part(workload, copied).eval()
    if cache.names(workload.example):
        return cache.Step(copied).eval()
    if workload.structure.family != "bert":
        return Answer(copied, tuple(workload.input_axes)).eval()
    encoder = copied.get_submodule(workload.structure.stacks[0].path.removesuffix("encoder.layer").removesuffix("."))

    def additive_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"][:, None, None, :].to(torch.float32)
        return args, {**kwargs, "attention_mask": (1.0 - mask) * torch.finfo(torch.float32).min}

    encoder.register_forward_pre_hook(additive_mask, with_kwargs=True)
    return Answer(copied, tuple(workload.input_axes)).eval()
