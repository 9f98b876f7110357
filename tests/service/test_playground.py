"""The playground in a real browser; skipped where there is no Chromium."""

import shutil

import pytest
from running import metric, serving

from service.app import create_app
from service.engine.backend import Simulator
from service.engine.launch import local
from service.settings import Settings

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_images_appear_while_typing_and_history_brings_them_back(browser):
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector):
        return browser.find_elements("css selector", selector)

    def until(condition):
        WebDriverWait(browser, 60, 0.05).until(lambda _: condition())

    with serving(create_app(Settings(), local(Simulator(0, 0)))) as url:
        browser.get(url)
        until(lambda: find("#model option"))
        find("#prompt")[0].send_keys("a red circle")
        until(lambda: any(image.get_attribute("alt") == "a red circle (seed 1)" for image in find("#images img")))
        assert metric(url, "requests_total", route="/v1/realtime/images", status="200") >= 1
        assert "encode" in find("#legend")[0].text
        find("#dice")[0].click()
        until(lambda: find("#images img") and "seed 1)" not in find("#images img")[0].get_attribute("alt"))
        find("#history li:last-child button")[0].click()
        until(lambda: "(seed 1)" in find("#images img")[0].get_attribute("alt"))
        assert browser.execute_script("return curl()").startswith(f"curl {url}/v1/images/generations")
        compile(browser.execute_script("return python()"), "copied", "exec")
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert errors == []
    with serving(create_app(Settings(realtime_limit=0), local(Simulator(0, 0)))) as url:  # where there are no sockets
        browser.get(url)
        until(lambda: find("#model option"))
        find("#prompt")[0].send_keys("a red circle")
        until(lambda: any(image.get_attribute("alt") == "a red circle (seed 1)" for image in find("#images img")))
        assert metric(url, "requests_total", route="/v1/images/generations", status="200") >= 1
