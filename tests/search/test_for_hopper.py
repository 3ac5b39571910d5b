"""What a GPU launches is compiled where there is none: an error of a compiler would be seen there alone."""

import pytest
from support.programs import lines_of

KERNELS = {
    "search.kernels.hopper.search_kernel",
    "search.kernels.hopper_outliers.outliers_kernel",
    "search.kernels.hopper_probes.masses_kernel",
    "attention.hopper_mean_correction.merge_means_kernel",
}
SPILT = 128  # bytes a thread, at most


@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_gpu_and_spill_little(tmp_path):
    found = [line.split() for line in lines_of("hopper_program.py", tmp_path, tmp_path, interpret=False)]
    names = {name for name, _ in found}
    assert names >= KERNELS | {"search.kernels.scoring.search_kernel", "search.kernels.probes.decide_kernel"}
    assert [(name, stack) for name, stack in found if name in KERNELS and int(stack) > SPILT] == []


@pytest.mark.slow
def test_a_servers_warm_up_meets_every_kind_of_launch(tmp_path):
    assert lines_of("served_program.py", tmp_path, interpret=False) == ["9 kernels"]
