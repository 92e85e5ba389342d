"""Measures what strangers cost callers.

    python .ci/strangers.py                     everything, in four minutes or so
    python .ci/strangers.py callers bodies      only these measurements
    python .ci/strangers.py --agent PATH        another agent.py

The agent, a quick Gemini, the callers and the strangers each have a process of their
own. The strangers' is the least important to the system, so that the agent is measured
and not they. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import random
import resource
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ports import free_port

HERE = Path(__file__).parent
SECRET = "a webhook secret"
MIB = 2**20
# Seconds for an answer, after which a caller counts as unanswered.
PATIENCE = 20.0
# What the caller says decides how Gemini answers.
QUICKLY = "Answer quickly."
SLOWLY = "Answer slowly."
AT_LENGTH = "Answer at length."

# ---- Gemini and Layercode's API ------------------------------------------------------


def chunk(words: str, finish: str = "") -> bytes:
    """A chunk of Gemini's stream, in HTTP's chunked encoding."""
    candidate: dict[str, object] = {
        "content": {"parts": [{"text": words}], "role": "model"}
    }
    if finish:
        candidate["finishReason"] = finish
    line = f"data: {json.dumps({'candidates': [candidate]})}\r\n\r\n".encode()
    return b"%x\r\n%s\r\n" % (len(line), line)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
STREAM += b"Transfer-Encoding: chunked\r\n\r\n"
MODEL = b'{"name": "models/gemini"}'
MODEL_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
MODEL_HEAD += b"Content-Length: %d\r\n\r\n" % len(MODEL)
QUICK_ANSWER = STREAM + chunk("Sure, ") + chunk("no problem.", "STOP") + b"0\r\n\r\n"
# Long when it is written, as JSON, but short in a history.
LONG_PIECE = chunk("é" * 10_000)


async def be_gemini(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers the questions that come over one connection."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            _, _, length = head.lower().partition(b"content-length:")
            body = await reader.readexactly(int(length.split()[0]) if length else 0)
            # The earlier turns of the conversation are in the body, too.
            question = body[body.rfind(b"Answer ") :]
            if head.startswith(b"GET"):
                writer.write(MODEL_HEAD + MODEL)
            elif question.startswith(SLOWLY.encode()):
                writer.write(STREAM)
                for _ in range(5):
                    writer.write(chunk("Well, "))
                    await asyncio.sleep(1)
                writer.write(chunk("no problem.", "STOP") + b"0\r\n\r\n")
            elif question.startswith(AT_LENGTH.encode()):
                writer.write(STREAM)
                while True:
                    writer.write(LONG_PIECE)
                    await writer.drain()
                    await asyncio.sleep(1)
            else:
                writer.write(QUICK_ANSWER)
            await writer.drain()
    writer.close()


async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes a request and never answers it."""
    with contextlib.suppress(OSError):
        while await reader.read(MIB):
            pass
    writer.close()


async def serve_upstreams(connection: Connection) -> None:
    """Serves Gemini and a silent Layercode; tells their ports."""
    ports = []
    for part in (be_gemini, be_silent):
        server = await asyncio.start_server(part, "127.0.0.1", 0, backlog=4096)
        ports.append(server.sockets[0].getsockname()[1])
    connection.send(ports)
    await asyncio.Event().wait()


# ---- The callers ---------------------------------------------------------------------


def request(path: str, body: bytes, *head: str) -> bytes:
    """A POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: agent", *head]
    if not any(line.startswith("Content-Length") for line in head):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def webhook(conversation: str, turn_id: str, text: str) -> bytes:
    """A signed message of a caller."""
    event = {"type": "message", "conversation_id": conversation, "session_id": "s"}
    body = json.dumps({**event, "turn_id": turn_id, "text": text}).encode()
    timestamp = str(int(time.time()))
    signed = timestamp.encode() + b"." + body
    signature = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    return request("/agent", body, f"layercode-signature: t={timestamp},v1={signature}")


async def first_word(port: int, message: bytes) -> float:
    """Says something over a new connection; gives the seconds to the first word.

    Raises OSError, EOFError or TimeoutError if the answer does not come to its end.
    """
    async with asyncio.timeout(PATIENCE):
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(message)
            await reader.readuntil(b"response.tts")
            took = time.perf_counter() - began
            rest = await reader.readuntil(b"response.end")
        finally:
            writer.close()
    if b"no problem." not in rest:
        raise EOFError("an apology")
    return took


@dataclass
class Heard:
    """What callers heard."""

    first_words: list[float]
    unanswered: int = 0

    def figures(self) -> str:
        """The figures of the first words, in ms."""
        if not self.first_words:
            return f"{'-':>8} {'-':>8} {'-':>8} {0:>7} {self.unanswered:>7}"
        ms = sorted(1000 * seconds for seconds in self.first_words)
        p50 = statistics.median(ms)
        p99 = ms[len(ms) * 99 // 100]
        answered = len(ms)
        return f"{p50:8.1f} {p99:8.1f} {ms[-1]:8.1f} {answered:7} {self.unanswered:7}"


async def talk(
    connection: Connection, port: int, callers: int, seconds: float, text: str
) -> None:
    """Has callers talk for some seconds, or say one thing; tells what they Heard."""
    heard = Heard([])
    over = time.perf_counter() + seconds

    async def be_caller(number: int) -> None:
        # Not all at once.
        await asyncio.sleep(number * min(seconds, 1) / callers)
        turn = 0
        while turn == 0 or time.perf_counter() < over:
            conversation = f"{os.getpid()}-{number}-{turn // 10}"
            try:
                message = webhook(conversation, f"turn_{turn}", text)
                heard.first_words.append(await first_word(port, message))
            except (OSError, EOFError, TimeoutError):
                heard.unanswered += 1
            turn += 1
            if seconds:
                await asyncio.sleep(random.uniform(0.3, 1.1))

    await asyncio.gather(*(be_caller(number) for number in range(callers)))
    connection.send(heard)


# ---- The strangers -------------------------------------------------------------------

MEGABYTE = bytes(10**6)


def bomb() -> bytes:
    """1 MB of gzip that inflates to 1 GB."""
    with_gzip_header = 31
    gzip = zlib.compressobj(9, zlib.DEFLATED, with_gzip_header)
    header = gzip.compress(b"") + gzip.flush(zlib.Z_FULL_FLUSH)
    zeros = gzip.compress(bytes(MIB)) + gzip.flush(zlib.Z_FULL_FLUSH)
    return header + zeros * 1000


BOMB = bomb()


async def send_bombs(sock: socket.socket) -> None:
    """Sends 1 MB that inflates to 1 GB, and waits for the answer."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, request("/agent", BOMB, "Content-Encoding: gzip"))
    await loop.sock_recv(sock, MIB)


async def never_end(sock: socket.socket) -> None:
    """Sends a body of 1 MB without its end, and then a byte now and then."""
    loop = asyncio.get_running_loop()
    head = request("/agent", b"", f"Content-Length: {MIB}")
    await loop.sock_sendall(sock, head + MEGABYTE)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            await loop.sock_recv(sock, MIB)


async def stop_reading(sock: socket.socket) -> None:
    """Has a long answer coming, as a slow Layercode would, and reads none of it."""
    loop = asyncio.get_running_loop()
    turn_id = secrets.token_hex(8)
    await loop.sock_sendall(sock, webhook(turn_id, turn_id, AT_LENGTH))
    # After a while another one comes.
    await asyncio.sleep(30)


async def read_no_answer(sock: socket.socket) -> None:
    """Asks for many short answers at once, and reads none of them."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            await loop.sock_sendall(
                sock, b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n" * 1000
            )
            await asyncio.sleep(20)


async def authorize(sock: socket.socket) -> None:
    """Asks for a session, which Layercode's API does not give."""
    loop = asyncio.get_running_loop()
    page = json.dumps({"agent_id": "agent_1"}).encode()
    await loop.sock_sendall(sock, request("/authorize", page))
    await loop.sock_recv(sock, MIB)


async def be_idle(sock: socket.socket) -> None:
    """Connects, and sends nothing."""
    await asyncio.get_running_loop().sock_recv(sock, MIB)


async def flood(sock: socket.socket) -> None:
    """Sends unsigned webhooks as fast as they are taken."""
    loop = asyncio.get_running_loop()
    messages = request("/agent", b"{}") * 100
    while True:
        await loop.sock_sendall(sock, messages)
        if not await loop.sock_recv(sock, MIB):
            return


# Seconds in which they arrive.
ARRIVAL = 10.0
Stranger = Callable[[socket.socket], Awaitable[None]]
ALL: dict[Stranger, int] = {
    send_bombs: 3,
    never_end: 300,
    stop_reading: 190,
    read_no_answer: 10,
    authorize: 500,
    be_idle: 1000,
}
UNREADING = (stop_reading, read_no_answer)


async def be_strangers(
    connection: Connection, port: int, strangers: dict[Stranger, int]
) -> None:
    """Has strangers come, and come again, as long as this process lives."""
    # The agent is to be measured, not the strangers.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, 19)

    async def be(stranger: Stranger) -> None:
        await asyncio.sleep(random.uniform(0, ARRIVAL))
        while True:
            with contextlib.suppress(OSError):
                async with connection_to(port, narrow=stranger in UNREADING) as sock:
                    await stranger(sock)
            await asyncio.sleep(0.5)

    async with asyncio.TaskGroup() as tasks:
        for stranger, count in strangers.items():
            for _ in range(count):
                tasks.create_task(be(stranger))


@contextlib.asynccontextmanager
async def connection_to(port: int, narrow: bool) -> AsyncIterator[socket.socket]:
    """A new connection to the agent. A narrow one takes little before it is read."""
    with socket.socket() as sock:
        sock.setblocking(False)
        if narrow:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        yield sock


# ---- The processes -------------------------------------------------------------------

Part = Callable[..., Coroutine[Any, Any, None]]
# Processes that share nothing with this one.
SPAWN = get_context("spawn")


def play(part: Part, connection: Connection, *arguments: object) -> None:
    """Plays a part in this process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(part(connection, *arguments))


Limits = tuple[int, int]
LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)


class Agent:
    """The agent that is measured, in a process of its own."""

    def __init__(self, path: Path, ports: list[int], log: Path, files: Limits) -> None:
        gemini, layercode = ports
        self.port = free_port()
        self.log = log

        def limit_files() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)

        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(path)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                preexec_fn=limit_files,
                env={
                    **os.environ,
                    "PORT": str(self.port),
                    "HOST": "127.0.0.1",
                    "LAYERCODE_WEBHOOK_SECRET": SECRET,
                    "LAYERCODE_API_KEY": "key",
                    "LAYERCODE_API_URL": f"http://127.0.0.1:{layercode}",
                    "GOOGLE_GENERATIVE_AI_API_KEY": "key",
                    "GOOGLE_GEMINI_BASE_URL": f"http://127.0.0.1:{gemini}",
                    "LOG_LEVEL": "INFO",
                },
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"Up"), log.read_text()

    def memory(self) -> int:
        """Its memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kib = status.partition("VmRSS:")[2].split()[0]
        return int(kib) // 1024

    def files(self) -> int:
        """How many files and connections it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def processor(self) -> float:
        """The seconds of processor that it has used."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        ticks = [int(number) for number in stat.split()[11:13]]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def log_size(self) -> int:
        """The KiB that it has logged."""
        return self.log.stat().st_size // 1024

    def show(self, when: str, heard: Heard | None = None) -> None:
        """Prints a line of figures."""
        figures = heard.figures() if heard else ""
        print(f"{when:36} {figures:42} {self.memory():7} {self.files():7}", flush=True)

    def stop(self) -> float:
        """Tells it to stop; returns the seconds that it takes, a minute at most."""
        began = time.perf_counter()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.perf_counter() - began


def receive(connection: Connection) -> Any:
    """What a part tells. Raises EOFError or TimeoutError if it does not."""
    if not connection.poll(120):
        raise TimeoutError("a part is stuck")
    return connection.recv()


class Stage:
    """Everybody who takes part in a measurement, each in a process of their own."""

    def __init__(self, path: Path, work: Path) -> None:
        self.path = path
        self.work = work
        self.processes: list[BaseProcess] = []
        self.agents: list[Agent] = []
        self.ports: list[int] = receive(self.start(serve_upstreams)[1])

    def start(self, part: Part, *arguments: object) -> tuple[BaseProcess, Connection]:
        """Starts a part."""
        ours, theirs = Pipe()
        everything = (part, theirs, *arguments)
        process = SPAWN.Process(target=play, args=everything, daemon=True)
        process.start()
        # So that recv() tells if the process ends early.
        theirs.close()
        self.processes.append(process)
        return process, ours

    def agent(self, files: Limits = LIMITS) -> Agent:
        """Starts an agent."""
        log = self.work / f"{len(self.agents)}.log"
        self.agents.append(Agent(self.path, self.ports, log, files))
        return self.agents[-1]

    def callers(
        self, agent: Agent, count: int, seconds: float, text: str = QUICKLY
    ) -> Connection:
        """Has callers talk; the connection receives what they Heard."""
        return self.start(talk, agent.port, count, seconds, text)[1]

    def strangers(self, agent: Agent, strangers: dict[Stranger, int]) -> BaseProcess:
        """Has strangers come."""
        return self.start(be_strangers, agent.port, strangers)[0]

    def end(self) -> None:
        """Ends all who are left."""
        for process in self.processes:
            process.kill()
            process.join()
        for agent in self.agents:
            agent.process.kill()
            agent.process.wait()


# ---- The measurements ----------------------------------------------------------------


def measure_callers(stage: Stage) -> None:
    """First words, memory and files, before, with and after all strangers; a stop."""
    agent = stage.agent()
    receive(stage.callers(agent, 20, 3))
    agent.show("20 callers", receive(stage.callers(agent, 20, 30)))
    callers = stage.callers(agent, 20, 30)
    strangers = stage.strangers(agent, ALL)
    agent.show("the same with the strangers", receive(callers))
    end(strangers)
    time.sleep(60)
    agent.show("a minute after they have gone")
    agent.show("20 callers", receive(stage.callers(agent, 20, 10)))
    stage.strangers(agent, ALL)
    stage.callers(agent, 20, 20)
    time.sleep(8)
    print(f"a stop with all of them there: {agent.stop():.1f} s")


def measure_bodies(stage: Stage) -> None:
    """Memory before, with and after 1,000 bodies of 1 MB that never end."""
    agent = stage.agent()
    receive(stage.callers(agent, 20, 3))
    agent.show("before")
    strangers = stage.strangers(agent, {never_end: 1000})
    most = 0
    for _ in range(200):
        time.sleep(0.1)
        most = max(most, agent.memory())
    end(strangers)
    time.sleep(15)
    agent.show("15 s after 1,000 endless bodies")
    print(f"the most memory meanwhile: {most} MiB")


def measure_stop(stage: Stage) -> None:
    """A stop while 1,000 clients flood the agent."""
    agent = stage.agent()
    stage.strangers(agent, {flood: 1000})
    stage.callers(agent, 20, 30, SLOWLY)
    time.sleep(8)
    print(f"a stop with 1,000 clients flooding: {agent.stop():.1f} s")


def measure_files(stage: Stage) -> None:
    """600 callers at once with the usual limit of 1,024 files; a table that is full."""
    usual = 1024
    agent = stage.agent((usual, LIMITS[1]))
    callers = stage.callers(agent, 600, 0, SLOWLY)
    time.sleep(4)
    agent.show("600 callers, soft limit of 1,024")
    agent.show("the same, at the end", receive(callers))
    print(f"log: {agent.log_size()} KiB")
    agent = stage.agent((usual, usual))
    receive(stage.callers(agent, 20, 3))
    strangers = stage.strangers(agent, {be_idle: 2000})
    time.sleep(5)
    used = agent.processor()
    time.sleep(10)
    used = agent.processor() - used
    agent.show("2,000 strangers, hard limit of 1,024")
    print(f"log: {agent.log_size()} KiB; {used:.1f} s of processor in 10 s")
    end(strangers)
    time.sleep(3)
    agent.show("3 s after they have gone", receive(stage.callers(agent, 20, 3)))


def end(process: BaseProcess) -> None:
    """Ends a process; the system closes its connections."""
    process.kill()
    process.join()


MEASUREMENTS = {
    "callers": measure_callers,
    "bodies": measure_bodies,
    "stop": measure_stop,
    "files": measure_files,
}


def main() -> None:
    """Runs the measurements that the command line names, or all."""
    parser = argparse.ArgumentParser(description="Measure what strangers cost callers.")
    parser.add_argument("what", nargs="*", help=", ".join(MEASUREMENTS))
    parser.add_argument("--agent", type=Path, default=HERE.parent / "agent.py")
    arguments = parser.parse_args()
    columns = f"{'p50':>8} {'p99':>8} {'worst':>8} {'heard':>7} {'none':>7}"
    print(f"{'first word in ms, memory in MiB':36} {columns}  memory   files")
    for what in arguments.what or MEASUREMENTS:
        with tempfile.TemporaryDirectory() as work:
            stage = Stage(arguments.agent, Path(work))
            try:
                MEASUREMENTS[what](stage)
            finally:
                stage.end()


if __name__ == "__main__":
    main()
