"""What the page tells of a file besides its maps: text, names, patterns, totals, differences; what it saves; phones."""

import base64
import csv
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from support.browser import block_centres, expected_blocks
from support.mask_files import pack_triangles, write_mask_file
from support.viewer_files import CONFIG, lines_and_noise, write_masks

from flexprefill import load_masks, save_masks
from flexprefill.inspection import PATTERNS, block_patterns, compare_maps, summarize_heads
from flexprefill.plotting.difference import BOTH, ONLY_FIRST, ONLY_SECOND
from flexprefill.store.figures import RECALL_ENTRY

HOSTILE = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
WORDS = [f" word{place}" for place in range(640)]


def with_tokens(path, masks, tokens, **metadata):
    return write_masks(path, masks, config=CONFIG.to_dict(), tokens=json.dumps(tokens), **metadata)


# ---- the prompt's text


def test_the_text_of_the_block_under_the_pointer_is_shown(browser, tmp_path, path, masks):
    page = browser(with_tokens(tmp_path / "text", masks, WORDS))
    page.point_at(20, 7)
    shown = [
        page.ask("return document.getElementById(arguments[0]).textContent", name)
        for name in ("query-text", "key-text")
    ]
    assert shown == ["".join(WORDS[320:336]), "".join(WORDS[112:128])]
    assert "in the file: private" in page.text("#facts")
    page.choose_file(path)  # which has no text
    assert not page.find("#texts").is_displayed() and not page.find("#search").is_displayed()
    assert "not in the file" in page.text("#facts")


def test_the_text_of_a_chunk_is_that_of_its_queries(browser, tmp_path):
    sizes, dense = (200, 777, 16), lines_and_noise(2, 49, 4, rows=13)
    words = [f"{place} " for place in range(777)]
    file = tmp_path / "chunk"
    write_mask_file(file, {0: (pack_triangles(dense, *sizes), *sizes)}, tokens=json.dumps(words))
    page = browser(file)
    page.point_at(12, 48)
    assert page.text("#query-text").split() == list(map(str, range(769, 777)))
    assert page.text("#key-text").split() == list(map(str, range(768, 777)))
    page.search("600 ")
    assert page.ask("return state.found") == {"keys": [37], "queries": [1], "tokens": [600]}


def test_a_search_marks_blocks_and_goes_from_match_to_match(browser, tmp_path, masks):
    words = WORDS.copy()
    words[100], words[101], words[500], words[527], words[528] = "The nee", "DLE here", "a needle, Needle", "need", "LE"
    page = browser(with_tokens(tmp_path / "text", masks, words))
    picture = "return fp.panes[0].frame.toDataURL()"
    plain = page.ask(picture)
    page.search("needle")
    assert page.ask("return state.found") == {
        "keys": [6, 31, 32, 33],
        "queries": [6, 31, 32, 33],
        "tokens": [100, 500, 500, 527],
    }
    assert page.text("#found") == "4 in 4 blocks"
    assert page.ask(picture) != plain
    for block, number in ((6, 1), (31, 2), (31, 3), (32, 4), (6, 1)):
        page.keys("\n")
        assert page.ask("return state.cursor") == {"row": block, "column": block}
        assert page.text("#found") == f"{number} of 4 in 4 blocks"
    page.find("#found-before").click()
    page.settle()
    assert page.text("#found") == "4 of 4 in 4 blocks" and page.text("#key-text").endswith("need")
    page.find("#search").click()
    page.keys("]")  # a key of the map is a character here
    assert page.text("#found") == "not found" and page.ask("return state.chosen[0].column") == 0
    assert "needle" not in page.driver.current_url


def test_the_text_stands_beside_one_map_and_below_two(browser, tmp_path, masks, other):
    page = browser(with_tokens(tmp_path / "text", masks, WORDS), other)
    page.point_at(20, 7)
    edges = (
        "const [map, text] = ['panes', 'texts'].map((id) => document.getElementById(id).getBoundingClientRect());"
        "return [text.left >= map.right, text.top >= map.bottom];"
    )
    assert page.ask(edges) == [False, True]
    page.keys("d")
    assert page.ask(edges) == [True, False] and page.text("#query-text").split() == "".join(WORDS[320:336]).split()
    page.keys("d")
    assert page.ask(edges) == [False, True]


def test_a_damaged_head_of_a_file_with_text_is_named_alone(browser, tmp_path, masks):
    file = with_tokens(tmp_path / "text", masks, WORDS)
    whole = file.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:first] + bytes([whole[first] ^ 1]) + whole[first + 1 :])
    page = browser(file)
    assert "layer 0, head 0 does not match its checksum" in page.text("#message")
    assert not page.find("#texts").is_displayed()
    page.keys("]")
    page.point_at(20, 7)
    assert page.text("#message") == "" and page.find("#texts").is_displayed()


def test_a_files_words_are_shown_as_text_and_run_nothing(browser, tmp_path):
    loaded = load_masks(write_masks(tmp_path / "plain", {0: lines_and_noise(2, 40, 1)}))
    file = tmp_path / "hostile.safetensors"
    metadata = {"heads": f"{HOSTILE}, =1+1", HOSTILE: HOSTILE}
    save_masks(file, loaded, tokens=[HOSTILE] * 640, metadata=metadata, model=HOSTILE)
    page = browser(file)
    page.point_at(3, 1)
    assert page.ask("return document.getElementById('key-text').textContent") == HOSTILE * 16
    assert HOSTILE in page.text("#pane-a figcaption") and page.text("#facts").count(HOSTILE) >= 3
    assert page.driver.title == file.name and not page.driver.find_elements("css selector", "img")
    root = ElementTree.parse(page.save("svg", tmp_path / "svg")).getroot()
    assert not [node for node in root.iter() if node.tag.endswith("script")]
    assert any(HOSTILE in (node.text or "") for node in root.iter())
    with page.save("heads", tmp_path / "csv").open(newline="") as lines:
        assert [line["name"] for line in csv.DictReader(lines)] == [HOSTILE, "'=1+1"]


@pytest.mark.parametrize("tokens", ["null", "3", '["a"]', json.dumps([1] * 640), '{"length": 640}', "["])
def test_tokens_that_are_not_the_prompts_are_refused(browser, tmp_path, path, masks, tokens):
    page = browser(path)
    wrong = write_masks(tmp_path / "wrong", masks, tokens=tokens)
    page.choose_file(wrong)
    assert page.text("#message").startswith("wrong has a damaged header")


# ---- names and patterns


def test_heads_have_the_names_that_the_file_gives(browser, tmp_path, masks):
    names = ["copies what stood there before and has a rather long name", "looks back", "rests"]
    page = browser(write_masks(tmp_path / "named", masks, user=json.dumps({"heads": ", ".join(names), "seed": "7"})))
    assert f"layer 0, head 0 ({names[0]})" in page.text("#pane-a figcaption")
    page.show_as(390, 844, touch=True)
    assert page.ask("return document.documentElement.scrollWidth") == 390
    options = page.ask("return [...document.getElementById('head-a').options].map(({ text }) => text)")
    assert options == [f"{number} ({name})" for number, name in enumerate(names)]
    assert "seed\n7" in page.text("#facts")
    page.keys("}")  # of five heads: the three names are not theirs
    assert "layer 2, head 0:" in page.text("#pane-a figcaption")


def test_the_recall_that_a_file_says_is_shown(browser, tmp_path, path, masks):
    recall = {
        "0": {"mean": [[0.99, None, 0.9]], "least": [[0.95, None, 0.4]]},
        "2": {"mean": [[0.8, 1.0, 1.0, 1.0, 1.0]], "least": [[0.25, 1.0, 1.0, 1.0, 1.0]]},
    }
    user = json.dumps({RECALL_ENTRY: json.dumps(recall), "seed": "7"})
    page = browser(write_masks(tmp_path / "measured", masks, user=user))
    assert page.text("#pane-a figcaption").endswith("% kept, recall 0.990, least 0.950")
    assert RECALL_ENTRY not in page.text("#facts") and "seed" in page.text("#facts")
    page.choose("heat-by", "recall")
    assert page.text("#heat-most") == "20.0 % lost"
    page.choose("sort", "lost mass")
    names = [thumb.text.split("\n")[0] for thumb in page.driver.find_elements("css selector", ".thumb")]
    assert names[:3] == ["2 · 0", "0 · 2", "0 · 0"] and names[-1] == "0 · 1"  # the last one was not measured
    with page.save("heads", tmp_path / "csv").open(newline="") as lines:
        records = list(csv.DictReader(lines))
    assert [line["recall"] for line in records[:4]] == ["0.99", "", "0.9", "0.8"]
    page.choose_file(path)  # which has none
    assert "recall" not in page.text("#pane-a figcaption") and page.text("#heat-most").endswith(" %")
    for wrong in ("[", "null", "3", '{"0": {"mean": 1, "least": [[2, "a"]]}}'):
        page.choose_file(write_masks(tmp_path / "wrong", masks, user=json.dumps({RECALL_ENTRY: wrong})))
        assert page.text("#message") == "" and page.text("#pane-a figcaption").endswith("% kept")


def test_a_head_that_keeps_everything_is_called_dense(browser, tmp_path):
    dense = lines_and_noise(2, 40, 1)
    dense[0, 1] = np.tri(40, dtype=bool)
    page = browser(write_masks(tmp_path / "masks", {0: dense}, config=CONFIG.to_dict()), address="#head=1")
    assert page.text("#pane-a figcaption") == "A layer 0, head 1: dense"
    assert page.text("#patterns") == "dense: keeps every block"
    page.point_at(30, 12)
    assert page.text("#readout").endswith("kept, dense")
    page.choose("colour", "pattern")
    assert page.text("#legend").split("\n") == ["dense", "dropped"]
    assert np.array_equal(
        block_centres(page, 40, 40), expected_blocks(page, np.tri(40, dtype=bool), (dense[0, 1], "dense"))
    )
    page.choose("filter", "dense")
    (thumb,) = page.driver.find_elements("css selector", ".thumb")
    assert thumb.text == "0 · 1\ndense"


def test_blocks_and_heads_can_be_coloured_by_pattern(browser, path, masks):
    page = browser(path, address="#colour=pattern&heat=pattern&layer=2&head=3")
    loaded = load_masks(path)
    codes = block_patterns(loaded[2], 3, config=CONFIG).numpy()
    inks = [(codes == code, name) for code, name in enumerate(PATTERNS, 1)]
    assert np.array_equal(block_centres(page, 40, 40), expected_blocks(page, np.tri(40, dtype=bool), *inks))
    pixels = page.pixels("#heat")
    for layer, block_map in loaded.items():
        for summary in summarize_heads(block_map, config=CONFIG):
            place = page.ask(
                "return fp.heat.middleOf({ layer: arguments[0], column: arguments[1] })", layer, summary.head
            )
            main = max(summary.patterns, key=summary.patterns.get)
            assert np.array_equal(pixels[int(place["y"]), int(place["x"])], page.colour(main))
    main = max(PATTERNS, key=lambda name: (codes == PATTERNS.index(name) + 1).sum())
    assert page.text("#heat-text").endswith(f"mostly {main}")


def test_totals_of_rows_and_columns_are_shown_and_saved(browser, tmp_path, path, masks):
    page = browser(path)
    dense = masks[0][0, 0]
    assert page.ask("return Object.values(state.heads[0].totals.rows)") == dense.sum(1).tolist()
    assert page.ask("return Object.values(state.heads[0].totals.columns)") == dense.sum(0).tolist()
    page.point_at(20, 7)
    assert page.text("#totals") == (
        f"the query block keeps {dense[20].sum()} of 21 key blocks, "
        f"the key block is kept by {dense[:, 7].sum()} of 33 query blocks"
    )
    with page.save("totals", tmp_path / "totals").open(newline="") as lines:
        records = list(csv.DictReader(lines))
    kept = {axis: [int(line["kept"]) for line in records if line["axis"] == axis] for axis in ("query", "key")}
    assert kept == {"query": dense.sum(1).tolist(), "key": dense.sum(0).tolist()}
    visible = {axis: [int(line["visible"]) for line in records if line["axis"] == axis] for axis in ("query", "key")}
    assert visible == {"query": list(range(1, 41)), "key": list(range(40, 0, -1))}
    assert records[20]["first_token"] == "320" and records[20]["last_token"] == "335"


def test_a_bar_is_as_long_as_its_total(browser, path, masks):
    page = browser(path)
    scale = page.view()[2]
    frame = page.pixels("#pane-a canvas.frame")
    longest = masks[0][0, 0].sum(1).max()
    map_left, map_top = (page.ask(f"return parseInt(fp.panes[0].canvas.style.{side})") for side in ("left", "top"))
    start = map_left + round(40 * scale) + 8
    lengths = [
        (frame[int(map_top + (row + 0.5) * scale), start - 4 : start + 24].sum(1) > 0).sum() for row in range(40)
    ]
    expected = 26 * masks[0][0, 0].sum(1) / longest
    assert np.corrcoef(lengths, expected)[0, 1] > 0.98


# ---- two files


def test_two_files_open_at_their_largest_difference_and_say_how_much_they_differ(browser, tmp_path, masks):
    changed = {number: dense.copy() for number, dense in masks.items()}
    changed[0][0, 1, 39, 5:9] ^= True
    changed[2][0, 3, 30:38, 5:9] ^= True
    paths = [write_masks(tmp_path / name, maps) for name, maps in (("a", masks), ("b", changed))]
    page = browser(*paths)
    assert page.ask("return state.chosen[0]") == page.ask("return state.chosen[1]") == {"layer": 2, "column": 3}
    differences = [compare_maps(*(load_masks(path)[layer] for path in paths)) for layer in masks]
    only = [sum(int(getattr(found, side).sum()) for found in differences) for side in ("only_first", "only_second")]
    assert page.text("#files-apart") == (
        f"36 blocks differ: {only[0]} only in A, {only[1]} only in B. 2 of 8 heads differ."
    )
    assert page.text("#heat-text").endswith("differs in 32 blocks") and page.text("#heat-most") == "32 blocks"
    page.choose("sort", "difference")
    thumbs = [thumb.text.split("\n") for thumb in page.driver.find_elements("css selector", ".thumb")]
    assert [name for name, _ in thumbs[:2]] == ["2 · 3", "0 · 1"] and thumbs[0][1].endswith("≠ 32")
    page.choose("filter", "that differ")
    assert page.text("#gallery-count") == "2 of 8"
    with page.save("heads", tmp_path / "csv").open(newline="") as lines:
        records = list(csv.DictReader(lines))
    assert [int(line["only_a"]) + int(line["only_b"]) for line in records] == [0, 4, 0, 0, 0, 0, 32, 0]


def test_equal_and_unlike_files_say_so(browser, tmp_path, path, masks):
    page = browser(path, write_masks(tmp_path / "same", masks))
    assert page.text("#files-apart") == "The masks of 8 heads are equal."
    page.choose_file(write_masks(tmp_path / "short", {0: lines_and_noise(2, 30, 5)}), "b")
    assert page.text("#files-apart") == "8 heads of A have no counterpart of their size in B."


def test_an_address_decides_over_the_largest_difference(browser, path, other):
    page = browser(path, other, address="#layer=2&head=4&compare=file")
    assert page.ask("return state.chosen") == [{"layer": 2, "column": 4}] * 2


def test_a_file_has_its_colour_of_the_pictures_of_diff(browser, path, other):
    page = browser(path, other)
    for name, colour in (("onlyA", ONLY_FIRST), ("onlyB", ONLY_SECOND), ("both", BOTH)):
        assert page.colour(name).tolist() == list(bytes.fromhex(colour[1:]))


# ---- all heads


def test_all_heads_are_shown_sorted_and_chosen(browser, path, masks):
    page = browser(path)
    names = lambda: [thumb.text.split("\n")[0] for thumb in page.driver.find_elements("css selector", ".thumb")]  # noqa: E731
    places = [(layer, head) for layer, dense in masks.items() for head in range(dense.shape[1])]
    assert names() == [f"{layer} · {head}" for layer, head in places] and page.text("#gallery-count") == "8"
    by_density = sorted(places, key=lambda place: -masks[place[0]][0, place[1]].sum())
    page.choose("sort", "density")
    assert names() == [f"{layer} · {head}" for layer, head in by_density]
    summaries = {layer: summarize_heads(block_map, config=CONFIG) for layer, block_map in load_masks(path).items()}
    page.choose("sort", "share of slash")
    assert names() == [
        f"{layer} · {head}" for layer, head in sorted(places, key=lambda p: -summaries[p[0]][p[1]].shares["slash"])
    ]
    page.choose("filter", "of this layer")
    assert page.text("#gallery-count") == "3 of 8"
    page.choose("filter", "all heads")
    page.choose("sort", "layer and head")
    thumb = page.driver.find_elements("css selector", ".thumb")[6]
    page.ask("arguments[0].click()", thumb)
    page.settle()
    assert page.ask("return state.chosen[0]") == {"layer": 2, "column": 3}
    assert thumb.get_attribute("aria-current") == "true" and "layer 2, head 3" in thumb.accessible_name


def test_a_thumbnail_of_a_chunk_shows_all_of_it(browser, tmp_path):
    dense = np.zeros((1, 1, 1, 512), bool)
    dense[..., ::2] = dense[..., 256:] = True
    sizes = (16, 8192, 16)
    write_mask_file(tmp_path / "row", {0: (pack_triangles(dense, *sizes), *sizes)})
    page = browser(tmp_path / "row")
    page.ask("document.getElementById('gallery').scrollIntoView()")
    page.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
    row = page.settle().pixels(".thumb canvas")[0]
    assert np.array_equal(row[70], page.colour("kept"))
    assert np.abs(row[20] - (page.colour("kept") + page.colour("dropped")) / 2).max() <= 2


def test_a_thumbnail_shows_its_head(browser, path, masks):
    page = browser(path)
    page.ask("document.getElementById('gallery').scrollIntoView()")
    page.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
    page.settle()
    pixels = page.pixels(".thumb canvas")
    middle = ((np.arange(40) + 0.5) * len(pixels) / 40).astype(int)
    expected = expected_blocks(page, np.tri(40, dtype=bool), (masks[0][0, 0], "kept"))
    assert np.array_equal(pixels[middle[:, None], middle], expected)


# ---- pictures


def test_the_view_is_saved_as_png(browser, tmp_path, path, other, masks):
    plt = pytest.importorskip("matplotlib.image")
    page = browser(path, other)
    picture = (255 * plt.imread(page.save("png", tmp_path / "png"))).round().astype(int)[..., :3]
    scale = page.view()[2]
    map_left, map_top = (page.ask(f"return parseInt(fp.panes[0].canvas.style.{side})") for side in ("left", "top"))
    middle = ((np.arange(40) + 0.5) * scale).astype(int)
    seen = picture[26 + map_top + middle[:, None], map_left + middle]
    a, b = masks[0][0, 0], load_masks(other)[0].to_dense()[0, 0].numpy()
    expected = expected_blocks(page, np.tri(40, dtype=bool), (a & b, "both"), (a & ~b, "onlyA"))
    assert (seen == expected).all(-1)[np.tri(40, k=-1, dtype=bool)].all()


def path_blocks(data):
    """bool [40, 40] of the runs of a path such as M3 5h2v1h-2z."""
    blocks = np.zeros((40, 40), bool)
    for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", data):
        blocks[int(row), int(column) : int(column) + int(width)] = True
    return blocks


def test_the_view_is_saved_as_svg_block_by_block(browser, tmp_path, path, masks):
    page = browser(path, address="#layer=2&head=1")
    file = page.save("svg", tmp_path / "svg")
    assert file.name == "masks-layer2-head1.svg"
    root = ElementTree.parse(file).getroot()
    dropped, kept, *_ = [node for node in root.iter() if node.tag.endswith("path")]
    assert np.array_equal(path_blocks(dropped.get("d")), np.tri(40, dtype=bool))
    assert np.array_equal(path_blocks(kept.get("d")), masks[2][0, 1])
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert {"key tokens →", "← query tokens", "kept", "512"} <= set(texts)


def test_the_table_of_all_heads_is_that_of_the_library(browser, tmp_path, path):
    page = browser(path)
    with page.save("heads", tmp_path / "csv").open(newline="") as lines:
        records = list(csv.DictReader(lines))
    loaded = load_masks(path)
    summaries = [(layer, each) for layer, found in loaded.items() for each in summarize_heads(found, config=CONFIG)]
    assert len(records) == len(summaries)
    for record, (layer, summary) in zip(records, summaries, strict=True):
        assert (int(record["layer"]), int(record["head"])) == (layer, summary.head)
        assert float(record["density"]) == pytest.approx(summary.density)
        assert {name: float(record[name]) for name in PATTERNS} == pytest.approx(summary.shares)


# ---- phones


@pytest.mark.parametrize("second", [False, True])
def test_on_a_phone_a_tap_shows_a_block_and_nothing_is_cut(browser, tmp_path, masks, other, second):
    file = with_tokens(tmp_path / "a-file-of-a-rather-long-name.safetensors", masks, WORDS)
    page = browser(file, other) if second else browser(file)
    page.show_as(390, 844, touch=True)
    row, column = np.argwhere(masks[0][0, 0] & np.tri(40, k=-9, dtype=bool))[3]
    page.tap(row, column)
    assert f"(block {row}) · keys" in page.text("#readout") and "kept" in page.text("#readout")
    assert page.text("#key-text") == "".join(WORDS[16 * column : 16 * column + 16])
    box = page.find("#readout").rect
    bottom = page.ask("return document.getElementById('readout').getBoundingClientRect().bottom")
    assert box["height"] > 0 and bottom <= 844  # in sight, wherever the map is
    assert page.ask("return document.documentElement.scrollWidth") == 390
    cut = page.ask(
        "return [...document.querySelectorAll("
        "'button, .button, select, input, figcaption, h1, h2, dd, p, canvas.map, pre')]"
        ".filter((node) => node.offsetParent && !node.classList.contains('unseen'))"
        ".filter((node) => { const box = node.getBoundingClientRect(); return box.left < 0 || box.right > 390; })"
        ".map((node) => node.id || node.outerHTML)"
    )
    assert cut == []
    width, height = page.ask(
        "const { clientWidth, clientHeight } = fp.panes[0].canvas; return [clientWidth, clientHeight]"
    )
    assert width >= 270 and abs(width - height) <= 1  # the map fills what it takes


def longest_blank(picture):
    """The most rows of pixels in a row that are of one colour from side to side."""
    plain = (picture == picture[:, :1]).all((1, 2))
    runs = np.diff(np.flatnonzero(np.concatenate([[True], ~plain, [True]])))
    return int(runs.max()) - 1


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_window_is_filled_in_every_look(browser, tmp_path, masks, other, width, height, scheme, second):
    """FLEXPREFILL_SCREENSHOTS=DIR keeps the pictures, for people to look at."""
    image = pytest.importorskip("matplotlib.image")
    file = with_tokens(tmp_path / "masks.safetensors", masks, WORDS)
    page = browser(file, other) if second else browser(file)
    page.show_as(width, height, touch=width < 500)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.settle()
    folder = Path(os.environ.get("FLEXPREFILL_SCREENSHOTS", tmp_path))
    name = folder / f"{width}-{scheme}-{1 + second}.png"
    name.write_bytes(base64.b64decode(page.driver.get_screenshot_as_base64()))
    picture = image.imread(name)[..., :3]
    ratio = 2 if width < 500 else 1
    assert picture.shape[:2] == (height * ratio, width * ratio)
    assert (picture[-1, -1].mean() < 0.3) == (scheme == "dark")
    assert longest_blank(picture) < 70 * ratio


def test_a_finger_moves_the_page_until_the_map_is_zoomed(browser, path):
    page = browser(path)
    page.show_as(390, 844, touch=True)
    action = "return getComputedStyle(fp.panes[0].canvas).touchAction"
    assert page.ask(action) == "pan-y"
    page.ask("document.getElementById('zoom-in').click()")
    assert page.settle().ask(action) == "none"


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (1024, 768), (390, 844)])
@pytest.mark.parametrize("second", [False, True])
def test_no_map_has_blank_space_beside_it(browser, path, other, width, height, second):
    page = browser(path, other) if second else browser(path)
    page.show_as(width, height, touch=width < 500)
    for slot in range(1 + second):
        map_bottom, below_top = page.ask(
            "const plane = fp.panes[arguments[0]].plane.getBoundingClientRect();"
            "const scale = fp.pixelView().scale / devicePixelRatio;"
            "const canvas = fp.panes[arguments[0]].canvas.getBoundingClientRect();"
            "return [canvas.top + 40 * scale, plane.bottom];",
            slot,
        )
        assert 40 < below_top - map_bottom < 52  # the totals alone
    assert page.ask("return document.documentElement.scrollWidth") == width
