"""Skeleton: how to rebuild a model's unpruned shape, without weights and without code from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError, UnavailableError
from . import families

POOLED = "PooledClassifier"


@dataclass(frozen=True)
class Skeleton:
    """``architecture`` is a class of transformers that a family lists, or ``PooledClassifier``; ``config`` is the
    family's own configuration as in ``config.json``; ``labels`` are the class names, in the order of the logits."""

    architecture: str
    config: Mapping[str, Any]
    labels: tuple[str, ...]

    @property
    def family(self) -> families.Family:
        return families.of_model_type(str(self.config.get("model_type")))

    def build(self) -> nn.Module:
        """The module with parameters on the meta device and buffers in place, in evaluation mode."""
        import transformers
        from accelerate import init_empty_weights

        from .pooled import PooledClassifier

        family = self.family
        try:
            config = transformers.AutoConfig.for_model(**self.config)
        except (TypeError, ValueError) as error:
            raise InputError(f"config.json does not describe a {family.name} model: {error}.") from error
        config.num_labels = len(self.labels)
        with init_empty_weights(include_buffers=False):
            if self.architecture == POOLED:
                module: nn.Module = PooledClassifier(config, num_labels=len(self.labels))
            elif self.architecture in family.architectures:
                module = getattr(transformers, self.architecture)(config)
            else:
                known = ", ".join((*family.architectures, POOLED))
                raise UnavailableError(
                    f"'{self.architecture}' is not supported for {family.name} (supported: {known})."
                )
        return module.eval()
