"""A headless Chromium, and what the tests of the viewer ask of its page."""

import base64
import json
import os
import shutil

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
