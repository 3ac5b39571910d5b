"""Bars are for terminals; a log gets a line for each stage."""

import sys

import pytest

from flexprefill.runtime.progress import asked_stage, stage, terminal_stage


@pytest.fixture
def terminal(monkeypatch):
    """Lets a test say whether stderr is a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("flexprefill.runtime.progress.MOMENT", 0)
    return lambda yes: monkeypatch.setattr(sys.stderr, "isatty", lambda: yes, raising=False)


def shown(capsys, a_stage):
    with a_stage as advance:
        advance(1)
    return capsys.readouterr().err


def test_bars_are_drawn_in_a_terminal_alone(capsys, terminal):
    pytest.importorskip("tqdm")
    terminal(True)
    for make in (stage, terminal_stage):
        assert "counting: " in shown(capsys, make("counting", 2))
    terminal(False)
    assert shown(capsys, stage("counting", 2)) == "counting …\n"
    assert shown(capsys, terminal_stage("counting", 2)) == ""


def test_a_terminal_that_cannot_redraw_gets_a_line(capsys, terminal, monkeypatch):
    terminal(True)
    monkeypatch.setenv("TERM", "dumb")
    assert shown(capsys, stage("counting", 2)) == "counting …\n"


def test_who_asks_for_a_bar_gets_it(capsys, terminal):
    pytest.importorskip("tqdm")
    terminal(False)
    assert "counting: " in shown(capsys, asked_stage(True, "counting", 2))
    assert shown(capsys, asked_stage(False, "counting", 2)) == ""
