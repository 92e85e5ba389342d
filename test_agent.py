"""Tests of agent.py, and how to test a server that streams: over real HTTP.

    python -m pytest test_agent.py

google-genai asks a small Gemini that runs here; a caller signs webhooks, listens, and
hangs up; what only the served process shows is tested in `python agent.py`. Nothing is
mocked, and no test waits for time to pass. They stand in the order of agent.py.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import inspect
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from http import HTTPStatus
from itertools import count, product
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import certifi
import pytest
from aiohttp import web
from pydantic import BaseModel
from pytest_aiohttp import AiohttpServer

import agent
from agent import Agent, Event, Histories, Settings, SettingsError, Speech, Turn, sign

SECRET, GEMINI_KEY, API_KEY = "a webhook secret", "GEMINI-KEY", "LAYERCODE-KEY"
OFFLINE = Settings(layercode_webhook_secret=SECRET, layercode_api_key=API_KEY)
SETTINGS = replace(OFFLINE, google_generative_ai_api_key=GEMINI_KEY)
GREETING, APOLOGY, NEVER = Agent.greeting, Agent.apology, float("inf")
SURE = "Sure, no problem."
ids = count(1)
Test = TypeVar("Test", bound=Callable[..., Any])
Patch = pytest.MonkeyPatch


def cases(*rows: Any) -> Callable[[Test], Test]:
    """Runs a test once with each of the rows, which are its last arguments."""

    def marked(test: Test) -> Test:
        size = len(rows[0]) if isinstance(rows[0], tuple) else 1
        names = ",".join([*inspect.signature(test).parameters][-size:])
        mark = pytest.mark.parametrize(names, rows, ids=lambda it: f"{it}"[:30])
        many: Test = mark(test)
        return many

    return marked


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


class Gate:
    """Where something waits until a test lets it go on; nothing else refers to it."""

    def __init__(self, is_open: bool = False) -> None:
        self.is_open = is_open
        self.reached = asyncio.Event()
        self.waits: list[weakref.ref[asyncio.Future[None]]] = []

    async def __call__(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waits.append(weakref.ref(future))
        self.reached.set()
        if not self.is_open:
            await future

    def open(self) -> None:
        """Lets all go on that has not been collected as garbage."""
        gc.collect()
        self.is_open = True
        for wait in self.waits:
            if (future := wait()) is not None and not future.done():
                future.set_result(None)


nothing = partial(asyncio.sleep, 0)


async def forever() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise KeyError("secret words")


async def waits_and_fails() -> None:
    try:
        await forever()
    finally:
        await fails()


# ---- A small Gemini, and Layercode's REST API ----------------------------------------

# A step of a script: a str is said, a list is the parts of a chunk, bytes are sent as
# they are, a function is waited for, CUT resets the connection. A tuple in place of a
# script is an error: its code and words.
Step = Any
CUT = ConnectionResetError()


class Gemini:
    """Speaks Gemini's streaming format, as the next of its scripts says."""

    def __init__(self) -> None:
        self.scripts: list[Any] = []
        # The JSON of requests for words and for sessions; all requests; how many go on.
        self.asked: list[Event] = []
        self.sessions: list[Event] = []
        self.requests: list[web.Request] = []
        self.open = 0
        # The answers to look-ups, by which the agent connects, and for a session.
        self.look_up: Callable[[], Awaitable[Any]] = nothing
        self.session: Event = {"status": 200, "text": '{"client_session_key": "k"}'}

    @web.middleware
    async def count(self, request: web.Request, handler: Any) -> Any:
        self.open += 1
        self.requests.append(request)
        try:
            return await handler(request)
        finally:
            self.open -= 1

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        script = self.scripts.pop(0) if self.scripts else ["Sure, ", "no problem."]
        if isinstance(script, tuple):
            return refusal(*script)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for step in script:
            if callable(step):
                await step()
            elif step is CUT and request.transport:
                request.transport.abort()
            else:
                await response.write(step if isinstance(step, bytes) else chunk(step))
        if not script or not isinstance(script[-1], bytes):
            await response.write(chunk("", "STOP"))
        return response

    async def describe(self, request: web.Request) -> Any:
        return await self.look_up() or web.json_response({"name": "models/a"})

    async def authorize(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/json"
        self.sessions.append(await request.json())
        return web.Response(**self.session, headers={"Location": "/"})

    async def until(self, open: int) -> None:
        await until(lambda: self.open == open)

    def shown(self) -> list[str]:
        """What the last request showed of the conversation, a text for each part."""
        parts = [part for said in self.asked[-1]["contents"] for part in said["parts"]]
        return [text for text in map(spelled, parts) if text]

    def results(self) -> list[Event]:
        """What the last request told of the tools that were called last."""
        parts = self.asked[-1]["contents"][-1]["parts"]
        return [part["functionResponse"]["response"] for part in parts]


def raw(**answer: Any) -> bytes:
    return f"data: {json.dumps(answer)}\r\n\r\n".encode()


def chunk(step: str | list[Event], finish: str = "") -> bytes:
    """A chunk as Gemini streams it, of a text or a list of parts."""
    parts = [{"text": step}] if isinstance(step, str) else step
    candidate: Event = {"content": {"parts": parts, "role": "model"}}
    return raw(candidates=[candidate | ({"finishReason": finish} if finish else {})])


def refusal(code: int, words: str = "") -> web.Response:
    error: Event = {"code": code, "status": "STATUS", "details": [{"reason": words}]}
    error["message"] = f"{words} {GEMINI_KEY}"
    return web.json_response({"error": error}, status=code)


def call(name: str, **arguments: Any) -> Event:
    called = {"name": name, "args": arguments or None, "id": f"call_of_{name}"}
    return {"functionCall": called, "thoughtSignature": "c2lnbmVk"}


def spelled(part: Event) -> str:
    if "functionCall" in part:
        return f"calls {part['functionCall']['name']}"
    if "functionResponse" in part:
        return f"gives {json.dumps(part['functionResponse']['response'])}"
    return str(part["text"])


# ---- Layercode's part ----------------------------------------------------------------


@dataclass
class Caller:
    """Plays Layercode's part against a served agent, in a conversation of its own."""

    http: aiohttp.ClientSession
    url: str
    gemini: Gemini
    # What agents have logged.
    log: Callable[[], list[str]]
    secret: str = SECRET
    conversation: str = "a conversation"

    def another(self) -> Caller:
        return replace(self, conversation=f"conversation_{next(ids)}")

    def event(self, text: str | None = None, **more: Any) -> Event:
        """A webhook of a new turn: what the caller says, or a greeting."""
        event = {"type": "welcome" if text is None else "message", "text": text}
        event |= {"turn_id": f"turn_{next(ids)}", "session_id": "session"}
        return {**event, "conversation_id": self.conversation, **more}

    def post(
        self, event: Event | bytes, path: str = "/agent", headers: Any = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Posts a webhook, rightly signed unless told otherwise, or a page's words."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        headers = headers or {"layercode-signature": sign(body, self.secret)}
        url = self.url + path
        return self.http.post(url, data=body, headers=headers, allow_redirects=False)

    async def answer(self, *asked: Any) -> aiohttp.ClientResponse:
        """The answer to what is posted, at its end."""
        async with self.post(*asked) as response:
            await response.read()
        return response

    async def status(self, *asked: Any) -> tuple[int, str]:
        response = await self.answer(*asked)
        return response.status, str(response.reason)

    async def frames(self, event: Event) -> list[Event]:
        """The frames that a webhook is answered with, without the last one."""
        lines = (await (await self.answer(event)).text()).split("\n\n")
        frames = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert {frame.pop("turn_id") for frame in frames} == {event["turn_id"]}
        assert frames.pop() == {"type": "response.end"}
        return frames

    async def send(self, event: Event) -> str:
        return words(await self.frames(event))

    async def say(self, text: str | None = None, **more: Any) -> str:
        """The words that a message, or a greeting, is answered with."""
        return await self.send(self.event(text, **more))

    async def hear(self, response: aiohttp.ClientResponse, until: str) -> str:
        heard = ""
        while until not in heard:
            line = await response.content.readline()
            assert line, f"heard only {heard!r}"
            heard += words([json.loads(line[6:])]) if line != b"\n" else ""
        return heard

    async def drop(self, when: Awaitable[Any], *asked: Any) -> None:
        """Posts something and drops the connection when something has happened."""
        posting = asyncio.create_task(self.answer(*asked))
        await when
        posting.cancel()
        await asyncio.wait([posting])

    async def stranger(self, request: str) -> str:
        """The status and the reason for any bytes, once the connection is closed."""
        port = int(self.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request.encode("latin-1"))
        answer = await reader.read()
        writer.close()
        return answer.decode().partition("\r\n")[0].partition(" ")[2]


def words(frames: list[Event]) -> str:
    return "".join(one["content"] for one in frames if one["type"] == "response.tts")


def report(heard: Any, turn_id: Any, told: Any = True) -> Event:
    """What the next webhook tells of an answer that was interrupted."""
    context = {"previous_turn_interrupted": told, "text_heard": heard}
    return {"interruption_context": {**context, "assistant_turn_id": turn_id}}


# ---- Agents and stores that do what a test says --------------------------------------


class Own(Agent):
    """Yields its pieces, or waits for those that are functions; or has Gemini reply."""

    def __init__(self, *pieces: Any, histories: Any = None, **attributes: Any) -> None:
        super().__init__(attributes.pop("settings", SETTINGS), histories)
        self.pieces = pieces
        self.given: Sequence[agent.Tool] = ()
        self.events: list[Event] = []
        self.history: list[Turn] = []
        vars(self).update(attributes)

    def tools(self, event: Event) -> Sequence[agent.Tool]:
        return self.given

    def greet(self, event: Event, history: list[Turn]) -> Speech:
        return self.speak(event, super().greet(event, history))

    def reply(self, event: Event, history: list[Turn]) -> Speech:
        self.history = history
        return self.speak(event, super().reply(event, history))

    async def notice(self, event: Event) -> Any:
        return await anext(self.speak(event), None)

    async def admit(self, request: web.Request, session: Event) -> Any:
        return await anext(self.speak(session), None)

    async def speak(self, event: Event, otherwise: Any = None) -> Speech:
        self.events.append(event)
        for piece in self.pieces:
            if callable(piece):
                await piece()
            else:
                yield piece
        if otherwise and not self.pieces:
            async with aclosing(otherwise) as pieces:
                async for piece in pieces:
                    yield piece


class Store(Histories):
    """Only appends; something may come before it loads, or records one of the facts."""

    def __init__(self, **before: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.before = before
        self.facts: list[tuple[str, str, Event]] = []

    def __len__(self) -> int:
        return len(self.facts)

    async def load(self, conversation: str) -> dict[str, Turn]:
        await self.before.get("load", nothing)()
        turns: dict[str, Turn] = {}
        for its_conversation, turn_id, facts in self.facts:
            if its_conversation == conversation:
                turns[turn_id] = replace(turns.get(turn_id, Turn()), **facts)
        return turns

    async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
        for fact in facts:
            await self.before.get(fact, nothing)()
        self.facts.append((conversation, turn_id, json.loads(json.dumps(facts))))


# ---- Fixtures ------------------------------------------------------------------------

Serve = Callable[..., Awaitable[Caller]]
Run = Callable[..., Awaitable[Process]]


def url_of(server: Any) -> str:
    return str(server.make_url("")).rstrip("/")


@pytest.fixture
async def gemini(
    aiohttp_server: AiohttpServer, monkeypatch: Patch, tmp_path: Path
) -> AsyncIterator[Gemini]:
    """A Gemini, which google-genai asks for as long as the test runs."""
    fake = Gemini()
    app = web.Application(middlewares=[fake.count])
    app.router.add_post("/{version}/models/{model}", fake.generate)
    app.router.add_get("/{version}/models/{model}", fake.describe)
    app.router.add_post("/v1/agents/web/authorize_session", fake.authorize)
    server = await aiohttp_server(app, shutdown_timeout=0)
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url_of(server))
    # Instead of 140 authorities, which each agent would take its time to read.
    end = "-----END CERTIFICATE-----\n"
    authority = Path(certifi.where()).read_text("utf-8").partition(end)[0] + end
    (tmp_path / "one.pem").write_text(authority)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "one.pem"))
    monkeypatch.setattr(certifi, "where", lambda: str(tmp_path / "one.pem"))
    yield fake
    for asked in fake.asked:
        # Gemini itself would refuse what does not take turns.
        roles = [said["role"] for said in asked["contents"]]
        assert roles == ["user", *["model", "user"] * (len(roles) // 2)]


@pytest.fixture
async def serve(
    gemini: Gemini,
    aiohttp_server: AiohttpServer,
    monkeypatch: Patch,
    caplog: pytest.LogCaptureFixture,
) -> AsyncIterator[Serve]:
    """Serves an agent, with other limits if need be; gives a caller of it."""
    caplog.set_level("INFO", "agent")
    served: list[Agent] = []
    # pytest-aiohttp sets handler_cancellation by itself.
    options: Any = {**agent.RUNNER_OPTIONS, "lingering_time": 0.1}
    del options["handler_cancellation"]

    def log() -> list[str]:
        return [line for name, _, line in caplog.record_tuples if "agent" in name]

    async def serve(one: Agent, scripts: Any = (), **limits: float) -> Caller:
        served.append(one)
        gemini.scripts = [*scripts]
        for name, value in limits.items():
            monkeypatch.setattr(agent, name, value)
        if one.settings.layercode_api_url == Settings.layercode_api_url:
            url = os.environ["GOOGLE_GEMINI_BASE_URL"] + "/"
            one.settings = replace(one.settings, layercode_api_url=url)
        server = await aiohttp_server(one.make_app(), **options)
        return Caller(http, url_of(server), gemini, log)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield serve
    await until(lambda: not any(one.tasks for one in served))
    lines = "\n".join(map(logging.Formatter().format, caplog.get_records("call")))
    for text in ("secret words", GEMINI_KEY, "GOOGLE_API_KEY", "never retrieved"):
        assert text not in lines


@pytest.fixture
async def caller(serve: Serve) -> Caller:
    """A caller of the agent as it comes, with all keys."""
    return await serve(Agent(SETTINGS))


PTY = "import pty, sys; code = pty.spawn(sys.argv[1:]); sys.exit(code >> 8 or code)"


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    """Runs agent.py, or code beside it, in a process with these settings only."""
    shutil.copy(agent.__file__, tmp_path / "agent.py")
    processes: list[Process] = []

    async def run(*words: str, code: str = "", pty: str = "", **settings: str) -> Any:
        file = tmp_path / ("own.py" if code else "agent.py")
        if code:
            file.write_text(code)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **settings}
        for name in {one.name.upper() for one in fields(Settings)} - set(settings):
            environment.pop(name, None)
        command = [*(["-c", pty, sys.executable] if pty else []), str(file), *words]
        pipes: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "env": environment}
        start = asyncio.create_subprocess_exec(sys.executable, *command, **pipes)
        processes.append(await start)
        return processes[-1]

    yield run
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def printed(process: Process, wanted: str) -> str:
    assert process.stdout is not None
    seen = b""
    while wanted.encode() not in seen:
        more = await process.stdout.read(1000)
        assert more, f"{wanted!r} is not in {seen!r}"
        seen += more
    return seen.decode()


async def end_of(process: Process) -> tuple[int | None, str]:
    """The status of a process, at its end, and what it wrote to stderr."""
    _, errors = await process.communicate()
    return process.returncode, errors.decode()


# ---- Limits and settings -------------------------------------------------------------

LIMITS = """
TOOL_PATIENCE 5, FILLER_AFTER 1.2, RECORD_PATIENCE 2, NOTICE_PATIENCE 30, GRACE 5,
BODY_PATIENCE 5, AUTHORIZE_PATIENCE 10, MAX_TURNS 50, MAX_CONVERSATIONS 10000"""
OPTIONS = {"handler_cancellation": True, "auto_decompress": False, "access_log": None}
WAITS = {"keepalive_timeout": 120, "lingering_time": 2, "shutdown_timeout": 1}


async def test_limits_and_settings_are_those_that_are_promised() -> None:
    for name, value in map(str.split, LIMITS.split(",")):
        assert getattr(agent, name) == float(value), name
    assert (Agent.patience, Agent.ask_again_after) == (8, 2.5)
    assert "[interrupted]" in Agent.voice_rules and Settings().log_level == "INFO"
    assert agent.RUNNER_OPTIONS == {**OPTIONS, **WAITS}
    example = Path(agent.__file__).with_name(".env.example").read_text("utf-8")
    names = sorted(re.findall("(?m)^([A-Z_]+)=", example))
    assert names == sorted(one.name.upper() for one in fields(Settings))
    assert not {SECRET, GEMINI_KEY, API_KEY} & set(repr(SETTINGS).split("'"))


@cases(
    ("\ufeffHOST=a-b", {"host": "a-b"}),
    ("# HOST=c\r\n\r\n  HOST = a-b  \r\nPORT=80\r\n", {"host": "a-b", "port": 80}),
    ("export\tHOST\t=s3c#r=t # a comment\nWHATEVER=5", {"host": "s3c#r=t"}),
    ("HOST=\t'a # \"b' # it's a comment", {"host": 'a # "b'}),
    ("HOST=\nPORT= # a comment\nLOG_LEVEL", {}),
    ("GEMINI_MODEL=a\nGEMINI_THINKING=low", {"gemini_model": "set outside"}),
    (b"HOST=\xff", r"\.env cannot be read"),
    ("HOST=a".encode("utf-16"), r"\.env cannot be read"),
)
async def test_settings_come_from_the_environment_or_else_from_dotenv(
    monkeypatch: Patch, tmp_path: Path, text: Any, settings: Any
) -> None:
    for one in fields(Settings):
        monkeypatch.delenv(one.name.upper(), raising=False)
    monkeypatch.setattr(agent, "__file__", str(tmp_path / "agent.py"))
    (tmp_path / ".env").write_bytes(text.encode() if isinstance(text, str) else text)
    if "GEMINI_MODEL" in str(text):
        monkeypatch.setenv("GEMINI_MODEL", " set outside\n")
        monkeypatch.setenv("GEMINI_THINKING", "")
    if isinstance(settings, dict):
        assert Settings.load() == Settings(**settings)
    else:
        with pytest.raises(SettingsError, match=settings):
            Settings.load()


# ---- The agent -----------------------------------------------------------------------


async def test_a_greeting_sees_the_webhook_and_who_has_spoken(serve: Serve) -> None:
    caller = await serve(one := Own())
    assert [await caller.say(), await caller.say("a", type="welcome")] == [GREETING] * 2
    await caller.say("Hello.")
    assert await caller.say(type="session.start") == Agent.welcome_back
    one.welcome_back = ""
    assert await caller.say() == ""
    one.pieces = (nothing,)
    event = caller.event(session_id="a session", custom_metadata={"name": "Ana"})
    del event["conversation_id"]
    assert await caller.frames(event) == []
    assert one.events[-1] == {**event, "conversation_id": "a session"}


async def test_a_notice_ends_though_nobody_waits_but_in_time(serve: Serve) -> None:
    caller = await serve(Own(gate := Gate(), fails), NOTICE_PATIENCE=60)
    await caller.drop(gate.reached.wait(), caller.event(type="session.end"))
    # The agent notices the hang-up before it answers another caller.
    await caller.status(b"")
    gate.open()
    told = "'session.end' failed in notice(): KeyError at test_agent.py:"
    await until(lambda: told in caller.log()[-1])
    caller = await serve(Own(forever), NOTICE_PATIENCE=0.01)
    assert (await caller.status(caller.event(type="session.end")))[0] == 500
    assert "'session.end' failed in notice(): TimeoutError" in caller.log()[-1]


async def is_cancelled() -> None:
    """Waits for what two callers share, of whom the other one has hung up."""
    shared = asyncio.ensure_future(forever())
    shared.cancel()
    await shared


async def quits() -> None:
    sys.exit("secret words")


WRONG = {fails: "KeyError", quits: "SystemExit", is_cancelled: "CancelledError"}


@cases(
    *product(WRONG, ["greet", "reply", "notice"]), (fails, "admit"), (quits, "admit")
)
async def test_an_error_is_told_by_its_place(serve: Serve, wrong: Any, at: str) -> None:
    caller = await serve(Own(wrong))
    if at in ("greet", "reply"):
        assert await caller.say("hello" if at == "reply" else None) == APOLOGY
    elif at == "notice":
        assert (await caller.status(caller.event(type="data")))[0] == 500
    else:
        assert (await caller.status(ASKED, "/authorize"))[0] == 500
    [line] = caller.log()
    assert "failed" in line and f"{WRONG[wrong]} at test_agent.py:" in line


# ---- History -------------------------------------------------------------------------


async def test_a_store_gets_each_fact_when_it_is_known(serve: Serve) -> None:
    caller = await serve(Agent(SETTINGS, store := Store()), MAX_TURNS=1)
    await caller.say("one", turn_id="1")
    # Of what is only spoken again, there is nothing to record.
    [await caller.say("two", turn_id="2", **report("Su", "1")) for _ in range(2)]
    over, heard = {"spoken": SURE, "finished": True}, {"finished": False, "heard": "Su"}
    told = [{"user": "one"}, {"user": "one", **over}, heard]
    told += [{"user": "two"}, {"user": "two", **over}]
    assert [facts for *_, facts in store.facts] == told
    assert caller.gemini.shown() == ["two"]


@cases(*product([[], ["Well, "], ["Well, ", forever]], [True, False]))
async def test_arrival_decides_and_no_word_is_lost_however_slow_a_store_is(
    serve: Serve, script: list[Step], drops: bool
) -> None:
    store = Store(**{"finished" if script else "user": (gate := Gate())})
    one, scripts = Agent(SETTINGS, store), [script] if script else []
    caller = await serve(one, scripts, RECORD_PATIENCE=60)
    async with caller.post(caller.event("one")) as response:
        await caller.hear(response, "Well, " if script else "")
        first = one.running[caller.conversation]
        if drops:
            response.close()
        # The second hangs up, while it waits for the first to be recorded.
        second = until(lambda: one.running[caller.conversation] is not first)
        await caller.drop(second, caller.event("two"))
        answer = asyncio.create_task(caller.say("three"))
        await gate.reached.wait()
        await caller.status(b"")
        assert len(caller.gemini.asked) == len(scripts)
        gate.open()
        assert await answer == SURE
    heard = ["Well,  [interrupted]"] if forever in script else script
    assert caller.gemini.shown() == ["one", *heard, "two", "three"]


@cases(*product(["load", "user", "finished"], [fails, quits, forever]))
async def test_a_store_that_fails_or_hangs_does_not_end_the_call(
    serve: Serve, fact: str, before: Any
) -> None:
    one = Own("Well.", histories=Store(**{fact: before}), patience=0.05)
    caller = await serve(one, RECORD_PATIENCE=0.01)
    said = "Well." if fact == "finished" else APOLOGY
    assert [await caller.say("hello") for _ in range(2)] == [said, said]
    what = "is not recorded" if fact == "finished" else "failed"
    why = WRONG.get(before, "TimeoutError")
    await until(lambda: f"' {what}: {why}" in "".join(caller.log()))


# ---- The webhook ---------------------------------------------------------------------


async def test_the_answer_has_the_form_that_layercode_reads(caller: Caller) -> None:
    response = await caller.answer(caller.event("hello", turn_id="1"), "/api/agent")
    headers = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
    headers["Cache-Control"] = "no-cache, no-transform"
    assert {**response.headers, **headers} == {**response.headers}
    first = 'data: {"type": "response.tts", "content": "Sure, ", "turn_id": "1"}\n\n'
    last = 'data: {"type": "response.end", "turn_id": "1"}\n\n'
    text = await response.text()
    assert text.startswith(first) and text.endswith(last) and text.count("\n") == 6
    assert caller.log()[-1].endswith("ms chunks=2")


OBJECT = "the body is not a JSON object"
RUBBISH = [b" ", b"null", b"5", b'["ab"]', b"\xff", b"{", b"[" * 100_000, b"1" * 5000]
FIELDS = [*product(["type", "conversation_id", "turn_id"], [0, {}, ...])]


@cases(
    *((body, 400, OBJECT) for body in RUBBISH),
    *(({name: it}, 400, f"{name} is missing or not a text") for name, it in FIELDS),
    (b'{"type": "new", "session_id": "a"}'.ljust(2**20), 200, "{}"),
    (b"{}".ljust(2**20 + 1), 413, ""),
    *(({"type": "session.start", "turn_id": it}, 200, "{}") for it in (None, ...)),
    *(({"text": text}, 200, APOLOGY) for text in ("", "  ", None, ...)),
    *(({name: "a\ud800"}, 200, "problem.") for name in ("text", "turn_id", "more")),
)
async def test_a_webhook_is_answered_or_told_what_is_wrong_with_it(
    caller: Caller, asked: Any, status: int, told: str
) -> None:
    if isinstance(asked, dict):
        asked = {**caller.event("hello"), "session_id": None, **asked}
        asked = {name: value for name, value in asked.items() if value is not ...}
    response = await caller.answer(asked)
    assert (response.status, told in await response.text()) == (status, True)
    if told == "problem.":
        assert caller.gemini.shown() == [asked["text"]]


SIGNED = f"layercode-signature: {sign(b'1', SECRET)}"
ONE, NINE = "Content-Length: 1", "Content-Length: 9"
CHUNKS = "Transfer-Encoding: chunked"


@cases(
    *((path, [CHUNKS], "411 ") for path in ("/agent", "/authorize", "/nowhere")),
    ("/agent", [NINE], "401 "),
    ("/agent", [NINE, SIGNED], "408 "),
    ("/authorize", [NINE], "408 "),
    ("/agent", [ONE, "layercode-signature: t=1,v1=0"], "401 "),
    ("/agent", [ONE, "layercode-signature: \xe9"], "401 "),
    ("/agent", [ONE, SIGNED[:35] + "1=\xe9"], "401 "),
    (f"/{'nowhere' * 99}", [ONE], "404 Not Found"),
)
async def test_a_stranger_is_refused_and_the_connection_closed(
    serve: Serve, path: str, headers: list[str], told: str
) -> None:
    caller = await serve(Agent(SETTINGS), BODY_PATIENCE=0.1)
    lines = [f"POST {path} HTTP/1.1", "Host: a", "Connection: close", *headers]
    assert (await caller.stranger("\r\n".join([*lines, "", "1"]))).startswith(told)
    assert len(caller.log()[-1]) < 150


DATA = {"type": "response.data", "content": {"size": 9}}
HANG_UP = {"type": "response.hangup"}
GOODBYE = {"type": "response.tts", "content": "Goodbye."}


@cases(
    ([DATA, "Bye. ", GOODBYE, HANG_UP], "Bye. Goodbye.", "spoken"),
    ([DATA], "", "spoken"),
    ([nothing], APOLOGY, "failed: nothing was said"),
    (["", " \n"], APOLOGY, "failed: nothing was said"),
    (["Well.[", fails], f"Well. {APOLOGY}", "failed: KeyError at test_agent.py:"),
    ([partial(json.loads, "secret words")], APOLOGY, "JSONDecodeError at test_agent."),
    ([5], APOLOGY, "failed: Own.reply() yields a int"),
    ([None], APOLOGY, "failed: Own.reply() yields a NoneType"),
    ([{"content": "x"}], APOLOGY, "failed: Own.reply() yields a dict"),
    ([GOODBYE | {"content": None}], APOLOGY, "failed: Own.reply() yields a "),
    ([DATA | {"content": float("nan")}], APOLOGY, "failed: Own.reply() yields a"),
)
async def test_what_a_reply_yields_is_sent_or_what_is_wrong_with_it_told(
    serve: Serve, pieces: list[Any], said: str, why: str
) -> None:
    caller = await serve(one := Own(*pieces))
    frames = await caller.frames(event := caller.event("hello"))
    assert words(frames).strip() == said
    events = [piece for piece in pieces if piece in (DATA, HANG_UP)]
    assert [frame for frame in frames if frame["type"] != "response.tts"] == events
    [line] = caller.log()
    assert f" {why}" in line
    assert words(await caller.frames(event)).strip() == said
    one.pieces = ("Well.",)
    await caller.say("two")
    assert one.history[0].spoken.strip() == said


@cases([], ["Well, "], ["Well, ", *["y" * 60_000] * 200])
async def test_a_hang_up_stops_gemini(serve: Serve, first: list[Step]) -> None:
    caller = await serve(Agent(SETTINGS), [[*first, forever]])
    async with caller.post(caller.event("hi")) as response:
        await until(lambda: caller.gemini.asked)
        await caller.hear(response, "".join(first[:1]))
        response.close()
    await caller.gemini.until(open=0)
    await until(caller.log)
    assert " interrupted" in caller.log()[0] and len(caller.gemini.asked) == 1


async def test_a_reply_that_is_cut_off_says_nothing_more(serve: Serve) -> None:
    caller = await serve(one := Own("Once upon ", waits_and_fails))
    async with caller.post(caller.event("A story!")) as response:
        await caller.hear(response, "Once upon ")
        one.pieces = ("Well.",)
        assert await caller.say("Stop!") == "Well."
        assert "response.end" not in await response.text()
    assert (one.history[0].spoken, one.history[0].finished) == ("Once upon ", False)
    interrupted, spoken = caller.log()
    assert " interrupted first_word=" in interrupted and " spoken first_word=" in spoken


async def test_who_stops_reading_is_not_waited_for(serve: Serve) -> None:
    caller = await serve(one := Own(*["x" * 60_000] * 1000, patience=0.1))
    async with caller.post(caller.event("hello")):
        await until(lambda: caller.log() and not one.tasks)
    assert " failed: TimeoutError: nothing came for 0.1 s" in caller.log()[0]


REPORTS = [
    *((report("Su", it), [SURE, "Su [interrupted]"]) for it in ("", None)),
    (report("Su", "zero"), ["Su [interrupted]", SURE]),
    (report("", "one"), [SURE]),
    (report(None, None), [SURE, f"{SURE} [interrupted]"]),
    *((report("Su", it), [SURE, SURE]) for it in ("unknown", ["one"])),
    (report("Su", "one", False), [SURE, SURE]),
]


@cases(*product([Histories, Store], REPORTS))
async def test_what_was_heard_is_what_is_reported(
    serve: Serve, store: Any, told: tuple[Event, list[str]]
) -> None:
    caller = await serve(Agent(SETTINGS, store()))
    await caller.say("zero", turn_id="zero", **report("Su", None))
    await caller.say("one", turn_id="one")
    assert await caller.say("two", **told[0]) == SURE
    await caller.say("And now?", interruption_context=[])
    shown = ["zero", told[1][0], "one", *told[1][1:], "two", SURE, "And now?"]
    assert caller.gemini.shown() == shown


async def test_a_stop_ends_what_outlasts_it_and_says_so(
    serve: Serve, aiohttp_server: AiohttpServer
) -> None:
    caller = await serve(Agent(SETTINGS), GRACE=0.05)
    server = await aiohttp_server((one := Own(forever)).make_app())
    caller.url = url_of(server)
    reply = asyncio.create_task(caller.frames(caller.event("A story!")))
    notice = asyncio.create_task(caller.answer(caller.event(type="session.end")))
    await until(lambda: len(one.events) == 2)
    await asyncio.gather(server.close(), notice, return_exceptions=True)
    assert await reply == []
    assert re.search("Finishing 1 .* interrupted first_word=none", str(caller.log()))
    [line] = [line for line in caller.log() if "'session.end'" in line]
    assert "failed in notice(): CancelledError at test_agent.py:" in line


# ---- What is read aloud, and the signature -------------------------------------------

PLAIN = {
    "It's **really** `true`. **So.**\n\n**Yes**": "It's really true. So.\n\nYes",
    "# A\n## B\n> c\n>d\n- one\n* two\n  + tre": "A\nB\nc\nd\none\ntwo\ntre",
    "an _emphasis_, *another*, __both__": "an emphasis, another, both",
    "See [the menu of this week](https://a.example/x)": "See the menu of this week",
    "Well [interrupted] so [Interrupted]": "Well  so ",
    "Yes [sic] [1], 2*3, 2**3, 5 * 3": "Yes [sic] [1], 2*3, 2**3, 5 * 3",
    "a - b, 5 > 3, #1, C#, snake_case [1": "a - b, 5 > 3, #1, C#, snake_case [1",
}


@cases(*PLAIN)
async def test_marks_are_not_read_aloud_split_or_not(serve: Serve, text: str) -> None:
    caller = await serve(one := Own())
    for end in range(len(text)):
        one.pieces = (text[: end // 2], text[end // 2 : end], text[end:])
        assert await caller.say("hello") == PLAIN[text], one.pieces


BODY = b'{"type": "data", "session_id": "caf\xc3\xa9",  "price": 1.0}'
NOW, RIGHT = int(time.time()), sign(BODY, SECRET)


@cases(
    *((sign(BODY, SECRET, str(NOW + age)), 200) for age in (-200, 0, 200)),
    *((text, 200) for text in (RIGHT + ",v1=00", RIGHT.replace(",", ",v1=00,"))),
    (",".join(reversed(RIGHT.split(","))), 200),
    *((sign(BODY, SECRET, str(NOW + age)), 401) for age in (-310, 3600)),
    *((sign(*it), 401) for it in ((BODY + b" ", SECRET), (BODY, "another"))),
    *((RIGHT.replace(*it), 401) for it in (("v1", "v0"), ("t=", "t=0"))),
    *((text, 401) for text in ("nonsense", "t=,v1=", "v1=00", f"t={NOW}", "\u00e9")),
    *((f"t={text},v1=00", 401) for text in (1, "\u00b2", "9" * 5000, NOW)),
)
async def test_a_webhook_is_taken_if_its_signature_is_right(
    caller: Caller, signature: str, status: int
) -> None:
    headers = {"layercode-signature": signature}
    assert (await caller.status(BODY, "/agent", headers))[0] == status
    assert agent.verify(signature, BODY, SECRET) == (status == 200)


# ---- Asking Gemini -------------------------------------------------------------------

BLOCKED = raw(promptFeedback={"blockReason": "PROHIBITED_CONTENT"})
GARBLED, SAFETY = b"data: {hello\r\n\r\n", chunk("", "SAFETY")
THOUGHT = {"text": "The caller greets me.", "thought": True}
GEMMA = replace(SETTINGS, gemini_model="models/gemma", gemini_thinking="low")
WELL, STORY = f"Well. {APOLOGY}", "Once upon a time."


@cases(
    ((503,), 2, APOLOGY, "ServerError 503 STATUS"),
    ([" ", "\n", "**"], 2, APOLOGY, "no words"),
    ([[THOUGHT]], 2, APOLOGY, "no words"),
    ([CUT], 2, APOLOGY, "ClientPayloadError at agent.py:"),
    ([b""], 2, APOLOGY, "ended: cut off"),
    ([GARBLED], 2, APOLOGY, "UnknownApiResponseError at agent.py:"),
    ([SAFETY, forever], 2, APOLOGY, "Gemini's answer ended: SAFETY"),
    ((403,), 1, APOLOGY, "ClientError 403 STATUS first_word"),
    ((404,), 1, APOLOGY, "ClientError 404 STATUS: is GEMINI_MODEL=models/gem"),
    ((400, "API_KEY_INVALID"), 1, APOLOGY, ": is GOOGLE_GENERATIVE_AI_API_KEY right?"),
    ((400, "Thinking level"), 1, APOLOGY, "GEMINI_THINKING=low suit GEMINI_MODEL=mod"),
    ((429, "User location is not supported"), 1, APOLOGY, "where this server runs"),
    ((400, "instruction is not enabled"), 1, APOLOGY, "GEMINI_MODEL=models/gemma take"),
    ([BLOCKED], 1, APOLOGY, "PROHIBITED_CONTENT"),
    (["Well.", BLOCKED, forever], 1, WELL, "PROHIBITED_CONTENT"),
    (["Well.", SAFETY, forever], 1, WELL, "Gemini's answer ended: SAFETY"),
    (["Well.", CUT], 1, WELL, "ClientPayloadError at "),
    (["Well.", b""], 1, WELL, "ended: cut off"),
    (["Well.", forever], 1, WELL, "TimeoutError: nothing came for 0.3 s"),
    ([[THOUGHT], [THOUGHT, {"text": "\u597d"}]], 1, "\u597d", ""),
    ([chunk("Once ", "STOP"), chunk("upon a time.", "STOP"), b""], 1, STORY, ""),
    ([chunk("", "STOP"), "Once upon a ", chunk("time.", "STOP")], 1, STORY, ""),
    ([chunk(STORY, "MAX_TOKENS"), b""], 1, STORY, ""),
    ([chunk(STORY, "STOP"), forever], 1, STORY, ""),
)
async def test_gemini_is_asked_twice_before_a_word_unless_it_refuses(
    serve: Serve, script: Any, times: int, said: str, why: str
) -> None:
    caller = await serve(Own(patience=0.3, settings=GEMMA), [script] * times)
    assert await caller.say("hi", turn_id="1") == said
    await caller.gemini.until(open=0)
    assert len(caller.gemini.asked) == times
    assert "/models/gemma:stream" in caller.gemini.requests[-1].path
    told = f"{Agent.persona}\n{Agent.voice_rules}"
    assert caller.gemini.asked[0]["systemInstruction"]["parts"] == [{"text": told}]
    *again, line = caller.log()
    turn = f"conversation='{caller.conversation}' turn='1' "
    assert line.startswith(turn + ("failed: " if why else "spoken ")) and why in line
    assert re.search(r" first_word=\d+ms total=\d+ms chunks=\d+$", line)
    for line in again:
        assert line.startswith(f"{turn}asks the model twice: ") and why in line
    caller.gemini.scripts = [script] * (times - 1)
    assert await caller.say("And now?") == SURE
    assert (caller.gemini.shown() == ["And now?"]) == (BLOCKED in script)


@cases(0, 1, 2)
async def test_of_two_slow_requests_the_first_wins(serve: Serve, first: int) -> None:
    scripts: list[Any] = [[forever], [forever], []]
    scripts[first] = [gate := Gate(), "Here.", forever]
    caller = await serve(Own(ask_again_after=0.05), scripts)
    async with caller.post(caller.event("hello")) as response:
        await until(lambda: len(caller.gemini.asked) == 2)
        assert caller.log()[0].endswith(" asks the model twice: no word in 0.05 s")
        if first < 2:
            gate.open()
            assert await caller.hear(response, "Here.") == "Here."
            await caller.gemini.until(open=1)
        response.close()
    await caller.gemini.until(open=0)
    assert len(caller.gemini.asked) == 2


# ---- Tools ---------------------------------------------------------------------------


class Size(enum.Enum):
    SMALL = "small"


@dataclass
class Topping:
    name: str


class Guest(BaseModel):
    name: str


class Kitchen:
    def __init__(self, is_open: bool = True) -> None:
        self.orders: list[str] = []
        self.gate = Gate(is_open)

    async def order(self, dish: str) -> str:
        """Orders a dish."""
        self.orders.append(dish)
        await self.gate()
        return f"number {len(self.orders)}"


def blows_up() -> None:
    raise StopIteration


def blocks() -> None:
    threading.Event().wait(20)


def returns(name: str, event: Event) -> agent.Tool:
    tool = lambda: event  # noqa: E731
    tool.__name__ = name
    return tool


HAM, WAIT = call("order", dish="a ham"), [call("wait")]
ORDERED = ["A ham!", "calls order", 'gives {"output": "number 1"}']


async def test_tools_get_what_their_types_say(serve: Serve) -> None:
    def bake(size: Size, minutes: int, topping: Topping, extra: int = 2) -> Any:
        given = [size, repr(minutes), topping, extra, threading.current_thread().daemon]
        is_right = given == [Size.SMALL, "2", Topping("ham"), 2, True]
        return [is_right, float("nan"), object]

    async def greet(guest: Guest) -> Guest:
        return guest

    given = {"size": "small", "minutes": 2.0, "topping": {"name": "ham"}}
    greeting = call("default_api.greet", guest={"name": "Ana"})
    calls = [HAM, call("bake", **given), greeting]
    one = Own(given=[Kitchen().order, bake, greet])
    caller = await serve(one, [["So. ", calls[:2], calls[2:]]])
    assert await caller.say("A ham!") == f"So.  {SURE}"
    outputs = ["number 1", [True, None, str(object)], {"name": "Ana"}]
    assert caller.gemini.results() == [{"output": output} for output in outputs]
    called, told = [one["parts"] for one in caller.gemini.asked[-1]["contents"][1:]]
    assert called == [{"text": "So. "}, *calls]
    assert told[0]["functionResponse"].items() >= {"id": "call_of_order"}.items()
    order, bake_, _ = caller.gemini.asked[0]["tools"][0]["functionDeclarations"]
    assert order["description"] == "Orders a dish." and "self" not in str(order)
    for word in ('"small"', '"integer"', "Topping", '["size", "minutes", "topping"]'):
        assert word in json.dumps(bake_)


async def test_tools_run_at_once_and_nobody_waits_for_them(serve: Serve) -> None:
    def wait() -> bool:
        all_run.wait(20)
        return may_end.wait(20)

    async def wait_too() -> bool:
        return await asyncio.to_thread(wait)

    all_run, may_end = threading.Barrier(4), threading.Event()
    calls = [call("wait"), call("wait"), call("wait_too")]
    caller = await serve(Own(given=[wait, wait_too]), [[calls]])
    answer = asyncio.create_task(caller.say("hello"))
    await asyncio.to_thread(all_run.wait, 20)
    assert await caller.another().say() == GREETING
    may_end.set()
    assert (await answer, "roperties" in str(caller.gemini.asked[0])) == (SURE, False)
    assert caller.gemini.results() == [{"output": True}] * 3


@cases(
    (call("blows_up"), "RuntimeError: StopIteration"),
    (call("quits"), "SystemExit: secret words"),
    (call("is_cancelled"), "CancelledError"),
    (call("forever"), "may go on. Do not call it again unasked."),
    (call("blocks"), "may go on. Do not call it again unasked."),
    (call("order", dish=5), "valid string"),
    (call("default_api.bakes"), "no tool"),
)
async def test_a_tool_that_fails_costs_no_answer_and_gemini_is_told_why(
    serve: Serve, called: Event, told: str
) -> None:
    given = [blows_up, quits, is_cancelled, forever, blocks, Kitchen().order]
    caller = await serve(Own(given=given), [[[called]]], TOOL_PATIENCE=0.1)
    frames = await caller.frames(caller.event("hello"))
    [result] = caller.gemini.results()
    assert words(frames) == SURE and told in str(result)
    name = called["functionCall"]["name"].removeprefix("default_api.")
    states = [one["content"] for one in frames if one["type"] == "response.data"]
    assert states == [{"tool": name, "state": one} for one in ("running", "failed")]
    assert f"' tool '{name}' failed: " in "".join(caller.log()) or "no tool" in told


@cases(*product([Histories, Store], ["says more", "again", "again after a hang-up"]))
async def test_a_tool_runs_once_and_to_its_end_whatever_comes(
    serve: Serve, store: Any, how: str
) -> None:
    kitchen = Kitchen(is_open=False)
    one = Own(histories=store(), given=[kitchen.order])
    caller = await serve(one, [["So.", [HAM]], ["Here it is."]])
    async with caller.post(event := caller.event("A ham!")) as response:
        await kitchen.gate.reached.wait()
        if how != "again":
            response.close()
        if how == "says more":
            assert await caller.say("Hello?") == "Here it is."
            assert "It has begun" in caller.gemini.shown()[2]
        again = asyncio.create_task(caller.send(event))
        await caller.another().say()
        kitchen.gate.open()
        said = "So." if how == "says more" else "Here it is."
        assert (await again).strip() == said
        assert (caller.gemini.shown()[:3] == ORDERED) == (how != "says more")
    assert [await caller.say("Hm."), await caller.say("So?")] == [SURE, SURE]
    *told, heard = caller.gemini.shown()[:4]
    assert (told, heard.startswith(said)) == (ORDERED, True)
    assert ("[interrupted]" in heard) == (how == "says more")
    assert caller.gemini.asked[-1]["contents"][1]["parts"] == [HAM]
    assert kitchen.orders == ["a ham"]


async def test_a_tool_is_recorded_and_runs_once_if_asked_twice(serve: Serve) -> None:
    store, kitchen = Store(done=(recording := Gate())), Kitchen()
    one = Own(ask_again_after=0.05, histories=store, given=[kitchen.order])
    caller = await serve(one, [[both := Gate(), [HAM]], [both, [HAM]]])
    answer = asyncio.create_task(caller.say("A ham!"))
    await until(lambda: len(both.waits) == 2)
    one.ask_again_after = NEVER
    both.open()
    await recording.reached.wait()
    await caller.another().say()
    assert not kitchen.orders
    recording.open()
    assert (await answer, kitchen.orders) == (SURE, ["a ham"])
    done = [str(facts["done"]) for *_, facts in store.facts if "done" in facts]
    assert "It has begun" in done[0] and "number 1" in done[1]
    # What cannot be recorded is done all the same.
    store.before["done"] = fails
    caller.gemini.scripts = [[[HAM]]]
    assert (await caller.say("A ham!"), len(kitchen.orders)) == (SURE, 2)


async def test_events_of_tools_are_sent_and_a_hang_up_comes_last(serve: Serve) -> None:
    events: Event = {"hangs_up": HANG_UP, "shows": DATA, "says": GOODBYE}
    events["ends"] = {"type": "response.end"}
    one = Own(given=[returns(name, event) for name, event in events.items()])
    calls = [call(name) for name in events]
    caller = await serve(one, [[calls], ["Bye."], ["Bye.", calls[:1]]])
    frames = await caller.frames(caller.event("Show me!"))
    sent = [one for one in frames if "state" not in one.get("content", "")]
    assert sent == [DATA, GOODBYE, {**GOODBYE, "content": "Bye."}, HANG_UP]
    states = [one["content"]["state"] for one in frames if one not in sent]
    assert states == ["running"] * 4 + ["done"] * 4
    assert caller.gemini.results() == [{"output": one} for one in events.values()]
    frames = await caller.frames(caller.event("bye"))
    assert (words(frames).strip(), frames[-1]) == ("Bye.", HANG_UP)
    assert len(caller.gemini.asked) == 3


@cases(
    ([[[HAM]], [WAIT], [WAIT]], f"{Agent.filler} {SURE}", 4),
    ([["Let me see.", WAIT]], f"Let me see. {SURE}", 2),
    ([["I order it.", [HAM]], []], "I order it.", 2),
    ([[[HAM]], [], []], APOLOGY, 3),
    ([[[call("shows")]], []], "", 2),
    ([[[HAM]]] * 5, SURE, 6),
    ([[[HAM]], [BLOCKED]], APOLOGY, 2),
)
async def test_a_filler_is_spoken_once_and_words_in_five_rounds(
    serve: Serve, scripts: list[list[Step]], said: str, asked: int
) -> None:
    async def wait() -> None:
        await asyncio.sleep(0.3)

    one = Own(given=[wait, Kitchen().order, returns("shows", DATA)])
    caller = await serve(one, scripts, FILLER_AFTER=0.1)
    assert (await caller.say("hello")).strip() == said
    may_call = ["tools" in one for one in caller.gemini.asked]
    assert may_call == [True, True, True, True, True, False][:asked]
    await caller.say("And now?")
    assert (caller.gemini.shown() == ["And now?"]) == ([BLOCKED] in scripts)


# ---- Web pages -----------------------------------------------------------------------

ASKED = {"agent_id": "a"}
HERE = Settings.allowed_origins
THERE = "https://App.example.com/, https://*.shop.example"


@cases(
    (HERE, "http://localhost:5173", True),
    (HERE, "http://localhost", True),
    (HERE, "https://localhost.evil.example", False),
    (HERE, "null", False),
    (THERE, "https://app.example.com", True),
    (THERE, "https://leeds.shop.example", True),
    (THERE, "http://app.example.com", False),
    (THERE, "https://app.example.com.evil.example", False),
    (THERE, f"http://{'a' * 99}", False),
)
async def test_pages_of_the_allowed_origins_get_a_session(
    serve: Serve, allowed: str, origin: str, gets_it: bool
) -> None:
    caller = await serve(Agent(replace(SETTINGS, allowed_origins=allowed)))
    # That a page comes from the host that it asks proves nothing.
    headers = {"Origin": origin, "Host": origin.partition("//")[2] or "a"}
    headers["Access-Control-Request-Headers"] = wanted = "content-type,traceparent"
    response = await caller.answer(ASKED, "/api/authorize", headers)
    url = caller.url + "/api/authorize"
    async with caller.http.options(url, headers=headers) as preflight:
        assert preflight.status == response.status == (200 if gets_it else 403)
    names = ["Access-Control-Allow-Origin", "Vary", "Access-Control-Allow-Headers"]
    told = [origin, "Origin", wanted] if gets_it else [None] * 3
    for one in (preflight, response):
        assert [one.headers.get(name) for name in names] == told
    assert caller.gemini.sessions == [ASKED] * gets_it
    assert gets_it or f"{origin[:80]!r} is not in ALLOWED_ORIGINS" in caller.log()[0]


FOUR = {**ASKED, "conversation_id": "c", "metadata": {"b": 1}, "sdk_version": "2"}
MORE = {"config": {"x": 1}, "custom_headers": {}, "custom_metadata": {"a": 1}}
PAGE = json.dumps(ASKED).encode()
DEEP = b'{"agent_id": "a", "metadata": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"


@cases(
    ({**FOUR, **MORE, "session_id": None}, 200, FOUR),
    *(({**FOUR, it: 5}, 400, f"{it} is missing or not a text") for it in [*FOUR][:2]),
    ({"pipeline_id": "a", "session_id": "c"}, 200, ASKED | {"conversation_id": "c"}),
    ({"agent_id": "a", "session_id": "", "metadata": None}, 200, ASKED),
    (b'{"agent_id": "a", "conversation+AF8-id": "c"}', 200, ASKED),
    ({"agent_id": "b"}, 403, "agent_id is not LAYERCODE_AGENT_ID"),
    (DEEP, 400, OBJECT),
    (PAGE.ljust(2**16), 200, ASKED),
    (PAGE.ljust(2**16 + 1), 413, HTTPStatus(413).phrase),
)
async def test_of_a_page_layercode_is_told_four_fields(
    serve: Serve, page: Any, status: int, sent: Any
) -> None:
    caller = await serve(Agent(replace(SETTINGS, layercode_agent_id="a")))
    headers = {"Content-Type": "application/json; charset=utf-7"}
    told = await caller.status(page, "/authorize", headers)
    assert told == (status, "OK" if status == 200 else sent)
    assert caller.gemini.sessions == [sent] * (status == 200)


class Doorkeeper(Agent):
    async def admit(self, request: web.Request, session: Event) -> None:
        if "moved" in request.query:
            raise web.HTTPFound("/new")
        if request.headers.get("Authorization") != "Bearer ana":
            how = {"WWW-Authenticate": "Bearer"}
            raise web.HTTPUnauthorized(reason="log in first", headers=how)
        if "conversation_id" in session:
            raise web.HTTPForbidden(reason="no old conversations")
        session["custom_metadata"] = {"name": "Ana"}


async def test_admit_refuses_in_its_own_way_or_adds_what_it_likes(serve: Serve) -> None:
    caller = await serve(Doorkeeper(SETTINGS))
    page = {"Origin": "http://localhost"}
    refused = await caller.answer(ASKED, "/authorize", page)
    assert (refused.status, refused.reason) == (401, "log in first")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert "Access-Control-Allow-Origin" in refused.headers
    moved = await caller.answer(ASKED, "/authorize?moved", page)
    assert (moved.status, moved.headers["Location"]) == (302, "/new")
    ana = {"Authorization": "Bearer ana"}
    for name in ("conversation_id", "session_id"):
        told = await caller.status({**ASKED, name: "c"}, "/authorize", ana)
        assert told == (403, "no old conversations")
    assert (await caller.status({**ASKED, **MORE}, "/authorize", ana))[0] == 200
    assert caller.gemini.sessions == [{**ASKED, "custom_metadata": {"name": "Ana"}}]


@cases(web.HTTPForbidden(), {}, 1)
async def test_what_admit_returns_refuses(serve: Serve, returned: Any) -> None:
    caller = await serve(Own(returned))
    assert (await caller.status(ASKED, "/authorize"))[0] == 403
    assert not caller.gemini.sessions


async def test_an_error_when_the_page_is_gone_is_told(serve: Serve) -> None:
    caller = await serve(one := Own(waits_and_fails))
    await caller.drop(until(lambda: one.events), ASKED, "/authorize")
    await until(caller.log)
    assert "POST '/authorize' failed: KeyError at test_agent.py:" in caller.log()[0]


# ---- The terminal --------------------------------------------------------------------

CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@cases(CTRL_C, CTRL_D)
async def test_ctrl_c_interrupts_a_chat(serve: Serve, run: Run, bye: bytes) -> None:
    url = (await serve(one := Own("Well."))).url + "/agent"
    chat = await run("chat", url, pty=PTY, LAYERCODE_WEBHOOK_SECRET=SECRET)
    assert chat.stdin and "Ctrl-C" in await printed(chat, "Well.\r\n> ")
    one.pieces = ("Once ", "upon ", DATA, forever)
    chat.stdin.write(b"A story!\r")
    await printed(chat, '[{"size": 9}]')
    chat.stdin.write(CTRL_C)
    await printed(chat, "\r\n> ")
    one.pieces = ("Well.",)
    chat.stdin.write(b"Stop!\r")
    await printed(chat, "Well.\r\n> ")
    # Python may print the prompt a moment before it takes Ctrl-C there.
    while chat.returncode is None:
        chat.stdin.write(bye)
        await asyncio.wait([asyncio.ensure_future(chat.wait())], timeout=0.5)
    assert await end_of(chat) == (0, "")
    _, story, stop = one.events
    context = {**stop["interruption_context"]}
    assert "interruption_context" not in story
    assert report("Once upon ", story["turn_id"]) == {"interruption_context": context}
    assert (story["text"], one.history[1].heard) == ("A story!", "Once upon ")


PIZZA = """
from agent import Agent, main

class Pizza(Agent):
    persona = "You take orders for Luigi's Pizza in Leeds."
    async def greet(self, event, history):
        yield {"type": "response.data", "content": {"size": 9}}
        yield "Hi \\x1b[31m" + event["custom_metadata"]["name"] + " \\U0001f355\\n"

    async def reply(self, event, history):
        if event["text"] == "Fail!":
            raise KeyError("a message of " + event["custom_metadata"]["name"])
        async for piece in super().reply(event, history):
            yield piece
        yield {"type": "response.hangup"}

main(Pizza)
"""


async def test_a_chat_shows_what_an_agent_sends_and_adds_to_webhooks(run: Run) -> None:
    ada = '{"custom_metadata": {"name": "Ada"}, "conversation_id": "c"}'
    odd = {"PYTHONIOENCODING": "cp1252", "http_proxy": "http://127.0.0.1:1"}
    chat = await run("chat", "--event", ada, code=PIZZA, **odd)
    said, errors = await chat.communicate(b"Fail!\nBye\nnever\n")
    shown = said.decode("cp1252").splitlines()
    assert shown[2:4] == ['[{"size": 9}]', "Hi \x1b[31mAda ?"]
    assert f"> {APOLOGY}" in shown and shown[-1] == "(the agent hung up)"
    assert "stand-in. You said 'Bye'. Set GOOGLE" in shown[-2]
    assert b"KeyError: 'a message of Ada'" in errors and b"='c' turn='" in errors
    assert (chat.returncode, b" spoken " in errors) == (0, False)


# ---- The command line ----------------------------------------------------------------


@cases(
    (["chat", ""], 2, "the URL is empty"),
    (["chat", "nonsense"], 1, "nonsense: unknown url type"),
    (["chat", "{}/webhook"], 1, "404"),
    (["chat", "{}/short"], 1, "no response.end"),
    (["chat", "{}/rubbish"], 1, "{}/rubbish: "),
    (["chat", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1: "),
    (["chat", "--event", "[1]"], 2, "JSON object"),
    (["PORT=abc"], 1, "agent.py: PORT=abc is not a number"),
    (["HOST=nope.invalid"], 1, "HOST=nope.invalid PORT=3000 cannot be served: "),
    (["PORT=99999"], 1, "PORT=99999 cannot be served: "),
    (["PORT={port}"], 1, "PORT={port} cannot be served: "),
)
async def test_a_start_that_cannot_be_ends_with_one_line(
    run: Run, aiohttp_server: AiohttpServer, words: list[str], status: int, told: str
) -> None:
    async def answer(request: web.Request) -> web.Response:
        text = "data: {]\n\n" if request.path == "/rubbish" else ""
        return web.Response(text=text, content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/{name:short|rubbish}", answer)
    url = url_of(await aiohttp_server(app))
    filled = "\n".join([told, *words]).replace("{}", url)
    told, *asked = filled.replace("{port}", url.rpartition(":")[2]).split("\n")
    settings = dict(one.split("=") for one in asked if "=" in one)
    process = await run(*[one for one in asked if "=" not in one], **settings)
    ended, errors = await end_of(process)
    *usage, last = errors.splitlines()
    assert (ended, told in last, bool(usage)) == (status, True, status == 2)


@cases(*product([signal.SIGTERM, signal.SIGINT], [1, 2]))
async def test_an_agent_of_one_s_own_is_served_interrupted_and_stopped(
    caller: Caller, run: Run, unused_tcp_port: int, how: signal.Signals, times: int
) -> None:
    settings = {"GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY}
    settings["LOG_LEVEL"] = "info" if how == signal.SIGINT else "warning"
    settings |= {"LAYERCODE_WEBHOOK_SECRET": SECRET, "PORT": str(unused_tcp_port)}
    process = await run(code=PIZZA, **settings)
    await printed(process, "Next: ")
    caller.url = f"http://127.0.0.1:{unused_tcp_port}"
    gemini = caller.gemini
    gemini.scripts = [[forever], ["Once upon ", gate := Gate(), "a time."]]
    await caller.drop(until(lambda: gemini.asked), caller.event("A salami, please."))
    await gemini.until(open=0)
    assert "Leeds" in gemini.asked[0]["systemInstruction"]["parts"][0]["text"]
    async with caller.post(caller.event("A story!")) as response:
        await caller.hear(response, "Once upon ")
        process.send_signal(how)
        await process.stderr.readuntil(b"; once more stops at once.")
        with pytest.raises(aiohttp.ClientConnectorError):
            await caller.another().say()
        if times == 2:
            process.send_signal(how)
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        else:
            gate.open()
            assert "a time." in await response.text()
    status, errors = await end_of(process)
    assert (status, "Traceback" in errors) == (0, False)
    outcome = "spoken" if times == 1 else "interrupted"
    told = re.search(f" INFO conversation='.*' turn='.*' {outcome} first_word=", errors)
    assert bool(told) == (how == signal.SIGINT)


async def test_it_serves_this_machine_only_and_says_what_is_not_configured(
    run: Run, unused_tcp_port: int
) -> None:
    process = await run(PORT=str(unused_tcp_port), LAYERCODE_API_KEY=API_KEY)
    said = await printed(process, f"http://localhost:{unused_tcp_port}\n")
    assert said.startswith(f"Up: http://127.0.0.1:{unused_tcp_port}\n")
    assert API_KEY not in said and "may start calls: override admit()" in said
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.2", unused_tcp_port))


# ---- Any history ---------------------------------------------------------------------


@dataclass
class Said:
    """What was said in a turn, what tools have done, and what the caller heard."""

    event: Event
    spoken: str
    finished: bool = True
    heard: str | None = None
    done: Sequence[str] = ()

    def shown(self) -> list[str]:
        """How Gemini should be shown the turn."""
        answer = self.spoken if self.heard is None else self.heard
        if not self.finished or self.heard is not None:
            answer = f"{answer} [interrupted]".lstrip() if answer or self.done else ""
        user = self.event["text"]
        if not user and (answer or self.done):
            user = "(The caller says nothing.)"
        return [text for text in (user, *self.done, answer) if text]


class Play:
    """One conversation in which anything may happen, beside a plain model of it."""

    def __init__(self, caller: Caller, seed: int) -> None:
        self.caller = caller
        self.dice = random.Random(seed)
        self.turns: list[Said] = []

    async def run(self) -> list[str]:
        """Plays it; gives what Gemini should be shown at its end."""
        async with AsyncExitStack() as self.streams:
            for _ in range(self.dice.randrange(1, 7)):
                steps = [self.wordless, self.message, self.cut_off, self.cut_off]
                await self.dice.choice([*steps, *[self.again] * bool(self.turns)])()
            await self.caller.say("And now?")
        return [*(text for turn in self.turns for text in turn.shown()), "And now?"]

    def event(self, text: str | None) -> Event:
        """A webhook of a new turn, which may report what was heard of the last."""
        more = {}
        if self.turns and self.dice.random() < 0.4:
            last = self.turns[-1]
            last.heard = last.spoken[: self.dice.randrange(len(last.spoken) + 1)]
            more = report(last.heard, self.dice.choice([None, last.event["turn_id"]]))
        return self.caller.event(text, session_id=str(self.dice.random()), **more)

    async def wordless(self) -> None:
        event = self.event(self.dice.choice([None, ""]))
        self.turns.append(Said(event, await self.caller.send(event)))

    async def message(self) -> None:
        calls, fails = self.dice.random() < 0.5, self.dice.random() < 0.3
        script = [f"{self.dice.random()} ", "more ", *[CUT] * fails]
        self.caller.gemini.scripts = [*[[[call("shows")]]] * calls, script]
        event = self.event(f"words {self.dice.random()}")
        done = ["calls shows", f"gives {json.dumps({'output': DATA})}"] * calls
        self.turns.append(Said(event, await self.caller.send(event), done=done))
        assert self.turns[-1].spoken == f"{script[0]}more " + f" {APOLOGY}" * fails

    async def cut_off(self) -> None:
        script = self.dice.choice([[], [f"{self.dice.random()} ", "more "]])
        self.caller.gemini.scripts = [[*script, gate := Gate()]]
        event = self.event(f"words {self.dice.random()}")
        stream = await self.streams.enter_async_context(self.caller.post(event))
        await gate.reached.wait()
        spoken = await self.caller.hear(stream, "more " if script else "")
        self.turns.append(Said(event, spoken, finished=False))
        # Or later, when the next webhook is on its way.
        if self.dice.random() < 0.5:
            stream.close()

    async def again(self) -> None:
        """An older turn may cut off the last one, but changes nothing of it."""
        turn = self.dice.choice(self.turns[-2:])
        spoken = await self.caller.send(turn.event)
        if not turn.finished and turn is self.turns[-1]:
            turn.spoken, turn.finished = spoken, True
        assert spoken == turn.spoken


@cases(Histories, Store)
async def test_gemini_is_shown_what_was_said_and_heard(serve: Serve, kind: Any) -> None:
    tools = [returns("shows", DATA)]
    caller = await serve(Own(histories=kind(), given=tools))
    seed = int(os.environ.get("SEED", time.time()))
    for number in range(seed, seed + 40):
        wanted = await Play(caller.another(), number).run()
        assert caller.gemini.shown() == wanted, f"SEED={number}"
        await caller.gemini.until(open=0)
    # But for connections, and for this test, nothing goes on.
    tasks = asyncio.all_tasks
    await until(lambda: str(tasks()).count("RequestHandler.start") >= len(tasks()) - 1)
