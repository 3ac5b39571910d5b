"""What a GPU launches is compiled where there is none: an error of a compiler would be seen there alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support/hopper_program.py"
KERNELS = {
    "search.kernels.hopper.search_kernel",
    "search.kernels.hopper_outliers.outliers_kernel",
    "search.kernels.hopper_probes.masses_kernel",
    "attention.hopper_mean_correction.merge_means_kernel",
}
SPILT = 128  # bytes a thread, at most


@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_gpu_and_spill_little(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, PROGRAM, tmp_path], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [line.split() for line in run.stdout.splitlines()]
    names = {name for name, _ in found}
    assert names >= KERNELS | {"search.kernels.scoring.search_kernel", "search.kernels.probes.decide_kernel"}
    assert [(name, stack) for name, stack in found if name in KERNELS and int(stack) > SPILT] == []
