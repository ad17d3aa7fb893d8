"""The page of `make reproduce` in headless Chromium: sorted, opened, enlarged; no width makes it scroll sideways."""
import shutil

import pytest
from report_page import fill

from cion_nb.companion import report as room
from cion_nb.companion.report import write_index

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage""".split()


def find_browser():
    "Chromium and its driver; without one of them the tests are skipped, and say why."
    found = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
    if all(found): return found
    pytest.skip("no browser: chromium or its chromedriver was not found (apt-get install chromium chromium-driver)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "A browser with the page of four reports."
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: it comes with the extra dev")
    chromium, driver = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in [*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]: options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "report_folder", lambda profile: folder)
        patch.setenv("CION_NB_RUNS", str(folder / "runs"))
        browser.page = write_index("tiny", fill(folder)).as_uri()
    yield browser
    browser.quit()


@pytest.fixture
def look(browser):
    "The page anew, at a width and in a colour scheme."
    def look(width=1200, scheme="light"):
        device = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        preference = [dict(name="prefers-color-scheme", value=scheme)]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=preference))
        browser.get("about:blank")
        browser.get(browser.page)
        return browser
    return look


def one(browser, query): return browser.find_element("css selector", query)


def click(browser, query):
    "As somebody does who has scrolled there."
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", one(browser, query))
    one(browser, query).click()


def column(browser, query): return browser.execute_script(
    "return [...document.querySelectorAll(arguments[0])].map(cell => cell.textContent.trim())", query)


def test_without_a_browser_the_tests_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="chromedriver was not found"): find_browser()


@pytest.mark.slow("starts a browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200, 1800])
def test_no_width_scrolls_sideways_and_both_schemes_can_be_read(look, width, scheme):
    browser = look(width, scheme)
    size = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
    for opened in (False, True):                                        # and with everything open
        if opened: browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
        wide, shown, window = browser.execute_script(size)
        assert wide <= shown <= window == width, f"{wide} of {shown} pixels, everything open: {opened}"
    told = browser.execute_script("""
        const styles = query => [...document.querySelectorAll(query)].map(part => getComputedStyle(part))
        const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 765
        return [light(getComputedStyle(document.body).backgroundColor),
                styles("body, .for, .against, .open, a").map(style => light(style.color)),
                styles("p, td, li, dd, pre").map(style => parseFloat(style.fontSize))]""")
    paper, inks, sizes = told
    assert paper > .9 if scheme == "light" else paper < .2
    assert all(abs(ink - paper) > .4 for ink in inks) and min(sizes) >= 13.9
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.mark.slow("starts a browser")
def test_a_click_or_a_key_sorts(look):
    browser, cells = look(), "#rows-table4 tbody td:nth-child(4)"
    click(browser, "#rows-table4 summary")
    shown = column(browser, cells)
    assert shown == ["10.0", "11.0", "12.0", "20.0", "21.0", "22.0", "30.0", "31.0", "32.0"]
    head = "#rows-table4 th:nth-child(4)"
    click(browser, f"{head} button")
    assert one(browser, head).get_attribute("aria-sort") == "ascending" and column(browser, cells) == shown
    one(browser, f"{head} button").send_keys("\ue007")                          # Enter
    assert one(browser, head).get_attribute("aria-sort") == "descending" and column(browser, cells) == shown[::-1]
    click(browser, "#rows-table4 th:nth-child(1) button")
    assert column(browser, "#rows-table4 tbody td:first-child") == 3 * ["cion"] + 3 * ["dino"] + 3 * ["lup"]
    assert one(browser, head).get_attribute("aria-sort") is None
    click(browser, "#verdicts th:nth-child(2) button")
    assert column(browser, "#verdicts td:nth-child(2)") == ["agrees", "contradicts", "not resolved"]


@pytest.mark.slow("starts a browser")
def test_from_a_claim_to_the_run_that_made_its_numbers(look):
    browser = look()
    assert not one(browser, "#rows-table4").get_attribute("open")
    click(browser, "#verdicts tbody tr:first-child td:nth-child(3) a")
    assert one(browser, "#rows-table4").get_attribute("open")
    link = one(browser, "#rows-table4 tbody tr:nth-child(5) td:nth-child(4) a")
    name = link.get_attribute("hash")[1:]
    assert name.startswith("run-finetune") and not browser.find_element("id", name).get_attribute("open")
    link.click()
    run = browser.find_element("id", name)
    assert run.get_attribute("open") and "seed" in run.text and "versions" in run.text
    seen = browser.execute_script("return arguments[0].getBoundingClientRect().top", run)
    assert 0 <= seen < 900, "and it is in view"
    run.find_element("css selector", "summary").click()
    browser.execute_script("location.hash = ''")
    browser.execute_script("location.hash = arguments[0]", name)
    assert browser.find_element("id", name).get_attribute("open")


@pytest.mark.slow("starts a browser")
@pytest.mark.parametrize("width", [390, 1800])
def test_a_figure_is_enlarged(look, width):
    browser = look(width)
    def widths(): return [one(browser, f"{part} img").size["width"] for part in ("#table4 figure", "dialog")]
    click(browser, "#table4 .zoom")
    small, large = widths()
    assert one(browser, "dialog").is_displayed() and large > 1.15 * small
    click(browser, "dialog [data-by='1.5']")
    assert widths()[1] > 1.4 * large
    one(browser, "dialog").send_keys("\ue00c")                                  # Escape
    assert not one(browser, "dialog").is_displayed()
