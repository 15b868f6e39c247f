"""What can go wrong, as a user sees it.

EdgepressError         exit code 2   the base: one sentence that says what was wrong and what to do
├── InputError         exit code 2   a model, a data file or an artifact that cannot be used as it is
├── UsageError         exit code 2   a word, a name or a combination of options that does not exist
├── UnavailableError   exit code 2   a missing extra, a missing runtime, or a part that does not exist yet
├── ParityError        exit code 2   an artifact that does not compute what it was made from, or did elsewhere
├── PrecisionError     exit code 2   an engine whose products got another precision; see export/layers.py
└── ConstraintError    exit code 3   the budget cannot be met; the best found is written all the same

Any other exception is a defect of edgepress (exit code 1).
"""

from __future__ import annotations


class EdgepressError(Exception):
    """Base of every error that is the caller's to mend. ``str(error)`` is one sentence."""

    exit_code = 2


class InputError(EdgepressError):
    """A model, data file, checkpoint, artifact or run folder that cannot be used as it is."""


class UsageError(EdgepressError):
    """An unknown name, or options that do not go together."""


class UnavailableError(EdgepressError):
    """Something this installation cannot do; the message names the extra or the reason."""


class ParityError(EdgepressError):
    """An artifact that does not compute what it was made from, of which none is left, or what it did elsewhere."""


class ConstraintError(EdgepressError):
    """The constraint cannot be met on this model, data and target."""

    exit_code = 3
