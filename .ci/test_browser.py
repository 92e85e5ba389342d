"""The page of README.md in a real Chromium, with a stand-in for Layercode's cloud.

It needs chromium, chromedriver, and in LAYERCODE_JS_SDK the path of Layercode's
layercode-js-sdk.esm.js.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

import agent
from agent import Agent, Event, Settings, Speech, Turn
from test_agent import SECRET, Layercode, Start, served

pytestmark = pytest.mark.asyncio

README = Path(agent.__file__).with_name("README.md")
SDK = os.environ.get("LAYERCODE_JS_SDK", "")
IS_HERE = bool(SDK and shutil.which("chromium") and shutil.which("chromedriver"))
OPTIONS = [
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-sync",
    "disable-component-update",
    "hide-scrollbars",
    "use-fake-device-for-media-stream",
]
ALLOW_MICROPHONE = "use-fake-ui-for-media-stream"
# Half a second of silence: 16,000 samples a second, each of two bytes.
SOUND = base64.b64encode(bytes(18_000)).decode()
SETTINGS = Settings(
    layercode_webhook_secret=SECRET,
    layercode_api_key="API-KEY",
    layercode_agent_id="your-agent-id",
)


def page_of_readme() -> str:
    """The page as README.md has it."""
    blocks = re.findall(r"(?ms)^```html\n(.*?)^```$", README.read_text("utf-8"))
    [page] = [block for block in blocks if "LayercodeClient" in block]
    return str(page)


# ---- Chromium ------------------------------------------------------------------------


class Browser:
    """A page in Chromium, driven by chromedriver."""

    def __init__(self, http: aiohttp.ClientSession, session: str) -> None:
        self.http = http
        self.session = session

    async def command(self, path: str, **body: Any) -> Any:
        """Posts a WebDriver command; gives its value."""
        async with self.http.post(self.session + path, json=body) as response:
            answer = await response.json()
            assert response.ok, answer
            return answer["value"]

    async def devtools(self, command: str, **parameters: Any) -> Any:
        """Gives Chromium a command of its DevTools."""
        return await self.command("/goog/cdp/execute", cmd=command, params=parameters)

    async def run(self, script: str) -> Any:
        """What a script that returns something gives."""
        return await self.command("/execute/sync", script=script, args=[])

    async def until(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        try:
            async with asyncio.timeout(15):
                while not await self.run(f"return Boolean({condition});"):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            shown = await self.run("return document.body.innerText;")
            raise AssertionError(f"not {condition}: {shown!r}") from None

    async def click(self, label: str) -> None:
        """Clicks the button when it has this label."""
        await self.until(f"document.querySelector('button').textContent == '{label}'")
        element = await self.command("/element", using="css selector", value="button")
        [button] = element.values()
        await self.command(f"/element/{button}/click")

    async def screenshot(self, width: int, height: int, dark: bool = False) -> bytes:
        """A picture of the page, as PNG, with two pixels for each of CSS."""
        await self.show_at(width, height, dark)
        shot = await self.devtools("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])

    async def show_at(self, width: int, height: int, dark: bool = False) -> None:
        """Has the page shown in a window of this size, light or dark."""
        await self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=False,
        )
        scheme = "dark" if dark else "light"
        await self.devtools(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )


@asynccontextmanager
async def chromium(profile: Path, *options: str) -> AsyncIterator[Browser]:
    """A headless Chromium without a window."""
    driver, port = await start_chromedriver()
    timeout = aiohttp.ClientTimeout(30)
    arguments = [*OPTIONS, *options, f"user-data-dir={profile}"]
    chrome = {"binary": shutil.which("chromium"), "args": arguments}
    wanted = {"alwaysMatch": {"goog:chromeOptions": chrome}}
    try:
        async with aiohttp.ClientSession(timeout=timeout) as http:
            browser = Browser(http, f"http://127.0.0.1:{port}/session")
            created = await browser.command("", capabilities=wanted)
            browser.session += "/" + created["sessionId"]
            yield browser
            await http.delete(browser.session)
    finally:
        driver.kill()
        await driver.wait()


async def start_chromedriver() -> tuple[Process, int]:
    """A chromedriver and its port."""
    async with asyncio.timeout(60):
        while True:
            driver = await asyncio.create_subprocess_exec(
                "chromedriver", "--port=0", stdout=PIPE
            )
            assert driver.stdout is not None
            # Another process may take its port before it does; then it ends.
            with contextlib.suppress(asyncio.IncompleteReadError):
                await driver.stdout.readuntil(b"successfully on port ")
                return driver, int((await driver.stdout.readuntil(b"."))[:-1])
            await driver.wait()


# ---- Layercode's cloud ---------------------------------------------------------------


class Cloud:
    """Plays Layercode's cloud: authorizes the page, and calls the agent for it."""

    def __init__(self) -> None:
        # What the caller says, once the greeting is over.
        self.script: list[str] = []
        # How each of the agent's answers sounds.
        self.sound = SOUND
        self.caller: Layercode | None = None
        self.page = ""
        self.authorized: list[tuple[str, Event]] = []
        # The first visitors to be refused, and why.
        self.refusals: list[str] = []
        self.keys: list[str] = []

    def show(self, caller: Layercode) -> None:
        """Serves README.md's page, with the agent at the caller's URL."""
        page = page_of_readme().replace("http://localhost:3000", caller.url)
        self.page = re.sub(r"https://cdn\.\S+\.esm\.js", "/sdk", page)
        self.caller = caller

    async def authorize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.authorized.append((request.headers["Authorization"], asked))
        if self.refusals:
            return web.json_response({"error": self.refusals.pop()}, status=402)
        config = {
            "transcription": {"trigger": "automatic", "can_interrupt": True},
            "vad": {"enabled": False},
        }
        return web.json_response(
            {"client_session_key": "a key", "conversation_id": "c", "config": config}
        )

    async def talk(self, request: web.Request) -> web.WebSocketResponse:
        """Layercode's end of the page's WebSocket."""
        assert self.caller is not None
        self.keys.append(request.query["client_session_key"])
        page = web.WebSocketResponse()
        await page.prepare(request)
        played = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            conversation = None
            async for message in page:
                kind = message.json()["type"]
                if kind == "client.ready" and conversation is None:
                    conversation = tasks.create_task(self.converse(page, played))
                if kind == "trigger.response.audio.replay_finished":
                    played.set()
            if conversation is not None:
                conversation.cancel()
        return page

    async def converse(
        self, page: web.WebSocketResponse, played: asyncio.Event
    ) -> None:
        assert self.caller is not None
        await self.speak(page, self.caller.event("session.start"), played)
        for text in self.script:
            event = self.caller.event("message", text=text)
            await page.send_json({"type": "turn.start", "role": "user"})
            await page.send_json({**event, "type": "user.transcript", "content": text})
            await page.send_json({"type": "turn.end", "role": "user"})
            await self.speak(page, event, played)

    async def speak(
        self, page: web.WebSocketResponse, event: Event, played: asyncio.Event
    ) -> None:
        """Has the agent answer, and the page show it and play it to its end."""
        assert self.caller is not None
        turn = {"turn_id": event["turn_id"]}
        words = ""
        for frame in await self.caller.frames(event):
            if frame["type"] == "response.tts":
                words += frame["content"]
                frame["type"] = "response.text.delta"
            if frame["type"] != "response.end":
                await page.send_json(frame)
        played.clear()
        await page.send_json({**turn, "type": "response.audio", "content": self.sound})
        # The whole of it comes once more when it is over.
        await page.send_json({**turn, "type": "response.text", "content": words})
        await page.send_json({**turn, "type": "response.end"})
        async with asyncio.timeout(10):
            await played.wait()

    async def show_page(self, request: web.Request) -> web.Response:
        return web.Response(text=self.page, content_type="text/html")

    async def show_sdk(self, request: web.Request) -> web.Response:
        script = Path(SDK).read_text("utf-8")
        here = f"ws://{request.host}"
        return web.Response(
            text=script.replace("wss://api.layercode.com", here),
            content_type="text/javascript",
        )

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/agents/web/authorize_session", self.authorize),
                web.get("/v1/agents/web/websocket", self.talk),
                web.get("/sdk", self.show_sdk),
                web.get("/", self.show_page),
            ]
        )
        return app


Visit = Callable[..., Awaitable[Browser]]


@pytest_asyncio.fixture
async def cloud() -> Cloud:
    return Cloud()


@pytest_asyncio.fixture
async def visit(cloud: Cloud, start: Start, tmp_path: Path) -> AsyncIterator[Visit]:
    """Opens README.md's page in Chromium, with an agent of this class behind it."""
    if not IS_HERE:
        pytest.skip(__doc__)
    async with AsyncExitStack() as stack:

        async def visit(
            kind: type[Agent] = Agent,
            settings: Settings = SETTINGS,
            microphone: str = ALLOW_MICROPHONE,
        ) -> Browser:
            url = await stack.enter_async_context(served(cloud.app()))
            settings = replace(settings, layercode_api_url=url)
            caller = await start(kind(settings))
            cloud.show(caller)
            browser = await stack.enter_async_context(
                chromium(tmp_path / "profile", microphone)
            )
            address = url.replace("127.0.0.1", "localhost")
            await browser.command("/url", url=address)
            return browser

        yield visit


# ---- What visitors see ---------------------------------------------------------------

ORDER = {"order": "a large salami", "ready in": "20 minutes"}
LABELS = """
    window.labels = [];
    const look = () => {
        const label = document.querySelector("#state").textContent;
        if (labels.at(-1) !== label) labels.push(label);
    };
    const changes = { subtree: true, childList: true, characterData: true };
    new MutationObserver(look).observe(document.querySelector("#state"), changes);
"""


class Pizzeria(Agent):
    """Takes an order, and shows it to the page."""

    greeting = "Luigi's Pizza! What can I get you?"

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        yield "One large salami, "
        yield {"type": "response.data", "content": ORDER}
        yield "ready in twenty minutes."


async def test_a_visitor_talks_to_the_agent_and_sees_what_it_does(
    visit: Visit, cloud: Cloud
) -> None:
    cloud.script = ["A large salami, please.", "Thank you."]
    browser = await visit(Pizzeria)
    await browser.run(LABELS)
    await browser.click("Start talking")
    await browser.until("document.querySelectorAll('.data').length == 2")
    await browser.until("labels.filter((label) => label == 'Speaking').length == 3")
    await browser.until("document.querySelector('#state').textContent == 'Listening'")
    bubbles = await browser.run(
        "return [...document.querySelector('main').children].map("
        "(bubble) => [bubble.className, bubble.textContent]);"
    )
    order = ["data", json.dumps(ORDER, indent=2)]
    answer = ["agent", "One large salami, ready in twenty minutes."]
    assert bubbles == [
        ["agent", Pizzeria.greeting],
        ["caller", "A large salami, please."],
        answer,
        order,
        ["caller", "Thank you."],
        answer,
        order,
    ]
    assert await browser.run("return labels;") == [
        "Connecting",
        *["Listening", "Speaking", "Listening", "Hearing you"] * 2,
        *["Listening", "Speaking", "Listening"],
    ]
    [(key, asked)] = cloud.authorized
    assert (key, asked["agent_id"]) == ("Bearer API-KEY", "your-agent-id")
    assert cloud.keys == ["a key"]


async def test_a_visitor_hangs_up_and_calls_again(visit: Visit, cloud: Cloud) -> None:
    browser = await visit()
    await browser.click("Start talking")
    await browser.click("Hang up")
    await browser.click("Start talking")
    await browser.until("document.querySelector('#state').textContent == 'Listening'")
    assert len(cloud.authorized) == 2
    assert await browser.run("return document.querySelector('#error').innerText;") == ""


@pytest.mark.parametrize("width", [320, 1400])
async def test_nothing_is_wider_than_the_window(
    width: int, visit: Visit, cloud: Cloud
) -> None:
    cloud.script = ["A" * 200, *["Another salami, please."] * 8]
    browser = await visit(Pizzeria)
    await browser.show_at(width, 600)
    await browser.click("Start talking")
    await browser.until("document.querySelectorAll('.data').length > 6")
    sizes = "document.documentElement.scrollWidth, innerWidth, scrollY"
    scrolls, inner, down = await browser.run(f"return [{sizes}];")
    assert scrolls == inner == width
    # The newest words and the button are in sight.
    assert down > 0
    button = "document.querySelector('button').getBoundingClientRect().bottom"
    assert await browser.run(f"return {button};") <= 600


async def test_the_page_is_dark_where_the_system_is(visit: Visit, cloud: Cloud) -> None:
    browser = await visit()
    await browser.click("Start talking")
    await browser.until("document.querySelector('.agent')")
    colours = (
        "const { color, backgroundColor } = "
        "getComputedStyle(document.querySelector('.agent'));"
        "return [color, backgroundColor];"
    )
    await browser.show_at(700, 460)
    words, bubble = await browser.run(colours)
    assert (words, bubble) == ("rgb(0, 0, 0)", "rgb(236, 238, 242)")
    await browser.show_at(700, 460, dark=True)
    words, bubble = await browser.run(colours)
    assert (words, bubble) == ("rgb(255, 255, 255)", "rgb(43, 46, 52)")


async def failure(browser: Browser) -> str:
    """What the page says of a call that could not be begun."""
    await browser.click("Start talking")
    await browser.until("document.querySelector('#error').textContent")
    await browser.until("document.querySelector('button').textContent == 'Try again'")
    return str(await browser.run("return document.querySelector('#error').innerText;"))


async def test_an_agent_that_does_not_run_is_what_the_page_asks_about(
    visit: Visit, cloud: Cloud
) -> None:
    browser = await visit()
    cloud.page = re.sub(
        r'"http://127[^"]+"', '"http://127.0.0.1:1/authorize"', cloud.page
    )
    await browser.command("/refresh")
    origin = await browser.run("return location.origin;")
    assert await failure(browser) == (
        "No answer. Is the agent running at http://127.0.0.1:1/authorize, "
        f"and is {origin} in its ALLOWED_ORIGINS?"
    )


async def test_a_page_whose_origin_is_not_allowed_asks_about_that(
    visit: Visit,
) -> None:
    elsewhere = replace(SETTINGS, allowed_origins="https://app.example.com")
    browser = await visit(Agent, elsewhere)
    origin = await browser.run("return location.origin;")
    assert f"is {origin} in its ALLOWED_ORIGINS?" in await failure(browser)


async def test_the_agents_reason_for_a_refusal_is_shown(visit: Visit) -> None:
    browser = await visit(Agent, replace(SETTINGS, layercode_api_key=""))
    assert "LAYERCODE_API_KEY is not set" in await failure(browser)


async def test_a_visitor_who_tries_again_with_success_sees_no_error(
    visit: Visit, cloud: Cloud
) -> None:
    cloud.refusals = ["insufficient balance"]
    browser = await visit()
    assert "insufficient balance" in await failure(browser)
    await browser.click("Try again")
    await browser.until("document.querySelector('.agent')")
    assert await browser.run("return document.querySelector('#error').innerText;") == ""


async def test_a_microphone_that_is_blocked_is_named(visit: Visit) -> None:
    browser = await visit(microphone="deny-permission-prompts")
    assert await failure(browser) == (
        "The microphone is blocked. Allow it beside the page's address, and try again."
    )
