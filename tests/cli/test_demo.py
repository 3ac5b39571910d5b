import contextlib
import io
import re
import sys

import pytest
import torch

import flexprefill
from flexprefill import PrefillConfig, attention_recall, cli, load_masks, read_mask_info
from flexprefill.cli import demo
from flexprefill.evaluation.built_heads import HEADS, build_prompt, read_tokens
from flexprefill.runtime.progress import stage

LENGTH, SEED, ALPHA = 2000, 3, 0.5


@pytest.fixture(scope="module")
def prompt():
    return build_prompt(read_tokens(LENGTH), "cpu", SEED)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the printed text of one small run."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    arguments = ["demo", "--length", str(LENGTH), "--seed", str(SEED), "--alpha", str(ALPHA), "--device", "cpu"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main([*arguments, "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def test_the_printed_figures_are_those_of_the_saved_masks(finished, prompt):
    folder, printed = finished
    block_map = load_masks(folder / "masks.safetensors")[0]
    mass = attention_recall(prompt.query, prompt.key, block_map).mean[0]
    exact = torch.nn.functional.scaled_dot_product_attention(prompt.query, prompt.key, prompt.value, is_causal=True)
    kept = block_map.to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :LENGTH, :LENGTH].tril()
    sparse = torch.nn.functional.scaled_dot_product_attention(prompt.query, prompt.key, prompt.value, attn_mask=kept)
    error = (sparse - exact)[0].flatten(1).norm(dim=1) / exact[0].flatten(1).norm(dim=1)
    for head, name in enumerate(HEADS):
        row = re.search(rf"^{name} +([\d.]+) % +([\d.]+) % +([\d.]+) ", printed, re.MULTILINE)
        printed_density, printed_mass, printed_error = map(float, row.groups())
        assert printed_density == pytest.approx(100 * block_map.density()[0, head].item(), abs=0.051)
        assert printed_mass == pytest.approx(100 * mass[head].item(), abs=0.0051)
        assert printed_error == pytest.approx(error[head].item(), abs=0.0001)


def test_the_masks_are_the_searchs_and_say_where_they_come_from(finished, prompt):
    folder, _ = finished
    config = PrefillConfig(alpha=ALPHA)
    assert load_masks(folder / "masks.safetensors")[0] == flexprefill.search_blocks(prompt.query, prompt.key, config)
    info = read_mask_info(folder / "masks.safetensors")
    assert info.config == config
    assert info.metadata == {"made_by": "flexprefill demo", "heads": "local, sink, induction, topic", "seed": "3"}


def test_the_picture_is_drawn(finished):
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(finished[0] / "masks.png")
    assert pixels.std() > 0.1


def test_times_are_printed_with_a_verdict_that_follows_from_them(finished):
    folder, printed = finished
    medians = {
        name: float(re.search(rf"^{name} +([\d,.]+) ", printed, re.MULTILINE)[1].replace(",", ""))
        for name in (demo.DENSE_FLEX, demo.DENSE_SDPA, demo.SPARSE, demo.SEARCH, demo.LISTS)
    }
    for name in (demo.DENSE_FLEX, demo.DENSE_SDPA):
        ratio, verdict = re.search(rf"is ([\d.]+)× (faster|slower) than {name} here", printed).groups()
        dense, sparse = medians[name], medians[demo.SPARSE]
        assert float(ratio) == pytest.approx(max(dense / sparse, sparse / dense), rel=0.1)
        assert verdict == ("faster" if dense >= sparse else "slower") or float(ratio) < 1.1
    assert f'load_masks("{folder / "masks.safetensors"}")[0]' in printed
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
    assert demo.always_kept_share(LENGTH, PrefillConfig()) == pytest.approx(kept / 136)


def test_without_tqdm_a_stage_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with stage("counting", 2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "counting …\n")


def test_without_matplotlib_the_picture_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ones = torch.ones(1, 4, 2, 2, dtype=torch.bool)
    block_map = flexprefill.BlockMap.from_dense(ones, q_len=32, kv_len=32, block_size=16)
    said = demo.save(block_map, PrefillConfig(), tmp_path, 0)
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
