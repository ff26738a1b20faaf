"""A real browser: headless Chromium, driven by its chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.waiting import wait_until

SIZES = {"wide": (1440, 900), "phone": (390, 844)}

# Find, look and click in one turn of the page. In three (the driver's own click) the page may have drawn anew between
# them: then the click lands where the element was, on nothing or on another one.
CLICK = """
const one = document.querySelector(arguments[0]);
if (!one) return false;
one.scrollIntoView({ block: "center", behavior: "instant" });
const { left, top, width, height } = one.getBoundingClientRect();
const [x, y] = [left + width / 2, top + height / 2];
const hit = document.elementFromPoint(x, y);
if (!hit || !one.contains(hit)) return false;
for (const type of ["mousedown", "mouseup", "click"])
  hit.dispatchEvent(new MouseEvent(type, { bubbles: true, cancelable: true, view: window, clientX: x, clientY: y }));
return true;
"""


def browser_problem() -> str:
    """Why there is no browser here; "" if there is one."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"no {program}: apt-get install chromium chromium-driver, or .ci/setup browser"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install selenium"
    return ""


class Browser:
    """One window."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def look(self, url: str, size: str = "wide", scheme: str = "light") -> None:
        """Open a page in a window of that size, for a visitor who likes it light or dark."""
        width, height = SIZES[size]
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == "phone",
        )
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.driver.get(url)

    def command(self, name: str, **fields: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, fields)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """The text of an element as it is seen; "" if there is none."""
        found = self.run(
            "const one = document.querySelector(arguments[0]); return one?.checkVisibility() ? one.innerText : ''",
            selector,
        )
        return str(found)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that match."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)", selector
        )
        return found

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        """Click in the middle of an element, once it is there and nothing lies over it."""
        self.wait(lambda: self.run(CLICK, selector), f"{selector} cannot be clicked")

    def wait(self, condition: Callable[[], Any], told: str = "the page does not show it") -> Any:
        """Wait until a condition holds; what it returned."""
        return wait_until(condition, lambda: f"{told}: {self.text('body')[:2000]}", poll_s=0.05)

    def complaints(self) -> list[str]:
        """What the console has said since the last call."""
        return [f"{entry['level']} {entry['message']}" for entry in self.driver.get_log("browser")]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser for the length of a block."""
    browser = Browser()
    try:
        yield browser
    finally:
        browser.driver.quit()
