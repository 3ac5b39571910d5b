import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexprefill import PrefillConfig, load_masks, read_mask_info
from flexprefill.evaluation import TASKS, load_model

pytestmark = pytest.mark.slow  # each script compiles or trains something
EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = {"vllm_answers.py"}  # what scripts import; it runs nothing by itself
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if path.name not in SHARED)


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "use_block_mask.py",
        "compile_model.py",
        "context_parallel.py",
        "inspect_saved_masks.py",
        "long_range_heads.py",
        "prefill_in_chunks.py",
        "read_masks_with_numpy.py",
        "transformers_generate.py",
        "calibrate_transformers.py",
        "capture_demo_heads.py",  # its model is a download: tests/cli/test_demo.py looks at what it made
        "record_and_inspect.py",
        "train_needle_model.py",
        "vllm_server.py",  # tests/integrations/test_vllm_engine.py runs it, where vLLM is
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_help_and_overwrites_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")  # here: a process of its own loads torch for seconds
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: ")
    assert 'parent / "results"' not in script.read_text("utf-8")


def test_use_block_mask():
    lines = run(EXAMPLES / "use_block_mask.py").splitlines()
    assert len(lines) == 4
    for line in lines:
        density, error = re.search(r"(\d+)% of the causal blocks, output error ([\d.]+)", line).groups()
        assert float(density) < 60 and float(error) < 0.1


@pytest.mark.release
def test_compile_model():
    assert run(EXAMPLES / "compile_model.py").count("next-token logits (1, 256)") == 4


@pytest.mark.release
def test_context_parallel():
    by_two = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    printed = run(*by_two, EXAMPLES / "context_parallel.py", "--length", 1500)
    assert "process 0: positions 0 – 384 and 1,152 – 1,500" in printed
    assert "process 1: positions 384 – 768 and 768 – 1,152" in printed
    assert float(re.search(r"differs from one process's by (\S+)", printed)[1]) <= 1e-5


def test_inspect_saved_masks():
    printed = run(EXAMPLES / "inspect_saved_masks.py")
    assert "alpha=0.5" in printed and printed.count("density") == 8
    assert all(0 < float(share) < 100 for share in re.findall(r"density ([\d.]+)%", printed))


def test_prefill_in_chunks():
    printed = run(EXAMPLES / "prefill_in_chunks.py", "--length", 1500, "--chunk", 512, "--heads", 2, "--compare")
    assert printed.count("of the causal blocks") == 3 and "the same blocks as in one search" in printed


@pytest.mark.release
def test_transformers_generate():
    printed = run(EXAMPLES / "transformers_generate.py", "--length", 600)
    assert re.findall(r"^(\d+) tokens → \[(?:\d+, ){15}\d+\]$", printed, re.MULTILINE) == ["600", "450"]


@pytest.mark.release
def test_calibrate_transformers(tmp_path):
    file = tmp_path / "calibrated.json"
    printed = run(EXAMPLES / "calibrate_transformers.py", file)
    assert "next-token logits (1, 1, 512) with sparse attention" in printed
    configs = PrefillConfig.load_layers(file)
    assert len(configs) == 2 and all(len(config.alpha) == 4 and min(config.alpha) < 1 for config in configs.values())


def test_record_and_inspect(tmp_path):
    lines = run(EXAMPLES / "record_and_inspect.py", tmp_path / "masks.safetensors", "--length", 2000).splitlines()
    assert len(lines) == 3 and lines[0].count("100.0%") == 4
    densities = [float(share) for line in lines[1:] for share in re.findall(r"([\d.]+)%", line)]
    assert len(densities) == 8 and min(densities) < 90
    assert len(load_masks(tmp_path / "masks.safetensors")) == 3


@pytest.mark.release
def test_long_range_heads(tmp_path):
    lines = run(EXAMPLES / "long_range_heads.py", tmp_path / "heads.png").splitlines()
    found = [
        re.fullmatch(r"layer \d head \d: (0\.\d+) of its mass is 2,048 tokens back or more", line) for line in lines
    ]
    shares = [float(match[1]) for match in found]
    assert len(shares) == 8 and shares == sorted(shares, reverse=True) and shares[-1] > 0.2
    assert (tmp_path / "heads.png").stat().st_size > 5000


@pytest.mark.release
def test_train_needle_model(tmp_path):
    sizes = ["--width", 32, "--layers", 1, "--heads", 1, "--kv-heads", 1, "--hidden", 32, "--device", "cpu"]
    quick = [*sizes, "--batch-tokens", 512, "--lengths", 256, "--samples", 2]
    script = EXAMPLES / "train_needle_model.py"
    in_parts, at_once = tmp_path / "parts", tmp_path / "once"
    settings = ["--stages", "128:1,256:1", "--steps", 4, *quick]
    assert "run again to go on" in run(script, in_parts, *settings, "--stop-after", 1e-9)
    assert "finished" in run(script, in_parts, *settings)
    record = json.loads((in_parts / "training.json").read_text())
    assert record["step"] == 4 and record["finished"] and record["tokens"] == 4 * 512
    assert set(record["accuracy"]["256"]) == {*TASKS, "text loss"}
    run(script, at_once, *settings)
    models = [load_model(folder / "model.safetensors").state_dict() for folder in (in_parts, at_once)]
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


@pytest.mark.gpu
def test_train_needle_model_on_a_gpu(tmp_path):
    quick = ["--stages", "256:1,1024:1,8192:1", "--steps", 60, "--lengths", 4096, "--samples", 8]
    assert "finished" in run(EXAMPLES / "train_needle_model.py", tmp_path, *quick)
    assert all(file.stat().st_size < 16 * 2**20 for file in tmp_path.rglob("*.safetensors"))
    (line,) = json.loads((tmp_path / "training.json").read_text())["log"]
    assert all(math.isfinite(loss) for loss in line["losses"].values())


def test_read_masks_with_numpy():
    example = EXAMPLES / "read_masks_with_numpy.py"
    file = Path(__file__).parents[1] / "data" / "masks_v2.safetensors"
    printed = run(example, file)
    assert "layer 3: q_len 300, kv_len 1300, block_size 16, shape [2, 1]" in printed
    info = read_mask_info(file)
    densities = [f"{100 * share:.1f}" for layer in info.density.values() for heads in layer for share in heads]
    assert re.findall(r"density ([\d.]+)%", printed) == densities
    modules = set(re.findall(r"^(?:import|from) (\w+)", example.read_text(), re.MULTILINE))
    assert modules == {"argparse", "json", "zlib", "numpy"}


@pytest.mark.release
def test_time_to_first_token(tmp_path):
    sizes = {"lengths": "600", "layers": 2, "hidden": 64, "intermediate": 64, "heads": 4, "kv-heads": 2}
    sizes |= {"vocabulary": 64, "repeats": 1, "device": "cpu", "output": tmp_path / "times.json"}
    script = EXAMPLES / "benchmarks" / "time_to_first_token.py"
    run(script, *(word for name, value in sizes.items() for word in (f"--{name}", value)))
    found = json.loads((tmp_path / "times.json").read_text())["by_length"]["600"]
    assert {"flexprefill", "sdpa"} <= found["times"].keys() and found["times"].keys() | found["absent"].keys() == {
        "flexprefill",
        "sdpa",
        "fa4-dense",
    }
    assert len(found["density_by_layer"]) == 2 and found["medians"].keys() == found["times"].keys()
    for series in found["times"].values():
        (whole,), (attention,) = series["whole_ms"], series["attention_ms"]
        assert 0 < attention < whole
