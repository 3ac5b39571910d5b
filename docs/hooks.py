"""What the build adds to the site: the help of the commands, and names in place of links to files outside of docs/."""

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import griffe

from flexprefill.cli import COMMANDS

DOCS = Path(__file__).resolve().parent
LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^()\s:#]+)(?:#[^()\s]*)?\)")
ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
PLACE = "<!-- the commands -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with the commands where they belong, and names in place of links to files that the site lacks."""
    folder = (DOCS / page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        return link[1] if link[1].endswith(target.name) else f"{link[1]}: `{target.relative_to(DOCS.parent)}`"

    return LINK.sub(plain, markdown).replace(PLACE, "\n\n".join(map(_command, COMMANDS)))


def _command(name: str) -> str:
    """A command's help as Markdown, by its parser."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"flexprefill {name}", add_help=False)
    module.add_arguments(parser)
    rows = [f"| {_names(action)} | {_cell(_help(parser, action))} |" for action in parser._actions]
    usage = parser.format_usage().replace("\n" + " " * len("usage: "), "\n").removeprefix("usage: ")
    table = "\n".join(["| argument | what it is |", "|---|---|", *rows])
    return f"## {name}\n\n```text\n{usage}```\n\n{_cell(module.DESCRIPTION)}\n\n{table}"


def _names(action: argparse.Action) -> str:
    value = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if action.choices is not None and action.metavar is None:
        value = " or ".join(map(str, action.choices))
    value = " ".join(value) if isinstance(value, tuple) else value
    return " ".join(f"`{part}`" for part in (", ".join(action.option_strings), value) if part)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


class PlainRoles(griffe.Extension):
    """Sphinx's roles in docstrings, such as :func:`flexprefill.search_blocks`, as the name alone."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
