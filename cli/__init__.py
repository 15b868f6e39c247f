"""The command line: parse and print. Everything that computes is imported inside the command that needs it.

A command is a function in the file of its name, or of its kind; its parameters are its options.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from ..errors import EdgepressError, UsageError
from .compare import compare, report
from .compress import compress
from .export import export
from .inspect import inspect
from .listings import methods, targets, zoo
from .measure import bench, sweep
from .prune import prune
from .quantize import quantize, sensitivity
from .score import score
from .screen import first

app = typer.Typer(
    name="edgepress",
    help="Take a trained transformer to an edge device: score, prune, recover, quantize, export, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    *(compress, inspect, score, prune, sensitivity, quantize, export),
    *(bench, compare, sweep, report, targets, methods, zoo),
):
    app.command()(_command)

INTERRUPTED = 130
"""The exit code that typer makes of Ctrl-C."""
_KEPT = {
    "compress": "; finished stages are kept, and --resume goes on from there",
    "sweep": "; what has finished is kept, and the same command goes on from there",
}


def main() -> None:
    """Run the command line; ends the process with the exit codes of errors.py."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.argv[1:2] != ["prune"]:
            raise UsageError("Only 'edgepress prune --recover distill' shares its work out among processes.")
        app()
    except EdgepressError as error:
        if verbose:
            traceback.print_exc()
        if first():  # all processes come to the same error
            print(f"edgepress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and first():
            print(f"edgepress: interrupted{_KEPT.get(''.join(sys.argv[1:2]), '')}.", file=sys.stderr)
        raise
    except Exception as error:
        if verbose:
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"edgepress: this is a defect of edgepress, please report it with -v ({what})", file=sys.stderr)
        sys.exit(1)
