import pytest
from support.browser import Page, start_chromium
from support.viewer_files import CONFIG, lines_and_noise, write_masks

from flexprefill.viewer import write_page


@pytest.fixture
def masks():
    return {0: lines_and_noise(3, 40, 1), 2: lines_and_noise(5, 40, 2)}


@pytest.fixture
def path(tmp_path, masks):
    return write_masks(tmp_path / "masks.safetensors", masks, config=CONFIG.to_dict(), model="tiny-1B")


@pytest.fixture
def other(tmp_path, masks):
    changed = {number: dense.copy() for number, dense in masks.items()}
    changed[0][0, 0] = lines_and_noise(1, 40, 9)[0, 0]
    return write_masks(tmp_path / "other.safetensors", changed, config=CONFIG.to_dict())


@pytest.fixture(scope="session")
def driver():
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, tmp_path):
    """Opens pages of mask files. None of them may ask for anything, or have an error."""
    page = Page(driver)
    page.problems(), page.requests()

    def show(*files, address="", **options):
        write_page(tmp_path / "page.html", files, **options)
        return page.open(tmp_path / "page.html", address)

    yield show
    assert page.problems() == []
    assert [url for url in page.requests() if not url.startswith(("file:", "about:"))] == []
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
