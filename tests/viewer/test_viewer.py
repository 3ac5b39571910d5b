import argparse
import base64
import json
import re
import shutil
import webbrowser
from pathlib import Path

import numpy as np
import pytest
import torch
from support.browser import block_centres, expected_blocks
from support.mask_files import pack_triangles, visible_blocks, write_mask_file
from support.viewer_files import CONFIG, lines_and_noise, write_masks

from flexprefill import BlockMap, FlexPrefillError, MaskFileError, PrefillConfig, load_masks, save_masks
from flexprefill.cli import view
from flexprefill.inspection import PATTERNS, block_patterns
from flexprefill.viewer import write_page

VERSION_1 = Path(__file__).parents[1] / "data" / "masks_v1.safetensors"
GAPS = 9  # pixels a block, from which on a line is left between blocks


# ---- the file format, written twice


def test_both_writers_write_the_same_maps(tmp_path, path, masks):
    loaded = load_masks(path)
    assert {number: block_map.to_dense().tolist() for number, block_map in loaded.items()} == {
        number: dense.tolist() for number, dense in masks.items()
    }
    save_masks(tmp_path / "saved", loaded, config=CONFIG, model="tiny-1B")
    ours, theirs = path.read_bytes(), (tmp_path / "saved").read_bytes()
    data = [whole[8 + int.from_bytes(whole[:8], "little") :] for whole in (ours, theirs)]
    assert data[0][:-8] == data[1][:-8]  # the last 8 bytes hold the header's checksum, and headers name versions


def test_both_writers_agree_on_an_odd_chunk(tmp_path):
    q_len, kv_len, block = 200, 777, 16
    dense = lines_and_noise(3, 49, 4, batch=2, rows=13)
    write_mask_file(tmp_path / "ours", {5: (pack_triangles(dense, q_len, kv_len, block), q_len, kv_len, block)})
    expected = BlockMap.from_dense(torch.from_numpy(dense), q_len=q_len, kv_len=kv_len, block_size=block)
    assert load_masks(tmp_path / "ours") == {5: expected}


# ---- the page as text


def test_the_page_has_everything_in_it(tmp_path, path):
    assert write_page(tmp_path / "page.html", [path]) == []
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert base64.b64encode(path.read_bytes()).decode() in page
    assert "default-src 'none'" in page
    for name in ("http://www.w3.org/2000/svg", "url(#"):  # a name and a place in a saved picture: nothing is asked for
        page = page.replace(name, "")
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|\bimport\b", page)
    assert "{{" not in page.replace("${{", "") and path.name in page


def test_a_file_above_the_limit_is_asked_for(tmp_path, path):
    size = path.stat().st_size
    assert write_page(tmp_path / "page.html", [path], embed_limit=size) == []
    (request,) = write_page(tmp_path / "page.html", [path], embed_limit=size - 1)
    assert request.startswith(f"masks.safetensors has {size:,} bytes, more than the {size - 1:,}")
    assert base64.b64encode(path.read_bytes()).decode() not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_is_no_mask_file_gets_no_page(tmp_path, path):
    (tmp_path / "text").write_text("not a mask file")
    output = tmp_path / "page.html"
    with pytest.raises(MaskFileError, match="text"):
        write_page(output, [path, tmp_path / "text"])
    with pytest.raises(MaskFileError, match="version 1, .*save it again with load_masks and save_masks"):
        write_page(output, [VERSION_1])
    with pytest.raises(ValueError, match="files must be one or two, got 3"):
        write_page(output, [path] * 3)
    with pytest.raises(TypeError, match="files must be a list of file names, got"):
        write_page(output, path)
    assert not output.exists()
    with pytest.raises(FlexPrefillError, match="output must be another file than the masks"):
        write_page(path, [path])
    assert load_masks(path)


def test_the_command_says_that_a_prompt_is_private(tmp_path, masks, capsys):
    file = write_masks(tmp_path / "text", masks, tokens=json.dumps(["a"] * 640))
    run_view(file, "--no-open", "--output", tmp_path / "page.html")
    assert f"{file} holds its prompt's text" in capsys.readouterr().out


def run_view(*arguments):
    parser = argparse.ArgumentParser()
    view.add_arguments(parser)
    return view.execute(parser.parse_args(list(map(str, arguments))))


def test_the_command_writes_and_opens_the_page(tmp_path, path, other, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or len(opened) > 1)
    monkeypatch.chdir(tmp_path)
    assert run_view(path) == 0
    assert opened == [(tmp_path / "masks.html").as_uri()]
    assert "no browser was found: open masks.html in one" in capsys.readouterr().out
    assert run_view(path, other, "--output", "both.html") == 0
    assert opened[1:] == [(tmp_path / "both.html").as_uri()]
    assert run_view(path, "--no-open", "--output", "quiet.html") == 0
    assert len(opened) == 2
    assert re.fullmatch(
        r"wrote both.html \([\d,]+ bytes\)\nwrote quiet.html \([\d,]+ bytes\)\n", capsys.readouterr().out
    )


# ---- drawn pixels


def test_the_whole_map_is_drawn_block_by_block(browser, path, masks):
    page = browser(path)
    causal = np.tri(40, dtype=bool)
    assert not np.array_equal(page.colour("kept"), page.colour("dropped"))
    for layer, head in ((0, 0), (2, 4)):
        page.ask(f"location.hash = 'layer={layer}&head={head}'")
        page.driver.execute_async_script("setTimeout(arguments[0])")  # until the browser has told the page
        page.settle()
        dense = masks[layer][0, head]
        assert np.array_equal(block_centres(page, 40, 40), expected_blocks(page, causal, (dense, "kept")))
    left, top, scale = page.view()
    assert (left, top) == (0, 0) and page.pixels().shape[0] == round(40 * scale)


def test_a_chunk_of_queries_in_a_batch_is_drawn(browser, tmp_path):
    q_len, kv_len, block = 200, 777, 16
    dense = lines_and_noise(3, 49, 4, batch=2, rows=13)
    seen = np.arange(49) < visible_blocks(q_len, kv_len, block)[:, None]
    file = tmp_path / "chunk.safetensors"
    write_mask_file(file, {5: (pack_triangles(dense, q_len, kv_len, block), q_len, kv_len, block)})
    page = browser(file, address="#layer=5&head=4")
    assert "layer 5, batch 1 head 1" in page.text("#pane-a figcaption")
    expected = expected_blocks(page, seen, (dense[1, 1] & seen, "kept"))
    assert np.array_equal(block_centres(page, 13, 49), expected)
    page.point_at(12, 48)
    assert "queries 769–776 (block 12) · keys 768–776 (block 48) · distance 0 blocks" in page.text("#readout")


@pytest.mark.parametrize("ratio", [1, 2])
def test_zoomed_in_every_block_is_a_crisp_square(browser, path, masks, ratio):
    metrics = {"width": 1100, "height": 800, "deviceScaleFactor": ratio, "mobile": False}
    page = browser(path)
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.settle().keys("+", "+", "+")
    left, top, scale = page.view()
    assert scale > 30 * ratio and left > 0 and top > 0
    pixels = page.pixels()
    height, width, _ = pixels.shape
    row, column = (
        np.floor(start + (np.arange(length + 1) + 0.5) / scale).astype(int)
        for start, length in ((top, height), (left, width))
    )
    gap = (np.diff(row) > 0)[:, None] | (np.diff(column) > 0)
    row, column = row[:-1, None], np.minimum(column[:-1], 40)
    inside = (column < 40) & (column <= row) & ~gap
    kept = masks[0][0, 0][row, np.minimum(column, 39)] & inside
    assert np.array_equal(pixels, expected_blocks(page, inside, (kept, "kept")))


def share_pixels(dense, left, top, scale, width, height):
    """The share of the causal blocks under each pixel that is kept: [height, width], NaN where there are none.

    Blocks count in squares of at most a pixel, each by the part of it that lies under the pixel.
    """
    side = 2 ** int(np.floor(np.log2(1 / scale)))

    def under(start, length, count):
        squares = np.arange(-(-count // side))
        low = (start + np.arange(length)[:, None] / scale) / side
        part = np.minimum(low + 1 / (scale * side), squares + 1) - np.maximum(low, squares)
        return np.repeat(part.clip(min=0), side, axis=1)[:, :count]

    rows, columns = dense.shape
    down, across = under(top, height, rows), under(left, width, columns)
    causal = np.arange(columns) <= np.arange(rows)[:, None]
    with np.errstate(invalid="ignore"):
        return (down @ dense @ across.T) / (down @ causal @ across.T)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "#zoom=1.27&left=100.3&top=333.3",
        "#zoom=2.1&left=11.7&top=700",
        "#zoom=1.27&left=100.3&top=333.3&compare=head&other=0.1&difference=1",
    ],
)
def test_pixels_over_many_blocks_show_the_share_that_is_kept(browser, tmp_path, address):
    dense = lines_and_noise(2, 1501, 3)
    page = browser(write_masks(tmp_path / "long", {0: dense}), address=address)
    view = page.view()
    assert view[2] < 1
    pixels = page.pixels()
    a, b = dense[0]
    inks = {"both": a & b, "onlyA": a & ~b, "onlyB": b & ~a} if "difference" in address else {"kept": a}
    expected = np.broadcast_to(page.colour("dropped"), pixels.shape).astype(float)
    for name, map_of_ink in inks.items():
        shares = share_pixels(map_of_ink.astype(float), *view, pixels.shape[1], pixels.shape[0])
        expected = expected + shares[..., None] * (page.colour(name) - page.colour("dropped"))
    empty = np.isnan(expected)
    assert 0.1 < empty.mean() < 0.9 and pixels[~empty].std() > 10  # a causal edge, and no plain area
    # a pixel that the causal edge only just touches, or does not, may be taken either way
    difference = np.abs(np.where(empty, page.colour("paper"), expected) - pixels).max(-1)
    assert (difference > 1).sum() <= 2


def test_the_heat_map_shows_each_heads_density(browser, path, masks):
    page = browser(path)
    pixels = page.pixels("#heat")
    causal = 40 * 41 / 2
    densities = {(layer, head): dense[0, head].sum() / causal for layer, dense in masks.items() for head in range(3)}
    densities |= {(2, head): masks[2][0, head].sum() / causal for head in (3, 4)}
    ramp = np.array(page.ask("return state.colours.ramp"))
    for (layer, head), density in densities.items():
        place = page.ask("return fp.heat.middleOf({ layer: arguments[0], column: arguments[1] })", layer, head)
        at = density / max(densities.values()) * (len(ramp) - 1)
        expected = [np.interp(at, np.arange(len(ramp)), ramp[:, channel]) for channel in range(3)]
        assert np.abs(pixels[int(place["y"]), int(place["x"])] - expected).max() <= 1
    assert page.text("#heat-most") == f"{100 * max(densities.values()):.1f} %"


# ---- two maps


def assert_differences_are_drawn(page, a, b):
    causal = np.tri(40, dtype=bool)
    both, only_a, only_b = (a & b, "both"), (a & ~b, "onlyA"), (b & ~a, "onlyB")
    assert only_a[0].any() and only_b[0].any()
    assert np.array_equal(block_centres(page, 40, 40, "a"), expected_blocks(page, causal, both, only_a))
    assert np.array_equal(block_centres(page, 40, 40, "b"), expected_blocks(page, causal, both, only_b))
    shares = [
        f"{name} {100 * dense.sum() / causal.sum():.1f} %"
        for dense, name in ((both[0], "both"), (only_a[0], "only A"), (only_b[0], "only B"))
    ]
    assert all(share in page.text("#legend") for share in shares)
    page.keys("d")
    assert np.array_equal(block_centres(page, 40, 40, "a"), expected_blocks(page, causal, both, only_a, only_b))
    assert not page.find("#pane-b").is_displayed()
    assert page.find("#difference").get_attribute("aria-pressed") == "true"
    page.keys("d")
    assert page.find("#pane-b").is_displayed()


def test_a_second_file_is_drawn_beside_the_first(browser, path, other, masks):
    page = browser(path, other)
    second = load_masks(other)[0].to_dense().numpy()
    assert_differences_are_drawn(page, masks[0][0, 0], second[0, 0])
    row, column = np.argwhere(masks[0][0, 0] & ~second[0, 0])[0]
    page.point_at(row, column, slot=1)
    assert re.search(r"· A kept, \w+ · B dropped$", page.text("#readout"))
    page.keys("]")  # B follows
    assert [page.ask(f"return state.chosen[{slot}].column") for slot in (0, 1)] == [1, 1]
    assert page.text("#legend").endswith("neither") and "only A 0.0 %" in page.text("#legend")


def test_heads_that_differ_between_the_files_are_marked(browser, path, other):
    page = browser(path, other)
    pixels, mark = page.pixels("#heat"), page.colour("cursor")
    cell = page.ask("return fp.heat.cell")
    for layer, head, differs in ((0, 0, True), (0, 1, False), (2, 0, False)):
        place = page.ask("return fp.heat.middleOf({ layer: arguments[0], column: arguments[1] })", layer, head)
        corner = pixels[int(place["y"] - cell / 2 + 3), int(place["x"] + cell / 2 - 3)]
        assert np.array_equal(corner, mark) == differs


def test_another_head_of_the_file_is_chosen_on_the_heat_map(browser, path, masks):
    from selenium.webdriver import ActionChains, Keys

    page = browser(path)

    def click(layer, column, *held):
        place = page.ask("return fp.heat.middleOf({ layer: arguments[0], column: arguments[1] })", layer, column)
        page.move_to("#heat", place["x"], place["y"])
        chain = ActionChains(page.driver)
        for key in held:
            chain.key_down(key)
        chain.click()
        for key in held:
            chain.key_up(key)
        chain.perform()
        page.settle()

    click(2, 3)
    assert page.find("#layer-a").get_attribute("value") == "2" and page.find("#head-a").get_attribute("value") == "3"
    click(2, 1, Keys.SHIFT)
    assert_differences_are_drawn(page, masks[2][0, 3], masks[2][0, 1])
    click(0, 0)  # B, of the same file, stays
    assert page.find("#layer-b").get_attribute("value") == "2"


def test_maps_of_other_lengths_are_shown_without_differences(browser, tmp_path, path, masks):
    dense = lines_and_noise(2, 30, 5)
    page = browser(path, write_masks(tmp_path / "short", {0: dense}))
    assert "A and B have other lengths: no differences" in page.text("#legend")
    assert not page.find("#difference").is_enabled()
    expected = expected_blocks(page, np.tri(30, dtype=bool), (dense[0, 0], "kept"))
    assert np.array_equal(block_centres(page, 30, 30, "b"), expected)


# ---- pointing, keys, address


def test_pointing_at_a_block_names_it(browser, path, masks):
    page = browser(path)
    patterns = block_patterns(
        BlockMap.from_dense(torch.from_numpy(masks[0]), q_len=640, kv_len=640, block_size=16), 0, config=CONFIG
    )
    kept = np.argwhere(masks[0][0, 0])
    for row, column in [(39, 0), (20, 19), *kept[:: len(kept) // 5]]:
        page.point_at(row, column)
        assert page.text("#readout") == (
            f"queries {16 * row}–{16 * row + 15} (block {row}) · keys {16 * column}–{16 * column + 15} "
            f"(block {column}) · distance {row - column} blocks ({16 * (row - column)} tokens) · "
            f"kept, {PATTERNS[patterns[row, column] - 1]}"
        )
    row, column = np.argwhere(~masks[0][0, 0] & np.tri(40, dtype=bool))[0]
    page.point_at(row, column)
    assert page.text("#readout").endswith("· dropped")
    page.point_at(3, 30)
    assert page.text("#readout").startswith("Point at a block")


@pytest.mark.parametrize("config", [CONFIG, PrefillConfig(last_full_blocks=3), None])
def test_patterns_are_those_of_the_library(browser, tmp_path, config):
    page = None
    for seed, (q_len, kv_len) in enumerate(
        [(640, 640), (200, 777), (470, 479), (16, 16), (5, 700), (192, 192), (180, 190)]
    ):
        rows, columns = -(-q_len // 16), -(-kv_len // 16)
        dense = lines_and_noise(1, columns, seed, rows=rows)
        dense[0, 0, -1] = True
        if columns == 12:  # lines about as short as a line may be, and about half kept
            dense[0, 0] |= np.random.default_rng(seed).random((rows, columns)) < 0.5
        file = tmp_path / f"{seed}.safetensors"
        settings = config and config.to_dict()
        write_mask_file(file, {0: (pack_triangles(dense, q_len, kv_len, 16), q_len, kv_len, 16)}, config=settings)
        page = page.choose_file(file) if page else browser(file)
        theirs = page.ask(
            "const [{ map, patterns }] = state.heads; const found = [];"
            "map.forEach((row, column) => found.push([row, column, patterns.classOf(row, column)]));"
            "return found;"
        )
        codes = block_patterns(load_masks(file)[0], 0, config=config)
        ours = [[*place, PATTERNS[codes[tuple(place)] - 1]] for place in codes.nonzero().tolist()]
        assert theirs == ours
        listed = page.text("#patterns")
        assert page.ask("return state.heads[0].patterns.counts") == {
            pattern: sum(name == pattern for *_, name in ours) for pattern in PATTERNS
        }
        if dense[0, 0].sum() == visible_blocks(q_len, kv_len, 16).sum():
            assert listed == "dense: keeps every block"
            continue
        for pattern in PATTERNS:
            share = sum(name == pattern for *_, name in ours) / len(ours)
            assert f"{pattern} {100 * share:.1f} %" in listed


def test_keys_move_zoom_and_choose(browser, path):
    from selenium.webdriver import ActionChains, Keys

    page = browser(path)
    chosen = lambda: page.ask("return [state.chosen[0].layer, state.chosen[0].column]")  # noqa: E731
    for key, expected in (
        ("]", [0, 1]),
        ("]", [0, 2]),
        ("]", [0, 2]),
        ("}", [2, 2]),
        ("}", [2, 2]),
        ("[", [2, 1]),
        ("{", [0, 1]),
    ):
        assert chosen() != expected or key in "]}"
        page.keys(key)
        assert chosen() == expected and f"layer {expected[0]}, head {expected[1]}" in page.text("#pane-a figcaption")
    whole = page.view()
    page.keys("+", "+", "+")
    zoomed = page.view()
    assert zoomed[2] == pytest.approx(1.5**3 * whole[2])
    page.keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    moved = page.view()
    assert moved[0] < zoomed[0] and moved[1] < zoomed[1] and moved[2] == zoomed[2]
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert page.view() == pytest.approx(zoomed)
    page.keys("-")
    assert page.view()[2] == pytest.approx(1.5**2 * whole[2])
    page.keys("0")
    assert page.view() == whole
    for key in (Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, "-"):  # nothing more to see there
        page.keys(key)
        assert page.view() == whole
    page.keys("?")
    assert page.find("#help-dialog").is_displayed()
    page.keys("]", Keys.ESCAPE)
    assert not page.find("#help-dialog").is_displayed() and chosen() == [0, 1]
    for _ in range(3):
        ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_DOWN).key_up(Keys.SHIFT).perform()
    assert page.text("#readout").startswith("queries 32–47 (block 2) · keys 0–15 (block 0)")


def test_tab_reaches_everything_and_everything_has_a_name(browser, tmp_path, masks, other):
    tokens = json.dumps(["a"] * 640)
    page = browser(write_masks(tmp_path / "text", masks, tokens=tokens), other)
    reached = []
    for _ in range(34):
        page.driver.switch_to.active_element  # noqa: B018
        page.keys("\t")
        reached.append(page.driver.switch_to.active_element)
    labels = {
        element.get_attribute("id") or element.get_attribute("class"): element.accessible_name
        for element in reached
        if element.tag_name != "body"
    }
    assert set(labels) >= {
        "open-a",
        "open-b",
        "theme",
        "help",
        "heat",
        "layer-a",
        "head-a",
        "layer-b",
        "head-b",
        "compare",
        "zoom-out",
        "zoom-in",
        "fit",
        "difference",
        "map",
        "heat-by",
        "save",
        "search",
        "found-before",
        "found-next",
        "query-text",
        "key-text",
        "filter",
        "sort",
        "thumb",
    }
    assert all(labels.values())
    from selenium.webdriver import Keys

    page.ask("document.getElementById('heat').focus()")
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert page.ask("return [state.chosen[0].layer, state.chosen[0].column]") == [2, 1]


def test_wheel_and_drag_keep_the_block_under_the_pointer(browser, path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    page = browser(path)
    canvas = page.find("#pane-a canvas.map")
    page.point_at(20, 10)
    under = page.text("#readout")
    place = page.ask("return fp.middleOf(0, { row: 20, column: 10 })")
    box = canvas.rect
    from_middle = [round(place[axis] - box[side] / 2) for axis, side in (("x", "width"), ("y", "height"))]
    origin = ScrollOrigin.from_element(canvas, *from_middle)
    ActionChains(page.driver).scroll_from_origin(origin, 0, -600).perform()
    page.settle()
    assert page.view()[2] > 2 * 10 and "block 20" in under
    page.move_to("#pane-a canvas.map", place["x"] + 1, place["y"] + 1)
    assert page.text("#readout") == under
    ActionChains(page.driver).click_and_hold().move_by_offset(-60, -40).release().perform()
    page.settle()
    page.move_to("#pane-a canvas.map", place["x"] - 60, place["y"] - 40)
    assert page.text("#readout") == under


def test_the_address_keeps_head_zoom_and_comparison(browser, path):
    page = browser(path, address="#layer=2&head=3&zoom=3&left=10&top=12&compare=head&other=0.1&difference=1&theme=dark")
    state = "return [state.chosen, state.compare, state.difference, document.documentElement.style.colorScheme]"
    shown = [[{"layer": 2, "column": 3}, {"layer": 0, "column": 1}], "head", True, "dark"]
    assert page.ask(state) == shown
    page.keys("+", "[")
    address, view = page.driver.current_url, page.view()
    again = page.open(Path(address.split("#")[0].removeprefix("file://")), "#" + address.split("#")[1])
    assert again.view() == pytest.approx(view, abs=0.01) and again.ask(state)[0][0] == {"layer": 2, "column": 2}
    nonsense = browser(path, address="#layer=77&head=x&zoom=-3&left=1e9&compare=file&other=9.9")
    assert nonsense.ask("return [state.chosen[0], state.compare]") == [{"layer": 0, "column": 0}, "nothing"]


def test_light_and_dark_follow_the_system_and_the_button(browser, path, masks):
    page = browser(path)
    causal = np.tri(40, dtype=bool)

    def look(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.settle()
        assert np.array_equal(block_centres(page, 40, 40), expected_blocks(page, causal, (masks[0][0, 0], "kept")))
        return page.colour("paper").mean()

    light, dark = look("light"), look("dark")
    assert dark < 60 < 200 < light
    page.find("#theme").click()
    assert look("dark") == light
    page.find("#theme").click()
    assert look("light") == dark


# ---- files that are dropped or chosen


def test_70_megabytes_open_by_slices(browser, tmp_path):
    blocks, heads = 2048, 280
    size = blocks * 128
    dense = lines_and_noise(1, blocks, 6)
    dense[..., :8] = True
    one = pack_triangles(dense, size, size, 128)
    triangles = np.repeat(one, heads, axis=1)
    triangles[0, 0] = 0
    file = tmp_path / "large.safetensors"
    write_mask_file(file, {0: (triangles, size, size, 128)})
    assert file.stat().st_size > 70e6
    page = browser(file)
    assert "large.safetensors has" in page.text("#wanted") and not page.find("#viewer").is_displayed()
    page.choose_file(file)
    assert page.ask("return state.message") == "" and page.find("#viewer").is_displayed()
    assert np.array_equal(page.pixels()[-2, 0], page.colour("dropped"))
    page.keys("]")
    assert np.array_equal(page.pixels()[-2, 0], page.colour("kept"))
    assert page.ask("return state.files[0].bytesRead") < 600_000


def test_dropped_files_are_shown_side_by_side(browser, path, other):
    page = browser(path, other, embed_limit=0)
    names = page.ask("return document.getElementById('wanted').textContent")
    assert path.name in names and other.name in names
    files = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in (other, path)]
    page.ask(
        "const dropped = new DataTransfer();"
        "for (const [name, text] of arguments[0])"
        "  dropped.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));"
        "const how = { dataTransfer: dropped, bubbles: true, cancelable: true };"
        "document.body.dispatchEvent(new DragEvent('drop', how));",
        files,
    )
    page.settle()
    assert page.text("#title") == "masks.safetensors ↔ other.safetensors"
    assert page.find("#pane-b").is_displayed()


def test_a_second_file_above_the_limit_is_asked_for_beside_the_first(browser, path, tmp_path):
    large = write_masks(tmp_path / "large", {0: lines_and_noise(60, 40, 8)})
    page = browser(path, large, embed_limit=path.stat().st_size)
    assert page.find("#pane-a").is_displayed() and page.text("#wanted-b").startswith("large has")
    page.choose_file(large, "b")
    assert page.find("#pane-b").is_displayed() and page.text("#wanted-b") == ""
    page = browser(large, path, embed_limit=path.stat().st_size)
    assert page.text("#wanted").startswith("large has") and not page.find("#viewer").is_displayed()
    page.choose_file(large)
    assert page.text("#title") == "large ↔ masks.safetensors"


def flipped(whole, at):
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


def test_a_wrong_file_is_refused_and_says_why(browser, tmp_path, path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    scoring = whole.index(b"flashprefill-v1")
    tables = 8 * 8 + 8  # density and crc32 of eight heads, and the checksums
    wrong = {
        "empty": (b"", "no mask file, or cut short"),
        "text": (b"this is not a mask file at all, but some text", "no safetensors file"),
        "start": (whole[: header - 5], "cut short"),
        "most": (whole[:-1], f"is cut short: its header asks for {len(whole):,} bytes, and it has {len(whole) - 1:,}"),
        "long": (whole + b"\0", "is too long"),
        "name": (flipped(whole, scoring), "its header does not match its checksum"),
        "tables": (flipped(whole, len(whole) - tables), "its tables do not match their checksum"),
        "sums": (flipped(whole, len(whole) - 1), "its tables do not match their checksum"),
        "map": (flipped(whole, header), "layer 0, head 0 does not match its checksum"),
        "json": (whole[:8] + b"[" + whole[9:], "its header is no JSON"),
        "newer": (whole.replace(b'"format_version": "2"', b'"format_version": "3"'), "has format version 3"),
        "shape": (whole.replace(b"[1, 3, ", b"[3, 1, "), "layer.0 should be"),
        "weights": (whole.replace(b"flexprefill-masks", b"flexprefill-parts"), "not one of masks"),
    }
    page = browser(path)
    drawn = block_centres(page, 40, 40)
    for name, (content, reason) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MaskFileError):  # the library refuses what the page refuses
            load_masks(tmp_path / name)
        page.choose_file(tmp_path / name)
        assert page.text("#message").startswith(name) and reason in page.text("#message"), name
        if name == "map":  # opens, since the head alone is damaged: that one is not shown, another is
            assert not page.find("#pane-a").is_displayed()
            page.keys("]")
            assert page.find("#pane-a").is_displayed() and page.ask("return state.message") == ""
            page.choose_file(path).keys("[")
        assert np.array_equal(block_centres(page, 40, 40), drawn), name
    shutil.copy(VERSION_1, tmp_path / "old")
    page.choose_file(tmp_path / "old")
    assert "old has format version 1" in page.text("#message")
    assert "save it again with load_masks and save_masks" in page.text("#message")
    page.choose_file(path)
    assert not page.find("#message").is_displayed()


def test_odd_names_are_text(browser, tmp_path, path):
    odd = path.rename(tmp_path / "a<!--<script>alert(1)&{{style}}.safetensors")
    page = browser(odd)
    assert page.text("#title") == odd.name and page.driver.title == odd.name
    assert json.loads(page.ask("return document.getElementById('files').textContent"))[0]["name"] == odd.name
