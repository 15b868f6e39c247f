"""Blocks: weights in few bits, with a scale and a zero point for every so many columns of every row.

All is in the codes of :class:`..plan.Codes`; a last block may have fewer columns than the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...plan import Codes


def check(block: int) -> None:
    """UsageError unless ``block`` is what a runtime's kernels take: a power of two from 16 on."""
    if block < 16 or block & (block - 1):
        raise UsageError(f"A block of {block} columns has no kernel; it must be a power of two, 16 at least.")


def blocks(weight: Tensor, block: int) -> Tensor:
    """``weight`` [out, in] as [out, blocks, block], the last block filled up with zeros."""
    filled = nn.functional.pad(weight, (0, -weight.shape[1] % block))
    return filled.reshape(len(weight), filled.shape[1] // block, block)


def grid(weight: Tensor, *, bits: int, block: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, blocks] whose grid spans each block and has 0 on it, in the type of ``weight``.

    A symmetric grid has its zero point in the middle; the largest magnitude is put at its longer end, so a scale may be
    negative. Scales are numbers of float32.
    """
    parts = blocks(weight, block)
    half = 2 ** (bits - 1)
    if symmetric:
        largest = parts.gather(2, parts.abs().argmax(dim=2, keepdim=True))[..., 0]
        scales, zeros = -largest / half, torch.full_like(largest, half)
    else:
        low, high = parts.amin(dim=2).clamp(max=0), parts.amax(dim=2).clamp(min=0)
        scales = (high - low) / (2 * half - 1)
        zeros = (-low / torch.where(scales > 0, scales, 1)).round()
    scales = scales.float().to(weight.dtype)
    return torch.where(scales == 0, 1, scales), zeros


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> Tensor:
    """The codes of the grid's points that are nearest, as numbers in the type of ``weight``; shapes broadcast."""
    return (weight / scales + zeros).round().clamp(0, 2**bits - 1)


def rounded(weight: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, block: int) -> Codes:
    """``weight`` [out, in] rounded to the nearest points of a grid."""
    found = nearest(blocks(weight, block), scales[..., None], zeros[..., None], bits=bits)
    return codes(found.flatten(1)[:, : weight.shape[1]], scales, zeros, bits=bits, block=block)


def codes(numbers: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, block: int) -> Codes:
    """Codes [out, in], scales and zero points [out, blocks] in the types in which they are kept."""
    kept = (numbers.to(torch.uint8).contiguous(), scales.float().contiguous(), zeros.to(torch.uint8).contiguous())
    return Codes(bits, block, *kept)


def to_nearest(weight: Tensor, *, bits: int, block: int, symmetric: bool) -> Codes:
    """Round-to-nearest: ``weight`` [out, in] on the grid that spans each block."""
    scales, zeros = grid(weight, bits=bits, block=block, symmetric=symmetric)
    return rounded(weight, scales, zeros, bits=bits, block=block)


def error(weight: Tensor, found: Codes, gram: Tensor) -> Tensor:
    """The mean squared error of each output of the layer, float64 [out], on inputs whose mean of x xᵀ is ``gram``."""
    off = weight.double() - found.weight().double()
    return ((off @ gram) * off).sum(dim=1)


def better(weight: Tensor, one: Codes, other: Codes, gram: Tensor) -> Codes:
    """Of each row what has the smaller error; ``one`` where they are the same."""
    worse = error(weight, one, gram) > error(weight, other, gram)
    parts = ((one.codes, other.codes), (one.scales, other.scales), (one.zeros, other.zeros))
    return Codes(one.bits, one.block, *(torch.where(worse[:, None], b, a) for a, b in parts))
