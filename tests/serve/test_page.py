"""Where the page is served: files, headers, the stream of events."""

import asyncio
import re

import httpx
import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient, Response
from starlette.types import Message

from jaxpaged.serve.page.block_feed import BlockFeed
from jaxpaged.serve.page.routes import EventStream, load_assets, page_routes, public_paths
from tests.serve.feed_viewer import DEADLINE, FakeEngine, Viewed, fake, feed_of, run, until

__all__ = ["fake"]

ASSETS = load_assets()


def app_of(feed: BlockFeed) -> FastAPI:
    app = FastAPI()
    app.include_router(page_routes(feed))
    return app


def get(fake: FakeEngine, path: str, method: str = "GET", **headers: str) -> Response:
    async def main() -> Response:
        transport = ASGITransport(app_of(feed_of(fake)))
        async with AsyncClient(transport=transport, base_url="http://page") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(main())


def test_the_page_and_all_that_it_needs(fake: FakeEngine) -> None:
    index = get(fake, "/")
    assert (index.status_code, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r'(?:href|src)="(page/[^"]+)"', index.text)
    assert {"page/main.js", "page/page.css", "page/talk.css", "page/icon.svg"} <= set(named)
    for path in named:
        assert get(fake, f"/{path}").status_code == 200
    # Modules import what there is, and all that there is is used.
    imported = {
        name
        for file, asset in ASSETS.items()
        if file.endswith(".js")
        for name in re.findall(r'from "\./([^"]+)"', asset.body.decode())
    }
    loaded = imported | {path.removeprefix("page/") for path in named} | {"index.html"}
    assert loaded == set(ASSETS)


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("main.js", "text/javascript; charset=utf-8"),
        ("page.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_files_have_their_type_and_are_asked_for_again_only_when_they_change(
    fake: FakeEngine, name: str, media_type: str
) -> None:
    first = get(fake, f"/page/{name}")
    assert (first.status_code, first.headers["content-type"]) == (200, media_type)
    assert first.content == ASSETS[name].body
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = get(fake, f"/page/{name}", **{"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert get(fake, f"/page/{name}", **{"If-None-Match": '"other"'}).status_code == 200
    head = get(fake, f"/page/{name}", "HEAD")
    assert (head.status_code, head.headers["etag"]) == (200, tag)


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/nothing.js"])
def test_nothing_from_elsewhere_may_be_loaded_or_run(fake: FakeEngine, path: str) -> None:
    headers = get(fake, path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert {"script-src", "style-src", "connect-src", "img-src"}.isdisjoint(policy)
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "/page/../routes.py",
        "/page/..%2froutes.py",
        "/page/%2e%2e%2froutes.py",
        "/page/__init__.py",
        "/page/static/main.js",
        "/page/index.html",
        "/page/",
        "/page//etc/passwd",
        "/page/main.js%00.css",
        "/page/" + "x" * 5000,
    ],
)
def test_no_path_leads_anywhere_else(fake: FakeEngine, path: str) -> None:
    answer = get(fake, path)
    assert answer.status_code == 404
    assert len(answer.content) < 1000
    assert b"import" not in answer.content


def test_files_say_nothing_that_the_policy_forbids() -> None:
    """What the browser would refuse, and what would let text of a model become markup."""
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(.style"
    )
    forbidden += r"|\sstyle=|\son\w+=|javascript:|https?://(?!www\.w3\.org/2000/svg)|<script>|<style>|@import"
    found = {name: re.findall(forbidden, asset.body.decode()) for name, asset in ASSETS.items()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_files_are_short() -> None:
    long = {name: asset.body.count(b"\n") for name, asset in ASSETS.items() if name.endswith(".js")}
    assert {name: lines for name, lines in long.items() if lines > 300} == {}


def test_what_a_browser_gets_without_a_key() -> None:
    paths = public_paths()
    assert {"/", "/page/main.js"} <= set(paths)
    assert "/page/events" not in paths
    assert len(paths) == len(ASSETS)


def test_the_page_is_no_part_of_the_api(fake: FakeEngine) -> None:
    assert app_of(feed_of(fake)).openapi()["paths"] == {}


class Client:
    """A reader of the stream that decides when to take a chunk and when to go."""

    def __init__(self, feed: BlockFeed) -> None:
        self.messages: list[Message] = []
        self.viewed = Viewed()
        self.may_send = asyncio.Event()
        self.may_send.set()
        self._gone = asyncio.Event()
        scope: dict[str, object] = {
            "type": "http",
            "asgi": {"spec_version": "2.3"},
            "method": "GET",
            "path": "/page/events",
            "headers": [],
        }
        self.task = asyncio.ensure_future(EventStream(feed)(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.may_send.wait()
        self.messages.append(message)
        if message.get("body") and self.status == 200:
            self.viewed.feed(message["body"])

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"]) if self.messages else 0

    def headers(self) -> httpx.Headers:
        return httpx.Headers(self.messages[0]["headers"])

    async def go(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, DEADLINE)


def test_events_come_until_the_reader_goes(fake: FakeEngine) -> None:
    async def main() -> None:
        feed = feed_of(fake, max_viewers=2)
        clients = [Client(feed), Client(feed)]
        await until(lambda: all(client.viewed.num_events == 1 for client in clients))
        headers = clients[0].headers()
        assert headers["content-type"].startswith("text/event-stream")
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
        assert headers["x-content-type-options"] == "nosniff"
        third = Client(feed)
        await third.task
        assert third.status == 503
        assert int(third.headers()["retry-after"]) > 0
        assert b'"error"' in third.messages[1]["body"]
        await clients[0].go()
        assert feed.num_viewers == 1
        again = Client(feed)
        await until(lambda: again.viewed.num_events == 1)
        fake.step()
        await until(lambda: len(again.viewed.steps) == 1 and len(clients[1].viewed.steps) == 1)
        for client in (again, clients[1]):
            await client.go()
        assert (feed.num_viewers, feed._sampler) == (0, None)

    run(main)


def test_a_reader_that_takes_nothing_holds_up_nobody_and_can_go(fake: FakeEngine) -> None:
    async def main() -> None:
        feed = feed_of(fake)
        stuck, quick = Client(feed), Client(feed)
        await until(lambda: stuck.viewed.num_events == quick.viewed.num_events == 1)
        stuck.may_send.clear()
        for count in range(1, 60):
            fake.step()
            await until(lambda count=count: len(quick.viewed.steps) == count)
        assert stuck.viewed.num_events == 1
        stuck.may_send.set()
        await until(lambda: len(stuck.viewed.steps) == 59)
        assert stuck.viewed.num_events <= 4
        stuck.may_send.clear()
        fake.step()
        await until(lambda: len(quick.viewed.steps) == 60)
        await stuck.go()
        await quick.go()
        assert feed.num_viewers == 0

    run(main)


def test_the_stream_ends_when_the_feed_is_closed(fake: FakeEngine) -> None:
    async def main() -> None:
        feed = feed_of(fake)
        client = Client(feed)
        await until(lambda: client.viewed.num_events == 1)
        feed.close()
        await asyncio.wait_for(client.task, DEADLINE)
        assert client.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert feed.num_viewers == 0

    run(main)
