"""Tests of agent.py, over real HTTP: google-genai asks a small Gemini that runs here.

python -m pytest test_agent.py
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import inspect
import json
import os
import random
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import certifi
import pytest
import pytest_asyncio
from aiohttp import web

import agent
from agent import (
    RUNNER_OPTIONS,
    Agent,
    Event,
    Histories,
    Settings,
    SettingsError,
    Speech,
    Turn,
    sign,
    verify,
)

pytestmark = pytest.mark.asyncio

HERE = Path(__file__).parent
SECRET = "a webhook secret"
GEMINI_KEY = "SECRET-KEY"
WITH_GEMINI = Settings(
    layercode_webhook_secret=SECRET, google_generative_ai_api_key=GEMINI_KEY
)
OFFLINE = Settings(layercode_webhook_secret=SECRET)
# How a certificate ends.
END = "-----END CERTIFICATE-----\n"
ids = count(1)

# ---- A small Gemini ------------------------------------------------------------------


class Stall:
    """A step of a script: nothing more comes."""


class Cut:
    """A step of a script: the connection is reset."""


class Hang:
    """A step of a script: the answer is over, but the stream stays open."""


@dataclass
class Status:
    """A script of its own: Gemini answers with an error."""

    code: int
    word: str = "SOME_STATUS"
    message: str = "the key SECRET-KEY said hello"
    # As Gemini's details tell it.
    reason: str = "SOME_REASON"

    def response(self) -> web.Response:
        error = {
            "code": self.code,
            "message": self.message,
            "status": self.word,
            "details": [{"reason": self.reason}],
        }
        return web.json_response({"error": error}, status=self.code)


# A str is said, a list is the parts of a chunk, bytes are sent as they are, an event
# is waited for.
Step = str | list[Event] | bytes | asyncio.Event | Stall | Cut | Hang | Status


class Gemini:
    """Speaks Gemini's streaming format, as the next of its scripts says."""

    def __init__(self) -> None:
        self.scripts: list[list[Step]] = []
        # The JSON of each request for words.
        self.asked: list[Event] = []
        # The headers of each request for words.
        self.headers: list[Mapping[str, str]] = []
        # The models that were asked.
        self.models: set[str] = set()
        # How often the model was looked up, which is how the agent connects.
        self.looked_up = 0
        # What a look-up is answered with, if it is not; a Stall never is.
        self.refuses: Status | Stall | None = None
        self.connections: set[asyncio.BaseTransport | None] = set()
        # Streams that are not over.
        self.open = 0
        self.changed = asyncio.Condition()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.headers.append(request.headers)
        self.models.add(request.match_info["model"].partition(":")[0])
        self.connections.add(request.transport)
        script = self.scripts.pop(0) if self.scripts else ["Sure, ", "no problem."]
        if script and isinstance(script[0], Status):
            return script[0].response()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await self.change(+1)
        try:
            await response.prepare(request)
            for step in script:
                await self.play(step, request, response)
            if not script or not isinstance(script[-1], Hang | bytes):
                await response.write(chunk("", "STOP"))
        finally:
            await asyncio.shield(self.change(-1))
        return response

    async def play(
        self, step: Step, request: web.Request, response: web.StreamResponse
    ) -> None:
        if isinstance(step, Cut):
            assert request.transport is not None
            request.transport.abort()
        elif isinstance(step, Stall):
            await asyncio.Event().wait()
        elif isinstance(step, Hang):
            await response.write(chunk("", "STOP"))
            await asyncio.Event().wait()
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, bytes):
            await response.write(step)
        elif isinstance(step, str | list):
            await response.write(chunk(step))

    async def change(self, by: int) -> None:
        async with self.changed:
            self.open += by
            self.changed.notify_all()

    async def until(self, streams: int) -> None:
        """Waits until so many streams are open."""
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.open == streams)

    async def model(self, request: web.Request) -> web.Response:
        self.looked_up += 1
        self.connections.add(request.transport)
        if isinstance(self.refuses, Status):
            return self.refuses.response()
        if isinstance(self.refuses, Stall):
            await asyncio.Event().wait()
        return web.json_response({"name": "models/" + request.match_info["model"]})

    def hang_up(self) -> None:
        """Closes all connections."""
        for connection in self.connections:
            if connection is not None:
                connection.close()

    def heard(self, request: int = -1) -> list[tuple[str, str]]:
        """What a request showed of the conversation, as (role, text) pairs."""
        return [
            (said["role"], part["text"])
            for said in self.asked[request]["contents"]
            for part in said["parts"]
        ]

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{version}/models/{model}", self.stream)
        app.router.add_get("/{version}/models/{model}", self.model)
        return app


def chunk(step: str | list[Event], finish: str = "") -> bytes:
    """A chunk as Gemini streams it, of a text or a list of parts."""
    parts = [{"text": step}] if isinstance(step, str) else step
    candidate: Event = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    body = {"candidates": [candidate], "modelVersion": "gemini-test"}
    return f"data: {json.dumps(body)}\r\n\r\n".encode()


# ---- Layercode's part ----------------------------------------------------------------


class Layercode:
    """Plays Layercode's part against the agent at a URL, in one conversation."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        conversation: str = "",
        secret: str = SECRET,
    ) -> None:
        self.http = http
        self.url = url
        self.secret = secret
        self.conversation = conversation or f"conversation_{next(ids)}"

    def post(
        self,
        event: Event | None = None,
        body: bytes = b"",
        signature: str | None = None,
        path: str = "/agent",
    ) -> Any:
        body = body or json.dumps(event).encode()
        if signature is None:
            signature = sign(body, self.secret)
        headers = {"layercode-signature": signature}
        return self.http.post(self.url + path, data=body, headers=headers)

    def event(self, kind: str, **more: Any) -> Event:
        """A webhook of a new turn."""
        event = {
            "type": kind,
            "turn_id": f"turn_{next(ids)}",
            "conversation_id": self.conversation,
            "session_id": "session_1",
        }
        return {**event, **more}

    async def frames(self, event: Event) -> list[Event]:
        """The frames that one webhook is answered with."""
        async with self.post(event) as response:
            text = await response.text()
        assert response.status == 200, text
        frames = [json.loads(line[6:]) for line in text.split("\n\n") if line]
        assert all(frame["turn_id"] == event["turn_id"] for frame in frames)
        return frames

    async def refused(self, event: Event | None = None, **how: Any) -> tuple[int, str]:
        """The status and the reason with which a webhook is refused."""
        async with self.post(event, **how) as response:
            answer = await response.json()
        assert list(answer) == ["error"]
        return response.status, answer["error"]

    async def send(self, event: Event) -> str:
        """The words that one webhook is answered with."""
        return words(await self.frames(event))

    async def say(self, text: str, **more: Any) -> str:
        """The words that a message is answered with."""
        return await self.send(self.event("message", text=text, **more))

    async def hear(self, response: aiohttp.ClientResponse, until: str) -> str:
        """Reads an answer up to some words."""
        heard = ""
        while until not in heard:
            line = await response.content.readline()
            assert line, f"heard only {heard!r}"
            if line.startswith(b"data: "):
                heard += words([json.loads(line[6:])])
        return heard

    async def barge_in(self, text: str, after: str, **more: Any) -> Event:
        """Says something and drops the connection after some words of the answer."""
        event = self.event("message", text=text, **more)
        async with self.post(event) as response:
            await self.hear(response, after)
            response.close()
        return event


def words(frames: list[Event]) -> str:
    """What is spoken in these frames."""
    return "".join(
        frame["content"] for frame in frames if frame["type"] == "response.tts"
    )


def report(event: Event, heard: str) -> Event:
    """What the next message tells of an answer that was interrupted."""
    return {
        "interruption_context": {
            "previous_turn_interrupted": True,
            "words_heard": len(heard.split()),
            "text_heard": heard,
            "assistant_turn_id": event["turn_id"],
        }
    }


# ---- Fixtures ------------------------------------------------------------------------

Start = Callable[[Agent], Awaitable[Layercode]]


@asynccontextmanager
async def served(app: web.Application, **options: Any) -> AsyncIterator[str]:
    """Serves an application on a free port, as main() would; gives its URL."""
    runner = web.AppRunner(app, **{**RUNNER_OPTIONS, **options})
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest_asyncio.fixture
async def gemini(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Gemini]:
    """A Gemini, which google-genai asks for as long as the test runs."""
    fake = Gemini()
    # Each agent's client would take a tenth of a second to read them all.
    certificates = Path(certifi.where()).read_text("utf-8")
    one_certificate = tmp_path / "one_certificate.pem"
    one_certificate.write_text(certificates[: certificates.index("-----END")] + END)
    monkeypatch.setenv("SSL_CERT_FILE", str(one_certificate))
    async with served(fake.app(), handler_cancellation=True) as url:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
        yield fake


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    """Serves an agent; gives the caller's end of it."""
    connector = aiohttp.TCPConnector(limit=0)
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(
            aiohttp.ClientSession(connector=connector)
        )

        async def start(one: Agent) -> Layercode:
            url = await stack.enter_async_context(served(one.make_app()))
            return Layercode(http, url)

        yield start


@pytest_asyncio.fixture
async def caller(start: Start, gemini: Gemini) -> Layercode:
    """A caller of the agent as it comes, with a key for Gemini."""
    return await start(Agent(WITH_GEMINI))


@pytest_asyncio.fixture
async def offline(start: Start) -> Layercode:
    """A caller of the agent as it comes, without a key for Gemini."""
    return await start(Agent(OFFLINE))


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Has the agent log as it does when it is served."""
    caplog.set_level("INFO", "agent")


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the agent's log, but those for debugging."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "agent" and record.levelname != "DEBUG"
    ]


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def run(
    *arguments: str,
    stdin: int = PIPE,
    file: Path | str = agent.__file__,
    **settings: str,
) -> Process:
    """Runs agent.py, or a file that could stand beside it, in a process of its own.

    It has these settings and no others.
    """
    unset = {one.name.upper(): "" for one in fields(Settings)}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(file),
        *arguments,
        stdin=stdin,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, **unset, "PYTHONPATH": str(HERE), **settings},
    )


@asynccontextmanager
async def serving(
    file: Path, port: int, **settings: str
) -> AsyncIterator[tuple[Process, Layercode]]:
    """Serves a file in a process of its own; gives it and the caller's end of it."""
    settings["LAYERCODE_WEBHOOK_SECRET"] = SECRET
    process = await run(file=file, PORT=str(port), **settings)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20), aiohttp.ClientSession() as http:
            assert (await process.stdout.readline()).startswith(b"Up: ")
            yield process, Layercode(http, f"http://127.0.0.1:{port}")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# ---- A conversation ------------------------------------------------------------------


async def test_a_conversation_reaches_gemini_as_it_was_said_and_heard(
    caller: Layercode, gemini: Gemini
) -> None:
    greeting = await caller.send(caller.event("session.start"))
    gemini.scripts = [["Sure, the first ", "step is ", Stall()]]
    cut = await caller.barge_in("How do I bake?", after="step is ")
    await gemini.until(streams=0)
    again = await caller.say("No, cake!", **report(cut, "Sure, the first"))
    assert (greeting, again) == (Agent.greeting, "Sure, no problem.")
    assert gemini.heard() == [
        ("user", "(The caller says nothing.)"),
        ("model", Agent.greeting),
        ("user", "How do I bake?"),
        ("model", "Sure, the first [interrupted]"),
        ("user", "No, cake!"),
    ]


async def test_who_comes_back_is_welcomed_back_and_nothing_is_forgotten(
    caller: Layercode, gemini: Gemini
) -> None:
    greeted = [
        await caller.send(caller.event("welcome")),
        await caller.send(caller.event("session.start")),
    ]
    assert greeted == [Agent.greeting, Agent.welcome_back]
    await caller.say("Hello.")
    assert [text for role, text in gemini.heard() if role == "model"] == greeted


async def test_the_oldest_webhooks_make_one_conversation_of_a_session(
    caller: Layercode, gemini: Gemini
) -> None:
    for text in ("one", "two"):
        event = caller.event("message", text=text)
        event["session_id"] = event.pop("conversation_id")
        await caller.send(event)
    assert [text for role, text in gemini.heard() if role == "user"] == ["one", "two"]


# ---- Agents of one's own -------------------------------------------------------------

PIZZA = """
from agent import Agent, main


class Pizza(Agent):
    greeting = "Luigi's Pizza! What can I get you?"
    persona = "You take orders for Luigi's Pizza in Leeds."


if __name__ == "__main__":
    main(Pizza)
"""


async def test_six_lines_are_an_agent_that_serves_and_chats(
    gemini: Gemini, tmp_path: Path, unused_tcp_port: int
) -> None:
    pizza = tmp_path / "pizza.py"
    pizza.write_text(PIZZA)
    key = {"GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY}
    async with serving(pizza, unused_tcp_port, **key) as (_, caller):
        assert "Luigi's" in await caller.send(caller.event("session.start"))
        await caller.say("A salami, please.")
    assert "Leeds" in gemini.asked[-1]["systemInstruction"]["parts"][0]["text"]
    chat = await run("chat", file=pizza)
    said, _ = await chat.communicate(b"")
    assert (chat.returncode, b"Luigi's" in said) == (0, True)


async def test_the_model_is_told_the_persona_and_the_rules_of_speech(
    caller: Layercode, gemini: Gemini
) -> None:
    await caller.say("hello")
    told = f"{Agent.persona}\n{Agent.voice_rules}"
    assert gemini.asked[-1]["systemInstruction"]["parts"] == [{"text": told}]


async def test_a_greeting_sees_the_webhook(start: Start) -> None:
    class Polite(Agent):
        async def greet(self, event: Event, history: list[Turn]) -> Speech:
            yield f"Hello {event['custom_metadata']['name']}!"
            yield f" You are {event['from_phone_number']}."

    caller = await start(Polite(OFFLINE))
    event = caller.event("session.start", from_phone_number="+44 1")
    event["custom_metadata"] = {"name": "Ana"}
    assert await caller.send(event) == "Hello Ana! You are +44 1."


async def test_a_greeting_may_be_gemini_s(start: Start, gemini: Gemini) -> None:
    class Witty(Agent):
        async def greet(self, event: Event, history: list[Turn]) -> Speech:
            async for chunk in self.ask(history):
                yield chunk.text

    caller = await start(Witty(WITH_GEMINI))
    assert await caller.send(caller.event("welcome")) == "Sure, no problem."
    assert gemini.heard() == [("user", "(The caller says nothing.)")]


async def test_two_agents_in_one_application_are_strangers_to_each_other(
    gemini: Gemini,
) -> None:
    class Pizza(Agent):
        greeting = "Luigi's Pizza!"
        persona = "You sell pizza."

    class Bank(Agent):
        greeting = "The bank."
        persona = "You lend money."

    app = web.Application()
    app.add_subapp("/pizza", Pizza(WITH_GEMINI).make_app())
    other_secret = replace(WITH_GEMINI, layercode_webhook_secret="another")
    app.add_subapp("/bank", Bank(other_secret).make_app())
    async with served(app) as url, aiohttp.ClientSession() as http:
        pizza = Layercode(http, url + "/pizza", "the same")
        bank = Layercode(http, url + "/bank", "the same", secret="another")
        for one, greeting in ((pizza, Pizza.greeting), (bank, Bank.greeting)):
            assert await one.send(one.event("welcome")) == greeting
            await one.say("hello")
            assert ("model", greeting) in gemini.heard()
            assert len(gemini.heard()) == 3
        prompts = [asked["systemInstruction"]["parts"] for asked in gemini.asked]
        assert "pizza" in str(prompts[0]) and "money" in str(prompts[1])
        pizza.secret = bank.secret
        assert (await pizza.refused(pizza.event("welcome")))[0] == 401


async def test_a_data_webhook_can_be_answered(start: Start) -> None:
    class Pizza(Agent):
        async def notice(self, event: Event) -> Event | None:
            return {"type": "response.data", "content": event["data"]}

    caller = await start(Pizza(OFFLINE))
    async with caller.post(caller.event("data", data={"size": 9})) as response:
        answer = await response.json()
    assert answer == {"type": "response.data", "content": {"size": 9}}


async def test_an_error_in_notice_is_a_500_that_the_log_explains(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Agent):
        async def notice(self, event: Event) -> Event | None:
            raise KeyError("secret words")

    caller = await start(Broken(OFFLINE))
    assert (await caller.refused(caller.event("data")))[0] == 500
    [line] = logged(caplog)
    assert "POST '/agent' failed: KeyError at test_agent.py:" in line
    assert "secret" not in caplog.text


async def test_reply_can_be_called_without_a_server_or_a_key() -> None:
    async with aclosing(Agent(OFFLINE).reply({}, [Turn("hello")])) as pieces:
        assert await anext(pieces) == "I'm "


async def test_reply_can_be_called_without_a_server_but_with_gemini(
    gemini: Gemini,
) -> None:
    one = Agent(WITH_GEMINI)
    async with one.connected():
        pieces = [piece async for piece in one.reply({}, [Turn("hello")])]
    assert pieces == ["Sure, ", "no problem."]
    assert gemini.heard() == [("user", "hello")]


async def test_what_ask_is_given_comes_before_the_defaults(gemini: Gemini) -> None:
    one = Agent(replace(WITH_GEMINI, gemini_thinking="low"))
    config: Event = {
        "system_instruction": "Be brief.",
        "temperature": 0.5,
        "thinking_config": {"thinking_budget": 7},
        "http_options": {
            "headers": {"x-shop": "Leeds"},
            "extra_body": {"labels": {"shop": "Leeds"}},
        },
    }
    async with one.connected(), aclosing(one.ask([Turn("hi")], config)) as chunks:
        assert [chunk.text async for chunk in chunks][0] == "Sure, "
    [asked] = gemini.asked
    assert asked["systemInstruction"]["parts"] == [{"text": "Be brief."}]
    assert asked["generationConfig"]["temperature"] == 0.5
    assert asked["generationConfig"]["thinkingConfig"] == {"thinking_budget": 7}
    assert gemini.headers[-1]["x-shop"] == "Leeds"
    assert asked["labels"] == {"shop": "Leeds"}
    assert gemini.heard() == [("user", "hi")]


ORDERED: list[Event] = [
    {"role": "model", "parts": [{"functionCall": {"name": "order"}}]},
    {"role": "user", "parts": [{"functionResponse": {"name": "order"}}]},
]


async def test_what_a_reply_did_beside_speaking_is_shown_to_the_model(
    start: Start, gemini: Gemini
) -> None:
    call, result = ORDERED
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    order = {"user": "A salami!", "done": ORDERED}
    await one.histories.record(caller.conversation, "an earlier turn", **order)
    await caller.say("Hello?")
    async with aclosing(one.ask([Turn("A ham!", done=ORDERED)])) as chunks:
        await anext(chunks)
    assert gemini.asked[0]["contents"] == [
        {"role": "user", "parts": [{"text": "A salami!"}]},
        call,
        result,
        {"role": "model", "parts": [{"text": "[interrupted]"}]},
        {"role": "user", "parts": [{"text": "Hello?"}]},
    ]
    assert gemini.asked[1]["contents"][1:] == ORDERED


async def test_what_a_reply_did_is_shown_even_if_it_said_nothing() -> None:
    turns = [Turn("Bye!", finished=True, done=ORDERED), Turn("Hello?")]
    assert agent.contents(turns) == [
        {"role": "user", "parts": [{"text": "Bye!"}]},
        *ORDERED,
        {"role": "user", "parts": [{"text": "Hello?"}]},
    ]


async def test_gemini_cannot_be_asked_without_a_key() -> None:
    with pytest.raises(RuntimeError, match="GOOGLE_GENERATIVE_AI_API_KEY"):
        Agent(OFFLINE).ask([Turn("hello")])


# ---- The signature -------------------------------------------------------------------


async def test_a_webhook_is_verified_as_it_was_sent_and_not_as_it_is_written_again(
    caller: Layercode,
) -> None:
    event = caller.event("message", text="caf\u00e9", metadata={"price": 1.0})
    for body in (
        json.dumps(event),
        json.dumps(event, indent=2),
        json.dumps(event, ensure_ascii=False),
    ):
        async with caller.post(body=body.encode()) as response:
            assert response.status == 200


NOW = int(time.time())
BODY = b'{"type": "data", "session_id": "session_1"}'


@pytest.mark.parametrize("path", ["/agent", "/api/agent"])
@pytest.mark.parametrize(
    "signature",
    [
        "nonsense",
        "t=1,v1=00",
        "t=,v1=",
        "\u00e9",
        f"t={NOW},v1=\u00e9",
        f"t={'9' * 5000},v1=00",
        "t=\u00b2,v1=00",
        sign(BODY, SECRET, str(NOW - 310)),
        sign(BODY, SECRET, str(NOW + 3600)),
        sign(BODY, "another secret", str(NOW)),
        sign(BODY + b" ", SECRET, str(NOW)),
        sign(BODY, SECRET, str(NOW)).replace("v1=", "v0="),
    ],
)
async def test_a_webhook_without_a_right_signature_is_refused(
    offline: Layercode, signature: str, path: str
) -> None:
    status, error = await offline.refused(body=BODY, signature=signature, path=path)
    assert (status, "LAYERCODE_WEBHOOK_SECRET" in error) == (401, True)


async def test_a_webhook_without_a_signature_is_told_so(offline: Layercode) -> None:
    status, error = await offline.refused(body=BODY, signature="")
    assert (status, error) == (401, "the header layercode-signature is missing")


async def test_a_signature_holds_for_five_minutes_either_way() -> None:
    for age in (-290, 0, 290):
        signature = sign(BODY, SECRET, str(int(time.time()) + age))
        assert verify(signature, BODY, SECRET)


async def test_while_a_secret_is_rotated_one_right_v1_of_several_is_enough() -> None:
    timestamp, right = sign(BODY, SECRET).split(",")
    wrong = "v1=" + "0" * 64
    assert verify(f"{timestamp},{wrong},{right}", BODY, SECRET)
    assert verify(f"{timestamp},{right},{wrong}", BODY, SECRET)
    assert not verify(f"{timestamp},{wrong},{wrong}", BODY, SECRET)


async def test_without_a_webhook_secret_nothing_is_accepted(start: Start) -> None:
    caller = await start(Agent(Settings()))
    caller.secret = ""
    refused = await caller.refused(caller.event("welcome"))
    assert refused == (500, "LAYERCODE_WEBHOOK_SECRET is not set")


# ---- Webhooks ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, ["x"], {"x": 1}, {}, 0, False])
@pytest.mark.parametrize("name", ["type", "conversation_id", "turn_id", "text"])
async def test_a_field_that_is_not_a_text_is_named(
    offline: Layercode, name: str, value: object
) -> None:
    event = {**offline.event("message", text="hello"), name: value}
    error = f"{name} is missing or not a text"
    assert await offline.refused(event) == (400, error)


@pytest.mark.parametrize("name", ["type", "turn_id", "text"])
async def test_a_field_that_is_missing_is_named(offline: Layercode, name: str) -> None:
    event = offline.event("message", text="hello")
    del event[name]
    error = f"{name} is missing or not a text"
    assert await offline.refused(event) == (400, error)


async def test_a_webhook_of_no_conversation_is_refused(offline: Layercode) -> None:
    status, error = await offline.refused({"type": "data"})
    assert (status, error) == (400, "conversation_id is missing or not a text")


@pytest.mark.parametrize("text", ["", None, "  "])
async def test_what_was_not_understood_is_asked_for_again(
    caller: Layercode, gemini: Gemini, text: str | None
) -> None:
    event = caller.event("message", text=text)
    assert await caller.send(event) == Agent.apology
    assert not gemini.asked


@pytest.mark.parametrize(
    "kind", ["data", "session.update", "session.end", "session.start", "something.new"]
)
async def test_what_asks_for_no_words_gets_a_mere_200(
    offline: Layercode, kind: str
) -> None:
    event = {"type": kind, "session_id": "session_1", "data": {"a": 1}}
    async with offline.post(event) as response:
        assert (response.status, await response.json()) == (200, {})


@pytest.mark.parametrize(
    "body",
    [
        b" ",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"\x00",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"type": 1' + b"0" * 5000 + b"}",
        b'{"type": {}, "session_id": []}',
        b'{"type": NaN}',
        b"[1, 2]",
        b'["ab"]',
        b'[["type", "message"]]',
        b'{"": "x"}',
    ],
)
async def test_rubbish_is_a_clear_400(offline: Layercode, body: bytes) -> None:
    status, error = await offline.refused(body=body)
    assert status == 400
    assert error.endswith(("is not a JSON object", "is missing or not a text"))


@pytest.mark.parametrize("name", ["text", "turn_id", "conversation_id", "metadata"])
async def test_halves_of_characters_do_not_break_a_conversation(
    caller: Layercode, gemini: Gemini, name: str
) -> None:
    event = caller.event("message", text="hello")
    async with caller.post({**event, name: "a\ud800b\x00\n"}) as response:
        assert response.status == 200
        await response.read()
    assert gemini.heard() == [("user", "a?b\x00" if name == "text" else "hello")]


async def test_bodies_of_one_mebibyte_are_read_and_no_larger_ones(
    offline: Layercode,
) -> None:
    event = offline.event("data", padding="")
    event["padding"] = "x" * (2**20 - len(json.dumps(event)))
    async with offline.post(event) as response:
        assert response.status == 200
    event["padding"] += "x"
    assert (await offline.refused(event))[0] == 413


async def test_a_compressed_body_is_refused_and_not_inflated(
    offline: Layercode,
) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    url = offline.url + "/agent"
    for body in (b"{}", gzip.compress(b"{}")):
        async with offline.http.post(url, data=body, headers=headers) as response:
            assert response.status == 415


async def test_a_body_that_does_not_end_is_not_waited_for(
    offline: Layercode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "BODY_PATIENCE", 0.1)

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with offline.http.post(offline.url + "/agent", data=endless()) as response:
        assert response.status == 408


async def test_health_checks_hear_that_it_is_up(offline: Layercode) -> None:
    async with offline.http.get(offline.url + "/") as response:
        assert (response.status, await response.text()) == (200, "The agent is up.\n")


async def test_a_wrong_path_is_an_error_in_json(offline: Layercode) -> None:
    status, _ = await offline.refused(offline.event("welcome"), path="/webhook")
    assert status in (404, 405)


# ---- The answer ----------------------------------------------------------------------


async def test_the_answer_has_the_form_that_layercode_reads(caller: Layercode) -> None:
    event = caller.event("message", text="hello")
    async with caller.post(event) as response:
        frames = (await response.text()).split("\n\n")
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    turn = f'"turn_id": "{event["turn_id"]}"'
    assert frames == [
        f'data: {{"type": "response.tts", "content": "Sure, ", {turn}}}',
        f'data: {{"type": "response.tts", "content": "no problem.", {turn}}}',
        f'data: {{"type": "response.end", {turn}}}',
        "",
    ]


async def test_words_are_passed_on_the_moment_they_come(
    caller: Layercode, gemini: Gemini
) -> None:
    more = asyncio.Event()
    gemini.scripts = [["Hello ", more, "there."]]
    async with caller.post(caller.event("message", text="hi")) as response:
        assert await caller.hear(response, "Hello ") == "Hello "
        more.set()
        assert await caller.hear(response, "there.") == "there."


class Speaker(Agent):
    """Replies with pieces that a test gives it."""

    def __init__(
        self, *pieces: str | Event | Exception, histories: Histories | None = None
    ) -> None:
        super().__init__(OFFLINE, histories)
        self.pieces = pieces
        self.history: list[Turn] = []

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        self.history = history
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


DATA = {"type": "response.data", "content": {"size": 9}}
HANG_UP = {"type": "response.hangup"}
TTS = {"type": "response.tts", "content": "Goodbye."}


async def test_a_reply_may_have_events_beside_words(start: Start) -> None:
    caller = await start(Speaker(DATA, "Bye.", HANG_UP))
    event = caller.event("message", text="bye")
    kinds = [frame["type"] for frame in await caller.frames(event)]
    assert kinds == ["response.data", "response.tts", "response.hangup", "response.end"]


async def test_words_that_come_as_an_event_are_remembered(start: Start) -> None:
    one = Speaker(TTS)
    caller = await start(one)
    await caller.say("one")
    await caller.say("two")
    assert one.history[0].spoken == "Goodbye."


async def test_a_reply_without_words_is_an_apology_unless_it_hangs_up(
    start: Start,
) -> None:
    for pieces in ([DATA], [], [""], ["  "]):
        caller = await start(Speaker(*pieces))
        assert (await caller.say("hello")).strip() == Agent.apology
    caller = await start(Speaker(HANG_UP))
    assert await caller.say("hello") == ""


async def test_others_are_served_between_pieces_that_come_at_once(
    start: Start,
) -> None:
    caller = await start(Speaker(*["word "] * 200))
    turns_of_the_loop = 0
    answer = asyncio.create_task(caller.say("hello"))
    while not answer.done():
        turns_of_the_loop += 1
        await asyncio.sleep(0)
    assert turns_of_the_loop > 200


async def test_asterisks_and_backticks_reach_neither_the_caller_nor_the_history(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["It's **really* ", "*", "* `true`."]]
    assert await caller.say("Is it?") == "It's really  true."
    await caller.say("And now?")
    assert gemini.heard()[1] == ("model", "It's really  true.")


async def test_thoughts_are_not_spoken(caller: Layercode, gemini: Gemini) -> None:
    thought = {"text": "The caller greets me.", "thought": True}
    gemini.scripts = [[[thought], [thought, {"text": "Hello!"}]]]
    assert await caller.say("hello") == "Hello!"


async def test_half_a_character_in_the_models_words_is_cleaned(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["So\ud800."]]
    assert await caller.say("one") == "So?."
    await caller.say("two")
    assert gemini.heard()[1] == ("model", "So?.")


# ---- Barge-in ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        [Stall()],
        ["Well, ", Stall()],
        ["Well, ", "x" * 10_000, *["y" * 60_000] * 200, Stall()],
    ],
    ids=["before a word", "between words", "while words are written"],
)
async def test_when_the_connection_drops_gemini_stops(
    caller: Layercode, gemini: Gemini, script: list[Step]
) -> None:
    gemini.scripts = [script]
    async with caller.post(caller.event("message", text="hi")) as response:
        await gemini.until(streams=1)
        if len(script) > 1:
            await caller.hear(response, "Well, ")
        response.close()
    await gemini.until(streams=0)
    await caller.say("hello")
    assert len(gemini.asked) == 2


async def test_nothing_of_a_reply_goes_on_when_it_is_recorded_as_cut_off(
    start: Start, gemini: Gemini
) -> None:
    class Store(Histories):
        async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
            if "finished" in facts:
                at_work.append(generators_at_work())
            await super().record(conversation, turn_id, **facts)

    at_work: list[set[str]] = []
    caller = await start(Agent(WITH_GEMINI, Store()))
    gemini.scripts = [["Well, ", *["x" * 60_000] * 200]]
    await caller.barge_in("hi", after="Well, ")
    await until(lambda: at_work)
    assert not at_work[0] & {"reply", "ask", "ask_twice"}


def generators_at_work() -> set[str]:
    """The names of the asynchronous generators that have not come to their end."""
    return {
        one.__name__
        for one in gc.get_objects()
        if inspect.isasyncgen(one) and one.ag_frame is not None
    }


async def test_when_the_connection_drops_a_served_agent_stops(
    gemini: Gemini, unused_tcp_port: int
) -> None:
    key = {"GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY}
    async with serving(HERE / "agent.py", unused_tcp_port, **key) as (_, caller):
        gemini.scripts = [["Well, ", Stall()]]
        await caller.barge_in("hi", after="Well, ")
        await gemini.until(streams=0)


async def test_a_new_message_ends_the_reply_to_an_earlier_one(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Once upon ", Stall()]]
    async with caller.post(caller.event("message", text="A story!")) as response:
        await caller.hear(response, "Once upon ")
        assert await caller.say("Stop!") == "Sure, no problem."
        await gemini.until(streams=0)
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert gemini.heard()[1] == ("model", "Once upon  [interrupted]")


class SlowStore(Histories):
    """A store that takes its time to record one of the facts."""

    def __init__(self, fact: str) -> None:
        super().__init__()
        self.fact = fact
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.loaded = 0

    async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
        if self.fact in facts:
            self.begun.set()
            await self.may_end.wait()
        await super().record(conversation, turn_id, **facts)

    async def load(self, conversation: str) -> dict[str, Turn]:
        self.loaded += 1
        return await super().load(conversation)


@pytest.mark.parametrize("drops", [True, False])
async def test_the_next_message_waits_until_a_cut_off_answer_is_recorded(
    start: Start, gemini: Gemini, drops: bool
) -> None:
    store = SlowStore("finished")
    caller = await start(Agent(WITH_GEMINI, store))
    gemini.scripts = [["Once upon ", Stall()]]
    async with caller.post(caller.event("message", text="A story!")) as response:
        await caller.hear(response, "Once upon ")
        if drops:
            response.close()
            await store.begun.wait()
        answer = asyncio.create_task(caller.say("Stop!"))
        await until(lambda: store.loaded == 2)
        await store.begun.wait()
        assert len(gemini.asked) == 1
        store.may_end.set()
        assert await answer == "Sure, no problem."
    assert gemini.heard()[1] == ("model", "Once upon  [interrupted]")


async def hang_up_while_it_records(
    caller: Layercode, store: SlowStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Says something, hangs up, and only then lets the store go on."""
    call = asyncio.create_task(caller.say("Hello?"))
    await store.begun.wait()
    call.cancel()
    await until(lambda: logged(caplog))
    store.may_end.set()


async def test_no_word_is_lost_if_a_caller_hangs_up_while_the_store_is_slow(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    store = SlowStore("user")
    caller = await start(Agent(OFFLINE, store))
    await hang_up_while_it_records(caller, store, caplog)
    await asyncio.sleep(0)
    [turn] = (await store.load(caller.conversation)).values()
    assert (turn.user, turn.finished) == ("Hello?", False)


async def test_the_next_message_is_told_an_answer_that_ends_while_it_loads(
    start: Start, gemini: Gemini
) -> None:
    class Store(Histories):
        async def load(self, conversation: str) -> dict[str, Turn]:
            turns = await super().load(conversation)
            if len(turns) == 2:
                more.set()
                await until(lambda: conversation not in self.being_answered)
            return turns

    more = asyncio.Event()
    gemini.scripts = [["Once upon ", more, "a time."]]
    caller = await start(Agent(WITH_GEMINI, Store()))
    async with caller.post(caller.event("message", text="A story!")) as response:
        await caller.hear(response, "Once upon ")
        await caller.say("Go on.")
    assert gemini.heard() == [
        ("user", "A story!"),
        ("model", "Once upon a time."),
        ("user", "Go on."),
    ]


async def test_the_last_message_is_answered_if_an_earlier_one_begins_while_it_loads(
    start: Start, gemini: Gemini
) -> None:
    class Store(Histories):
        async def load(self, conversation: str) -> dict[str, Turn]:
            turns = await super().load(conversation)
            if len(may_load) < 2:
                may_load.append(asyncio.Event())
                await may_load[-1].wait()
            return turns

    may_load: list[asyncio.Event] = []
    gemini.scripts = [["Well, ", Stall()]]
    caller = await start(Agent(WITH_GEMINI, Store()))
    calls = []
    for number, text in enumerate(["Hello.", "Goodbye."]):
        calls.append(asyncio.create_task(caller.say(text)))
        await until(lambda number=number: len(may_load) > number)
    may_load[0].set()
    await gemini.until(streams=1)
    may_load[1].set()
    assert await calls[1] == "Sure, no problem."
    with pytest.raises(aiohttp.ClientError):
        await calls[0]


async def test_what_fails_after_a_hang_up_is_told_by_its_place(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    class Store(SlowStore):
        async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
            await super().record(conversation, turn_id, **facts)
            raise OSError("secret words")

    store = Store("user")
    caller = await start(Agent(OFFLINE, store))
    await hang_up_while_it_records(caller, store, caplog)
    await until(lambda: len(logged(caplog)) == 2)
    assert "failed after a hang-up: OSError at test_agent.py:" in logged(caplog)[1]
    gc.collect()
    assert "secret" not in caplog.text


async def test_a_caller_who_stops_reading_has_hung_up(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent, "WRITE_PATIENCE", 0.1)
    caller = await start(Speaker(*["x" * 60_000] * 1000))
    async with caller.post(caller.event("message", text="hello")):
        await until(lambda: logged(caplog))
    told = " interrupted: Layercode has stopped reading first_word="
    assert told in logged(caplog)[0]


async def test_a_message_that_is_slow_to_begin_does_not_cut_off_a_later_one(
    start: Start, gemini: Gemini
) -> None:
    class Store(Histories):
        async def load(self, conversation: str) -> dict[str, Turn]:
            turns = await super().load(conversation)
            if len(turns) == 1:
                loading.set()
                await may_load.wait()
            return turns

    loading = asyncio.Event()
    may_load = asyncio.Event()
    more = asyncio.Event()
    gemini.scripts = [["Once upon ", more, "a time."]]
    caller = await start(Agent(WITH_GEMINI, Store()))
    slow = asyncio.create_task(caller.say("Hello."))
    await loading.wait()
    async with caller.post(caller.event("message", text="A story!")) as response:
        await caller.hear(response, "Once upon ")
        may_load.set()
        assert await slow == ""
        more.set()
        assert await caller.hear(response, "a time.") == "a time."


async def test_what_was_heard_counts_even_if_that_is_nothing(
    caller: Layercode, gemini: Gemini
) -> None:
    event = caller.event("message", text="one")
    await caller.send(event)
    await caller.say("two", **report(event, ""))
    assert gemini.heard() == [("user", "one"), ("user", "two")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"assistant_turn_id": "unknown"},
        {"assistant_turn_id": None},
        {"text_heard": None},
        {"text_heard": 5},
        {"previous_turn_interrupted": False},
    ],
)
async def test_a_report_about_nothing_known_changes_nothing(
    caller: Layercode, gemini: Gemini, wrong: Event
) -> None:
    event = caller.event("message", text="one")
    await caller.send(event)
    context = {**report(event, "Su")["interruption_context"], **wrong}
    said = [
        await caller.say("two", interruption_context=context),
        await caller.say("three", interruption_context=[context]),
    ]
    assert said == ["Sure, no problem."] * 2
    assert gemini.heard() == [
        ("user", "one"),
        ("model", "Sure, no problem."),
        ("user", "two"),
        ("model", "Sure, no problem."),
        ("user", "three"),
    ]


async def test_a_hundred_interruptions_leave_nothing_behind(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Well, ", Stall()] for _ in range(101)]
    await caller.barge_in("warm up", after="Well, ")
    await gemini.until(streams=0)
    before = len(asyncio.all_tasks())
    callers = [Layercode(caller.http, caller.url) for _ in range(100)]
    await asyncio.gather(*[one.barge_in("hi", after="Well, ") for one in callers])
    await gemini.until(streams=0)
    await until(lambda: len(asyncio.all_tasks()) <= before)
    assert not generators_at_work() & {"reply", "ask", "ask_twice"}


# ---- The history's store -------------------------------------------------------------


class Ledger:
    """A store that only appends, as one for several processes would."""

    def __init__(self) -> None:
        self.facts: list[tuple[str, str, Event]] = []

    async def load(self, conversation: str) -> dict[str, Turn]:
        await asyncio.sleep(0)
        turns: dict[str, Turn] = {}
        for its_conversation, turn_id, facts in self.facts:
            if its_conversation == conversation:
                turns[turn_id] = replace(turns.get(turn_id, Turn()), **facts)
        return turns

    async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
        await asyncio.sleep(0)
        self.facts.append((conversation, turn_id, facts))


async def test_a_store_gets_each_fact_when_it_is_known(
    start: Start, gemini: Gemini
) -> None:
    class Store(Ledger):
        async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
            told.append((facts, len(gemini.asked)))
            await super().record(conversation, turn_id, **facts)

    told: list[tuple[Event, int]] = []
    caller = await start(Agent(WITH_GEMINI, Store()))
    event = caller.event("message", text="one")
    await caller.send(event)
    await caller.say("two", **report(event, "Su"))
    over = {"spoken": "Sure, no problem.", "finished": True}
    assert told == [
        ({"user": "one"}, 0),
        (over, 1),
        ({"heard": "Su"}, 1),
        ({"user": "two"}, 1),
        (over, 2),
    ]


@pytest.mark.parametrize("kind", [Histories, Ledger])
async def test_gemini_is_sent_the_last_fifty_turns(
    start: Start, gemini: Gemini, kind: type[Histories]
) -> None:
    store = kind()
    caller = await start(Agent(WITH_GEMINI, store))
    for number in range(54):
        await store.record(caller.conversation, str(number), user=f"number {number}")
    await caller.say("number 54")
    asked = [text for _, text in gemini.heard()]
    assert asked == [f"number {number}" for number in range(5, 55)]


async def test_what_was_heard_is_not_lost_in_a_store_that_copies(
    start: Start, gemini: Gemini
) -> None:
    caller = await start(Agent(WITH_GEMINI, Ledger()))
    event = caller.event("message", text="one")
    await caller.send(event)
    await caller.say("two", **report(event, "Su"))
    await caller.say("three")
    assert gemini.heard()[1] == ("model", "Su [interrupted]")


async def test_a_report_may_come_before_the_turn_is_recorded() -> None:
    for store in (Histories(), Ledger()):
        await store.record("c", "t", user="one")
        await store.record("c", "t", heard="Su")
        await store.record("c", "t", spoken="Sure.", finished=True)
        assert (await store.load("c"))["t"].answer() == "Su [interrupted]"


@pytest.mark.parametrize("fails", ["load", "user"])
async def test_an_error_in_a_store_is_an_apology(
    start: Start, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    class Broken(Histories):
        async def load(self, conversation: str) -> dict[str, Turn]:
            if fails == "load":
                raise OSError("secret words")
            return await super().load(conversation)

        async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
            if fails in facts:
                raise OSError("secret words")
            await super().record(conversation, turn_id, **facts)

    caller = await start(Agent(OFFLINE, Broken()))
    assert await caller.send(caller.event("welcome")) == Agent.apology
    [line] = logged(caplog)
    assert "failed: OSError at test_agent.py:" in line
    assert "secret" not in caplog.text


async def test_a_store_that_cannot_record_an_answer_does_not_end_the_call(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Histories):
        async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
            if "finished" in facts:
                raise OSError("secret words")
            await super().record(conversation, turn_id, **facts)

    caller = await start(Speaker("Well.", histories=Broken()))
    assert [await caller.say("hello") for _ in range(2)] == ["Well.", "Well."]
    lines = logged(caplog)
    assert "is not recorded: OSError at test_agent.py:" in lines[-1]
    assert "secret" not in caplog.text


async def test_a_store_that_never_ends_to_record_does_not_end_the_call(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent, "RECORD_PATIENCE", 0.05)
    caller = await start(Speaker("Well.", histories=SlowStore("finished")))
    assert [await caller.say("hello") for _ in range(2)] == ["Well.", "Well."]
    await until(lambda: "is not recorded: TimeoutError" in logged(caplog)[-1])


async def test_the_memory_of_one_conversation_is_bounded() -> None:
    histories = Histories()
    for number in range(120):
        await histories.record("a conversation", str(number), user="hello")
        await histories.record("a conversation", str(number), finished=True)
    kept = list(await histories.load("a conversation"))
    assert (kept[0], kept[-1], len(kept)) == ("70", "119", 50)


async def test_the_least_recently_used_conversations_go() -> None:
    histories = Histories()
    for number in range(10_100):
        await histories.record(str(number), "turn", user="hello")
        await histories.record(str(number), "turn", finished=True)
        await histories.record("0", "another turn", user="hello", finished=True)
    known = [number for number in range(10_100) if await histories.load(str(number))]
    assert (known[:2], known[-1], len(known)) == ([0, 101], 10_099, 10_000)
    assert list(await histories.load("0")) == ["turn", "another turn"]


async def test_a_conversation_that_is_being_answered_does_not_go(
    caller: Layercode, gemini: Gemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_CONVERSATIONS", 3)
    gemini.scripts = [["Once upon ", Stall()]]
    async with caller.post(caller.event("message", text="A story!")) as response:
        await caller.hear(response, "Once upon ")
        for _ in range(5):
            await Layercode(caller.http, caller.url).say("hello")
        await caller.say("Go on.")
    assert gemini.heard()[0] == ("user", "A story!")


async def test_a_conversation_goes_though_its_webhooks_came_twice(
    offline: Layercode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "MAX_CONVERSATIONS", 3)
    event = offline.event("welcome")
    for _ in range(2):
        assert await offline.send(event) == Agent.greeting
    for _ in range(5):
        other = Layercode(offline.http, offline.url)
        await other.send(other.event("welcome"))
    assert await offline.send(offline.event("welcome")) == Agent.greeting


async def test_a_conversation_goes_though_its_caller_hung_up_before_the_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent, "MAX_CONVERSATIONS", 3)
    store = SlowStore("user")
    caller = await start(Agent(OFFLINE, store))
    await hang_up_while_it_records(caller, store, caplog)
    for _ in range(5):
        other = Layercode(caller.http, caller.url)
        await other.send(other.event("welcome"))
    assert not await store.load(caller.conversation)


# ---- Delivered twice -----------------------------------------------------------------


async def test_a_finished_turn_is_spoken_again_without_gemini(
    caller: Layercode, gemini: Gemini
) -> None:
    event = caller.event("message", text="hello")
    said = [await caller.send(event) for _ in range(3)]
    assert said == ["Sure, no problem."] * 3
    assert len(gemini.asked) == 1
    await caller.say("two")
    assert gemini.heard() == [
        ("user", "hello"),
        ("model", "Sure, no problem."),
        ("user", "two"),
    ]


async def test_a_running_turn_gets_a_new_reply_on_the_new_connection(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Well, ", Stall()]]
    event = caller.event("message", text="hello")
    async with caller.post(event) as response:
        await caller.hear(response, "Well, ")
        assert await caller.send(event) == "Sure, no problem."
        await gemini.until(streams=0)
    await caller.say("two")
    assert gemini.heard() == [
        ("user", "hello"),
        ("model", "Sure, no problem."),
        ("user", "two"),
    ]


async def test_a_turn_that_was_cut_off_gets_a_new_reply(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Well, ", Stall()]]
    event = await caller.barge_in("hello", after="Well, ")
    await gemini.until(streams=0)
    assert await caller.send(event) == "Sure, no problem."
    assert gemini.heard() == [("user", "hello")]


async def test_what_the_first_delivery_of_a_turn_did_is_not_forgotten(
    start: Start, gemini: Gemini
) -> None:
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    gemini.scripts = [["Well, ", Stall()]]
    event = await caller.barge_in("A salami!", after="Well, ")
    await gemini.until(streams=0)
    turn_id = event["turn_id"]
    await one.histories.record(caller.conversation, turn_id, done=ORDERED)
    await caller.send(event)
    assert gemini.asked[-1]["contents"][1:] == ORDERED


async def test_a_turn_that_others_came_after_is_spoken_again_as_it_was(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Well, ", Stall()], [], [], ["Once upon ", Stall()]]
    late = await caller.barge_in("hello", after="Well, ")
    silent = caller.event("message", text=" ")
    await caller.send(silent)
    assert await caller.send(late) == "Well, "
    assert await caller.send(silent) == Agent.apology
    assert len(gemini.asked) == 1


async def test_an_old_turn_does_not_interrupt_the_one_that_is_spoken(
    caller: Layercode, gemini: Gemini
) -> None:
    old = caller.event("message", text="one")
    await caller.send(old)
    more = asyncio.Event()
    gemini.scripts = [["Once upon ", more, "a time."]]
    async with caller.post(caller.event("message", text="A story!")) as response:
        await caller.hear(response, "Once upon ")
        assert await caller.send(old) == "Sure, no problem."
        more.set()
        assert await caller.hear(response, "a time.") == "a time."


async def test_an_old_turn_of_which_nothing_was_spoken_is_not_an_apology(
    caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [[Stall()]]
    old = caller.event("message", text="one")
    async with caller.post(old) as response:
        await gemini.until(streams=1)
        response.close()
    await caller.say("two")
    assert await caller.send(old) == ""


# ---- Asked once more, before the first word ------------------------------------------


def raw(**answer: Any) -> bytes:
    """A chunk of Gemini's with these fields and no others."""
    return f"data: {json.dumps(answer)}\r\n\r\n".encode()


def ended(reason: str) -> bytes:
    """A chunk that ends an answer without words."""
    return raw(candidates=[{"finishReason": reason}])


BLOCKED = raw(promptFeedback={"blockReason": "PROHIBITED_CONTENT"})
# What Gemini does once, and what the log calls it.
FALTERS: list[tuple[str, list[Step]]] = [
    ("ServerError 503 SOME_STATUS", [Status(503)]),
    ("ServerError 500 SOME_STATUS", [Status(500)]),
    ("ClientError 499 SOME_STATUS", [Status(499)]),
    ("no words", []),
    ("no words", [" ", "\n"]),
    ("no words", ["**"]),
    ("ClientPayloadError at ", [Cut()]),
    ("without a finish reason", [chunk(""), b""]),
    ("UnknownApiResponseError", [b"data: {hello\r\n\r\n"]),
    ("MALFORMED_FUNCTION_CALL", [ended("MALFORMED_FUNCTION_CALL")]),
    ("SAFETY", [ended("SAFETY")]),
    ("PROHIBITED_CONTENT", [BLOCKED]),
]
# What Gemini would say again.
REFUSALS = [400, 401, 403, 404, 429]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a model that has said nothing asked again at once."""
    monkeypatch.setattr(agent, "ASK_AGAIN_AFTER", 0.05)


@pytest.mark.parametrize(("why", "script"), FALTERS)
async def test_gemini_may_falter_once(
    caller: Layercode,
    gemini: Gemini,
    caplog: pytest.LogCaptureFixture,
    why: str,
    script: list[Step],
) -> None:
    gemini.scripts = [script, ["Here ", "I am."]]
    assert await caller.say("hello") == "Here I am."
    await gemini.until(streams=0)
    assert len(gemini.asked) == 2
    [line] = logged(caplog)
    assert "spoken first_word=" in line
    assert re.search(rf"\(asked twice: .*{re.escape(why)}.*\)$", line)


@pytest.mark.usefixtures("impatient")
async def test_gemini_may_be_silent_once(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    gemini.scripts = [[Stall()], ["Here ", "I am."]]
    assert await caller.say("hello") == "Here I am."
    await gemini.until(streams=0)
    assert len(gemini.asked) == 2
    assert logged(caplog)[0].endswith(" (asked twice: no word in 0.05 s)")


@pytest.mark.parametrize(("why", "script"), FALTERS)
async def test_gemini_is_asked_no_more_than_twice(
    caller: Layercode,
    gemini: Gemini,
    caplog: pytest.LogCaptureFixture,
    why: str,
    script: list[Step],
) -> None:
    gemini.scripts = [script, script]
    assert await caller.say("hello") == Agent.apology
    assert len(gemini.asked) == 2
    [line] = logged(caplog)
    assert re.search(rf" failed: .*{re.escape(why)}", line)


@pytest.mark.parametrize("code", REFUSALS)
async def test_a_refusal_is_final(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    gemini.scripts = [[Status(code)]]
    assert await caller.say("hello") == Agent.apology
    assert len(gemini.asked) == 1
    assert f"failed: ClientError {code} SOME_STATUS" in logged(caplog)[0]
    assert "asked twice" not in caplog.text


async def test_after_a_word_nothing_is_asked_again(
    caller: Layercode, gemini: Gemini
) -> None:
    for falter in (Cut(), b"data: {hello\r\n\r\n", BLOCKED, ended("SAFETY")):
        gemini.scripts = [["Well, ", falter]]
        assert await caller.say("hello") == f"Well,  {Agent.apology}"
    assert len(gemini.asked) == 4


@pytest.mark.usefixtures("impatient")
async def test_of_two_slow_asks_the_first_to_speak_wins(
    caller: Layercode, gemini: Gemini
) -> None:
    for scripts in ([["Here.", Stall()], [Stall()]], [[Stall()], ["Here.", Stall()]]):
        asked_twice = asyncio.Event()
        gemini.scripts = [[asked_twice, *script] for script in scripts]
        async with caller.post(caller.event("message", text="hello")) as response:
            await gemini.until(streams=2)
            asked_twice.set()
            assert await caller.hear(response, "Here.") == "Here."
            # The loser was closed.
            await gemini.until(streams=1)
            response.close()
        await gemini.until(streams=0)


@pytest.mark.usefixtures("impatient")
async def test_a_slow_first_ask_may_speak_after_the_second_failed(
    caller: Layercode, gemini: Gemini
) -> None:
    more = asyncio.Event()
    gemini.scripts = [[more, "Here I am."], [Status(503)]]
    answer = asyncio.create_task(caller.say("hello"))
    await until(lambda: len(gemini.asked) == 2)
    more.set()
    assert await answer == "Here I am."


@pytest.mark.usefixtures("impatient")
async def test_a_hang_up_closes_both_asks(caller: Layercode, gemini: Gemini) -> None:
    gemini.scripts = [[Stall()], [Stall()]]
    async with caller.post(caller.event("message", text="hello")) as response:
        await gemini.until(streams=2)
        response.close()
    await gemini.until(streams=0)


@pytest.mark.usefixtures("impatient")
async def test_both_asks_end_even_if_the_end_is_cancelled_again() -> None:
    async def ask() -> AsyncGenerator[str, None]:
        nonlocal begun, ending
        begun += 1
        try:
            await asyncio.Event().wait()
            yield "never"
        finally:
            ending += 1
            await may_end.wait()

    begun = 0
    ending = 0
    may_end = asyncio.Event()
    first_word = asyncio.ensure_future(anext(agent.ask_twice(ask, bool, Turn())))
    await until(lambda: begun == 2)
    for _ in range(2):
        first_word.cancel()
        await until(lambda: ending)
    await asyncio.wait([first_word])
    may_end.set()
    assert ending == 2


async def test_a_thought_is_not_a_first_word_but_a_call_of_a_tool_is(
    gemini: Gemini,
) -> None:
    call = {"functionCall": {"name": "order", "args": {}}}
    gemini.scripts = [[[{"text": "Hm.", "thought": True}]], [[call]]]
    one = Agent(WITH_GEMINI)
    async with one.connected(), aclosing(one.ask([Turn("hello")])) as chunks:
        calls = [chunk.function_calls async for chunk in chunks]
    assert calls[0][0].name == "order"
    assert len(gemini.asked) == 2


# ---- Gemini fails --------------------------------------------------------------------

FAILURES: dict[str, list[Step]] = {
    "SAFETY": [ended("SAFETY"), Stall()],
    "PROHIBITED_CONTENT": [BLOCKED, Stall()],
    "UnknownApiResponseError at ": [b"data: {hello\r\n\r\n"],
    "ClientPayloadError at ": [Cut()],
    "the answer broke off without a finish reason": [b""],
}


@pytest.mark.parametrize("why", FAILURES)
async def test_an_answer_that_fails_after_words_ends_with_the_apology(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    gemini.scripts = [["Well.", *FAILURES[why]]]
    frames = await caller.frames(caller.event("message", text="hello"))
    assert words(frames) == f"Well. {Agent.apology}"
    assert frames[-1]["type"] == "response.end"
    await gemini.until(streams=0)
    [record] = [one for one in caplog.records if one.name == "agent"]
    assert record.levelname == "WARNING"
    assert re.search(f" failed: .*{why}", record.getMessage())
    await caller.say("again")
    assert gemini.heard()[:2] == [("user", "hello"), ("model", words(frames))]


async def test_a_model_that_falls_silent_is_an_apology_after_its_words(
    caller: Layercode,
    gemini: Gemini,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    more = asyncio.Event()
    gemini.scripts = [["Well, ", more, "so ", Stall()]]
    async with caller.post(caller.event("message", text="hello")) as response:
        await caller.hear(response, "Well, ")
        monkeypatch.setattr(agent, "PATIENCE", 0.05)
        more.set()
        assert await caller.hear(response, Agent.apology) == f"so  {Agent.apology}"
    await gemini.until(streams=0)
    assert "failed: TimeoutError: nothing came for 0.05 s" in logged(caplog)[0]


async def test_a_model_that_says_nothing_is_an_apology(
    caller: Layercode,
    gemini: Gemini,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(agent, "PATIENCE", 0.2)
    gemini.scripts = [[Stall()]]
    assert await caller.say("hello") == Agent.apology
    assert "failed: TimeoutError: nothing came for 0.2 s" in logged(caplog)[0]
    await gemini.until(streams=0)


SERVE_A_SLOW_REPLY = """
import asyncio

from agent import Agent, main


class Slow(Agent):
    async def reply(self, event, history):
        loop = asyncio.get_running_loop()
        for word in ("Once ", "upon ", "a ", "time."):
            yield word
            await asyncio.sleep(0)
            # Five seconds go by.
            loop.time = lambda now=loop.time: now() + 5
            await asyncio.sleep(0)


main(Slow)
"""


async def test_a_reply_may_take_long_as_long_as_more_comes(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(SERVE_A_SLOW_REPLY)
    async with serving(slow, unused_tcp_port) as (_, caller):
        assert await caller.say("A story!") == "Once upon a time."


async def test_a_long_answer_is_one_too(caller: Layercode, gemini: Gemini) -> None:
    gemini.scripts = [[chunk("Once upon a time.", "MAX_TOKENS")]]
    assert await caller.say("A story!") == "Once upon a time."


async def test_an_answer_ends_with_its_finish_reason(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    gemini.scripts = [["Well.", Hang()]]
    async with asyncio.timeout(5):
        assert await caller.say("hello") == "Well."
    await gemini.until(streams=0)
    assert " spoken " in logged(caplog)[0]


async def test_a_gemini_that_is_away_is_an_apology_at_once(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unused_tcp_port: int,
) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
    caller = await start(Agent(WITH_GEMINI))
    assert await caller.say("hello") == Agent.apology
    [line] = logged(caplog)
    assert "asked twice: ClientConnectorError at" in line
    assert "failed: ClientConnectorError at" in line


# What Gemini refuses a question with, and what the log makes of it.
EXPLAINED: list[tuple[Status, str]] = [
    (Status(403, "PERMISSION_DENIED"), "ClientError 403 PERMISSION_DENIED"),
    (
        Status(400, "INVALID_ARGUMENT", reason="API_KEY_INVALID"),
        "ClientError 400 INVALID_ARGUMENT API_KEY_INVALID",
    ),
    (
        Status(400, "INVALID_ARGUMENT", message="Thinking level is SECRET-KEY"),
        "ClientError 400 INVALID_ARGUMENT: does GEMINI_THINKING=low suit "
        "GEMINI_MODEL=gemini-test?",
    ),
    (
        Status(404, "NOT_FOUND"),
        "ClientError 404 NOT_FOUND: is GEMINI_MODEL=gemini-test right?",
    ),
]


@pytest.mark.parametrize(("status", "told"), EXPLAINED)
async def test_an_error_is_told_by_gemini_s_own_word_for_it(
    start: Start,
    gemini: Gemini,
    caplog: pytest.LogCaptureFixture,
    status: Status,
    told: str,
) -> None:
    caplog.set_level("DEBUG", "agent")
    settings = replace(WITH_GEMINI, gemini_model="gemini-test", gemini_thinking="low")
    caller = await start(Agent(settings))
    gemini.scripts = [[status]]
    assert await caller.say("hello") == Agent.apology
    assert f" failed: {told} first_word=" in logged(caplog)[-1]
    ours = [one.getMessage() for one in caplog.records if one.name == "agent"]
    assert GEMINI_KEY not in "".join(ours)


@pytest.mark.parametrize(
    ("thinking", "sent"),
    [
        ("minimal", {"thinking_level": "MINIMAL"}),
        ("low", {"thinking_level": "LOW"}),
        ("medium", {"thinking_level": "MEDIUM"}),
        ("high", {"thinking_level": "HIGH"}),
        ("0", {"thinking_budget": 0}),
        ("512", {"thinking_budget": 512}),
        ("-1", {"thinking_budget": -1}),
        ("", None),
    ],
)
async def test_thinking_is_a_choice(
    start: Start, gemini: Gemini, thinking: str, sent: Event | None
) -> None:
    caller = await start(Agent(replace(WITH_GEMINI, gemini_thinking=thinking)))
    await caller.say("hello")
    generation = gemini.asked[0].get("generationConfig", {})
    assert generation.get("thinkingConfig") == sent


async def test_the_model_of_the_settings_is_asked(start: Start, gemini: Gemini) -> None:
    caller = await start(Agent(replace(WITH_GEMINI, gemini_model="gemini-other")))
    await caller.say("hello")
    assert gemini.models == {"gemini-other"}


async def test_the_limits_are_those_that_are_promised() -> None:
    assert (agent.PATIENCE, agent.ASK_AGAIN_AFTER) == (8, 2.5)
    assert (agent.AUTHORIZE_PATIENCE, agent.TOLERANCE) == (10, 300)
    assert (agent.MAX_TURNS, agent.MAX_CONVERSATIONS) == (50, 10_000)


# ---- The log -------------------------------------------------------------------------


async def test_the_log_has_a_line_a_turn(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    gemini.scripts = [["Sure."], [Status(403)], ["Well, ", Stall()]]
    event = caller.event("message", text="hello")
    await caller.send(event)
    await caller.say("hello")
    await caller.barge_in("hello", after="Well, ")
    await gemini.until(streams=0)
    caller.secret = "wrong"
    await caller.refused(event)
    lines = logged(caplog)
    turn = f"conversation='{caller.conversation}' turn='{event['turn_id']}'"
    figures = r"first_word=\d+ms total=\d+ms chunks=1"
    assert re.fullmatch(f"{turn} spoken {figures}", lines[0])
    assert re.search(f" failed: ClientError 403 SOME_STATUS {figures}$", lines[1])
    assert re.search(f" interrupted {figures}$", lines[2])
    assert lines[3].startswith("POST '/agent': 401 wrong signature")
    assert len(lines) == 4


async def test_the_log_has_neither_words_nor_secrets_at_any_level(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "agent")
    gemini.scripts = [["spoken words"], [Status(403)], [Cut()], [Cut()]]
    for _ in range(3):
        await caller.say("heard words")
    ours = [one.getMessage() for one in caplog.records if one.name == "agent"]
    assert "in reply" in "".join(ours)
    assert "heard words" not in "".join(ours) and "spoken words" not in "".join(ours)
    assert GEMINI_KEY not in "".join(ours) and SECRET not in "".join(ours)


async def test_an_error_of_one_s_own_is_told_by_its_place(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "agent")
    caller = await start(Speaker("Well.", KeyError("secret words")))
    assert await caller.say("hello") == f"Well. {Agent.apology}"
    [line] = logged(caplog)
    assert re.search(r" failed: KeyError at test_agent\.py:\d+ first_word", line)
    assert "secret" not in caplog.text


async def test_an_error_in_a_library_is_told_by_the_line_that_called_it(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Agent):
        async def reply(self, event: Event, history: list[Turn]) -> Speech:
            yield json.loads("secret words")

    caller = await start(Broken(OFFLINE))
    assert await caller.say("hello") == Agent.apology
    assert "failed: JSONDecodeError at test_agent.py:" in logged(caplog)[0]
    assert "secret" not in caplog.text


# ---- Starting and stopping -----------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_when_it_is_stopped_replies_in_flight_finish(
    gemini: Gemini, unused_tcp_port: int, how: signal.Signals
) -> None:
    more = asyncio.Event()
    gemini.scripts = [["Once upon ", more, "a time."]]
    key = {"GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY}
    one = serving(HERE / "agent.py", unused_tcp_port, **key)
    async with one as (process, caller):
        async with caller.post(caller.event("message", text="A story!")) as response:
            await caller.hear(response, "Once upon ")
            process.send_signal(how)
            await no_longer_listening(unused_tcp_port)
            more.set()
            assert "a time." in await response.text()
        _, errors = await process.communicate()
    assert process.returncode == 0
    assert b" INFO conversation=" in errors
    assert b"Traceback" not in errors


async def no_longer_listening(port: int) -> None:
    """Waits until no connection is accepted."""
    async with asyncio.timeout(5):
        with pytest.raises(ConnectionError):
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await asyncio.sleep(0.01)


class Endless(Agent):
    """Replies for ever, with pauses or without."""

    pause = 0

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        while True:
            yield "on and "
            await asyncio.sleep(self.pause)


@pytest.mark.parametrize("pause", [0, 60])
async def test_a_reply_that_outlasts_the_stop_is_ended_as_one_that_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pause: int
) -> None:
    monkeypatch.setattr(agent, "GRACE", 0.05)
    one = Endless(OFFLINE)
    one.pause = pause
    async with aiohttp.ClientSession() as http, AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(one.make_app()))
        caller = Layercode(http, url)
        event = caller.event("message", text="A story!")
        async with caller.post(event) as response:
            await caller.hear(response, "on and ")
            stopping = asyncio.create_task(stack.aclose())
            rest = await response.text()
            await stopping
    assert ("response.end" in rest, Agent.apology in rest) == (True, False)
    [turn] = (await one.histories.load(caller.conversation)).values()
    assert turn.answer().startswith("on and ")
    assert turn.answer().endswith(" [interrupted]")
    assert " cut off by the stop " in logged(caplog)[0]


async def test_killed_outright_the_next_start_works_at_once(
    unused_tcp_port: int,
) -> None:
    for _ in range(2):
        async with serving(HERE / "agent.py", unused_tcp_port) as (process, _):
            process.kill()


async def test_an_address_that_is_taken_ends_the_start_with_one_line(
    offline: Layercode,
) -> None:
    process = await run(PORT=offline.url.rpartition(":")[2])
    _, errors = await process.communicate()
    assert (process.returncode, errors.count(b"\n")) == (1, 1)


async def test_importing_the_agent_does_nothing() -> None:
    code = (
        "import sys, threading, agent; "
        "assert 'google.genai' not in sys.modules; "
        "assert threading.active_count() == 1"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=HERE, stdout=PIPE, stderr=PIPE
    )
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 0


# ---- Settings ------------------------------------------------------------------------


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Takes all settings away; gives the folder of an empty .env."""
    for one in fields(Settings):
        monkeypatch.delenv(one.name.upper(), raising=False)
    monkeypatch.setattr(agent, "__file__", str(tmp_path / "agent.py"))
    return tmp_path


@pytest.mark.parametrize(
    "wrong",
    [
        "PORT=abc",
        "PORT=65536",
        "PORT=-1",
        "LOG_LEVEL=loud",
        "GEMINI_THINKING=much",
        "LAYERCODE_API_URL=layercode",
        "ALLOWED_ORIGINS=*",
        "ALLOWED_ORIGINS=https://a.example/",
        "ALLOWED_ORIGINS=https://",
    ],
)
@pytest.mark.usefixtures("no_settings")
async def test_a_setting_that_cannot_be_right_is_named(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(*wrong.split("="))
    with pytest.raises(SettingsError, match="^" + re.escape(wrong)):
        Agent()


async def test_a_setting_that_cannot_be_right_ends_the_start_with_one_line() -> None:
    process = await run(PORT="abc")
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors == b"agent.py: PORT=abc is not a number\n"


async def test_the_one_wrong_origin_of_many_is_named_at_once() -> None:
    origins = [f"https://{number}.example.com" for number in range(40)]
    wrong = "https://app.example.com/,"
    with pytest.raises(SettingsError, match=r": https://app\.example\.com/ is not"):
        Settings(allowed_origins=",".join([*origins, wrong]))
    with pytest.raises(SettingsError, match=r": https://a\.com/ is not"):
        Settings(allowed_origins="https://a.com/,https://b.com")


async def test_a_value_error_of_one_s_own_keeps_its_traceback(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from agent import Agent, main\n"
        "class Broken(Agent):\n"
        "    def __init__(self):\n"
        "        raise ValueError('of my own')\n"
        "main(Broken)\n"
    )
    process = await run(file=broken)
    _, errors = await process.communicate()
    assert b"broken.py" in errors and b"ValueError: of my own" in errors


async def test_it_says_what_is_not_configured_and_where_to_get_it(
    unused_tcp_port: int,
) -> None:
    said = await first_lines(5, PORT=str(unused_tcp_port))
    assert said.startswith(f"Up: http://127.0.0.1:{unused_tcp_port}\n")
    for name in (
        "LAYERCODE_WEBHOOK_SECRET",
        "GOOGLE_GENERATIVE_AI_API_KEY",
        "LAYERCODE_API_KEY",
        "aistudio.google.com",
        "ashboard",
        "tunnel",
    ):
        assert name in said


async def test_it_says_that_it_authorizes_everyone(unused_tcp_port: int) -> None:
    said = await first_lines(4, PORT=str(unused_tcp_port), LAYERCODE_API_KEY="API-KEY")
    assert "Everyone who reaches /authorize may start calls" in said
    assert "admit()" in said and "API-KEY" not in said


async def first_lines(lines: int, **settings: str) -> str:
    """The first lines that the agent prints with these settings."""
    process = await run(**settings)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(10):
            said = [await process.stdout.readline() for _ in range(lines)]
    finally:
        process.kill()
        await process.communicate()
    return b"".join(said).decode()


async def test_log_level_counts_where_it_serves(unused_tcp_port: int) -> None:
    one = serving(HERE / "agent.py", unused_tcp_port, LOG_LEVEL="WARNING")
    async with one as (process, caller):
        await caller.send(caller.event("welcome"))
        caller.secret = "wrong"
        await caller.refused(caller.event("welcome"))
        process.terminate()
        _, errors = await process.communicate()
    assert b" WARNING POST '/agent'" in errors
    assert b" INFO " not in errors


async def test_log_level_counts_in_chat_where_info_would_be_in_the_way() -> None:
    for level, lines in (("DEBUG", 1), ("INFO", 0)):
        process = await run("chat", LOG_LEVEL=level)
        _, errors = await process.communicate(b"")
        assert errors.count(b" spoken first_word=") == lines


DOTENV = """\
# a comment
export GEMINI_MODEL=a-b # comment
LAYERCODE_API_KEY='a # "b'
HOST=
LOG_LEVEL=WARNING
LAYERCODE_WEBHOOK_SECRET="a \\"b\\" # c"
  PORT=80
"""


async def test_settings_come_from_the_environment_and_from_dotenv(
    no_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_settings / ".env").write_text(DOTENV)
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    assert Agent().settings == Settings(
        gemini_model="a-b",
        layercode_api_key='a # "b',
        log_level="ERROR",
        layercode_webhook_secret='a "b" # c',
        port=80,
    )


async def test_an_open_quote_in_dotenv_is_told(no_settings: Path) -> None:
    (no_settings / ".env").write_text("HOST='a")
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        Settings.load()


async def test_a_dotenv_that_cannot_be_read_is_told(no_settings: Path) -> None:
    (no_settings / ".env").write_bytes(b"HOST=\xff")
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        Settings.load()


async def test_an_agent_may_have_settings_of_its_own(
    no_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class PizzaSettings(Settings):
        shop: str = "Luigi's"
        ovens: int = 2
        price: float = 9.5

    monkeypatch.setenv("OVENS", "3")
    (no_settings / ".env").write_text("SHOP=Ana\nPRICE=8.75")
    settings = PizzaSettings.load()
    assert settings == PizzaSettings(shop="Ana", ovens=3, price=8.75)


async def test_secrets_are_not_shown_with_the_settings() -> None:
    settings = replace(WITH_GEMINI, layercode_api_key="API-KEY")
    assert not {SECRET, GEMINI_KEY, "API-KEY"} & set(repr(settings).split("'"))


async def test_the_example_of_dotenv_lists_every_setting() -> None:
    example = (HERE / ".env.example").read_text()
    names = re.findall(r"(?m)^#? ?([A-Z_]+)=", example)
    assert sorted(names) == sorted(one.name.upper() for one in fields(Settings))


# ---- Authorize -----------------------------------------------------------------------


class Api:
    """Layercode's REST API, which answers as it is told."""

    def __init__(self) -> None:
        # The Authorization header and the JSON of each request.
        self.asked: list[tuple[str, Event]] = []
        self.cookies: list[str] = []
        self.status = 200
        self.answer: object = {"client_session_key": "k", "conversation_id": "c"}
        self.stalls = False
        self.endless = False
        self.settings = Settings()

    async def authorize_session(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.headers["Authorization"], await request.json()))
        self.cookies += request.cookies
        if self.stalls:
            await asyncio.Event().wait()
        response = web.StreamResponse(
            status=self.status,
            headers={"Location": "/", "Content-Type": "application/json"},
        )
        response.set_cookie("visitor", "one")
        await response.prepare(request)
        await response.write(json.dumps(self.answer, ensure_ascii=False).encode())
        while self.endless:
            await response.write(b" " * 65536)
        return response


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Api]:
    """Layercode's REST API, with the settings of an agent that asks it."""
    fake = Api()
    app = web.Application()
    app.router.add_post("/v1/agents/web/authorize_session", fake.authorize_session)
    async with served(app, handler_cancellation=True) as url:
        fake.settings = Settings(layercode_api_key="API-KEY", layercode_api_url=url)
        yield fake


class Page:
    """A web page that asks an agent for a session."""

    def __init__(self, caller: Layercode) -> None:
        self.http = caller.http
        self.url = caller.url

    def ask(
        self, page: Event | None = None, path: str = "/authorize", **headers: str
    ) -> Any:
        page = {"agent_id": "a"} if page is None else page
        return self.http.post(self.url + path, json=page, headers=headers)

    async def status(self, page: Event | None = None, **headers: str) -> int:
        async with self.ask(page, **headers) as response:
            return int(response.status)

    async def refused(
        self, page: Event | None = None, **headers: str
    ) -> tuple[int, str]:
        """The status and the reason of a refusal, which the body repeats."""
        async with self.ask(page, **headers) as response:
            assert await response.json() == {"error": response.reason}
            return response.status, response.reason


@pytest_asyncio.fixture
async def page(start: Start, api: Api) -> Page:
    """A page of the agent as it comes, with a key for Layercode."""
    return Page(await start(Agent(api.settings)))


@pytest.mark.parametrize(
    "origin", ["http://localhost:5173", "https://127.0.0.1", "http://[::1]:8000"]
)
async def test_a_page_on_this_machine_gets_its_session(
    page: Page, api: Api, origin: str
) -> None:
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    async with page.http.options(page.url + "/authorize", headers=preflight) as answer:
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        allowed = answer.headers["Access-Control-Allow-Headers"]
        assert allowed == "Authorization, Content-Type"
    asked = {"agent_id": "a", "metadata": {}, "sdk_version": "2.7.0"}
    async with page.ask(asked, "/api/authorize", Origin=origin) as response:
        assert (response.status, await response.json()) == (200, api.answer)
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Vary"] == "Origin"
    assert api.asked == [("Bearer API-KEY", asked)]


@pytest.mark.parametrize(
    "origin",
    ["https://localhost.evil.example", "null", "http://[::1]evil.example", "itself"],
)
async def test_a_page_of_another_origin_gets_nothing(
    page: Page, api: Api, origin: str
) -> None:
    # Not even one that has its name point to this machine.
    headers = {"Origin": origin, "Host": "evil.example"}
    if origin == "itself":
        headers["Origin"] = "http://evil.example"
    for ask in (page.http.options, page.http.post):
        async with ask(page.url + "/authorize", json={}, headers=headers) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
    assert not api.asked


async def test_only_the_origins_of_the_settings_are_allowed(
    start: Start, api: Api
) -> None:
    origins = "https://App.example.com, https://*.shop.example http://[::1]:*"
    page = Page(await start(Agent(replace(api.settings, allowed_origins=origins))))
    for origin, status in {
        "https://app.example.com": 200,
        "https://leeds.shop.example": 200,
        "http://[::1]:9": 200,
        "http://app.example.com": 403,
        "https://app.example.com.evil.example": 403,
        "http://localhost": 403,
        "http://::9": 403,
    }.items():
        assert await page.status(Origin=origin) == status


async def test_a_visitor_cannot_set_more_than_four_fields(page: Page, api: Api) -> None:
    four = {
        "agent_id": "a",
        "conversation_id": "c",
        "metadata": {"b": 1},
        "sdk_version": "2",
    }
    more = {"config": {"x": 1}, "custom_headers": {}, "custom_metadata": {"a": 1}}
    assert await page.status({**four, **more}) == 200
    assert await page.status({"pipeline_id": "a", "session_id": "c"}) == 200
    older = {"agent_id": "a", "conversation_id": "c"}
    assert await page.status({"agent_id": "a", "session_id": ""}) == 200
    assert [asked for _, asked in api.asked] == [four, older, {"agent_id": "a"}]


class Doorkeeper(Agent):
    """Lets in whoever brings the right token."""

    async def admit(self, request: web.Request) -> Event:
        if request.headers.get("Authorization") != "Bearer ana":
            raise web.HTTPForbidden(reason="log in first")
        return {
            "custom_metadata": {"name": "Ana"},
            "custom_headers": {"shop": "Leeds"},
            "config": {"voice": "low"},
        }


async def test_admit_may_refuse_a_visitor_with_a_reason_of_its_own(
    start: Start, api: Api
) -> None:
    page = Page(await start(Doorkeeper(api.settings)))
    assert await page.refused() == (403, "log in first")
    assert not api.asked


async def test_admit_may_say_what_a_visitor_may_not(start: Start, api: Api) -> None:
    page = Page(await start(Doorkeeper(api.settings)))
    forged = {"agent_id": "a", "custom_metadata": {"name": "Eve"}}
    assert await page.status(forged, Authorization="Bearer ana") == 200
    assert api.asked[0][1] == {
        "agent_id": "a",
        "custom_metadata": {"name": "Ana"},
        "custom_headers": {"shop": "Leeds"},
        "config": {"voice": "low"},
    }


async def test_what_admit_says_goes_before_what_the_page_says(
    start: Start, api: Api
) -> None:
    class Namer(Agent):
        async def admit(self, request: web.Request) -> Event:
            page = await request.json()
            return {"metadata": {"name": "Ana", "was": page["metadata"]["name"]}}

    page = Page(await start(Namer(api.settings)))
    assert await page.status({"agent_id": "a", "metadata": {"name": "Eve"}}) == 200
    assert api.asked[0][1]["metadata"] == {"name": "Ana", "was": "Eve"}


async def test_an_error_in_admit_is_a_500_that_the_page_can_read(
    start: Start, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Agent):
        async def admit(self, request: web.Request) -> Event:
            raise KeyError("secret words")

    page = Page(await start(Broken(api.settings)))
    async with page.ask(Origin="http://localhost") as response:
        assert response.status == 500
        assert "Access-Control-Allow-Origin" in response.headers
    assert "KeyError at test_agent.py:" in logged(caplog)[0]
    assert not api.asked and "secret" not in caplog.text


async def test_another_agent_is_refused_with_another_reason(
    start: Start, api: Api
) -> None:
    settings = replace(api.settings, layercode_agent_id="the one")
    page = Page(await start(Agent(settings)))
    assert await page.status({"agent_id": "the one"}) == 200
    refused = await page.refused({"agent_id": "another"})
    assert refused == (403, "agent_id is not LAYERCODE_AGENT_ID")
    assert len(api.asked) == 1


async def test_without_an_agent_id_nobody_is_authorized(page: Page, api: Api) -> None:
    refused = await page.refused({"metadata": {}})
    assert refused == (400, "agent_id is missing or not a text")
    assert not api.asked


async def test_a_page_may_not_send_more_than_64_kibibytes(page: Page, api: Api) -> None:
    asked = {"agent_id": "a", "metadata": ""}
    asked["metadata"] = "x" * (2**16 - len(json.dumps(asked)))
    assert await page.status(asked) == 200
    asked["metadata"] += "x"
    assert await page.status(asked) == 413
    assert len(api.asked) == 1


async def test_without_an_api_key_the_owner_is_told_and_not_the_visitor(
    offline: Layercode,
) -> None:
    refused = await Page(offline).refused()
    assert refused == (500, "LAYERCODE_API_KEY is not set")


@pytest.mark.parametrize(
    ("status", "told"), [(400, 400), (402, 402), (307, 502), (401, 502), (500, 502)]
)
async def test_the_page_learns_why_there_is_no_session_but_not_the_key(
    page: Page, api: Api, status: int, told: int
) -> None:
    api.status = status
    api.answer = {"error": "bad\n\u00e9 key: API-KEY"}
    reason = "bad key: ***" if told == status else f"Layercode answered {status}"
    async with page.ask() as response:
        assert (response.status, response.reason) == (told, reason)
        assert "API-KEY" not in await response.text()


@pytest.mark.parametrize("answer", [["no"], "no", {"error": 5}, {}, None])
async def test_a_400_that_says_nothing_is_not_the_visitor_s_fault(
    page: Page, api: Api, answer: object
) -> None:
    api.status = 400
    api.answer = answer
    assert await page.refused() == (502, "Layercode answered 400")


async def test_a_layercode_that_is_silent_away_or_endless_is_told(
    page: Page,
    api: Api,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    unused_tcp_port: int,
) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    away = await start(Agent(replace(api.settings, layercode_api_url=url)))
    assert (await Page(away).refused())[0] == 502
    api.endless = True
    assert await page.refused() == (502, "Layercode's answer does not end")
    api.stalls = True
    monkeypatch.setattr(agent, "AUTHORIZE_PATIENCE", 0.1)
    assert await page.refused() == (504, "Layercode did not answer within 0.1 s")


async def test_no_visitor_gets_the_cookies_of_another(start: Start, api: Api) -> None:
    # By name, because an address cannot set cookies.
    url = api.settings.layercode_api_url.replace("127.0.0.1", "localhost")
    page = Page(await start(Agent(replace(api.settings, layercode_api_url=url))))
    assert [await page.status() for _ in range(2)] == [200, 200]
    assert not api.cookies


# ---- Connections ---------------------------------------------------------------------


async def test_more_than_a_hundred_callers_are_answered_at_once(
    caller: Layercode, gemini: Gemini
) -> None:
    more = asyncio.Event()
    gemini.scripts = [[more, "Hi."] for _ in range(120)]
    callers = [Layercode(caller.http, caller.url) for _ in range(120)]
    calls = [asyncio.create_task(one.say("hi")) for one in callers]
    await gemini.until(streams=120)
    more.set()
    assert await asyncio.gather(*calls) == ["Hi."] * 120


async def test_a_call_needs_one_connection_which_is_there_before_the_first_caller(
    start: Start, gemini: Gemini
) -> None:
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    await connected(one, gemini, times=1)
    for _ in range(5):
        await caller.say("hello")
    assert len(gemini.connections) == 1


async def test_a_greeting_opens_a_connection_that_was_closed(
    start: Start, gemini: Gemini
) -> None:
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    await connected(one, gemini, times=1)
    gemini.hang_up()
    await caller.send(caller.event("session.start"))
    await connected(one, gemini, times=2)
    await caller.say("hello")
    assert len(gemini.connections) == 2


async def connected(one: Agent, gemini: Gemini, times: int) -> None:
    """Waits until the agent has connected so often."""
    await until(lambda: gemini.looked_up == times)
    assert one.gemini is not None and one.gemini.warming_up is not None
    await one.gemini.warming_up


async def test_a_connection_is_free_for_the_next_question_when_an_answer_ends(
    start: Start, gemini: Gemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "STREAM_END_PATIENCE", 5)
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    await connected(one, gemini, times=1)
    over = asyncio.Event()
    gemini.scripts = [[chunk("Hi.", "STOP"), over, b""]]
    async with caller.post(caller.event("message", text="hello")) as response:
        await caller.hear(response, "Hi.")
        over.set()
        await response.read()
    await caller.say("hello")
    assert len(gemini.connections) == 1


async def test_connections_to_gemini_end_with_the_agent(gemini: Gemini) -> None:
    one = Agent(WITH_GEMINI)
    async with one.connected():
        await connected(one, gemini, times=1)
    [connection] = gemini.connections
    await until(lambda: connection is not None and connection.is_closing())


async def test_connecting_goes_on_once_at_a_time_and_ends_with_the_agent(
    gemini: Gemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "WARM_UP_PATIENCE", 60)
    gemini.refuses = Stall()
    one = Agent(WITH_GEMINI)
    async with (
        asyncio.timeout(10),
        aiohttp.ClientSession() as http,
        served(one.make_app()) as url,
    ):
        caller = Layercode(http, url)
        for _ in range(3):
            await caller.send(caller.event("welcome"))
        await until(lambda: gemini.looked_up)
    assert one.gemini is not None and one.gemini.warming_up is not None
    assert (gemini.looked_up, one.gemini.warming_up.done()) == (1, True)


async def test_connecting_does_not_go_on_for_ever(
    start: Start, gemini: Gemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "WARM_UP_PATIENCE", 0.05)
    gemini.refuses = Stall()
    one = Agent(WITH_GEMINI)
    await start(one)
    async with asyncio.timeout(5):
        await connected(one, gemini, times=1)


async def test_a_wrong_key_is_told_before_the_first_caller(
    start: Start, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    gemini.refuses = Status(400, "INVALID_ARGUMENT", reason="API_KEY_INVALID")
    await start(Agent(WITH_GEMINI))
    await until(lambda: logged(caplog))
    [line] = logged(caplog)
    assert line.startswith("Gemini will refuse to answer: ClientError 400")
    assert line.endswith("API_KEY_INVALID") and GEMINI_KEY not in line


# ---- Any history ---------------------------------------------------------------------


@dataclass
class Said:
    """What was said in a turn, and what the caller heard of the answer."""

    event: Event
    spoken: str
    finished: bool
    heard: str | None = None

    def shown(self) -> list[tuple[str, str]]:
        """How Gemini should be shown the turn."""
        user = self.event.get("text") or "(The caller says nothing.)"
        answer = self.spoken if self.heard is None else self.heard
        if not answer:
            return [("user", user)]
        if not self.finished or self.heard is not None:
            answer += " [interrupted]"
        return [("user", user), ("model", answer)]


class Play:
    """One conversation in which anything may happen, beside a plain model of it."""

    def __init__(self, caller: Layercode, gemini: Gemini, seed: int) -> None:
        self.caller = caller
        self.gemini = gemini
        self.dice = random.Random(seed)
        self.turns: list[Said] = []
        self.streams: list[aiohttp.ClientResponse] = []

    async def run(self) -> list[tuple[str, str]]:
        """Plays it; gives what Gemini should be shown at its end."""
        steps = [
            self.greeting,
            self.silence,
            self.message,
            self.failure,
            self.drop,
            self.late_drop,
            self.delivered_while_it_runs,
            self.delivered_again,
        ]
        for _ in range(self.dice.randrange(1, 7)):
            await self.dice.choice(steps)()
        await self.caller.say("And now?")
        for stream in self.streams:
            stream.close()
        shown = [pair for turn in self.turns for pair in turn.shown()]
        return [*shown, ("user", "And now?")]

    def event(self, kind: str, **more: Any) -> Event:
        """A webhook of a new turn, which may report what was heard of the last."""
        more["session_id"] = f"session_{self.dice.random()}"
        if self.turns and self.dice.random() < 0.4:
            last = self.turns[-1]
            words_heard = self.dice.randrange(len(last.spoken) + 1)
            last.heard = last.spoken[:words_heard]
            more |= report(last.event, last.heard)
        return self.caller.event(kind, **more)

    def message_event(self) -> Event:
        return self.event("message", text=f"words {self.dice.random()}")

    def script(self) -> list[Step]:
        word = self.dice.choice(["So", "Well"])
        return [f"{word}{number} " for number in range(3)]

    async def greeting(self) -> None:
        event = self.event(self.dice.choice(["welcome", "session.start"]))
        self.turns.append(Said(event, await self.caller.send(event), finished=True))

    async def silence(self) -> None:
        event = self.event("message", text="")
        self.turns.append(Said(event, await self.caller.send(event), finished=True))

    async def message(self) -> None:
        await self.answered([], "")

    async def failure(self) -> None:
        await self.answered([Cut()], " " + Agent.apology)

    async def answered(self, then: list[Step], apology: str) -> None:
        script = self.script()
        self.gemini.scripts = [[*script, *then]]
        event = self.message_event()
        spoken = await self.caller.send(event)
        assert spoken == "".join(map(str, script)) + apology
        self.turns.append(Said(event, spoken, finished=True))

    async def late_drop(self) -> None:
        """The next webhook comes before the dropped connection is noticed."""
        script = self.script()
        self.gemini.scripts = [[*script, Stall()]]
        event = self.message_event()
        stream = await self.caller.post(event)
        self.streams.append(stream)
        spoken = await self.caller.hear(stream, str(script[-1]))
        self.turns.append(Said(event, spoken, finished=False))

    async def drop(self) -> None:
        await self.late_drop()
        self.streams[-1].close()

    async def delivered_while_it_runs(self) -> None:
        await self.late_drop()
        self.turns[-1].spoken = await self.caller.send(self.turns[-1].event)
        self.turns[-1].finished = True

    async def delivered_again(self) -> None:
        if not self.turns:
            return
        turn = self.dice.choice(self.turns)
        spoken = await self.caller.send(turn.event)
        if not turn.finished and turn is self.turns[-1]:
            turn.spoken = spoken
            turn.finished = True
        assert spoken == turn.spoken


@pytest.mark.parametrize("store", [Histories, Ledger])
async def test_gemini_is_sent_what_was_said_and_heard_whatever_happened(
    start: Start, gemini: Gemini, store: type[Histories]
) -> None:
    caller = await start(Agent(WITH_GEMINI, store()))
    seed = int(os.environ.get("SEED", time.time()))
    for number in range(seed, seed + 40):
        one = Layercode(caller.http, caller.url)
        wanted = await Play(one, gemini, number).run()
        assert gemini.heard() == wanted, f"SEED={number}"
