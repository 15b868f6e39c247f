"""Rotation: channels mixed by an orthogonal matrix that weights hold, so that none of them is far larger than others.

What    Random-signed Hadamard matrices, folded into the weights on both sides of a tensor: of every attention's values,
        head by head, and of the residual stream. The function stays the same, and what is rounded has fewer outliers.
When    Before weights, or weights and inputs, are rounded to few bits, where a few channels are far larger than the
        rest. docs/quantization.md has what it brings, which is little where there are none. ``--rotate``.
Cost    Two products with [hidden, hidden] for each weight, a few passes of the example, no rows; nothing at run time.
Source  Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456; Liu et al. 2024, "SpinQuant", arXiv 2405.16406; the computed
        function's invariance: Ashkboos et al. 2024, "SliceGPT", arXiv 2401.15024

Values. Attention gives each query head the mix A V of its values, A [query, key], and the output layer takes it by its
columns: y = Σ_h A_h V_h O_hᵀ. For an orthogonal R, A (V R) (O R)ᵀ = A V Oᵀ. V R is made by the rows of the value
projection, Rᵀ W and Rᵀ b; heads that share keys and values share an R. Nothing may stand between V and O, so this holds
in encoders too, with any norm and any tied table.

Stream. Rows x of the stream are the sum of what layers write, and are read through norms n alone, as n(x) ∘ g + b.
With Q orthogonal and all that is written turned, x Q:

    writers   x += z Wᵀ + c         become   W' = Qᵀ W, c' = Qᵀ c (a table's rows t become t Q)
    norms     n(x) ∘ g + b          become   n(x Q), with a scale of 1 and no bias
    readers   (n(x) ∘ g + b) Wᵀ     become   W' = W diag(g) Q, and W b added to their bias

The last is right where n(x Q) = n(x) Q. A norm by the root mean square is one: x Q is as long as x. LayerNorm, which
takes the mean off first, is one where Q 1 = 1 (1 the vector of ones, so that Qᵀ 1 = 1 too): the mean of x Q is
x Q 1 / H = x 1 / H, that of x, and (x - m 1ᵀ) Q = x Q - m 1ᵀ. SliceGPT folds the subtraction into the writers and makes
the norm another one; with such a Q it may stay where it is. It is A diag(1, s) Aᵀ, s random signs and A orthogonal with
its first column constant, a Hadamard matrix too.

A norm that is not the readers' alone (BERT's, whose output is the stream), a reader without a bias to take a norm's
and anything else at the stream are refused, and so is a table that is also the output layer where the last norm's g is
not constant: the table would be E Q and the layer E diag(g) Q, two matrices where there was one. With ``untie`` they
are two. Which layers read and write is what the structure says; that the answer to the example stays is tried.

Hadamard matrices [n, n] are known here for n = 2^k, and for n = 2^k (p + 1) with a prime p = 3 mod 4 (Paley 1933): all
of the usual widths. Of any other n = 2^k m it is the Kronecker product of one of 2^k with a random orthogonal one of m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UnavailableError
from ...models import hidden
from ...models.layers import tied, window
from ...models.structure import Cut
from ...models.workload import Workload
from .fake import holding
from .fold import as_matrix, inputs, made_by_norms

HEADS = {"head", "kv", "cross_head"}
TOLERANCE = 1e-3
"""Largest change of the answer to the example, in units of its largest number: float32 takes the turned weights."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rotation:
    """Entries of the state dict that take the place of the module's own, and what of it stays as it was, and why."""

    state: State
    notes: tuple[str, ...]


def rotation(workload: Workload, *, stream: bool = True, untie: bool = False, seed: int = 0) -> Rotation:
    """The rotation of ``workload`` wherever it is free: of the values of all attentions and, with ``stream``, of the
    residual stream.

    With ``untie`` a table that is also the output layer may become two. ``seed`` draws signs and orthogonal matrices.
    Raises UnavailableError, with the reasons, where none of it can be turned.
    """
    random = torch.Generator().manual_seed(seed)
    state: State = {}
    notes = []
    turns: tuple[tuple[str, Callable[[State], None]], ...] = (
        ("values", lambda tried: _turn_values(workload, tried, random)),
        ("residual stream", lambda tried: _turn_stream(workload, tried, random, untie=untie)),
    )
    for what, turn in turns if stream else turns[:1]:
        tried = dict(state)
        try:
            turn(tried)
            _prove(workload, tried)
        except UnavailableError as error:
            notes.append(f"The {what} of {workload.name} cannot be rotated: {error}.")
        else:
            state = tried
    if not state:
        raise UnavailableError(" ".join(notes))
    parameters = dict(workload.module.named_parameters(remove_duplicate=False))
    return Rotation({name: tensor.to(parameters[name]) for name, tensor in state.items()}, tuple(notes))


# ---- matrices


def orthogonal(size: int, random: torch.Generator, *, fixes_ones: bool = False) -> Tensor:
    """A random-signed orthogonal matrix, float64 [size, size]; with ``fixes_ones`` one that maps ones to ones."""
    signs = torch.randint(0, 2, (size,), generator=random).double() * 2 - 1
    mixed = hadamard(size)
    if not fixes_ones:
        if mixed is None:
            odd = size // (size & -size)
            part = torch.linalg.qr(torch.randn(odd, odd, generator=random, dtype=torch.float64))[0] * math.sqrt(odd)
            mixed = _doubled(part, size // odd)
        return signs[:, None] * mixed / math.sqrt(size)
    if mixed is None:
        drawn = torch.randn(size, size, generator=random, dtype=torch.float64)
        drawn[:, 0] = 1
        mixed = torch.linalg.qr(drawn)[0] * math.sqrt(size)
    basis = mixed * mixed[:, :1].sign() / math.sqrt(size)
    signs[0] = 1
    return basis * signs @ basis.T


def hadamard(size: int) -> Tensor | None:
    """A matrix of ±1, float64 [size, size], whose rows are orthogonal; None where none is known here."""
    core = size // (size & -size)
    while core <= size:
        if core == 1 or (core % 4 == 0 and _is_prime(core - 1)):
            first = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core - 1)
            return _doubled(first, size // core)
        core *= 2
    return None


def _doubled(core: Tensor, times: int) -> Tensor:
    """Sylvester's: ``core`` enlarged ``times``, a power of two."""
    while times > 1:
        core, times = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)]), times // 2
    return core


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley(prime: int) -> Tensor:
    """I + S [prime + 1, prime + 1], S skew with the quadratic residues of differences, for a prime of 3 mod 4."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime) ** 2 % prime] = 1
    residues[0] = 0
    places = torch.arange(prime)
    made = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    made[1:, 0] = -1
    made[1:, 1:] = residues[(places[:, None] - places[None]) % prime] + torch.eye(prime, dtype=torch.float64)
    return made


# ---- values


def _turn_values(workload: Workload, state: State, random: torch.Generator) -> None:
    """The values of each attention, where one layer makes them and one reads them."""
    sites = [site for site in workload.structure.sites if site.kind in HEADS]
    gates = {gate.layer: (gate, len(site.parts)) for site in sites for gate in site.gates}
    turned = 0
    for tensor in inputs(workload, gates):
        if not tensor.maker or len(tensor.layers) > 1:
            continue
        (reader,), (gate, parts) = tensor.layers, gates[tensor.layers[0]]
        heads: dict[tuple[int, ...], list[list[int]]] = {}
        for part in range(parts):
            columns = gate.features([part])
            heads.setdefault(tuple(tensor.features[column] for column in columns), []).append(columns)
        for made, read in heads.items():
            turn = orthogonal(len(made), random)
            rows = list(made)
            _change(workload, state, tensor.maker, rows=rows, turn=turn)
            for columns in read:
                _change(workload, state, reader, columns=columns, turn=turn)
        turned += 1
    if not turned:
        raise UnavailableError("no layer was found that makes what an attention mixes")


# ---- the residual stream


def _turn_stream(workload: Workload, state: State, random: torch.Generator, *, untie: bool) -> None:
    module = workload.module
    site = workload.structure.find(hidden.KIND, hidden.LAYER)
    if site is None or not site.norms:
        raise UnavailableError("no stream of one width that norms are over is known in it")
    norms = {name: module.get_submodule(name) for name in site.norms}
    centred = any(isinstance(norm, nn.LayerNorm) for norm in norms.values())
    turn = orthogonal(site.count, random, fixes_ones=centred)
    own = {f"{name}.weight" for name in norms} | norms.keys()
    for cut in site.cuts:
        if cut.side == "out" and cut.layer not in own:
            _turn_writer(workload, state, cut, turn)
    readers = [cut for cut in site.cuts if cut.side == "in"]
    for cut, name in zip(readers, _norms_read(workload, readers, norms), strict=True):
        _turn_reader(workload, state, cut, norms[name], turn)
    for name, norm in norms.items():
        state[f"{name}.weight"] = torch.full_like(norm.get_parameter("weight"), _neutral(norm), dtype=torch.float64)
        if getattr(norm, "bias", None) is not None:
            state[f"{name}.bias"] = torch.zeros_like(norm.get_parameter("bias"), dtype=torch.float64)
    for name, owner in tied(module).items():
        both = name in state and owner in state and not untie
        if both and not torch.allclose(state[name], state[owner], rtol=1e-9, atol=1e-12):
            raise UnavailableError(f"'{name}' is also '{owner}', and turned they would be two")


def _norms_read(workload: Workload, readers: Iterable[Cut], norms: Iterable[str]) -> list[str]:
    """The norm that each reader reads: that whose output it is given, or else, for readers of a part or a mean of it,
    the one that no reader is given."""
    layers = [cut.layer for cut in readers]
    given = made_by_norms(workload, layers)
    left = [name for name in norms if name not in given.values()]
    apart = [layer for layer in layers if layer not in given]
    if apart and len(left) != 1:
        raise UnavailableError(f"'{apart[0]}' reads it through no norm")
    return [given.get(layer, left[0] if left else "") for layer in layers]


def _neutral(norm: nn.Module) -> float:
    """The weight that scales by 1: that of Gemma's norms is added to 1."""
    weight = norm.get_parameter("weight")
    zero = {"weight": torch.zeros_like(weight)}
    if getattr(norm, "bias", None) is not None:
        zero["bias"] = torch.zeros_like(weight)
    with torch.no_grad(), holding(norm, zero):
        scaled = norm(torch.arange(len(weight)).to(weight)[None])
    return 0.0 if bool(scaled.any()) else 1.0


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and adds, float64 [hidden]."""
    weight = norm.get_parameter("weight").detach().double()
    bias = getattr(norm, "bias", None)
    return weight + 1 - _neutral(norm), torch.zeros_like(weight) if bias is None else bias.detach().double()


def _turn_writer(workload: Workload, state: State, cut: Cut, turn: Tensor) -> None:
    """A layer's outputs, a table's rows, or a parameter's last dimension, times ``turn``."""
    parent, _, last = cut.layer.rpartition(".")
    layer = getattr(workload.module.get_submodule(parent), last)
    if isinstance(layer, (nn.Parameter, nn.Embedding)):
        name = cut.layer if isinstance(layer, nn.Parameter) else f"{cut.layer}.weight"
        state[name] = _entry(workload, state, name) @ turn
    else:
        _change(workload, state, cut.layer, rows=list(range(len(turn))), turn=turn)


def _turn_reader(workload: Workload, state: State, cut: Cut, norm: nn.Module, turn: Tensor) -> None:
    scale, bias = _affine(norm)
    layer, size = workload.module.get_submodule(cut.layer), len(turn)
    if window(layer) != 1:
        raise UnavailableError(f"'{cut.layer}' reads it in windows")
    for offset in cut.offsets:
        columns = list(range(offset, offset + size))
        if bool(bias.any()):
            if getattr(layer, "bias", None) is None:
                raise UnavailableError(f"'{cut.layer}' has no bias to take that of the norm before it")
            weight = as_matrix(layer, _entry(workload, state, f"{cut.layer}.weight"))[:, columns]
            state[f"{cut.layer}.bias"] = _entry(workload, state, f"{cut.layer}.bias") + weight @ bias
        _change(workload, state, cut.layer, columns=columns, turn=scale[:, None] * turn)


# ---- entries


def _entry(workload: Workload, state: State, name: str) -> Tensor:
    return state[name] if name in state else workload.module.get_parameter(name).detach().double()


def _change(
    workload: Workload,
    state: State,
    path: str,
    *,
    turn: Tensor,
    rows: list[int] | None = None,
    columns: list[int] | None = None,
) -> None:
    """The outputs ``rows`` of a layer, with their biases, or its inputs ``columns`` times ``turn``."""
    layer, name = workload.module.get_submodule(path), f"{path}.weight"
    state[name] = _entry(workload, state, name).clone()
    weight = as_matrix(layer, state[name])
    if columns is not None:
        weight[:, columns] = weight[:, columns] @ turn
    if rows is not None:
        weight[rows] = turn.T @ weight[rows]
        if getattr(layer, "bias", None) is not None:
            bias = _entry(workload, state, f"{path}.bias").clone()
            bias[rows] = turn.T @ bias[rows]
            state[f"{path}.bias"] = bias


def _prove(workload: Workload, state: State) -> None:
    """UnavailableError where the answer to the example becomes another."""
    parameters = dict(workload.module.named_parameters(remove_duplicate=False))
    held = {name: tensor.to(parameters[name]) for name, tensor in state.items()}
    with torch.no_grad():
        wanted = workload.forward(workload.example)
        with holding(workload.module, held):
            found = workload.forward(workload.example)
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not error < TOLERANCE:
        raise UnavailableError(
            f"it changes the answers, by {error:.2g} of the largest; at most {TOLERANCE:g} is allowed"
        )
