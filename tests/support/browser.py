"""A headless Chromium, and what the tests of the viewer ask of its page."""

import base64
import json
import os
import shutil
import time

import numpy as np
import pytest

REQUIRED = "FLEXPREFILL_BROWSER"  # set to "required" where a missing browser is a failure, as in .ci/run


def start_chromium():
    """A driver of a headless Chromium; skips, or where a browser is required fails, if there is none."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return _missing("selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        return _missing("needs the commands chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.set_script_timeout(30)
    return started


def _missing(reason):
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(reason)
    pytest.skip(reason)


class Page:
    """One page in the browser."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, address=""):
        self.driver.get("about:blank")  # an address that differs after the # alone would not load the page again
        self.driver.get(path.as_uri() + address)
        return self.settle()

    def settle(self):
        """Waits until everything asked for so far is drawn."""
        self.driver.execute_async_script("window.flexprefill.settled().then(arguments[0])")
        return self

    def ask(self, script, *arguments):
        return self.driver.execute_script(f"const fp = window.flexprefill, {{ state }} = fp; {script}", *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        return self.find(selector).text

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()
        return self.settle()

    def choose_file(self, path, slot="a"):
        self.find(f"#open-{slot}").send_keys(str(path))
        return self.settle()

    def choose(self, name, value):
        """Chooses an entry of a select by its value."""
        self.ask(
            "const select = document.getElementById(arguments[0]); select.value = arguments[1];"
            "select.dispatchEvent(new Event('change'));",
            name,
            value,
        )
        return self.settle()

    def search(self, text):
        field = self.find("#search")
        field.clear()
        field.send_keys(text)
        return self.settle()

    def show_as(self, width, height, *, touch=False):
        """A window of this size, in CSS pixels; a phone's if it can be touched."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if touch else 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        return self.settle()

    def tap(self, row, column, slot=0):
        """A finger's tap on a block."""
        x, y = self.ask(
            "const { x, y } = fp.middleOf(arguments[0], { row: arguments[1], column: arguments[2] });"
            "const box = fp.panes[arguments[0]].canvas.getBoundingClientRect();"
            "return [box.left + x / devicePixelRatio, box.top + y / devicePixelRatio];",
            slot,
            int(row),
            int(column),
        )
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        return self.settle()

    def save(self, what, folder):
        """What the page saves, as a file in an empty folder."""
        folder.mkdir()
        how = {"behavior": "allow", "downloadPath": str(folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", how)
        self.choose("save", what)
        for _ in range(200):
            found = [path for path in folder.iterdir() if path.suffix not in (".crdownload", ".tmp")]
            if found and found[0].stat().st_size:
                return found[0]
            time.sleep(0.05)
        raise AssertionError("nothing was saved")

    def colour(self, name):
        return np.array(self.ask("return state.colours[arguments[0]]", name))

    def view(self):
        """left and top in blocks, and scale in pixels a block."""
        view = self.ask("return fp.pixelView()")
        return view["left"], view["top"], view["scale"]

    def pixels(self, selector="#pane-a canvas.map"):
        """uint8 [height, width, 3] of a canvas; nothing on it is transparent."""
        width, height, text = self.ask(
            "const canvas = document.querySelector(arguments[0]);"
            "const { width, height } = canvas;"
            "const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);"
            "let text = '';"
            "for (let at = 0; at < data.length; at += 32768)"
            "  text += String.fromCharCode(...data.subarray(at, at + 32768));"
            "return [width, height, btoa(text)];",
            selector,
        )
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3].astype(int)

    def move_to(self, selector, x, y):
        """Moves the mouse to (x, y), in CSS pixels from an element's corner."""
        from selenium.webdriver import ActionChains

        box = self.find(selector).rect
        chain = ActionChains(self.driver, duration=0)
        chain.w3c_actions.pointer_action.move_to_location(round(box["x"] + x), round(box["y"] + y))
        chain.perform()
        return self

    def point_at(self, row, column, slot=0):
        block = {"row": int(row), "column": int(column)}
        place = self.ask("return fp.middleOf(arguments[0], arguments[1])", slot, block)
        return self.move_to(f"#pane-{'ab'[slot]} canvas.map", place["x"], place["y"])

    def problems(self):
        """What the browser complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """The addresses that the browser asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


def block_centres(page, rows, columns, slot="a"):
    """The pixel in the middle of each block: [rows, columns, 3]."""
    left, top, scale = page.view()
    pixels = page.pixels(f"#pane-{slot} canvas.map")
    middle = lambda count, start: np.floor((np.arange(count) + 0.5 - start) * scale).astype(int)  # noqa: E731
    return pixels[middle(rows, top)[:, None], middle(columns, left)]


def expected_blocks(page, causal, *inks):
    """The colour of each block: paper, dropped, or the ink whose map has it."""
    colours = np.where(causal[..., None], page.colour("dropped"), page.colour("paper"))
    for dense, name in inks:
        colours = np.where(dense[..., None], page.colour(name), colours)
    return colours
