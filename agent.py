"""A backend for a Layercode voice agent: signed webhook in, speech out, in one file.

caller ── audio ──► Layercode ── POST /agent, signed JSON ──► agent.py ──► Gemini
caller ◄─ audio ─── Layercode ◄── Server-Sent Events ──────── agent.py ◄── text
browser ── POST /authorize ──► agent.py ── with the API key ──► Layercode REST API
python agent.py             serve Layercode's webhooks and authorize browsers
python agent.py chat [URL]  talk in the terminal to this agent, keys or not, or to one elsewhere by its webhook's URL
"""

import asyncio, contextvars, fnmatch, hashlib, hmac, json, logging, os
import pathlib, re, select, sys, time, traceback, types, weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any
from aiohttp import ClientError, ClientSession, TCPConnector, web

log = logging.getLogger("agent")
Event = dict[str, Any]  # a webhook, or one event of the answer
Answer = AsyncGenerator[str | Event, None]  # words to speak and events to send, as they come
running = contextvars.ContextVar[Any]("running")  # the app at work: see make_app()
answering: Any = weakref.WeakValueDictionary()  # in a conversation, the task that speaks; gone when it ends

# ---- settings --------------------------------------------------------------------------------------------------------
VARIABLES = {  # name: default, what can be right, what is missing without it
    "LAYERCODE_WEBHOOK_SECRET": ("", ".*", "all webhooks will be refused. Dashboard: your agent, Your Backend, Edit"),
    "GOOGLE_GENERATIVE_AI_API_KEY": ("", ".*", "replies are an offline stand-in's. https://aistudio.google.com/apikey"),
    "LAYERCODE_API_KEY": ("", ".*", "no browser can be authorized. Dashboard: Settings"),
    "GEMINI_MODEL": ("gemini-3.5-flash-lite", r"\S+", ""),
    "LAYERCODE_AGENT_ID": ("", ".*", ""),  # if set, the only agent that browsers are authorized for
    "ALLOWED_ORIGINS": ("*://localhost,*://localhost:*,*://127.0.0.1,*://127.0.0.1:*", r"(\S+://[^\s,/]+[\s,]*)+", ""),
    "HOST": ("127.0.0.1", r"\S+", ""),
    "PORT": ("3000", r"[0-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]", ""),
    "LAYERCODE_API_URL": ("https://api.layercode.com", r"https?://[^\s/]+", ""),
    "LOG_LEVEL": ("INFO", "DEBUG|INFO|WARNING|ERROR", ""),
}
DOTENV = r"""(?m)^\s*(?:export\s+)?(\w+)[ \t]*=[ \t]*(?:'(.*?)'|"((?:\\.|[^"\\])*)"|(.*?))[ \t]*(?:(?<=\s)#.*)?$"""


def load_settings() -> dict[str, str]:
    """VARIABLES from the environment, else .env, else the default. Raises ValueError naming what cannot be right."""
    file = pathlib.Path(__file__).with_name(".env")
    lines = re.findall(DOTENV, file.read_text("utf-8-sig")) if file.exists() else []
    given = {key: single or re.sub(r"\\(.)", r"\1", double) or bare for key, single, double, bare in lines} | os.environ
    settings = {name: given.get(name, "").strip() or default for name, (default, _, _) in VARIABLES.items()}
    if wrong := [f"{name}={value}" for name, value in settings.items() if not re.fullmatch(VARIABLES[name][1], value)]:
        raise ValueError(f"{wrong[0]} cannot be right: see .env.example")
    return settings


# ---- the agent: make it yours ----------------------------------------------------------------------------------------
SYSTEM_PROMPT = """You're a friendly voice assistant on a call. Your words are read aloud: write plain spoken sentences,
no Markdown, lists, emoji or symbols; spell out numbers, dates and units; use contractions; always punctuate. One or two
sentences will do unless asked for more. [interrupted] marks where the caller stopped hearing you; never write it."""
GREETING, WELCOME_BACK = "Hi there! How can I help you today?", "Welcome back! Where were we?"
APOLOGY = "Sorry, I didn't get that. Could you say it again?"  # for what can't be understood, and what fails
PATIENCE, AUTHORIZE_PATIENCE = 8.0, 10.0  # seconds to wait: for reply()'s next word, then for Layercode's REST API
RETRY = {"attempts": 2, "initial_delay": 0.25, "jitter": 0, "http_status_codes": [500, 502, 503, 504]}  # of Gemini, s
TOLERANCE = 300  # seconds that a signature may be off, as in Layercode's Node SDK
MAX_TURNS, MAX_CONVERSATIONS = 50, 10_000  # the last ones: sent to the model, kept in memory
FORWARDED = "agent_id", "conversation_id", "metadata", "sdk_version"  # "config" would let visitors replace the webhook


async def reply(event: Event, history: list["Turn"]) -> Answer:
    """Yields the answer to history's last turn: a str is spoken, a dict sent as an event. event is the webhook."""
    if not running.get().gemini:  # the offline stand-in, which says the history's last three turns, newest first
        said = "' and before that '".join(turn.user for turn in history[:-4:-1] if turn.user)
        for word in f"I'm the offline stand-in. You said '{said}'. Set GOOGLE_GENERATIVE_AI_API_KEY for Gemini".split():
            yield word + " "
            await asyncio.sleep(0.1)  # a pace at which a person at the terminal can interrupt
        return
    async with aclosing(ask(contents(history))) as chunks:
        async for chunk in chunks:
            if text := chunk.text:
                yield text


async def ask(said: list[Event], **config: Any) -> AsyncGenerator[Any, None]:
    """Yields Gemini's chunks in answer to contents(); config is the SDK's. Raises RuntimeError at an end like SAFETY."""
    app, raw = running.get(), {"contents": said, "systemInstruction": {"parts": [{"text": SYSTEM_PROMPT}]}}
    config |= {"automatic_function_calling": {"disable": True}, "http_options": {"extra_body": raw}}  # fills contents
    chunks = await app.gemini.generate_content_stream(model=app.settings["GEMINI_MODEL"], contents={}, config=config)
    try:
        async for chunk in chunks:
            yield chunk
            if chunk.candidates and chunk.candidates[0].finish_reason not in (None, "STOP", "MAX_TOKENS"):
                raise RuntimeError(f"Gemini ended with {chunk.candidates[0].finish_reason.name}")
    finally:  # cancelled as it reads, the SDK frees its connection; closed at a yield, only the garbage collector does
        with suppress(Exception):
            async with asyncio.timeout(0):
                [_ async for _ in chunks]


def contents(history: list["Turn"]) -> list[Event]:
    """What Gemini is sent: user and model in turn, user first and last, nothing unheard; SDK objects are slower."""
    said: list[Event] = [{"role": "user", "parts": []}]
    for turn in history:
        said[-1]["parts"].append({"text": turn.user or "(The caller says nothing.)"})
        if turn.assistant:
            words = turn.assistant if turn.finished else turn.assistant + " [interrupted]"
            said += [{"role": "model", "parts": [{"text": words}]}, {"role": "user", "parts": []}]
    return said


async def may_authorize(request: web.Request) -> bool:
    """Whether this visitor may talk to the agent: put your own log-in check here."""
    return True


# ---- history: what was said and heard --------------------------------------------------------------------------------
@dataclass(slots=True)
class Turn:
    """What the caller said, and what was written in answer so far."""

    user: str = ""  # empty for a greeting, and where nothing was understood
    assistant: str = ""
    finished: bool = False  # else the answer is on its way, was cut off, or its process died
    interrupts: list[str] | None = None  # the turn_id it cut off, and what was heard of that
    began: float = field(default_factory=time.time)  # Unix seconds: these two for stores that processes share


class Histories(dict[str, dict[str, Turn]]):
    """Conversations in memory; beyond MAX_CONVERSATIONS the least recently used goes, unless it is being answered."""

    async def load(self, conversation: str) -> dict[str, Turn]:
        """The conversation's turns by turn_id, in order; empty if it is new."""
        turns = self.pop(conversation, {})  # to be put back as the last, the most recently used
        if len(self) >= MAX_CONVERSATIONS:
            self.pop(next((name for name in self if name not in answering), ""), None)
        return self.setdefault(conversation, turns)

    async def save(self, conversation: str, turn_id: str, turn: Turn) -> None:
        """Keeps the turn: called before the model is asked, and again when the answer is over."""
        self.setdefault(conversation, {})[turn_id] = turn


# ---- the signature ---------------------------------------------------------------------------------------------------
def sign(body: bytes, secret: str, timestamp: str = "") -> str:
    """The layercode-signature header for body: t=<Unix seconds>,v1=<hex HMAC-SHA256 of "<t>.<body>">."""
    timestamp = timestamp or str(int(time.time()))
    return f"t={timestamp},v1={hmac.new(secret.encode(), f'{timestamp}.'.encode() + body, hashlib.sha256).hexdigest()}"


def verify(header: str, body: bytes, secret: str) -> bool:
    """Whether header signs body, the bytes as received: the same JSON, parsed and written again, may have others."""
    match = re.search(r"t=([1-9][0-9]*)(,v1=[0-9a-fA-F].*)", header)
    if not match or abs(int(time.time()) - float(match[1])) > TOLERANCE:
        return False
    expected = sign(body, secret, match[1]).partition("v1=")[2]
    return any(hmac.compare_digest(expected, given) for given in re.findall(r",v1=([0-9a-fA-F]+)", match[2]))


# ---- speech out ------------------------------------------------------------------------------------------------------
async def speak(request: web.Request, turn: Turn, turn_id: str, answer: Answer | str, label: str) -> web.StreamResponse:
    """Streams answer as it comes, APOLOGY in the place of what fails or stalls; turn tells how far it got."""
    outcome, level, times = "", logging.INFO, [time.monotonic()]
    response = web.StreamResponse(headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"})
    response.content_type = "text/event-stream"

    async def say(piece: str | Event) -> None:
        event = {"type": "response.tts", "content": piece} if isinstance(piece, str) else piece
        await response.write(f"data: {json.dumps({**event, 'turn_id': turn_id})}\n\n".encode())
        turn.assistant += piece if isinstance(piece, str) else ""  # only now that it is written
        if event.get("type") not in ("response.data", "response.end"):  # which nobody hears
            times.append(time.monotonic())

    try:
        with suppress(ConnectionResetError):  # the caller hung up: APOLOGY can't be written either
            await response.prepare(request)
            try:
                if isinstance(answer, str):
                    await say(answer)
                else:
                    async with asyncio.timeout(PATIENCE) as patience, aclosing(answer):
                        async for piece in answer:
                            await say(piece)
                            patience.reschedule(asyncio.get_running_loop().time() + PATIENCE)
                    if len(times) == 1:
                        raise RuntimeError("no words")
            except Exception as error:  # noqa: BLE001
                why = error if isinstance(error, RuntimeError) else getattr(error, "code", "")  # others may hold a key
                log.debug("%s: %s", label, "".join(traceback.format_tb(error.__traceback__)))
                await say(" " * bool(turn.assistant) + APOLOGY)
                outcome, level = f"failed: {type(error).__name__} {why}", logging.WARNING
            await say({"type": "response.end"})
            turn.finished, outcome = True, outcome or "spoken"
    finally:
        figures = 1000 * (times[len(times) > 1] - times[0]), 1000 * (time.monotonic() - times[0]), len(times) - 1
        log.log(level, "%s %s first_word=%.0fms total=%.0fms chunks=%d", label, outcome or "interrupted", *figures)
    return response


# ---- endpoints -------------------------------------------------------------------------------------------------------
def parse(body: bytes) -> Event:
    """The JSON object in body, rid of lone surrogates, which nothing can encode. Raises HTTPBadRequest."""
    with suppress(ValueError, TypeError, RecursionError):
        return dict(json.loads(json.dumps(json.loads(body), ensure_ascii=False).encode(errors="replace")))
    raise web.HTTPBadRequest(reason="the body is not a JSON object")


def text_of(event: Event, name: str, older_name: str = "") -> str:
    """The text that event has under the name. Raises HTTPBadRequest."""
    if isinstance(text := event.get(name) or event.get(older_name), str):
        return text
    raise web.HTTPBadRequest(reason=f"{name} is missing or not a text")


async def agent(request: web.Request) -> web.StreamResponse:
    """Answers a webhook: a message and a greeting with speech, anything else with a mere 200."""
    app, body = running.get(), await request.read()
    if not (secret := app.settings["LAYERCODE_WEBHOOK_SECRET"]):
        raise web.HTTPInternalServerError(reason="LAYERCODE_WEBHOOK_SECRET is not set")
    if not verify(request.headers.get("layercode-signature", ""), body, secret):
        raise web.HTTPUnauthorized(reason="wrong signature: is LAYERCODE_WEBHOOK_SECRET this agent's, the clock right?")
    event = parse(body)
    kind, conversation = text_of(event, "type"), text_of(event, "conversation_id", "session_id")
    if kind not in ("message", "welcome") and (kind != "session.start" or event.get("turn_id") is None):
        return web.json_response({})
    turn_id, text = text_of(event, "turn_id"), {"text": event.get("text", ...) or " "}  # missing is wrong, empty is not
    said = text_of(text, "text").strip() if kind == "message" else ""
    turns, label = await app.histories.load(conversation), f"conversation={conversation!r} turn={turn_id!r}"
    turn = turns.setdefault(turn_id, Turn())
    if turn.finished or turn_id != list(turns)[-1]:  # delivered again: the same words, nothing changes
        return await speak(request, Turn(), turn_id, turn.assistant, label + " again")
    if conversation in answering:
        answering[conversation].cancel()  # an earlier turn, its hang-up unseen behind a tunnel, or this one, sent again
    answering[conversation] = asyncio.current_task()
    match event.get("interruption_context"):
        case {"previous_turn_interrupted": True, "assistant_turn_id": str(at), "text_heard": str(heard)}:
            cut, turn.interrupts = turns.get(at, Turn()), [at, heard]
            cut.assistant, cut.finished = heard, False
    turn.user, turn.assistant = said, ""
    answer = app.reply(event, list(turns.values())[-MAX_TURNS:]) if turn.user else APOLOGY
    if kind != "message":
        answer = GREETING if len(turns) == 1 else WELCOME_BACK
        if app.gemini:  # connect to it while the caller listens, so that the first reply need not
            app.warm_up = asyncio.gather(app.gemini.get(model=app.settings["GEMINI_MODEL"]), return_exceptions=True)
    try:
        await app.histories.save(conversation, turn_id, turn)  # before the model is asked: no word gets lost
        return await speak(request, turn, turn_id, answer, label)
    finally:
        await app.histories.save(conversation, turn_id, turn)


async def authorize(request: web.Request) -> web.Response:
    """Gets a browser its session key: Layercode's answer unchanged, while the API key stays here."""
    app, page = running.get(), parse(await request.read())
    key, agent_id = text_of(app.settings, "LAYERCODE_API_KEY"), text_of(page, "agent_id", "pipeline_id")
    if not await may_authorize(request) or app.settings["LAYERCODE_AGENT_ID"] not in ("", agent_id):
        raise web.HTTPForbidden(reason="this visitor may not talk to this agent")
    page |= {"agent_id": agent_id, "conversation_id": page.get("conversation_id") or page.get("session_id")}
    session = {name: page[name] for name in FORWARDED if page.get(name) is not None}
    post = {"json": session, "headers": {"Authorization": f"Bearer {key}"}, "allow_redirects": False}
    url = app.settings["LAYERCODE_API_URL"] + "/v1/agents/web/authorize_session"
    try:
        async with asyncio.timeout(AUTHORIZE_PATIENCE), app.http.post(url, **post) as upstream:
            status, answer = upstream.status, (await upstream.text(errors="replace")).replace(key, "***")
    except (TimeoutError, ClientError) as error:
        gone = web.HTTPGatewayTimeout if isinstance(error, TimeoutError) else web.HTTPBadGateway
        raise gone(reason=f"no answer from Layercode: {type(error).__name__}") from None
    if status not in (200, 400, 402):
        raise web.HTTPBadGateway(reason=f"Layercode answered {status}")
    reason = "OK" if status == 200 else re.sub("[^ -~]+", " ", str(parse(answer.encode()).get("error")))[:200]
    return web.Response(text=answer, status=status, reason=reason, content_type="application/json")


# ---- the app ---------------------------------------------------------------------------------------------------------
def make_app(settings: dict[str, str] | None = None, reply: Any = reply, histories: Any = None) -> web.Application:
    """The app, to run or to mount in another; give its runner handler_cancellation=True, or barge-in goes unnoticed."""
    state = types.SimpleNamespace(settings=settings or load_settings(), reply=reply, gemini=None)
    state.histories = Histories() if histories is None else histories

    @web.middleware
    async def outermost(request: web.Request, handler: Any) -> web.StreamResponse:
        running.set(state)
        origin, allowed = request.headers.get("Origin", ""), state.settings["ALLOWED_ORIGINS"].replace(",", " ").split()
        known = any(fnmatch.fnmatchcase(origin, pattern) for pattern in allowed)
        try:
            if origin and not known and origin.partition("://")[2] != request.host:
                raise web.HTTPForbidden(reason="the page's origin is not in ALLOWED_ORIGINS")
            up = web.Response(text="The agent is up.\n")  # for GET /, and a preflight
            response = up if request.path == "/" or request.method == "OPTIONS" else await handler(request)
        except web.HTTPException as error:
            log.warning("%s %.60r from %.60r: %d %s", request.method, request.path, origin, error.status, error.reason)
            response = web.json_response({"error": error.reason}, status=error.status, reason=error.reason)
        if known:
            response.headers.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin"})
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        return response

    async def outgoing(app: web.Application) -> AsyncGenerator[None, None]:
        async with ClientSession(connector=TCPConnector(limit=0, keepalive_timeout=300)) as state.http:  # seconds
            if key := state.settings["GOOGLE_GENERATIVE_AI_API_KEY"]:
                from google import genai  # only now: it takes longer to import than all the rest

                options: Any = {"aiohttp_client": state.http, "retry_options": RETRY}
                state.gemini = genai.Client(api_key=key, http_options=options).aio.models
            yield

    app = web.Application(middlewares=[outermost])  # takes bodies up to 1 MiB
    app.cleanup_ctx.append(outgoing)
    app.add_routes([web.post("/{api:(api/)?}agent", agent), web.post("/{api:(api/)?}authorize", authorize)])
    return app


# ---- the terminal client ---------------------------------------------------------------------------------------------
async def chat(settings: dict[str, str], make_app: Any, url: str = "") -> None:
    """Plays Layercode's part: each line typed is a message, and a barge-in if the agent is still speaking."""
    if not url:
        settings = settings | {"LAYERCODE_WEBHOOK_SECRET": os.urandom(16).hex()}
        runner = web.AppRunner(make_app(settings), handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/agent"
    event, conversation, line = Event(type="session.start"), os.urandom(8).hex(), "-"
    while line:
        event |= {"session_id": "terminal", "conversation_id": conversation, "turn_id": os.urandom(8).hex()}
        body, heard, typed = json.dumps(event).encode(), "", False
        headers = {"layercode-signature": sign(body, settings["LAYERCODE_WEBHOOK_SECRET"])}
        async with ClientSession() as http, http.post(url, data=body, headers=headers, raise_for_status=True) as answer:
            while not typed and (frame := await answer.content.readline()):
                piece = json.loads(frame.removeprefix(b"data: ").strip() or "{}")
                words = {"response.tts": piece.get("content"), "response.end": "\n"}.get(piece.get("type"), "")
                print(words, end="", flush=True)
                heard += words
                typed = os.name == "posix" and sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], 0)[0])
        report = {"previous_turn_interrupted": typed, "words_heard": len(heard.split()), "text_heard": heard}
        report["assistant_turn_id"] = event["turn_id"]
        event = {"type": "message", "text": (line := sys.stdin.readline()).strip(), "interruption_context": report}


def main(make_app: Any = make_app) -> None:
    """Serves, or chats, as the command line says; what is wrong with it or the settings ends in one line."""
    try:
        settings = load_settings()
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        if sys.argv[1:2] == ["chat"]:
            return asyncio.new_event_loop().run_until_complete(chat(settings, make_app, *sys.argv[2:3]))
        log.setLevel(settings["LOG_LEVEL"])
        lacks = [f"{key} is not set: {hint}" for key, (_, _, hint) in VARIABLES.items() if hint and not settings[key]]
        banner = [f"Up: http://{settings['HOST']}:{settings['PORT']}", *lacks, "Next: npx @layercode/cli tunnel"]
        how: Any = {"port": int(settings["PORT"]), "print": lambda _: print(*banner, sep="\n", flush=True)}
        how |= {"host": settings["HOST"], "shutdown_timeout": 5}  # aiohttp waits twice that for replies in flight
        web.run_app(make_app(settings), **how, handler_cancellation=True, access_log=None)
    except (KeyboardInterrupt, ValueError, OSError, ClientError) as error:
        sys.exit(0 if isinstance(error, KeyboardInterrupt) else f"agent.py: {str(error) or type(error).__name__}")


if __name__ == "__main__":
    main()
