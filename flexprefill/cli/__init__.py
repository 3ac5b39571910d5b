"""The command line: parses the arguments and calls the library, one module a command.

``COMMANDS`` lists each command with its module and its line in the help. The module has DESCRIPTION for its own help,
``add_arguments(parser)``, and ``execute(arguments)``, which returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from flexprefill._version import __version__
from flexprefill.errors import FlexPrefillError

COMMANDS = {
    "demo": ("flexprefill.cli.demo", "find, time and draw the blocks that matter in real text"),
    "inspect": ("flexprefill.cli.inspect", "what a mask file holds, by layer and head"),
    "diff": ("flexprefill.cli.diff", "where two mask files differ, by layer and head"),
    "view": ("flexprefill.cli.view", "look at mask files in the browser"),
    "bench": ("flexprefill.cli.bench", "time every part, and dense attention beside it"),
    "eval": ("flexprefill.cli.evaluate", "ask a model long questions, dense and sparse"),
    "calibrate": ("flexprefill.cli.calibrate", "find alphas by layer and head that cost a model little"),
}
TROUBLE = 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells report them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``flexprefill`` with these arguments (the process's own if None).

    Returns:
        the exit code: the command's own, 0 if it did what was asked, 2 if it failed in a way that nobody foresaw,
        130 if it was interrupted from the keyboard, or 141 if whoever read its output had enough.

    Raises:
        SystemExit: with code 0 after ``--help`` and ``--version``, with code 2 after the help that no arguments at
            all get, after an argument that does not fit, and whatever else the library refuses.
    """
    _prepare_streams()
    parser = argparse.ArgumentParser(prog="flexprefill", description="Block-sparse prefill attention for PyTorch.")
    parser.add_argument("--version", action="version", version=f"flexprefill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, (where, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in argv:  # most modules import torch, which takes a second: only the one that is asked for is loaded
            module = importlib.import_module(where)
            command.description = module.DESCRIPTION
            module.add_arguments(command)
            command.set_defaults(parser=command, execute=module.execute)
    if not argv:
        parser.print_help()
    arguments = parser.parse_args(argv)
    arguments.command = shlex.join(["flexprefill", *argv])

    try:
        code = arguments.execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still buffered would fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (FlexPrefillError, OSError) as error:
        # without the usage: the arguments were right
        print(f"{arguments.parser.prog}: error: {_reason(error)}", file=sys.stderr)
        raise SystemExit(TROUBLE) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        # left to Python, the code would be 1, which says that two files differ
        traceback.print_exc()
        return TROUBLE
    return code


def _reason(error: Exception) -> str:
    """What went wrong, without the number that the system gives it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _prepare_streams() -> None:
    """Lets anything be printed: characters that stdout's encoding lacks as escapes, and to a closed stream nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
