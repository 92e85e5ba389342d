"""The page of README.md in a real Chromium, against the agent and a stand-in for Layercode."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

import agent

pytestmark = pytest.mark.asyncio
README = Path(agent.__file__).with_name("README.md")
SDK = os.environ.get("LAYERCODE_JS_SDK", "")  # the path of layercode-js-sdk.esm.js
CHROMIUM = """headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync
    disable-component-update use-fake-device-for-media-stream use-fake-ui-for-media-stream""".split()
# Gives what the page shows as soon as it shows the words, and after ten seconds in any case.
WATCH = """const [words, done] = arguments, all = () => [...document.querySelectorAll("#state, #error, #transcript p")];
    const show = () => done(all().map((element) => [element.className || element.id, element.textContent]));
    const look = () => document.body.textContent.includes(words) && show();
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
    look(), setTimeout(show, 10000);"""


def readme_block(language, containing):
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README.read_text("utf-8"))
    return next(block for block in blocks if containing in block)


@pytest_asyncio.fixture
async def browser(tmp_path):
    """A headless Chromium; gives the function that posts a WebDriver command to its chromedriver."""
    if not (SDK and shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium, chromedriver, and LAYERCODE_JS_SDK: the path of layercode-js-sdk.esm.js")
    driver = await asyncio.create_subprocess_exec("chromedriver", "--port=0", stdout=asyncio.subprocess.PIPE)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as http:

        async def command(path, **body):
            async with http.post(session + path, json=body) as response:
                assert response.ok, await response.text()
                return (await response.json())["value"]

        try:
            await asyncio.wait_for(driver.stdout.readuntil(b"successfully on port "), 20)
            session = f"http://127.0.0.1:{int((await driver.stdout.readuntil(b'.'))[:-1])}/session"
            chrome = {"binary": shutil.which("chromium"), "args": [*CHROMIUM, f"user-data-dir={tmp_path}"]}
            created = await command("", capabilities={"alwaysMatch": {"goog:chromeOptions": chrome}})
            session += "/" + created["sessionId"]
            yield command
            await http.delete(session)
        finally:
            driver.kill()
            await driver.wait()


async def test_the_readme_page_talks_in_a_real_browser(start, gemini, aiohttp_server, browser):
    asked, files, site = [], {}, web.Application()

    async def authorize(request):
        asked.append((request.headers["Authorization"], (await request.json())["agent_id"]))
        config = {"transcription": {"trigger": "automatic", "can_interrupt": True}, "vad": {"enabled": False}}
        session = {"client_session_key": "a key", "conversation_id": caller.conversation}
        return web.json_response(session | {"config": config})

    async def talk(request):  # Layercode's end of the page's WebSocket
        asked.append(request.query["client_session_key"])
        await (socket := web.WebSocketResponse()).prepare(request)
        async for message in socket:
            if message.json()["type"] == "client.ready":
                _, (greeting, _) = await caller.send(caller.event("session.start"))
                await socket.send_json(greeting | {"type": "response.text.delta"})
                await socket.send_json(greeting | {"type": "response.text"})
                hello = caller.event("message", text="hello")
                await socket.send_json(hello | {"type": "user.transcript", "content": "hello"})
                for piece in (await caller.send(hello))[1][:-1]:
                    await socket.send_json(piece | {"type": "response.text"})
        return socket

    async def file(request):
        return web.Response(text=files[request.path], content_type=request.path[1:])

    site.add_routes([web.get("/v1/agents/web/websocket", talk), web.get("/text/{kind}", file)])
    site.router.add_post("/v1/agents/web/authorize_session", authorize)
    cloud = str((await aiohttp_server(site)).make_url("")).rstrip("/")
    keys = {"LAYERCODE_API_KEY": "API-KEY", "GOOGLE_GENERATIVE_AI_API_KEY": "SECRET-KEY"}
    caller = await start(keys | {"LAYERCODE_API_URL": cloud})
    page = readme_block("html", "LayercodeClient").replace("http://localhost:3000", caller.url)
    files["/text/html"] = re.sub(r"https://cdn\.\S+\.esm\.js", "/text/javascript", page)
    files["/text/javascript"] = Path(SDK).read_text("utf-8").replace("wss://api.layercode.com", "ws" + cloud[4:])
    await browser("/url", url=cloud.replace("127.0.0.1", "localhost") + "/text/html")
    [button] = (await browser("/element", using="css selector", value="button")).values()
    await browser(f"/element/{button}/click")
    said = [["agent", agent.GREETING], ["caller", "hello"], ["agent", "Sure, no problem."]]
    seen = await browser("/execute/async", script=WATCH, args=["no problem."])
    assert seen == [["state", "connected"], ["error", ""], *said]
    assert asked == [("Bearer API-KEY", "your-agent-id"), "a key"]
