"""The report in a real browser: it sorts, shows volumes, and says nothing in the console.

Runs where Debian's chromium and chromium-driver are installed (`apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Job

webdriver = pytest.importorskip("selenium.webdriver")
waiting = pytest.importorskip("selenium.webdriver.support.ui")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromedriver are not installed",
)

SWITCHES = [
    "--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-quic", "--disable-sync", "--hide-scrollbars", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless browser whose console is kept."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for switch in [*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def open_page(browser: Any, folder: Path, width: int = 1400) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get((folder / "report.html").as_uri())


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def start_viewer(browser: Any) -> None:
    """Scroll to the viewer and wait until its volumes are there."""
    browser.execute_script("arguments[0].scrollIntoView()", find(browser, "[data-viewer]"))
    ready = waiting.WebDriverWait(browser, 120, 0.2)
    ready.until(lambda driver: find(driver, "[data-viewer]").get_attribute("data-ready"))


def column(browser: Any, name: str) -> list[str]:
    """The texts of a column of the table of all volumes."""
    return browser.execute_script(
        """const names = [...arguments[0].querySelectorAll("th button")].map((button) => button.textContent);
        const rows = [...arguments[0].querySelectorAll("tbody tr")];
        return rows.map((row) => row.children[names.indexOf(arguments[1])].textContent);""",
        volumes(browser), name,
    )  # fmt: skip


def volumes(browser: Any) -> Any:
    return browser.find_element("xpath", "//section[h2[text()='All volumes']]")


@pytest.mark.parametrize("kind", ["evaluated", "encoded", "trained"])
@pytest.mark.parametrize("width", [1400, 400])
def test_page_opens_without_a_message_and_fits(
    browser: Any, request: pytest.FixtureRequest, kind: str, width: int
) -> None:
    """No error, no warning, no request that the policy refuses; nothing wider than the window."""
    made = request.getfixturevalue(kind)
    open_page(browser, getattr(made, "folder", made), width)
    if browser.find_elements("css selector", "[data-viewer]"):
        start_viewer(browser)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_table_sorts(browser: Any, evaluated: Job) -> None:
    """The first click brings the worst to the top, the second the best."""
    open_page(browser, evaluated.folder)
    for is_reverse in (False, True):
        volumes(browser).find_element("xpath", ".//th/button[text()='psnr_brain']").click()
        values = [float(text) for text in column(browser, "psnr_brain")]
        assert len(values) == 2 and values == sorted(values, reverse=is_reverse)
