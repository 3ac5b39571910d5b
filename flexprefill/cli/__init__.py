"""The command line: parses the arguments and calls the library, one module a command.

A command's module has NAME, SUMMARY and DESCRIPTION for the help, ``add_arguments(parser)``, and
``execute(arguments)``, which returns the exit code; ``COMMANDS`` lists it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from flexprefill._version import __version__
from flexprefill.cli import bench, demo, diff, inspect, view
from flexprefill.errors import FlexPrefillError

COMMANDS = (demo, inspect, diff, view, bench)
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells report them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``flexprefill`` with these arguments (the process's own if None).

    Returns:
        the exit code: the command's own, 0 if it did what was asked, 130 if it was interrupted from the keyboard,
        or 141 if whoever read its output had enough.

    Raises:
        SystemExit: with code 0 after ``--help`` and ``--version``, with code 2 after an argument that does not
            fit, and whatever else the library refuses.
    """
    parser = argparse.ArgumentParser(prog="flexprefill", description="Block-sparse prefill attention for PyTorch.")
    parser.add_argument("--version", action="version", version=f"flexprefill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = commands.add_parser(module.NAME, help=module.SUMMARY, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(parser=command, execute=module.execute)
    argv = sys.argv[1:] if argv is None else list(argv)
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
        arguments.parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code
