"""A page for the browser that shows mask files: one HTML file with everything in it, which asks for no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from flexprefill.blockmap.html import DROPPED, KEPT
from flexprefill.errors import FlexPrefillError, MaskFileError
from flexprefill.inspection.patterns import LINE_SHARE, MIN_LINE_BLOCKS, PATTERNS, known_settings
from flexprefill.plotting.difference import BOTH, ONLY_FIRST, ONLY_SECOND
from flexprefill.store import read_mask_info
from flexprefill.store.figures import RECALL_ENTRY

READS_VERSION = 2
EMBED_LIMIT = 24 * 2**20  # bytes of a mask file; base64 makes a third more of it
# in this order: each takes from window.flexprefill what those before it have put there
SCRIPTS = (
    "maskfile.js",
    "blockmap.js",
    "patterns.js",
    "heads.js",
    "drawing.js",
    "axes.js",
    "pane.js",
    "heatmap.js",
    "state.js",
    "inks.js",
    "panel.js",
    "text.js",
    "view.js",
    "address.js",
    "pointer.js",
    "gallery.js",
    "exports.js",
    "page.js",
)
# the same file has the same colour in the pictures of `flexprefill diff`
COLOURS = {"kept": KEPT, "dropped": DROPPED, "both": BOTH, "only_first": ONLY_FIRST, "only_second": ONLY_SECOND}


def write_page(
    output: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    *,
    embed_limit: int = EMBED_LIMIT,
) -> list[str]:
    """Writes a page that shows one mask file, or two beside each other.

    A file of at most ``embed_limit`` bytes goes into the page as it is. A larger one does not: the page asks for it
    to be dropped there, and reads the parts that it shows.

    Args:
        output: the page's file; one that exists is replaced.
        files: one or two mask files of format version 2.
        embed_limit: in bytes, for each file.

    Returns:
        what the page asks for, one sentence for each file that is not in it.

    Raises:
        TypeError, ValueError: ``files`` are not one or two, or one of them is ``output``.
        MaskFileError: a file is no mask file, damaged or of another format version.
        OSError: the page cannot be written.
    """
    if isinstance(files, (str, bytes, os.PathLike)) or not isinstance(files, Sequence):
        raise TypeError(f"files must be a list of file names, got {files!r}")
    if not 1 <= len(files) <= 2:
        raise ValueError(f"files must be one or two, got {len(files)}")
    output, paths = Path(output), [Path(file) for file in files]
    described, embedded, asked = [], [], []
    for slot, path in enumerate(paths):
        version = read_mask_info(path).format_version
        if version != READS_VERSION:
            raise MaskFileError(
                f"{path} has format version {version}, and the viewer reads {READS_VERSION}: "
                "save it again with load_masks and save_masks"
            )
        if output.exists() and output.samefile(path):
            raise FlexPrefillError(f"output must be another file than the masks, got {output}")
        size = path.stat().st_size
        fits = size <= embed_limit
        reason = "" if fits else _too_large(path.name, size, embed_limit)
        described.append({"name": path.name, "size": size, "embedded": fits, "reason": reason})
        if fits:
            embedded.append(_script("text/plain", base64.b64encode(path.read_bytes()).decode(), f"bytes-{slot}"))
        else:
            asked.append(reason)

    scripts = [_resource(name) for name in SCRIPTS]
    page = {
        "policy": _policy(scripts),
        "title": html.escape(" ↔ ".join(path.name for path in paths)),
        "style": _filled(_resource("page.css"), COLOURS),
        "scripts": "\n".join(_script("module", script) for script in scripts),
        "data": "\n".join([_data("files", described), _data("rule", _rule()), *embedded]),
    }
    output.write_text(_filled(_resource("page.html"), page), encoding="utf-8")
    return asked


def _rule() -> dict[str, Any]:
    """What the page has to know to read files itself: the rule of the patterns in numbers, and where recall is kept."""
    return {
        "patterns": PATTERNS,
        "line_share": LINE_SHARE,
        "min_line_blocks": MIN_LINE_BLOCKS,
        "unknown": known_settings(None).to_dict(),
        "recall_entry": RECALL_ENTRY,
    }


def _data(name: str, value: Any) -> str:
    """JSON for the page; a script's end cannot stand in it."""
    return _script("application/json", json.dumps(value).replace("<", "\\u003c"), name)


def _too_large(name: str, size: int, limit: int) -> str:
    return f"{name} has {size:,} bytes, more than the {limit:,} that are put into a page: drop the file here."


def _filled(template: str, parts: dict[str, str]) -> str:
    """The template with each {{name}} replaced; what is put in is not searched for further names."""
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def _script(kind: str, text: str, name: str | None = None) -> str:
    identity = f' id="{name}"' if name else ""
    return f'<script type="{kind}"{identity}>{text}</script>'


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: these scripts alone run, and nothing is ever loaded."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"


def _resource(name: str) -> str:
    return resources(__name__).joinpath(name).read_text(encoding="utf-8")
