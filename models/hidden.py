"""Hidden width: the channels of the residual stream, which all blocks read and write.

A channel is a row or a column of almost every layer: of embeddings, of what projects into the stream and out of it, of
norms. They are found by their size; what heads and feed-forward channels own is not theirs.

Masking. A norm divides by statistics over the channels, so a channel at zero is not one that is gone. With gates g in
[0, 1], n = sum(g) of H channels, s = sqrt(H / n) and m = sum(g x) / n (0 in a norm that does not centre), it computes

    y = (norm(s g (x - m)) - b) / s + g b,

where s makes the mean square over all H positions that over the n channels: sum((s g (x - m))^2) / H =
sum(g^2 (x - m)^2) / n. For gates of 0 and 1 that is the norm of the channels that are left, epsilon included, and zero
elsewhere. What reads the stream without a norm has the masked channels set to zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .counts import CONVOLUTIONS, Call, layer_macs
from .layers import Bias, in_features, out_features, window
from .structure import Cut, Site, Stack

if TYPE_CHECKING:
    from .workload import Workload

KIND = "hidden"
LAYER = 0
"""The stream belongs to all layers; its site stands under the first number."""


def site(  # noqa: PLR0917
    module: nn.Module,
    stacks: Sequence[Stack],
    sites: Sequence[Site],
    width: int,
    calls: Mapping[str, list[Call]],
    before: Site | None = None,
) -> Site:
    """The site of the stream's ``width`` channels in ``module``, whose other ``sites`` are known.

    ``before`` is what it was before pruning: a width that is left may be that of something else by chance.
    """
    owned = {(cut.layer, cut.side) for other in sites for cut in other.cuts}
    known = {(_anywhere(cut.layer), cut.side) for cut in before.cuts} if before else None
    cuts: list[Cut] = []
    norms: list[str] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{stack.path}.") for stack in stacks)
        found = [cut for cut in _cuts(name, child, width, inside) if (cut.layer, cut.side) not in owned]
        if known is not None:
            found = [cut for cut in found if (_anywhere(cut.layer), cut.side) in known]
        cuts += found
        if found and "Norm" in type(child).__name__:
            norms.append(name)
    readers = tuple(cut for cut in cuts if cut.side == "in")
    params, macs = _costs(module, cuts, calls)
    return Site(KIND, LAYER, width, tuple(cuts), readers, norms=tuple(norms), params=params, macs=macs)


def _anywhere(name: str) -> str:
    """A layer's path without the numbers of the blocks, which change as blocks go."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _cuts(name: str, layer: Any, width: int, inside: bool) -> Iterator[Cut]:
    if isinstance(layer, nn.Embedding):
        if layer.embedding_dim == width:
            yield Cut(name, "out", 1)
    elif isinstance(layer, (nn.Linear, Conv1D, Bias, *CONVOLUTIONS)):
        if out_features(layer) == width:
            yield Cut(name, "out", 1)
        given = in_features(layer)
        if given == width or (given and given % width == 0 and not inside):  # the stream's states side by side
            yield Cut(name, "in", 1, tuple(range(0, given, width)))
    elif isinstance(layer, nn.LayerNorm):
        if layer.normalized_shape == (width,):
            yield Cut(name, "out", 1)
    else:
        for own, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() and parameter.shape[-1] == width:
                yield Cut(f"{name}.{own}" if name else own, "out", 1)


def _costs(module: nn.Module, cuts: Sequence[Cut], calls: Mapping[str, list[Call]]) -> tuple[int, int]:
    """Parameters and multiply-accumulates that one channel takes with it; tied tables count once."""
    sides: dict[str, set[str]] = {}
    features: dict[str, int] = {}
    for cut in cuts:
        sides.setdefault(cut.layer, set()).add(cut.side)
        features[cut.layer] = max(features.get(cut.layer, 0), len(cut.offsets))
    params = macs = 0
    seen: set[int] = set()
    for name, of_layer in sides.items():
        layer: Any = dict(module.named_modules()).get(name)
        if layer is None:
            parameter = module.get_parameter(name)
            params += parameter.numel() // parameter.shape[-1]
            continue
        weight = layer.weight
        if isinstance(layer, (nn.Embedding, nn.LayerNorm)):
            lost = weight.numel() // weight.shape[-1]
        else:
            rows, columns = out_features(layer), in_features(layer)
            fewer = (rows - ("out" in of_layer)) * (columns - features[name] * ("in" in of_layer))
            lost = (rows * columns - fewer) * window(layer)
            made = calls.get(name, [])
            macs += layer_macs(layer, made) * lost // weight.numel() if made and weight.numel() else 0
        if id(weight) not in seen:
            params += lost
        if "out" in of_layer and getattr(layer, "bias", None) is not None:
            params += 1
        seen.add(id(weight))
    return params, macs


def hooks(module: nn.Module, site: Site, gates: Tensor, by_row: Any) -> Iterator[Any]:
    """Register what masks channels; yields the handles. ``by_row(gates, values)`` shapes gates to multiply values."""
    for name in site.norms:
        norm = module.get_submodule(name)
        yield norm.register_forward_pre_hook(_before_norm(gates, by_row))
        yield norm.register_forward_hook(_after_norm(gates, by_row))
    present = (gates.detach() != 0).to(gates.dtype)
    for cut in site.gates if not bool((present == 1).all()) else ():
        layer = module.get_submodule(cut.layer)
        multiplier = torch.cat([present] * len(cut.offsets), dim=-1)
        yield layer.register_forward_pre_hook(_reader(multiplier, by_row))


def _reader(multiplier: Tensor, by_row: Any) -> Any:
    def mask(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if isinstance(layer, CONVOLUTIONS):
            masked = args[0] * multiplier.reshape(*multiplier.shape, *[1] * (args[0].dim() - 2))
        else:
            masked = args[0] * by_row(multiplier, args[0])
        return (masked.to(args[0].dtype), *args[1:])

    return mask


def _before_norm(gates: Tensor, by_row: Any) -> Any:
    def scale(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        gate = by_row(gates, x)
        left = gate.sum(dim=-1, keepdim=True)
        if isinstance(norm, nn.LayerNorm):
            x = x - (gate * x).sum(dim=-1, keepdim=True) / left
        return ((gate * x * (gate.shape[-1] / left).sqrt()).to(args[0].dtype), *args[1:])

    return scale


def _after_norm(gates: Tensor, by_row: Any) -> Any:
    def unscale(norm: Any, _: Any, output: Tensor) -> Any:
        gate = by_row(gates, output)
        scale = (gate.shape[-1] / gate.sum(dim=-1, keepdim=True)).sqrt()
        bias = norm.bias if isinstance(norm, nn.LayerNorm) and norm.bias is not None else 0.0
        return ((output - bias) / scale + gate * bias).to(output.dtype)

    return unscale


def kept(original: Workload, pruned: Workload) -> Tensor:
    """Which channels of ``original``'s stream are left in ``pruned``, which was made from it: int64, ascending."""
    left = pruned.plan.left(original.plan, KIND, LAYER, original.structure.hidden_size)
    return torch.tensor(left, dtype=torch.long)
