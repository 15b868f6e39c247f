"""Token merging: every block of an image encoder averages its most alike tokens, so that later ones have less to do.

What    Between attention and feed-forward of each block, r tokens are merged into those that their keys are most alike
        (bipartite soft matching); the class token stays. No weight changes, nothing is trained.
When    Image encoders with many patches, 197 say; with a few dozen the matching costs more than the tokens saved.
Cost    None; to apply, one forward pass of one row.
Source  Token Merging: Your ViT But Faster, Bolya et al. 2023 (arXiv 2210.09461)
"""

from __future__ import annotations

import copy

from ...errors import UsageError
from ...models import families, mapping
from ...models import token_merging as merging
from ...models.workload import Workload

SCHEDULES = ("constant", "decreasing")


def merge_tokens(workload: Workload, r: int, *, schedule: str = "constant") -> Workload:
    """A copy of ``workload`` whose blocks merge ``r`` tokens each, or from 2 r down to none under the "decreasing"
    schedule; as many as can where that is fewer.

    Raises UnavailableError for models that are none of ViT, DeiT, DINOv2, UsageError for an ``r`` or a schedule that
    makes no sense, and for a model that merges tokens already.
    """
    if merging.merged(workload.module):
        raise UsageError(f"{workload.name} merges tokens already; begin with the model that does not.")
    module = copy.deepcopy(workload.module)
    family = families.get(workload.structure.family)
    stacks = mapping.block_lists(module, family)
    merging.install(module, stacks, [0] * sum(len(blocks) for _, _, blocks in stacks))
    shapes: list[int] = []
    blocks = [child for child in module.modules() if isinstance(child, merging.MergingBlock)]
    with blocks[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1])):
        workload.with_module(module, workload.structure, workload.plan).forward(workload.example)
    special = blocks[0].merging.special
    for block, count in zip(blocks, counts(shapes[0], special, len(blocks), r, schedule), strict=True):
        block.merging.r = count
    return workload.with_module(module, mapping.structure(module, family, workload.example), workload.plan)


def counts(tokens: int, special: int, layers: int, r: int, schedule: str = "constant") -> list[int]:
    """How many tokens each of ``layers`` blocks merges, of ``tokens`` in the first."""
    if schedule not in SCHEDULES:
        raise UsageError(f"There is no schedule '{schedule}' (known: {', '.join(SCHEDULES)}).")
    if r < 1:
        raise UsageError(f"At least 1 token must be merged a block, not {r}.")
    found = []
    for layer in range(layers):
        wanted = r if schedule == "constant" else round(2 * r * (1 - layer / max(layers - 1, 1)))
        found.append(min(wanted, merging.most(tokens, special)))
        tokens -= found[-1]
    return found
