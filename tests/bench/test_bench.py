import json
import os
import re
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import flexprefill
from flexprefill import BlockMap, FlexPrefillError, PrefillConfig, cli
from flexprefill.bench import floors, inputs, measure, report, timing
from flexprefill.bench.contestants import CONTESTANTS, DENSE, PART, WHOLE, Contestant
from flexprefill.bench.inputs import Case, make_case, make_qkv
from flexprefill.bench.measure import Result, Run
from flexprefill.bench.settings import DENSITIES, default_density
from flexprefill.bench.timing import Watch
from flexprefill.plotting import KEPT, TimeLine, plot_times, spread

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


# the density


RULE = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=0)


@pytest.fixture
def searches(monkeypatch):
    """The configs that were searched."""
    seen = []

    def search(query, key, config):
        seen.append(config)
        return flexprefill.search_blocks(query, key, config)

    monkeypatch.setattr(inputs, "search_blocks", search)
    return seen


@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_alpha_is_found_for_a_density(density, searches):
    qkv = make_qkv(1000, 2, 1, 32, torch.float32, torch.device("cpu"))
    case = make_case(qkv, density, RULE)
    assert case.block_map.density().mean().item() == pytest.approx(density, abs=0.01)
    assert case.block_map == flexprefill.search_blocks(case.query, case.key, case.config)
    assert replace(case.config, alpha=RULE.alpha) == RULE and len(searches) <= 20


def test_the_nearest_map_is_taken_where_none_is_close(searches):
    # two blocks a side, of which the one off the diagonal is open: densities are 2/3 and 1
    ones = torch.ones(1, 1, 16, 32)
    qkv = torch.cat([ones, ones], 2), torch.cat([-ones, ones], 2), torch.cat([ones, ones], 2)
    settings = replace(RULE, sink_blocks=0)
    assert make_case(qkv, 0.7, settings).block_map.density().item() == pytest.approx(2 / 3)
    assert make_case(qkv, 0.97, settings).block_map.density().item() == 1
    assert len(searches) <= 40


def test_a_density_below_what_is_always_kept_is_not_bisected(searches):
    qkv = make_qkv(1000, 2, 1, 32, torch.float32, torch.device("cpu"))
    case = make_case(qkv, 0.1, replace(RULE, window_blocks=20))
    assert case.config.alpha == 1 and len(searches) == 1


def test_densities_between_the_known_are_straight_in_log_log():
    assert default_density("cuda", 4096) == 0.46 and default_density("cuda", 262144) == 0.017
    assert default_density("cuda", 2**12.5) == pytest.approx((0.46 * 0.25) ** 0.5)
    assert default_density("cuda", 1000) == 0.46 and default_density("cuda", 10**6) == 0.017
    assert {default_density("cpu", length) for length in (128, 3000, 10**6)} == {0.1}
    assert list(DENSITIES["cuda"]) == [4096 * 2**i for i in range(7)]


# the timing


def test_calls_take_turns_and_long_ones_stop_early():
    order = []

    def watch(name):
        return Watch("made up", print, lambda: order.append(name) or float(len(order)))

    times, failed = timing.take_turns({"a": watch("a"), "b": watch("b")}, {"a": 3, "b": 1}, lambda steps: None)
    assert order == ["a", "b", "a", "a"] and failed == {}
    assert times == {"a": [1.0, 3.0, 4.0], "b": [2.0]}


@pytest.mark.parametrize("ms, calls, expected", [(0.0, 1, 20), (1, 10, 20), (500, 1, 6), (50, 10, 6), (1700, 1, 3)])
def test_long_calls_are_repeated_less(ms, calls, expected):
    assert timing.repeats_within_budget(20, Watch("made up", print, float, calls), ms) == expected
    assert timing.repeats_within_budget(2, Watch("made up", print, float, calls), ms) == 2


@pytest.mark.gpu
def test_a_graph_times_one_call():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    device = torch.device("cuda")
    graph, events = (timing.make_watch(lambda: a @ a, device, graph=graph) for graph in (True, False))
    assert (graph.timing, graph.calls, graph.note) == ("graph of 10", 10, None)
    assert (events.timing, events.calls, events.note) == ("events", 1, None)
    medians = [sorted(watch.measure() for _ in range(9))[4] for watch in (graph, events)]
    assert medians[0] == pytest.approx(medians[1], rel=0.3)


@pytest.mark.gpu
def test_a_graphs_inputs_outlive_its_capture():
    def watch_of_own_input():
        a = torch.randn(64, 64, device="cuda")
        return weakref.ref(a), timing.make_watch(lambda: a @ a, torch.device("cuda"), graph=True)

    kept, watch = watch_of_own_input()
    assert watch.timing == "graph of 10" and kept() is not None


@pytest.mark.gpu
def test_what_waits_for_the_device_is_timed_eagerly():
    a = torch.randn(64, 64, device="cuda")
    watch = timing.make_watch(lambda: (a @ a).sum().item(), torch.device("cuda"), graph=True)
    assert watch.timing == "eager" and "synchroniz" in watch.note and watch.measure() > 0
    assert torch.cuda.get_sync_debug_mode() == 0
    assert timing.make_watch(lambda: a @ a, torch.device("cuda"), graph=True).timing == "graph of 10"
    asked_for = timing.make_watch(lambda: a @ a, torch.device("cuda"), graph=True, eager=True)
    assert (asked_for.timing, asked_for.note) == ("eager", None) and asked_for.measure() > 0


# alone: in torch 2.11 the default generator stays in a capture that was broken off
BROKEN_CAPTURE = """
import torch
from flexprefill.bench import timing

a, device = torch.randn(64, 64, device="cuda"), torch.device("cuda")

def call():
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return a @ a

before = torch.cuda.current_stream()
watch = timing.make_watch(call, device, graph=True)
assert watch.timing == "eager" and watch.note, watch
assert torch.cuda.current_stream() == before
assert watch.measure() > 0
torch.cuda.empty_cache()
after = timing.make_watch(lambda: a @ a, device, graph=True)
assert after.timing == "graph of 10", after
assert after.measure() > 0
"""


@pytest.mark.gpu
def test_a_capture_that_breaks_off_leaves_the_device_usable():
    result = subprocess.run([sys.executable, "-c", BROKEN_CAPTURE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


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


# the floors

MACHINE = floors.Machine(matrix_flops=1e12, exponentials=1e9, bytes=1e10, cache_bytes=1000)


def test_the_slowest_of_a_works_rates_is_its_floor():
    assert floors.floor_of(floors.Work(2e9, 1e6, 1e7), MACHINE) == floors.Floor(2.0, "matrix")
    assert floors.floor_of(floors.Work(2e9, 3e6, 1e7), MACHINE) == floors.Floor(3.0, "exponentials")
    assert floors.floor_of(floors.Work(0.0, 0.0, 4e7), MACHINE) == floors.Floor(4.0, "bytes")


def test_bytes_that_the_cache_holds_bound_nothing():
    assert floors.floor_of(floors.Work(0.0, 0.0, 1000), MACHINE) is None
    assert floors.floor_of(floors.Work(0.0, 0.0, 1001), MACHINE).bound == "bytes"


def test_work_without_a_known_matrix_rate_has_no_floor():
    assert floors.floor_of(floors.Work(None, 1e6, 1e7), MACHINE) is None


def four_blocks(dtype):
    """4 blocks of 128, 4 query and 2 key heads, D 64; each row keeps its first block and the diagonal."""
    qkv = make_qkv(512, 4, 2, 64, dtype, torch.device("cpu"))
    config = PrefillConfig(alpha=1.0, sink_blocks=1, window_blocks=1, last_full_blocks=0)
    kept = torch.eye(4, dtype=torch.bool)
    kept[:, 0] = True
    block_map = BlockMap.from_dense(kept.expand(1, 4, 4, 4), q_len=512, kv_len=512, block_size=128)
    return Case(*qkv, config, block_map)


def test_each_parts_work_is_counted():
    case = four_blocks(torch.bfloat16)
    means = 2 * 4 * 64 * 2  # key heads, blocks, D, bytes
    words = 4 * 4 * 1 * 4
    assert floors.pooling_work(case) == floors.Work(0, 0, 2 * 512 * 64 * 2 + means)
    # the first two rows keep all whatever the scores; the others see 3 and 4 blocks, in each of 4 heads
    pairs = 4 * (3 + 4)
    query = 4 * 512 * 64 * 2
    assert floors.scoring_work(case) == floors.Work(2 * 64 * 128 * pairs, 128 * pairs, query / 2 + means + words)
    assert floors.lists_work(case) == floors.Work(0, 0, words + 2 * 4 * (4 * 4 * 4 + 4 * 4))
    traffic = 2 * query + 2 * (2 * 512 * 64 * 2)
    kept, causal = (4 * n * 128 * 128 for n in (1 + 2 + 2 + 2, 1 + 2 + 3 + 4))
    assert floors.sparse_attention_work(case) == floors.Work(4 * 64 * kept, kept, traffic)
    assert floors.dense_attention_work(case) == floors.Work(4 * 64 * causal, causal, traffic)


def test_float32_has_no_matrix_floor():
    case = four_blocks(torch.float32)
    assert floors.scoring_work(case).matrix_flops is None and floors.dense_attention_work(case).matrix_flops is None
    assert floors.pooling_work(case).matrix_flops == 0


def make_card(monkeypatch, told, capability=(9, 0)):
    card = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    driver = SimpleNamespace(active=SimpleNamespace(utils=SimpleNamespace(get_device_properties=lambda index: told)))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=driver))


def test_rates_follow_from_what_the_driver_tells(monkeypatch):
    make_card(monkeypatch, {"sm_clock_rate": 1_980_000, "mem_clock_rate": 3_201_000, "mem_bus_width": 6144})
    machine = floors.read_machine(torch.device("cuda:0"))
    assert machine.matrix_flops == pytest.approx(1070.5e12, rel=1e-3)
    assert machine.exponentials == pytest.approx(4.18e12, rel=1e-3)
    assert machine.bytes == pytest.approx(4.917e12, rel=1e-3)
    assert machine.cache_bytes == 50 * 2**20


@pytest.mark.parametrize(
    "told, capability, message",
    [
        ({"sm_clock_rate": 0, "mem_clock_rate": 1, "mem_bus_width": 1}, (9, 0), "the driver does not tell its clocks"),
        ({}, (9, 0), "the driver does not tell its clocks: 'sm_clock_rate'"),
        ({}, (7, 5), "compute capability 7.5 are not known"),
    ],
)
def test_without_rates_the_reason_is_said(monkeypatch, told, capability, message):
    make_card(monkeypatch, told, capability)
    with pytest.raises(FlexPrefillError, match=message):
        floors.read_machine(torch.device("cuda:0"))


# tables and pictures


def result(name, kind, ms, *, note=None, floor=(None, None, None)):
    series = [ms * share for share in (0.5, 0.9, 1.0, 1.1, 3.0)]
    timed = "eager" if note else "graph of 10"
    return Result(name, kind, timed, note, ms, min(series), max(series), series, *floor)


def test_the_tables_say_what_was_measured():
    names = {"scoring": "scoring", "whole": "prefill_attention", "slow": "SDPA", "fast": "FlashAttention-4"}
    short = {
        "scoring": result("scoring", PART, 0.0123, floor=(0.0061, "exponentials", 0.4959)),
        "whole": result("prefill_attention", WHOLE, 2.0),
        "slow": result("SDPA", DENSE, 9.0),
        "fast": result("FlashAttention-4", DENSE, 5.0, note="it waits"),
    }
    long = {"whole": short["whole"], "slow": result("SDPA", DENSE, 1234.5)}
    runs = [
        Run(4096, 0.5, 0.461, {"alpha": 0.5}, short, {}),
        Run(262144, 0.1, 0.0171, {"alpha": 0.5}, long, {"scoring": "out of memory", "fast": "out of memory"}),
    ]
    text = report.tables(runs, names, None)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    cells = {line[: report.NAME_WIDTH].strip(): line[report.NAME_WIDTH :].split() for line in text.splitlines()}
    assert cells["density"] == ["46.1", "%", "1.7", "%"]
    assert cells["FlashAttention-4"] == ["5.00", "±10%*", "–"]
    assert cells["SDPA"] == ["9.00", "±10%", "1,234", "±10%"]
    assert cells["faster than best dense"] == ["2.50×", "617.25×"]
    assert re.search(r"^scoring +0\.0123 ±10% +–$", text, re.MULTILINE)
    assert re.search(r"^scoring +50% exp +–$", text, re.MULTILINE)
    assert "  scoring (256K): out of memory" in text and "  FlashAttention-4: it waits" not in text
    assert "  FlashAttention-4 (4K): it waits" in text
    assert "no floors: the driver is silent" in report.tables(runs, names, "the driver is silent")


def test_a_line_on_a_length_compares_with_the_best_dense():
    run = Run(4096, 0.5, 0.461, {}, {"whole": result("prefill_attention", WHOLE, 2.0)}, {})
    assert "×" not in report.row(run)
    slow, fast = result("SDPA", DENSE, 9.0), result("FlashAttention-4", DENSE, 1.0)
    line = report.row(replace(run, contestants={**run.contestants, "slow": slow, "fast": fast}))
    assert line.split("  ")[-2:] == ["FlashAttention-4 1.00 ms", "0.50×"]


@pytest.mark.parametrize(
    "ms, text", [(1736.2, "1,736"), (18.85, "18.9"), (2.4, "2.40"), (0.155, "0.155"), (0.00234, "0.0023")]
)
def test_times_are_shown_with_three_digits(ms, text):
    assert report.format_ms(ms) == text


def test_the_spread_leaves_a_stray_repeat_alone():
    assert report.half_range([1.0, 2.0, 3.0, 4.0, 500.0]) == 1.0
    assert report.half_range([5.0]) == 0


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
