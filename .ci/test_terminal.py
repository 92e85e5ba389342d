"""The terminal chat, in a real terminal and by pipes, with agents served beside it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import ssl
import struct
import sys
import termios
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web

import agent
from agent import Agent, Event, Settings, Speech, Turn
from test_agent import SECRET, Start, run, served

pytestmark = pytest.mark.asyncio

FIRST_LINE = (
    "Type while the agent speaks to interrupt it. Hang up with Ctrl-D or Ctrl-C."
)
# What a shell runs in the background ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

BACKSPACE = "\x7f"
CTRL_C = "\x03"
CTRL_D = "\x04"

# ---- Somebody at a terminal ----------------------------------------------------------


class Person:
    """Somebody at a real terminal in which a program runs."""

    def __init__(self, process: Process, here: int, there: int):
        self.process = process
        # The two ends of the terminal: a person's, and the program's.
        self.here = here
        self.there = there
        self.shown = ""
        # How much of that was waited for.
        self.seen = 0
        self.changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(here, self._read)

    def _read(self) -> None:
        self.shown += os.read(self.here, 65536).decode(errors="replace")
        self.changed.set()

    async def see(self, words: str) -> None:
        """Waits until these words are shown, after those that were waited for."""
        try:
            async with asyncio.timeout(20):
                while words not in self.shown[self.seen :]:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {words!r} in {self.shown!r}") from None
        self.seen = self.shown.index(words, self.seen) + len(words)

    def type(self, keys: str) -> None:
        os.write(self.here, keys.encode())

    async def status(self) -> int:
        """Waits until the program has ended; gives its status."""
        async with asyncio.timeout(20):
            return await self.process.wait()

    def modes(self) -> int:
        """Whether the terminal prints what is typed, and takes it line by line."""
        local_modes = 3
        modes = termios.tcgetattr(self.there)[local_modes]
        return int(modes & (termios.ECHO | termios.ICANON))

    def text(self) -> str:
        """What was shown, without its colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.shown)


@asynccontextmanager
async def sit_down(
    *command: str, cwd: str = ".", **settings: str
) -> AsyncIterator[Person]:
    """Sits somebody down at a terminal of 80 columns in which this command runs."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    unset = {one.name.upper(): "" for one in fields(Settings)}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=there,
        stdout=there,
        stderr=there,
        cwd=cwd,
        start_new_session=True,
        # So that Ctrl-C reaches it.
        preexec_fn=lambda: fcntl.ioctl(there, termios.TIOCSCTTY, 0),
        env={**os.environ, **unset, "TERM": "xterm", **settings},
    )
    try:
        yield Person(process, here, there)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(here)
        os.close(here)
        os.close(there)


Sit = Callable[..., Awaitable[Person]]


@pytest_asyncio.fixture
async def sit() -> AsyncIterator[Sit]:
    """Sits somebody down in front of agent.py, or of what else Python is to run."""
    async with AsyncExitStack() as stack:

        async def sit(*arguments: str, **settings: str) -> Person:
            command = arguments or (agent.__file__, "chat")
            return await stack.enter_async_context(
                sit_down(sys.executable, *command, **settings)
            )

        yield sit


# ---- A chat --------------------------------------------------------------------------


async def test_the_first_line_says_how_to_interrupt_and_how_to_hang_up(
    sit: Sit,
) -> None:
    person = await sit()
    await person.see("\n> ")
    assert person.text() == f"{FIRST_LINE}\n\n{Agent.greeting}\n> "


async def test_what_was_typed_before_the_chat_does_not_interrupt_the_greeting(
    sit: Sit,
) -> None:
    person = await sit()
    person.type("Hello?\r")
    await person.see(f"{Agent.greeting}\x1b[0m\r\n> ")


async def test_an_offline_conversation_reads_as_a_conversation(sit: Sit) -> None:
    person = await sit()
    await person.see("\n> ")
    person.type("My name is Ada.\r")
    await person.see("offline ")
    person.type("S")
    await person.see("\r\n> S")
    person.type("top!\r")
    await person.see("'Stop!' ")
    shown = r"> My name is Ada\.\nI'm the offline [^\n]*\n> Stop!\nI'm the offline "
    assert re.search(shown, person.text())


class Talker(Agent):
    """Says words without end, unless what it is told interrupts it."""

    def __init__(self) -> None:
        super().__init__(Settings(layercode_webhook_secret=SECRET))
        self.events: list[Event] = []
        self.silenced = asyncio.Event()

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        self.events.append(event)
        if event["text"] != "Go":
            yield "All right."
            return
        try:
            for number in count():
                yield f"word{number} "
                await asyncio.sleep(0.01)
        finally:
            self.silenced.set()


async def listening(talker: Talker, start: Start, sit: Sit) -> Person:
    """Somebody to whom the talker talks."""
    caller = await start(talker)
    chat = (agent.__file__, "chat", caller.url + "/agent")
    person = await sit(*chat, LAYERCODE_WEBHOOK_SECRET=SECRET)
    await person.see("\n> ")
    person.type("Go\r")
    await person.see("word20 ")
    return person


async def interrupted(talker: Talker, start: Start, sit: Sit, key: str) -> Person:
    """Somebody who has interrupted the talker with this key."""
    person = await listening(talker, start, sit)
    person.type(key)
    async with asyncio.timeout(5):
        await talker.silenced.wait()
    await person.see("\r\n> ")
    return person


async def test_the_first_key_silences_the_agent_and_is_the_first_of_the_next_message(
    start: Start, sit: Sit
) -> None:
    talker = Talker()
    person = await interrupted(talker, start, sit, "S")
    person.type("top!\r")
    await person.see("All right.")
    assert talker.events[-1]["text"] == "Stop!"


async def test_the_agent_is_told_exactly_the_words_that_were_printed(
    start: Start, sit: Sit
) -> None:
    talker = Talker()
    person = await interrupted(talker, start, sit, "S")
    person.type("top!\r")
    await person.see("All right.\x1b[0m\r\n> ")
    told = talker.events[-1]["interruption_context"]
    words = told["text_heard"].split()
    assert words == [f"word{number}" for number in range(len(words))]
    assert told["words_heard"] == len(words) > 20
    assert told["assistant_turn_id"] == talker.events[0]["turn_id"]
    assert told["previous_turn_interrupted"] is True
    # The whole screen: nothing that was typed stands between the words.
    assert person.text() == (
        f"{FIRST_LINE}\n\n{Agent.greeting}\n"
        f"> Go\n{told['text_heard']}\n> Stop!\nAll right.\n> "
    )


async def test_backspace_takes_the_key_back_that_has_interrupted(
    start: Start, sit: Sit
) -> None:
    talker = Talker()
    person = await interrupted(talker, start, sit, "X")
    person.type(BACKSPACE + "Stop!\r")
    await person.see("All right.")
    assert talker.events[-1]["text"] == "Stop!"


async def test_enter_alone_interrupts_and_says_nothing(start: Start, sit: Sit) -> None:
    talker = Talker()
    person = await interrupted(talker, start, sit, "\r")
    person.type("\r")
    await person.see("\r\n> ")
    person.type("Stop!\r")
    await person.see("All right.")
    assert [event["text"] for event in talker.events] == ["Go", "Stop!"]
    assert "word20 " in talker.events[-1]["interruption_context"]["text_heard"]


async def test_lines_that_are_pasted_are_one_message(start: Start, sit: Sit) -> None:
    talker = Talker()
    person = await interrupted(talker, start, sit, "Stop\rright\n\nnow!\n")
    await person.see("All right.")
    assert [event["text"] for event in talker.events] == ["Go", "Stop right now!"]


async def test_a_message_after_an_answer_that_was_heard_out_reports_nothing(
    start: Start, sit: Sit
) -> None:
    talker = Talker()
    person = await interrupted(talker, start, sit, "S")
    for _ in range(2):
        person.type("top!\r")
        await person.see("All right.")
        await person.see("\n> ")
    told = ["interruption_context" in event for event in talker.events]
    assert told == [False, True, False]


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D], ids=["Ctrl-C", "Ctrl-D"])
async def test_hanging_up_leaves_the_terminal_as_it_was(key: str, sit: Sit) -> None:
    person = await sit()
    await person.see("\n> ")
    person.type(key)
    await person.see("\r\n")
    assert await person.status() == 0
    assert person.modes() == termios.ECHO | termios.ICANON
    assert person.text().endswith(f"{Agent.greeting}\n> \n")


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D], ids=["Ctrl-C", "Ctrl-D"])
async def test_hanging_up_on_an_agent_that_speaks_leaves_the_terminal_as_it_was(
    key: str, start: Start, sit: Sit
) -> None:
    person = await listening(Talker(), start, sit)
    assert person.modes() == 0
    person.type(key)
    await person.see("\r\n")
    assert await person.status() == 0
    assert person.modes() == termios.ECHO | termios.ICANON
    assert "Traceback" not in person.shown


# ---- What an agent can send ----------------------------------------------------------


class Player(Agent):
    """Answers with these pieces."""

    def __init__(self, *pieces: str | Event) -> None:
        super().__init__(Settings(layercode_webhook_secret=SECRET))
        self.pieces = pieces

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        for piece in self.pieces:
            yield piece


async def hears(player: Player, start: Start, sit: Sit, **settings: str) -> Person:
    """Somebody who has said hello to a player."""
    caller = await start(player)
    chat = (agent.__file__, "chat", caller.url + "/agent")
    person = await sit(*chat, LAYERCODE_WEBHOOK_SECRET=SECRET, **settings)
    await person.see("\n> ")
    person.type("Hello\r")
    await person.see("Hello\r\n")
    return person


async def test_the_agents_words_have_a_colour_of_their_own(
    start: Start, sit: Sit
) -> None:
    person = await hears(Player("Sure, ", "no problem."), start, sit)
    await person.see("\x1b[36mSure, \x1b[0m\x1b[36mno problem.\x1b[0m\r\n> ")


async def test_what_is_sent_to_the_page_is_shown_dimmed_on_a_line_of_its_own(
    start: Start, sit: Sit
) -> None:
    order: Event = {"type": "response.data", "content": {"order": "salami"}}
    person = await hears(Player(order, "Sure. ", order, "Done."), start, sit)
    dimmed = '\x1b[2m{"order": "salami"}\x1b[0m\r\n'
    sure = "\x1b[36mSure. \x1b[0m\r\n"
    await person.see(f"{dimmed}{sure}{dimmed}\x1b[36mDone.\x1b[0m\r\n> ")


async def test_an_agent_that_hangs_up_ends_the_chat(start: Start, sit: Sit) -> None:
    person = await hears(Player("Bye.", {"type": "response.hangup"}), start, sit)
    await person.see("Bye.\x1b[0m\r\n(the agent hung up)\r\n")
    assert await person.status() == 0


async def test_an_agent_may_hang_up_without_a_word(start: Start, sit: Sit) -> None:
    person = await hears(Player({"type": "response.hangup"}), start, sit)
    await person.see("(the agent hung up)\r\n")
    assert await person.status() == 0


@pytest.mark.parametrize("settings", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
async def test_a_terminal_without_colours_gets_none(
    settings: dict[str, str], start: Start, sit: Sit
) -> None:
    person = await hears(Player("Sure."), start, sit, **settings)
    await person.see("Sure.\r\n> ")
    assert "\x1b" not in person.shown


async def test_a_model_cannot_give_orders_to_the_terminal(
    start: Start, sit: Sit
) -> None:
    person = await hears(Player("Well,\x1b[2J\x9b2J\x07\rno."), start, sit)
    await person.see("\x1b[36mWell,[2J2Jno.\x1b[0m\r\n> ")


async def test_a_line_of_the_log_stands_between_the_words_and_not_among_them(
    sit: Sit, tmp_path: Path
) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(
        "import agent\n"
        "class Faulty(agent.Agent):\n"
        "    async def reply(self, event, history):\n"
        "        yield 'Once upon '\n"
        "        raise KeyError\n"
        "agent.main(Faulty)\n"
    )
    here = str(Path(agent.__file__).parent)
    person = await sit(str(file), "chat", PYTHONPATH=here)
    await person.see("\n> ")
    person.type("Hello\r")
    await person.see("\n> ")
    lines = person.text().splitlines()
    [line] = [line for line in lines if "failed: KeyError at faulty.py:5" in line]
    assert line.startswith("20")
    lines.remove(line)
    said = "".join(lines[lines.index("> Hello") + 1 : -1])
    assert said == f"Once upon  {Agent.apology}"


# ---- Pipes and arguments -------------------------------------------------------------


async def output(process: Process, said: bytes = b"") -> tuple[bytes, bytes]:
    """What a process that ends by itself writes to its two outputs."""
    try:
        async with asyncio.timeout(30):
            return await process.communicate(said)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_by_pipes_each_line_is_a_message_and_only_words_come_out() -> None:
    process = await run("chat")
    out, err = await output(process, b"My name is Ada.\n\nWhat did I say?\n")
    greeting, first, second = out.decode().splitlines()
    assert greeting == Agent.greeting
    assert "You said 'My name is Ada.'" in first
    assert "'What did I say?' and before that 'My name is Ada.'" in second
    assert (process.returncode, err) == (0, b"")


async def test_by_pipes_ctrl_c_ends_the_chat_without_a_complaint() -> None:
    process = await run("chat")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        await process.stdout.readuntil(Agent.greeting.encode())
        # The next line is being waited for.
        await asyncio.sleep(0.1)
        process.send_signal(signal.SIGINT)
        status = await process.wait()
    assert process.stderr is not None
    assert (status, await process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("arguments", [("--help",), ("chat", "--help")])
async def test_help_tells_the_usage_and_starts_nothing(
    arguments: tuple[str, ...],
) -> None:
    process = await run(*arguments)
    out, err = await output(process)
    assert out.startswith(b"usage: agent.py [-h] [chat] [URL]")
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("arguments", [("talk",), ("--port",), ("chat", "a", "b")])
async def test_an_unknown_argument_is_a_usage_line_and_status_2(
    arguments: tuple[str, ...],
) -> None:
    process = await run(*arguments)
    out, err = await output(process)
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"usage: agent.py [-h] [chat] [URL]")


# ---- What is wrong with a webhook ----------------------------------------------------


def frame(event: Event, kind: str, **more: str) -> bytes:
    """A frame as an agent sends it."""
    told = {"type": kind, "turn_id": event["turn_id"], **more}
    return f"data: {json.dumps(told)}\n\n".encode()


async def stream(request: web.Request, *frames: bytes) -> web.StreamResponse:
    """Answers with these frames."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for one in frames:
        await response.write(one)
    return response


async def silent(request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


async def silent_after_a_word(request: web.Request) -> web.StreamResponse:
    event = await request.json()
    await stream(request, frame(event, "response.tts", content="Well, "))
    await asyncio.Event().wait()
    return web.Response()


async def a_page(request: web.Request) -> web.Response:
    return web.Response(text="<h1>Your tunnel</h1>", content_type="text/html")


async def elsewhere(request: web.Request) -> web.Response:
    raise web.HTTPPermanentRedirect("https://elsewhere.example/agent")


async def not_found(request: web.Request) -> web.Response:
    raise web.HTTPNotFound()


async def bad_gateway(request: web.Request) -> web.Response:
    raise web.HTTPBadGateway()


async def no_json(request: web.Request) -> web.StreamResponse:
    return await stream(request, b"data: Hello\n\n")


async def no_object(request: web.Request) -> web.StreamResponse:
    return await stream(request, b"data: [1]\n\n")


async def no_words(request: web.Request) -> web.StreamResponse:
    return await stream(request, frame(await request.json(), "response.end"))


async def nothing(request: web.Request) -> web.StreamResponse:
    return await stream(request)


async def no_end(request: web.Request) -> web.StreamResponse:
    event = await request.json()
    return await stream(request, frame(event, "response.tts", content="Hello."))


async def another_turn(request: web.Request) -> web.StreamResponse:
    return await stream(request, frame({"turn_id": "x"}, "response.tts", content="?"))


async def broken_off(request: web.Request) -> web.StreamResponse:
    event = await request.json()
    response = await stream(request, frame(event, "response.tts", content="Well, "))
    assert request.transport is not None
    request.transport.abort()
    return response


async def complaint(
    url: str, secret: str = SECRET, file: str = agent.__file__
) -> tuple[str, str]:
    """What chat says of a webhook, and the words that came before."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        file,
        "chat",
        url,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env={
            **os.environ,
            "LAYERCODE_WEBHOOK_SECRET": secret,
            "PYTHONPATH": str(Path(agent.__file__).parent),
            # A name that nobody has is looked up once.
            "RES_OPTIONS": "attempts:1 timeout:2",
        },
    )
    async with asyncio.timeout(30):
        out, err = await output(process)
    assert process.returncode == 1, (out, err)
    [line] = err.decode().splitlines()
    return line.partition(".py: ")[2], out.decode()


@asynccontextmanager
async def webhook(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[str]:
    """Serves a webhook that is answered by this handler; gives its host."""
    app = web.Application()
    app.router.add_post("/agent", handler)
    async with served(app) as url:
        yield url.removeprefix("http://")


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (
            a_page,
            "It answers with text/html where an event stream should be. "
            "Is this the tunnel's own page, or another server?",
        ),
        (
            elsewhere,
            "It redirects to https://elsewhere.example/agent "
            "(308 Permanent Redirect). "
            "Layercode needs the URL that answers by itself.",
        ),
        (not_found, "It answers 404 Not Found. Does the URL end in /agent?"),
        (
            bad_gateway,
            "It answers 502 Bad Gateway. Is the agent running? See its log.",
        ),
        (
            no_json,
            r"It sends a frame that is not a JSON object: b'data: Hello\n'. "
            "Is something between here and the agent changing the stream?",
        ),
        (
            no_object,
            r"It sends a frame that is not a JSON object: b'data: [1]\n'. "
            "Is something between here and the agent changing the stream?",
        ),
        (
            another_turn,
            "It sends a frame of another turn: "
            r"""b'data: {"type": "response.tts", "turn_id": "x", "content": "?"}\n'. """
            "Each needs the turn_id of the webhook that it answers.",
        ),
        (
            no_words,
            "The answer had no words. Is this the webhook of a voice agent?",
        ),
        (
            nothing,
            "The answer had no words. Is this the webhook of a voice agent?",
        ),
        (
            no_end,
            "The answer ended without response.end, so Layercode would go on "
            "waiting. What does the agent's log say?",
        ),
        (
            broken_off,
            "{host} broke the answer off (ClientPayloadError). See the agent's log.",
        ),
    ],
)
async def test_the_chat_says_what_is_wrong_with_a_webhook(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], words: str
) -> None:
    async with webhook(handler) as host:
        said, _ = await complaint(f"http://{host}/agent")
    assert said == words.replace("{host}", host)


@pytest.mark.parametrize("handler", [silent, silent_after_a_word])
async def test_the_chat_does_not_wait_for_ever(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], tmp_path: Path
) -> None:
    assert agent.CALL_PATIENCE == 15
    file = tmp_path / "impatient.py"
    file.write_text("import agent\nagent.CALL_PATIENCE = 0.5\nagent.main()\n")
    async with webhook(handler) as host:
        said, _ = await complaint(f"http://{host}/agent", file=str(file))
    wanted = f"{host} has sent nothing for 0.5 seconds. "
    assert said == wanted + "Is the agent behind it running?"


async def test_words_that_came_before_the_fault_are_shown_on_their_own_line() -> None:
    async with webhook(broken_off) as host:
        _, words = await complaint(f"http://{host}/agent")
    assert words == "Well, \n"


async def test_a_webhook_that_refuses_the_signature_is_named(start: Start) -> None:
    caller = await start(Talker())
    said, _ = await complaint(caller.url + "/agent", secret="another")
    assert said.startswith("It refuses the signature (401 wrong signature: ")
    assert "Is LAYERCODE_WEBHOOK_SECRET the same here and there" in said


async def test_without_a_secret_a_webhook_is_not_called() -> None:
    said, _ = await complaint("http://127.0.0.1:1/agent", secret="")
    assert said.startswith("LAYERCODE_WEBHOOK_SECRET is not set")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "localhost:3000/agent",
            "localhost:3000/agent is not a URL: does it begin with https://?",
        ),
        (
            "https:///agent",
            "https:///agent is not a URL: has it a host, and a port up to 65535?",
        ),
        (
            "http://127.0.0.1:99999/agent",
            "http://127.0.0.1:99999/agent is not a URL: "
            "has it a host, and a port up to 65535?",
        ),
        (
            "http://x..y/agent",
            "http://x..y/agent is not a URL: has it a host, and a port up to 65535?",
        ),
        (
            "http://127.0.0.1:1/agent",
            "Nothing listens at 127.0.0.1:1. Is the agent, or the tunnel, running?",
        ),
        (
            "https://nobody.invalid/agent",
            "There is no nobody.invalid. Is the tunnel open, and the name right?",
        ),
    ],
)
async def test_the_chat_says_what_is_wrong_with_a_url(url: str, words: str) -> None:
    assert (await complaint(url))[0] == words


async def test_a_certificate_that_is_not_valid_is_named(tmp_path: Path) -> None:
    openssl = await asyncio.create_subprocess_exec(
        *["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"],
        *["-subj", "/CN=localhost", "-keyout", "key", "-out", "certificate"],
        cwd=tmp_path,
        stderr=PIPE,
    )
    _, told = await openssl.communicate()
    assert openssl.returncode == 0, told
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server = await asyncio.start_server(
        lambda reader, writer: None, "127.0.0.1", 0, ssl=context
    )
    host = f"localhost:{server.sockets[0].getsockname()[1]}"
    async with server:
        said, _ = await complaint(f"https://{host}/agent")
    assert said == (
        f"The certificate of {host} is not valid. "
        "Has it run out, is it for another name, or did you sign it yourself?"
    )


async def test_a_server_that_does_not_speak_https_is_named() -> None:
    async with webhook(a_page) as host:
        said, _ = await complaint(f"https://{host}/agent")
    wanted = f"{host} does not speak HTTPS. Should the URL begin with http://?"
    assert said == wanted


async def test_an_answer_is_over_with_response_end_though_the_stream_stays_open() -> (
    None
):
    async def stay_open(request: web.Request) -> web.StreamResponse:
        event = await request.json()
        words = frame(event, "response.tts", content=f"You said {event.get('text')}.")
        await stream(request, words, frame(event, "response.end"))
        await asyncio.Event().wait()
        return web.Response()

    async with webhook(stay_open) as host:
        url = f"http://{host}/agent"
        process = await run("chat", url, LAYERCODE_WEBHOOK_SECRET=SECRET)
        out, err = await output(process, b"hello\n")
    assert (out, err) == (b"You said None.\nYou said hello.\n", b"")
