"""A backend for Layercode voice agents: signed webhooks in, speech out, in one file.

    caller -- audio --> Layercode -- POST /agent, signed JSON --> agent.py --> Gemini
    caller <- audio --- Layercode <-- Server-Sent Events -------- agent.py <-- text
    browser -- POST /authorize --> agent.py -- with the API key --> Layercode REST API

    python agent.py             serve Layercode's webhooks and authorize browsers
    python agent.py chat        talk to this agent in the terminal; no API key needed
    python agent.py chat URL    talk to the agent behind a webhook's URL

An agent of your own is a file beside this one:

    from agent import Agent, main

    class Pizza(Agent):
        greeting = "Luigi's Pizza! What can I get you?"
        persona = "You take orders for Luigi's Pizza in Leeds."

    if __name__ == "__main__":
        main(Pizza)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import fnmatch
import gc
import hashlib
import hmac
import importlib
import io
import json
import logging
import os
import secrets
import select
import shlex
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypedDict, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

if TYPE_CHECKING:
    from google.genai.errors import APIError
    from google.genai.types import (
        GenerateContentConfigDict,
        GenerateContentResponse,
        HttpOptionsDict,
    )

log = logging.getLogger("agent")

# A JSON object: a webhook, an event for Layercode, a content for Gemini.
Event = dict[str, Any]
# What greet() and reply() yield: a str is spoken, an Event is sent as it is.
Speech = AsyncGenerator[str | Event, None]
Piece = TypeVar("Piece")

# ---- Limits --------------------------------------------------------------------------

# Seconds without a next piece of an answer before the caller hears the
# apology.
PATIENCE = 8.0
# Seconds after which a model that has said nothing is asked a second time.
ASK_AGAIN_AFTER = 2.5
# Seconds that Layercode may take to accept a frame before it counts as gone.
WRITE_PATIENCE = 5.0
# Seconds that a store may take to record what was spoken.
RECORD_PATIENCE = 2.0
# Seconds that a request may take to send its body.
BODY_PATIENCE = 5.0
# Seconds that Layercode's REST API may take to authorize a browser.
AUTHORIZE_PATIENCE = 10.0
# Seconds that `chat` waits for a connection, and for each next part of an
# answer.
CALL_PATIENCE = 15.0
# Seconds that Gemini may take to accept a connection ahead of the first
# question.
WARM_UP_PATIENCE = 10.0
# Seconds that Gemini may take to end its stream after the last word, which
# leaves the connection free for the next question.
STREAM_END_PATIENCE = 0.1
# Seconds that replies may go on for when the server is stopped. To end them
# takes 1 more, and aiohttp waits for its shutdown_timeout of 1 twice: together
# less than the 10 that `docker stop` waits.
GRACE = 5.0
# Chunks that Gemini may send at once before other callers are served.
BURST = 10
# Seconds that a signature's timestamp may be off, as in Layercode's Node SDK 1.2.1.
TOLERANCE = 300
# Bytes of a request's body, and of an answer of Layercode's REST API.
MAX_BODY = 2**20
# Bytes of what a page sends to be authorized: anybody may send it, and every
# caller waits while it is parsed.
MAX_PAGE = 2**16
# Seconds between two returns of unused memory to the system.
MEMORY_KEPT = 30.0
# Turns of a conversation that are kept and sent to the model.
MAX_TURNS = 50
# Conversations that are kept in memory.
MAX_CONVERSATIONS = 10_000


class RunnerOptions(TypedDict):
    """What aiohttp's web.run_app() and web.AppRunner() must be told."""

    handler_cancellation: bool
    auto_decompress: bool
    keepalive_timeout: float
    lingering_time: float
    shutdown_timeout: float
    access_log: logging.Logger | None


# For your own runner, too: web.run_app(your_app, **RUNNER_OPTIONS).
RUNNER_OPTIONS: RunnerOptions = {
    # A dropped connection is how Layercode tells that the caller interrupts.
    "handler_cancellation": True,
    # Layercode compresses nothing. A stranger's 1 MB can inflate to 1 GB.
    "auto_decompress": False,
    # Seconds. Longer than proxies keep theirs: 60 in nginx, 90 in cloudflared.
    "keepalive_timeout": 120,
    # Seconds to go on reading a body after the request was answered.
    "lingering_time": 2,
    # Seconds that aiohttp waits, twice, for requests in flight after
    # Webhook.stop().
    "shutdown_timeout": 1,
    "access_log": None,
}

# ---- Settings ------------------------------------------------------------------------

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
THINKING_LEVELS = ("minimal", "low", "medium", "high")
LOCAL_PAGES = (
    "*://localhost,*://localhost:*,*://127.0.0.1,*://127.0.0.1:*,*://[::1],*://[::1]:*"
)


class SettingsError(ValueError):
    """A setting is wrong; the message names it."""


@dataclass(frozen=True)
class Settings:
    """The variables of .env.example, each as a field of the same name.

    An agent with settings of its own adds fields in a subclass, and gives what
    its load() returns to Agent.__init__(). The type of a field's default tells
    whether it is a text or a number; there are no others. Raises SettingsError
    for a wrong value.
    """

    layercode_webhook_secret: str = dataclasses.field(default="", repr=False)
    google_generative_ai_api_key: str = dataclasses.field(default="", repr=False)
    layercode_api_key: str = dataclasses.field(default="", repr=False)
    gemini_model: str = "gemini-3.5-flash-lite"
    gemini_thinking: str = ""
    layercode_agent_id: str = ""
    allowed_origins: str = LOCAL_PAGES
    host: str = "127.0.0.1"
    port: int = 3000
    layercode_api_url: str = "https://api.layercode.com"
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"PORT={self.port} is not a port: see .env.example")
        if self.log_level not in LOG_LEVELS:
            choices = ", ".join(LOG_LEVELS)
            raise SettingsError(f"LOG_LEVEL={self.log_level} is not one of {choices}")
        thinking = self.gemini_thinking
        is_budget = thinking.removeprefix("-").isdecimal()
        if thinking and not is_budget and thinking not in THINKING_LEVELS:
            choices = ", ".join(THINKING_LEVELS)
            raise SettingsError(
                f"GEMINI_THINKING={thinking} is neither one of {choices} nor a number"
            )
        if not self.layercode_api_url.startswith(("http://", "https://")):
            raise SettingsError(
                f"LAYERCODE_API_URL={self.layercode_api_url} is not a URL"
            )
        for origin in self.origins():
            if not is_origin(origin):
                raise SettingsError(
                    f"ALLOWED_ORIGINS={self.allowed_origins} is wrong: "
                    f"{origin} is not like https://app.example.com"
                )

    @classmethod
    def load(cls) -> Self:
        """The settings of the environment, else of .env, else the defaults.

        The .env stands beside this file. A variable that is set but empty has
        its default. Raises SettingsError.
        """
        given = read_dotenv(Path(__file__).with_name(".env")) | dict(os.environ)
        values: dict[str, Any] = {}
        for one in dataclasses.fields(cls):
            name = one.name.upper()
            text = given.get(name, "").strip()
            if not text:
                continue
            values[one.name] = text
            # A port is a number because its default is one.
            if isinstance(one.default, int | float):
                try:
                    values[one.name] = type(one.default)(text)
                except ValueError:
                    raise SettingsError(f"{name}={text} is not a number") from None
        return cls(**values)

    def origins(self) -> list[str]:
        """The allowed origins, one by one. A * stands for any text."""
        return self.allowed_origins.lower().replace(",", " ").split()

    def missing(self) -> list[str]:
        """A sentence for each unset setting that matters to callers."""
        sentences = []
        if not self.layercode_webhook_secret:
            sentences.append(
                "LAYERCODE_WEBHOOK_SECRET is not set: every webhook will be refused. "
                "Layercode's dashboard has it: your agent, Your Backend, Edit."
            )
        if not self.google_generative_ai_api_key:
            sentences.append(
                "GOOGLE_GENERATIVE_AI_API_KEY is not set: an offline stand-in "
                "replies. Get a key at https://aistudio.google.com/apikey."
            )
        if not self.layercode_api_key:
            sentences.append(
                "LAYERCODE_API_KEY is not set: no browser can be authorized. "
                "Layercode's dashboard has it: Settings."
            )
        return sentences


def is_origin(text: str) -> bool:
    """Whether text is a scheme and a host, as in https://app.example.com:8080."""
    scheme, separator, host = text.partition("://")
    return bool(scheme and separator and host) and "/" not in host


def read_dotenv(file: Path) -> dict[str, str]:
    """The variables of a .env file, with a shell's quotes and comments.

    There are none without the file. A value with a space, a quote or a # needs
    quotes around it. Raises SettingsError for a file that cannot be read, such
    as one in which a quote is not closed.
    """
    if not file.is_file():
        return {}
    try:
        words = shlex.split(file.read_text("utf-8-sig"), comments=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from None
    variables = {}
    for word in words:
        name, separator, value = word.partition("=")
        if separator:
            variables[name] = value
    return variables


# ---- History -------------------------------------------------------------------------

# Stands for the caller's words where there are none.
SILENCE = "(The caller says nothing.)"


@dataclass(slots=True)
class Turn:
    """What the caller said, and what became of the answer."""

    # Empty for a greeting, and where nothing was understood.
    user: str = ""
    # The words that were written to Layercode.
    spoken: str = ""
    # False while it is spoken, if it was cut off, and if its process died.
    finished: bool = False
    # What the caller heard of an answer they interrupted. Layercode reports it
    # with a later webhook, and it overrides everything else.
    heard: str | None = None
    # What reply() did beside speaking, as contents for the model. A reply()
    # that uses tools records it: README.md has the recipe.
    done: Sequence[Event] = ()
    # What is added to the turn's log line.
    remark: str = dataclasses.field(default="", compare=False)

    def answer(self) -> str:
        """The answer for the model: what the caller heard, as far as is known."""
        if self.finished and self.heard is None:
            return self.spoken
        words = self.spoken if self.heard is None else self.heard
        if words or self.done:
            return f"{words} [interrupted]".lstrip()
        return ""


class Histories:
    """What was said in each conversation, in memory.

    A store of your own overrides both methods. load() must show what was
    recorded before, in the order in which each turn was first recorded. Both
    may be called concurrently, for one conversation, too. If load() or the
    record of the caller's words raises, or takes longer than PATIENCE, the
    caller hears the apology. If the record of an answer does, or takes longer
    than RECORD_PATIENCE, only the log tells.
    """

    def __init__(self) -> None:
        # Those that are being answered, which must not be forgotten. Webhook
        # sets this.
        self.being_answered: Collection[str] = ()
        # The least recently used conversation comes first.
        self._conversations: dict[str, dict[str, Turn]] = {}

    async def load(self, conversation: str) -> dict[str, Turn]:
        """The conversation's turns by turn_id, oldest first; none if it is new."""
        return dict(self._conversations.get(conversation, {}))

    async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
        """Sets fields of a Turn, which is a new one if its turn_id is new.

        `user` is recorded before the model is asked, `spoken` and `finished`
        when the answer is over or cut off, and `heard` when it is reported,
        which may be before the others. Each call sets fields of its own, so
        their order does not matter.
        """
        turns = self._conversations.pop(conversation, {})
        self._conversations[conversation] = turns
        turns[turn_id] = dataclasses.replace(turns.get(turn_id, Turn()), **facts)
        if len(turns) > MAX_TURNS:
            oldest = next(iter(turns))
            del turns[oldest]
        if len(self._conversations) > MAX_CONVERSATIONS:
            self._forget_one()

    def _forget_one(self) -> None:
        for conversation in self._conversations:
            if conversation not in self.being_answered:
                del self._conversations[conversation]
                return


def contents(history: list[Turn]) -> list[Event]:
    """What Gemini is sent of a history, whose last turn is the one to answer.

    The caller and the model take turns, and the caller comes first and last.
    Of an answer that was interrupted, it has what the caller heard, once that
    is reported.
    """
    said: list[Event] = []
    unanswered: list[Event] = []
    for turn in history[:-1]:
        unanswered.append({"text": turn.user or SILENCE})
        answer = turn.answer()
        if answer or turn.done:
            said.append({"role": "user", "parts": unanswered})
            said.extend(turn.done)
            unanswered = []
        if answer:
            said.append({"role": "model", "parts": [{"text": answer}]})
    last = history[-1]
    unanswered.append({"text": last.user or SILENCE})
    said.append({"role": "user", "parts": unanswered})
    said.extend(last.done)
    return said


# ---- The signature -------------------------------------------------------------------


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

    The body is the bytes as they were received: the same JSON, parsed and
    written again, may have other bytes. Of several v1 signatures, which there
    are while a secret is being rotated, one must be right.
    """
    timestamp = ""
    signatures = []
    for part in header.split(","):
        name, _, value = part.partition("=")
        if name == "t":
            timestamp = value
        if name == "v1":
            signatures.append(value)
    # One of hundreds of digits could not be compared with the clock.
    is_number = timestamp.isascii() and timestamp.isdecimal() and len(timestamp) < 20
    if not is_number or abs(time.time() - int(timestamp)) > TOLERANCE:
        return False
    expected = sign(body, secret, timestamp).encode()
    for signature in signatures:
        # Bytes: compare_digest() refuses to compare a text that is not ASCII.
        given = f"t={timestamp},v1={signature}".encode(errors="replace")
        if hmac.compare_digest(expected, given):
            return True
    return False


# ---- Asking a model ------------------------------------------------------------------


class ModelError(Exception):
    """The model did not answer as it should; the message may be logged.

    If it is final, asking again would not help.
    """

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Ask(Generic[Piece]):
    """One request to a model, which a task of its own reads up to the first word."""

    def __init__(
        self, pieces: AsyncGenerator[Piece, None], has_words: Callable[[Piece], bool]
    ) -> None:
        self.pieces = pieces
        self.has_words = has_words
        self.opening = asyncio.create_task(self._read_opening())

    async def _read_opening(self) -> list[Piece]:
        """The pieces up to the first that has words."""
        opening = []
        async for piece in self.pieces:
            opening.append(piece)
            if self.has_words(piece):
                return opening
        raise ModelError("no words")

    def why_again(self) -> str:
        """Why the model should be asked again now; empty if it should not."""
        if not self.opening.done():
            return f"no word in {ASK_AGAIN_AFTER} s"
        error = self.opening.exception()
        if error is None or (isinstance(error, ModelError) and error.final):
            return ""
        return cause(error)

    async def close(self) -> None:
        """Ends the request, wherever it is."""
        self.opening.cancel()
        await asyncio.gather(self.opening, return_exceptions=True)
        await self.pieces.aclose()


async def ask_twice(
    ask: Callable[[], AsyncGenerator[Piece, None]],
    has_words: Callable[[Piece], bool],
    turn: Turn,
) -> AsyncGenerator[Piece, None]:
    """Yields what ask() yields, and calls ask() once more if no word has come.

    That is after ASK_AGAIN_AFTER seconds without a piece that has_words(), or at
    once when the first request fails. The two then race, so that a model that
    is always slow is not made slower, and the loser is cancelled. After the
    first word, nothing is asked again. turn.remark tells the log why the model
    was asked twice. If neither request speaks, raises the error of the one
    that failed last.
    """
    asks = [Ask(ask(), has_words)]
    try:
        await asyncio.wait([asks[0].opening], timeout=ASK_AGAIN_AFTER)
        why = asks[0].why_again()
        if why:
            turn.remark = f"asked twice: {why}"
            asks.append(Ask(ask(), has_words))
        winner = await first_to_speak(asks)
        for one in asks:
            if one is not winner:
                one.opening.cancel()
        for piece in winner.opening.result():
            yield piece
        async for piece in winner.pieces:
            yield piece
    finally:
        # All of them first, because this may itself be cancelled while it
        # waits.
        for one in asks:
            one.opening.cancel()
        for one in asks:
            await one.close()


async def first_to_speak(asks: list[Ask[Piece]]) -> Ask[Piece]:
    """The request whose first word comes first. Raises the last error if none has."""
    waiting = {one.opening: one for one in asks}
    while True:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for opening in done:
            one = waiting.pop(opening)
            error = opening.exception()
            if error is None:
                return one
            if not waiting:
                raise error


class Gemini:
    """Gemini, by google-genai, with a connection that is open before it is needed."""

    def __init__(self, settings: Settings, http: aiohttp.ClientSession) -> None:
        # Importing it takes longer than all the rest, so only with a key.
        from google import genai
        from google.genai.types import HttpOptions, HttpRetryOptions

        options = HttpOptions(
            aiohttp_client=http,
            # Left alone, it sleeps for seconds and asks again: see
            # ask_twice().
            retry_options=HttpRetryOptions(attempts=1),
        )
        key = settings.google_generative_ai_api_key
        client = genai.Client(api_key=key, http_options=options)
        self.settings = settings
        self.models = client.aio.models
        self.warming_up: asyncio.Task[None] | None = None

    def warm_up(self) -> None:
        """Connects in the background, unless that is already going on."""
        if self.warming_up is None or self.warming_up.done():
            self.warming_up = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        from google.genai.errors import APIError

        try:
            async with asyncio.timeout(WARM_UP_PATIENCE):
                await self.models.get(model=self.settings.gemini_model)
        except APIError as error:
            explained = self._explain(error)
            if explained.final:
                log.warning("Gemini will refuse to answer: %s", explained)
        except Exception as error:
            log.debug("no connection to Gemini ahead of a call: %s", cause(error))

    async def close(self) -> None:
        """Ends what goes on in the background."""
        if self.warming_up is not None:
            self.warming_up.cancel()
            await asyncio.gather(self.warming_up, return_exceptions=True)

    async def ask(
        self, said: list[Event], instruction: str, config: GenerateContentConfigDict
    ) -> AsyncGenerator[GenerateContentResponse, None]:
        """Asks once and yields Gemini's chunks, up to the one with the finish reason.

        Raises ModelError for an answer that is blocked or incomplete, and for
        Gemini's own errors; aiohttp's errors pass.
        """
        from google.genai.errors import APIError

        request = self._request(said, instruction, config)
        model = self.settings.gemini_model
        finished = False
        count = 0
        try:
            # The contents are in the config: see _request().
            chunks = await self.models.generate_content_stream(
                model=model, contents={}, config=request
            )
            try:
                async for chunk in chunks:
                    finished = is_last(chunk)
                    yield chunk
                    if finished:
                        return
                    count += 1
                    if count % BURST == 0:
                        await asyncio.sleep(0)
            finally:
                await let_go(chunks, STREAM_END_PATIENCE if finished else 0)
        except APIError as error:
            raise self._explain(error) from error
        raise ModelError("the answer broke off without a finish reason")

    def _request(
        self, said: list[Event], instruction: str, config: GenerateContentConfigDict
    ) -> GenerateContentConfigDict:
        # Every caller waits while google-genai builds contents: 0.25 ms a
        # message. An extra_body is only merged, 40 turns in 1.5 ms; its
        # contents replace the empty ones.
        body: Event = {"contents": said}
        if "system_instruction" not in config:
            body["systemInstruction"] = {"parts": [{"text": instruction}]}
        request: GenerateContentConfigDict = {
            "automatic_function_calling": {"disable": True}
        }
        thinking = self.settings.gemini_thinking
        if thinking in THINKING_LEVELS:
            from google.genai.types import ThinkingLevel

            request["thinking_config"] = {"thinking_level": ThinkingLevel(thinking)}
        elif thinking:
            request["thinking_config"] = {"thinking_budget": int(thinking)}
        options: HttpOptionsDict = config.get("http_options") or {}
        body.update(options.get("extra_body") or {})
        return {**request, **config, "http_options": {**options, "extra_body": body}}

    def _explain(self, error: APIError) -> ModelError:
        """What the log may say of Gemini's error: its code and status, no message."""
        told = f"{type(error).__name__} {error.code} {error.status}"
        if "API_KEY_INVALID" in str(error.details):
            told += " API_KEY_INVALID"
        elif error.code == 400 and "thinking" in str(error.message).lower():
            told += f": does GEMINI_THINKING={self.settings.gemini_thinking} suit "
            told += f"GEMINI_MODEL={self.settings.gemini_model}?"
        elif error.code == 404:
            told += f": is GEMINI_MODEL={self.settings.gemini_model} right?"
        return ModelError(told, final=error.code in (400, 401, 403, 404, 429))


def is_last(chunk: GenerateContentResponse) -> bool:
    """Whether a chunk ends the answer as it should. Raises ModelError if not so."""
    feedback = chunk.prompt_feedback
    if feedback and feedback.block_reason:
        raise ModelError(f"Gemini blocked the prompt: {feedback.block_reason.name}")
    if not chunk.candidates or not chunk.candidates[0].finish_reason:
        return False
    reason = chunk.candidates[0].finish_reason.name
    if reason not in ("STOP", "MAX_TOKENS"):
        raise ModelError(f"Gemini ended the answer: {reason}")
    return True


async def let_go(chunks: AsyncIterator[GenerateContentResponse], wait: float) -> None:
    """Makes google-genai release the connection of a stream, within `wait` seconds.

    A stream that is read to its end leaves its connection to the next
    question, and one that is cancelled while it is read closes it. With 0
    seconds the read is cancelled at once. A stream that is only closed keeps
    its connection until the garbage collector comes: googleapis/python-genai,
    issue 2425.
    """
    over = time.monotonic() + wait
    with contextlib.suppress(Exception):
        while True:
            async with asyncio.timeout(max(0, over - time.monotonic())):
                await anext(chunks)
            # What has come is only parsed: that, too, makes other callers wait.
            await asyncio.sleep(0)


def speaks(chunk: GenerateContentResponse) -> bool:
    """Whether a chunk has words, or asks for a tool."""
    return bool(chunk.function_calls or plain(chunk.text).strip())


def plain(words: str | None) -> str:
    """Words without the asterisks and backticks that would be read aloud."""
    return (words or "").replace("*", "").replace("`", "")


async def stand_in(history: list[Turn]) -> AsyncGenerator[str, None]:
    """What is said where there is no model: the last three turns, newest first."""
    said = [turn.user for turn in history if turn.user]
    recalled = "' and before that '".join(reversed(said[-3:]))
    words = (
        f"I'm the offline stand-in. You said '{recalled}'. "
        "Set GOOGLE_GENERATIVE_AI_API_KEY for Gemini."
    )
    for word in words.split():
        yield word + " "
        # Slowly enough for a person to interrupt.
        await asyncio.sleep(0.1)


# ---- The agent: make it yours --------------------------------------------------------


class Agent:
    """A voice agent. Make it yours in a subclass: override its words and its methods.

    `settings` and `histories` are what it was made with. While it serves,
    `http` is an aiohttp session for your own requests, and `gemini` is set if
    there is a key.
    """

    persona = "You're a friendly voice assistant on a call."
    voice_rules = (
        "Your words are read aloud: write plain spoken sentences, no Markdown, lists, "
        "emoji or symbols; spell out numbers, dates and units; use contractions; "
        "always punctuate. One or two sentences will do unless asked for more. "
        "[interrupted] marks where the caller stopped hearing you; never write it."
    )
    greeting = "Hi there! How can I help you today?"
    welcome_back = "Welcome back! Where were we?"
    # For what cannot be understood, and for what fails.
    apology = "Sorry, I didn't get that. Could you say it again?"

    http: aiohttp.ClientSession

    def __init__(
        self, settings: Settings | None = None, histories: Histories | None = None
    ) -> None:
        self.settings = Settings.load() if settings is None else settings
        self.histories = Histories() if histories is None else histories
        self.gemini: Gemini | None = None

    async def greet(self, event: Event, history: list[Turn]) -> Speech:
        """Yields what is said when a call begins.

        `event` is the webhook, with your custom_metadata, the page's metadata,
        or the caller's from_phone_number. `history` ends with a turn in which
        the caller has said nothing yet.
        """
        yield self.greeting if len(history) == 1 else self.welcome_back

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        """Yields the answer to the last turn of the history, piece by piece.

        A str is spoken the moment it is yielded; a dict is an event for
        Layercode, such as {"type": "response.data", "content": ...} for the
        page. It is cancelled when the caller interrupts, so let CancelledError
        pass. If it raises anything else, or yields nothing for PATIENCE
        seconds, the caller hears the apology.
        """
        if self.gemini is None:
            async for word in stand_in(history):
                yield word
            return
        async with contextlib.aclosing(self.ask(history)) as chunks:
            async for chunk in chunks:
                words = plain(chunk.text)
                if words:
                    yield words

    async def notice(self, event: Event) -> Event | None:
        """Takes a webhook that asks for no speech; returns the answer, if there is one.

        That is `data`, `session.update`, `session.end`, a `session.start`
        without a turn_id, or a type that is not known yet. An answer of type
        response.data is delivered to the page. Layercode may deliver a webhook
        twice.
        """
        return None

    async def admit(self, request: web.Request) -> Event:
        """Decides who may start a call; returns what Layercode is told about them.

        That may be custom_metadata, which comes with every webhook of the
        session, custom_headers, or config. Visitors cannot set these three.
        What the page sent, `await request.json()`, is the visitor's own words,
        and so are `metadata` and `conversation_id` in it. Raise
        web.HTTPForbidden(reason="...") to refuse.
        """
        return {}

    def instruction(self) -> str:
        """What the model is told before the conversation."""
        return f"{self.persona}\n{self.voice_rules}"

    def ask(
        self, history: list[Turn], config: GenerateContentConfigDict | None = None
    ) -> AsyncGenerator[GenerateContentResponse, None]:
        """Returns Gemini's answer to the last turn, as google-genai's chunks.

        `config` is google-genai's; what it says goes before the defaults here.
        If no word comes, Gemini is asked once more: see ask_twice(). Use the
        chunks with contextlib.aclosing(), as reply() does, so that an
        interruption ends them. Raises ModelError, aiohttp's errors, and
        RuntimeError without a key.
        """
        gemini = self.gemini
        if gemini is None:
            raise RuntimeError("GOOGLE_GENERATIVE_AI_API_KEY is not set")
        said = contents(history)
        instruction = self.instruction()

        def ask_once() -> AsyncGenerator[GenerateContentResponse, None]:
            return gemini.ask(said, instruction, config or {})

        return ask_twice(ask_once, speaks, history[-1])

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Opens `http` and `gemini`. make_app() uses it; so may a test."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=300)
        # Cookies for one visitor must not reach the next.
        no_cookies = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(
            connector=connector, cookie_jar=no_cookies
        ) as self.http:
            if self.settings.google_generative_ai_api_key:
                self.gemini = Gemini(self.settings, self.http)
                self.gemini.warm_up()
            try:
                yield
            finally:
                if self.gemini is not None:
                    await self.gemini.close()

    def make_app(self) -> web.Application:
        """The aiohttp application, to run, or to mount in one of your own.

        A runner of your own needs RUNNER_OPTIONS.
        """
        webhook = Webhook(self)
        pages = Pages(self)
        app = web.Application(middlewares=[pages.guard], client_max_size=MAX_BODY)
        app.add_routes(
            [
                web.get("/", say_up),
                web.post("/agent", webhook.receive),
                web.post("/api/agent", webhook.receive),
                web.options("/authorize", say_up),
                web.options("/api/authorize", say_up),
                web.post("/authorize", pages.authorize),
                web.post("/api/authorize", pages.authorize),
            ]
        )

        async def connections(app: web.Application) -> AsyncIterator[None]:
            async with self.connected():
                yield

        app.cleanup_ctx.append(connections)
        app.on_shutdown.append(webhook.stop)
        return app


# ---- The server ----------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Makes the answer that a Reply speaks.
Begin = Callable[["Reply"], Awaitable[Speech]]


class Reply:
    """An answer on its way to Layercode: what was written, and how long it took."""

    def __init__(self, request: web.Request, event: Event) -> None:
        self.request = request
        self.event = event
        self.conversation = conversation_of(event)
        self.turn_id = text_of(event, "turn_id")
        # As reply() gets it. What becomes of the answer is kept below, until
        # it is recorded.
        self.turn = Turn(user=words_of(event))
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache, no-transform",
                # Keeps nginx from holding the stream back.
                "X-Accel-Buffering": "no",
            }
        )
        self.task = asyncio.current_task()
        self.over = asyncio.Event()
        self.patience: asyncio.Timeout | None = None
        self.stopped = False
        self.spoken = ""
        self.finished = False
        # Whether it ends the call.
        self.hangs_up = False
        # Whether it only repeats what is recorded, which may be nothing.
        self.again = False
        self.outcome = "interrupted"
        self.log_level = logging.INFO
        self.chunks = 0
        self.started = time.monotonic()
        self.first_word: float | None = None

    async def speak(self, begin: Begin, apology: str) -> None:
        """Writes the answer that begin() returns, or the apology if that fails."""
        # If the connection is gone, the apology cannot be written either.
        with contextlib.suppress(ConnectionResetError):
            await self.response.prepare(self.request)
            cut_off = False
            try:
                await self._say_all(begin)
                outcome = "spoken again" if self.again else "spoken"
            except Exception as error:
                cut_off = self.stopped
                if cut_off:
                    outcome = "cut off by the stop"
                else:
                    outcome = f"failed: {self._why(error)}"
                    await self._apologize(apology, error)
            await self.say({"type": "response.end"})
            self.outcome = outcome
            self.finished = not cut_off

    async def _say_all(self, begin: Begin) -> None:
        """Writes the pieces of the answer the moment they come."""
        loop = asyncio.get_running_loop()
        # An attribute, because stop() ends the answer by ending the timeout.
        async with asyncio.timeout(PATIENCE) as self.patience:
            # begin() is within it, because it may have to wait for a store.
            async with contextlib.aclosing(await begin(self)) as pieces:
                async for piece in pieces:
                    await self.say(piece)
                    if not self.stopped:
                        self.patience.reschedule(loop.time() + PATIENCE)
        if not (self.spoken.strip() or self.hangs_up or self.again):
            raise ModelError("no words")

    async def _apologize(self, apology: str, error: Exception) -> None:
        """Says the apology, after what was said before the error."""
        log_stack(error)
        separator = " " if self.spoken else ""
        await self.say(separator + apology)
        self.log_level = logging.WARNING

    async def say(self, piece: str | Event) -> None:
        """Writes one piece as a frame. What is written counts as spoken.

        Raises ConnectionResetError if Layercode has gone, or has stopped
        reading.
        """
        if isinstance(piece, str):
            piece = {"type": "response.tts", "content": piece}
        frame = {**piece, "turn_id": self.turn_id}
        words = clean(words_of_frame(piece))
        if words:
            frame["content"] = words
        try:
            async with asyncio.timeout(WRITE_PATIENCE):
                await self.response.write(f"data: {json.dumps(frame)}\n\n".encode())
        except TimeoutError:
            self.outcome = "interrupted: Layercode has stopped reading"
            if self.request.transport is not None:
                self.request.transport.abort()
            raise ConnectionResetError("Layercode has stopped reading") from None
        self.spoken += words
        if words:
            self.chunks += 1
        if words.strip() and self.first_word is None:
            self.first_word = time.monotonic()
        if piece.get("type") == "response.hangup":
            self.hangs_up = True
        # However many pieces come at once, other callers are served in
        # between.
        await asyncio.sleep(0)

    def stop(self) -> None:
        """Ends the answer where it is, as one that was cut off."""
        self.stopped = True
        # If the timeout is already over, there is nothing to cut.
        with contextlib.suppress(RuntimeError):
            if self.patience is not None:
                self.patience.reschedule(asyncio.get_running_loop().time())

    def _why(self, error: Exception) -> str:
        """Why the answer failed, for the log."""
        if self.patience is not None and self.patience.expired():
            return f"TimeoutError: nothing came for {PATIENCE:g} s"
        return cause(error)

    def write_log(self) -> None:
        """Writes the log line of the turn: how it went, and its figures."""
        first_word = "none"
        if self.first_word is not None:
            first_word = f"{1000 * (self.first_word - self.started):.0f}ms"
        total = f"{1000 * (time.monotonic() - self.started):.0f}ms"
        line = f"conversation={self.conversation!r} turn={self.turn_id!r} "
        line += f"{self.outcome} first_word={first_word} total={total} "
        line += f"chunks={self.chunks}"
        if self.turn.remark:
            line += f" ({self.turn.remark})"
        log.log(self.log_level, "%s", line)


class Webhook:
    """Answers Layercode's webhooks for an agent: a turn with speech, or a notice."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        # The replies that are not over.
        self.replies: set[Reply] = set()
        # By conversation, the reply that is being spoken.
        self.speaking: dict[str, Reply] = {}
        agent.histories.being_answered = self.speaking
        # Tasks that asyncio itself would let go of before they are done.
        self.working: set[asyncio.Task[None]] = set()

    async def receive(self, request: web.Request) -> web.StreamResponse:
        """Answers a webhook: with speech, or with what notice() gives."""
        body = await read_body(request)
        secret = self.agent.settings.layercode_webhook_secret
        if not secret:
            raise web.HTTPInternalServerError(
                reason="LAYERCODE_WEBHOOK_SECRET is not set"
            )
        signature = request.headers.get("layercode-signature", "")
        if not signature:
            raise web.HTTPUnauthorized(
                reason="the header layercode-signature is missing"
            )
        if not verify(signature, body, secret):
            raise web.HTTPUnauthorized(
                reason="wrong signature: is LAYERCODE_WEBHOOK_SECRET this agent's, "
                "and the clock right?"
            )
        event = parse(body)
        # Every webhook must name its conversation, even one for notice().
        conversation_of(event)
        if asks_for_speech(event):
            return await self.answer(Reply(request, event))
        return web.json_response(await self.agent.notice(event) or {})

    async def answer(self, reply: Reply) -> web.StreamResponse:
        """Speaks a reply, to its end or until the caller interrupts.

        The whole story of an interruption: the caller speaks, so Layercode
        drops the connection. aiohttp then cancels this handler
        (handler_cancellation), wherever it waits. CancelledError is not an
        Exception, so speak() says no apology. On its way out it closes reply()
        and, in it, the stream from Gemini. Here the turn is logged, and
        recorded as not finished, with the words that were written; do_anyway()
        sees to that even if this handler is cancelled again. The caller's next
        webhook tells how much was heard. begin() records that, and from then
        on the model is shown those words and [interrupted]. If that webhook
        comes before the dropped connection is noticed, hush() cancels the
        earlier reply and waits for it. If the answer was already written to
        its end, there is nothing to cut off, and only the report comes.
        """
        self.replies.add(reply)
        try:
            await reply.speak(self.begin, self.agent.apology)
        finally:
            reply.write_log()
            await self.do_anyway(self.end(reply))
        return reply.response

    async def begin(self, reply: Reply) -> Speech:
        """Records what the webhook tells, and gives the answer that is to be spoken.

        A webhook may be delivered twice. If its turn is finished, or a later
        one has begun, the same words are spoken again, without other events,
        and nothing changes. If the turn is still being spoken, that reply is
        cut off, and this delivery gets a new one. If it was cut off and
        nothing came after it, it gets a new one, too. A turn that is no longer
        in the history counts as new.
        """
        conversation = reply.conversation
        # Before the model is asked, and even if the caller hangs up: no word
        # gets lost, and the turn has its place among the others.
        await self.do_anyway(self.record_words(reply))
        turns = await self.wait_for_the_floor(reply)
        # It is overtaken by a later reply, or it is past.
        if conversation in self.speaking or is_past(turns, reply.turn_id):
            reply.again = True
            return say_once(turns[reply.turn_id].spoken)
        self.speaking[conversation] = reply
        # What an earlier delivery did is shown to the model, so that it is not
        # done again.
        reply.turn.done = turns[reply.turn_id].done
        history = [
            turn
            for turn_id, turn in turns.items()
            # A report may come before the turn that it is about, or without
            # it.
            if turn_id != reply.turn_id and (turn.user or turn.spoken)
        ]
        history = [*history, reply.turn][-MAX_TURNS:]
        if reply.event["type"] != "message":
            if self.agent.gemini is not None:
                # While the caller listens, the connection opens for the first
                # reply.
                self.agent.gemini.warm_up()
            return self.agent.greet(reply.event, history)
        if not reply.turn.user:
            return say_once(self.agent.apology)
        return self.agent.reply(reply.event, history)

    async def wait_for_the_floor(self, reply: Reply) -> dict[str, Turn]:
        """Cuts off an earlier reply and waits for its end; returns the turns.

        They are loaded after the wait. A reply that began later than this one
        is left alone, and so is any if this turn is past.
        """
        while True:
            other = self.speaking.get(reply.conversation)
            turns = await self.agent.histories.load(reply.conversation)
            if self.speaking.get(reply.conversation) is not other:
                # Since they were loaded, a reply has begun or ended.
                continue
            if other is None or other.started > reply.started:
                return turns
            if is_past(turns, reply.turn_id):
                return turns
            await self.hush(other)

    async def hush(self, reply: Reply) -> None:
        """Cuts a reply off and waits until it is recorded."""
        # One that is finished has only to be recorded.
        if reply.task is not None and not reply.finished:
            reply.task.cancel()
        await reply.over.wait()

    async def do_anyway(self, work: Coroutine[None, None, None]) -> None:
        """Does some work to its end, even if the caller hangs up meanwhile."""
        task = asyncio.create_task(work)
        self.working.add(task)
        task.add_done_callback(self.working.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # Left alone, asyncio would log an error with its message.
            task.add_done_callback(log_failure)
            raise

    async def record_words(self, reply: Reply) -> None:
        """Records what the webhook tells: the caller's words, and what they heard."""
        histories = self.agent.histories
        interruption = interruption_of(reply.event)
        if interruption is not None:
            # First, so that this turn is the last one even if that one is
            # unknown.
            await histories.record(
                reply.conversation, interruption.turn_id, heard=interruption.heard
            )
        await histories.record(reply.conversation, reply.turn_id, user=reply.turn.user)

    async def end(self, reply: Reply) -> None:
        """Records what was spoken, and lets the next reply begin."""
        conversation = reply.conversation
        # Without it, this was a repetition, or ended before it had begun.
        has_the_floor = self.speaking.get(conversation) is reply
        try:
            if has_the_floor:
                await self.record_answer(reply)
        finally:
            if has_the_floor:
                del self.speaking[conversation]
            self.replies.discard(reply)
            reply.over.set()

    async def record_answer(self, reply: Reply) -> None:
        """Records what was spoken. The log tells if the store does not take it."""
        try:
            async with asyncio.timeout(RECORD_PATIENCE):
                await self.agent.histories.record(
                    reply.conversation,
                    reply.turn_id,
                    spoken=reply.spoken,
                    finished=reply.finished,
                )
        except Exception as error:
            name = reply.conversation
            log.error("conversation=%r is not recorded: %s", name, cause(error))
            log_stack(error)

    async def stop(self, app: web.Application) -> None:
        """Lets the replies in flight go on for GRACE seconds, then cuts them off."""
        await self.wait_for_replies(GRACE)
        for reply in self.replies:
            reply.stop()
        await self.wait_for_replies(1)

    async def wait_for_replies(self, seconds: float) -> None:
        """Waits until all replies are over, for so many seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for reply in list(self.replies):
                    await reply.over.wait()


class Pages:
    """Answers web pages for an agent: authorizes them, and turns strangers away."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns pages of other origins away, and every error into JSON."""
        origin = request.headers.get("Origin", "")
        allowed = self._is_allowed(origin)
        try:
            if origin and not allowed:
                raise web.HTTPForbidden(
                    reason="the page's origin is not in ALLOWED_ORIGINS"
                )
            response = await handler(request)
        except web.HTTPException as error:
            asked = f"{request.method} {request.path[:60]!r}"
            if origin:
                asked += f" from a page of {origin[:60]!r}"
            log.warning("%s: %d %s", asked, error.status, error.reason)
            response = error_response(error.status, error.reason)
        except Exception as error:
            if request.transport is None:
                # Nobody is there to be told, and aiohttp ignores it.
                raise
            log.error("%s %.60r failed: %s", request.method, request.path, cause(error))
            log_stack(error)
            response = error_response(500, "the agent failed: its log says where")
        if allowed:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Allow-Headers"] = (
                "Authorization, Content-Type"
            )
            response.headers["Vary"] = "Origin"
        await send(request, response)
        return response

    def _is_allowed(self, origin: str) -> bool:
        for pattern in self.agent.settings.origins():
            # To fnmatch, the [ of an IPv6 address would begin a set of
            # characters.
            if fnmatch.fnmatchcase(origin, pattern.replace("[", "[[]")):
                return True
        return False

    async def authorize(self, request: web.Request) -> web.Response:
        """Gets a page its session: Layercode's answer, while the API key stays here."""
        body = await read_body(request)
        if len(body) > MAX_PAGE:
            raise web.HTTPRequestEntityTooLarge(MAX_PAGE, len(body))
        page = parse(body)
        settings = self.agent.settings
        key = settings.layercode_api_key
        if not key:
            raise web.HTTPInternalServerError(reason="LAYERCODE_API_KEY is not set")
        agent_id = text_of(page, "agent_id", "pipeline_id")
        only = settings.layercode_agent_id
        if only and agent_id != only:
            raise web.HTTPForbidden(reason="agent_id is not LAYERCODE_AGENT_ID")
        # The page's fields are copied one by one, because Layercode would take
        # others, too: with a config, a visitor could have the session call a
        # webhook and a model of their own.
        session: Event = {"agent_id": agent_id}
        conversation = page.get("conversation_id") or page.get("session_id")
        if conversation:
            session["conversation_id"] = conversation
        for name in ("metadata", "sdk_version"):
            if page.get(name) is not None:
                session[name] = page[name]
        session.update(await self.agent.admit(request))
        status, answer = await self._ask_layercode(session)
        # An answer that quotes the request must not show the page the key.
        answer = answer.replace(key.encode(), b"***")
        reason = reason_of(status, answer)
        return web.Response(
            body=answer, status=status, reason=reason, content_type="application/json"
        )

    async def _ask_layercode(self, session: Event) -> tuple[int, bytes]:
        """Layercode's answer to a request for a session: its status and its body."""
        settings = self.agent.settings
        url = (
            settings.layercode_api_url.rstrip("/") + "/v1/agents/web/authorize_session"
        )
        headers = {"Authorization": f"Bearer {settings.layercode_api_key}"}
        body = bytearray()
        try:
            async with (
                asyncio.timeout(AUTHORIZE_PATIENCE),
                self.agent.http.post(
                    url, json=session, headers=headers, allow_redirects=False
                ) as response,
            ):
                async for piece in response.content.iter_any():
                    body += piece
                    if len(body) > MAX_BODY:
                        raise web.HTTPBadGateway(
                            reason="Layercode's answer does not end"
                        )
        except TimeoutError:
            raise web.HTTPGatewayTimeout(
                reason=f"Layercode did not answer within {AUTHORIZE_PATIENCE:g} s"
            ) from None
        except aiohttp.ClientError as error:
            raise web.HTTPBadGateway(
                reason=f"Layercode could not be reached: {type(error).__name__}"
            ) from None
        return response.status, bytes(body)


async def say_up(request: web.Request) -> web.Response:
    """Answers health checks, and preflights: Pages.guard() adds their headers."""
    return web.Response(text="The agent is up.\n")


async def send(request: web.Request, response: web.StreamResponse) -> None:
    """Sends a response to its end. Drops a client that does not read it.

    aiohttp itself would wait for ever.
    """
    try:
        async with asyncio.timeout(WRITE_PATIENCE):
            await response.prepare(request)
            await response.write_eof()
        if response.status == 408:
            # The rest of the body has had its time. aiohttp would read on.
            request.protocol.force_close()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        # The client has gone, so nobody misses the rest.
        pass


def error_response(status: int, reason: str) -> web.Response:
    """An error as JSON. The browser SDK shows the page only the reason phrase."""
    return web.json_response({"error": reason}, status=status, reason=reason)


def reason_of(status: int, body: bytes) -> str:
    """The reason phrase for an answer of Layercode's REST API.

    Raises HTTPBadGateway for an answer that is not for the page.
    """
    if status == 200:
        return "OK"
    error: object = None
    if status in (400, 402):
        with contextlib.suppress(web.HTTPBadRequest):
            error = parse(body).get("error")
    if not isinstance(error, str):
        raise web.HTTPBadGateway(reason=f"Layercode answered {status}")
    printable = [letter if " " <= letter <= "~" else " " for letter in error]
    words = "".join(printable).split()
    return " ".join(words)[:200]


def is_past(turns: dict[str, Turn], turn_id: str) -> bool:
    """Whether a turn will not be answered any more: finished, or not the last one."""
    return turns[turn_id].finished or turn_id != list(turns)[-1]


async def say_once(words: str) -> Speech:
    """Yields the words, if there are any."""
    if words:
        yield words


async def read_body(request: web.Request) -> bytes:
    """A request's body as it was sent. Raises HTTPException for one that is not taken.

    That is one that is compressed, larger than MAX_BODY, broken, or too slow.
    """
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise web.HTTPUnsupportedMediaType(reason="a compressed body is not taken")
    try:
        async with asyncio.timeout(BODY_PATIENCE):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(
            reason=f"the body did not end within {BODY_PATIENCE:g} s"
        ) from None
    except web.RequestPayloadError:
        raise web.HTTPBadRequest(reason="the body does not match its headers") from None


def parse(body: bytes) -> Event:
    """The JSON object in a body. Raises HTTPBadRequest if there is none."""
    event: object = None
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(text)
        # JSON can spell half of a character, such as \ud83d.
        if "\\ud" in text.lower():
            text = clean(json.dumps(event, ensure_ascii=False))
            event = json.loads(text)
    if not isinstance(event, dict):
        raise web.HTTPBadRequest(reason="the body is not a JSON object")
    return event


def clean(text: str) -> str:
    """A text with a ? in the place of each lone surrogate, which nothing can encode."""
    return text.encode(errors="replace").decode()


def text_of(event: Event, name: str, older_name: str = "") -> str:
    """The text under a name, or under the older name of the same thing.

    Raises HTTPBadRequest if there is none, or something that is not a text.
    """
    value = event.get(name)
    if older_name and (value is None or value == ""):
        value = event.get(older_name)
    if not isinstance(value, str) or not value:
        raise web.HTTPBadRequest(reason=f"{name} is missing or not a text")
    return value


def conversation_of(event: Event) -> str:
    """The conversation of a webhook. Raises HTTPBadRequest without one.

    The oldest webhooks have no conversation_id: there, the session is it.
    """
    return text_of(event, "conversation_id", "session_id")


def asks_for_speech(event: Event) -> bool:
    """Whether a webhook is answered with speech. Raises HTTPBadRequest without type."""
    kind = text_of(event, "type")
    if kind == "session.start":
        # Without a turn_id it is a mere notice.
        return event.get("turn_id") is not None
    return kind in ("message", "welcome")


def words_of(event: Event) -> str:
    """The caller's words in a webhook; none in a greeting. Raises HTTPBadRequest."""
    if event["type"] != "message":
        return ""
    # An empty transcript is no error, a missing one is.
    if "text" in event and event["text"] in ("", None):
        return ""
    return text_of(event, "text").strip()


def words_of_frame(frame: Event) -> str:
    """The words that a frame speaks; none in one of another type."""
    if frame.get("type") == "response.tts":
        return str(frame.get("content", ""))
    return ""


@dataclass(frozen=True)
class Interruption:
    """What the caller heard of an earlier turn."""

    turn_id: str
    heard: str


def interruption_of(event: Event) -> Interruption | None:
    """What a webhook reports of an interruption, if it does."""
    match event.get("interruption_context"):
        case {
            "previous_turn_interrupted": True,
            "assistant_turn_id": str(turn_id),
            "text_heard": str(heard),
        }:
            return Interruption(turn_id, heard)
    return None


# ---- The log -------------------------------------------------------------------------


def cause(error: BaseException) -> str:
    """What the log says of an error: its type and place, or a ModelError's message.

    The message of another may hold a key or what a caller said.
    """
    if isinstance(error, ModelError):
        return str(error)
    # The standard library, what is installed, and code that stands in no file.
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(libraries):
            place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} at {place}"


def log_failure(task: asyncio.Task[None]) -> None:
    """Logs why a task failed that nobody waits for any more, if it did."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.error("a record failed after a hang-up: %s", cause(error))
        log_stack(error)


def log_stack(error: BaseException) -> None:
    """Writes where an error came from, without its message, if LOG_LEVEL is DEBUG."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    log.debug("%s\n%s", cause(error), stack)


LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class Brief(logging.Filter):
    """Shortens what strangers can have aiohttp and asyncio log.

    Malformed HTTP, and more connections than files may be open, become one
    line a second at most, without a traceback. All else passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.silent_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be written."""
        error = record.exc_info[1] if record.exc_info else None
        no_files = isinstance(error, OSError) and error.errno == errno.EMFILE
        if not no_files and not isinstance(error, HttpProcessingError):
            return True
        now = time.monotonic()
        if now < self.silent_until:
            return False
        self.silent_until = now + 1
        first_line = record.getMessage().splitlines()[0]
        record.msg = f"{first_line}: {type(error).__name__}"
        record.args = ()
        record.exc_info = None
        return True


# ---- The terminal client -------------------------------------------------------------


class CallError(Exception):
    """Why a webhook could not be called: a sentence for whoever set it up."""


class Call:
    """A call to the agent at a webhook's URL, as Layercode makes it."""

    def __init__(self, http: aiohttp.ClientSession, url: str, secret: str) -> None:
        self.http = http
        self.url = url
        self.secret = secret
        self.conversation = secrets.token_hex(8)
        self.turn_id = ""
        # The words of the answer so far.
        self.heard = ""

    def event(self, kind: str, **more: Any) -> Event:
        """A webhook that begins a new turn; forgets what was heard of the last."""
        self.turn_id = secrets.token_hex(8)
        self.heard = ""
        event = {
            "type": kind,
            "session_id": "terminal",
            "conversation_id": self.conversation,
            "turn_id": self.turn_id,
        }
        return {**event, **more}

    def interruption(self) -> Event:
        """What the next message reports if the caller has interrupted this answer."""
        return {
            "previous_turn_interrupted": True,
            "words_heard": len(self.heard.split()),
            "text_heard": self.heard,
            "assistant_turn_id": self.turn_id,
        }

    async def send(self, event: Event) -> AsyncGenerator[Event, None]:
        """Sends a webhook, signed as by Layercode, and yields the frames of the answer.

        Closing it before the end drops the connection, as Layercode does when
        the caller interrupts. Raises CallError.
        """
        if not self.url.lower().startswith(("http://", "https://")):
            raise CallError(f"{self.url} is not a URL: does it begin with https://?")
        body = json.dumps(event).encode()
        headers = {
            "Content-Type": "application/json",
            "layercode-signature": sign(body, self.secret),
        }
        timeout = aiohttp.ClientTimeout(
            total=None, connect=CALL_PATIENCE, sock_read=CALL_PATIENCE
        )
        try:
            async with self.http.post(
                self.url,
                data=body,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                check_answer(response)
                kinds = set()
                async for line in response.content:
                    if line.startswith(b"data:"):
                        frame = parse_frame(line, event)
                        self.heard += words_of_frame(frame)
                        kinds.add(frame.get("type"))
                        yield frame
                    if "response.end" in kinds:
                        break
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise CallError(explain_call(self.url, error)) from None
        if not self.heard.strip() and "response.hangup" not in kinds:
            raise CallError(
                "The answer had no words. Is this the webhook of a voice agent?"
            )
        if "response.end" not in kinds:
            raise CallError(
                "The answer ended without response.end, so Layercode would go on "
                "waiting. What does the agent's log say?"
            )


def check_answer(response: aiohttp.ClientResponse) -> None:
    """Raises CallError for an answer that is not an event stream."""
    status = f"{response.status} {response.reason}"
    if response.status in (301, 302, 303, 307, 308):
        location = response.headers.get("Location", "nowhere")
        raise CallError(
            f"It redirects to {location} ({status}). "
            "Layercode needs the URL that answers by itself."
        )
    if response.status == 401:
        raise CallError(
            f"It refuses the signature ({status}). Is LAYERCODE_WEBHOOK_SECRET "
            "the same here and there, and are both clocks right?"
        )
    if response.status >= 500:
        raise CallError(f"It answers {status}. Is the agent running? See its log.")
    if response.status != 200:
        raise CallError(f"It answers {status}. Does the URL end in /agent?")
    if response.content_type != "text/event-stream":
        raise CallError(
            f"It answers with {response.content_type} where an event stream should be. "
            "Is this the tunnel's own page, or another server?"
        )


def parse_frame(line: bytes, event: Event) -> Event:
    """The JSON object of a frame, which answers a webhook. Raises CallError."""
    frame: object = None
    with contextlib.suppress(ValueError, RecursionError):
        frame = json.loads(line.removeprefix(b"data:"))
    if not isinstance(frame, dict):
        raise CallError(
            f"It sends a frame that is not a JSON object: {line[:60]!r}. "
            "Is something between here and the agent changing the stream?"
        )
    if frame.get("turn_id") != event.get("turn_id"):
        raise CallError(
            f"It sends a frame of another turn: {line[:200]!r}. "
            "Each needs the turn_id of the webhook that it answers."
        )
    return frame


def explain_call(url: str, error: Exception) -> str:
    """What an error of aiohttp's means to whoever has set up a webhook."""
    if isinstance(error, aiohttp.InvalidURL | UnicodeError):
        return f"{url} is not a URL: has it a host, and a port up to 65535?"
    host = urlsplit(url).netloc
    if isinstance(error, TimeoutError):
        return (
            f"{host} has sent nothing for {CALL_PATIENCE:g} seconds. "
            "Is the agent behind it running?"
        )
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return (
            f"The certificate of {host} is not valid. "
            "Has it run out, is it for another name, or did you sign it yourself?"
        )
    if isinstance(error, aiohttp.ClientSSLError):
        return f"{host} does not speak HTTPS. Should the URL begin with http://?"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"There is no {host}. Is the tunnel open, and the name right?"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"Nothing listens at {host}. Is the agent, or the tunnel, running?"
    return f"{host} broke the answer off ({type(error).__name__}). See the agent's log."


# Control characters, which a terminal would obey, but for the line break.
CONTROLS = dict.fromkeys([*range(10), *range(11, 32), *range(127, 160)])


class Terminal:
    """The person's end of a chat: keys in, words out.

    The first key that is typed while the agent speaks interrupts it. Where the
    input or the output is not a terminal, nothing interrupts.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.has_colours = has_colours()
        # Whether the cursor is not at the start of a line.
        self.line_begun = False
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                # With it, input() takes up the key that has interrupted.
                importlib.import_module("readline")

    def show(self, text: str, style: str = "") -> None:
        """Prints a text; style is an ANSI code such as "2" for dim."""
        if not text:
            return
        self.line_begun = not text.endswith("\n")
        if style and self.has_colours:
            text = f"\033[{style}m{text}\033[0m"
        print(text, end="", flush=True)

    def end_line(self) -> None:
        """Goes to the next line, unless it is new already."""
        if self.line_begun:
            self.show("\n")

    def write(self, line: str) -> None:
        """Prints a line of the log on a line of its own: the terminal is its stream."""
        self.end_line()
        print(line, end="", file=sys.stderr, flush=True)

    def show_frame(self, frame: Event) -> None:
        """Prints what a frame has for a person."""
        self.show(words_of_frame(frame).translate(CONTROLS), "36")
        if frame.get("type") == "response.data":
            self.end_line()
            self.show(json.dumps(frame.get("content")), "2")
            self.end_line()

    async def read_message(self) -> str | None:
        """What the person says; None when they hang up.

        Enter alone says nothing. Lines that are pasted are one message.
        """
        lines: list[str] = []
        while not lines or self.key_waits():
            line = await self.read_line()
            if line is None:
                break
            if line.strip():
                lines.append(line)
        return " ".join(lines) or None

    async def read_line(self) -> str | None:
        """What the person types up to Enter; None at the end of the input."""
        loop = asyncio.get_running_loop()
        line: asyncio.Future[str | None] = loop.create_future()

        def read() -> None:
            text = self._input()
            # The loop has ended if the person hung up with Ctrl-C.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(line.set_result, text)

        # In a thread, so that the agent can go on; a daemon, so that Ctrl-C
        # can end it.
        threading.Thread(target=read, daemon=True).start()
        self.line_begun = self.is_terminal
        text = await line
        self.line_begun = self.is_terminal and text is None
        return text

    def _input(self) -> str | None:
        if self.is_terminal:
            with contextlib.suppress(EOFError):
                return input("> ")
            return None
        # Without sys.stdin, whose lock would keep Ctrl-C from ending the
        # process.
        line = io.FileIO(sys.stdin.fileno(), closefd=False).readline()
        return line.decode(errors="replace").rstrip("\r\n") if line else None

    def forget_keys(self) -> None:
        """Drops what was typed before the chat, which would interrupt the greeting."""
        if sys.platform == "win32":
            import msvcrt

            while msvcrt.kbhit():
                msvcrt.getwch()
            return
        import termios

        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)

    def key_waits(self) -> bool:
        """Whether a key was typed that nobody has read."""
        if not self.is_terminal:
            return False
        if sys.platform == "win32":
            import msvcrt

            return msvcrt.kbhit()
        return bool(select.select([sys.stdin], [], [], 0)[0])

    async def key_typed(self) -> None:
        """Returns when a key waits to be read, which read_line() will do."""
        while not self.key_waits():
            await asyncio.sleep(0.02)

    @contextlib.contextmanager
    def restored(self, *, keys_at_once: bool = False) -> Iterator[None]:
        """Leaves the terminal in the modes in which it was, whatever happens.

        With keys_at_once, keys meanwhile arrive when they are typed, not with
        Enter, and are not printed.
        """
        if sys.platform == "win32" or not self.is_terminal:
            yield
            return
        import termios

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
        if keys_at_once:
            during = termios.tcgetattr(keyboard)
            local_modes = 3
            during[local_modes] &= ~(termios.ECHO | termios.ICANON)
            termios.tcsetattr(keyboard, termios.TCSANOW, during)
        try:
            yield
        finally:
            termios.tcsetattr(keyboard, termios.TCSANOW, before)


def has_colours() -> bool:
    """Whether what is printed may have colours."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return False
    if sys.platform == "win32":
        # The console before Windows Terminal would print the codes.
        return "WT_SESSION" in os.environ
    return os.environ.get("TERM", "dumb") != "dumb"


class Chat:
    """A conversation between a person at a terminal and an agent at a URL."""

    def __init__(self, call: Call, terminal: Terminal) -> None:
        self.call = call
        self.terminal = terminal
        self.hung_up = False

    async def run(self) -> None:
        """Talks until one of the two hangs up. Raises CallError."""
        with self.terminal.restored():
            try:
                await self.talk()
            finally:
                self.terminal.end_line()

    async def talk(self) -> None:
        """Takes turns with the agent, whose greeting comes first. Raises CallError."""
        if self.terminal.is_terminal:
            self.terminal.forget_keys()
            self.terminal.show(
                "Type while the agent speaks to interrupt it. "
                "Hang up with Ctrl-D or Ctrl-C.\n\n"
            )
        event = self.call.event("session.start")
        while True:
            interrupted = await self.listen(event)
            if self.hung_up:
                self.terminal.show("(the agent hung up)\n")
                return
            message = await self.terminal.read_message()
            if message is None:
                return
            report = {}
            if interrupted:
                report["interruption_context"] = self.call.interruption()
            event = self.call.event("message", text=message, **report)

    async def listen(self, event: Event) -> bool:
        """Prints the answer to a webhook; returns whether a key interrupted it."""
        with self.terminal.restored(keys_at_once=True):
            answer = asyncio.create_task(self._print_answer(event))
            key = asyncio.create_task(self.terminal.key_typed())
            try:
                await asyncio.wait([answer, key], return_when=asyncio.FIRST_COMPLETED)
                interrupted = not answer.done()
            finally:
                key.cancel()
                answer.cancel()
                await asyncio.wait([answer, key])
        self.terminal.end_line()
        if not interrupted:
            answer.result()
        return interrupted

    async def _print_answer(self, event: Event) -> None:
        async with contextlib.aclosing(self.call.send(event)) as frames:
            async for frame in frames:
                self.terminal.show_frame(frame)
                if frame.get("type") == "response.hangup":
                    self.hung_up = True


async def chat(agent: Agent, url: str) -> None:
    """Chats with the agent at a URL or, without a URL, with this one, served here.

    Raises CallError.
    """
    terminal = Terminal()
    logging.basicConfig(format=LOG_FORMAT, stream=terminal)
    async with aiohttp.ClientSession() as http:
        if url:
            secret = agent.settings.layercode_webhook_secret
            if not secret:
                raise CallError(
                    "LAYERCODE_WEBHOOK_SECRET is not set: the webhook would refuse us."
                )
            await Chat(Call(http, url, secret), terminal).run()
            return
        secret = secrets.token_hex(16)
        agent.settings = dataclasses.replace(
            agent.settings, layercode_webhook_secret=secret
        )
        runner = web.AppRunner(agent.make_app(), **RUNNER_OPTIONS)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            own_url = f"http://127.0.0.1:{port}/agent"
            await Chat(Call(http, own_url, secret), terminal).run()
        finally:
            await runner.cleanup()


# ---- The command line ----------------------------------------------------------------


def allow_many_files() -> None:
    """Lets the process have as many connections as the system allows.

    Most systems allow it 1,024 files at first, and more if it asks.
    """
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses what it reports as the most.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def give_memory_back(app: web.Application) -> AsyncIterator[None]:
    """Returns the memory of what is gone, such as large bodies, to the system.

    Left alone, glibc keeps about as much as was once in use.
    """

    async def now_and_then() -> None:
        try:
            trim = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError, TypeError):
            # Only glibc has it.
            return
        while True:
            await asyncio.sleep(MEMORY_KEPT)
            trim(0)

    task = asyncio.create_task(now_and_then())
    yield
    task.cancel()


def serve(agent: Agent) -> None:
    """Serves the agent until the process is told to stop."""
    settings = agent.settings
    lines = [f"Up: http://{settings.host}:{settings.port}", *settings.missing()]
    if settings.layercode_api_key and type(agent).admit is Agent.admit:
        lines.append(
            "Everyone who reaches /authorize may start calls on your Layercode "
            "account: override admit() to check who they are."
        )
    tunnel = f"cloudflared tunnel --url http://localhost:{settings.port}"
    lines.append(f"Next: open a tunnel, for instance with {tunnel}")

    def when_up(_: str) -> None:
        # aiohttp calls this once it listens. From now on,
        # google-genai's 100,000 objects are here to stay. Whenever the garbage
        # collector looked at them, every caller would wait for 60 ms.
        gc.freeze()
        print(*lines, sep="\n", flush=True)

    allow_many_files()
    app = agent.make_app()
    app.cleanup_ctx.append(give_memory_back)
    for name in ("aiohttp.server", "asyncio"):
        logging.getLogger(name).addFilter(Brief())
    web.run_app(
        app,
        host=settings.host,
        port=settings.port,
        print=when_up,
        **RUNNER_OPTIONS,
    )


def read_arguments() -> argparse.Namespace:
    """The command line. Exits with a usage line and status 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        description="A Layercode voice agent. Without arguments, it is served."
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["chat"],
        metavar="chat",
        help="talk to the agent in the terminal; no API key needed",
    )
    parser.add_argument(
        "url",
        nargs="?",
        default="",
        metavar="URL",
        help="a webhook's URL: talk to the agent behind it, as Layercode would",
    )
    return parser.parse_args()


def main(agent: type[Agent] = Agent) -> None:
    """Serves the agent, or chats with it, as the command line says.

    A wrong setting, a webhook that cannot be called, and an address that is
    already in use end it with one line and status 1.
    """
    arguments = read_arguments()
    program = Path(sys.argv[0]).name
    try:
        one = agent()
    except SettingsError as error:
        sys.exit(f"{program}: {error}")
    log.setLevel(one.settings.log_level)
    try:
        if arguments.command == "chat":
            if one.settings.log_level == "INFO":
                # A line for each turn would stand between the words.
                log.setLevel("WARNING")
            asyncio.run(chat(one, arguments.url))
        else:
            logging.basicConfig(format=LOG_FORMAT)
            serve(one)
    except KeyboardInterrupt:
        sys.exit(0)
    except (CallError, SettingsError) as error:
        sys.exit(f"{program}: {error}")
    except OSError as error:
        address = f"{one.settings.host}:{one.settings.port}"
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"{program}: {address} is in use. Is the agent running already?")
        sys.exit(f"{program}: {error}")


if __name__ == "__main__":
    main()
