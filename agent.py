"""A backend for Layercode voice agents: signed webhooks in, speech out, in one file.

    caller -- audio --> Layercode -- POST /agent, signed --> agent.py --> Gemini
    caller <- audio --- Layercode <- Server-Sent Events ---- agent.py <-- text
    browser -- POST /authorize --> agent.py -- with API key --> Layercode

    python agent.py             serve Layercode and web pages
    python agent.py chat        talk to this agent; no API key needed
    python agent.py chat URL    talk to the agent behind a webhook's URL

An agent of your own is a file beside this one:

    from agent import Agent, main

    class Pizza(Agent):
        persona = "You take orders for Luigi's Pizza in Leeds."

    if __name__ == "__main__":
        main(Pizza)
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Ctrl-C while it imports: no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import gc
import hashlib
import hmac
import json
import logging
import os
import re
import socket
import ssl
import sys
import sysconfig
import threading
import time
import traceback
import urllib.request
from collections.abc import AsyncGenerator as Stream
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener
from weakref import WeakValueDictionary

import aiohttp
import certifi
from aiohttp import web
from aiohttp.typedefs import Handler

if TYPE_CHECKING:
    from google.genai import errors, models, types
    from google.genai.types import GenerateContentConfigDict as Config
    from google.genai.types import GenerateContentResponse as Chunk

    Chunks = Stream[Chunk, None]

log = logging.getLogger("agent")
# What strangers can cause.
refusals = logging.getLogger("agent.refusals")

T = TypeVar("T")
# A JSON object: a webhook, a frame, a content.
Event = dict[str, Any]
# A str is spoken, an Event is sent as it is.
Speech = Stream[str | Event, None]
# With types and a docstring, sync or async.
Tool = Callable[..., Any]
# Forgets a task that is over.
Running = WeakValueDictionary[Any, asyncio.Task[Any]]

# ---- Limits: in seconds, but for those that begin with MAX

# Less than Agent.patience.
TOOL_PATIENCE = 5.0
# Until Agent.filler is spoken.
FILLER_AFTER = 1.2
# For more after a finish reason.
STREAM_END_PATIENCE = 0.1
# For a store that a call does not wait for.
RECORD_PATIENCE = 2.0
NOTICE_PATIENCE = 30.0
BODY_PATIENCE = 5.0
AUTHORIZE_PATIENCE = 10.0
# For calls at a stop. To cut off the rest takes
# 3 more: `docker stop` waits 10.
GRACE = 5.0
# For a signature, as in Layercode's Node SDK.
TOLERANCE = 300
# Rounds of tools in an answer.
MAX_ROUNDS = 5
# Bytes of a webhook, with its transcript.
MAX_BODY = 2**20
# Bytes from a page: to parse them blocks all.
MAX_PAGE = 2**16
# Turns of a conversation, for the model, too.
MAX_TURNS = 50
# Conversations in memory.
MAX_CONVERSATIONS = 10_000

# web.run_app(your_app, **RUNNER_OPTIONS)
RUNNER_OPTIONS: dict[str, Any] = {
    # Layercode hangs up when a caller interrupts.
    "handler_cancellation": True,
    # A stranger's 1 MB can inflate to 1 GB.
    "auto_decompress": False,
    # Longer than nginx's 60, cloudflared's 90.
    "keepalive_timeout": 120,
    # For the rest of a body that was refused.
    "lingering_time": 2,
    # After Agent.stop(); aiohttp waits it twice.
    "shutdown_timeout": 1,
    "access_log": None,
}


# ---- Settings
class SettingsError(ValueError):
    """A setting, or a URL to chat with, is wrong; the message names it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The variables of .env.example, each as a field of the same name.

    A subclass with more fields has more settings, each a text or a number:
    give what its load() returns to Agent.__init__().
    """

    layercode_webhook_secret: str = dataclasses.field(default="", repr=False)
    google_generative_ai_api_key: str = dataclasses.field(default="", repr=False)
    layercode_api_key: str = dataclasses.field(default="", repr=False)
    gemini_model: str = "gemini-3.5-flash-lite"
    gemini_thinking: str = ""
    layercode_agent_id: str = ""
    allowed_origins: str = "*://localhost,*://localhost:*,*://127.0.0.1:*"
    host: str = "127.0.0.1"
    port: int = 3000
    layercode_api_url: str = "https://api.layercode.com"
    log_level: str = "INFO"

    @classmethod
    def load(cls) -> Self:
        """The environment, else .env beside this file. Raises SettingsError."""
        given = read_dotenv(Path(__file__).with_name(".env")) | dict(os.environ)
        values = dataclasses.asdict(cls())
        for name, default in values.items():
            # A variable that is empty has its default.
            text = given.get(name.upper(), "").strip() or default
            try:
                values[name] = type(default)(text)
            except ValueError:
                raise SettingsError(f"{name.upper()}={text} is not a number") from None
        return cls(**values)


def read_dotenv(file: Path) -> dict[str, str]:
    """The lines of NAME=value in a .env file, if there is one. Raises SettingsError."""
    try:
        text = file.read_text("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read as UTF-8: {error}") from None
    # Without quotes, a # begins a comment after a space.
    line = r"""(?m)^\s*(?:export )?(\w+) *=(?: *(["'])(.*?)\2|(.*?)(?:\s#.*)?$)"""
    found = re.findall(line, text)
    return {name: quoted or value for name, _, quoted, value in found}


# ---- The agent: make it yours
class Agent:
    """A voice agent: override its words and its methods in a subclass.

    While it serves, `http` is an aiohttp session for your own requests, and
    `gemini` has google-genai's methods, if there is a key.
    """

    persona = "You're a friendly voice assistant on a call."
    voice_rules = (
        "Your words are read aloud: write plain spoken sentences, no Markdown, lists, "
        "emoji or symbols; spell out numbers, dates and units; use contractions; "
        "always punctuate. One or two sentences will do unless asked for more. "
        "[interrupted] marks where the caller stopped hearing you; never write it."
    )
    greeting = "Hi there! How can I help you today?"
    # For callers who have spoken before.
    welcome_back = "Welcome back! Where were we?"
    # For what is not understood, or fails.
    apology = "Sorry, I didn't get that. Could you say it again?"
    # For slow tools, if nothing has been said.
    filler = "One moment, please."
    # Seconds of nothing until the apology. Here
    # and next, float("inf") means never.
    patience = 8.0
    # Seconds until the model is asked again.
    ask_again_after = 2.5

    http: aiohttp.ClientSession
    gemini: models.AsyncModels | None = None

    def __init__(
        self, settings: Settings | None = None, histories: Histories | None = None
    ) -> None:
        self.settings = settings or Settings.load()
        self.histories = Histories() if histories is None else histories
        # asyncio itself does not hold its tasks.
        self.tasks: set[asyncio.Task[Any]] = set()
        # By conversation, its latest reply.
        self.replies = Running()
        # By conversation and turn, its tools.
        self.tools_running = Running()

    async def greet(self, event: Event, history: list[Turn]) -> Speech:
        """Yields what is said when a call begins; if nothing, the caller speaks first.

        `event` is the webhook, with your custom_metadata, the page's metadata,
        or a from_phone_number. `history` ends with this turn, without words.
        """
        has_spoken = any(turn.user for turn in history)
        yield self.welcome_back if has_spoken else self.greeting

    def reply(self, event: Event, history: list[Turn]) -> Speech:
        """The answer to the last turn; yours is an async def that yields.

        A str is spoken at once; a dict is an event for Layercode, such as
        {"type": "response.data", "content": ...} for the page. When the caller
        interrupts, it is cancelled: let CancelledError pass. If it raises
        anything else, or yields nothing, or nothing for `patience` seconds,
        the caller hears the apology.
        """
        if self.gemini is None:
            return stand_in(history)
        return Answer(self, event, history).speak()

    def tools(self, event: Event) -> Sequence[Tool]:
        """The functions that Gemini may call while it answers a webhook.

        It is told their names, docstrings and types, and what they return. A
        sync one runs in a thread, an async one must not block; they have
        TOOL_PATIENCE seconds, and go on when the caller interrupts. A dict
        {"type": "response.data", "content": ...} goes to the page as well, and
        {"type": "response.hangup"} ends the call after the last word; but not
        after an interruption.
        """
        return []

    async def notice(self, event: Event) -> Event | None:
        """Takes a webhook that asks for no speech, within NOTICE_PATIENCE seconds.

        That is `data`, `session.update`, `session.end`, or a type not known
        yet; it may come twice. Returns the answer: one of type response.data
        goes to the page.
        """
        return None

    async def admit(self, request: web.Request, session: Event) -> object:
        """Decides who may call: raise web.HTTPForbidden(reason="...") to refuse.

        `session` is what Layercode will be told: the page's agent_id,
        conversation_id, metadata and sdk_version. Add custom_metadata, which
        comes with every webhook of the call, custom_headers, or config:
        visitors cannot. To return anything but None refuses as well.
        """
        return None

    def ask(self, history: list[Turn], config: Config | None = None) -> Chunks:
        """Gemini's answer to the last turn of the history, as google-genai's chunks.

        `config` goes before the defaults here, but for http_options; its
        functions are never called: see tools(). Use contextlib.aclosing(), so
        that a hang-up ends it. Raises ModelError, aiohttp's errors, and,
        without a key, AssertionError.
        """
        return consult(self, history, config or {}, False)

    def make_app(self) -> web.Application:
        """The aiohttp application, to run with RUNNER_OPTIONS, or to mount."""
        server = Server(self)
        app = web.Application(middlewares=[server.guard], client_max_size=MAX_BODY)
        app.router.add_get("/", server.show)
        for prefix in ("", "/api"):
            app.router.add_post(f"{prefix}/agent", server.receive)
            app.router.add_post(f"{prefix}/authorize", server.authorize)
            app.router.add_options(f"{prefix}/authorize", server.show)
        app.on_response_prepare.append(server.allow)
        app.cleanup_ctx.append(self.connected)
        app.on_shutdown.append(self.stop)
        return app

    async def connected(self, app: web.Application) -> AsyncIterator[None]:
        """Opens `http` and `gemini`, and closes them at the end."""
        trusted = ssl.create_default_context()
        # Python on a Mac may know none.
        trusted.load_verify_locations(certifi.where())
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300, ssl=trusted),
            # No visitor gets another's cookies.
            cookie_jar=aiohttp.DummyCookieJar(),
            # Left on, it looks into ~/.netrc each time.
            trust_env=bool(urllib.request.getproxies()),
        ) as self.http:
            if self.settings.google_generative_ai_api_key:
                self.gemini = open_gemini(self)
                self.start(warm_up(self))
            yield

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Starts a task, with the log's name for it, or that of what starts it."""
        task = asyncio.create_task(work, name=name or name_of_task())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def stop(self, app: web.Application) -> None:
        """Lets what goes on end by itself for GRACE seconds, then cuts it off."""
        calls = sum(not reply.done() for reply in self.replies.values())
        if calls:
            log.warning("Finishing %d calls; once more stops at once.", calls)
        # Cut off, they record what they have spoken.
        for patience in (GRACE, 1):
            if self.tasks:
                await asyncio.wait(self.tasks, timeout=patience)
                cut_off(*self.tasks)


def cut_off(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks, once: a second time would disturb one that is ending."""
    for task in tasks:
        if not task.cancelling():
            task.cancel()


# ---- History
@dataclasses.dataclass(slots=True)
class Turn:
    """What the caller said, and what became of the answer."""

    # Empty for a greeting.
    user: str = ""
    # What was written to Layercode.
    spoken: str = ""
    # False if it was cut off, or goes on.
    finished: bool = False
    # Of what was interrupted, if it is known.
    heard: str | None = None
    # Tools' calls and results, for the model.
    done: Sequence[Event] = ()

    def answer(self) -> str:
        """The answer for the model: what the caller heard, as far as is known."""
        words = self.spoken if self.heard is None else self.heard
        if self.finished and self.heard is None:
            return words.lstrip()
        return f"{words} [interrupted]".lstrip() if words or self.done else ""


class Histories:
    """What was said in each conversation, in memory.

    A store of your own overrides both methods. If they fail before an answer,
    the caller hears the apology; later, only the log tells.
    """

    def __init__(self) -> None:
        # The least recently used comes first.
        self._conversations: dict[str, dict[str, Turn]] = {}

    async def load(self, conversation: str) -> dict[str, Turn]:
        """The turns by turn_id, in the order in which each was first recorded."""
        return dict(self._conversations.get(conversation, {}))

    async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
        """Sets fields of a Turn, which is a new one if its turn_id is new.

        `user` is recorded before the model is asked, `done` before and after
        tools, `spoken` and `finished` when the answer is over or cut off,
        `heard` or `finished` when a later webhook reports an interruption.
        """
        turns = self._conversations.pop(conversation, {})
        turns[turn_id] = dataclasses.replace(turns.get(turn_id, Turn()), **facts)
        self._conversations[conversation] = turns
        if len(turns) > MAX_TURNS:
            del turns[next(iter(turns))]
        if len(self._conversations) > MAX_CONVERSATIONS:
            del self._conversations[next(iter(self._conversations))]


def contents(history: list[Turn]) -> list[Event]:
    """What Gemini is sent of a history, whose last turn is the one to answer.

    The caller and the model take turns, and the caller comes first and last.
    """
    merged: list[Event] = []
    for turn in history:
        parts = [{"text": turn.user or "(The caller says nothing.)"}]
        # The turn before may have no answer.
        if merged and merged[-1]["role"] == "user":
            parts = merged.pop()["parts"] + parts
        merged += [{"role": "user", "parts": parts}, *turn.done]
        answer = "" if turn is history[-1] else turn.answer()
        if answer:
            merged.append({"role": "model", "parts": [{"text": answer}]})
    return merged


# ---- What is read aloud

# What would be read aloud, or not understood: Markdown's marks, and the mark
# of an interruption, which models copy. Arithmetic stays: 2*3, 5 * 3, 2**3.
MARKS = re.compile(
    # What begins a mark, for speed; a heading, a quotation, a list.
    r"(?!\A)(?=[-+*_#>`!\[ \t])(?:(?<=\n)[ \t]*(?:#{1,6} |> ?|[-*+] )"
    # [interrupted]; a link, whose text stays.
    r"|\[(?i:interrupted)\]|!?\[(?P<text>[^\[\]\n]*)\]\([^()\s]*\)"
    # Code, bold, emphasis.
    r"|`+|(?<!\d)\*{2,}|\*{2,}(?!\d)|__+"
    r"|(?<![\w*])[*_](?![\s*_])|(?<![\s*_])[*_](?![\w*]))"
)
# An end that may be a mark: what follows tells.
OPEN_END = re.compile(
    r"(?:(?<=\n)[ \t]*(?:#{1,6}|>|[-*+])?|[*_]+"
    r"|\[[^\[\]\n]{0,200}(?:\](?:\([^()\s]{0,200})?)?)\Z"
)


# ---- The webhook, and web pages
class Server:
    """Answers webhooks and web pages for an agent, and turns strangers away."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns strangers away; logs refusals, and errors without their messages."""
        asked = f"{request.method} {request.path[:60]!r}"
        origin = request.headers.get("Origin", "")
        try:
            # Chunks of one byte would keep all waiting.
            if "Transfer-Encoding" in request.headers:
                raise web.HTTPLengthRequired(reason="a Content-Length is needed")
            if origin and not self.is_allowed(origin):
                reason = f"{origin[:80]!a} is not in ALLOWED_ORIGINS: add it, if yours"
                raise web.HTTPForbidden(reason=reason)
            return await handler(request)
        except web.HTTPException as answer:
            if answer.status >= 400:
                refusals.warning("%s: %d %s", asked, answer.status, answer.reason)
            raise
        except (Exception, SystemExit) as error:
            log.error("%s failed: %s", asked, cause(error))
            raise web.HTTPInternalServerError(reason="see the agent's log") from None
        finally:
            if not request.content.is_eof():
                # The rest is not even parsed.
                request.protocol.close()

    def is_allowed(self, origin: str) -> bool:
        """Whether pages of an origin may start calls. A * in a setting is any text."""
        allowed = self.agent.settings.allowed_origins.lower().replace(",", " ").split()
        return any(fnmatch.fnmatchcase(origin, one.rstrip("/")) for one in allowed)

    async def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Lets pages of the allowed origins read a response, before it is sent."""
        origin = request.headers.get("Origin", "")
        if origin and self.is_allowed(origin):
            wanted = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = wanted
            response.headers["Vary"] = "Origin"

    async def show(self, request: web.Request) -> web.StreamResponse:
        """The page index.html beside this file, if there is one; else that it is up."""
        page = Path(__file__).with_name("index.html")
        if request.method != "OPTIONS" and page.is_file():
            return web.FileResponse(page)
        return web.Response(text="The agent is up.\n")

    async def receive(self, request: web.Request) -> web.StreamResponse:
        """Answers a webhook: with speech, or with what notice() gives."""
        secret = self.agent.settings.layercode_webhook_secret
        signature = request.headers.get("layercode-signature", "")
        # Strangers' bodies are not read.
        body = await read_body(request, MAX_BODY) if signed_at(signature) else b""
        if not verify(signature, body, secret):
            reason = "no right signature: check LAYERCODE_WEBHOOK_SECRET and the clock"
            raise web.HTTPUnauthorized(reason=reason)
        event = parse(body)
        # In old webhooks, it is the session.
        event["conversation_id"] = text_of(event, "conversation_id", "session_id")
        kind = text_of(event, "type")
        # Without a turn_id, it is a notice.
        is_start = kind == "session.start" and event.get("turn_id") is not None
        if not is_start and kind not in ("message", "welcome"):
            # Layercode may not wait for the answer.
            name = f"conversation={event['conversation_id']!r} {kind!r}"
            return await asyncio.shield(self.agent.start(self.notice(event), name))
        # Arrival decides: nothing waits before the reply is in agent.replies, so
        # each knows the one before it, whatever a store takes.
        task = Reply(self.agent, request, event).task
        try:
            return await asyncio.shield(task)
        finally:
            cut_off(task)

    async def notice(self, event: Event) -> web.Response:
        """The answer of the agent's notice(), or a 500 if that fails."""
        try:
            async with asyncio.timeout(NOTICE_PATIENCE):
                return web.json_response(await self.agent.notice(event) or {})
        except BaseException as error:
            log.error("%s failed in notice(): %s", name_of_task(), cause(error))
            return web.Response(status=500, reason="see the agent's log")

    async def authorize(self, request: web.Request) -> web.Response:
        """Gets a page its session: Layercode's answer, while the API key stays here."""
        page = parse(await read_body(request, MAX_PAGE))
        settings = self.agent.settings
        if not settings.layercode_api_key:
            raise web.HTTPInternalServerError(reason="LAYERCODE_API_KEY is not set")
        # Named one by one, because Layercode takes other fields, too: with a
        # config, a visitor could have it call a webhook and a model of their own.
        names = ("metadata", "sdk_version")
        session = {name: page[name] for name in names if page.get(name)}
        session["agent_id"] = text_of(page, "agent_id", "pipeline_id")
        if settings.layercode_agent_id not in ("", session["agent_id"]):
            raise web.HTTPForbidden(reason="agent_id is not LAYERCODE_AGENT_ID")
        if page.get("conversation_id") or page.get("session_id"):
            session["conversation_id"] = text_of(page, "conversation_id", "session_id")
        if await self.agent.admit(request, session) is not None:
            raise web.HTTPForbidden(reason="admit() has refused")
        return await self.ask_layercode(session)

    async def ask_layercode(self, session: Event) -> web.Response:
        """Layercode's answer to a request for a session, for the page."""
        post = self.agent.http.post
        api = self.agent.settings.layercode_api_url.rstrip("/")
        url = f"{api}/v1/agents/web/authorize_session"
        key = self.agent.settings.layercode_api_key
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = json.dumps(session)
        asking = post(url, data=data, headers=headers, allow_redirects=False)
        body = b""
        try:
            async with asyncio.timeout(AUTHORIZE_PATIENCE), asking as response:
                async for piece in response.content.iter_any():
                    body += piece
                    if len(body) > MAX_BODY:
                        raise aiohttp.ClientPayloadError
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"Layercode could not be reached: {type(error).__name__}"
            raise web.HTTPBadGateway(reason=reason) from None
        # It may quote the request, and so the key.
        body = body.replace(key.encode(), b"***")
        if 200 <= response.status < 300:
            return web.Response(body=body, content_type="application/json")
        # A reason is all that the browser SDK shows.
        told = re.sub(r"[^ -~]+", " ", body.decode(errors="replace"))[:200]
        reason = f"Layercode answered {response.status}: {told}"
        mistakes = {400: web.HTTPBadRequest, 402: web.HTTPPaymentRequired}
        raise mistakes.get(response.status, web.HTTPBadGateway)(reason=reason)


class Reply:
    """An answer on its way to Layercode.

    An interruption: the caller speaks, so Layercode drops the connection.
    aiohttp cancels the handler (handler_cancellation), which cuts off the
    reply's task. This closes reply() and Gemini's stream in it; tools that have
    begun go on. What was spoken is recorded as not finished. The next webhook
    tells how much was heard; that is recorded, and the model is shown those
    words and [interrupted]. If it comes before the dropped connection is
    noticed, its reply cuts this one off, and waits until it is recorded.
    """

    def __init__(self, agent: Agent, request: web.Request, event: Event) -> None:
        self.agent = agent
        self.request = request
        self.event = event
        self.key = (event["conversation_id"], text_of(event, "turn_id"))
        self.is_greeting = event["type"] != "message"
        # Ends the history that reply() gets.
        self.turn = Turn()
        # Without text, nothing was understood.
        if not self.is_greeting and event.get("text") not in ("", None):
            self.turn.user = text_of(event, "text").strip()
        # To record; if empty, nothing is.
        self.facts: Event = {"user": self.turn.user}
        # The second keeps nginx from holding it back.
        headers = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        headers["Cache-Control"] = "no-cache, no-transform"
        self.response = web.StreamResponse(headers=headers)
        # The last character, then what may be a mark.
        self.rest = "\n"
        # With no greeting, the caller begins.
        self.may_be_silent = self.is_greeting
        self.started = time.monotonic()
        # Of each piece of words, in milliseconds.
        self.times: list[float] = []
        self.earlier = agent.replies.get(self.key[0])
        name = f"conversation={self.key[0]!r} turn={self.key[1]!r}"
        self.task = agent.start(self.run(), name)
        agent.replies[self.key[0]] = self.task

    async def run(self) -> web.StreamResponse:
        """Speaks the answer, and records what became of it, whatever comes then."""
        outcome = "interrupted"
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            outcome = await self.speak()
        total = 1000 * (time.monotonic() - self.started)
        first = f"{self.times[0]:.0f}ms" if self.times else "none"
        figures = f"first_word={first} total={total:.0f}ms chunks={len(self.times)}"
        level = logging.WARNING if "failed" in outcome else logging.INFO
        log.log(level, "%s %s %s", name_of_task(), outcome, figures)
        # Not among agent.tasks, which a stop cuts off.
        recording = asyncio.create_task(self.record(), name=name_of_task())
        while not recording.done():
            # Layercode may hang up here, too.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([recording])
        return self.response

    async def record(self) -> None:
        """Records the answer, after the one before it."""
        if self.earlier is not None:
            # If begin() did not get to wait.
            await asyncio.wait([self.earlier], timeout=RECORD_PATIENCE)
        if "spoken" in self.facts:
            self.facts |= {"spoken": self.turn.spoken, "finished": self.turn.finished}
        await record(self.agent, self.key, self.facts)

    async def speak(self) -> str:
        """Writes the answer, or the apology, and response.end; returns what it was."""
        outcome = "spoken"
        patience = self.agent.patience
        wait = asyncio.timeout(patience)
        try:
            await self.response.prepare(self.request)
            # A slow store is like a silent model.
            async with wait, contextlib.aclosing(await self.begin()) as pieces:
                async for piece in pieces:
                    if self.task.cancelling():
                        raise asyncio.CancelledError
                    await self.say(piece)
                    wait.reschedule(asyncio.get_running_loop().time() + patience)
            if not self.times and not self.may_be_silent:
                raise ModelError("nothing was said")
        except BaseException as error:
            outcome = "interrupted"
            # Cut off, it says nothing more, whatever is raised.
            if not self.task.cancelling():
                why = f"TimeoutError: nothing came for {patience:g} s"
                outcome = f"failed: {why if wait.expired() else cause(error)}"
                if isinstance(error, BlockedError):
                    # Shown this turn, the model would be blocked again.
                    self.facts |= {"user": "", "heard": "", "done": []}
                await self.say((" " if self.turn.spoken else "") + self.agent.apology)
        await self.say({"type": "response.end"})
        self.turn.finished = not self.task.cancelling()
        return outcome

    async def begin(self) -> Speech:
        """Records what the webhook tells, and returns what is to be said.

        The caller's words come before the model is asked, so that none gets
        lost. A webhook may arrive twice: if its turn is finished, or a later
        one has begun, the same words are spoken again, and nothing is recorded.
        Otherwise it gets a new answer, once its tools are over.
        """
        if self.earlier is not None:
            cut_off(self.earlier)
            await asyncio.wait([self.earlier])
        tools = self.agent.tools_running.get(self.key)
        if tools is not None:
            await asyncio.wait([tools])
        conversation, turn_id = self.key
        turns = await self.agent.histories.load(conversation)
        has_later = turn_id in list(turns)[:-1]
        known = turns.pop(turn_id, self.turn)
        if known.finished or has_later:
            self.facts = {}
            self.may_be_silent = True
            return say_once(known.spoken)
        self.turn.done = known.done
        match self.event.get("interruption_context"):
            case {"previous_turn_interrupted": True, **report}:
                # Without an id, the latest.
                named = report.get("assistant_turn_id") or next(reversed(turns), "")
                heard = report.get("text_heard")
                # Heard in part, nobody knows how much.
                facts = {"finished": False} if heard is None else {"heard": heard}
                if named in list(turns):
                    turns[named] = dataclasses.replace(turns[named], **facts)
                    await self.agent.histories.record(conversation, named, **facts)
        await self.agent.histories.record(conversation, turn_id, **self.facts)
        self.facts |= {"spoken": "", "finished": False}
        said = [one for one in turns.values() if one.user or one.done or one.answer()]
        return self.speech([*said, self.turn][-MAX_TURNS:])

    def speech(self, history: list[Turn]) -> Speech:
        """What greet() or reply() makes. Raises LoggedError for what is no Speech."""
        if not self.is_greeting and not self.turn.user:
            return say_once(self.agent.apology)
        if self.is_greeting:
            # It connects while the caller listens.
            self.agent.start(warm_up(self.agent))
        method = self.agent.greet if self.is_greeting else self.agent.reply
        self.place = f"{type(self.agent).__name__}.{method.__name__}()"
        speech = method(self.event, history)
        if not isinstance(speech, Stream):
            raise LoggedError(f"{self.place} must be an async def that yields")
        return speech

    async def say(self, piece: str | Event) -> None:
        """Writes a piece of the answer. Raises LoggedError for what is none."""
        try:
            if isinstance(piece, str):
                piece = {"type": "response.tts", "content": piece}
            is_speech = piece["type"] == "response.tts"
            words = self.plain(piece["content"] if is_speech else "", not is_speech)
            events = [{"type": "response.tts", "content": words}] if words else []
            events += [] if is_speech else [piece]
            named = [{**event, "turn_id": self.key[1]} for event in events]
            frames = [json.dumps(event, allow_nan=False) for event in named]
        except Exception as error:
            what = f"yields a {type(piece).__name__}: it must be a str or an event"
            raise LoggedError(f"{self.place} {what} as JSON: {error}") from None
        if words.strip():
            self.times.append(1000 * (time.monotonic() - self.started))
        self.may_be_silent = self.may_be_silent or not is_speech
        text = "".join(f"data: {frame}\n\n" for frame in frames)
        await self.response.write(text.encode())
        self.turn.spoken += words

    def plain(self, words: str, is_end: bool) -> str:
        """What can be spoken now, without marks, of more words: at the end, all."""
        text = self.rest + words
        open_end = OPEN_END.search(text, 1)
        end = open_end.start() if open_end and not is_end else len(text)
        self.rest = text[end - 1 :]
        # The first one is spoken already.
        return MARKS.sub(r"\g<text>", text[:end])[1:]


async def say_once(words: str) -> Speech:
    """Yields the words."""
    yield words


async def record(agent: Agent, key: tuple[str, str], facts: Event) -> None:
    """Records facts of a turn, if there are any; only the log tells if that fails."""
    try:
        async with asyncio.timeout(RECORD_PATIENCE):
            if facts:
                await agent.histories.record(*key, **facts)
    except (Exception, SystemExit) as error:
        log.error("%s is not recorded: %s", name_of_task(), cause(error))


async def read_body(request: web.Request, limit: int) -> bytes:
    """A request's body as it was sent. Raises HTTPException."""
    if (request.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(limit)
    try:
        async with asyncio.timeout(BODY_PATIENCE):
            return await request.read()
    except (TimeoutError, web.RequestPayloadError):
        raise web.HTTPRequestTimeout(reason="the body came too slowly") from None


def parse(body: bytes) -> Event:
    """The JSON object in a body. Raises HTTPBadRequest if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(body)
        # NaN, and what is nested too deeply, could not be passed on.
        json.dumps(event, allow_nan=False)
        if isinstance(event, dict):
            return event
    raise web.HTTPBadRequest(reason="the body is not a JSON object")


def text_of(event: Event, name: str, older_name: str = "") -> str:
    """The text under a name, or an older one. Raises HTTPBadRequest."""
    value = event.get(name) or event.get(older_name)
    if not isinstance(value, str) or not value:
        raise web.HTTPBadRequest(reason=f"{name} is missing or not a text")
    return value


# ---- The signature
def sign(body: bytes, secret: str, timestamp: str = "") -> str:
    """The layercode-signature header for a body: "t=<Unix seconds>,v1=<hex>".

    The hex is the HMAC-SHA256 of "<t>.<body>". The timestamp defaults to now.
    """
    timestamp = timestamp or str(int(time.time()))
    signed = timestamp.encode() + b"." + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


def verify(header: str, body: bytes, secret: str) -> bool:
    """Whether the header signs the body, and did so within TOLERANCE seconds.

    The body is the bytes that came: the same JSON, written again, may have
    others. While a secret is rotated, one of several v1 must be right.
    """
    timestamp = signed_at(header)
    if not (timestamp and secret):
        return False
    # As bytes: compare_digest() takes no "\xe9".
    right = sign(body, secret, timestamp).partition(",")[2].encode()
    given = header.encode(errors="replace").split(b",")
    return any(hmac.compare_digest(right, one) for one in given)


def signed_at(header: str) -> str:
    """The t of a signature, as it stands there; empty if it is not about now."""
    found = re.search(r"(?:^|,)t=([0-9]{1,15})(?:,|$)", header)
    if found is None or abs(time.time() - int(found[1])) > TOLERANCE:
        return ""
    return found[1]


# ---- Asking Gemini
class LoggedError(Exception):
    """What went wrong, in words that hold no secret and nothing that a caller said."""


class ModelError(LoggedError):
    """The model did not answer as it should."""


class FinalError(ModelError):
    """The model refuses to answer: asking again is no use."""


class BlockedError(FinalError):
    """The model refuses the prompt, and would whenever it is shown this turn."""


async def ask_twice(
    ask: Callable[[], Stream[T, None]],
    has_words: Callable[[T], bool],
    ask_again_after: float,
) -> Stream[T, None]:
    """Yields what ask() yields, and calls ask() once more if no word has come.

    That is after ask_again_after seconds without a piece that has_words(), or
    at once if the first request fails. The two race, so that a slow model is
    not made slower, and the first to speak wins. If both fail, raises the
    error of the second.
    """

    async def begin() -> tuple[list[T], Stream[T, None]]:
        request = ask()
        opening = []
        async for piece in request:
            opening.append(piece)
            if has_words(piece):
                return opening, request
        raise ModelError("no words")

    tasks = [asyncio.create_task(begin())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=ask_again_after)
        slow = ModelError(f"no word in {ask_again_after:g} s")
        failure = tasks[0].exception() if done else slow
        if failure and not isinstance(failure, FinalError):
            log.info("%s asks the model twice: %s", name_of_task(), cause(failure))
            tasks.append(asyncio.create_task(begin()))
        opening, request = await first_to_succeed(tasks)
    finally:
        # To be cancelled while it is read closes a request at once.
        cut_off(*tasks)
        await asyncio.gather(*tasks, return_exceptions=True)
    async with contextlib.aclosing(request):
        for piece in opening:
            yield piece
        async for piece in request:
            yield piece


async def first_to_succeed(tasks: list[asyncio.Task[T]]) -> T:
    """The first result of some tasks. If all fail, raises the last one's error."""
    for first in asyncio.as_completed(tasks):
        with contextlib.suppress(Exception):
            return await first
    return tasks[-1].result()


def open_gemini(agent: Agent) -> models.AsyncModels:
    """google-genai, which is slow to import, with the agent's key and `http`."""
    from google.genai import Client

    # Otherwise all wait 60 ms when the collector
    # looks at its 100,000 objects.
    gc.freeze()
    # Left alone, it warns of other keys, and of parts that are no text.
    logging.getLogger("google_genai").setLevel("ERROR")
    # It would retry in seconds: see ask_twice().
    options: Any = {"aiohttp_client": agent.http, "retry_options": {"attempts": 1}}
    key = agent.settings.google_generative_ai_api_key
    # GOOGLE_GENAI_USE_VERTEXAI must not count.
    return Client(vertexai=False, api_key=key, http_options=options).aio.models


async def warm_up(agent: Agent) -> None:
    """Connects ahead of a question, within 10 s; if that fails, the question tells."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(10):
            assert agent.gemini is not None
            await agent.gemini.get(model=agent.settings.gemini_model)


def consult(agent: Agent, history: list[Turn], config: Config, is_said: bool) -> Chunks:
    """Gemini's answer to a history; if all is said already, it may have no words."""
    level: Any = agent.settings.gemini_thinking.upper()
    # Every caller waits while google-genai builds contents, 0.25 ms for
    # each message. An extra_body is only merged, 1.5 ms for 40 turns.
    body: Event = {"contents": contents(history)}
    if "system_instruction" not in config:
        instruction = f"{agent.persona}\n{agent.voice_rules}"
        body["systemInstruction"] = {"parts": [{"text": instruction}]}
    request: Config = {
        "thinking_config": {"thinking_level": level} if level else None,
        **config,
        "http_options": {"extra_body": body},
        # It would call functions, and some twice.
        "automatic_function_calling": {"disable": True},
    }
    has_words = (lambda chunk: True) if is_said else speaks
    return ask_twice(lambda: ask_once(agent, request), has_words, agent.ask_again_after)


async def ask_once(agent: Agent, request: Config) -> Chunks:
    """Asks once and yields Gemini's chunks. Raises ModelError, aiohttp's errors."""
    from google.genai.errors import APIError

    assert agent.gemini is not None, "GOOGLE_GENERATIVE_AI_API_KEY is not set"
    ask = agent.gemini.generate_content_stream
    model = agent.settings.gemini_model
    # The extra_body has the contents.
    chunks = await ask(model=model, contents={}, config=request)
    ending = ""
    try:
        while True:
            more = anext(chunks)
            if ending:
                more = asyncio.wait_for(more, STREAM_END_PATIENCE)
            chunk = await more
            prompt = chunk.prompt_feedback
            if prompt and prompt.block_reason:
                raise BlockedError(f"Gemini blocked it: {prompt.block_reason.name}")
            if chunk.candidates and chunk.candidates[0].finish_reason:
                ending = chunk.candidates[0].finish_reason.name
            yield chunk
    except (StopAsyncIteration, TimeoutError):
        if ending not in ("STOP", "MAX_TOKENS"):
            raise ModelError(f"Gemini's answer ended: {ending or 'cut off'}") from None
    except APIError as error:
        raise explain(error, f"GEMINI_MODEL={model}") from None
    finally:
        # Only a stream that is cancelled while it is read lets go of its
        # connection at once: googleapis/python-genai, issue 2425.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(0):
                async for _ in chunks:
                    pass


def explain(error: errors.APIError, model: str) -> ModelError:
    """An error of Gemini's as the log may tell it: no message, but what to do."""
    hints = {
        "'code': 404": f": is {model} right?",
        "api_key_invalid": ": is GOOGLE_GENERATIVE_AI_API_KEY right?",
        "location is not supported": ": it is not offered where this server runs",
        "instruction is not enabled": f": {model} takes no persona",
        "thinking": f": does GEMINI_THINKING suit {model}?",
    }
    answer = str(error.details).lower()
    told = f"{type(error).__name__} {error.code} {error.status}"
    told += "".join(hint for words, hint in hints.items() if words in answer)
    is_final = error.code in (400, 401, 403, 404, 429)
    return FinalError(told) if is_final else ModelError(told)


def speaks(chunk: Chunk) -> bool:
    """Whether a chunk has words to read aloud, beside marks, or calls a tool."""
    return any(map(str.isalnum, chunk.text or "")) or bool(chunk.function_calls)


async def stand_in(history: list[Turn]) -> Speech:
    """What is said where there is no model: the last three turns, newest first."""
    said = [turn.user for turn in history if turn.user]
    recalled = "' and before that '".join(said[:-4:-1])
    words = f"I'm the offline stand-in. You said '{recalled}'. "
    words += "Set GOOGLE_GENERATIVE_AI_API_KEY for Gemini."
    for word in words.split():
        yield f"{word} "
        # Slowly enough to interrupt.
        await asyncio.sleep(0.1)


# ---- Tools

# What Gemini is told of a tool that runs.
BEGUN = {"status": "It has begun, and may go on. Do not call it again unasked."}


class Answer:
    """Gemini's answer to a turn, with the tools that it calls on the way.

    A call runs once: it is recorded before it begins, and it runs in a task
    that a hang-up does not end. A webhook that is delivered again waits for
    that task, and Gemini is shown what it gave.
    """

    def __init__(self, agent: Agent, event: Event, history: list[Turn]) -> None:
        self.agent = agent
        self.history = history
        self.key = (event["conversation_id"], event["turn_id"])
        self.tools = {tool.__name__: tool for tool in agent.tools(event)}
        declared = [declare(tool) for tool in self.tools.values()]
        offered: Any = [{"function_declarations": declared}]
        self.offered = offered if declared else None
        # The calls alone, for the history.
        self.recorded = list(history[-1].done)

    async def speak(self) -> Speech:
        """Yields the words of the answer, and what the tools have for the page."""
        filler = f"{self.agent.filler} "
        hang_up: Event = {}
        # By words, or by a tool's event.
        has_answered = False
        for rounds_left in reversed(range(MAX_ROUNDS + 1)):
            parts: list[types.Part] = []
            words = ""
            # Without tools, it has to speak.
            config: Config = {"tools": self.offered if rounds_left else None}
            # Words before a call are an answer.
            asking = consult(self.agent, self.history, config, has_answered)
            async with contextlib.aclosing(asking) as chunks:
                async for chunk in chunks:
                    new = [part for part in chunk.parts or [] if part.text != ""]
                    parts += new
                    text = "".join(one.text or "" for one in new if not one.thought)
                    words += text
                    yield text
            has_answered = has_answered or words.strip() != ""
            calls = [part.function_call for part in parts if part.function_call]
            if not calls or not rounds_left:
                break
            for call in calls:
                yield state_of(call.name, "running")
            running = self.agent.start(self.run(parts))
            self.agent.tools_running[self.key] = running
            # An interruption here ends no tool.
            patience = None if has_answered else FILLER_AFTER
            await asyncio.wait([running], timeout=patience)
            if not running.done():
                yield filler
                filler = ""
            for answer in await asyncio.shield(running):
                is_done = "output" in answer["response"]
                yield state_of(answer["name"], "done" if is_done else "failed")
                match answer["response"].get("output"):
                    case {"type": "response.hangup"} as hang_up:
                        has_answered = True
                    case {"type": "response.data" | "response.tts"} as event:
                        has_answered = True
                        yield event
            if hang_up and words:
                # That was the goodbye.
                break
            yield " " if words else ""
        yield hang_up or ""

    async def run(self, parts: list[types.Part]) -> list[Event]:
        """Runs tools to their end, with a record before and after; gives answers."""
        options: Any = {"mode": "json", "by_alias": True, "exclude_none": True}
        # With their thought signatures.
        sent = [part.model_dump(**options) for part in parts]
        called = [part for part in sent if "functionCall" in part]
        calls = [part.function_call for part in parts if part.function_call]
        answers = [{"id": one.id, "name": one.name, "response": BEGUN} for one in calls]
        told = [{"functionResponse": answer} for answer in answers]
        reply = {"role": "user", "parts": told}
        turn = self.history[-1]
        turn.done = [*turn.done, {"role": "model", "parts": sent}, reply]
        self.recorded += [{"role": "model", "parts": called}, reply]
        await record(self.agent, self.key, {"done": self.recorded})
        await asyncio.gather(*map(self.agent.start, map(self.call, calls, answers)))
        await record(self.agent, self.key, {"done": self.recorded})
        return answers

    async def call(self, call: types.FunctionCall, answer: Event) -> None:
        """Puts into an answer what a tool gives, or its error."""
        import pydantic
        from pydantic_core import to_jsonable_python

        name = (call.name or "").rpartition(".")[2]
        try:
            if name not in self.tools:
                raise LoggedError(f"no tool {name}, but {', '.join(self.tools)}")
            tool = pydantic.validate_call(self.tools[name])
            async with asyncio.timeout(TOOL_PATIENCE):
                output = await in_thread(lambda: tool(**call.args or {}))
                # An async one was only called there.
                if isinstance(output, Awaitable):
                    output = await output
            # What is no JSON is told as well as can be.
            output = to_jsonable_python(output, inf_nan_mode="null", fallback=str)
            answer["response"] = {"output": output}
        except BaseException as error:
            # SystemExit would end the server.
            log.warning("%s tool %.60r failed: %s", name_of_task(), name, cause(error))
            # After a timeout, BEGUN stays.
            if not isinstance(error, TimeoutError):
                answer["response"] = {"error": f"{type(error).__name__}: {error}"}


def declare(tool: Tool) -> types.FunctionDeclarationDict:
    """What Gemini is told of a tool. Raises pydantic's error if a type is no JSON."""
    import pydantic

    kind: Any = tool
    schema = pydantic.TypeAdapter(kind).json_schema()
    told: types.FunctionDeclarationDict = {"name": tool.__name__}
    told["description"] = tool.__doc__ or ""
    if schema.get("properties"):
        told["parameters_json_schema"] = schema
    return told


def state_of(name: str | None, state: str) -> Event:
    """What the page is told of a tool: that it is running, done, or failed."""
    content = {"tool": (name or "").rpartition(".")[2], "state": state}
    return {"type": "response.data", "content": content}


async def in_thread(function: Callable[[], T]) -> T:
    """What a blocking function returns, or raises, in a daemon thread of its own.

    asyncio.to_thread() has few, and Python's end waits for one that hangs.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    # Nobody can cancel it from here on.
    outcome.set_running_or_notify_cancel()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(outcome)


# ---- The log
def name_of_task() -> str:
    """What the log calls the turn, or the webhook, that the task works for."""
    task = asyncio.current_task()
    return "" if task is None else task.get_name()


def cause(error: BaseException) -> str:
    """What the log says of an error: its type and place, or a LoggedError's message.

    Other messages, which may quote a key or a caller, are for DEBUG and `chat`.
    """
    log.debug("%s", name_of_task(), exc_info=error)
    if isinstance(error, LoggedError):
        return str(error)
    # Python's, installed ones, and no file.
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(libraries):
            place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} at {place}"


class Sparing(logging.Filter):
    """Lets a line a second through, and counts those that it leaves out."""

    second = 0
    left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is to be written. Malformed HTTP comes with a traceback."""
        record.exc_info = None
        is_first = self.second != int(record.created)
        if is_first and self.left_out:
            record.msg += f" ({self.left_out} lines like this were left out before)"
        self.left_out = 0 if is_first else self.left_out + 1
        self.second = int(record.created)
        return is_first


# ---- The terminal, and the command line

# Control characters, but for the line break.
CONTROLS = dict.fromkeys([*range(10), *range(11, 32), *range(127, 160)])


def chat(agent: Agent, url: str | None, fields: Event) -> None:
    """Chats with the agent at a URL, or with this one. Raises SettingsError."""
    # Turns' lines would be among the words;
    # whoever chats may read their own.
    log.setLevel("DEBUG")
    log.addFilter(lambda record: record.levelname != "INFO")
    # No proxy leads to the agent served here.
    opener = build_opener(ProxyHandler(None if url else {}))
    url = url or serve_beside(agent)
    print("Ctrl-C interrupts the agent. Hang up with Ctrl-D.\n")
    name = os.urandom(8).hex()
    fields = {"session_id": name, "conversation_id": name, **fields}
    event: Event = {"type": "session.start"}
    with contextlib.suppress(EOFError):
        while True:
            event = {**fields, **event, "turn_id": os.urandom(8).hex()}
            report = listen(opener, url, agent.settings.layercode_webhook_secret, event)
            event = {"type": "message", "text": input("\n> "), **report}


def listen(opener: OpenerDirector, url: str, secret: str, event: Event) -> Event:
    """Posts a webhook and prints the answer; returns what the next one reports.

    Raises EOFError if the agent hangs up, SettingsError if it does not answer.
    """
    heard = ""
    kinds = []
    try:
        body = json.dumps(event).encode()
        request = Request(url, body, {"Content-Type": "application/json"})
        request.add_header("layercode-signature", sign(body, secret))
        with opener.open(request, timeout=30) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    frame = json.loads(line.removeprefix(b"data:"))
                    kinds.append(frame["type"])
                    if frame["type"] == "response.tts":
                        heard += frame["content"]
                        # A terminal may know no emoji, and obeys controls.
                        words = frame["content"].translate(CONTROLS)
                        known = words.encode(sys.stdout.encoding, "replace")
                        print(known.decode(sys.stdout.encoding), end="", flush=True)
                    elif frame["type"] == "response.data":
                        print(f"[{json.dumps(frame.get('content'))}]")
        if "response.end" not in kinds:
            raise ValueError("The answer has no response.end. What does the log say?")
    except KeyboardInterrupt:
        # It has hung up, as Layercode does.
        told = {"text_heard": heard, "words_heard": len(heard.split())}
        told |= {"assistant_turn_id": event["turn_id"]}
        return {"interruption_context": {"previous_turn_interrupted": True, **told}}
    except Exception as error:
        # Anything may stand behind a URL.
        raise SettingsError(f"{url}: {error}") from None
    if "response.hangup" in kinds:
        print("\n(the agent hung up)")
        raise EOFError
    return {}


def serve_beside(agent: Agent) -> str:
    """Serves an agent in a thread; returns its webhook's URL, which listens already."""
    key = os.urandom(16).hex()
    agent.settings = dataclasses.replace(agent.settings, layercode_webhook_secret=key)
    listener = socket.create_server(("127.0.0.1", 0))
    options: Event = {"sock": listener, "handle_signals": False, "print": None}
    options |= {"app": agent.make_app(), **RUNNER_OPTIONS}
    threading.Thread(target=web.run_app, kwargs=options, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/agent"


def serve(agent: Agent) -> None:
    """Serves the agent until the process is told to stop. Raises SettingsError."""
    settings = agent.settings
    hints = [f"Up: http://{settings.host}:{settings.port}"]
    # What is not shown is a secret.
    secrets = [one.name for one in dataclasses.fields(Settings) if not one.repr]
    missing = [name.upper() for name in secrets if not getattr(settings, name)]
    hints += [f"{name} is not set: see .env.example." for name in missing]
    if settings.layercode_api_key and type(agent).admit is Agent.admit:
        hints.append(
            "Everyone who reaches /authorize may start calls: override admit()."
        )
    hints.append(f"Next: cloudflared tunnel --url http://localhost:{settings.port}")
    refusals.addFilter(Sparing())
    options: Event = {"host": settings.host, "port": settings.port, **RUNNER_OPTIONS}
    # In a flood, whoever finds aiohttp's queue
    # of 128 full tries again after a second.
    options |= {"backlog": 1024, "logger": refusals}
    options["print"] = lambda _: print(*hints, sep="\n", flush=True)
    try:
        web.run_app(agent.make_app(), **options)
    except (OSError, OverflowError, UnicodeError) as error:
        where = f"HOST={settings.host} PORT={settings.port}"
        raise SettingsError(f"{where} cannot be listened on: {error}") from None


def main(agent: type[Agent] = Agent) -> None:
    """Serves the agent, or chats with it. A SettingsError ends it with one line."""
    parser = argparse.ArgumentParser(description="Serves a Layercode voice agent.")
    parser.add_argument("command", nargs="?", choices=["chat"], help="talk to it here")
    parser.add_argument("url", nargs="?", help="a webhook: talk to the agent behind it")
    parser.add_argument("--event", type=json.loads, default={}, help="added fields")
    arguments = parser.parse_args()
    if arguments.url == "" or not isinstance(arguments.event, dict):
        parser.error("the URL is empty, or the event is no JSON object")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        one = agent()
        log.setLevel(one.settings.log_level.upper())
        if arguments.command:
            chat(one, arguments.url, arguments.event)
        else:
            serve(one)
    except (KeyboardInterrupt, web.GracefulExit):
        pass
    except SettingsError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
