"""A backend for Layercode voice agents: signed webhooks in, speech out, in one file.

caller -- audio --> Layercode -- POST /agent, signed --> agent.py --> Gemini
caller <- audio --- Layercode <- Server-Sent Events ---- agent.py <-- text
browser -- POST /authorize --> agent.py -- with API key --> Layercode

python agent.py             serve Layercode and web pages
python agent.py chat        talk to this agent; no API key needed
python agent.py chat URL    talk to the agent behind a webhook's URL
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
import threading
import time
import traceback
import urllib.request
from collections.abc import AsyncGenerator as Stream
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener
from weakref import WeakValueDictionary

import aiohttp
import certifi
from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web import StreamResponse

if TYPE_CHECKING:
    from google.genai import errors, models, types
    from google.genai.types import GenerateContentConfigDict as Config

    Chunks = Stream[types.GenerateContentResponse, None]

log = logging.getLogger("agent")
refusals = logging.getLogger("agent.refusals")

T = TypeVar("T")
# Forgets a task that is over.
Running = WeakValueDictionary[str | tuple[str, str], asyncio.Task[Any]]
Event = dict[str, Any]
# A str is spoken, an Event is sent as it is.
Speech = Stream[str | Event, None]
Tool = Callable[..., Any]

# ---- Limits: in seconds, but for MAX
TOOL_PATIENCE = 5.0
FILLER_AFTER = 1.2
RECORD_PATIENCE = 2.0
NOTICE_PATIENCE = 30.0
BODY_PATIENCE = 5.0
AUTHORIZE_PATIENCE = 10.0
# For calls at a stop; `docker stop` waits 10.
GRACE = 5.0
MAX_ROUNDS = 5
# In bytes: parsing JSON holds up all callers.
MAX_PAGE = 2**16
MAX_TURNS = 50
MAX_CONVERSATIONS = 10_000

RUNNER_OPTIONS: dict[str, Any] = {
    # Layercode hangs up at an interruption.
    "handler_cancellation": True,
    # A stranger's 1 MB can inflate to 1 GB.
    "auto_decompress": False,
    # Longer than nginx's 60, cloudflared's 90.
    "keepalive_timeout": 120,
    "lingering_time": 2,
    # After Agent.stop(). aiohttp waits twice.
    "shutdown_timeout": 1,
    "access_log": None,
}


# ---- Settings
class SettingsError(ValueError):
    """A setting, or a URL to chat with, is wrong; the message names it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The variables of .env.example; a subclass may have more."""

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
        used = dataclasses.asdict(cls())
        for name, default in used.items():
            text = given.get(name.upper(), "").strip() or default
            try:
                used[name] = type(default)(text)
            except ValueError:
                raise SettingsError(f"{name.upper()}={text} is not a number") from None
        return cls(**used)


def read_dotenv(file: Path) -> dict[str, str]:
    """The variables in a .env file, if there is one. Raises SettingsError."""
    try:
        text = file.read_text("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read as UTF-8: {error}") from None
    # Unquoted, a # after a space ends it.
    line = r"""(?m)^\s*(?:export\s+)?(\w+)\s*=(?:\s*(["'])(.*?)\2|(.*?)(?:\s#.*)?$)"""
    return {name: quoted or value for name, _, quoted, value in re.findall(line, text)}


# ---- The agent: make it yours
class Agent:
    """A voice agent: override what you like in a subclass, and pass that to main()."""

    persona = "You're a friendly voice assistant on a call."
    voice_rules = (
        "Your words are read aloud: write plain spoken sentences, with punctuation and "
        "contractions, no Markdown, lists, emoji or symbols; spell out numbers, dates "
        "and units. One or two will do. You were cut off where [interrupted] stands."
    )
    greeting = "Hi there! How can I help you today?"
    welcome_back = "Welcome back! Where were we?"
    apology = "Sorry, I didn't get that. Could you say it again?"
    filler = "One moment, please."
    # In seconds; float("inf") means never.
    patience = 8.0
    ask_again_after = 2.5

    # While it serves, for your own requests.
    http: aiohttp.ClientSession
    # google-genai's methods, if there is a key.
    gemini: models.AsyncModels | None = None

    def __init__(
        self, settings: Settings | None = None, histories: Histories | None = None
    ) -> None:
        self.settings = settings or Settings.load()
        self.histories = Histories() if histories is None else histories
        # asyncio does not hold its tasks.
        self.tasks: set[asyncio.Task[Any]] = set()
        # A call's last reply; a turn's tools.
        self.running = Running()

    async def greet(self, event: Event, history: list[Turn]) -> Speech:
        """Yields what is said first; if nothing, the caller begins."""
        yield self.welcome_back if any(turn.user for turn in history) else self.greeting

    def reply(self, event: Event, history: list[Turn]) -> Speech:
        """The answer to the last turn; yours is an async def that yields.

        A str is spoken at once; a dict is an event for Layercode. At an
        interruption it is cancelled: let CancelledError pass. If it fails, or
        yields nothing for `patience` seconds, the caller hears the apology.
        """
        if self.gemini is None:
            return stand_in(history)
        return Answer(self, event, history).speak()

    def tools(self, event: Event) -> Sequence[Tool]:
        """The functions that Gemini may call, by name, docstring and types.

        A sync one runs in a thread, an async one must not block. Gemini is told
        what they return; a response.data goes to the page as well, and a
        response.hangup ends the call after the last word.
        """
        return []

    async def notice(self, event: Event) -> Event | None:
        """Takes a webhook that asks for no speech, within 30 s; returns the answer."""
        return None

    async def admit(self, request: web.Request, session: Event) -> object:
        """Decides who may call: raise web.HTTPForbidden(reason="..."), or not.

        `session` goes to Layercode. Add custom_metadata, which all webhooks of
        the call bring, or config: pages cannot. Only None admits.
        """
        return None

    def ask(self, history: list[Turn], config: Config | None = None) -> Chunks:
        """Gemini's answer in google-genai's chunks; `config` can set no http_options.

        Use contextlib.aclosing(). Raises AnswerError, and aiohttp's errors.
        """
        return consult(self, history, config or {}, False)

    def make_app(self) -> web.Application:
        """The aiohttp application, to run with RUNNER_OPTIONS, or to mount."""
        app = web.Application(middlewares=[web.middleware(partial(guard, self))])
        app.router.add_get("/", show_page)
        for prefix in ("", "/api"):
            app.router.add_post(f"{prefix}/agent", partial(receive, self))
            app.router.add_post(f"{prefix}/authorize", partial(authorize, self))
            app.router.add_options(f"{prefix}/authorize", show_page)
        app.on_response_prepare.append(partial(cors, self))
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
            # Otherwise ~/.netrc is read.
            trust_env=bool(urllib.request.getproxies()),
        ) as self.http:
            key = self.settings.google_generative_ai_api_key
            if key:
                from google.genai import Client

                logging.getLogger("google_genai").setLevel("ERROR")
                # No retries: see ask_twice().
                options: Any = {"aiohttp_client": self.http}
                options["retry_options"] = {"attempts": 1}
                # Not Vertex, whatever is set.
                client = Client(vertexai=False, api_key=key, http_options=options)
                self.gemini = client.aio.models
                # Spares callers 60 ms pauses, and 5 % of the work.
                gc.freeze()
                gc.set_threshold(10_000)
                self.start(warm_up(self))
            yield

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Starts a task; the log calls it by its name, or by what starts it."""
        task = asyncio.create_task(work, name=name or name_of_task())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def stop(self, app: web.Application) -> None:
        """Lets what goes on end for GRACE seconds, then cuts it off."""
        calls = {one.get_name() for one in self.running.values() if not one.done()}
        if calls:
            log.warning("Finishing %d calls; once more stops at once.", len(calls))
        # 1 more, to record what was spoken.
        for patience in (GRACE, 1):
            if self.tasks:
                await asyncio.wait(self.tasks, timeout=patience)
                cut_off(*self.tasks)


def cut_off(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancels tasks, once: a second time would disturb one that is ending."""
    for task in tasks:
        if task and not task.cancelling():
            task.cancel()


# ---- History
@dataclasses.dataclass(slots=True)
class Turn:
    """What the caller said, and what became of the answer."""

    user: str = ""
    spoken: str = ""
    # False if it was cut off, or goes on.
    finished: bool = False
    # If it was cut off, what was heard of it.
    heard: str | None = None
    # Tools' calls and results, for the model.
    done: Sequence[Event] = ()

    def answer(self) -> str:
        """The answer for the model, as far as the caller heard it."""
        words = self.spoken if self.heard is None else self.heard
        if self.finished and self.heard is None:
            return words.lstrip()
        return f"{words} [interrupted]".lstrip() if words or self.done else ""


class Histories:
    """What was said, in memory. Your store overrides load() and record()."""

    def __init__(self) -> None:
        # The least recently used comes first.
        self._conversations: dict[str, dict[str, Turn]] = {}

    async def load(self, conversation: str) -> dict[str, Turn]:
        """A new dict of the turns by turn_id, first recorded first."""
        return dict(self._conversations.get(conversation, {}))

    async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
        """Sets fields of a Turn, which is a new one if its turn_id is new."""
        turns = self._conversations.pop(conversation, {})
        turns[turn_id] = dataclasses.replace(turns.get(turn_id, Turn()), **facts)
        self._conversations[conversation] = dict(list(turns.items())[-MAX_TURNS:])
        if len(self._conversations) > MAX_CONVERSATIONS:
            del self._conversations[next(iter(self._conversations))]


def contents(history: list[Turn]) -> list[Event]:
    """What Gemini is sent of a history: the caller comes first and last."""
    shown: list[Event] = []
    for turn in history:
        said = [{"text": turn.user or "(The caller says nothing.)"}]
        # The turn before may have no answer.
        if shown and shown[-1]["role"] == "user":
            said = shown.pop()["parts"] + said
        shown += [{"role": "user", "parts": said}, *turn.done]
        answer = turn.answer()
        if answer and turn is not history[-1]:
            shown.append({"role": "model", "parts": [{"text": answer}]})
    return shown


# ---- What is read aloud
# Not Markdown's marks, nor [interrupted]. Arithmetic is: 2*3, 5 * 3, 2**3.
MARKS = re.compile(
    # At a line's start; [interrupted]; a link.
    r"(?!\A)(?:(?<=\n)[ \t]*(?:#{1,6} |> ?|[-*+] )"
    r"|\[(?i:interrupted)\]|!?\[(?P<text>[^\[\]\n]*)\]\([^()\s]*\)"
    r"|`+|(?<!\d)\*{2,}|\*{2,}(?!\d)|__+"
    r"|(?<![\w*])[*_](?![\s*_])|(?<![\s*_])[*_](?![\w*]))"
)
# An end that may be a mark: what follows tells.
OPEN_END = re.compile(
    r"(?:(?<=\n)[ \t]*(?:#{1,6}|>|[-*+])?|[*_]+"
    r"|\[[^\[\]\n]{0,200}(?:\](?:\([^()\s]{0,200})?)?)\Z"
)


# ---- The webhook, and web pages
async def guard(agent: Agent, request: web.Request, handler: Handler) -> StreamResponse:
    """Turns strangers away; logs refusals, and the places of errors."""
    asked = f"{request.method} {request.path[:60]!r}"
    origin = request.headers.get("Origin", "")
    try:
        # To parse tiny chunks holds up all.
        if "Transfer-Encoding" in request.headers:
            raise web.HTTPLengthRequired(reason="a Content-Length is needed")
        if origin and not allows(agent, origin):
            why = f"{origin[:80]!a} is not in ALLOWED_ORIGINS: add it, if yours"
            raise web.HTTPForbidden(reason=why)
        return await handler(request)
    except web.HTTPException as answer:
        refusals.warning("%s: %d %s", asked, answer.status, answer.reason)
        raise
    except (Exception, SystemExit) as error:
        log.error("%s failed: %s", asked, cause(error))
        raise web.HTTPInternalServerError(reason="see the agent's log") from None
    finally:
        if not request.content.is_eof():
            # The rest is not even parsed.
            request.protocol.close()


def allows(agent: Agent, origin: str) -> bool:
    """Whether an origin may start calls."""
    allowed = agent.settings.allowed_origins.lower().replace(",", " ").split()
    return any(fnmatch.fnmatchcase(origin, one.rstrip("/")) for one in allowed)


async def cors(agent: Agent, request: web.Request, response: StreamResponse) -> None:
    """Lets pages of the allowed origins read a response, before it is sent."""
    origin = request.headers.get("Origin", "")
    if origin and allows(agent, origin):
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Headers"] = wanted
        response.headers["Vary"] = "Origin"


async def show_page(request: web.Request) -> StreamResponse:
    """The page index.html beside this file, or that the agent is up."""
    page = Path(__file__).with_name("index.html")
    if request.method != "OPTIONS" and page.is_file():
        return web.FileResponse(page)
    return web.Response(text="The agent is up.\n")


async def receive(agent: Agent, request: web.Request) -> StreamResponse:
    """Answers a webhook: with speech, or with what notice() gives."""
    signature = request.headers.get("layercode-signature", "")
    # Signed as sent: JSON can be respelt.
    body = await read_body(request) if signature else b""
    if not verify(signature, body, agent.settings.layercode_webhook_secret):
        why = "no right signature: check LAYERCODE_WEBHOOK_SECRET and the clock"
        raise web.HTTPUnauthorized(reason=why)
    event = parse(body)
    event["conversation_id"] = text_of(event, "conversation_id", "session_id")
    kind = text_of(event, "type")
    is_start = kind == "session.start" and event.get("turn_id") is not None
    if not is_start and kind not in ("message", "welcome"):
        # Layercode may not wait for the answer.
        name = f"conversation={event['conversation_id']!r} {kind!r}"
        return await asyncio.shield(agent.start(answer_notice(agent, event), name))
    # Arrival decides: nothing waits before the reply is in agent.running, so
    # each knows the one before it, whatever a store takes.
    task = Reply(agent, request, event).task
    try:
        return await asyncio.shield(task)
    finally:
        cut_off(task)


async def answer_notice(agent: Agent, event: Event) -> web.Response:
    """The answer of the agent's notice(), or a 500 if that fails."""
    try:
        async with asyncio.timeout(NOTICE_PATIENCE):
            return web.json_response(await agent.notice(event) or {})
    except BaseException as error:
        log.error("%s failed in notice(): %s", name_of_task(), cause(error))
        return web.Response(status=500, reason="see the agent's log")


async def authorize(agent: Agent, request: web.Request) -> web.Response:
    """Gets a page its session from Layercode; the API key stays here."""
    page = parse(await read_body(request, MAX_PAGE))
    settings = agent.settings
    key = settings.layercode_api_key
    if not key:
        raise web.HTTPInternalServerError(reason="LAYERCODE_API_KEY is not set")
    page["agent_id"] = text_of(page, "agent_id", "pipeline_id")
    if page.get("conversation_id") or page.get("session_id"):
        page["conversation_id"] = text_of(page, "conversation_id", "session_id")
    # Named one by one, because Layercode takes other fields, too: with a
    # config, a visitor could have it call a webhook and a model of their own.
    names = ("agent_id", "conversation_id", "metadata", "sdk_version")
    session = {name: page[name] for name in names if page.get(name)}
    if settings.layercode_agent_id not in ("", session.get("agent_id")):
        raise web.HTTPForbidden(reason="agent_id is not LAYERCODE_AGENT_ID")
    if await agent.admit(request, session) is not None:
        raise web.HTTPForbidden(reason="admit() has refused")
    url = f"{settings.layercode_api_url.rstrip('/')}/v1/agents/web/authorize_session"
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = json.dumps(session)
    asking = agent.http.post(url, data=data, headers=headers, allow_redirects=False)
    try:
        async with asyncio.timeout(AUTHORIZE_PATIENCE), asking as response:
            # It may quote the API key.
            body = (await response.read()).replace(key.encode(), b"***")
    except (aiohttp.ClientError, TimeoutError) as error:
        why = f"Layercode could not be reached: {type(error).__name__}"
        raise web.HTTPBadGateway(reason=why) from None
    if 200 <= response.status < 300:
        return web.Response(body=body, content_type="application/json")
    # The browser SDK shows only a reason.
    told = re.sub(r"[^ -~]+", " ", body.decode(errors="replace"))[:200]
    why = f"Layercode answered {response.status}: {told}"
    mistakes = {400: web.HTTPBadRequest, 402: web.HTTPPaymentRequired}
    raise mistakes.get(response.status, web.HTTPBadGateway)(reason=why)


class Reply:
    """An answer on its way to Layercode.

    An interruption: the caller speaks, Layercode drops the connection, and aiohttp
    cancels the handler, which cuts off the reply's task. This closes reply()
    and Gemini's stream in it; tools that have begun go on. What was spoken is recorded
    as not finished. The next webhook tells how much was heard, and the model is
    shown that. If it comes first, its reply cuts this one off, and waits.
    """

    def __init__(self, agent: Agent, request: web.Request, event: Event) -> None:
        self.agent = agent
        self.event = event
        self.key = (event["conversation_id"], text_of(event, "turn_id"))
        self.is_greeting = event["type"] != "message"
        self.method = agent.greet if self.is_greeting else agent.reply
        text = "" if self.is_greeting else event.get("text") or ""
        self.turn = Turn(user=str(text).strip())
        # To record; nothing of a repetition.
        self.facts: Event = {"user": self.turn.user}
        # Otherwise nginx would hold it back.
        headers = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
        headers["Cache-Control"] = "no-cache, no-transform"
        self.response = StreamResponse(headers=headers)
        # The last letter, and a possible mark.
        self.rest = "\n"
        self.may_be_silent = self.is_greeting
        self.started = time.monotonic()
        self.times: list[float] = []
        self.earlier = agent.running.get(self.key[0])
        name = f"conversation={self.key[0]!r} turn={self.key[1]!r}"
        self.task = agent.start(self.run(request), name)
        agent.running[self.key[0]] = self.task

    async def run(self, request: web.Request) -> StreamResponse:
        """Speaks the answer, and records what became of it."""
        outcome = "interrupted"
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await self.response.prepare(request)
            outcome = await self.speak()
        total = 1000 * (time.monotonic() - self.started)
        first = f"{self.times[0]:.0f}ms" if self.times else "none"
        figures = f"first_word={first} total={total:.0f}ms chunks={len(self.times)}"
        level = logging.WARNING if "failed" in outcome else logging.INFO
        log.log(level, "%s %s %s", name_of_task(), outcome, figures)
        # cut_off() cancels once. Used up here, it cannot end the record.
        cut_off(self.task)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        if self.earlier is not None:
            # If begin() did not get to wait.
            await asyncio.wait([self.earlier], timeout=RECORD_PATIENCE)
        if "spoken" in self.facts:
            self.facts |= {"spoken": self.turn.spoken, "finished": self.turn.finished}
        await record(self.agent, self.key, self.facts)
        return self.response

    async def speak(self) -> str:
        """Writes the answer, or the apology, and its end; returns the outcome."""
        outcome = "spoken"
        patience = self.agent.patience
        wait = asyncio.timeout(patience)
        try:
            # A slow store is a silent model.
            async with wait, contextlib.aclosing(await self.begin()) as pieces:
                async for piece in pieces:
                    if self.task.cancelling():
                        raise asyncio.CancelledError
                    await self.say(piece)
                    wait.reschedule(asyncio.get_running_loop().time() + patience)
            if not self.times and not self.may_be_silent:
                raise AnswerError("nothing was said")
        except BaseException as error:
            outcome = "interrupted"
            self.rest = self.rest[:1]
            # Cut off, it says nothing more.
            if not self.task.cancelling():
                why = f"TimeoutError: nothing came for {patience:g} s"
                outcome = f"failed: {why if wait.expired() else cause(error)}"
                if isinstance(error, BlockedError):
                    # Shown this turn, the model would be blocked again.
                    self.facts |= {"user": "", "heard": "", "done": []}
                await self.say((" " if self.turn.spoken else "") + self.agent.apology)
        # A later one ends the turn itself.
        if self.agent.running.get(self.key[0]) is self.task:
            await self.say({"type": "response.end"})
        self.turn.finished = not self.task.cancelling()
        return outcome

    async def begin(self) -> Speech:
        """Records what the webhook tells, and returns what is to be said.

        The caller's words come first: no failure loses them. A webhook that comes
        again cuts off the first; if its turn is finished, or not the last, the same
        words are spoken again; otherwise there is a new answer, once its tools end.
        """
        cut_off(self.earlier)
        for before in (self.earlier, self.agent.running.get(self.key)):
            if before is not None:
                await asyncio.wait([before])
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
                # None: nobody knows how much.
                facts: Event = {"finished": False, "heard": report.get("text_heard")}
                if named in list(turns):
                    turns[named] = dataclasses.replace(turns[named], **facts)
                    await self.agent.histories.record(conversation, named, **facts)
        await self.agent.histories.record(conversation, turn_id, **self.facts)
        self.facts |= {"spoken": "", "finished": False}
        said = [one for one in turns.values() if one.user or one.done or one.answer()]
        return self.speech([*said, self.turn][-MAX_TURNS:])

    def speech(self, history: list[Turn]) -> Speech:
        """What greet() or reply() makes. Raises AnswerError."""
        if not self.is_greeting and not self.turn.user:
            return say_once(self.agent.apology)
        if self.is_greeting:
            self.agent.start(warm_up(self.agent))
        speech = self.method(self.event, history)
        if not isinstance(speech, Stream):
            raise AnswerError(f"{self.method.__qualname__}() needs async def and yield")
        return speech

    async def say(self, piece: str | Event) -> None:
        """Writes a piece of the answer. Raises AnswerError for what is none."""
        try:
            if isinstance(piece, str):
                piece = {"type": "response.tts", "content": piece}
            is_speech = piece["type"] == "response.tts"
            words = self.plain(piece["content"] if is_speech else "", not is_speech)
            sent = [{"type": "response.tts", "content": words}] if words else []
            sent += [] if is_speech else [piece]
            named = [{**event, "turn_id": self.key[1]} for event in sent]
            frames = [f"data: {json.dumps(one, allow_nan=False)}\n\n" for one in named]
        except Exception as error:
            what = f"yields a {type(piece).__name__}, no str or event"
            raise AnswerError(f"{self.method.__qualname__}() {what}: {error}") from None
        if words.strip():
            self.times.append(1000 * (time.monotonic() - self.started))
        self.may_be_silent = self.may_be_silent or not is_speech
        await self.response.write("".join(frames).encode())
        self.turn.spoken += words

    def plain(self, words: str, is_end: bool) -> str:
        """What can be spoken now, without marks; at the end, all."""
        text = self.rest + words
        # For speed: each mark has one of these.
        if set("\n*_`[").isdisjoint(text):
            self.rest = text[-1:]
            return words
        open_end = OPEN_END.search(text, 1)
        end = open_end.start() if open_end and not is_end else len(text)
        self.rest = text[end - 1 :]
        # The first letter is already out.
        return MARKS.sub(r"\g<text>", text[:end])[1:]


async def say_once(words: str) -> Speech:
    """Yields the words."""
    yield words


async def record(agent: Agent, key: tuple[str, str], facts: Event) -> None:
    """Records facts of a turn, if any; only the log tells if that fails."""
    try:
        async with asyncio.timeout(RECORD_PATIENCE):
            if facts:
                await agent.histories.record(*key, **facts)
    except (Exception, SystemExit) as error:
        log.error("%s is not recorded: %s", name_of_task(), cause(error))


async def read_body(request: web.Request, limit: int = 2**20) -> bytes:
    """A body as it was sent; the limit is in bytes. Raises HTTPException."""
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
        # No NaN, and nothing nested too deeply.
        json.dumps(event, allow_nan=False)
        if isinstance(event, dict):
            return event
    raise web.HTTPBadRequest(reason="the body is not a JSON object")


def text_of(event: Event, name: str, older: str = "") -> str:
    """The text under a name, or an older one. Raises HTTPBadRequest."""
    value = event.get(name) or event.get(older)
    if not isinstance(value, str) or not value:
        raise web.HTTPBadRequest(reason=f"{name} is missing or not a text")
    return value


# ---- The signature
def sign(body: bytes, secret: str, at: str = "") -> str:
    """The layercode-signature: t=<Unix seconds>,v1=<hex HMAC-SHA256 of t.body>."""
    at = at or str(int(time.time()))
    digest = hmac.new(secret.encode(), at.encode() + b"." + body, hashlib.sha256)
    return f"t={at},v1={digest.hexdigest()}"


def verify(header: str, body: bytes, secret: str) -> bool:
    """Whether it signs these very bytes, within 300 s, as in Layercode's Node SDK."""
    found = re.search(r"(?:^|,)t=([0-9]{1,15})(?:,|$)", header)
    if not (found and secret) or abs(time.time() - int(found[1])) > 300:
        return False
    # Bytes: compare_digest() takes no "\xe9".
    right = sign(body, secret, found[1]).partition(",")[2].encode()
    claims = header.encode(errors="replace").split(b",")
    # Several, while a secret is rotated.
    return any(hmac.compare_digest(right, one) for one in claims)


# ---- Asking Gemini
class AnswerError(Exception):
    """What is wrong with an answer, in words that the log may have."""


class FinalError(AnswerError):
    """The model refuses to answer: asking again is no use."""


class BlockedError(FinalError):
    """The model refuses a prompt with this turn, now and later."""


async def ask_twice(
    ask: Callable[[], Stream[T, None]],
    has_words: Callable[[T], bool],
    after: float,
) -> Stream[T, None]:
    """Yields what ask() yields, and calls ask() once more if no word has come.

    That is after so many seconds without a piece that has_words(), or at once
    if the first request fails. The two race, so that a slow model is not made
    slower; the first to speak wins. If both fail, raises the second's error.
    """

    async def attempt() -> tuple[list[T], Stream[T, None]]:
        opening = []
        stream = ask()
        async for piece in stream:
            opening.append(piece)
            if has_words(piece):
                return opening, stream
        raise AnswerError("no words")

    tasks = [asyncio.create_task(attempt())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=after)
        failure = tasks[0].exception() if done else AnswerError(f"no word in {after} s")
        if failure and not isinstance(failure, FinalError):
            log.info("%s asks the model twice: %s", name_of_task(), cause(failure))
            tasks.append(asyncio.create_task(attempt()))
        for one in asyncio.as_completed(tasks) if failure else tasks:
            with contextlib.suppress(Exception):
                opening, stream = await one
                break
        else:
            raise tasks[-1].exception() or AnswerError("no words")
    finally:
        for task in tasks:
            if task.cancel():
                await asyncio.gather(task, return_exceptions=True)
    async with contextlib.aclosing(stream):
        for piece in opening:
            yield piece
        async for piece in stream:
            yield piece


async def warm_up(agent: Agent) -> None:
    """Connects ahead of a question, which tells if that fails."""
    with contextlib.suppress(Exception):
        assert agent.gemini
        await asyncio.wait_for(agent.gemini.get(model=agent.settings.gemini_model), 10)


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
        # It would call some functions twice.
        "automatic_function_calling": {"disable": True},
    }
    has_words = (lambda chunk: True) if is_said else speaks
    return ask_twice(lambda: ask_once(agent, request), has_words, agent.ask_again_after)


async def ask_once(agent: Agent, request: Config) -> Chunks:
    """Asks once, and yields Gemini's chunks. Raises as Agent.ask() does."""
    from google.genai import errors

    assert agent.gemini, "GOOGLE_GENERATIVE_AI_API_KEY is not set"
    ask = agent.gemini.generate_content_stream
    chunks = await ask(model=agent.settings.gemini_model, contents={}, config=request)
    # The finish reason: what follows in a moment is part of the answer.
    ending = ""
    try:
        while True:
            chunk = await asyncio.wait_for(anext(chunks), 0.1 if ending else None)
            prompt = chunk.prompt_feedback
            if prompt and prompt.block_reason:
                raise BlockedError(f"Gemini blocked it: {prompt.block_reason.name}")
            if chunk.candidates and chunk.candidates[0].finish_reason:
                ending = chunk.candidates[0].finish_reason.name
            yield chunk
    except (StopAsyncIteration, TimeoutError):
        if ending not in ("STOP", "MAX_TOKENS"):
            raise AnswerError(f"Gemini's answer ended: {ending or 'cut off'}") from None
    except errors.APIError as error:
        raise explain(agent.settings, error) from None
    finally:
        # Only a stream that is cancelled while it is read lets go of its
        # connection at once: googleapis/python-genai, issue 2425.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(0):
                async for _ in chunks:
                    pass


def explain(settings: Settings, error: errors.APIError) -> AnswerError:
    """An error of Gemini's for the log: no message, but what to do."""
    model = f"GEMINI_MODEL={settings.gemini_model}"
    hints = {
        "'code': 404": f": is {model} right?",
        "api_key_invalid": ": is GOOGLE_GENERATIVE_AI_API_KEY right?",
        "location is not supported": ": it is not offered where this server runs",
        "instruction is not enabled": f": {model} takes no persona",
        "thinking": f": does GEMINI_THINKING={settings.gemini_thinking} suit {model}?",
    }
    hint = "".join(hints[one] for one in hints if one in str(error.details).lower())
    kind = FinalError if error.code in (400, 401, 403, 404, 429) else AnswerError
    return kind(f"{type(error).__name__} {error.code} {error.status}{hint}")


def speaks(chunk: types.GenerateContentResponse) -> bool:
    """Whether a chunk has words beside marks, or calls a tool."""
    return any(map(str.isalnum, chunk.text or "")) or bool(chunk.function_calls)


async def stand_in(history: list[Turn]) -> Speech:
    """Yields the caller's words, slowly enough to be interrupted."""
    words = f"I'm the offline stand-in. You said '{history[-1].user}'. "
    words += "Set GOOGLE_GENERATIVE_AI_API_KEY for Gemini."
    for word in words.split():
        yield f"{word} "
        await asyncio.sleep(0.1)


# ---- Tools
BEGUN = {"status": "It has begun, and may go on. Do not call it again unasked."}


class Answer:
    """Gemini's answer to a turn, with the tools that it calls on the way.

    A call runs once: recorded before it begins, in a task that no hang-up ends. The
    same webhook waits for it; the next shows Gemini that it has begun, or its result.
    """

    def __init__(self, agent: Agent, event: Event, history: list[Turn]) -> None:
        self.agent = agent
        self.history = history
        self.key = (event["conversation_id"], event["turn_id"])
        self.tools = {tool.__name__: tool for tool in agent.tools(event)}
        declared = [declare(tool) for tool in self.tools.values()]
        self.offer: Any = [{"function_declarations": declared}] if declared else None
        # Without words: Turn.spoken has them.
        self.recorded = list(history[-1].done)

    async def speak(self) -> Speech:
        """Yields the words, and what the tools have for the page."""
        filler = f"{self.agent.filler} "
        hang_up: Event = {}
        has_answered = False
        for rounds_left in reversed(range(MAX_ROUNDS + 1)):
            parts: list[types.Part] = []
            config: Config = {"tools": self.offer if rounds_left else None}
            # After words, it may add none.
            asking = consult(self.agent, self.history, config, has_answered)
            async with contextlib.aclosing(asking) as chunks:
                async for chunk in chunks:
                    new = [part for part in chunk.parts or [] if part.text != ""]
                    parts += new
                    yield "".join(one.text or "" for one in new if not one.thought)
            spoke = any((one.text or "").strip() for one in parts if not one.thought)
            has_answered = has_answered or spoke
            calls = [part.function_call for part in parts if part.function_call]
            if not calls or not rounds_left:
                break
            for call in calls:
                yield state_of(call.name, "running")
            work = self.agent.start(self.run(parts))
            self.agent.running[self.key] = work
            # An interruption here ends no tool.
            await asyncio.wait([work], timeout=None if has_answered else FILLER_AFTER)
            if not work.done():
                yield filler
                filler = ""
            for answer in await asyncio.shield(work):
                is_done = "output" in answer["response"]
                yield state_of(answer["name"], "done" if is_done else "failed")
                match answer["response"].get("output"):
                    case {"type": "response.hangup"} as hang_up:
                        has_answered = True
                    case {"type": "response.data" | "response.tts"} as event:
                        has_answered = True
                        yield event
            if hang_up and spoke:
                break
            yield " " if spoke else ""
        yield hang_up or ""

    async def run(self, parts: list[types.Part]) -> list[Event]:
        """Runs tools to their end, with a record before and after."""
        options: Any = {"mode": "json", "by_alias": True, "exclude_none": True}
        sent = [part.model_dump(**options) for part in parts]
        called = [part for part in sent if "functionCall" in part]
        calls = [part.function_call for part in parts if part.function_call]
        answers = [{"id": one.id, "name": one.name, "response": BEGUN} for one in calls]
        told = {"role": "user", "parts": [{"functionResponse": one} for one in answers]}
        turn = self.history[-1]
        turn.done = [*turn.done, {"role": "model", "parts": sent}, told]
        self.recorded += [{"role": "model", "parts": called}, told]
        await record(self.agent, self.key, {"done": self.recorded})
        await asyncio.gather(*map(self.agent.start, map(self.call, calls, answers)))
        await record(self.agent, self.key, {"done": self.recorded})
        return answers

    async def call(self, call: types.FunctionCall, answer: Event) -> None:
        """Puts a tool's result, or error, into an answer that is on record."""
        from pydantic import validate_call
        from pydantic_core import to_jsonable_python

        # Of default_api.order, the last.
        name = (call.name or "").rpartition(".")[2]
        try:
            if name not in self.tools:
                raise AnswerError(f"There is no tool {name}, only {list(self.tools)}")
            tool = validate_call(self.tools[name])
            async with asyncio.timeout(TOOL_PATIENCE):
                value = await in_thread(lambda: tool(**call.args or {}))
                # An async one has only begun.
                if isinstance(value, Awaitable):
                    value = await value
            value = to_jsonable_python(value, inf_nan_mode="null", fallback=str)
            answer["response"] = {"output": value}
        except BaseException as error:
            # SystemExit would end the server.
            log.warning("%s tool %.60r failed: %s", name_of_task(), name, cause(error))
            # After a timeout, BEGUN stays.
            if not isinstance(error, TimeoutError):
                answer["response"] = {"error": f"{type(error).__name__}: {error}"}


def declare(tool: Tool) -> Event:
    """What Gemini is told of a tool. Raises pydantic's errors."""
    from pydantic import TypeAdapter

    kind: Any = tool
    schema = TypeAdapter(kind).json_schema()
    told: Event = {"name": tool.__name__, "description": tool.__doc__}
    if schema.get("properties"):
        told["parameters_json_schema"] = schema
    return told


def state_of(name: str | None, state: str) -> Event:
    """What the page is told of a tool: that it is running, done, or failed."""
    content = {"tool": (name or "").rpartition(".")[2], "state": state}
    return {"type": "response.data", "content": content}


async def in_thread(function: Callable[[], T]) -> T:
    """What a function returns or raises in a thread, which no stop awaits."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            # asyncio raises no StopIteration.
            is_stop = isinstance(error, StopIteration)
            outcome.set_exception(RuntimeError("StopIteration") if is_stop else error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(outcome)


# ---- The log
def name_of_task() -> str:
    """What the log calls the turn, or the webhook, that the task works for."""
    task = asyncio.current_task()
    return "" if task is None else task.get_name()


def cause(error: BaseException) -> str:
    """An error for the log: its type and place in our code, or AnswerError's words."""
    # A message may quote a key or a caller.
    log.debug("%s", name_of_task(), exc_info=error)
    if isinstance(error, AnswerError):
        return str(error)
    theirs = (sys.prefix, sys.base_prefix, "<")
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(theirs):
            place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} at {place}"


class Sparing(logging.Filter):
    """Lets a line a second through, and counts those that it leaves out."""

    second = 0
    left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; malformed HTTP loses its traceback."""
        record.exc_info = None
        is_first = self.second != int(record.created)
        if is_first and self.left_out:
            record.msg += f" ({self.left_out} lines like this were left out before)"
        self.left_out = 0 if is_first else self.left_out + 1
        self.second = int(record.created)
        return is_first


# ---- The terminal, and the command line
def chat(agent: Agent, url: str | None, fields: Event) -> None:
    """Chats with the agent at a URL, or with this one. Raises SettingsError."""
    # Whole errors, but no INFO among words.
    log.setLevel("DEBUG")
    log.addFilter(lambda record: record.levelname != "INFO")
    # No proxy leads to the agent served here.
    opener = build_opener(ProxyHandler(None if url else {}))
    url = url or serve_beside(agent)
    print("Ctrl-C interrupts the agent. Hang up with Ctrl-D.\n")
    call = os.urandom(8).hex()
    ids = {"session_id": call, "conversation_id": call}
    event: Event = {"type": "session.start"}
    with contextlib.suppress(EOFError):
        while True:
            event = {**ids, **fields, **event, "turn_id": os.urandom(8).hex()}
            report = listen(opener, url, agent.settings.layercode_webhook_secret, event)
            event = {"type": "message", "text": input("\n> "), **report}


def listen(opener: OpenerDirector, url: str, secret: str, event: Event) -> Event:
    """Posts a webhook, prints the answer; returns what the next reports."""
    heard = ""
    kinds = set()
    try:
        body = json.dumps(event).encode()
        post = Request(url, body, {"Content-Type": "application/json"})
        post.add_header("layercode-signature", sign(body, secret))
        with opener.open(post, timeout=30) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    frame = json.loads(line.removeprefix(b"data:"))
                    kinds.add(frame["type"])
                    if frame["type"] == "response.tts":
                        heard += frame["content"]
                        known = frame["content"].encode(sys.stdout.encoding, "replace")
                        print(known.decode(sys.stdout.encoding), end="", flush=True)
                    elif frame["type"] == "response.data":
                        print(f"[{json.dumps(frame.get('content'))}]")
        if "response.end" not in kinds:
            raise ValueError("The answer has no response.end. What does the log say?")
    except KeyboardInterrupt:
        told = {"text_heard": heard, "assistant_turn_id": event["turn_id"]}
        return {"interruption_context": {"previous_turn_interrupted": True, **told}}
    except Exception as error:
        raise SettingsError(f"{url}: {error}") from None
    if "response.hangup" in kinds:
        print("\n(the agent hung up)")
        raise EOFError
    return {}


def serve_beside(agent: Agent) -> str:
    """Serves an agent in a thread; returns its webhook's URL."""
    key = os.urandom(16).hex()
    agent.settings = dataclasses.replace(agent.settings, layercode_webhook_secret=key)
    listener = socket.create_server(("127.0.0.1", 0))
    options: Event = {"sock": listener, "handle_signals": False, "print": None}
    options |= {"app": agent.make_app(), **RUNNER_OPTIONS}
    threading.Thread(target=web.run_app, kwargs=options, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/agent"


def serve(agent: Agent) -> None:
    """Serves the agent until it is told to stop. Raises SettingsError."""
    settings = agent.settings
    hints = [f"Up: http://{settings.host}:{settings.port}"]
    if settings.layercode_api_key and type(agent).admit is Agent.admit:
        hints.append("Whoever reaches /authorize may start calls: override admit().")
    hints.append(f"Next: cloudflared tunnel --url http://localhost:{settings.port}")
    refusals.addFilter(Sparing())
    options: Event = {"host": settings.host, "port": settings.port, **RUNNER_OPTIONS}
    # In a flood, aiohttp's 128 are too few.
    options |= {"backlog": 1024, "logger": refusals}
    options["print"] = lambda _: print(*hints, sep="\n", flush=True)
    try:
        web.run_app(agent.make_app(), **options)
    except (OSError, OverflowError, UnicodeError) as error:
        where = f"HOST={settings.host} PORT={settings.port}"
        raise SettingsError(f"{where} cannot be served: {error}") from None


def main(agent: type[Agent] = Agent) -> None:
    """Serves an agent, or chats with it. A SettingsError ends it."""
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
