"""FlexAttention's Triton kernel, as inductor writes it for a Hopper GPU, run by Triton's interpreter."""

import pytest
import torch
from support.programs import lines_of


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested there")
def test_the_kernel_that_is_written_is_right_for_views_and_pages_and_loads_widely(tmp_path):
    found = [line.split() for line in lines_of("flex_program.py", tmp_path, interpret=True)]
    names = [name for name, _, _ in found]
    assert names == "whole chunk views cache pages-128 pages-128 pages-256 pages-384".split()
    assert max(float(error) for _, error, _ in found) <= 1e-5
    assert {aligned for _, _, aligned in found} == {"3"}
