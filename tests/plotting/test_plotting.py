import base64
import io
import re
import subprocess
import sys

import pytest
import torch

from flexprefill import BlockMap, FlexPrefillError
from flexprefill.blockmap.cells import kept_shares
from flexprefill.blockmap.geometry import Geometry, causal_blocks
from flexprefill.blockmap.html import DROPPED, KEPT, MAX_PANELS
from flexprefill.plotting import (
    TimeLine,
    TradeOffPoint,
    plot_difference,
    plot_heads,
    plot_layers,
    plot_times,
    plot_trade_off,
)
from flexprefill.plotting import layers as layer_plots
from flexprefill.plotting.canvas import COLUMNS, GAP_X, LEFT, TOP, token_label, token_ticks
from flexprefill.plotting.difference import BOTH, ONLY_FIRST, ONLY_SECOND

image = pytest.importorskip("matplotlib.image")
to_rgb = pytest.importorskip("matplotlib.colors").to_rgb


def make_map(dense, *, block_size=16, q_len=None, kv_len=None):
    rows, columns = dense.shape[2:]
    q_len, kv_len = q_len or rows * block_size, kv_len or columns * block_size
    return BlockMap.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=block_size)


def draw(block_map, tmp_path, **options):
    """The picture's pixels: float [height, width, 3] in 0 … 1."""
    plot_heads(block_map, tmp_path / "map.png", **options)
    return read(tmp_path / "map.png")


def read(path):
    return torch.from_numpy(image.imread(path))[..., :3]


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
    cells = panel(draw(make_map(dense), tmp_path), 0, 16, 32, 32)
    causal = causal_blocks(Geometry(16 * 16, 32 * 16, 16), "cpu")
    assert_colour(cells[causal], DROPPED)
    assert_colour(cells[~causal], "white")


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 5000), (200, 7680), (2000, 2000)])
def test_odd_lengths_are_drawn(tmp_path, q_len, kv_len):
    dense = torch.ones(1, 1, -(-q_len // 128), -(-kv_len // 128), dtype=torch.bool)
    pixels = draw(make_map(dense, block_size=128, q_len=q_len, kv_len=kv_len), tmp_path)
    assert_colour(pixels[TOP + 2, LEFT + 2], KEPT)


@pytest.mark.parametrize("heads, factor", [(1, 3), (2, 6)])
def test_a_large_map_is_averaged_and_not_sampled(tmp_path, heads, factor):
    blocks = 3070  # the last cell is not full
    dense = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool)
    dense[..., ::3] = True
    cells_a_side = -(-blocks // factor)
    cells = panel(draw(make_map(dense), tmp_path), heads - 1, cells_a_side, cells_a_side, 1)
    shade = torch.lerp(torch.tensor(to_rgb(DROPPED)), torch.tensor(to_rgb(KEPT)), (1 / 3) ** 0.5)
    below = torch.ones(cells_a_side, cells_a_side, dtype=torch.bool).tril(-1)
    assert_colour(cells[below], tuple(shade.tolist()))
    assert_colour(cells[torch.ones(cells_a_side, cells_a_side, dtype=torch.bool).triu(1)], "white")


@pytest.mark.parametrize("blocks, factor", [(8, 1), (1030, 2)])
def test_a_difference_has_its_colour_at_its_place(tmp_path, blocks, factor):
    generator = torch.Generator().manual_seed(0)
    cells = blocks // factor
    first, second = (torch.rand(2, 1, cells, cells, generator=generator) < 0.5 for _ in range(2))
    grown = [x.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for x in (first, second)]
    plot_difference(*(make_map(dense) for dense in grown), tmp_path / "map.png", names=("old", "new"), batch=1)
    found = panel(read(tmp_path / "map.png"), 0, cells, cells, max(1, round(1024 / cells)))
    first, second = first[1, 0], second[1, 0]
    causal = torch.ones(cells, cells, dtype=torch.bool).tril()
    assert_colour(found[causal & first & second], BOTH)
    assert_colour(found[causal & first & ~second], ONLY_FIRST)
    assert_colour(found[causal & second & ~first], ONLY_SECOND)
    assert_colour(found[causal & ~second & ~first], DROPPED)
    assert_colour(found[~causal], "white")


def test_one_differing_block_of_a_large_map_is_seen(tmp_path):
    dense = torch.zeros(1, 2, 2048, 2048, dtype=torch.bool)
    more = dense.clone()
    more[0, 1, 1001, 402] = True
    plot_difference(make_map(dense), make_map(more), tmp_path / "map.png")
    pixels = read(tmp_path / "map.png")
    for head in range(2):
        found = panel(pixels, head, 512, 512, 1)
        other = ((found - torch.tensor(to_rgb(DROPPED))).abs().amax(-1) > 0.1).tril(-1).nonzero().tolist()
        assert other == ([[1001 // 4, 402 // 4]] if head == 1 else [])


def test_shares_by_layer_and_head_have_the_scales_colours(tmp_path):
    values = {4: torch.tensor([0.0, 0.05, 0.1]), 2: torch.tensor([0.1, 0.0]).double()}
    plot_layers(values, tmp_path / "layers.png", label="density")
    cell, left, top = layer_plots.MAX_CELL, LEFT, layer_plots.LAYERS_TOP
    pixels = read(tmp_path / "layers.png")[top : top + 2 * cell, left : left + 3 * cell]
    found = pixels[cell // 2 :: cell, cell // 2 :: cell]
    assert_colour(found[0, 0], layer_plots.SCALE[-1])  # layer 2 is above layer 4
    assert_colour(torch.stack([found[0, 1], found[1, 0]]), layer_plots.SCALE[0])
    assert_colour(found[0, 2], "white")
    assert_colour(found[1, 2], layer_plots.SCALE[-1])
    assert found[1, 2].mean() < found[1, 1].mean() < found[1, 0].mean()


@pytest.mark.parametrize("layers, heads", [(1, 1), (1, 64), (80, 2), (64, 128)])
def test_any_number_of_layers_and_heads_is_drawn(tmp_path, layers, heads):
    plot_layers({layer: torch.full((heads,), 0.5) for layer in range(layers)}, tmp_path / "l.png", label="density")
    assert read(tmp_path / "l.png").shape[0] > 8 * layers


def test_shares_are_over_the_causal_blocks_of_a_cell():
    kept = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    shares = kept_shares(kept, torch.ones(5, 5, dtype=torch.bool).tril(), 2)
    expected = torch.tensor([[2 / 3, torch.nan, torch.nan], [1 / 4, 2 / 3, torch.nan], [0, 0, 1]])
    torch.testing.assert_close(shares, expected, equal_nan=True)


@pytest.mark.parametrize("first, last", [(0, 1), (8, 9), (0, 7), (0, 16384), (7480, 7680), (0, 131073)])
def test_ticks_are_few_and_inside(first, last):
    ticks = token_ticks(first, last)
    assert 2 <= len(ticks) <= 5 and first <= ticks[0] and ticks[-1] <= last


def test_labels_are_short():
    assert [token_label(tokens) for tokens in (0, 1000, 1024, 262144, 1048576, 1572864)] == [
        "0", "1000", "1K", "256K", "1M", "1536K",
    ]  # fmt: skip


def html_panels(html):
    """The pictures in a map's HTML: float [height, width, 4] in 0 … 1 each."""
    found = re.findall(r"src='data:image/png;base64,([^']+)'", html)
    return [torch.from_numpy(image.imread(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_a_notebook_shows_each_heads_blocks():
    dense = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    block_map = make_map(dense, q_len=120, kv_len=180)
    html = block_map._repr_html_()
    assert "2 × 3 heads of 8 × 12 blocks, 180 tokens, the last 120 as queries" in html
    assert f"batch 1, head 2, {100 * block_map.density()[1, 2].item():.1f} %" in html
    causal, kept = causal_blocks(Geometry(120, 180, 16), "cpu"), block_map.to_dense()
    panels = html_panels(html)
    assert len(panels) == 6
    for index, pixels in enumerate(panels):
        assert pixels.shape == (8, 12, 4)
        assert (pixels[..., 3] == causal.float()).all()
        blocks = kept[index // 3, index % 3]
        assert_colour(pixels[blocks][:, :3], KEPT)
        assert_colour(pixels[causal & ~blocks][:, :3], DROPPED)


def test_a_notebook_shows_a_large_map_reduced_and_says_so():
    dense = torch.zeros(1, MAX_PANELS + 1, 500, 500, dtype=torch.bool)
    dense[0, 1, 403, 7] = True
    html = make_map(dense)._repr_html_()
    assert "4 × 4 blocks" in html and "the first 16 of 17 heads are shown" in html
    panels = html_panels(html)
    assert len(panels) == MAX_PANELS and panels[0].shape == (125, 125, 4)
    darker = ((panels[1] - panels[0]).abs()[..., :3].sum(-1) > 0.1).nonzero().tolist()
    assert darker == [[100, 1]]
    assert len(html) < 500_000


def test_a_map_without_data_is_shown_by_its_repr():
    block_map = make_map(torch.ones(1, 1, 3, 3, dtype=torch.bool)).to("meta")
    assert block_map._repr_html_() is None
    assert "device='meta'" in repr(block_map)


@pytest.mark.gpu
def test_a_notebook_shows_a_map_on_the_device():
    block_map = make_map(torch.rand(1, 2, 20, 20) < 0.3)
    assert block_map.to("cuda")._repr_html_() == block_map._repr_html_()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    block_map = make_map(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="block_map must be a BlockMap, got Tensor"):
        plot_heads(torch.ones(1, 2, 3, 3), tmp_path / "map.png")
    with pytest.raises(ValueError, match="batch must be one of 0 … 0, got 1"):
        plot_heads(block_map, tmp_path / "map.png", batch=1)
    with pytest.raises(ValueError, match="titles .* 2 heads, got 1"):
        plot_heads(block_map, tmp_path / "map.png", titles=["one"])
    with pytest.raises(ValueError, match="maps of one shape and length"):
        plot_difference(block_map, make_map(torch.ones(1, 1, 3, 3, dtype=torch.bool)), tmp_path / "map.png")
    with pytest.raises(ValueError, match="values must hold at least one layer"):
        plot_layers({}, tmp_path / "map.png", label="density")
    with pytest.raises(TypeError, match=r"values\[3\] must be a float tensor \[H\], got torch.float32 \[1, 2\]"):
        plot_layers({3: torch.ones(1, 2)}, tmp_path / "map.png", label="density")
    with pytest.raises(ValueError, match=r"values\[3\] must be shares in 0 … 1, got 0 … 2"):
        plot_layers({3: torch.tensor([0.0, 2.0])}, tmp_path / "map.png", label="density")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FlexPrefillError, match=r"pip install 'flexprefill\[viz\]'"):
        plot_heads(make_map(torch.ones(1, 1, 1, 1, dtype=torch.bool)), tmp_path / "map.png")


def test_importing_plotting_does_not_import_matplotlib_and_a_notebook_needs_none():
    code = (
        "import sys, flexprefill.plotting, flexprefill.cli; print('matplotlib' in sys.modules); "
        "sys.modules['matplotlib'] = None; from flexprefill import BlockMap; "
        "print(len(BlockMap.causal(1, 1, q_len=4, kv_len=4, block_size=2)._repr_html_()) > 100)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]


# axes of the caller's


@pytest.fixture
def pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def random_map(blocks=12, heads=2, seed=0):
    return make_map(torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.5)


POINTS = [TradeOffPoint("", length, "exact", 0.5, 90, (80, 95)) for length in ("4K", "8K")]
PLOTS = {  # how each is called, and how many axes it has; None: one, which is no list
    "heads": (lambda *path, **ax: plot_heads(random_map(), *path, **ax), 2),
    "averaged heads": (lambda *path, **ax: plot_heads(random_map(1030, 1), *path, **ax), 1),
    "difference": (lambda *path, **ax: plot_difference(random_map(), random_map(seed=1), *path, **ax), 2),
    "layers": (lambda *path, **ax: plot_layers({0: torch.rand(40), 3: torch.rand(9)}, *path, label="x", **ax), None),
    "times": (lambda *path, **ax: plot_times([TimeLine("a", "part", {4: 1.0, 8: 3.0})], *path, title="t", **ax), None),
    "trade-off": (lambda *path, **ax: plot_trade_off(POINTS, *path, title="t", value_label="v", **ax), 2),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_take_and_return_axes(name, pyplot, tmp_path):
    draw_it, count = PLOTS[name]
    _, axes = pyplot.subplots(1, count or 1, squeeze=False)
    given = axes[0, 0] if count is None else axes
    found = draw_it(ax=given)
    assert found is given if count is None else found == list(axes.flat)
    assert all(panel.has_data() for panel in axes.flat) and len(pyplot.get_fignums()) == 1
    axes[0, 0].figure.canvas.draw()

    own = draw_it()  # in pyplot's own new figure
    first = own if count is None else own[0]
    assert len(pyplot.get_fignums()) == 2 and first.figure is pyplot.gcf() and first.has_data()
    assert not list(tmp_path.iterdir())

    saved = draw_it(tmp_path / "map.png")
    assert len(pyplot.get_fignums()) == 2 and (tmp_path / "map.png").stat().st_size > 1000
    assert type(saved) is type(own)
    draw_it(tmp_path / "mine.png", ax=given)
    assert read(tmp_path / "mine.png").shape[:2] == (480, 640)

    for wrong, error in (
        (3, TypeError),
        ("ax", TypeError),
        ([axes[0, 0], 1], TypeError),
        ([axes[0, 0]] * 3, ValueError),
    ):
        with pytest.raises(error, match="^ax must be"):
            draw_it(ax=wrong)


def test_maps_in_the_callers_axes_are_in_tokens_and_say_what_colours_mean(pyplot):
    _, axes = pyplot.subplots()
    plot_heads(random_map(12, 1), ax=axes, titles=["mine"])
    assert axes.get_xlabel() == "key token" and axes.get_title().startswith("mine, ")
    assert axes.get_xlim() == (0, 192) and axes.get_ylim() == (192, 0)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kept block", "dropped block"]
