"""The report in a real browser: it sorts, filters, moves through slices, and says nothing in the console.

Runs where Debian's chromium and chromium-driver are installed (`apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import head

from scripts.jobs.evaluate import evaluation_report
from scripts.metrics import paired_differences
from scripts.report import Case

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
WIDTHS = [1400, 400]
CONTROLS = {
    "slice": {"slice": "9"}, "window": {"window": "0.4"}, "volume": {"volume": "2"},
    "plane": {"plane": "0", "slice": "9"},
}  # fmt: skip
PAGES = ["page", "encoded", "decoded", "trained"]  # of an evaluation, and of the session's runs
SPACING = (4.0, 4.0, 4.0)


def evaluation(folder: Path) -> None:
    """Write a report of twelve scans and three systems; the model's reconstruction is 0.9 of the original."""
    rng = np.random.default_rng(0)
    names = [f"sub-{number:02d}_T1w" for number in range(12)]
    rows = pd.concat(
        pd.DataFrame(
            {
                "name": names, "subject": names, "session": "", "label": ["patient", "control"] * 6, "split": "val",
                "system": system, "l1": rng.uniform(0.01, 0.03, 12), "psnr": gain + rng.uniform(25, 30, 12),
                "psnr_brain": gain + rng.uniform(20, 24, 12), "kl": np.nan if gain else 5.0,
            }
        )
        for system, gain in {"model": 0, "peer": 1, "dct": 2}.items()
    )  # fmt: skip
    volumes = [head(seed).astype(np.float32) / 1000 for seed in range(3)]
    cases = [
        (why, Case.of_volumes(name, v, {"model": 0.9 * v, "peer": v}, SPACING, mu=np.ones((4, 8, 9, 8), np.float32)))
        for why, name, v in zip(("worst", "best", "first of the cohort"), names, volumes, strict=False)
    ]
    summary = pd.DataFrame({"system": ["model", "dct"], "n": ["12", "12"], "psnr": ["27.10 ± 1.00", "28.00 ± 1.10"]})
    paired = paired_differences(rows, ["psnr", "psnr_brain"])
    frequency = np.arange(33) * 0.01 + 0.005
    spectra = pd.DataFrame({"frequency": frequency, "image": 9 / frequency, "latent": 9 / frequency.clip(0, 0.08)})
    evaluation_report(folder, rows, summary, paired, spectra, cases, "psnr_brain", "0" * 64, "val")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    evaluation(folder)
    return folder / "report.html"


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


def open_page(browser: Any, path: Path, width: int = 1400, **media: str) -> None:
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})
    browser.get_log("browser")
    browser.get(path.as_uri())


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def start_viewer(browser: Any) -> None:
    """Scroll to the viewer and wait until its volumes are there."""
    browser.execute_script("arguments[0].scrollIntoView()", find(browser, "[data-viewer]"))
    wait(browser, lambda driver: find(driver, "[data-viewer]").get_attribute("data-ready"))


def wait(browser: Any, condition: Callable[[Any], Any]) -> None:
    waiting.WebDriverWait(browser, 120, 0.2).until(condition)


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


def head_of(browser: Any, name: str) -> Any:
    return volumes(browser).find_element("xpath", f".//th/button[text()='{name}']")


def choose(browser: Any, selector: str, value: str) -> None:
    """Set a control as its user does."""
    browser.execute_script(
        """arguments[0].value = arguments[1];
        for (const kind of ["input", "change"]) arguments[0].dispatchEvent(new Event(kind, {bubbles: true}));""",
        find(browser, selector), value,
    )  # fmt: skip


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_opens_without_a_message_and_fits(
    browser: Any, request: pytest.FixtureRequest, kind: str, width: int
) -> None:
    """No error, no warning, no request that the policy refuses; nothing wider than the window."""
    made = request.getfixturevalue(kind)
    folder = getattr(made, "folder", made)
    open_page(browser, folder if folder.suffix else folder / "report.html", width)
    if browser.find_elements("css selector", "[data-viewer]"):
        start_viewer(browser)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_column_sorts_both_ways(browser: Any, page: Path) -> None:
    """The first click, or Enter, brings the worst to the top; the state is told to screen readers."""
    open_page(browser, page)
    button = head_of(browser, "psnr_brain")
    for state, is_reverse in (("ascending", False), ("descending", True)):
        button.click()
        values = [float(text) for text in column(browser, "psnr_brain")]
        assert len(values) == 12 and values == sorted(values, reverse=is_reverse)
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == state
    button = head_of(browser, "l1")
    browser.execute_script("arguments[0].focus()", button)
    button.send_keys("\ue007")  # enter
    values = [float(text) for text in column(browser, "l1")]
    assert values == sorted(values, reverse=True), "a large l1 is the worst"


def test_filters_and_search_combine(browser: Any, page: Path) -> None:
    """The model's rows at first; every choice narrows the rows, and they are counted."""
    open_page(browser, page)
    assert set(column(browser, "system")) == {"model"}
    table = f"#{volumes(browser).get_attribute('id')} "
    choose(browser, table + "select[name=label]", "patient")
    assert set(column(browser, "label")) == {"patient"}
    choose(browser, table + "select[name=system]", "")
    assert len(column(browser, "system")) == 18
    choose(browser, table + "input[name=search]", "sub-02")
    assert column(browser, "name") == ["sub-02_T1w"] * 3
    assert find(browser, table + ".count").text == "3 of 36 rows"


@pytest.mark.parametrize("control", ["slice", "window", "volume", "plane", "click"])
def test_controls_change_what_is_shown(browser: Any, page: Path, control: str) -> None:
    """Slice, window, volume, and a click in one canvas are seen in every canvas; the position is told in words."""
    open_page(browser, page)
    start_viewer(browser)
    canvases = browser.find_elements("css selector", "[data-viewer] canvas")
    before, said = [canvas.screenshot_as_png for canvas in canvases], find(browser, ".position").text
    if control == "click":
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvases[0])
        x, y = canvases[0].size["width"] // 6, -canvases[0].size["height"] // 3
        webdriver.ActionChains(browser).move_to_element_with_offset(canvases[0], x, y).click().perform()
    else:
        for name, value in CONTROLS[control].items():
            choose(browser, f"[data-viewer] [name={name}]", value)
    wait(browser, lambda driver: find(driver, ".position").text not in (said, "loading"))
    after = [canvas.screenshot_as_png for canvas in canvases]
    assert len(after) == 3 and all(old != new for old, new in zip(before, after, strict=True))
    assert browser.get_log("browser") == []


def test_values_are_those_of_the_volumes(browser: Any, page: Path) -> None:
    """What the position line says is the voxel's value: 0.9 of the original here."""
    open_page(browser, page)
    start_viewer(browser)
    words = find(browser, ".position").text.replace(",", "").replace(";", "").split()
    said = {name: float(words[words.index(name) + 1]) for name in ("original", "reconstruction", "difference")}
    assert said["original"] > 0.3
    assert said["reconstruction"] == pytest.approx(0.9 * said["original"], abs=0.006)
    assert said["difference"] == pytest.approx(said["reconstruction"] - said["original"], abs=0.002)


def test_dark_mode_and_print_differ(browser: Any, page: Path) -> None:
    """Light text on dark where the reader wants it; paper has neither controls nor an empty viewer."""
    colour = "return getComputedStyle(document.body).backgroundColor"
    open_page(browser, page, scheme="dark")
    assert browser.execute_script(colour) == "rgb(20, 23, 27)"
    open_page(browser, page, scheme="dark", media="print")
    assert browser.execute_script(colour) == "rgb(255, 255, 255)"
    selectors = (".controls", "section.viewer", "nav", "img")
    assert [selector for selector in selectors if find(browser, selector).is_displayed()] == ["img"]
