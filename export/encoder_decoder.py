"""An encoder-decoder as two graphs: what is read is read once, what is written is written step by step.

The encoder's graph ends in the keys and values of the decoder's cross-attention, layer by layer. The decoder's is a
step after a past: it takes those, and the keys and values of what was written before, and gives back the latter with
its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..errors import UnavailableError
from ..files import new_folder
from ..models import tasks
from ..models.examples import longest
from ..models.workload import PAST, Workload
from ..plan import QuantizationPlan
from . import cache, parity, placement
from .artifact import Artifact, Parity, open_artifact
from .cache import CROSS, PRESENT, TRACED

PARTS = ("encoder", "decoder")
READ = 16
"""Tokens that the encoder of a text is traced with."""


def parts(workload: Workload, length: int) -> dict[str, Workload]:
    """The encoder and the decoder of a model that produces text, for texts of ``length`` tokens at most.

    Their modules are the whole one. Raises UnavailableError for another model, UsageError where ``length`` is more than
    it takes.
    """
    if not has_parts(workload):
        raise UnavailableError(f"{workload.name} does not read one thing and write another.")
    cache.check(workload, length, longest(workload.module.config, decoder=True))
    past, new = TRACED
    read = {name: tensor for name, tensor in workload.example.items() if not name.startswith("decoder_")}
    if "input_ids" in read:
        read = {name: tensor[:, :READ] for name, tensor in read.items()}
    ids = workload.example["decoder_input_ids"][:, :1].expand(1, past + new).contiguous()
    made = _both(cache.empty(), cache.empty())
    with torch.no_grad():
        workload.module(**read, decoder_input_ids=ids[:, :past], past_key_values=made, use_cache=True)
    own = cache.pairs(made.self_attention_cache, "decoder.")
    cross = cache.pairs(made.cross_attention_cache, "encoder.")
    mask = {name: tensor for name, tensor in read.items() if name == "attention_mask"}
    examples = (read, {"decoder_input_ids": ids[:, past:], **mask, **own, **cross})
    return {
        part: replace(workload, name=f"{workload.name}-{part}", example=example, max_length=length)
        for part, example in zip(PARTS, examples, strict=True)
    }


def has_parts(workload: Workload) -> bool:
    return _writes(workload) and "decoder_input_ids" in workload.example


def is_encoder(workload: Workload) -> bool:
    return _writes(workload) and "decoder_input_ids" not in workload.example


def _writes(workload: Workload) -> bool:
    config = getattr(workload.module, "config", None)
    return workload.task is tasks.GENERATION and bool(getattr(config, "is_encoder_decoder", False))


def is_decoder(workload: Workload) -> bool:
    return has_parts(workload) and bool(cache.names(workload.example))


def write(
    workload: Workload, length: int, folder: Path, write_part: Callable[[Workload, Path], Artifact]
) -> list[Artifact]:
    """Both parts as artifacts in ``folder``, ``encoder`` and ``decoder``, or none."""
    with new_folder(folder) as place:
        for part, of in parts(workload, length).items():
            write_part(of, place / part)
    return [open_artifact(folder / part) for part in PARTS]


def is_part(workload: Workload) -> bool:
    return is_encoder(workload) or is_decoder(workload)


def outputs(workload: Workload) -> tuple[str, ...]:
    """What a part gives."""
    if is_decoder(workload):
        return ("logits", *cache.outputs(workload.example))
    with torch.no_grad():
        count = len(of_part(workload, workload.module)(*workload.example.values()))
    return tuple(f"{PRESENT}{at}{CROSS}{part}" for at in range(count // 2) for part in ("key", "value"))


def joined(encode: parity.Steps, step: parity.Steps) -> parity.Steps:
    """The two parts as one: the logits of all tokens of ``decoder_input_ids``, which follow none."""

    def run(feeds: parity.Feeds) -> list[NDArray[Any]]:
        given = {name: array for name, array in feeds.items() if name in {"decoder_input_ids", "attention_mask"}}
        return step({**given, **crossed(encode({n: a for n, a in feeds.items() if n != "decoder_input_ids"}))})

    return run


def crossed(made: Sequence[NDArray[Any]]) -> parity.Feeds:
    """What an encoder gives, by the names of the decoder's inputs."""
    return {f"{PAST}{at // 2}{CROSS}{('key', 'value')[at % 2]}": one for at, one in enumerate(made)}


def of_part(workload: Workload, module: nn.Module) -> nn.Module:
    """What computes a part: the encoder or the decoder of ``module``."""
    names = tuple(workload.example)
    return Encoder(module, names) if is_encoder(workload) else Decoder(module, names)


class Encoder(nn.Module):
    """The keys and values of each layer's cross-attention, as a function of what is read."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = _both(cache.empty(), cache.empty())
        start = torch.zeros(inputs[0].shape[0], 1, dtype=torch.int64)
        read = dict(zip(self.names, inputs, strict=True))
        self.model(**read, decoder_input_ids=start, past_key_values=made, use_cache=True)
        return tuple(cache.pairs(made.cross_attention_cache, "encoder.").values())


class Decoder(nn.Module):
    """The logits of the next tokens and each layer's keys and values, as a function of those before.

    The encoder's hidden states are not read any more; only that there are some decides what the layers do.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        held = [given.pop(name) for name in cache.names(self.names)]
        half = len(held) // 2
        own, cross = cache.filled(held[:half]), cache.filled(held[half:])
        past = _both(own, cross)
        past.is_updated = dict.fromkeys(range(len(own.layers)), True)
        config: Any = self.model.config
        hidden = held[half].new_zeros(held[half].shape[0], held[half].shape[2], config.d_model)
        made = self.model(**given, encoder_outputs=(hidden,), past_key_values=past, use_cache=True)
        return (made.logits, *cache.pairs(own).values())


def _both(own: Cache, cross: Cache) -> Any:
    return EncoderDecoderCache(own, cross)


def only(plan: QuantizationPlan, graph: onnx.ModelProto) -> QuantizationPlan:
    """What of ``plan`` is in a part's graph."""
    known = {name for node in graph.graph.node for name in placement.names(node.name)}
    weights = {name: kind for name, kind in plan.weights.items() if name in known}
    return replace(plan, weights=weights, codes={name: codes for name, codes in plan.codes.items() if name in known})


def costs(workload: Workload) -> dict[str, int]:
    """The parameters that a part reads, and its multiply-accumulates for the example; an encoder's hold those of one
    token in the decoder, which its graph leaves out."""
    module = of_part(workload, copy.deepcopy(workload.module).requires_grad_())
    parameters = list(module.parameters())
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        made = module(*workload.example.values())
    read = torch.autograd.grad(sum(one.sum() for one in made), parameters, allow_unused=True)
    params = sum(one.numel() for one, gradient in zip(parameters, read, strict=True) if gradient is not None)
    return {"params": params, "macs": counter.get_total_flops() // 2}


def prove(workload: Workload, run: parity.Steps, *, precision: str) -> Parity:
    """Parity of a part: an encoder's keys and values, or a decoder's steps against the module that writes at once."""
    if is_encoder(workload):

        def reference(feed: parity.Feeds) -> NDArray[Any]:
            return _flat([one.numpy() for one in encoded(workload, feed)])

        made = partial(parity.feeds, workload)
        return parity.prove_all(workload, lambda feed: _flat(run(feed)), reference, made, precision=precision)

    def steps(feed: parity.Feeds) -> NDArray[Any]:
        return run(step(workload, run, feed))[0]

    def module(feed: parity.Feeds) -> NDArray[Any]:
        written: NDArray[Any] = at_once(workload, feed)[:, feed[parity.PAST_IDS].shape[1] :].numpy()
        return written

    return parity.check(steps, module, feeds(workload), precision=precision, reference_name=parity.MODULE)


def encoded(workload: Workload, feed: parity.Feeds) -> tuple[Tensor, ...]:
    """The keys and values that the module's encoder gives."""
    with torch.no_grad():
        made: tuple[Tensor, ...] = Encoder(workload.module, tuple(feed))(*map(torch.from_numpy, feed.values()))
    return made


def step(workload: Workload, run: parity.Steps, feed: parity.Feeds) -> parity.Feeds:
    """The inputs of a decoder's step: the tokens of ``feed`` after its past, and the keys and values that ``run`` gives
    of it."""
    before = feed[parity.PAST_IDS]
    kept: parity.Feeds = {}
    given = {name: array for name, array in feed.items() if name == "attention_mask" or CROSS in name}
    own = [name for name in cache.names(workload.example) if CROSS not in name]
    for start, end in parity.halves(before.shape[1]):
        kept = dict(zip(own, run({"decoder_input_ids": before[:, start:end], **given, **kept})[1:], strict=True))
    return {"decoder_input_ids": feed["decoder_input_ids"], **given, **kept}


def at_once(workload: Workload, feed: parity.Feeds) -> Tensor:
    """The module's logits of the tokens before and after the past, written together: [batch, past + new,
    vocabulary]."""
    ids = np.concatenate([feed[parity.PAST_IDS], feed["decoder_input_ids"]], axis=1)
    mask = {name: torch.from_numpy(array) for name, array in feed.items() if name == "attention_mask"}
    hidden = (torch.from_numpy(feed["encoder_outputs"]),)
    with torch.no_grad():
        made = workload.module(encoder_outputs=hidden, **mask, decoder_input_ids=torch.from_numpy(ids))
    logits: Tensor = made.logits
    return logits


def _flat(made: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([one.reshape(len(one), -1) for one in made], axis=1)


def feeds(workload: Workload) -> Iterator[parity.Feeds]:
    """At each corner the tokens before and after a past, with what the module's own encoder has read, once for all."""
    pads, whole = workload.data.calibration.pads, cast(Any, workload.module)
    for (batch, length), corners in itertools.groupby(
        parity.corners(workload), key=lambda sizes: (sizes["batch"], sizes.get("sequence"))
    ):
        made = {name: tensor.numpy() for name, tensor in parity.inputs(workload, batch).items()}
        read = {name: array for name, array in made.items() if not name.startswith(("decoder_", PAST))}
        if length is not None:
            read = {name: parity.fitted(array, length, pads.get(name, 0)) for name, array in read.items()}
        tensors = {name: torch.from_numpy(array) for name, array in read.items()}
        with torch.no_grad():
            hidden = whole.get_encoder()(**tensors)[0].numpy()
        crossing = crossed([one.numpy() for one in encoded(workload, read)])
        mask = {name: array for name, array in read.items() if name == "attention_mask"}
        for sizes in corners:
            past, new = sizes["past_sequence"], sizes["decoder_sequence"]
            ids = np.stack([np.resize(row, past + new) for row in made["decoder_input_ids"]])
            written = {"decoder_input_ids": ids[:, past:], parity.PAST_IDS: ids[:, :past]}
            yield {**written, **mask, "encoder_outputs": hidden, **crossing}
