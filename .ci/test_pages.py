"""The page and talk.py in a real Chromium; LAYERCODE_JS_SDK names the SDK's file."""

import http.client
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recipes
from aiohttp import web
from pictures import save_page
from served import free_port, running

PATIENCE = 20  # Seconds that anything may take on a machine that is busy.
# Chromium has a fake microphone and, because there is nothing but this machine, no CDN.
MICROPHONE = ["use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"]
NOTHING_ELSE = "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
OPTIONS = ["headless", "no-sandbox", "hide-scrollbars", *MICROPHONE, NOTHING_ELSE]


class Browser:
    """A tab of Chromium, driven by chromedriver at a port."""

    def __init__(self, port: int) -> None:
        self.port, self.path = port, "/session"
        chrome = {"goog:chromeOptions": {"args": OPTIONS}}
        created = self.command("", capabilities={"alwaysMatch": chrome})
        self.path += "/" + created["sessionId"]

    def command(self, path: str, method: str = "POST", **body: Any) -> Any:
        """Sends a WebDriver command; returns its value."""
        driver = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        driver.request(method, self.path + path, json.dumps(body))
        answer = driver.getresponse()
        value = json.load(answer)["value"]
        assert answer.status == 200, value
        return value

    def open(self, url: str, script: str = "") -> None:
        """Opens a page in a new tab; the script runs before its own."""
        tab = self.command("/window/new", type="tab")
        self.command("/window", handle=tab["handle"])
        before = "Page.addScriptToEvaluateOnNewDocument"
        self.command("/goog/cdp/execute", cmd=before, params={"source": script})
        self.command("/url", url=url)

    def run(self, expression: str) -> Any:
        return self.command("/execute/sync", script=f"return {expression}", args=[])

    def until(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not {condition}: {self.log()}"
            time.sleep(0.02)

    def shows(self, words: str) -> None:
        self.until(f"document.body.innerText.includes({json.dumps(words)})")

    def use(self, selector: str, action: str, **body: Any) -> None:
        found = self.command("/element", using="css selector", value=selector)
        [identifier] = found.values()
        self.command(f"/element/{identifier}/{action}", **body)

    def press(self, label: str) -> None:
        self.until(f"document.querySelector('button:enabled')?.innerText == '{label}'")
        self.use("button", "click")

    def log(self) -> list[list[str]]:
        """The lines of the conversation from top to bottom, each with its kind."""
        line = "[one.getBoundingClientRect().top, one.className, one.innerText]"
        lines = self.run(f"[...document.querySelectorAll('div')].map((one) => {line})")
        return [line for _, *line in sorted(lines) if line[-1]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    port = free_port()
    with running("chromedriver", f"--port={port}", up="started successfully"):
        browser = Browser(port)
        yield browser
        browser.command("", "DELETE")


# In the place of the SDK; the tests do what Layercode would.
STUB = """
export default class {
  status = "disconnected";
  constructor(options) { this.options = options; window.sdk = this; }
  become(status) { this.options.onStatusChange(this.status = status); }
  connect() { this.become("connected"); }
  disconnect() { this.become("disconnected"); }
}
"""


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    browser.open(save_page(tmp_path, STUB, "an-agent").as_uri())
    browser.until("window.sdk")
    return browser


def get(page: Browser, kind: str, content: Any, turn: str = "t") -> None:
    handler = "onDataMessage" if kind == "response.data" else "onMessage"
    message = json.dumps({"type": kind, "content": content, "turn_id": turn})
    page.run(f"sdk.options.{handler}({message})")


def test_a_conversation_is_drawn_as_it_is_spoken(page: Browser) -> None:
    get(page, "response.text.delta", "Luigi's Pizza! ", "t0")
    get(page, "response.text.delta", "What can I get you?", "t0")
    get(page, "response.text", "Luigi's Pizza! What can I get you?", "t0")
    get(page, "user.transcript", "A large salami, please.")
    # The state of a tool is one line that changes.
    get(page, "response.data", {"tool": "order", "state": "running"})
    assert page.log()[-1] == ["tool running", "order: running"]
    get(page, "response.data", {"tool": "order", "state": "failed"})
    get(page, "response.text", "We have no <b>salami</b>.")
    get(page, "response.data", {"ready": "never"})
    assert page.log() == [
        ["agent", "Luigi's Pizza! What can I get you?"],
        ["caller", "A large salami, please."],
        ["tool failed", "order: failed"],
        ["agent", "We have no <b>salami</b>."],
        ["data", '{\n  "ready": "never"\n}'],
    ]


def test_the_page_tells_of_errors_and_who_is_speaking(page: Browser) -> None:
    page.run("sdk.options.onError(new TypeError('x is not a function'))")
    page.until("document.querySelector('p').innerText == 'x is not a function'")
    page.press("Start talking")
    page.until("document.querySelector('p').innerText == ''")
    page.shows("Listening")
    page.run("sdk.options.onUserIsSpeakingChange(true)")
    page.shows("Hearing you")
    page.run("sdk.options.onAgentSpeakingChange(true)")
    page.shows("Speaking")
    page.press("Hang up")
    page.shows("Not connected")


def test_a_page_says_what_it_lacks(browser: Browser, tmp_path: Path) -> None:
    browser.open(save_page(tmp_path, "", "an-agent").as_uri())
    browser.shows("Layercode's SDK cannot be loaded. Is its address blocked?")
    browser.open(save_page(tmp_path, STUB, "your-agent-id").as_uri())
    browser.press("Start talking")
    browser.shows("Write your agent's id into index.html first.")


def test_on_a_phone_the_newest_words_and_the_button_are_in_sight(page: Browser) -> None:
    size = {"width": 320, "height": 600, "deviceScaleFactor": 1, "mobile": True}
    resize = "Emulation.setDeviceMetricsOverride"
    page.command("/goog/cdp/execute", cmd=resize, params=size)
    for turn in "abcdefghi":
        get(page, "user.transcript", "A" * 200, turn)
    assert page.run("document.documentElement.scrollWidth") == 320
    newest = "document.querySelector('main div:last-child').getBoundingClientRect()"
    button = "document.querySelector('button').getBoundingClientRect()"
    assert page.run(f"{newest}.bottom <= {button}.top && {button}.bottom <= 600")


async def layercode(request: web.Request) -> web.StreamResponse:
    """Authorizes those who have the key; in a call, it says the session's key."""
    if request.method == "POST":
        asked = f"{request.headers['Authorization']} {await request.text()}"
        if "Bearer A-KEY" not in asked or "an-agent" not in asked:
            return web.json_response({"error": "insufficient balance"}, status=402)
        config = {"transcription": {"trigger": "automatic"}, "vad": {"enabled": False}}
        return web.json_response({"client_session_key": "Hi!", "config": config})
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    key = request.query["client_session_key"]
    await socket.send_json({"type": "response.text", "turn_id": "t", "content": key})
    async for _ in socket:
        pass
    return socket


def test_the_real_sdk_gets_its_session_from_the_agent_that_serves_the_page(
    browser: Browser, tmp_path: Path
) -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", layercode)
    how = {"port": (cloud := free_port()), "handle_signals": False, "print": None}
    threading.Thread(target=web.run_app, args=[app], kwargs=how, daemon=True).start()
    sdk = Path(os.environ["LAYERCODE_JS_SDK"]).read_text("utf-8")
    sdk = sdk.replace("wss://api.layercode.com", f"ws://127.0.0.1:{cloud}")
    url = f"http://127.0.0.1:{cloud}"
    settings = {"LAYERCODE_API_URL": url, "LAYERCODE_API_KEY": "A-KEY"}
    file = str(shutil.copy(recipes.AGENT, tmp_path))
    with running(sys.executable, file, up="Up", **settings) as served:
        save_page(tmp_path, sdk, "another-agent")
        browser.open(served.url)
        browser.press("Start talking")
        browser.shows("insufficient balance")
        save_page(tmp_path, sdk, "an-agent")
        browser.command("/refresh")
        browser.press("Start talking")
        browser.shows("Hi!")
        browser.press("Hang up")
    browser.press("Start talking")
    browser.shows("The agent does not answer. Is it running?")


# The tests say when the voice ends a sentence, and what the recognition hears.
SENSES = """
window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
Object.defineProperty(window, "speechSynthesis", { value: {
  getVoices: () => window.voices ?? ["a voice"],
  speak: (sentence) => window.sentence = sentence,
  cancel: () => { window.sentence?.onerror({}); window.sentence = null; },
}});
window.SpeechRecognition = window.webkitSpeechRecognition = class {
  start() { window.recognition = this; }
  abort() {
    [this.isAborted, window.recognition] = [true, null];
    setTimeout(() => this.onend?.());
  }
  hear(transcript, isFinal) {
    this.onresult({ results: [Object.assign([{ transcript }], { isFinal })] });
  }
};
"""
PIZZA = """
import asyncio
from agent import Agent, contents
from talk import talk
class Pizza(Agent):
    greeting = "Luigi's Pizza! What can I get you?"
    async def reply(self, event, history):
        if event["text"] == "A story!":
            yield "Once. Upon a time. There was"
            await asyncio.Event().wait()
        elif event["text"] == "Goodbye":
            yield {"type": "response.data", "content": {"bill": "<b>12</b>"}}
            yield {"type": "response.hangup"}
            yield "Bye!"
        else:
            heard = contents(history)[-2]["parts"][0]["text"]
            yield "You heard: " + heard.replace("[interrupted]", "(interrupted)")
talk(Pizza)
"""


@pytest.fixture(scope="module")
def pizza(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL at which one talks to a pizzeria."""
    file = tmp_path_factory.mktemp("pizza") / "pizza.py"
    recipes.save("talk.py", file.parent)
    file.write_text(PIZZA)
    settings = {"HOST": "0.0.0.0", "LAYERCODE_API_KEY": "KEY"}
    with running(sys.executable, str(file), up="http://127", **settings) as served:
        yield served.url


@pytest.fixture
def call(browser: Browser, pizza: str) -> Browser:
    """A call whose greeting was spoken to its end."""
    browser.open(pizza, SENSES)
    browser.press("Call")
    speak(browser, "Luigi's Pizza!", "What can I get you?")
    return browser


def begin(call: Browser, text: str) -> None:
    call.until(f"window.sentence?.text.trim() == {json.dumps(text)}")


def speak(call: Browser, *sentences: str) -> None:
    """Has the voice speak sentences to their ends, which must be these."""
    for text in sentences:
        begin(call, text)
        call.run("sentence.onend()")


def hear(call: Browser, words: str, is_final: bool = True) -> None:
    call.until("window.recognition")
    call.run(f"recognition.hear({json.dumps(words)}, {json.dumps(is_final)})")


def test_without_a_microphone_what_is_typed_is_answered_aloud(call: Browser) -> None:
    call.until("window.recognition")
    call.run("recognition.onerror({ error: 'not-allowed' })")
    call.use("input", "value", text="Hello\n")
    speak(call, "You heard: Luigi's Pizza!", "What can I get you?")
    assert call.log() == [
        ["agent", "Luigi's Pizza! What can I get you?"],
        ["data", "The browser cannot hear you (not-allowed), but you can type."],
        ["caller", "Hello"],
        ["agent", "You heard: Luigi's Pizza! What can I get you?"],
    ]
    # Data is shown as text, and the agent can hang up.
    call.use("input", "value", text="Goodbye\n")
    speak(call, "Bye!")
    call.shows("The agent has hung up.")
    assert call.log()[-1] == ["data", '{"bill":"<b>12</b>"}']


def test_who_speaks_over_it_interrupts_and_what_was_heard_counts(call: Browser) -> None:
    hear(call, "A story!")
    speak(call, "Once.")
    begin(call, "Upon a time.")
    call.run("sentence.onboundary({ charIndex: 'Upon '.length })")
    hear(call, "No", is_final=False)
    assert call.run("sentence") is None
    hear(call, "No, a song!")
    speak(call, "You heard: Once.")
    begin(call, "Upon (interrupted)")
    assert call.log()[1:3] == [["caller", "A story!"], ["agent", "Once. Upon —"]]


def test_the_agents_own_words_in_the_microphone_are_no_barge_in(call: Browser) -> None:
    hear(call, "Hello")
    begin(call, "You heard: Luigi's Pizza!")
    hear(call, "you heard luigi's")
    assert ["caller", "you heard luigi's"] not in call.log()
    speak(call, "You heard: Luigi's Pizza!", "What can I get you?")
    # Once they have been spoken, they are the caller's.
    assert call.run("ears.isAborted")
    hear(call, "Pizza!")
    begin(call, "You heard: You heard: Luigi's Pizza!")


def test_in_firefox_the_first_key_interrupts(browser: Browser, pizza: str) -> None:
    browser.open(pizza, SENSES + "SpeechRecognition = webkitSpeechRecognition = null;")
    browser.press("Call")
    speak(browser, "Luigi's Pizza!")
    begin(browser, "What can I get you?")
    browser.use("input", "value", text="N")
    assert browser.run("sentence") is None
    browser.use("input", "value", text="o\n")
    begin(browser, "You heard: Luigi's Pizza!")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_other_page_gets_anything(method: str, pizza: str) -> None:
    ours = pizza.removeprefix("http://")
    theirs = ours.replace("127.0.0.1", "localhost.evil.example")
    pages = [(ours, "null"), (ours, "http://localhost:8000"), (ours, f"https://{ours}")]
    for host, origin in [*pages, (theirs, f"http://{theirs}"), (theirs, pizza)]:
        server = http.client.HTTPConnection(ours)
        server.request(method, "/", "{}", {"Host": host, "Origin": origin})
        assert server.getresponse().status == 403, (host, origin)
    server = http.client.HTTPConnection(ours)
    server.request(method, "/", "{}", {"Origin": pizza})
    assert b"KEY" not in server.getresponse().read()


def test_it_needs_no_keys_and_no_voice(browser: Browser, tmp_path: Path) -> None:
    file = recipes.save("talk.py", tmp_path)
    with running(sys.executable, str(file), up="http://127") as served:
        browser.open(served.url, SENSES + "window.voices = [];")
        browser.press("Call")
        browser.shows("How can I help you today?")
        browser.use("input", "value", text="Good morning\n")
        browser.shows("'Good morning'")
    browser.use("input", "value", text="Hello?\n")
    browser.shows("No answer.")
