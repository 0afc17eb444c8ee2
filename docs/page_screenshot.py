"""Draws ``page.png`` beside this file: the page of a server at work, as a browser shows it.

    python docs/page_screenshot.py
    python docs/page_screenshot.py --light --size 420x900 --out narrow.png

Serves the embedded model from a pool that is a little too small for its requests, with a host tier behind it, and
lets Debian's chromium look at it. Needs selenium (``pip install selenium``), chromium and its driver.
"""

import argparse
import asyncio
import base64
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from jaxpaged import Engine, SamplingParams
from jaxpaged.models import embedded_model_path
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.demo import PROMPTS, SHARED
from jaxpaged.serve.server.app import build_app
from jaxpaged.serve.server.options import ServerOptions

ENDINGS = ("push(self, ", "pop(self", "__len__(self", "__repr__(self", "clear(self", "peek(self", "sort(self")
NUM_CLIENTS = 24
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def new_engine() -> Engine:
    """The embedded model in a pool that its requests fill."""
    return Engine(
        embedded_model_path(),
        num_blocks=576,
        block_size=8,
        max_model_len=1024,
        max_num_seqs=24,
        max_num_batched_tokens=128,
        num_host_blocks=192,
        preemption_mode="swap",
        num_scheduler_steps=1,
        warmup=True,
    )


@contextmanager
def serving() -> Iterator[tuple[AsyncEngine, str]]:
    """The engine behind a server at some port, in a thread."""
    engine = AsyncEngine(new_engine())
    options = ServerOptions(port=0)
    application = build_app(engine, options, ["embedded"])
    config = uvicorn.Config(application.asgi, port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield engine, f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()
        asyncio.run(engine.close())


async def client(engine: AsyncEngine, number: int) -> None:
    """Asks for one thing after the other, sometimes for several completions of one."""
    rng = random.Random(number)
    for turn in range(1000):
        shared = rng.random() < 0.6
        prompt = SHARED + rng.choice(ENDINGS) if shared else rng.choice(PROMPTS) * rng.randrange(1, 12)
        params = SamplingParams(
            max_tokens=rng.randrange(80, 420),
            temperature=0.7,
            n=rng.choice((1, 1, 1, 2, 3)),
            ignore_eos=True,
            seed=1000 * number + turn,
        )
        async for _ in engine.generate(prompt, params, request_id=f"cmpl-{rng.getrandbits(40):010x}"):
            pass
        await asyncio.sleep(rng.random())


def load(engine: AsyncEngine, stop: threading.Event) -> None:
    """Clients, until they are stopped."""

    async def main() -> None:
        clients = asyncio.gather(*(client(engine, number) for number in range(NUM_CLIENTS)))
        while not stop.is_set():
            await asyncio.sleep(0.1)
        clients.cancel()
        await asyncio.gather(clients, return_exceptions=True)

    asyncio.run(main())


@contextmanager
def browser(width: int, height: int, scale: float, light: bool) -> Iterator[Any]:
    """A window of a fresh browser without a screen."""
    options, profile = ChromeOptions(), tempfile.mkdtemp()
    options.binary_location = shutil.which("chromium") or "chromium"
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "light" if light else "dark"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def look(driver: Any, url: str, given: argparse.Namespace) -> bytes:
    """Opens the page, has it complete something, points at the answer; the picture as PNG."""
    driver.get(url)
    wait = WebDriverWait(driver, 120)
    wait.until(lambda d: d.find_element(By.ID, "state").get_attribute("data-state") == "ready")
    if given.view == "talk":
        driver.find_element(By.CSS_SELECTOR, "[data-show=talk]").click()
    if given.view != "memory":
        driver.find_element(By.ID, "tab-completion").click()
        driver.execute_script(
            "document.querySelector('.sampling').open = true;"
            "document.querySelector('[name=tint]').checked = true;"
            "document.querySelector('[name=temperature]').value = 0.8;"
            "document.querySelector('[name=max_tokens]').value = 400;"
            "document.querySelector('.sampling').open = false;"
            "document.querySelector('#sampling').dispatchEvent(new Event('input'));"
        )
    time.sleep(given.seconds)
    if given.view != "memory":
        prompt = driver.find_element(By.ID, "prompt")
        prompt.send_keys(
            SHARED.split("class Queue")[0].rstrip().replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL)
        )
        prompt.send_keys(Keys.CONTROL, Keys.ENTER)
        wait.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, ".answer .text span")) > 110)
        if given.point:
            ActionChains(driver).move_to_element(
                driver.find_element(By.CSS_SELECTOR, ".answer footer")
            ).perform()
            time.sleep(0.5)
    return base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description="A picture of the page of a server at work.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("page.png"))
    parser.add_argument("--size", default="1440x860")
    parser.add_argument("--scale", type=float, default=1.0, help="Device pixels for each CSS pixel.")
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--view", choices=("both", "talk", "memory"), default="both")
    parser.add_argument("--point", action="store_true", help="At the answer, whose blocks then stand out.")
    parser.add_argument("--seconds", type=float, default=45.0, help="Of work before the picture is taken.")
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    stop = threading.Event()
    with serving() as (engine, url):
        clients = threading.Thread(target=load, args=(engine, stop))
        clients.start()
        try:
            with browser(width, height, given.scale, given.light) as driver:
                given.out.write_bytes(look(driver, url, given))
        finally:
            stop.set()
            clients.join()


if __name__ == "__main__":
    main()
