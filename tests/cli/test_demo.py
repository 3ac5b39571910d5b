import contextlib
import io
import re
import sys

import pytest
import torch

import flexprefill
from flexprefill import PrefillConfig, attention_recall, cli, load_masks, read_mask_info
from flexprefill.blockmap.geometry import Geometry
from flexprefill.cli import demo
from flexprefill.evaluation.built_heads import HEADS, build_prompt, read_tokens
from flexprefill.evaluation.real_heads import PATH, REAL_HEADS, REAL_LENGTH, load_heads
from flexprefill.runtime.progress import stage

LENGTH, SEED, ALPHA = 2000, 3, 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the printed text of one small run."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    arguments = ["demo", "--length", str(LENGTH), "--alpha", str(ALPHA), "--device", "cpu"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main([*arguments, "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def test_the_printed_figures_are_those_of_the_saved_masks(finished):
    folder, printed = finished
    query, key, value = load_heads(LENGTH, "cpu")
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    block_map = load_masks(folder / "masks.safetensors")[0]
    recall = attention_recall(query, key, block_map)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    kept = block_map.to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :LENGTH, :LENGTH].tril()
    sparse = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=kept)
    error = (sparse - exact)[0].flatten(1).norm(dim=1) / exact[0].flatten(1).norm(dim=1)
    wanted = (block_map.density()[0], recall.mean[0], recall.quantile(0.05)[0], error)
    for head, name in enumerate(REAL_HEADS):
        row = re.search(rf"^{name} +([\d.]+) % +([\d.]+) +([\d.]+) +([\d.]+) ", printed, re.MULTILINE)
        density, *others = map(float, row.groups())
        for figure, tensor in zip((density / 100, *others), wanted, strict=True):
            assert figure == pytest.approx(tensor[head].item(), abs=0.00101)


def test_the_masks_are_the_searchs_and_say_where_they_come_from(finished):
    folder, printed = finished
    file = folder / "masks.safetensors"
    config = PrefillConfig(alpha=ALPHA)
    query, key, _ = load_heads(LENGTH, "cpu")
    assert load_masks(file)[0] == flexprefill.search_blocks(query, key, config)
    info = read_mask_info(file)
    assert info.config == config and info.dtype == "float32"
    assert info.metadata["made_by"] == "flexprefill demo" and "SmolLM2" in info.metadata["origin"]
    assert info.metadata["heads"] == ", ".join(REAL_HEADS)
    assert f'load_masks("{file}")[0]' in printed
    assert printed.endswith(f"to look at the masks: flexprefill view {file}\n")


def test_a_longer_prompt_has_heads_that_are_built():
    prompt = demo.built_prompt(LENGTH, torch.device("cpu"), SEED)
    built = build_prompt(read_tokens(LENGTH), "cpu", SEED)
    assert torch.equal(prompt.query, built.query) and prompt.heads == HEADS
    assert "seed 3" in prompt.origin and prompt.suffix


def test_the_model_s_heads_are_small_and_whole():
    assert PATH.stat().st_size < 4_000_000
    query, key, value = load_heads(REAL_LENGTH, "cpu")
    assert query.shape == (1, len(REAL_HEADS), REAL_LENGTH, 64)
    assert key.shape == value.shape == (1, len(REAL_HEADS) // 2, REAL_LENGTH, 64)
    first = load_heads(1024, "cpu")
    assert all(torch.equal(part, whole[:, :, :1024]) for part, whole in zip(first, (query, key, value), strict=True))
    notice = PATH.with_suffix(".NOTICE").read_text()
    assert "Apache License 2.0" in notice and "PSF License Version 2" in notice


def test_what_heads_attend_to_is_as_told():
    query, key, _ = load_heads(REAL_LENGTH, "cpu")
    rows = torch.arange(3500, REAL_LENGTH, 7)  # the text repeats itself here
    logits = query[0, :, rows] @ key[0].repeat_interleave(2, 0).mT / 8
    distance = rows[:, None] - torch.arange(REAL_LENGTH)
    share = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    first = share[..., 0].mean(1)
    near = (share * ((distance >= 0) & (distance < 512))).sum(-1).mean(1)
    far = 1 - first - near
    sink, local, lookup, sharp, broad, other = range(6)
    assert 0.3 < first[sink] < 0.7 and near[sink] > 0.3
    assert near[local] > 0.9
    assert far[lookup] > 0.3 and far[sharp] > 0.3
    assert far[broad] > 0.4 and far[other] > 0.4 and share[broad:].amax(-1).median() < 0.2


@pytest.mark.parametrize(
    "recall, low, error, said",
    [
        (0.99, 0.9, 0.01, None),
        (0.61, 0.3, 0.31, "a loses much: its rows keep 61 % on average. Its output is off by 31 %."),
        (0.95, 0.44, 0.3, "a loses much in a few rows: one in twenty keeps less than 44 %. Its output is off by 30 %."),
        (0.97, 0.9, 0.35, "a loses little, but what it loses matters. Its output is off by 35 %."),
    ],
)
def test_a_head_that_loses_much_says_so(recall, low, error, said):
    explained, *lines = demo.losses([demo.HeadFigures("a", 0.4, recall, low, error)])
    assert explained.startswith("recall: ")
    assert lines[:1] == ([said] if said else [])
    assert not said or "smaller --alpha" in lines[-1]


def test_the_picture_is_drawn(finished):
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(finished[0] / "masks.png")
    assert pixels.std() > 0.1


def test_times_are_printed_with_a_verdict_that_follows_from_them(finished):
    _, printed = finished
    medians = {
        name: float(re.search(rf"^{name} +([\d,.]+) ", printed, re.MULTILINE)[1].replace(",", ""))
        for name in (demo.DENSE_FLEX, demo.DENSE_SDPA, demo.SPARSE, demo.SEARCH, demo.LISTS)
    }
    for name in (demo.DENSE_FLEX, demo.DENSE_SDPA):
        ratio, verdict = re.search(rf"is ([\d.]+)× (faster|slower) than {name} here", printed).groups()
        dense, sparse = medians[name], medians[demo.SPARSE]
        assert float(ratio) == pytest.approx(max(dense / sparse, sparse / dense), rel=0.1)
        assert verdict == ("faster" if dense >= sparse else "slower") or float(ratio) < 1.1
    assert re.search(r"^\d+ s in all$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "sparse, dense, expected",
    [
        ([1.0, 1.1], [2.1, 2.1], "2.00× faster than dense here"),
        ([3.0, 3.0], [2.0, 2.0], "1.50× slower than dense here"),
        ([1.0, 2.0, 3.0], [2.5, 2.5], "1.25× faster than dense here (single runs overlap)"),
    ],
)
def test_slower_is_called_slower(sparse, dense, expected):
    assert demo.verdict(sparse, dense, "dense").endswith(expected)


def test_the_share_that_is_always_kept_is_counted():
    # 16 blocks a side: sinks 2, window 4, last rows 2
    kept = sum(i + 1 if i >= 14 else min(i + 1, 6) for i in range(16))
    assert demo.always_kept_share(Geometry(LENGTH, LENGTH, 128), PrefillConfig()) == pytest.approx(kept / 136)


def test_without_tqdm_a_stage_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with stage("counting", 2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "counting …\n")


def test_without_matplotlib_the_picture_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    prompt = demo.real_prompt(1024, torch.device("cpu"))
    block_map = flexprefill.search_blocks(prompt.query, prompt.key, PrefillConfig())
    said = demo.save(prompt, block_map, PrefillConfig(), tmp_path / "masks.safetensors")
    assert "skipped" in said and "pip install 'flexprefill[viz]'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: COMMAND"),
        (["look"], "invalid choice: 'look'"),
        (["demo", "--length", "12"], "--length: must be at least 1024, got 12"),
        (["demo", "--length", "many"], "--length: must be a whole number, got 'many'"),
        (["demo", "--length", "1000000000"], "length must be at most"),
        (["demo", "--alpha", "0"], "--alpha: must be a number above 0 and at most 1, got '0'"),
        (["demo", "--alpha", "nan"], "--alpha: must be a number above 0"),
        (["demo", "--alpha", "x"], "--alpha: must be a number above 0"),
        (["demo", "--seed", "-1"], "--seed: must be at least 0"),
        (["demo", "--device", "tpu"], "--device: must be cpu, cuda or cuda:N, got 'tpu'"),
        (["demo", "--device", "meta"], "--device: must be cpu, cuda or cuda:N, got 'meta'"),
        (["demo", "--device", "cuda:99"], "--device: cuda:99 is not there"),
    ],
)
def test_bad_arguments_end_with_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo", "--output", str(tmp_path / "taken")])
    assert raised.value.code == 2
    assert "taken" in capsys.readouterr().err


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"flexprefill {flexprefill.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--length", "--alpha", "--output", "--device", "--seed"))
