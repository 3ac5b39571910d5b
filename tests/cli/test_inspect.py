"""flexprefill inspect: dense heads, --csv, --json and --quick, its speed, and files that are none of masks."""

import csv
import dataclasses
import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.inputs import make_qkv

from flexprefill import (
    BlockMap,
    MaskFileError,
    PrefillConfig,
    cli,
    read_mask_info,
    record_masks,
    save_masks,
    search_blocks,
)
from flexprefill.cli.masks import read_info
from flexprefill.inspection import PATTERNS, compare_maps, summarize_heads

CONFIG = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=2, last_full_blocks=1)


def make_map(seed, *, batch=1, heads=3, blocks=20, dense_heads=()):
    dense = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    dense[:, list(dense_heads)] = True
    return BlockMap.from_dense(dense, q_len=16 * blocks, kv_len=16 * blocks, block_size=16)


@pytest.fixture(scope="module")
def masks():
    return {0: make_map(0), 1: make_map(1, dense_heads=[1]), 4: make_map(4, batch=2, dense_heads=[0, 1, 2])}


@pytest.fixture(scope="module")
def file(tmp_path_factory, masks):
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks(path, masks, config=CONFIG)
    return str(path)


def run(capsys, *arguments):
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def run_csv(capsys, *arguments):
    return list(csv.DictReader(io.StringIO(run(capsys, *arguments, "--csv"), newline="")))


# dense heads


def test_a_head_that_keeps_everything_is_called_dense(file, masks, capsys):
    lines = run(capsys, "inspect", file, "--layer", "1").splitlines()
    (of_dense,) = (line for line in lines if line.startswith("head 1 "))
    assert re.match(r"head 1 +100.0% +dense +1/10/20 +[02] \(0\.\d+\) *$", of_dense)
    assert not any("dense" in line for line in lines if line.startswith(("head 0", "head 2")))
    printed = run(capsys, "inspect", file)
    assert "dense: heads that keep every causal block" in printed
    (row,) = (row for row in run_csv(capsys, "inspect", file) if row["layer"] == "1")
    others = [summary for summary in summarize_heads(masks[1], config=CONFIG) if not summary.dense]
    kept = sum(summary.kept for summary in others)
    assert row["dense_heads"] == "1"
    assert float(row["vertical"]) == pytest.approx(sum(summary.patterns["vertical"] for summary in others) / kept)
    # where all heads are dense there are no others
    printed = run(capsys, "inspect", file, "--layer", "4")
    assert "vertical" not in printed and "scattered" not in printed and printed.count("100.0%") == 6
    (layer,) = json.loads(run(capsys, "inspect", file, "--layer", "4", "--json"))["layers"]
    assert all(head["dense"] for head in layer["heads"])


# recall, where record_masks measured it


class Searches(torch.nn.Module):
    def forward(self, query, key):
        search_blocks(query, key, CONFIG).to_block_mask()


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_recall_is_shown_where_the_file_has_it(file, tmp_path, capsys, quick):
    query, key, _ = make_qkv(400, heads=3, kv_heads=3)
    query[:, 2] = 0  # attends evenly, and keeps everything
    with record_masks(model := Searches(), recall=True) as masks:
        model(query, key)
    path, recall = str(tmp_path / "masks"), masks.recalls[0]
    save_masks(path, masks, config=CONFIG, metadata={"by": "me"})

    printed = run(capsys, "inspect", path, *quick)
    assert "by: me" in printed and "flexprefill.recall" not in printed
    row = printed.splitlines()[[line.startswith("layer ") for line in printed.splitlines()].index(True) + 1]
    assert f" {recall.overall:.3f} " in row and f" {recall.mean.min():.3f}" in row
    by_head = run_csv(capsys, "inspect", path, "--layer", "0", *quick)
    assert [row["recall"] for row in by_head] == [f"{share:.5f}".rstrip("0") for share in recall.mean[0, :2]] + [""]
    assert float(by_head[1]["recall_least"]) == pytest.approx(recall.least[0, 1].item(), abs=1e-5)
    assert run_csv(capsys, "inspect", path, *quick)[0]["recall"][:5] == f"{recall.overall:.5f}"[:5]
    told = json.loads(run(capsys, "inspect", path, "--json", *quick))
    assert told["metadata"] == {"by": "me"} and told["layers"][0]["recall"]["mean"][0][2] is None
    assert json.loads(run(capsys, "inspect", file, "--json", *quick))["layers"][0]["recall"] is None
    assert " recall " not in run(capsys, "inspect", file, *quick)


# --csv and --json


def test_csv_has_a_line_a_layer(file, masks, capsys):
    printed = run(capsys, "inspect", file, "--csv")
    assert printed.count("\r\n") == 4 and printed.endswith("\r\n")
    rows = run_csv(capsys, "inspect", file)
    assert [row["layer"] for row in rows] == ["0", "1", "4"]
    for row, block_map in zip(rows, masks.values(), strict=True):
        densities = [summary.density for summary in summarize_heads(block_map)]
        assert float(row["density"]) == pytest.approx(sum(densities) / len(densities))
        assert (float(row["density_least"]), float(row["density_most"])) == (min(densities), max(densities))
    assert float(rows[1]["iou_above"]) == compare_maps(masks[0], masks[1]).iou.mean()
    assert rows[0]["iou_above"] == rows[2]["iou_above"] == ""  # the first; another shape


def test_csv_has_a_line_a_head(file, masks, capsys):
    rows = run_csv(capsys, "inspect", file, "--layer", "0")
    for row, summary in zip(rows, summarize_heads(masks[0], config=CONFIG), strict=True):
        assert (row["layer"], row["batch"], row["head"]) == ("0", "0", str(summary.head))
        assert {name: float(row[name]) for name in PATTERNS} == summary.shares
        assert (row["blocks_most"], row["dense"]) == (str(int(summary.counts.max())), "False")
    assert [(row["layer"], row["batch"]) for row in run_csv(capsys, "inspect", file, "--head", "2")] == [
        ("0", "0"), ("1", "0"), ("4", "0"), ("4", "1"),
    ]  # fmt: skip


def test_csv_of_differences(file, masks, capsys, tmp_path):
    other = tmp_path / "other.safetensors"
    save_masks(other, {0: masks[1], 1: masks[1], 7: masks[0]}, config=CONFIG)
    assert cli.main(["diff", file, str(other), "--csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    difference = compare_maps(masks[0], masks[1])
    assert [row["status"] for row in rows] == ["compared", "compared", "only A", "only B"]
    assert [row["equal"] for row in rows] == ["False", "True", "False", "False"]
    assert int(rows[0]["both"]) == difference.both.sum() and rows[0]["heads_differing"] == "3" and rows[2]["iou"] == ""
    assert cli.main(["diff", file, str(other), "--layer", "0", "--head", "1", "--csv"]) == 1
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out, newline=""))
    assert (row["head"], float(row["iou"])) == ("1", difference.iou[0, 1])


def test_json_is_indented(file, capsys):
    for arguments in (["inspect", file], ["inspect", file, "--quick"], ["diff", file, file]):
        printed = run(capsys, *arguments, "--json")
        assert printed == json.dumps(json.loads(printed), indent=2) + "\n"


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_one_form_at_a_time(file, capsys, command):
    with pytest.raises(SystemExit) as raised:
        cli.main([command, *[file] * (2 if command == "diff" else 1), "--csv", "--json"])
    assert raised.value.code == 2 and "--json: not allowed with argument --csv" in capsys.readouterr().err


# --quick


@pytest.mark.parametrize(
    "arguments", [["inspect", "--quick", "FILE"], ["inspect", "--help"], ["--help"], ["--version"]]
)
def test_what_reads_no_masks_starts_without_torch(file, arguments):
    arguments = [file if argument == "FILE" else argument for argument in arguments]
    command = [sys.executable, "-X", "importtime", "-m", "flexprefill", *arguments]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.split("|")[-1].strip() for line in imported.splitlines()}
    assert "flexprefill.cli" in names and not names & {"torch", "numpy"}


def test_quick_reads_no_masks(file, masks, capsys, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    data = bytearray(Path(file).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 20] = bytes(20)  # of the first head's blocks
    damaged.write_bytes(data)
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(damaged)])
    capsys.readouterr()
    printed = run(capsys, "inspect", str(damaged), "--quick").splitlines()
    assert "alpha 0.1, block size 16, sink blocks 1, window blocks 2, last full blocks 1, min blocks 0" in printed
    assert "layer 0, 1: 320 tokens in blocks of 16, 3 heads" in printed
    density = masks[0].density()
    row = next(line.split() for line in printed if line.startswith("0 "))
    assert row == ["0", f"{100 * density.double().mean():.1f}%", f"{100 * density.min():.1f}–{100 * density.max():.1f}"]


def test_quick_says_what_the_file_says(file, masks, capsys):
    said = read_mask_info(file).density
    rows = run_csv(capsys, "inspect", file, "--quick", "--head", "2")
    assert [float(row["density"]) for row in rows] == [said[0][0][2], said[1][0][2], said[4][0][2], said[4][1][2]]
    record = json.loads(run(capsys, "inspect", file, "--quick", "--layer", "4", "--json"))
    whole = json.loads(run(capsys, "inspect", file, "--layer", "4", "--json"))
    assert record["config"] == whole["config"] == CONFIG.to_dict()
    (quick,), (layer,) = record["layers"], whole["layers"]
    assert [head["density"] for head in quick["heads"]] == [density for entry in said[4] for density in entry]
    assert quick["shape"] == layer["shape"] and quick["density"] == layer["density"] == 1
    assert "batch 1, head 2" in run(capsys, "inspect", file, "--quick", "--layer", "4")


def test_quick_draws_nothing(file, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["inspect", file, "--quick", "--png", "map.png"])
    assert raised.value.code == 2 and "--quick: not allowed with argument --png" in capsys.readouterr().err


def test_quick_of_a_file_without_densities(file, capsys, monkeypatch):
    info = dataclasses.replace(read_mask_info(file), format_version=1, density={})
    monkeypatch.setattr("flexprefill.cli.masks.read_mask_info", lambda path: info)
    assert "A file of format 1 does not say its densities" in run(capsys, "inspect", file, "--quick")
    assert [row["density"] for row in run_csv(capsys, "inspect", file, "--quick")] == [""] * 3


@pytest.mark.slow
def test_a_large_file_is_inspected_in_seconds(tmp_path):
    I, J = torch.arange(512)[:, None], torch.arange(512)
    dense = torch.rand(1, 32, 512, 512, generator=torch.Generator().manual_seed(0)) < 0.05
    dense[:, ::2] |= (J % 50 == 7) | ((I - J) % 80 == 9)
    dense[:, ::8] |= torch.rand(1, 4, 512, 512, generator=torch.Generator().manual_seed(0)) < 0.8
    block_map = BlockMap.from_dense(dense, q_len=65536, kv_len=65536, block_size=128)
    path = tmp_path / "masks.safetensors"
    save_masks(path, dict.fromkeys(range(32), block_map))

    def cpu_seconds(*options):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "flexprefill", "inspect", str(path), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime

    assert cpu_seconds() < 5
    assert cpu_seconds("--quick") < 1


# files that are none


def torch_file(path, **options):
    torch.save({"weight": torch.zeros(3)}, path, **options)


def weights(path):
    save_file({"model.embed": torch.zeros(3, dtype=torch.bfloat16)}, path)


def start_of_weights(path):
    weights(path)
    path.write_bytes(path.read_bytes()[:40])


FILES = {
    "a safetensors file of weights or other tensors, such as 'model.embed'": weights,
    "a safetensors file that is cut short": start_of_weights,
    "a file of torch.save": torch_file,
    "a file of torch.save in its old format": lambda path: torch_file(path, _use_new_zipfile_serialization=False),
    "a Python pickle": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "a NumPy array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "a NumPy archive": lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
    "a PNG picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "a gzip file": lambda path: path.write_bytes(b"\x1f\x8b" + bytes(100)),
    "a damaged zip archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "a JSON file": lambda path: path.write_text(json.dumps({"alpha": [0.1] * 5000})),
    "an HTML page": lambda path: path.write_text("<!DOCTYPE html><title>masks</title>"),
    "a text file": lambda path: path.write_text("no masks, in Füßen\n" * 1000),
    "a pointer of Git LFS, whose file was not fetched": lambda path: path.write_text("version https://git-lfs.github"),
    "an empty file": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "a file of some other kind": lambda path: path.write_bytes(os.urandom(16).replace(b"{", b"}") + b"\xff\x00" * 60),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_mask_file_is_told_what_it_is(kind, file, capsys, tmp_path):
    path = tmp_path / "other"
    FILES[kind](path)
    message = f"{path} is no mask file but {kind}; flexprefill.save_masks(path, masks) makes mask files"
    for arguments in (["inspect", str(path)], ["diff", file, str(path)], ["view", str(path), "--no-open"]):
        with pytest.raises(SystemExit) as raised:
            cli.main(arguments)
        assert raised.value.code == 2 and capsys.readouterr().err.endswith(f"error: {message}\n")
    with pytest.raises(MaskFileError, match="is no mask file but"):
        read_info(path)


def test_a_damaged_mask_file_is_called_damaged(file, tmp_path):
    data = Path(file).read_bytes()
    for part in (data[:100], data[: len(data) // 2], data[:-1], data.replace(b'"model"', b'"modem"', 1)):
        path = tmp_path / "damaged"
        path.write_bytes(part)
        with pytest.raises(MaskFileError, match="is no readable mask file"):
            read_info(path)
    with pytest.raises(MaskFileError, match="No such file"):
        read_info(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MaskFileError, match="not a regular file"):
        read_info(tmp_path / "pipe")
