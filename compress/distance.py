"""Distance: how far a compressed model's answers are from the original's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..models import padding
from ..models.data import Batch
from ..models.tasks import EMBEDDING, REGRESSION
from ..models.workload import Workload


def by_class(workload: Workload) -> bool:
    """Whether the answers are logits, of classes or of tokens."""
    return workload.task not in {REGRESSION, EMBEDDING}


def distance(wanted: Tensor, found: Tensor, batch: Batch, *, by_class: bool) -> Tensor:
    """Of each row, float64 [batch]; of tokens the mean over those that are not padding.

    KL(wanted || found) in nats where answers are logits, else the squared error over the mean square of ``wanted``.
    """
    wanted, found = wanted.double(), found.double()
    if by_class:
        logs = functional.log_softmax(wanted, dim=-1)
        each = (logs.exp() * (logs - functional.log_softmax(found, dim=-1))).sum(dim=-1)
    else:
        each = (found - wanted).square().mean(dim=-1) / wanted.square().mean()
    mask = padding.real(batch.inputs, wanted)
    each = each.reshape(len(each), -1)
    if mask is None:
        return each.mean(dim=1)
    return torch.as_tensor((each * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
