import contextlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexprefill import BlockMap, PrefillConfig, cli, save_masks
from flexprefill.cli.masks import ranges
from flexprefill.inspection import compare_maps, head_similarity, summarize_heads
from flexprefill.plotting.difference import ONLY_FIRST, ONLY_SECOND

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
CONFIG = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=2, last_full_blocks=1)
COMMAND = [sys.executable, "-m", "flexprefill"]


def make_map(seed, *, batch=1, heads=3, blocks=20):
    dense = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    return BlockMap.from_dense(dense, q_len=16 * blocks, kv_len=16 * blocks, block_size=16)


def flip(block_map, batch, head, row, column):
    """The map with one block more or less."""
    dense = block_map.to_dense().clone()
    dense[batch, head, row, column] ^= True
    return BlockMap.from_dense(dense, q_len=block_map.q_len, kv_len=block_map.kv_len, block_size=block_map.block_size)


@pytest.fixture(scope="module")
def masks():
    return {0: make_map(0), 1: make_map(1), 4: make_map(4)}


@pytest.fixture(scope="module")
def files(tmp_path_factory, masks):
    """Files by name: same, one block changed in layer 1 and head 2, a layer less, another shape in layer 4."""
    folder = tmp_path_factory.mktemp("masks")
    contents = {
        "a": masks,
        "same": masks,
        "changed": masks | {1: flip(masks[1], 0, 2, 19, 3)},
        "fewer": {0: masks[0], 1: masks[1]},
        "longer": masks | {4: make_map(4, blocks=21)},
        "batch": {0: make_map(5, batch=2)},
        "wider": masks | {0: make_map(0, heads=5)},
    }
    paths = {name: folder / f"{name}.safetensors" for name in contents}
    for name, kept in contents.items():
        save_masks(paths[name], kept, config=CONFIG, metadata={"text": "random"})
    return {name: str(path) for name, path in paths.items()}


def run(capsys, *arguments):
    """The exit code and what was printed to stdout."""
    code = cli.main(arguments)
    return code, capsys.readouterr().out


def run_json(capsys, *arguments):
    code, printed = run(capsys, *arguments, "--json")
    return code, json.loads(printed)


def cells(printed, first):
    """The cells of the table's line that begins with this."""
    (line,) = [line for line in printed.splitlines() if re.match(rf"{re.escape(first)}(  |$)", line)]
    return re.split(r"  +", line)[1:]


# inspect


def test_inspect_prints_a_line_a_layer(files, masks, capsys):
    code, printed = run(capsys, "inspect", files["a"])
    assert code == 0
    assert "320 tokens in blocks of 16, 3 heads" in printed and "text: random" in printed
    for number, block_map in masks.items():
        shown = cells(printed, str(number))
        density = block_map.density()[0]
        assert shown[0] == f"{100 * density.double().mean():.1f}%"
        assert shown[1] == f"{100 * density.min():.1f}–{100 * density.max():.1f}"
        summaries = summarize_heads(block_map, config=CONFIG)
        kept = sum(summary.kept for summary in summaries)
        share = sum(summary.patterns["sink"] for summary in summaries) / kept
        assert shown[2] == f"{100 * share:.1f}"
    above = compare_maps(masks[1], masks[4]).iou.mean()
    assert cells(printed, "4")[-1] == f"{above:.2f}"


def test_inspect_prints_a_line_a_head(files, masks, capsys):
    code, printed = run(capsys, "inspect", files["a"], "--layer", "1")
    assert code == 0
    similarity = head_similarity(masks[1])[0].fill_diagonal_(0)
    for head in range(3):
        shown = cells(printed, f"head {head}")
        assert shown[0] == f"{100 * masks[1].density()[0, head]:.1f}%"
        counts = masks[1].counts()[0, head]
        assert shown[1] == f"{counts.min()}/{counts.median()}/{counts.max()}"
        assert shown[-1] == f"{similarity[head].argmax()} ({similarity[head].max():.2f})"


def test_inspect_of_one_head_keeps_its_number(files, masks, capsys):
    code, printed = run(capsys, "inspect", files["a"], "--layer", "1", "--head", "2")
    assert code == 0 and cells(printed, "head 2")[0] == f"{100 * masks[1].density()[0, 2]:.1f}%"
    assert "query tokens" in printed and "288 – 320" in printed
    code, printed = run(capsys, "inspect", files["a"], "--head", "2")
    assert [cells(printed, f"layer {layer}")[0] for layer in masks] == [
        f"{100 * block_map.density()[0, 2]:.1f}%" for block_map in masks.values()
    ]


def test_inspect_as_json_is_what_the_library_counts(files, masks, capsys):
    code, record = run_json(capsys, "inspect", files["a"])
    assert code == 0 and record["config"] == CONFIG.to_dict() and record["metadata"] == {"text": "random"}
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 4]
    for layer in record["layers"]:
        block_map = masks[layer["layer"]]
        assert layer["heads"] == [summary.to_dict() for summary in summarize_heads(block_map, config=CONFIG)]
        assert layer["similarity"] == head_similarity(block_map).tolist()
        assert (layer["q_len"], layer["block_size"], layer["shape"]) == (320, 16, [1, 3])
    assert record["layers"][0]["layer_before"] is None
    expected = {"layer": 1, "iou": compare_maps(masks[1], masks[4]).iou.tolist()}
    assert record["layers"][2]["layer_before"] == expected

    _, record = run_json(capsys, "inspect", files["a"], "--layer", "4", "--head", "1")
    (layer,) = record["layers"]
    assert layer["heads"] == [summarize_heads(masks[4], config=CONFIG)[1].to_dict()]


def test_no_command_prints_the_prompts_text(masks, capsys, tmp_path):
    path = tmp_path / "text.safetensors"
    save_masks(path, masks, tokens=["secret"] * masks[0].kv_len)
    for arguments in (["inspect"], ["inspect", "--json"], ["inspect", "--quick", "--json"], ["inspect", "--csv"]):
        assert "secret" not in run(capsys, *arguments, str(path))[1]
    assert "secret" not in run(capsys, "diff", str(path), str(path), "--json")[1]


def test_inspect_tells_batch_entries_apart(files, capsys):
    _, printed = run(capsys, "inspect", files["batch"], "--layer", "0")
    densities = make_map(5, batch=2).density()
    assert cells(printed, "batch 1, head 2")[0] == f"{100 * densities[1, 2]:.1f}%"
    _, record = run_json(capsys, "inspect", files["batch"], "--head", "1")
    assert [(head["batch"], head["head"]) for head in record["layers"][0]["heads"]] == [(0, 1), (1, 1)]


# diff


@pytest.mark.parametrize("other, code", [("a", 0), ("same", 0), ("changed", 1), ("fewer", 1), ("longer", 1)])
def test_the_exit_code_of_diff_is_the_verdict(files, capsys, other, code):
    assert run(capsys, "diff", files["a"], files[other])[0] == code
    found, record = run_json(capsys, "diff", files["a"], files[other])
    assert found == code and record["equal"] == (code == 0)
    assert run(capsys, "diff", files["a"], files[other], "--layer", "0")[0] == 0


def test_diff_prints_where_files_differ(files, masks, capsys):
    code, printed = run(capsys, "diff", files["a"], files["changed"])
    assert code == 1 and printed.endswith("the masks differ\n")
    assert cells(printed, "0")[1:] == ["0", "0", "1.0000", "1.0000", "equal"]
    assert cells(printed, "1")[-1] == "1 of 3 heads differ"
    only = "only_first" if masks[1].to_dense()[0, 2, 19, 3] else "only_second"
    _, record = run_json(capsys, "diff", files["a"], files["changed"])
    changed = [head for layer in record["layers"] for head in layer["heads"] if head["iou"] < 1]
    assert len(changed) == 1 and changed[0]["head"] == 2 and changed[0][only] == 1
    code, printed = run(capsys, "diff", files["a"], files["changed"], "--layer", "1")
    assert code == 1
    assert cells(printed, "head 1")[-1] == "equal" and cells(printed, "head 2")[-1] == "differs"
    assert run(capsys, "diff", files["a"], files["changed"], "--layer", "1", "--head", "1")[0] == 0
    code, printed = run(capsys, "diff", files["a"], files["changed"], "--head", "2")
    assert code == 1 and cells(printed, "layer 1")[-1] == "differs" and cells(printed, "layer 4")[-1] == "equal"
    assert run(capsys, "diff", files["a"], files["same"])[1].endswith("the masks are equal\n")


def test_diff_of_layers_that_cannot_be_compared_says_so(files, capsys):
    assert cells(run(capsys, "diff", files["a"], files["fewer"])[1], "4") == ["only A"]
    assert cells(run(capsys, "diff", files["fewer"], files["a"])[1], "4") == ["only B"]
    _, printed = run(capsys, "diff", files["a"], files["longer"])
    assert cells(printed, "4") == ["other shape"]
    assert "layer 4: A has 320 tokens in blocks of 16, 3 heads; B has 336 tokens in blocks of 16, 3 heads" in printed
    _, record = run_json(capsys, "diff", files["a"], files["wider"])
    assert record["layers"][0] == {"layer": 0, "status": "other shape", "equal": False}


# trouble


@pytest.mark.parametrize("command", ["inspect", "diff"])
@pytest.mark.parametrize(
    "options, message",
    [
        (["--layer", "2"], "--layer: {a} has the layers 0 … 1, 4, not 2"),
        (["--head", "3"], "--head: layer 0 of {a} has the heads 0 … 2, not 3"),
        (["--layer", "-1"], "--layer: must be at least 0"),
        (["--head", "x"], "--head: must be a whole number, got 'x'"),
        (["--png", "map.jpg"], "--png: must end in .png, got 'map.jpg'"),
        (["--png", "map.png", "--json"], "--json: not allowed with argument --png"),
    ],
)
def test_bad_choices_end_with_code_2(files, capsys, command, options, message):
    with pytest.raises(SystemExit) as raised:
        cli.main([command, *[files["a"]] * (2 if command == "diff" else 1), *options])
    assert raised.value.code == 2
    assert message.format(a=files["a"]) in capsys.readouterr().err


def test_files_that_are_none_end_with_code_2(files, capsys, tmp_path):
    (tmp_path / "text").write_text("no masks")
    for arguments in (["inspect", "nowhere"], ["diff", files["a"], "nowhere"], ["inspect", str(tmp_path / "text")]):
        with pytest.raises(SystemExit) as raised:
            cli.main(arguments)
        assert raised.value.code == 2
        assert arguments[-1] in capsys.readouterr().err


def test_numbers_in_a_row_are_told_as_a_range():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 … 2, 5, 7 … 8"


# pictures


@needs_matplotlib
@pytest.mark.parametrize("options", [[], ["--layer", "1"], ["--head", "1"], ["--layer", "4", "--head", "1"]])
def test_pictures_are_drawn(files, capsys, tmp_path, options):
    for code, arguments in ((0, ["inspect", files["a"]]), (1, ["diff", files["a"], files["wider"]])):
        picture = tmp_path / f"{arguments[0]}.png"
        if options:
            code = 0  # these layers and heads are equal
        assert run(capsys, *arguments, *options, "--png", str(picture)) == (code, f"picture  {picture}\n")
        assert picture.read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_a_difference_is_drawn_at_its_place(files, masks, capsys, tmp_path):
    from matplotlib import image
    from matplotlib.colors import to_rgb

    from flexprefill.plotting.canvas import LEFT, TOP
    from flexprefill.plotting.difference import ONLY_FIRST, ONLY_SECOND

    picture = tmp_path / "diff.png"
    code, _ = run(capsys, "diff", files["a"], files["changed"], "--layer", "1", "--head", "2", "--png", str(picture))
    cell = round(1024 / 20)
    found = image.imread(picture)[TOP + 19 * cell + cell // 2, LEFT + 3 * cell + cell // 2, :3]
    expected = ONLY_FIRST if masks[1].to_dense()[0, 2, 19, 3] else ONLY_SECOND
    assert code == 1 and found == pytest.approx(to_rgb(expected), abs=0.01)


@needs_matplotlib
def test_layers_of_several_lengths_are_not_drawn_together(files, capsys, tmp_path):
    with pytest.raises(SystemExit) as raised:
        cli.main(["inspect", files["longer"], "--head", "1", "--png", str(tmp_path / "map.png")])
    assert raised.value.code == 2
    assert "--layer: the layers of" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# terminals and pipes


def in_terminal(arguments, *, own_process=False, **environment):
    """What a terminal of 80 columns is sent, by this process unless by one of its own."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, text in {"TERM": "xterm", "COLUMNS": "80", **environment}.items():
            patch.setenv(name, text)
        sent = pool.submit(read_all, ours)
        with open(theirs, "w", encoding="utf-8") as terminal:
            if own_process:
                subprocess.run([*COMMAND, *arguments], stdout=terminal)
            else:
                patch.setattr(sys, "stdout", terminal)
                cli.main(arguments)
        return sent.result()


def read_all(terminal):
    """What is sent until the other side is closed."""
    sent = b""
    with contextlib.suppress(OSError):  # how Linux says that it is
        while part := os.read(terminal, 1 << 16):
            sent += part
    os.close(terminal)
    return sent.decode()


ESCAPE = re.compile(r"\x1b\[[\d;]*m")
COLOUR = re.compile(r"\x1b\[[\d;]*3\d[\d;]*m")


@pytest.mark.slow
def test_a_terminal_gets_colour_unless_it_has_none(files):
    pytest.importorskip("rich")
    arguments = ["diff", files["a"], files["changed"]]
    coloured = in_terminal(arguments, own_process=True)
    assert COLOUR.search(coloured)
    plain = in_terminal(arguments, NO_COLOR="1")
    assert not COLOUR.search(plain)
    dumb = in_terminal(arguments, TERM="dumb")
    assert "\x1b" not in dumb
    # the words say what the colour does
    for sent in (coloured, plain, dumb):
        assert "1 of 3 heads differ" in re.sub(r"\x1b\[[\d;]*m", "", sent)


def test_files_have_the_colours_of_pictures_and_viewer(files):
    pytest.importorskip("rich")
    sent = in_terminal(["diff", files["a"], files["changed"]], COLORTERM="truecolor", TERM="xterm-256color")
    for name, colour in (("A", ONLY_FIRST), ("B", ONLY_SECOND)):
        channels = ";".join(map(str, bytes.fromhex(colour[1:])))
        assert f"\x1b[1;38;2;{channels}m{name}\x1b[0m" in sent


def test_a_table_fits_in_80_columns(files, capsys):
    pytest.importorskip("rich")
    for arguments in (["inspect", files["a"]], ["inspect", files["a"], "--layer", "1"]):
        sent = re.sub(r"\x1b\[[\d;]*m", "", in_terminal(arguments)).splitlines()
        (row,) = [line.split() for line in sent if re.match(r"(0|head 0) +\d", line)]
        assert row in [line.split() for line in run(capsys, *arguments)[1].splitlines()]


@pytest.mark.slow
def test_a_narrow_terminal_gets_several_tables_and_whole_words(files, capsys):
    pytest.importorskip("rich")
    for arguments in (
        ["inspect", files["a"]],
        ["inspect", files["a"], "--layer", "1"],
        ["inspect", files["a"], "--layer", "1", "--head", "1"],
        ["diff", files["a"], files["longer"]],
    ):
        plain = run(capsys, *arguments)[1]
        for width in (40, 60):
            sent = ESCAPE.sub("", in_terminal(arguments, COLUMNS=str(width))).replace("\r", "")
            lines = [line for line in sent.splitlines() if ".safetensors" not in line]  # no path is broken
            assert max(map(len, lines)) <= width
            assert {word for line in lines for word in line.split()} <= set(plain.split())
            figures = [word for word in plain.split() if re.search(r"\d", word) and ".safetensors" not in word]
            assert set(figures) <= set(sent.split())


def test_pipes_and_terminals_without_rich_get_plain_text(files, capsys, monkeypatch):
    piped = subprocess.run(
        [*COMMAND, "diff", files["a"], files["changed"]],
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1"},
    )
    assert piped.returncode == 1 and "\x1b" not in piped.stdout
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert run(capsys, "diff", files["a"], files["changed"]) == (1, piped.stdout)


@needs_matplotlib
def test_long_work_shows_a_bar_in_a_terminal_alone(files, capsys, monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    monkeypatch.setenv("TERM", "xterm")
    inspect, diff = ["inspect", files["a"]], ["diff", files["a"], files["same"]]
    png = ["--png", str(tmp_path / "map.png")]
    commands = [
        (inspect, "inspecting layers: "),
        ([*inspect, *png], "reading layers: "),
        ([*inspect, "--head", "1", *png], "reading layers: "),
        (diff, "comparing layers: "),
        ([*diff, "--head", "1", *png], "reading layers: "),
    ]

    def shown(arguments):
        assert cli.main(arguments) == 0
        return capsys.readouterr().err

    monkeypatch.setattr("flexprefill.runtime.progress.MOMENT", 0)
    assert [shown(arguments) for arguments, _ in commands] == [""] * len(commands)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for arguments, bar in commands:
        sent = shown(arguments)
        assert bar in sent and "/3 [" in sent
        assert sent.endswith("\r")  # what comes next is written over the bar
    monkeypatch.setenv("TERM", "dumb")
    assert shown(inspect) == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("flexprefill.runtime.progress.MOMENT", 60)
    assert shown(inspect).strip() == ""


def test_what_a_file_says_cannot_move_the_cursor_or_stop_the_print(masks, capsys, tmp_path):
    path = tmp_path / "m\udcff\x1b"  # a name that is no UTF-8, and has an escape
    said = {"red": "\x1b[31mred", "lines": "one\nlayer 99: two", "lone": "\ud800", "α": "plain × text"}
    save_masks(path, masks, metadata=said)
    for arguments in (["inspect", str(path)], ["diff", str(path), str(path)]):
        code, printed = run(capsys, *arguments)
        assert code == 0 and "m\\udcff\\x1b" in printed and "\x1b" not in printed
    printed = run(capsys, "inspect", str(path))[1]
    for line in ("red: \\x1b[31mred", "lines: one\\nlayer 99: two", "lone: \\ud800", "α: plain × text"):
        assert line in printed.splitlines()
    assert run_json(capsys, "inspect", str(path))[1]["metadata"] == said


def test_a_terminal_of_few_characters_gets_escapes(files):
    arguments = [*COMMAND, "inspect", files["a"]]
    printed = subprocess.run(arguments, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert printed.returncode == 0 and b"\\u2013" in printed.stdout


@pytest.mark.parametrize(
    "other, code, closed",
    [("same", 0, ">&- 2>&-"), ("changed", 1, ">&-"), ("nowhere", 2, "2>&-")],
)
def test_the_exit_code_needs_no_one_to_print_to(files, other, code, closed):
    words = [*COMMAND, "diff", files["a"], files.get(other, other)]
    assert subprocess.run(f"{shlex.join(words)} {closed}", shell=True, capture_output=True).returncode == code


def test_a_failure_that_nobody_foresaw_is_no_difference(files, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("flexprefill.cli.diff.compare_maps", fail)
    assert cli.main(["diff", files["a"], files["a"]]) == 2
    assert "RuntimeError: unforeseen" in capsys.readouterr().err


def test_a_reader_that_stops_is_no_error(files):
    with subprocess.Popen([*COMMAND, "inspect", files["a"]], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == cli.BROKEN_PIPE


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    first_words = [line.split()[0] for line in printed.splitlines() if line.startswith("    ") and line.strip()]
    assert set(cli.COMMANDS) <= set(first_words)
    with pytest.raises(SystemExit) as raised:
        cli.main([])
    assert raised.value.code == 2
    assert capsys.readouterr().out == printed


def test_python_runs_the_package_as_the_command(files, capsys):
    for arguments in (["diff", files["a"], files["changed"]], ["--version"], []):
        ran = subprocess.run([sys.executable, "-m", "flexprefill", *arguments], capture_output=True, text=True)
        try:
            code = cli.main(arguments)
        except SystemExit as raised:
            code = raised.code
        assert (ran.returncode, ran.stdout) == (code, capsys.readouterr().out)
