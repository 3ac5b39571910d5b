import subprocess
import sys

import pytest
import torch

from flexprefill import BlockMap, FlexPrefillError
from flexprefill.blockmap import causal_blocks
from flexprefill.plotting import COLUMNS, DROPPED, GAP_X, KEPT, LEFT, TOP, kept_shares, plot_heads, token_ticks

image = pytest.importorskip("matplotlib.image")
to_rgb = pytest.importorskip("matplotlib.colors").to_rgb


def make_map(dense, *, block_size=16, q_len=None, kv_len=None):
    rows, columns = dense.shape[2:]
    q_len, kv_len = q_len or rows * block_size, kv_len or columns * block_size
    return BlockMap.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=block_size)


def draw(block_map, tmp_path, **options):
    """The picture's pixels: float [height, width, 3] in 0 … 1."""
    plot_heads(block_map, tmp_path / "map.png", **options)
    return torch.from_numpy(image.imread(tmp_path / "map.png"))[..., :3]


def panel(pixels, index, rows, columns, scale):
    """One pixel from the middle of each cell of a panel: [rows, columns, 3]."""
    left = LEFT + index * (columns * scale + GAP_X)
    cells = pixels[TOP : TOP + rows * scale, left : left + columns * scale]
    # every cell is one plain square
    squares = cells.reshape(rows, scale, columns, scale, 3).permute(0, 2, 1, 3, 4).flatten(2, 3)
    torch.testing.assert_close(squares, squares[:, :, :1].expand_as(squares), atol=0.01, rtol=0)
    return squares[:, :, 0]


def assert_colour(pixels, colour):
    assert pixels.numel()
    torch.testing.assert_close(pixels, torch.tensor(to_rgb(colour)).float().expand_as(pixels), atol=0.01, rtol=0)


def test_each_block_has_its_colour_in_its_heads_panel(tmp_path):
    dense = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = draw(make_map(dense), tmp_path, batch=1)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    for head in range(3):
        cells = panel(pixels, head, 8, 8, 64)
        assert_colour(cells[causal & dense[1, head]], KEPT)
        assert_colour(cells[causal & ~dense[1, head]], DROPPED)
        assert_colour(cells[~causal], "white")


def test_more_heads_than_columns_go_to_further_rows(tmp_path):
    one_row = draw(make_map(torch.ones(1, COLUMNS, 4, 4, dtype=torch.bool)), tmp_path)
    two_rows = draw(make_map(torch.ones(1, COLUMNS + 1, 4, 4, dtype=torch.bool)), tmp_path)
    assert two_rows.shape[1] == one_row.shape[1]
    assert two_rows.shape[0] > one_row.shape[0] + 512


def test_a_chunk_of_queries_keeps_its_offset(tmp_path):
    dense = torch.zeros(1, 1, 16, 32, dtype=torch.bool)
    cells = panel(draw(make_map(dense), tmp_path), 0, 16, 32, 16)
    causal = causal_blocks(16 * 16, 32 * 16, 16, "cpu")
    assert_colour(cells[causal], DROPPED)
    assert_colour(cells[~causal], "white")


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 5000), (200, 7680), (2000, 2000)])
def test_odd_lengths_are_drawn(tmp_path, q_len, kv_len):
    dense = torch.ones(1, 1, -(-q_len // 128), -(-kv_len // 128), dtype=torch.bool)
    pixels = draw(make_map(dense, block_size=128, q_len=q_len, kv_len=kv_len), tmp_path)
    assert_colour(pixels[TOP + 2, LEFT + 2], KEPT)


def test_a_large_map_is_averaged_and_not_sampled(tmp_path):
    blocks = 1025  # three blocks a side to a cell, and a last cell that is not full
    dense = torch.zeros(1, 1, blocks, blocks, dtype=torch.bool)
    dense[..., ::3] = True
    cells = panel(draw(make_map(dense), tmp_path), 0, 342, 342, 1)
    third = torch.lerp(torch.tensor(to_rgb(DROPPED)), torch.tensor(to_rgb(KEPT)), 1 / 3)
    below = torch.ones(342, 342, dtype=torch.bool).tril(-1)
    below[:, -1] = False
    assert_colour(cells[below], tuple(third.tolist()))
    assert_colour(cells[torch.ones(342, 342, dtype=torch.bool).triu(1)], "white")


def test_shares_are_over_the_causal_blocks_of_a_cell():
    kept = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    shares = kept_shares(kept, torch.ones(5, 5, dtype=torch.bool).tril(), 2)
    expected = torch.tensor([[2 / 3, torch.nan, torch.nan], [1 / 4, 2 / 3, torch.nan], [0, 0, 1]])
    torch.testing.assert_close(shares, expected, equal_nan=True)


@pytest.mark.parametrize("first, last", [(0, 1), (8, 9), (0, 7), (0, 16384), (7480, 7680), (0, 131073)])
def test_ticks_are_few_and_inside(first, last):
    ticks = token_ticks(first, last)
    assert 2 <= len(ticks) <= 5 and first <= ticks[0] and ticks[-1] <= last


def test_what_cannot_be_drawn_is_refused(tmp_path):
    block_map = make_map(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="block_map must be a BlockMap, got Tensor"):
        plot_heads(torch.ones(1, 2, 3, 3), tmp_path / "map.png")
    with pytest.raises(ValueError, match="batch must be one of 0 … 0, got 1"):
        plot_heads(block_map, tmp_path / "map.png", batch=1)
    with pytest.raises(ValueError, match="titles .* 2 heads, got 1"):
        plot_heads(block_map, tmp_path / "map.png", titles=["one"])
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FlexPrefillError, match=r"pip install 'flexprefill\[viz\]'"):
        plot_heads(make_map(torch.ones(1, 1, 1, 1, dtype=torch.bool)), tmp_path / "map.png")


def test_importing_plotting_does_not_import_matplotlib():
    code = "import sys, flexprefill.plotting, flexprefill.cli; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
