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

from scripts.jobs.decode import decoding_report
from scripts.jobs.encode import encoding_report
from scripts.jobs.evaluate import evaluation_report
from scripts.jobs.train import training_report
from scripts.latents import LatentStatistics
from scripts.metrics import paired_differences
from scripts.report import Case

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromedriver are not installed",
)

SWITCHES = [
    "--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-quic", "--disable-sync", "--hide-scrollbars", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
WIDTHS = [1400, 400]
PAGES = ["evaluation", "encoding", "decoding", "training"]
SPACING = (4.0, 4.0, 4.0)


def evaluation(folder: Path) -> None:
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


def encoding(folder: Path) -> None:
    statistics, shown, rows = LatentStatistics(), [], []
    import torch

    for number in range(12):
        mu = torch.randn(4, 8, 9, 8, generator=torch.Generator().manual_seed(number))
        statistics.update(mu, torch.full_like(mu, -4.0))
        shown.append((f"sub-{number:02d}", mu.numpy()))
        about = {"name": f"sub-{number:02d}", "subject": str(number), "session": "", "label": "", "split": "train"}
        rows.append({**about, "kl": 5.0 + number, "mean of mu": 0.1, "sd of mu": 1.0})
    encoding_report(folder, pd.DataFrame(rows), {**statistics.result(), "weights_sha256": "0" * 64}, shown[:2])


def decoding(folder: Path) -> None:
    volumes = {f"sample_{seed:04d}": head(seed).astype(np.float32) / 1000 for seed in range(3)}
    decoding_report(folder, volumes, 4.0, {"mmd": 1.2, "nearest_least": float("inf")}, 3)


def training(folder: Path) -> None:
    frame = pd.DataFrame({"epoch": [1, 2, 3], "loss": [0.3, 0.2, 0.1], "val_psnr_brain": [18.0, np.nan, 20.0]})
    frame.to_csv(folder / "metrics.csv", index=False)
    training_report(str(folder), "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("reports")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            (folder / kind).mkdir()
            globals()[kind](folder / kind)
            made[kind] = folder / kind / "report.html"
        return made[kind]

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
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
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120, 0.2).until(condition)


def column(browser: Any, title: str, name: str) -> list[str]:
    """The texts of a column of the table in the section of that title."""
    return browser.execute_script(
        """const names = [...arguments[0].querySelectorAll("th button")].map((button) => button.textContent);
        const rows = [...arguments[0].querySelectorAll("tbody tr")];
        return rows.map((row) => row.children[names.indexOf(arguments[1])].textContent);""",
        section(browser, title), name,
    )  # fmt: skip


def section(browser: Any, title: str) -> Any:
    return browser.find_element("xpath", f"//section[h2[text()='{title}']]")


def head_of(browser: Any, title: str, name: str) -> Any:
    return section(browser, title).find_element("xpath", f".//th/button[text()='{name}']")


def choose(browser: Any, selector: str, value: str) -> None:
    """Set a control as its user does."""
    browser.execute_script(
        """arguments[0].value = arguments[1];
        for (const kind of ["input", "change"]) arguments[0].dispatchEvent(new Event(kind, {bubbles: true}));""",
        find(browser, selector), value,
    )  # fmt: skip


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_opens_without_a_message_and_fits(browser, page, kind, width):
    """No error, no warning, no request that the policy refuses; nothing wider than the window."""
    open_page(browser, page(kind), width)
    if browser.find_elements("css selector", "[data-viewer]"):
        start_viewer(browser)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_column_sorts_both_ways(browser, page):
    """The first click brings the worst to the top; the state is told to screen readers."""
    open_page(browser, page("evaluation"))
    button = head_of(browser, "All volumes", "psnr_brain")
    for state, reverse in (("ascending", False), ("descending", True)):
        button.click()
        values = [float(text) for text in column(browser, "All volumes", "psnr_brain")]
        assert len(values) == 12 and values == sorted(values, reverse=reverse)
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == state


def test_keyboard_sorts(browser, page):
    open_page(browser, page("evaluation"))
    button = head_of(browser, "All volumes", "l1")
    browser.execute_script("arguments[0].focus()", button)
    button.send_keys("\ue007")  # enter
    values = [float(text) for text in column(browser, "All volumes", "l1")]
    assert values == sorted(values, reverse=True), "a large l1 is the worst"


def test_filters_and_search_combine(browser, page):
    open_page(browser, page("evaluation"))
    assert set(column(browser, "All volumes", "system")) == {"model"}, "the model's rows at first"
    table = f"#{section(browser, 'All volumes').get_attribute('id')} "
    choose(browser, table + "select[name=label]", "patient")
    assert set(column(browser, "All volumes", "label")) == {"patient"}
    choose(browser, table + "select[name=system]", "")
    assert len(column(browser, "All volumes", "system")) == 18
    choose(browser, table + "input[name=search]", "sub-02")
    assert column(browser, "All volumes", "name") == ["sub-02_T1w"] * 3
    assert find(browser, table + ".count").text == "3 of 36 rows"


@pytest.mark.parametrize(
    "control, value",
    [("slice", "9"), ("window", "0.4"), ("volume", "2"), ("plane", None)],
)
def test_controls_change_what_is_shown(browser, page, control, value):
    """Slice, window and volume are seen in every canvas, the position is told in words."""
    open_page(browser, page("evaluation"))
    start_viewer(browser)
    canvases = browser.find_elements("css selector", "[data-viewer] canvas")
    before, said = [canvas.screenshot_as_png for canvas in canvases], find(browser, ".position").text
    if value is None:
        choose(browser, "select[name=plane]", "0")
        choose(browser, "input[name=slice]", "9")
    else:
        choose(browser, f"[data-viewer] [name={control}]", value)
    wait(browser, lambda driver: find(driver, ".position").text not in (said, "loading"))
    assert len(canvases) == 3
    after = [canvas.screenshot_as_png for canvas in canvases]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert browser.get_log("browser") == []


def test_canvases_follow_a_click_in_one(browser, page):
    """A click in the original moves the crosshair of all three, and the slider with it."""
    open_page(browser, page("evaluation"))
    start_viewer(browser)
    canvases = browser.find_elements("css selector", "[data-viewer] canvas")
    before, said = [canvas.screenshot_as_png for canvas in canvases], find(browser, ".position").text
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvases[0])
    size = canvases[0].size
    webdriver.ActionChains(browser).move_to_element_with_offset(
        canvases[0], size["width"] // 6, -size["height"] // 3
    ).click().perform()
    wait(browser, lambda driver: find(driver, ".position").text != said)
    assert all(old != canvas.screenshot_as_png for old, canvas in zip(before, canvases, strict=True))


def test_values_are_those_of_the_volumes(browser, page):
    """What the position line says is the voxel's value: 0.9 of the original here."""
    open_page(browser, page("evaluation"))
    start_viewer(browser)
    words = find(browser, ".position").text.replace(",", "").replace(";", "").split()
    said = {name: float(words[words.index(name) + 1]) for name in ("original", "reconstruction", "difference")}
    assert said["original"] > 0.3
    assert said["reconstruction"] == pytest.approx(0.9 * said["original"], abs=0.006)
    assert said["difference"] == pytest.approx(said["reconstruction"] - said["original"], abs=0.002)


def test_dark_mode_and_print_differ(browser, page):
    """Light text on dark where the reader wants it; paper has neither controls nor an empty viewer."""
    colour = "return getComputedStyle(document.body).backgroundColor"
    open_page(browser, page("evaluation"), scheme="dark")
    assert browser.execute_script(colour) == "rgb(20, 23, 27)"
    open_page(browser, page("evaluation"), scheme="dark", media="print")
    assert browser.execute_script(colour) == "rgb(255, 255, 255)"
    for selector in (".controls", "section.viewer", "nav"):
        assert not find(browser, selector).is_displayed()
    assert find(browser, "img").is_displayed()


def test_without_webgl_the_page_still_reads(browser, page):
    """An old browser gets a sentence instead of the viewer."""
    script = "HTMLCanvasElement.prototype.getContext = () => null"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        open_page(browser, page("evaluation"))
        browser.execute_script("arguments[0].scrollIntoView()", find(browser, "[data-viewer]"))
        wait(browser, lambda driver: "no WebGL 2" in find(driver, ".position").text)
        assert browser.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
