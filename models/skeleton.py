"""Skeleton: how to rebuild a model's unpruned shape, without weights and without code from its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import EdgepressError, InputError, UnavailableError
from . import families, functions, remote
from .examples import example, longest

POOLED = "PooledClassifier"


@dataclass(frozen=True)
class Skeleton:
    """``architecture`` is a model class of transformers, ``PooledClassifier``, or a function that the user has named;
    ``config`` is the family's own configuration as in ``config.json``; ``labels`` are the class names in the order of
    the logits, empty where the model has no classes."""

    architecture: str
    config: Mapping[str, Any]
    labels: tuple[str, ...]
    code: Path | None = None
    """The folder whose own code makes the module, where the user trusts it."""

    @property
    def is_function(self) -> bool:
        return ":" in self.architecture

    @property
    def family(self) -> families.Family:
        """The family that the configuration names; a function's module has to be looked at instead."""
        if self.code:
            return families.find(str(self.config.get("model_type"))) or families.get("generic")
        return families.of_model_type(str(self.config.get("model_type")))

    def make(self, length: int) -> tuple[nn.Module, families.Family, dict[str, Tensor]]:
        """The module, its family, and one row of its inputs, of ``length`` tokens where there are any.

        A function makes its module as it likes, with weights that are then replaced. Raises InputError for a
        configuration that no such model has, and for more tokens than it takes.
        """
        if self.is_function:
            module, given = functions.module_and_example(self.architecture)
            return module, families.of_module(module), given
        module = self.build()
        with self.told():
            most = longest(module.config)
            if length > most:
                raise InputError(f"The sequence length {length} is not one of the {most} positions of config.json.")
            return module, self.family, example(module, self.family.inputs, length)

    @contextmanager
    def told(self) -> Iterator[None]:
        """InputError for what the library, or the folder's own code, raises where a configuration makes no sense to it:
        some of that not before the module runs."""
        family = "" if self.is_function else self.family.name  # refused where there is none
        try:
            yield
        except EdgepressError:
            raise
        except Exception as error:  # it raises what its parts raise
            why = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            what = f"config.json does not describe a {family} model" if family else f"{self.architecture}() fails"
            raise InputError(f"{what}: {why}.") from error

    def build(self) -> nn.Module:
        """The module with parameters on the meta device and buffers in place, in evaluation mode.

        One that is made by code of its folder has parameters too: what that code does with them is not known.
        """
        with self.told():
            return self._built().eval()

    def _built(self) -> nn.Module:
        import transformers
        from accelerate import init_empty_weights

        from .pooled import PooledClassifier

        if self.code:
            config_class, made_by = remote.classes(self.code, self.config, self.architecture)
            own: nn.Module = made_by(config_class.from_dict(dict(self.config)))
            return own
        config = transformers.AutoConfig.for_model(**self.config)
        if self.labels:
            config.num_labels = len(self.labels)
        with init_empty_weights(include_buffers=False):
            if self.architecture == POOLED:
                module: nn.Module = PooledClassifier(config, num_labels=len(self.labels))
            else:
                module = model_class(self.architecture, type(config))(config)
        return module


def model_class(architecture: str, config_class: type) -> Any:
    """The model class of transformers with this name; UnavailableError where it is none, or another family's."""
    import transformers

    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnavailableError(f"'{architecture}' is not supported: transformers has no such model class.")
    if found.config_class is not config_class:
        raise UnavailableError(f"'{architecture}' is not supported with a {config_class.__name__}.")
    return found
