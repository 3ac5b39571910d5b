import pytest
from support.sanitizer import TOOLS, find_sanitizer, run_kernels, run_under


@pytest.mark.gpu
def test_the_kernels_that_the_sanitizer_is_given_run():
    run_kernels()


@pytest.mark.gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_the_kernels_are_clean(tool):
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on this machine")
    result = run_under(tool, sanitizer)
    assert result.returncode == 0 and "searches and the tail's kernels ran" in result.stdout, (
        result.stdout[-3000:] + result.stderr[-3000:]
    )
