"""A headless Chromium for tests of the page; skips them where there is none."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAIT_SECONDS = 60.0
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
)


def binaries() -> tuple[str, str]:
    """Of the browser and of its driver; skips the test where one is missing."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs a browser: install chromium and chromium-driver")
    return browser, driver


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A WebDriver of a browser with a fresh profile, which keeps a log of the console and of requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser, chromedriver = binaries()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in a browser, by what a test asks of it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> None:
        self.driver.get(self.url)

    def script(self, expression: str, *arguments: Any) -> Any:
        """Value of an expression in the page."""
        return self.driver.execute_script(f"return {expression}", *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """Text of the last element of a selector, "" if there is none."""
        return str(
            self.script("[...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector)
        )

    def until(self, condition: Callable[[], Any]) -> Any:
        """The condition's value once it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_SECONDS, 0.03).until(lambda _: condition())

    def hover(self, element: Any, x: int = 0, y: int = 0) -> None:
        """Points at an element, off its centre by some pixels."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element_with_offset(element, x, y).perform()

    def complaints(self) -> list[str]:
        """What the browser has written to the console since the last call: errors, violations of the policy."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        import json

        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url.startswith(("http", "ws"))]  # not those of the browser itself
