"""What the pages name is there: commands and their options, scripts, files and headings."""

import importlib
import re
import shlex

import pytest
from support.pages import INLINE, LINK, PAGES, ROOT, commands_of, name_of

from flexprefill import cli

HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
EXTERNAL = ("http://", "https://", "mailto:")


def each_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=name_of)(function)


def anchors_of(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = HEADING.findall(page.read_text("utf-8"))
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).lower() for title in titles]
    return {re.sub(r"[^\w\s-]", "", title).strip().replace(" ", "-") for title in plain}


@each_page
def test_commands_take_the_arguments_shown(page, monkeypatch):
    for module, _ in cli.COMMANDS.values():
        monkeypatch.setattr(importlib.import_module(module), "execute", lambda arguments: 0)
    for line in commands_of(page):
        for command in re.split(r"&&|\|", line):
            words = shlex.split(command, comments=True)
            if words[:1] == ["flexprefill"] and not {"--help", "--version"} & set(words):
                try:
                    assert cli.main(words[1:]) == 0
                except SystemExit:
                    pytest.fail(f"{command.strip()!r} is refused")


@each_page
def test_commands_in_the_text_are_known(page):
    known = {*cli.COMMANDS, "COMMAND"}
    for code in INLINE.findall(page.read_text("utf-8")):
        if found := re.match(r"flexprefill (\w+)", code):
            assert found[1] in known, code


@each_page
def test_scripts_take_the_options_shown(page):
    for line in commands_of(page):
        if found := re.search(r"python (?:-m \S+ .*?)?((?:examples|tests)/\S+\.py)(.*)", line):
            script = (ROOT / found[1]).read_text("utf-8")
            for option in re.findall(r"\s(--[\w-]+)", found[2].partition("#")[0]):
                assert f'"{option}"' in script, line


@each_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith(EXTERNAL):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), link


def test_the_page_of_the_commands_lists_each_with_its_line():
    rows = re.findall(r"^\| `flexprefill (\w+)` \| (.+) \|$", (ROOT / "docs/reference/cli.md").read_text("utf-8"), re.M)
    assert rows == [(name, summary) for name, (_, summary) in cli.COMMANDS.items()]
