"""The page of talk.py in a real Chromium, against the agent and the small Gemini.

The browser's own speechSynthesis speaks, with a voice that the test feeds: an extension
of Chromium that asks the test how far it gets. Chromium on Linux has no voice of its
own where speech-dispatcher is not installed. The recognition is one that the test
feeds, too: Chromium's would need a microphone and Google's servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from recipes import load, save
from test_browser import Browser as Chromium
from test_browser import chromium

from agent import Agent, Event, Settings, Speech, Turn
from test_agent import GEMINI_KEY, Gemini, Stall, Status, served

pytestmark = pytest.mark.asyncio

# Seconds that anything may take on a machine that is busy.
PATIENCE = 30
# The Enter key, for WebDriver.
ENTER = "\ue007"
# As the voice gets them.
GREETING = ("Hi there!", "How can I help you today?")
SETTINGS = Settings(port=0, google_generative_ai_api_key=GEMINI_KEY)

# ---- The voice -----------------------------------------------------------------------

VOICE_MANIFEST = {
    "manifest_version": 3,
    "name": "A voice that the test feeds",
    "version": "1",
    "permissions": ["ttsEngine"],
    "host_permissions": ["http://127.0.0.1/*"],
    "background": {"service_worker": "voice.js"},
    "tts_engine": {
        "voices": [
            {
                "voice_name": f"A voice for {language}",
                "lang": language,
                "event_types": ["start", "word", "end", "error"],
            }
            for language in ("en-US", "de-DE")
        ]
    },
}
# The test is told each sentence, and answers with the synthesis's events.
VOICE = """
let socket;
chrome.ttsEngine.onSpeak.addListener((text, options, send) => {
  socket = new WebSocket("SERVER");
  socket.onopen = () => socket.send(JSON.stringify({ text, lang: options.lang }));
  socket.onmessage = ({ data }) => send(JSON.parse(data));
});
chrome.ttsEngine.onStop.addListener(() => socket && socket.send("stop"));
"""


class Sentence:
    """A sentence that the browser has given its voice."""

    def __init__(self, socket: web.WebSocketResponse, told: Event) -> None:
        self.socket = socket
        self.text = told["text"]
        self.language = told["lang"]
        self.stopped = asyncio.Event()

    async def tell(self, kind: str, **more: int) -> None:
        await self.socket.send_json({"type": kind, "charIndex": 0, **more})

    async def begin(self) -> None:
        await self.tell("start")

    async def reach(self, words: str) -> None:
        """Speaks word by word, up to some words."""
        await self.begin()
        place = 0
        while place < self.text.index(words) + len(words):
            word = self.text[place:].split()[0]
            place = self.text.index(word, place)
            await self.tell("word", charIndex=place, length=len(word))
            place += len(word)

    async def end(self) -> None:
        """Speaks it to its end, without telling the words."""
        await self.begin()
        await self.tell("end", charIndex=len(self.text))

    async def is_stopped(self) -> None:
        """Waits until the browser has stopped it."""
        async with asyncio.timeout(PATIENCE):
            await self.stopped.wait()


class Voice:
    """The other end of the extension that is Chromium's voice."""

    def __init__(self) -> None:
        self.sentences: asyncio.Queue[Sentence] = asyncio.Queue()

    async def receive(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sentence = Sentence(socket, await socket.receive_json())
        await self.sentences.put(sentence)
        async for _ in socket:
            # All that comes is that the browser has stopped it.
            sentence.stopped.set()
        return socket

    async def sentence(self) -> Sentence:
        """The next sentence that is to be spoken."""
        async with asyncio.timeout(PATIENCE):
            return await self.sentences.get()

    async def speak(self, *texts: str) -> None:
        """Speaks the next sentences to their end, which must be these."""
        for text in texts:
            sentence = await self.sentence()
            assert sentence.text.strip() == text
            await sentence.end()

    def install(self, folder: Path, url: str) -> None:
        """Writes the extension."""
        folder.mkdir()
        script = VOICE.replace("SERVER", url.replace("http", "ws"))
        (folder / "voice.js").write_text(script)
        (folder / "manifest.json").write_text(json.dumps(VOICE_MANIFEST))


# ---- The browser ---------------------------------------------------------------------

# A recognition whose results are the words that the test has it hear.
RECOGNITION = """
window.SpeechRecognition = window.webkitSpeechRecognition = class {
  start() { window.recognition = this; this.results = []; this.isStopped = false; }
  stop() { this.isStopped = true; }
  abort() { this.end(); }
  end() { window.recognition = null; setTimeout(() => this.onend()); }
  hear(transcript, isFinal) {
    const last = this.results.at(-1);
    if (last && !last.isFinal) this.results.pop();
    this.results.push({ 0: { transcript }, isFinal, length: 1 });
    this.onresult({ results: this.results, resultIndex: this.results.length - 1 });
  }
};
"""
NO_RECOGNITION = """
window.SpeechRecognition = window.webkitSpeechRecognition = undefined;
"""
# Notes what the button says as soon as the page's script has run, and never tells it
# that there are voices.
NO_VOICE = """
speechSynthesis.getVoices = () => [];
speechSynthesis.addEventListener = () => queueMicrotask(() => {
  window.labelAtFirst = document.getElementById("call").textContent;
});
"""
BUBBLES = """
[...document.querySelectorAll("#transcript > :not([hidden])")].map(
  (one) => [one.className, one.textContent])
"""


class Browser(Chromium):
    """The page of talk.py in Chromium, as its user handles it."""

    async def open(self, url: str, recognition: str = RECOGNITION) -> None:
        """Opens a page whose scripts find this recognition."""
        await self.before_scripts(recognition)
        await self.command("/url", url=url)

    async def before_scripts(self, script: str) -> None:
        """Has a script run before those of each page."""
        await self.devtools("Page.addScriptToEvaluateOnNewDocument", source=script)

    async def press(self, label: str) -> None:
        """Presses the button of the call when it says this."""
        await self.until(f"find('call').innerText === '{label}'")
        await self.command(await self.element("#call") + "/click")

    async def type(self, text: str) -> None:
        await self.command(await self.element("#typed") + "/value", text=text)

    async def element(self, selector: str) -> str:
        found = await self.command("/element", using="css selector", value=selector)
        [identifier] = found.values()
        return f"/element/{identifier}"

    async def hear(self, words: str, is_final: bool = True) -> None:
        """Has the recognition hear some words of the caller."""
        await self.until("window.recognition")
        heard = f"{json.dumps(words)}, {json.dumps(is_final)}"
        await self.run(f"recognition.hear({heard})")

    async def heard(self, words: str) -> None:
        """Waits until the page has noticed how much of the answer was heard."""
        text = "document.querySelector('.agent:last-child span')?.textContent.trim()"
        await self.until(f"{text} === {json.dumps(words)}")

    async def state(self, state: str) -> None:
        """Waits until the page shows a state."""
        await self.until(f"document.body.dataset.state === '{state}'")

    async def problem(self, words: str) -> None:
        """Waits until the page tells of a problem in some words."""
        await self.until(f"find('error').innerText.includes({json.dumps(words)})")

    async def transcript(self) -> list[list[str]]:
        """What the page shows of the conversation, each with its class."""
        shown: list[list[str]] = await self.run(f"return {BUBBLES.strip()}")
        return shown


@pytest_asyncio.fixture
async def voice() -> Voice:
    """The voice of the browser."""
    return Voice()


@pytest_asyncio.fixture
async def browser(voice: Voice, tmp_path: Path) -> AsyncIterator[Browser]:
    """A Chromium that speaks with the voice."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    app = web.Application()
    app.router.add_get("/", voice.receive)
    async with served(app) as url:
        voice.install(tmp_path / "voice", url)
        option = f"load-extension={tmp_path / 'voice'}"
        async with chromium(tmp_path / "profile", option) as started:
            yield Browser(started.http, started.session)


# ---- talk.py -------------------------------------------------------------------------

Serve = Callable[..., Awaitable[str]]


@pytest.fixture
def talk(tmp_path: Path) -> ModuleType:
    """The module talk, as README.md has it."""
    return load("talk.py", tmp_path)


@pytest_asyncio.fixture
async def serve(
    talk: ModuleType, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[Serve]:
    """Serves the page for an agent; gives the URL that is printed."""
    tasks: list[asyncio.Task[None]] = []

    async def serve(agent: Agent, language: str = "en-US") -> str:
        tasks.append(asyncio.create_task(talk.serve(agent, language)))
        printed = ""
        async with asyncio.timeout(PATIENCE):
            while "http" not in printed:
                await asyncio.sleep(0.01)
                printed += capsys.readouterr().out
        return printed.split()[1]

    yield serve
    for task in tasks:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class Pizza(Agent):
    """Shows the page what is ordered, and hangs up when it is told goodbye."""

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        yield {"type": "response.data", "content": {"order": "<b>salami</b>"}}
        yield "Goodbye!"
        yield {"type": "response.hangup"}


async def start_call(browser: Browser, voice: Voice) -> None:
    """Starts a call, and hears the greeting to its end."""
    await browser.press("Start the call")
    await voice.speak(*GREETING)
    await browser.state("listening")


# ---- A call --------------------------------------------------------------------------


async def test_three_turns_and_a_barge_in_reach_gemini_as_they_were_said_and_heard(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["Sure, the first ", "step is flour. Then ", "water", Stall()]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("How do I bake?")
    sentence = await voice.sentence()
    await sentence.reach("Sure, the first")
    await browser.heard("Sure, the first")
    await browser.state("speaking")
    await browser.hear("No", is_final=False)
    await sentence.is_stopped()
    await gemini.until(streams=0)
    await browser.hear("No, cake!")
    await voice.speak("Sure, no problem.")
    await browser.state("listening")
    await browser.hear("Thanks.")
    await voice.speak("Sure, no problem.")
    await browser.state("listening")
    assert gemini.heard() == [
        ("user", "(The caller says nothing.)"),
        ("model", Agent.greeting),
        ("user", "How do I bake?"),
        ("model", "Sure, the first [interrupted]"),
        ("user", "No, cake!"),
        ("model", "Sure, no problem."),
        ("user", "Thanks."),
    ]
    assert await browser.transcript() == [
        ["bubble agent", Agent.greeting],
        ["bubble caller", "How do I bake?"],
        ["bubble agent interrupted", "Sure, the first step is flour. Then water"],
        ["bubble caller", "No, cake!"],
        ["bubble agent", "Sure, no problem."],
        ["bubble caller", "Thanks."],
        ["bubble agent", "Sure, no problem."],
    ]
    unheard = "return document.querySelector('.interrupted .unheard').textContent"
    assert await browser.run(unheard) == "step is flour. Then water"


async def test_what_a_voice_does_not_tell_word_by_word_counts_sentence_by_sentence(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["Mix the flour. Add some water. Then knead it. ", Stall()]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("How do I bake?")
    await voice.speak("Mix the flour.", "Add some water.")
    await (await voice.sentence()).begin()
    await browser.heard("Mix the flour. Add some water.")
    await browser.hear("How much?")
    await voice.speak("Sure, no problem.")
    assert gemini.heard()[-2:] == [
        ("model", "Mix the flour. Add some water. [interrupted]"),
        ("user", "How much?"),
    ]


async def test_a_caller_who_goes_on_before_a_word_was_heard_is_answered_once(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["Which", Stall()]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("A pizza")
    await browser.until("document.querySelectorAll('.agent').length === 2")
    await browser.hear("with olives.")
    await voice.speak("Sure, no problem.")
    assert gemini.heard()[2:] == [("user", "A pizza"), ("user", "with olives.")]


async def test_a_sentence_is_spoken_while_the_model_is_still_busy_with_the_next(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    more = asyncio.Event()
    gemini.scripts = [["It's 3.5 miles. Walk", more, " there"]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("How far is it?")
    await voice.speak("It's 3.5 miles.")
    await browser.state("thinking")
    more.set()
    await voice.speak("Walk there")
    await browser.state("listening")


async def test_a_sentence_without_an_end_is_spoken_in_parts(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["so " * 100]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("Go on.")
    await voice.speak(("so " * 60).strip(), ("so " * 40).strip())
    await browser.state("listening")


async def test_what_the_microphone_hears_of_the_agent_itself_is_no_barge_in(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await browser.press("Start the call")
    await voice.speak("Hi there!")
    sentence = await voice.sentence()
    await sentence.reach("How can I")
    await browser.heard("Hi there! How can I")
    await browser.hear("hi there how", is_final=False)
    await browser.state("speaking")
    await browser.hear("hi there how can I stop", is_final=False)
    await sentence.is_stopped()
    await browser.hear("hi there how can I stop it")
    await (await voice.sentence()).reach("Sure, no")
    await browser.heard("Sure, no")
    await browser.hear("No, go on.")
    await voice.speak("Sure, no problem.")
    assert gemini.heard()[1:] == [
        ("model", "Hi there! How can I [interrupted]"),
        ("user", "stop it"),
        ("model", "Sure, no [interrupted]"),
        ("user", "No, go on."),
    ]


async def test_after_the_agent_has_spoken_its_own_words_are_the_callers(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.until("answer && Date.now() > answer.overAt + ECHO")
    await browser.hear("Help you today?")
    await voice.speak("Sure, no problem.")
    assert gemini.heard()[-1] == ("user", "Help you today?")


async def test_words_that_the_recognition_does_not_finish_are_sent_after_a_pause(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("Hello", is_final=False)
    await browser.state("hearing")
    await browser.until("recognition.isStopped")
    await browser.run("recognition.end()")
    await voice.speak("Sure, no problem.")
    await browser.hear("Are you still listening?")
    await voice.speak("Sure, no problem.")
    await browser.run("recognition.end()")
    await browser.hear("Still?")
    await voice.speak("Sure, no problem.")
    users = [words for role, words in gemini.heard() if role == "user"]
    assert users[1:] == ["Hello", "Are you still listening?", "Still?"]


async def test_where_the_browser_has_no_recognition_one_types_and_interrupts_by_typing(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["Once upon a time. ", Stall()]]
    await browser.open(await serve(Agent(SETTINGS)), NO_RECOGNITION)
    await start_call(browser, voice)
    await browser.type("A story!" + ENTER)
    sentence = await voice.sentence()
    await sentence.reach("Once upon")
    await browser.heard("Once upon")
    await browser.type("N")
    await sentence.is_stopped()
    await gemini.until(streams=0)
    await browser.type("o, a song!" + ENTER)
    await voice.speak("Sure, no problem.")
    assert gemini.heard()[2:] == [
        ("user", "A story!"),
        ("model", "Once upon [interrupted]"),
        ("user", "No, a song!"),
    ]


async def test_where_the_browser_has_no_voice_the_words_that_were_shown_were_heard(
    serve: Serve, browser: Browser, gemini: Gemini
) -> None:
    gemini.scripts = [["Once upon a time. ", Stall()]]
    await browser.before_scripts(NO_VOICE)
    await browser.open(await serve(Agent(SETTINGS)))
    assert await browser.run("return labelAtFirst") == "Loading the voice"
    await browser.press("Start the call")
    await browser.state("listening")
    await browser.hear("A story!")
    await browser.heard("Once upon a time.")
    await browser.hear("No, a song!")
    await browser.heard("Sure, no problem.")
    assert gemini.heard()[3:] == [
        ("model", "Once upon a time. [interrupted]"),
        ("user", "No, a song!"),
    ]


async def test_a_blocked_microphone_is_explained_and_one_can_type(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await browser.press("Start the call")
    await browser.until("window.recognition")
    await browser.run("recognition.onerror({error: 'not-allowed'})")
    await browser.run("recognition.end()")
    await browser.problem("microphone is blocked")
    await voice.speak(*GREETING)
    await browser.state("listening")
    await browser.type("Hello" + ENTER)
    await voice.speak("Sure, no problem.")
    assert gemini.heard()[-1] == ("user", "Hello")
    assert await browser.run("return ears === null")


async def test_data_is_shown_as_text_and_an_agent_that_hangs_up_ends_the_call(
    serve: Serve, browser: Browser, voice: Voice
) -> None:
    await browser.open(await serve(Pizza(Settings(port=0))))
    await start_call(browser, voice)
    await browser.hear("Salami.")
    await voice.speak("Goodbye!")
    await browser.state("off")
    assert (await browser.transcript())[2:] == [
        ["data", '{\n  "order": "<b>salami</b>"\n}'],
        ["bubble agent", "Goodbye!"],
        ["note", "The agent hung up."],
    ]
    assert await browser.run("return [ears, recognition]") == [None, None]


async def test_what_turns_out_to_be_no_words_is_not_sent(
    serve: Serve, browser: Browser, voice: Voice
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("Hm", is_final=False)
    await browser.state("hearing")
    await browser.hear("")
    await browser.state("listening")
    assert await browser.transcript() == [["bubble agent", Agent.greeting]]


async def test_a_page_that_is_left_falls_silent(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["Once upon a time. ", Stall()]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("A story!")
    sentence = await voice.sentence()
    await sentence.begin()
    await browser.command("/url", url="about:blank")
    await sentence.is_stopped()
    await gemini.until(streams=0)


async def test_hanging_up_stops_the_voice_the_model_and_the_recognition(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["Once upon a time. ", Stall()]]
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.hear("A story!")
    sentence = await voice.sentence()
    await sentence.begin()
    await browser.press("Hang up")
    await sentence.is_stopped()
    await gemini.until(streams=0)
    await browser.state("off")
    assert await browser.run("return [ears, recognition]") == [None, None]


async def test_the_agents_language_is_recognised_and_spoken(
    serve: Serve, browser: Browser, voice: Voice
) -> None:
    await browser.open(await serve(Agent(SETTINGS), "de-DE"))
    await browser.press("Start the call")
    assert (await voice.sentence()).language == "de-DE"
    assert await browser.run("return recognition.lang") == "de-DE"


async def test_a_voice_that_fails_is_told_and_the_answer_goes_on(
    serve: Serve, browser: Browser, voice: Voice
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await browser.press("Start the call")
    await (await voice.sentence()).tell("error")
    await browser.problem("voice failed")
    await voice.speak("How can I help you today?")
    await browser.state("listening")


async def test_a_voice_that_does_not_begin_is_told(
    serve: Serve, browser: Browser, voice: Voice
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await browser.press("Start the call")
    await browser.problem("does not begin")


async def test_a_page_whose_server_has_gone_says_so(
    browser: Browser, voice: Voice, tmp_path: Path
) -> None:
    process = await start_talk(tmp_path, PORT="0")
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        printed = (await process.stdout.readline()).decode()
    await browser.open(printed.split()[1])
    await start_call(browser, voice)
    process.kill()
    await process.wait()
    await browser.hear("Hello?")
    await browser.problem("talk.py does not answer")


async def test_a_call_that_the_server_has_lost_is_explained(
    serve: Serve, browser: Browser, voice: Voice
) -> None:
    await browser.open(await serve(Agent(SETTINGS)))
    await start_call(browser, voice)
    await browser.run("call = 'another'")
    await browser.hear("Hello")
    await browser.problem("call again")
    await browser.state("listening")


async def test_the_page_fits_a_phone_and_its_button_says_what_it_will_do(
    serve: Serve, browser: Browser, voice: Voice, gemini: Gemini
) -> None:
    gemini.scripts = [["w" * 200]]
    size = {"width": 320, "height": 600, "deviceScaleFactor": 2, "mobile": True}
    await browser.devtools("Emulation.setDeviceMetricsOverride", **size)
    await browser.open(await serve(Agent(SETTINGS)))
    assert await browser.run("return document.title") == "Talk to Agent"
    await start_call(browser, voice)
    await browser.hear("Say something long.")
    await voice.sentence()
    for part in ("documentElement", "querySelector('main')", "querySelector('footer')"):
        width = await browser.run(f"return document.{part}.scrollWidth")
        assert width <= 320, part
    await browser.press("Hang up")
    await browser.state("off")


# ---- What reaches it, and what leaves it ---------------------------------------------


async def test_only_the_page_itself_may_talk_to_the_agent(serve: Serve) -> None:
    url = await serve(Agent(Settings(port=0)))
    host = url.removeprefix("http://")
    port = host.partition(":")[2]
    local = f"localhost:{port}"
    requests = [
        ("GET", host, None, 200),
        ("GET", local, None, 200),
        ("GET", f"evil.example:{port}", None, 403),
        ("GET", "evil.example", None, 403),
        ("GET", host, "http://evil.example", 403),
        ("POST", host, url, 200),
        ("POST", local, f"http://{local}", 200),
        ("POST", host, None, 403),
        ("POST", host, "null", 403),
        ("POST", host, "http://localhost:8000", 403),
        ("POST", host, f"https://{host}", 403),
        ("POST", host, f"http://evil.example:{port}", 403),
        ("POST", f"evil.example:{port}", f"http://evil.example:{port}", 403),
    ]
    async with aiohttp.ClientSession() as http:
        for method, its_host, origin, expected in requests:
            path = "/call" if method == "POST" else "/"
            headers = {"Host": its_host}
            if origin is not None:
                headers["Origin"] = origin
            async with http.request(
                method, url + path, headers=headers, json={"call": "a call"}
            ) as response:
                assert response.status == expected, (method, its_host, origin)
                # No page of another origin can read what it gets, or frame it.
                assert "Access-Control-Allow-Origin" not in response.headers
                if method == "GET" and expected == 200:
                    policy = response.headers["Content-Security-Policy"]
                    assert "frame-ancestors 'none'" in policy


async def test_the_keys_and_the_webhook_secret_are_in_nothing_that_the_page_gets(
    serve: Serve, gemini: Gemini
) -> None:
    gemini.scripts = [[Status(500)], [Status(500)]]
    settings = Settings(
        port=0,
        layercode_webhook_secret="SECRET-OF-ENV",
        google_generative_ai_api_key=GEMINI_KEY,
        layercode_api_key="SECRET-API-KEY",
    )
    agent = Agent(settings)
    url = await serve(agent)
    secret = agent.settings.layercode_webhook_secret
    got = ""
    async with aiohttp.ClientSession(headers={"Origin": url}) as http:
        for path, body in (
            ("/", None),
            ("/call", {"call": "a call"}),
            ("/say", {"call": "a call", "text": "hello", "heard": "Hi"}),
            ("/say", {"call": "another", "text": "hello"}),
            ("/say", {"call": "a call"}),
            ("/nothing", {}),
        ):
            method = "GET" if body is None else "POST"
            async with http.request(method, url + path, json=body) as response:
                got += f"{response.headers} {await response.text()}"
    assert Agent.greeting in got
    assert Agent.apology in got
    assert len(secret) >= 32
    for hidden in (secret, "SECRET", GEMINI_KEY):
        assert hidden not in got


async def test_two_calls_are_two_conversations(serve: Serve, gemini: Gemini) -> None:
    url = await serve(Agent(SETTINGS))
    async with aiohttp.ClientSession(headers={"Origin": url}) as http:
        for call in ("one", "two"):
            async with http.post(url + "/call", json={"call": call}) as response:
                await response.read()
        for call in ("one", "two"):
            said = {"call": call, "text": f"This is {call}."}
            async with http.post(url + "/say", json=said) as response:
                await response.read()
    assert gemini.heard() == [
        ("user", "(The caller says nothing.)"),
        ("model", Agent.greeting),
        ("user", "This is two."),
    ]


async def start_talk(folder: Path, **settings: str) -> Process:
    """Runs talk.py in a process of its own, as its user does."""
    file = save("talk.py", folder)
    unset = {one.name.upper(): "" for one in fields(Settings)}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        file,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, **unset, **settings},
    )


def listening(process: Process) -> set[str]:
    """The addresses at which a process waits for connections, as /proc has them."""
    opened = {
        str(file.readlink()) for file in Path(f"/proc/{process.pid}/fd").iterdir()
    }
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in opened:
                addresses.add(columns[1].partition(":")[0])
    return addresses


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
async def test_it_listens_to_this_machine_alone_and_ends_with_ctrl_c(
    tmp_path: Path,
) -> None:
    process = await start_talk(tmp_path, PORT="0", HOST="0.0.0.0")
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        printed = (await process.stdout.readline()).decode()
        assert printed.startswith("Open http://127.0.0.1:")
        # The bytes of 127.0.0.1 in the order of the machine.
        assert listening(process) == {"0100007F"}
        process.send_signal(signal.SIGINT)
        _, problems = await process.communicate()
    assert (process.returncode, problems) == (0, b"")


async def test_a_port_that_is_taken_is_said_in_one_line(
    serve: Serve, tmp_path: Path
) -> None:
    url = await serve(Agent(Settings(port=0)))
    folder = tmp_path / "another"
    folder.mkdir()
    process = await start_talk(folder, PORT=url.rpartition(":")[2])
    async with asyncio.timeout(PATIENCE):
        printed, problems = await process.communicate()
    assert (process.returncode, printed) == (1, b"")
    assert problems.startswith(b"talk.py: ")
    assert problems.count(b"\n") == 1
