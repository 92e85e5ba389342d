"""What strangers send costs callers nothing: most of it against a served process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from ports import free_port
from strangers import BOMB

import agent
from agent import Agent, Event, Settings, Speech, Turn, sign
from test_agent import (
    SECRET,
    WITH_GEMINI,
    Gemini,
    Layercode,
    Stall,
    Start,
    chunk,
    run,
    served,
    until,
)

pytestmark = pytest.mark.asyncio

MIB = 2**20
SIGNED = {"LAYERCODE_WEBHOOK_SECRET": SECRET}
GET = b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n"
ENDLESS_BODY = b"POST /agent HTTP/1.1\r\nHost: agent\r\nContent-Length: 1000\r\n\r\n{"

# ---- A served agent, and strangers ---------------------------------------------------


@dataclass
class Running:
    """An agent in a process of its own."""

    process: Process
    port: int
    # What it has written to its log.
    log: bytearray = field(default_factory=bytearray)
    # What it has said at its start.
    greeting: str = ""

    async def keep_log(self) -> None:
        """Reads its log, so that it never waits to write it."""
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(MIB):
            self.log += piece

    def lines(self, about: str) -> list[str]:
        """The lines of its log with these words."""
        return [line for line in self.log.decode().splitlines() if about in line]

    def processor(self) -> float:
        """The seconds of processor that it has used."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        ticks = [int(number) for number in stat.split()[11:13]]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Its memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) // 1024

    async def answer(self, request: bytes) -> bytes:
        """All that it sends for some bytes until it closes the connection."""
        async with connected(self.port) as (reader, writer):
            writer.write(request)
            return await read_to_end(reader)


@asynccontextmanager
async def running(file: Path | str, **settings: str) -> AsyncIterator[Running]:
    """Serves an agent in a process of its own; it is gone at the end."""
    port = free_port()
    process = await run(file=file, PORT=str(port), **settings)
    one = Running(process, port)
    log = asyncio.create_task(one.keep_log())
    try:
        assert process.stdout is not None
        async with asyncio.timeout(10):
            greeting = await process.stdout.readuntil(b"Next: ")
        one.greeting = greeting.decode()
        yield one
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await log


def like(tmp_path: Path, *lines: str, served: str = "agent.Agent") -> Path:
    """A file that serves an agent after these lines."""
    file = tmp_path / "like.py"
    file.write_text("\n".join(["import agent", *lines, f"agent.main({served})"]))
    return file


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    """A connection of a stranger's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_to_end(reader: StreamReader) -> bytes:
    """All that comes until the agent closes the connection, in 10 s at most."""
    answer = b""
    # Closed while something more was on its way to it, a connection is reset.
    with suppress(ConnectionResetError):
        async with asyncio.timeout(10):
            while piece := await reader.read(MIB):
                answer += piece
    return answer


async def connect_narrowly(port: int) -> socket.socket:
    """A connection that takes only some KiB from the agent before they are read."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request, after which the connection is to be closed."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: agent",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


# ---- Bodies and heads ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [("/agent", b" 415 "), ("/authorize", b" 415 "), ("/x", b" 404 ")],
)
async def test_a_gzip_bomb_is_not_inflated(path: str, status: bytes) -> None:
    async with running(agent.__file__, **SIGNED) as one:
        before = one.processor()
        answer = await one.answer(post(path, BOMB, "Content-Encoding: gzip"))
        assert status in answer.partition(b"\r\n")[0]
        # To inflate it takes more than a second on any machine of today.
        assert one.processor() - before < 0.3


async def test_what_is_said_to_be_compressed_is_refused_without_a_traceback() -> None:
    async with running(agent.__file__, **SIGNED) as one:
        answer = await one.answer(post("/agent", b"{}", "Content-Encoding: gzip"))
        assert answer.startswith(b"HTTP/1.1 415 ")
        await until(lambda: one.lines("415"))
        assert not one.lines("Traceback")


@pytest.mark.parametrize("path", [b"/agent", b"/authorize"])
async def test_a_body_that_never_ends_gets_a_408_and_its_connection_is_closed(
    tmp_path: Path, path: bytes
) -> None:
    file = like(
        tmp_path,
        "agent.BODY_PATIENCE = 0.2",
        "agent.RUNNER_OPTIONS['lingering_time'] = 1000",
    )
    async with running(file, **SIGNED) as one:
        answer = await one.answer(ENDLESS_BODY.replace(b"/agent", path))
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_nobody_reads_may_not_go_on_either(tmp_path: Path) -> None:
    file = like(tmp_path, "agent.RUNNER_OPTIONS['lingering_time'] = 0.2")
    async with running(file) as one:
        answer = await one.answer(ENDLESS_BODY.replace(b"/agent", b"/unknown"))
        assert answer.startswith(b"HTTP/1.1 404 ")


async def test_the_memory_of_bodies_that_never_end_is_given_back(
    tmp_path: Path,
) -> None:
    file = like(tmp_path, "agent.BODY_PATIENCE = 2", "agent.MEMORY_KEPT = 0.1")
    body = post("/agent", bytes(MIB))[:-1000]
    async with running(file, **SIGNED) as one:
        before = one.memory()
        answers = asyncio.gather(*(one.answer(body) for _ in range(150)))
        await until(lambda: one.memory() > before + 100)
        await answers
        await until(lambda: one.memory() < before + 15)


@pytest.mark.parametrize("earlier", [b"", GET])
async def test_a_head_that_never_ends_is_cut_off(
    tmp_path: Path, earlier: bytes
) -> None:
    file = like(tmp_path, "agent.RUNNER_OPTIONS['keepalive_timeout'] = 0.3")
    async with running(file) as one, connected(one.port) as (reader, writer):
        writer.write(earlier + b"POST /agent HTTP/1.1\r\nX: ")

        async def go_on() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(go_on())
        answer = await read_to_end(reader)
        dripping.cancel()
        assert answer.count(b"HTTP/1.1 200 OK") == (1 if earlier else 0)


async def test_an_idle_connection_is_kept_longer_than_proxies_keep_theirs() -> None:
    # That it is what the server goes by is shown by the heads that never end.
    assert agent.RUNNER_OPTIONS["keepalive_timeout"] > 90


# ---- Pages ---------------------------------------------------------------------------


class Api:
    """Layercode's REST API, which answers as it is told."""

    def __init__(self, respond: Callable[[web.Request], object]) -> None:
        self.respond = respond
        self.requests: list[web.Request] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        response = self.respond(request)
        assert isinstance(response, web.StreamResponse)
        return response

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/agents/web/authorize_session", self.handle)
        return app


def settings_for(api: str) -> Settings:
    """Settings with Layercode's REST API at this URL."""
    return Settings(
        layercode_webhook_secret=SECRET,
        layercode_api_key="api key",
        # aiohttp keeps no cookies of a host without a name.
        layercode_api_url=api.replace("127.0.0.1", "localhost"),
    )


async def test_a_cookie_for_one_visitor_is_not_sent_for_the_next(start: Start) -> None:
    def respond(request: web.Request) -> web.Response:
        response = web.json_response({})
        response.set_cookie("visitor", "first")
        return response

    api = Api(respond)
    async with served(api.app()) as url:
        caller = await start(Agent(settings_for(url)))
        for _ in range(2):
            async with caller.post({"agent_id": "a"}, path="/authorize") as response:
                assert response.status == 200
    assert ["Cookie" in request.headers for request in api.requests] == [False, False]


async def test_a_page_that_rebinds_its_name_gets_no_session(start: Start) -> None:
    api = Api(lambda request: web.json_response({}))
    async with served(api.app()) as url:
        caller = await start(Agent(settings_for(url)))
        headers = {"Origin": "http://evil.com", "Host": "evil.com"}
        page = {"agent_id": "a"}
        async with caller.http.post(
            caller.url + "/authorize", json=page, headers=headers
        ) as response:
            assert response.status == 403
    assert api.requests == []


async def test_an_answer_of_layercodes_api_without_end_is_cut_at_1_mib(
    start: Start,
) -> None:
    sent = 0
    over = asyncio.Event()

    async def go_on(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(MIB // 8))
                sent += MIB // 8
        finally:
            over.set()

    app = web.Application()
    app.router.add_post("/v1/agents/web/authorize_session", go_on)
    async with served(app) as url:
        caller = await start(Agent(settings_for(url)))
        async with asyncio.timeout(5):
            async with caller.post({"agent_id": "a"}, path="/authorize") as response:
                assert response.status == 502
            await over.wait()
    # What is on its way in the system's buffers is sent, too.
    assert sent < 20 * MIB


# ---- Upstreams -----------------------------------------------------------------------


class Aloof(Gemini):
    """A Gemini that never answers who looks a model up."""

    def __init__(self) -> None:
        super().__init__()
        self.given_up = 0

    async def model(self, request: web.Request) -> web.Response:
        self.looked_up += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up += 1
        raise AssertionError


async def test_a_warm_up_without_an_answer_is_given_up_and_the_only_one(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "WARM_UP_PATIENCE", 0.5)
    gemini = Aloof()
    async with served(gemini.app(), handler_cancellation=True) as url:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
        caller = await start(Agent(WITH_GEMINI))
        for _ in range(3):
            await caller.send(caller.event("session.start"))
        # The first came with the start.
        await until(lambda: gemini.given_up)
        assert gemini.looked_up == 1
        await caller.send(caller.event("session.start"))
        await until(lambda: gemini.looked_up == 2)


WORD = chunk("word ")
THOUGHT = chunk([{"text": "Hm. ", "thought": True}])


async def finished(one: Agent, conversation: str) -> list[bool]:
    """Which turns of a conversation are finished."""
    turns = await one.histories.load(conversation)
    return [turn.finished for turn in turns.values()]


@pytest.mark.parametrize(
    "burst", [WORD * 1000, THOUGHT * 1000 + WORD], ids=["words", "thoughts"]
)
async def test_a_thousand_chunks_at_once_let_another_caller_through(
    start: Start, gemini: Gemini, burst: bytes
) -> None:
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    gemini.scripts = [[burst + chunk("", "STOP")]]
    async with caller.post(caller.event("message", text="All at once!")):
        other = Layercode(caller.http, caller.url)
        assert await other.say("Hello?") == "Sure, no problem."
        assert await finished(one, caller.conversation) == [False]


async def test_chunks_that_nobody_hears_any_more_let_another_caller_through(
    start: Start, gemini: Gemini
) -> None:
    one = Agent(WITH_GEMINI)
    caller = await start(one)
    gemini.scripts = [[WORD * 1000, Stall()]]
    await caller.barge_in("All at once!", after="word ")
    other = Layercode(caller.http, caller.url)
    assert await other.say("Hello?") == "Sure, no problem."
    # The rest of them is being let go of.
    assert gemini.open == 1
    await gemini.until(streams=0)


# ---- A full machine ------------------------------------------------------------------

SET_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {})"


async def test_at_its_start_it_takes_as_many_files_as_the_system_allows(
    tmp_path: Path,
) -> None:
    file = like(tmp_path, SET_LIMIT.format((64, 200)))
    async with running(file) as one:
        limits = Path(f"/proc/{one.process.pid}/limits").read_text()
        files = re.search(r"Max open files +(\d+) +(\d+)", limits)
        assert files is not None
        assert files.groups() == ("200", "200")


async def test_a_full_table_of_files_is_logged_once_a_second_and_passes(
    tmp_path: Path,
) -> None:
    file = like(tmp_path, SET_LIMIT.format((64, 64)))
    async with running(file) as one:
        loop = asyncio.get_running_loop()
        began = loop.time()
        strangers = [
            await asyncio.open_connection("127.0.0.1", one.port) for _ in range(100)
        ]
        await until(lambda: len(one.lines("out of system resource")) > 1)
        lines = one.log.decode().splitlines()
        assert len(lines) <= loop.time() - began + 2
        for _, writer in strangers:
            writer.transport.abort()
        answer = await one.answer(post("/agent", b""))
        assert answer.startswith(b"HTTP/1.1 ")


async def test_malformed_http_is_a_short_line_a_second_at_most() -> None:
    async with running(agent.__file__) as one:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(50):
            answer = await one.answer(b"GET / HTTP/1.1\r\nHost : agent\r\n\r\n")
            assert b" 400 Bad Request" in answer
        await until(lambda: one.log)
        lines = one.log.decode().splitlines()
        assert len(lines) <= loop.time() - began + 2
        assert all(len(line) < 150 for line in lines)


# ---- Clients that stop reading -------------------------------------------------------


async def test_who_asks_and_does_not_read_the_answers_is_dropped(
    tmp_path: Path,
) -> None:
    file = like(tmp_path, "agent.WRITE_PATIENCE = 0.3")
    async with running(file) as one:
        files = Path(f"/proc/{one.process.pid}/fd")
        before = len(list(files.iterdir()))
        with await connect_narrowly(one.port) as sock:
            loop = asyncio.get_running_loop()
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(20):
                    # How much the system takes before nobody reads it differs.
                    while True:
                        await loop.sock_sendall(sock, GET * 1000)
            await until(lambda: len(list(files.iterdir())) == before)
            assert not one.lines("Traceback")


class Endless(Agent):
    """An agent that talks for ever."""

    def __init__(self) -> None:
        super().__init__(Settings(layercode_webhook_secret=SECRET))
        self.over = asyncio.Event()

    async def reply(self, event: Event, history: list[Turn]) -> Speech:
        """Yields words without end."""
        try:
            while True:
                yield "word " * 1000
        finally:
            self.over.set()


async def test_a_reply_to_someone_who_stops_reading_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "WRITE_PATIENCE", 0.3)
    one = Endless()
    async with served(one.make_app()) as url:
        with await connect_narrowly(int(url.rpartition(":")[2])) as sock:
            sock.send(signed_message())
            async with asyncio.timeout(5):
                await one.over.wait()


def signed_message() -> bytes:
    """A message as Layercode sends it."""
    body = b'{"type": "message", "conversation_id": "c", "turn_id": "t", "text": "Hi"}'
    return post("/agent", body, f"layercode-signature: {sign(body, SECRET)}")


# ---- The end, and the start ----------------------------------------------------------

SAYS_WHAT_IS_FROZEN = """
import gc

class Frozen(agent.Agent):
    async def greet(self, event, history):
        yield f"{gc.get_freeze_count() > 10_000}"
"""


async def test_what_is_there_at_the_start_costs_no_collection_of_garbage(
    tmp_path: Path,
) -> None:
    file = like(tmp_path, SAYS_WHAT_IS_FROZEN, served="Frozen")
    async with running(file, **SIGNED) as one, aiohttp.ClientSession() as http:
        caller = Layercode(http, f"http://127.0.0.1:{one.port}")
        assert await caller.send(caller.event("welcome")) == "True"


TALKS_FOR_EVER = """
import asyncio
class Endless(agent.Agent):
    async def reply(self, event, history):
        while True:
            yield "word "
            await asyncio.sleep(0.1)
agent.GRACE = 0.5
"""


async def test_a_stop_under_a_flood_takes_less_than_15_s(tmp_path: Path) -> None:
    file = like(tmp_path, TALKS_FOR_EVER, served="Endless")
    there = []

    async def flood(port: int, request: bytes) -> None:
        with suppress(OSError):
            async with connected(port) as (_, writer):
                while True:
                    writer.write(request)
                    await writer.drain()
                    there.append(request)
                    await asyncio.sleep(0.01)

    gzip = post("/agent", BOMB, "Content-Encoding: gzip")
    requests = [GET * 100, ENDLESS_BODY, signed_message(), b"X: y\r\n", gzip]
    async with running(file, **SIGNED) as one, asyncio.TaskGroup() as tasks:
        for request in requests * 20:
            tasks.create_task(flood(one.port, request))
        await until(lambda: len(there) > 200)
        one.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            await one.process.wait()


async def test_a_reply_that_is_longer_than_the_stops_patience_is_ended(
    tmp_path: Path,
) -> None:
    async with running(
        like(tmp_path, TALKS_FOR_EVER, served="Endless"), **SIGNED
    ) as one:
        async with connected(one.port) as (reader, writer):
            writer.write(signed_message())
            async with asyncio.timeout(10):
                await reader.readuntil(b"response.tts")
                one.process.send_signal(signal.SIGTERM)
                rest = await reader.read()
        await one.process.wait()
        assert b'{"type": "response.end", "turn_id": "t"}' in rest
        await until(lambda: one.lines(" cut off by the stop "))


OPEN_TO_ALL = "Everyone who reaches /authorize may start calls"
CHECKS_VISITORS = """
class Checking(agent.Agent):
    async def admit(self, request):
        return {}
"""


async def test_the_start_says_that_everyone_may_start_calls() -> None:
    async with running(agent.__file__, LAYERCODE_API_KEY="api key") as one:
        (line,) = [line for line in one.greeting.splitlines() if OPEN_TO_ALL in line]
        assert "override admit()" in line


async def test_the_start_says_nothing_of_it_without_a_key_for_calls() -> None:
    async with running(agent.__file__) as one:
        assert OPEN_TO_ALL not in one.greeting


async def test_the_start_says_nothing_of_it_where_visitors_are_checked(
    tmp_path: Path,
) -> None:
    file = like(tmp_path, CHECKS_VISITORS, served="Checking")
    async with running(file, LAYERCODE_API_KEY="api key") as one:
        assert OPEN_TO_ALL not in one.greeting
