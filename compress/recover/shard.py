"""Sharding: each process holds a part of every weight, of its gradient and of the optimizer's moments.

What    Fully sharded data parallel training: the weights of one block after the other are gathered when they are
        computed with, and let go again. Without it each process holds the whole model.
When    A model whose weights, gradients and moments do not fit into one device.
Cost    Every weight is sent twice a step. The original, which is not trained, is whole in each process.
Source  Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054, stage 3); PyTorch's ``fully_shard``
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def split(module: nn.Module, blocks: Sequence[str], device: str, processes: int) -> None:
    """Split the parameters of ``module`` among ``processes``, those of each block together and all others together.

    A group is let go after every pass, the outermost too: what is laid back into the parts in between is seen.
    """
    mesh = init_device_mesh(device, (processes,))
    for part in (*map(module.get_submodule, blocks), module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with all of its parts; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of ``tensor`` with the type and on the device of ``like``: of one that is split, this process' part."""
    if not isinstance(like, DTensor):
        return tensor.to(like, copy=True)
    return distribute_tensor(tensor.to(like.device, like.dtype, copy=True), like.device_mesh, like.placements)
