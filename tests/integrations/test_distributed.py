"""Several processes under torchrun find and compute what one does; see distributed_program.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from flexprefill import PrefillConfig
from flexprefill.integrations.distributed import (
    ContextLayout,
    context_parallel_attention,
    context_parallel_search,
    gather_context,
    shard_context,
    tensor_parallel_attention,
)

TESTS = Path(__file__).parents[1]


def run(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path[1:], str(TESTS)])}
    program = [str(TESTS / "support" / "distributed_program.py"), *arguments]
    done = subprocess.run([*command, *program], capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(processes):
        assert f"process {rank} of {processes} is right" in done.stdout


def need_packages(arguments):
    if "--models" in arguments:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate", reason="transformers' tensor parallelism needs accelerate")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [(2, "--models"), pytest.param((4, "--attend"), marks=pytest.mark.release)]
)  # the example attends by two
def test_processes_on_the_cpu_are_like_one(arguments):
    need_packages(arguments)
    run(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_processes_on_gpus_are_like_one():
    arguments = "--attend", "--models", "--backend", "nccl"
    need_packages(arguments)
    run(2, *arguments)


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_layout_needs_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ContextLayout.of(1000)


@pytest.mark.filterwarnings("ignore:query .* has more heads than tokens")
def test_tokens_before_heads_get_a_hint():
    layout = ContextLayout((0, 256, 512, 640, 1000), 1)
    local = torch.randn(1, 384, 2, 16)  # [B, S_local, H, D]
    with pytest.raises(ValueError, match=r"query must have the 384 positions.*; if query .* pass query\.transpose"):
        context_parallel_search(local, local, layout)
    with pytest.raises(ValueError, match=r"value must have the 384 positions.*; if value .* pass value\.transpose"):
        context_parallel_attention(local, local, local, layout)


def test_chunks_are_blocks_and_pair_early_with_late():
    layout = ContextLayout((0, 256, 512, 640, 1000), 1)
    assert layout.ranks == 2 and layout.length == 1000
    assert layout.spans(0) == ((0, 256), (640, 1000)) and layout.spans() == ((256, 512), (512, 640))


@pytest.mark.usefixtures("alone")
def test_bad_input_is_named():
    layout = ContextLayout.of(1000)
    whole = torch.zeros(1, 2, 1000, 16)
    short = torch.zeros(1, 2, 900, 16)
    with pytest.raises(ValueError, match="length must give each of 2 chunks a block of 128 tokens, and the last one 2"):
        ContextLayout.of(200)
    with pytest.raises(TypeError, match="length must be an int"):
        ContextLayout.of(1000.0)
    with pytest.raises(ValueError, match="tensor must have 1000 positions along dim 2"):
        shard_context(short, layout)
    with pytest.raises(ValueError, match="local must have the 1000 entries"):
        gather_context(short, layout)
    with pytest.raises(ValueError, match="query must have the 1000 positions"):
        context_parallel_search(short, short, layout)
    with pytest.raises(ValueError, match="value must have the 1000 positions"):
        context_parallel_attention(whole[:, :, :900], short, short, layout)
    with pytest.raises(ValueError, match="config.scorer must be 'flashprefill'"):
        context_parallel_search(whole, whole, layout, PrefillConfig(scorer="exact"))


@pytest.mark.usefixtures("alone")
def test_tensor_parallel_takes_sharded_heads_alone():
    tensor = torch.zeros(1, 2, 100, 16)
    mesh = init_device_mesh("cpu", (1,))
    heads, copies = distribute_tensor(tensor, mesh, (Shard(1),)), distribute_tensor(tensor, mesh, (Replicate(),))
    with pytest.raises(TypeError, match="key must be a DTensor, got Tensor"):
        tensor_parallel_attention(heads, tensor, heads)
    with pytest.raises(ValueError, match="value must be sharded along its heads"):
        tensor_parallel_attention(heads, heads, copies)
