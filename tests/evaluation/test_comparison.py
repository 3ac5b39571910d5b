"""The comparison of ways to choose blocks, and the command that runs it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv
from support.oracle import corrected_attention, masked_attention, relative_error

from flexprefill import FlexPrefillError, PrefillConfig, attention_recall, cli, search_blocks
from flexprefill.evaluation import TASKS, Decoder, ModelSizes, babble, save_model
from flexprefill.evaluation.comparison import Cell, Plan, compare
from flexprefill.evaluation.decoder_subject import DecoderSubject
from flexprefill.evaluation.methods import KINDS, Attender, Method, make_methods
from flexprefill.evaluation.report import accuracy_points, average, loss_points, table
from flexprefill.plotting import TradeOffPoint, plot_trade_off

SIZES = ModelSizes(width=32, layers=2, heads=2, kv_heads=1, hidden=32)
TEXT = babble(20_000)
RULE = PrefillConfig(alpha=0.9, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder(SIZES).eval()


@settings(max_examples=8, deadline=None)
@given(st.integers(20, 200), st.integers(0, 1000), st.sampled_from([0.99, 0.7, 0.3]))
def test_all_keep_as_many_and_the_exact_choice_keeps_the_most(length, seed, alpha):
    query, key, _ = make_qkv(length, heads=2, seed=seed)
    rule = PrefillConfig(alpha=alpha, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)
    searched = search_blocks(query, key, rule)
    every = range(length)
    recalls = {None: attention_recall(query, key, searched, rows=every).mean}
    for chosen_by in ("xattention", "prism", "minference", "byte-flexprefill", "random", "exact", "flashprefill"):
        chosen = Method("another", rule, chosen_by).choose(query, key)
        assert torch.equal(chosen.counts(), searched.counts())
        recalls[chosen_by] = attention_recall(query, key, chosen, rows=every).mean
    assert all((recalls["exact"] >= recall - 1e-5).all() for recall in recalls.values())
    # the search's own scores choose what it chose; ties and unscored blocks apart, which are the causal edge's
    same = Method("the same", rule, "flashprefill").choose(query, key)
    assert (same.to_dense() == searched.to_dense()).float().mean() > 0.95


def test_sinks_window_and_last_blocks_stay():
    query, key, _ = make_qkv(320, heads=2)
    for chosen_by in ("random", "xattention", "minference"):
        dense = Method("another", RULE, chosen_by).choose(query, key).to_dense()
        assert dense[..., 0].all() and dense.diagonal(dim1=-2, dim2=-1).all() and dense[:, :, -1].all()
    again = Method("again", RULE, "random")
    assert again.choose(query, key) == again.choose(query, key)


def test_methods_by_kind():
    found = make_methods([0.1, 0.5], ["dense", "mean-correction", "exact"])
    names = ["dense", "mean-correction 0.1", "exact 0.1", "mean-correction 0.5", "exact 0.5"]
    assert [method.name for method in found] == names
    assert [bool(method.config and method.config.mean_correction) for method in found] == [
        False,
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="kinds must be of dense, .* got 'best'"):
        make_methods([0.1], ["best"])
    with pytest.raises(ValueError, match="dense is dense and chooses no blocks"):
        found[0].choose(*make_qkv(64)[:2])
    with pytest.raises(ValueError, match="must be one of"):
        Method("unknown", RULE, "unknown").choose(*make_qkv(64)[:2])


def test_a_prompt_depends_on_its_number_alone(model):
    subject = DecoderSubject(model, 7, TEXT, 0)
    for task in (*TASKS, "text"):
        first, again, other = (subject.prompt(512, task, number) for number in (3, 3, 4))
        tokens = [prompt if task == "text" else prompt.tokens for prompt in (first, again, other)]
        assert tokens[0].shape == (1, 512)
        assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_an_interrupted_comparison_goes_on(model, tmp_path, monkeypatch):
    from flexprefill.evaluation import comparison

    path, done = tmp_path / "eval.json", []
    methods = make_methods([0.9], ["dense", "flashprefill", "exact"], RULE)
    plan = Plan([400], ["single", "text"], methods, 2, 0)
    measure = comparison.measure

    def interrupted(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[2:])
        return measure(*arguments)

    monkeypatch.setattr(comparison, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(DecoderSubject(model, 7, TEXT, 0), plan, path, lambda steps: None)
    first = json.loads(path.read_text())["cells"]
    assert len(first) == 2
    monkeypatch.setattr(comparison, "measure", lambda *arguments: done.append(arguments[2:]) or measure(*arguments))
    steps = []
    cells = compare(DecoderSubject(model, 7, TEXT, 0), plan, path, steps.append)
    assert len(done) == len(set(done)) == len(cells) == sum(steps) == 6
    assert json.loads(path.read_text())["cells"][:2] == first

    by_key = {(cell.length, cell.task, cell.method.split(" ")[0]): cell for cell in cells}
    for cell in cells:
        assert 0 < cell.density <= 1 and 0 < cell.lowest_recall <= cell.recall <= 1.0001 and cell.seconds > 0
        assert (cell.loss is None) == (cell.task == "single") == (cell.right is not None)
    for task in ("single", "text"):
        dense, sparse, exact = (by_key[400, task, kind] for kind in ("dense", "flashprefill", "exact"))
        assert dense.density == dense.recall == 1 > sparse.density
        # the first layer keeps as many; those behind it search states that differ
        assert exact.density == pytest.approx(sparse.density, rel=0.1)
        assert exact.recall >= sparse.recall
    with pytest.raises(FlexPrefillError, match="was made with another model and seed; give another folder"):
        compare(DecoderSubject(model, 8, TEXT, 1), Plan([256], ["single"], methods, 2, 1), path, steps.append)
    path.write_text("{}")
    with pytest.raises(FlexPrefillError, match="is no file of this comparison"):
        compare(DecoderSubject(model, 7, TEXT, 0), plan, path, steps.append)


def test_figures_of_other_calibrated_configs_are_not_taken(model, tmp_path):
    def run(name, alpha):
        configs = dict.fromkeys(range(2), replace(RULE, alpha=alpha))
        plan = Plan([300], ["single"], make_methods([], ["dense"], calibrated={name: configs}), 2, 0)
        return compare(DecoderSubject(model, 7, TEXT, 0), plan, tmp_path / "eval.json", lambda steps: None)

    first = run("mine", (0.9, 0.8))
    assert run("mine", (0.9, 0.8)) == first
    with pytest.raises(FlexPrefillError, match="has figures of calibrated mine from other configs"):
        run("mine", (0.9, 0.01))
    assert run("yours", (0.9, 0.01))[0] == first[0]
    # what another run added is known to be its own still
    assert run("mine", (0.9, 0.8)) == first


def test_an_attender_gives_the_methods_attention(model):
    query, key, value = make_qkv(400, heads=2)
    attender = Attender(make_methods([0.9], ["flashprefill"], RULE)[0], watch=True)
    output = attender(query, key, value)
    kept = search_blocks(query, key, RULE)
    visible = kept.to_dense().repeat_interleave(16, -1).repeat_interleave(16, -2)[..., :400, :400].tril()
    logits = (query @ key.mT * 64**-0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(output, logits.softmax(-1) @ value, rtol=1e-4, atol=1e-4)
    rows = range(37, 400, 101)
    torch.testing.assert_close(attender.recalls[0], attention_recall(query, key, kept, rows=rows).mean)
    torch.testing.assert_close(attender.densities[0], kept.density())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_methods_on_a_gpu(kind):
    tensors = make_qkv(4096, heads=4, kv_heads=2, device="cuda", dtype=torch.bfloat16)
    (method,) = make_methods([0.9], [kind])
    attender = Attender(method, watch=True)
    output = attender(*tensors)
    kept = method.choose(*tensors[:2])
    assert (kept.density().max() < 0.9) == (kind != "guard") and 0 < attender.recalls[0].min() <= 1.001
    corrected = method.config.mean_correction
    exact = corrected_attention(*tensors, kept)[0].cuda() if corrected else masked_attention(*tensors, kept)
    assert relative_error(output, exact) <= 2e-2


CELLS = [
    Cell(4096, "single", "dense", 20, 20, None, 1.0, 1.0, 1.0, 0.002),
    Cell(4096, "variables", "dense", 10, 20, None, 1.0, 1.0, 1.0, 0.004),
    Cell(4096, "text", "dense", None, 20, 1.5, 1.0, 1.0, 1.0, 0.003),
    Cell(4096, "single", "exact 0.1", 19, 20, None, 0.5, 0.9, 0.8, 0.002),
    Cell(8192, "text", "dense", None, 20, 1.25, 1.0, 1.0, 1.0, 0.003),
]


def test_tables_and_points():
    header, rows = table(CELLS[:4])
    assert header == ["method", "density", "mass", "average", "single", "variables", "text", "ms"]
    assert rows[0] == ["dense", "100.0 %", "100.0 %", "75.0 %", "100.0 (84–100)", "50.0 (30–70)", "1.500", "3.0"]
    assert rows[1] == ["exact 0.1", "50.0 %", "90.0 %", "95.0 %", "95.0 (76–99)", "–", "–", "2.0"]
    assert average(CELLS[4:]) is None
    points = accuracy_points(CELLS)
    assert [(point.column, point.method, point.density, point.value) for point in points] == [
        ("4K tokens", "dense", 1, 75),
        ("4K tokens", "exact", 0.5, 95),
    ]
    assert points[0].interval[0] < 75 < points[0].interval[1]
    losses = [0.5, 0.7, 0.6]
    pair = [
        replace(CELLS[2], losses=losses),
        replace(CELLS[2], method="exact 0.1", density=0.5, losses=[loss + 0.25 for loss in losses]),
    ]
    assert [(point.row, point.density, round(point.value, 6)) for point in loss_points([*CELLS, *pair])] == [
        ("text", 1, 0),
        ("text", 0.5, 0.25),
    ]


def test_a_picture_has_a_panel_for_each_length(tmp_path):
    from PIL import Image

    points = [TradeOffPoint("", column, "dense", 1, 90, (80, 95)) for column in ("4K tokens", "8K tokens")]
    points += [TradeOffPoint("", "4K tokens", "exact", share, 100 * share, (50 * share, 100)) for share in (0.5, 0.2)]
    points += [TradeOffPoint("", "4K tokens", "exact-own", 0.4, 30, (30, 30))]
    plot_trade_off(points, tmp_path / "two.png", title="Two", value_label="%")
    plot_trade_off(points[:1], tmp_path / "one.png", title="One", value_label="%")
    plot_trade_off(
        [points[0], replace(points[0], row="copy")],
        tmp_path / "rows.png",
        title="Rows",
        value_label="%",
        limits=(0, 103),
    )
    two, one, rows = (Image.open(tmp_path / name) for name in ("two.png", "one.png", "rows.png"))
    assert two.width - one.width == 750 and two.height == one.height
    assert rows.height - one.height == 830 and rows.width == one.width
    with pytest.raises(ValueError, match="points must be at least one"):
        plot_trade_off([], tmp_path / "none.png", title="", value_label="")


@pytest.mark.slow
def test_the_command(model, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_model(model, file)
    arguments = ["eval", "--model", file, "--lengths", "1024", "--alphas", "0.5", "--tasks", "single,text"]
    arguments += ["--methods", "dense,flashprefill", "--samples", "2", "--output", tmp_path / "new", "--device", "cpu"]
    assert cli.main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^1,024 tokens\nmethod +density +mass +average +single +text +ms\n", printed)
    assert re.search(r"^dense +100.0 % +100.0 % +0.0 % +0.0 \(0–66\) +\d\.\d{3} +", printed, re.MULTILINE)
    assert (tmp_path / "new" / "eval.png").exists() and len(
        json.loads((tmp_path / "new" / "eval.json").read_text())["cells"]
    ) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "guess"], "--tasks: must be of single, .*, text, got 'guess'"),
        (["--methods", "best"], "--methods: must be of dense"),
        (["--lengths", "12"], "--lengths: must be at least 256"),
        (["--dtype", "bfloat16"], "--text, --dtype: are for a pretrained model, got a needle model's file"),
        ([], "model .*does not exist|path must be a file"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "--model", str(tmp_path / "none.safetensors"), "--output", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
