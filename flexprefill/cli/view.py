"""flexprefill view: mask files as one HTML page."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from flexprefill.cli.masks import read_info
from flexprefill.viewer import EMBED_LIMIT, write_page

DESCRIPTION = (
    "Writes one HTML page that shows a mask file, or two beside each other, and opens it in the browser. "
    "Two files open at the head that differs most. The page needs no server and no network. "
    "It holds the files, and their prompt's text if they have it. "
    f"A file of more than {EMBED_LIMIT:,} bytes is not put into the page: the page asks for it to be dropped there, "
    "and reads the parts that it shows."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a mask file, as save_masks writes it")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="a mask file to compare it with")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PAGE",
        help="the page, replaced if it exists (default: FILE's name with .html, in this folder)",
    )
    parser.add_argument("--no-open", dest="open", action="store_false", help="write the page and do not open it")


def execute(arguments: argparse.Namespace) -> int:
    """Writes the page that the arguments ask for, says where it is, and opens it; returns the exit code.

    Raises:
        FlexPrefillError, OSError: as :func:`flexprefill.viewer.write_page`.
    """
    files = [file for file in (arguments.file, arguments.other) if file is not None]
    private = [file for file in files if read_info(file).tokens]
    output = arguments.output or Path(f"{arguments.file.stem}.html")
    requests = write_page(output, files)
    print(f"wrote {output} ({output.stat().st_size:,} bytes)")
    for file in private:
        print(f"{file} holds its prompt's text: what shows the text is as private as the prompt")
    for request in requests:
        print(request)
    if arguments.open and not webbrowser.open(output.resolve().as_uri()):
        print(f"no browser was found: open {output} in one")
    return 0
