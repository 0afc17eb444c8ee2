"""The page in headless Chromium: what a person sees and does."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.server.app import build_app
from jaxpaged.serve.server.options import ServerOptions
from tests.engine.tiny import GREEDY, new_engine, prompt_of
from tests.serve.chromium import Page, binaries, chromium
from tests.serve.page_server import END, PageServer, chat_chunk, listening, text_chunk, usage_chunk

SHARED_TOKENS = 20  # five blocks


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    binaries()
    with (
        new_engine(num_host_blocks=24, preemption_mode="swap", num_scheduler_steps=1) as engine,
        PageServer(engine).running() as server,
    ):
        yield server


@pytest.fixture(scope="module")
def driver(server: PageServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(driver: Any, server: PageServer) -> Iterator[Page]:
    """The page, opened anew; whatever a test does, it asks nobody else and the browser has nothing to complain of."""
    server.bodies.clear()
    server.keys.clear()
    server.refusal = None
    page = Page(driver, server.url)
    page.open()
    page.until(lambda: page.script("document.getElementById('state').dataset.state") == "ready")
    yield page
    server.say(END)
    for name in list(server.stepped.engine.block_tables()):
        server.stepped.change(lambda engine, name=name: engine.abort_request(name))
    while server.stepped.engine.has_unfinished_requests:
        server.stepped.step()
    server.stepped.change(lambda engine: engine.reset_prefix_cache())
    assert [url for url in page.requested() if not url.startswith(server.url)] == []
    assert page.complaints() == []


def start(server: PageServer, *lengths: int, max_tokens: int = 60, **params: Any) -> None:
    """Requests r0, r1, ... that begin with the same tokens."""
    for number, length in enumerate(lengths):
        prompt = prompt_of(SHARED_TOKENS) + prompt_of(length, seed=number + 1)
        given = GREEDY.clone(max_tokens=max_tokens, **params)
        server.stepped.change(lambda engine, n=number, p=prompt, g=given: engine.add_request(f"r{n}", p, g))


def states_match(page: Page, server: PageServer) -> bool:
    shown = page.script("Array.from(window.jaxpaged.pool.states)")
    return bytes(shown) == server.stepped.engine.block_states()


def held_by(server: PageServer, name: str) -> set[int]:
    return {block for table in server.stepped.engine.block_tables()[name] for block in table}


def lit(page: Page) -> set[int]:
    return set(page.script("[...window.jaxpaged.map.lit]"))


def pixels(page: Page) -> str:
    """What is drawn on the map."""
    return str(page.script("document.getElementById('map-base').toDataURL()"))


def test_the_map_follows_the_pool(page: Page, server: PageServer) -> None:
    page.until(lambda: states_match(page, server))
    empty = pixels(page)
    start(server, 6, 9)
    server.stepped.step(8)
    page.until(lambda: states_match(page, server))
    page.until(lambda: pixels(page) != empty)
    assert page.text("#legend [data-kind=shared] .count") == "5"
    assert page.text("#model") == "tiny<model>"
    assert page.text("#requests-note") == "2"
    assert page.text("[data-figure=running]") == "2"
    tables = page.script("[...window.jaxpaged.pool.requests.values()].map((r) => r.tables[0])")
    assert [set(table) for table in tables] == [held_by(server, "r0"), held_by(server, "r1")]
    drawn = int(page.script("window.jaxpaged.map.numDrawn"))
    server.stepped.step(1)
    server.stepped.step(1)
    steps = len(server.stepped.engine.iteration_records())
    page.until(lambda: int(page.script("document.getElementById('steps').dataset.steps")) == min(200, steps))
    # Only what changed is drawn: a few cells over some frames, not the whole map again and again.
    assert int(page.script("window.jaxpaged.map.numDrawn")) - drawn < 39 * 10
    server.stepped.step(200)
    page.until(lambda: states_match(page, server) and page.text("#requests-note") == "none")
    assert int(page.text("#legend [data-kind=cached] .count")) > 0
    assert page.text("#legend [data-kind=owned] .count") == "0"


def test_blocks_of_what_is_pointed_at_stand_out(page: Page, server: PageServer) -> None:
    start(server, 6, 9)
    server.stepped.step(8)
    page.until(lambda: states_match(page, server) and page.text("#requests-note") == "2")
    row = page.find("#requests li")
    page.hover(row)
    page.until(lambda: lit(page) == held_by(server, "r0"))
    server.stepped.step(20)  # it grows, and so does what is lit
    page.until(lambda: states_match(page, server) and lit(page) == held_by(server, "r0"))
    page.hover(page.find(".figures"))
    page.until(lambda: not lit(page))
    # A block on the map lights those of everybody who holds it.
    overlay = page.find("#map-overlay")
    for block, names in ((min(held_by(server, "r0") & held_by(server, "r1")), ("r0", "r1")),):
        cell = page.script("window.jaxpaged.map.placeOf(arguments[0])", block)
        box = overlay.size
        page.hover(
            overlay,
            round(cell["x"] + cell["width"] / 2 - box["width"] / 2),
            round(cell["y"] + cell["height"] / 2 - box["height"] / 2),
        )
        page.until(lambda names=names: lit(page) == set().union(*(held_by(server, n) for n in names)))
        assert page.text("#map-tooltip strong") == f"block {block}"
        assert "shared by 2" in page.text("#map-tooltip")
        assert [e.text for e in page.driver.find_elements("css selector", "#map-tooltip code")] == list(names)
    # With the keyboard as well.
    page.hover(page.find(".figures"))
    page.until(lambda: not lit(page))
    page.script("document.getElementById('map-overlay').focus()")
    overlay.send_keys("\ue011", "\ue014")  # Home, right
    assert page.text("#map-tooltip strong") == "block 1"
    page.script("document.querySelectorAll('#requests li')[1].focus()")
    page.until(lambda: lit(page) == held_by(server, "r1"))


def test_swapped_requests_are_seen_in_host_memory(page: Page, server: PageServer) -> None:
    start(server, 8, 8, 8, 8, 8, max_tokens=70)
    swapped = "[...window.jaxpaged.pool.requests.values()].filter((r) => r.host > 0).length"
    for _ in range(120):
        server.stepped.step()
        if server.stepped.engine.stats().num_host_blocks_held:
            break
    page.until(lambda: page.script(swapped) > 0 and states_match(page, server))
    held = server.stepped.engine.stats().num_host_blocks_held
    assert page.text("#legend [data-kind=swapped] .count") == str(held)
    assert f"{held} swapped" in page.text("#host .note")
    assert page.script("document.querySelectorAll('#host .swapped').length") == page.script(swapped)
    assert "swapped" in page.text("#requests li[data-state=swapped] .blocks")


def test_an_answer_comes_piece_by_piece_and_as_text(page: Page, server: PageServer) -> None:
    page.find("#tab-completion").click()
    page.find("#prompt").send_keys("Say <i>it</i>", "\ue009", "\ue007")  # Ctrl + Enter
    page.until(lambda: server.bodies)
    server.say(text_chunk("<script>alert(1)</script>"))
    page.until(lambda: page.text(".answer .text") == "Say <i>it</i><script>alert(1)</script>")
    assert page.script("document.querySelector('.answer').dataset.running") == "true"
    server.say(text_chunk("<img src=x onerror=alert(2)>\n"))
    page.until(lambda: page.text(".answer .text").endswith("onerror=alert(2)>\n"))
    server.say(text_chunk("end", finish="stop"), usage_chunk(5, 7), END)
    page.until(lambda: page.script("document.querySelector('.answer').dataset.running") == "false")
    assert page.script("document.querySelectorAll('.answer script, .answer img, .answer i').length") == 0
    assert "5 + 7 tokens" in page.text(".answer footer")
    assert "stop" in page.text(".answer footer")
    body = server.bodies[0]
    assert body["prompt"] == "Say <i>it</i>"
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert (body["model"], body["max_tokens"]) == ("tiny<model>", 256)
    assert body["request_id"].startswith("page-")
    # Pointing at the answer lights the blocks of its request.
    name = f"cmpl-{body['request_id']}-0"
    server.stepped.change(lambda engine: engine.add_request(name, prompt_of(17), GREEDY))
    server.stepped.step(3)
    page.hover(page.find(".answer"))
    page.until(lambda: lit(page) == held_by(server, name))


def test_a_chat_goes_on_and_can_be_stopped(page: Page, server: PageServer) -> None:
    page.script("document.querySelector('.sampling').open = true")
    for name, value in {
        "temperature": "0.5",
        "top_k": "7",
        "n": "1",
        "seed": "11",
        "stop": "one\\n\ntwo",
    }.items():
        page.script("document.querySelector(`[name=${arguments[0]}]`).value = arguments[1]", name, value)
    page.find("[name=system]").send_keys("Be brief.")
    page.find("#prompt").send_keys("first\n")
    page.until(lambda: len(server.bodies) == 1)
    server.say(chat_chunk("one"), chat_chunk(" more", "length"), END)
    page.until(lambda: page.text(".answer footer").endswith("length"))
    page.find("#prompt").send_keys("second\n")
    page.until(lambda: len(server.bodies) == 2)
    body = server.bodies[1]
    assert [m["content"] for m in body["messages"]] == ["Be brief.", "first", "one more", "second"]
    sent = {name: body[name] for name in ("temperature", "top_k", "n", "seed", "stop")}
    assert sent == {"temperature": 0.5, "top_k": 7, "n": 1, "seed": 11, "stop": ["one\n", "two"]}
    assert "top_p" not in body
    server.say(chat_chunk("never to"))
    page.until(lambda: page.text(".answer .text") == "never to")
    page.find("#stop").click()
    page.until(lambda: server.num_gone >= 1)
    page.until(lambda: page.text(".answer footer").endswith("stopped"))
    assert page.find("#send").is_displayed()
    page.find("[name=temperature]").send_keys("\ue008\ue011", "9" * 400)
    page.script("(document.querySelector('[name=top_p]').value = 3)")
    page.find("#prompt").send_keys("third\n")
    page.until(lambda: page.text(".error").startswith("top_p"))
    assert len(server.bodies) == 2


def test_errors_are_shown_and_completion_offered(page: Page, server: PageServer) -> None:
    server.refusal = (400, "this model has no <chat template>")
    page.find("#prompt").send_keys("hello\n")
    page.until(lambda: "no <chat template>" in page.text(".error"))
    refused = page.complaints()  # the browser notes a status of 400, and nothing else
    assert len(refused) == 1
    assert "400" in refused[0]
    page.find(".error button").click()
    assert page.script("document.getElementById('prompt').value") == "hello"
    assert page.script("document.getElementById('panel-completion').hidden") is False
    server.refusal = None
    page.find("#send").click()
    page.until(lambda: len(server.bodies) == 2)
    server.say(text_chunk("some"), {"error": {"message": "the engine has died"}}, END)
    page.until(lambda: page.text(".error") == "the engine has died")
    assert page.text("#completion-log .answer .text") == "hellosome"


def test_tokens_are_tinted_by_their_probability(page: Page, server: PageServer) -> None:
    page.find("#tab-completion").click()
    page.script("document.querySelector('.sampling').open = true")
    page.find("[name=tint]").click()
    page.find("#prompt").send_keys("x")
    page.find("#send").click()
    page.until(lambda: server.bodies)
    assert server.bodies[0]["logprobs"] > 0
    chunk = text_chunk("ab")
    chunk["choices"][0]["logprobs"] = {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.01, -4.0],
        "top_logprobs": [{"a": -0.01, "<z>": -5.0}, {"q": -0.1}],
    }
    server.say(chunk, END)
    page.until(lambda: page.text(".answer .text") == "xab")
    assert page.script("[...document.querySelectorAll('.answer .text span')].map((s) => s.className)") == [
        "lead",
        "p1",
        "p5",
    ]
    assert '"<z>"' in page.script("document.querySelector('.answer .p1').title")


def test_a_key_is_sent_and_forgotten_with_the_tab(page: Page, server: PageServer) -> None:
    page.find("#key summary").click()
    page.find("#key-input").send_keys("sesame\n")
    page.until(lambda: page.script("document.getElementById('key').open") is False)
    page.until(lambda: page.script("document.getElementById('state').dataset.state") == "ready")
    page.find("#prompt").send_keys("hi\n")
    page.until(lambda: server.keys)
    assert server.keys == ["Bearer sesame"]
    assert page.script("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.script("sessionStorage.clear()")
    server.say(END)


def test_the_feed_comes_back(page: Page, server: PageServer) -> None:
    seen = page.script("window.jaxpaged.pool.version")
    page.script("window.jaxpaged.feed.restart()")
    page.until(lambda: page.script("window.jaxpaged.pool.version") > seen)
    start(server, 5)
    server.stepped.step(4)
    page.until(lambda: states_match(page, server))
    assert server.feed.num_viewers == 1


def test_a_phone_shows_one_side_at_a_time(page: Page, server: PageServer) -> None:
    metrics = {"width": 390, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.until(lambda: not page.find("#talk").is_displayed() and page.find("#map-base").is_displayed())
        page.find("[data-show=talk]").click()
        assert page.find("#talk").is_displayed()
        assert not page.find("#memory").is_displayed()
        page.find("[data-show=memory]").click()
        # Crisp: a pixel of the canvas is a pixel of the screen; and nothing sticks out at the side.
        width = "document.getElementById('map-base').width / document.getElementById('map').clientWidth"
        page.until(lambda: page.script(width) == 2)
        assert page.script("document.documentElement.scrollWidth") <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_whole_server(driver: Any) -> None:
    """What the page asks for is what the server takes, and what comes is what the engine says."""
    engine = new_engine()
    [expected] = engine.generate("hello", GREEDY.clone(max_tokens=40))
    serving = AsyncEngine(engine)
    options = ServerOptions(port=0, api_key=["sesame"])
    try:
        with listening(build_app(serving, options, ["tiny"]).asgi) as (_, url):
            page = Page(driver, url)
            page.open()
            page.until(lambda: page.script("document.getElementById('state').dataset.state") == "locked")
            refused = page.complaints()
            assert refused
            assert all("401" in complaint for complaint in refused)
            page.find("#key-input").send_keys("sesame\n")
            page.until(lambda: page.text("#model") == "tiny")
            page.find("#tab-completion").click()
            page.script("document.querySelector('.sampling').open = true")
            page.find("[name=tint]").click()
            for name, value in {"temperature": "0", "max_tokens": "40"}.items():
                page.script(
                    "document.querySelector(`[name=${arguments[0]}]`).value = arguments[1]", name, value
                )
            page.find("#prompt").send_keys("hello")
            page.find("#send").click()
            page.until(lambda: page.text(".answer footer").endswith("length"))
            assert page.text(".answer .text") == "hello" + expected.outputs[0].text
            assert len(page.driver.find_elements("css selector", ".answer .text span[title]")) > 5
            page.until(lambda: page.script("window.jaxpaged.pool.counters.num_finished") == 2)
            assert page.complaints() == []
            assert [each for each in page.requested() if not each.startswith(url)] == []
            page.script("sessionStorage.clear()")
            driver.get("about:blank")
    finally:
        asyncio.run(serving.close())
