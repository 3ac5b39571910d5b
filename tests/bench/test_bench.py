import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

import flexprefill
from flexprefill import FlexPrefillError, PrefillConfig, cli
from flexprefill.bench import measure
from flexprefill.bench.contestants import CONTESTANTS, DENSE, PART, Contestant
from flexprefill.bench.inputs import make_qkv
from flexprefill.blockmap.html import KEPT
from flexprefill.plotting import TimeLine, plot_times
from flexprefill.plotting.times import spread

SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "32")


def bench(folder, *arguments, device="cpu", code=0):
    """Runs the command and returns what bench.json holds."""
    assert cli.main(["bench", "--device", device, "--output", str(folder), *arguments]) == code
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture
def contestants(monkeypatch):
    """Only those that a test puts in: a dictionary for the CPU."""
    fakes = {}
    monkeypatch.setitem(CONTESTANTS, "cpu", fakes)
    return fakes


def fake(call, kind=PART, name="fake"):
    return Contestant(name, kind, lambda case: lambda: call(case))


def count_pixels(picture, colour):
    """How many pixels of an array [height, width, 3 or 4] have a colour."""
    from matplotlib.colors import to_rgb

    distance = torch.from_numpy(picture)[..., :3] - torch.tensor(to_rgb(colour))
    return int((distance.abs().amax(-1) < 0.01).sum())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one run of everything that a CPU has."""
    folder = tmp_path_factory.mktemp("bench") / "new" / "folder"
    arguments = ["--lengths", "1000", "--densities", "0.8", "--repeats", "4", "--dtype", "bfloat16", *SMALL]
    bench(folder, *arguments)
    return folder


def test_everything_is_measured_and_written_down(finished):
    record = json.loads((finished / "bench.json").read_text())
    assert record["command"].startswith("flexprefill bench --device cpu --output ")
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["flexprefill"] == flexprefill.__version__
    assert record["settings"]["heads"] == 4 and record["settings"]["dtype"] == "bfloat16"
    assert record["settings"]["rule"]["window_blocks"] == 1 and "alpha" not in record["settings"]["rule"]
    assert record["rates"] is None and "NVIDIA" in record["no_floors"]
    (run,) = record["runs"]
    assert run["absent"] == {} and list(run["contestants"]) == list(CONTESTANTS["cpu"])
    for result in run["contestants"].values():
        repeats = result["repeats_ms"]
        assert len(repeats) == 4 and all(ms > 0 for ms in repeats)
        assert (result["min_ms"], result["max_ms"]) == (min(repeats), max(repeats))
        assert result["median_ms"] == pytest.approx(sum(sorted(repeats)[1:3]) / 2)
        assert result["timing"] == "wall clock" and result["note"] is None and result["floor_ms"] is None


def test_the_density_is_that_of_the_config_on_these_inputs(finished):
    (run,) = json.loads((finished / "bench.json").read_text())["runs"]
    query, key, _ = make_qkv(1000, 4, 2, 32, torch.bfloat16, torch.device("cpu"))
    density = flexprefill.search_blocks(query, key, PrefillConfig(**run["config"])).density().mean().item()
    assert run["density"] == pytest.approx(density)
    assert run["asked_density"] == 0.8 and abs(density - 0.8) < 0.02


def test_the_picture_is_drawn(finished):
    image = pytest.importorskip("matplotlib.image")
    assert count_pixels(image.imread(finished / "bench.png"), KEPT) > 50  # one point of prefill_attention


def test_what_cannot_run_is_absent_with_the_reason(contestants, tmp_path, capsys):
    calls = []

    def breaks_later(case):
        calls.append(case)
        if len(calls) == 4:
            raise RuntimeError("broke\n\nin the fourth call\nand more")

    def refuse(case):
        raise FlexPrefillError("needs another package")

    def too_large(case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def no_backend(case):
        warnings.warn("cuDNN attention has been runtime disabled. (Triggered internally at a.cpp)", stacklevel=1)
        warnings.warn("head_dim should be no more than 128 (Triggered internally at b.cpp:7.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    contestants["fine"] = fake(lambda case: None)
    contestants["refuses"] = Contestant("refuses", PART, refuse)
    contestants["large"] = fake(too_large, name="large one")
    contestants["later"] = fake(breaks_later)
    contestants["backend"] = fake(no_backend, DENSE)
    (run,) = bench(tmp_path, "--lengths", "256", "--repeats", "9")["runs"]
    assert list(run["contestants"]) == ["fine"] and len(run["contestants"]["fine"]["repeats_ms"]) == 9
    assert run["absent"] == {
        "refuses": "needs another package",
        "large": "out of memory",
        "later": "RuntimeError: broke in the fourth call",
        "backend": "RuntimeError: No available kernel. Aborting execution. head_dim should be no more than 128",
    }
    printed = capsys.readouterr().out
    assert re.search(r"^large one +–$", printed, re.MULTILINE)
    assert "– not measured\n  refuses: needs another package\n  large one: out of memory" in printed


def test_inputs_that_do_not_fit_end_a_length_and_not_the_run(contestants, tmp_path, monkeypatch, capsys):
    def make(length, *sizes):
        if length == 512:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make_qkv(length, *sizes)

    monkeypatch.setattr(measure, "make_qkv", make)
    contestants["fine"] = fake(lambda case: None)
    first, second, third = bench(tmp_path, "--lengths", "256,512,384", "--repeats", "1", *SMALL)["runs"]
    assert "fine" in first["contestants"] and "fine" in third["contestants"]
    assert second["density"] is None and second["absent"] == {"fine": "no inputs of this length: out of memory"}
    assert "fake (512): no inputs of this length: out of memory" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_lengths_it_has_done(contestants, tmp_path, capsys):
    def interrupted(case):
        if case.length == 384:
            raise KeyboardInterrupt

    contestants["fine"] = fake(interrupted)
    record = bench(tmp_path, "--lengths", "256,384,512", "--repeats", "2", *SMALL, code=130)
    assert [run["length"] for run in record["runs"]] == [256]
    printed = capsys.readouterr()
    assert "interrupted" in printed.err and re.search(r"^fake +\d", printed.out, re.MULTILINE)
    assert os.listdir(tmp_path) and not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_without_matplotlib_the_picture_is_skipped(contestants, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    contestants["fine"] = fake(lambda case: None)
    bench(tmp_path, "--lengths", "256", "--repeats", "1", *SMALL)
    assert "picture  skipped: drawing needs matplotlib: pip install 'flexprefill[viz]'" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["bench.json"]


def test_only_the_chosen_are_measured_in_the_tables_order(tmp_path):
    (run,) = bench(tmp_path, "--lengths", "256", "--only", "sdpa, search", "--repeats", "1", *SMALL)["runs"]
    assert list(run["contestants"]) == ["search", "sdpa"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--only", "search,speed"],
            "--only: must be of search, lists, lists-buffers, attention, prefill-attention, sdpa, flex-dense",
        ),
        (["--only", "search,speed"], "on cpu, got 'speed'"),
        (["--lengths", "64"], "--lengths: must be at least 128 and below 2**31, got 64"),
        (["--lengths", "256,many"], "--lengths: must be a whole number, got 'many'"),
        (["--lengths", "256,512,256"], "--lengths: must name each length once, got 256,512,256"),
        (["--lengths", "256,512", "--densities", "0.1"], "--densities: must be one for each of 2 lengths, got 1"),
        (["--densities", "0.1,2"], "--densities: must be a number above 0 and at most 1, got '2'"),
        (["--densities", "nan"], "--densities: must be a number above 0 and at most 1, got 'nan'"),
        (["--heads", "6"], "--heads: must be a multiple of the 4 key heads, got 6"),
        (["--head-dim", "20"], "--head-dim: must be a multiple of 8 from 16 to 256, got 20"),
        (["--dtype", "float64"], "--dtype: must be float16, bfloat16, float32, got 'float64'"),
        (["--repeats", "0"], "--repeats: must be at least 1"),
        (["--sink-blocks", "-1"], "--sink-blocks: must be at least 0"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there"),
    ],
)
def test_bad_arguments_end_with_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", *([] if "--device" in arguments else ["--device", "cpu"]), *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_is_done_if_nothing_is_said(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "4096,8192,16384,32768,65536,131072,262144 on cuda; 1024,2048,4096,8192 on cpu" in printed
    assert "(default: 32 on cuda; 4 on cpu)" in printed and "theoretical" in printed


def test_the_command_line_loads_neither_triton_nor_matplotlib():
    code = "import sys, flexprefill.cli; print([name for name in ('triton', 'matplotlib') if name in sys.modules])"
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


@pytest.mark.gpu
def test_every_contestant_of_a_gpu_is_measured_or_says_why_not(tmp_path):
    record = bench(tmp_path, "--lengths", "4096", "--repeats", "3", device="cuda")
    (run,) = record["runs"]
    assert set(run["contestants"]) | set(run["absent"]) == set(CONTESTANTS["cuda"])
    ours = {"pooling", "scoring", "search", "lists", "attention-triton", "prefill-attention", "flex-dense"}
    assert ours <= set(run["contestants"]), run["absent"]
    assert {run["contestants"][name]["timing"] for name in ours} == {"graph of 10"}
    assert all(why for why in run["absent"].values())
    scoring = run["contestants"]["scoring"]
    assert record["no_floors"] or 0 < scoring["reached"] < 1
    whole = run["contestants"]["prefill-attention"]
    # a single call waits for the host, which calls in a graph do not
    assert min(whole["single_ms"]) > whole["min_ms"] and not scoring["single_ms"]
    assert 0 < min(whole["row_ms"]) < max(whole["single_ms"]) and not scoring["row_ms"]
    assert record["no_floors"] or 0 < whole["reached"] < 1


def test_each_line_has_its_colour(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    times = {4096: 1.0, 8192: 3.0, 16384: 9.0}
    counts = []
    for kind in ("whole", "dense"):
        plot_times([TimeLine(kind, kind, times)], tmp_path / f"{kind}.png", title="a title")
        counts.append(count_pixels(image.imread(tmp_path / f"{kind}.png"), KEPT))
    assert counts[0] > 5000 and counts[1] == 0


def test_pictures_of_few_points_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [TimeLine("a", "part", {4096: 1.0}), TimeLine("b", "dense", {4096: 1.0})]
    plot_times(lines, tmp_path / "one.png", title="")
    assert (tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="lines must be at least one"):
        plot_times([], tmp_path / "none.png", title="")
    with pytest.raises(ValueError, match="path must end in the kind of picture"):
        plot_times(lines, tmp_path / "none", title="")


@pytest.mark.parametrize(
    "positions, expected",
    [
        ([0.0, 50.0], [0.0, 50.0]),
        ([50.0, 52.0], [46.0, 56.0]),
        ([52.0, 50.0], [56.0, 46.0]),
        ([1.0, 2.0, 15.0], [0.0, 10.0, 20.0]),
        ([99.0, 99.0], [90.0, 100.0]),
        ([5.0] * 21, [5.0 * i for i in range(21)]),
    ],
)
def test_labels_are_moved_apart(positions, expected):
    assert spread(positions, 10, 0, 100) == pytest.approx(expected)
