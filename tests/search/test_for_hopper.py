"""What a GPU launches is compiled where there is none: an error of a compiler would be seen there alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
KERNELS = {
    "search.kernels.hopper.search_kernel",
    "search.kernels.hopper_outliers.outliers_kernel",
    "search.kernels.hopper_probes.masses_kernel",
    "attention.hopper_mean_correction.merge_means_kernel",
}
SPILT = 128  # bytes a thread, at most


def run(program, tmp_path, *arguments):
    """What a program prints that compiles for a GPU without one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = sys.executable, SUPPORT / program, *arguments
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_gpu_and_spill_little(tmp_path):
    found = [line.split() for line in run("hopper_program.py", tmp_path, tmp_path)]
    names = {name for name, _ in found}
    assert names >= KERNELS | {"search.kernels.scoring.search_kernel", "search.kernels.probes.decide_kernel"}
    assert [(name, stack) for name, stack in found if name in KERNELS and int(stack) > SPILT] == []


@pytest.mark.slow
def test_a_servers_warm_up_meets_every_kind_of_launch(tmp_path):
    assert run("served_program.py", tmp_path) == ["9 kernels"]
