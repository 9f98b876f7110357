"""Headless Chromium; tests of pages are skipped where there is none."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
available = bool(BROWSER and DRIVER)
NEEDED = "needs chromium and chromedriver"
needed = pytest.mark.skipif(not available, reason=NEEDED)


class Browser:
    """A browser; its methods wait for conditions instead of sleeping."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def find(self, selector: str) -> list:
        """Find elements by CSS selector; there may be none."""
        return self.driver.find_elements("css selector", selector)

    def until(self, condition) -> None:
        """Wait until a condition holds on the page."""
        wait = WebDriverWait(self.driver, 60, 0.05, [StaleElementReferenceException])
        wait.until(lambda _: condition())

    def text(self, selector: str) -> str:
        """Return the text of the first element of a selector."""
        return self.find(selector)[0].text

    def errors(self) -> list:
        """Return the errors in the console since the last call."""
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """Run a browser for the duration of the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
