"""Measures the agent beside the least that speaks, the floor.

    python .ci/benchmark.py     two minutes, in which nothing else should run

The callers and Gemini are this process. The floor, the agent, and the agent of
README.md that does without google-genai have a process each, so that they are what is
waited for. Both agents are served by main(), as a user serves them. What is promised
stands behind the name of its row: the ratio to the first column, or in the last two
rows our own figure.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median, quantiles

import aiohttp
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parent.parent))

import recipes
from ports import free_port

import agent
from agent import Agent
from test_agent import SECRET, chunk

ids = count(1)

# ---- Gemini --------------------------------------------------------------------------


class QuickGemini(asyncio.Protocol):
    """Gemini at the least cost: each of its five chunks is the time of its sending."""

    # Seconds between two chunks.
    pace = 0.005
    # Whether there is a second chunk.
    goes_on = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps what is written to."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        """Answers when the request is whole."""
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if length is None:
            # The agent looks the model up, which is how it connects.
            self.received = b""
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        elif len(body) == int(length[1]):
            self.received = b""
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.transport.write(head)
            self.speak(5)

    def speak(self, left: int) -> None:
        """Writes a chunk, and later the others."""
        now = f"{time.perf_counter():019.9f} "
        frame = chunk(now, "STOP" if left == 1 else "")
        end = b"0\r\n\r\n" if left == 1 else b""
        self.transport.write(b"%x\r\n%s\r\n%s" % (len(frame), frame, end))
        if left > 1 and self.goes_on:
            asyncio.get_running_loop().call_later(self.pace, self.speak, left - 1)


# ---- What is measured ----------------------------------------------------------------


async def floor() -> web.Application:
    """The least that speaks: no signature, no history, no error handling."""
    from google.genai import Client
    from google.genai.types import (
        GenerateContentConfigDict,
        HttpOptions,
        HttpRetryOptions,
    )

    http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    retry = HttpRetryOptions(attempts=2)
    options = HttpOptions(aiohttp_client=http, retry_options=retry)
    client = Client(api_key="key", http_options=options)
    settings = agent.Settings()
    config: GenerateContentConfigDict = {
        "system_instruction": Agent(settings).instruction(),
        "automatic_function_calling": {"disable": True},
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        event = await request.json()
        frame = {"turn_id": event["turn_id"], "type": "response.tts"}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        parts = await client.aio.models.generate_content_stream(
            model=settings.gemini_model, contents=event["text"], config=config
        )
        async for part in parts:
            frame["content"] = part.text
            await response.write(f"data: {json.dumps(frame)}\n\n".encode())
        end = {"turn_id": event["turn_id"], "type": "response.end"}
        await response.write(f"data: {json.dumps(end)}\n\n".encode())
        return response

    app = web.Application()
    app.router.add_post("/agent", answer)
    add_measures(app)
    return app


class Measured(Agent):
    """The agent as it comes, but for two pages on what it takes."""

    def make_app(self) -> web.Application:
        """Adds the pages."""
        app = super().make_app()
        add_measures(app)
        return app


def add_measures(app: web.Application) -> None:
    """/seconds tells the processor time that was used, /bytes the memory in use."""

    async def seconds(request: web.Request) -> web.Response:
        return web.json_response(time.process_time())

    async def bytes_in_use(request: web.Request) -> web.Response:
        gc.collect()
        tracemalloc.start()
        return web.json_response(tracemalloc.get_traced_memory()[0])

    app.router.add_get("/seconds", seconds)
    app.router.add_get("/bytes", bytes_in_use)


def serve_floor() -> None:
    """Serves the floor at PORT."""
    port = int(os.environ["PORT"])
    show_up = functools.partial(print, flush=True)
    web.run_app(
        floor(), host="127.0.0.1", port=port, print=show_up, **agent.RUNNER_OPTIONS
    )


def serve_ours() -> None:
    """Serves the agent as it comes, by its main()."""
    agent.main(Measured)


def serve_without_sdk() -> None:
    """Serves the agent of README.md that asks Gemini by aiohttp alone."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes.load("without_sdk.py", Path(folder))
    lean: type[Agent] = recipe.LeanAgent
    agent.main(type("MeasuredLean", (Measured, lean), {}))


SERVERS = {"floor": serve_floor, "ours": serve_ours, "no SDK": serve_without_sdk}


def start(stack: ExitStack, *command: str) -> None:
    """Runs Python, from the first line that it prints until the stack is closed."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()


def start_server(stack: ExitStack, name: str) -> int:
    """Runs one of the SERVERS until the stack is closed; returns its port."""
    port = free_port()
    os.environ["PORT"] = str(port)
    start(stack, __file__, name)
    return port


async def ask(port: int, path: str) -> float:
    """What a server tells of itself."""
    async with aiohttp.request("GET", f"http://127.0.0.1:{port}/{path}") as response:
        return float(await response.json())


# ---- Callers -------------------------------------------------------------------------


@dataclass
class Delay:
    """Milliseconds to a chunk, since the webhook and since Gemini has sent it."""

    since_webhook: float
    since_gemini: float


class Caller:
    """A caller in one conversation, with a connection of their own."""

    def __init__(self, port: int, conversation: str) -> None:
        self.port = port
        self.conversation = conversation

    async def talk(self, turns: int = 1, pause: float = 0) -> list[Delay]:
        """Says something in each turn, after a pause of about so many seconds."""
        delays = []
        await self.connect()
        for _ in range(turns):
            await asyncio.sleep(random.uniform(0.2, 1.8) * pause)
            delays += [delay async for delay in self.say_something()]
        self.writer.close()
        return delays

    async def connect(self) -> None:
        """Opens the connection."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def say_something(self) -> AsyncIterator[Delay]:
        """Sends a webhook and yields what each chunk of the answer tells."""
        event = {
            "type": "message",
            "text": "x" * 100,
            "turn_id": f"turn_{next(ids)}",
            "conversation_id": self.conversation,
        }
        body = json.dumps(event).encode()
        head = "POST /agent HTTP/1.1\r\nHost: x\r\n"
        head += f"layercode-signature: {agent.sign(body, SECRET)}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        asked = time.perf_counter()
        self.writer.write(head.encode() + body)
        line = b"-"
        while line not in (b"0\r\n", b""):
            line = await self.reader.readline()
            if b'"response.tts"' in line:
                now = time.perf_counter()
                sent = float(json.loads(line.removeprefix(b"data:"))["content"])
                yield Delay(1000 * (now - asked), 1000 * (now - sent))


async def crowd(
    port: int, callers: int, name: str = "", turns: int = 1, pause: float = 0
) -> list[Delay]:
    """What so many callers measure, in conversations of this name, or in new ones."""
    name = name or f"conversation_{next(ids)}"
    each = await asyncio.gather(
        *[Caller(port, f"{name}-{one}").talk(turns, pause) for one in range(callers)]
    )
    return [delay for delays in each for delay in delays]


# ---- The benchmark -------------------------------------------------------------------


def show(name: str, *columns: list[float]) -> None:
    """Prints each column's median, and the median of its ratios to the first."""
    line = f"{name:65}{median(columns[0]):8.4g}"
    for column in columns[1:]:
        ratio = median(
            own / floor for own, floor in zip(column, columns[0], strict=True)
        )
        line += f"{median(column):9.4g}{ratio:7.2f}"
    print(line, flush=True)


def measure_start(key: str) -> None:
    """How long Python takes to import the libraries, and agent.py to listen."""
    libraries = "aiohttp.web, google.genai" if key else "aiohttp.web"
    os.environ["GOOGLE_GENERATIVE_AI_API_KEY"] = key
    times: list[list[float]] = [[], []]
    for _ in range(5):
        commands = (["-c", f"import {libraries}; print()"], [agent.__file__])
        for command, column in zip(commands, times, strict=True):
            begun = time.perf_counter()
            with ExitStack() as stack:
                start(stack, *command)
                column.append(time.perf_counter() - begun)
    with_key = "with" if key else "without"
    show(f"seconds to start {with_key} a key (imports only; <= 1.5)", *times)


async def measure_throughput(ports: list[int]) -> None:
    """Two conversations of 30 turns of each caller, in parts that take turns."""
    columns: list[list[float]] = [[] for _ in ports]
    for part in range(30):
        for port, column in zip(ports, columns, strict=True):
            begun = time.perf_counter()
            await crowd(port, 50, f"long{part // 15}", turns=2)
            column.append(100 / (time.perf_counter() - begun))
    show("turns/s of 50 callers (>= 0.85)", *columns)


async def measure_length(port: int) -> None:
    """What a turn of the agent's costs after 40 others, beside a first one."""
    await crowd(port, 50, "long0", turns=10)
    QuickGemini.pace = 0
    costs: list[list[float]] = [[], []]
    waits: list[list[float]] = [[], []]
    for part in range(8):
        for side, name in enumerate((f"fresh{part}", "long0")):
            before = await ask(port, "seconds")
            turns = [await Caller(port, f"{name}-{one}").talk() for one in range(50)]
            costs[side].append(1000 / 50 * (await ask(port, "seconds") - before))
            waits[side].append(median(turn[0].since_webhook for turn in turns))
    show("processor ms of a turn after 40 (beside: a first one; <= 1.25)", *costs)
    show("ms to the first word after 40 turns (beside: at first; <= 1.2)", *waits)


async def measure_delay(ports: list[int]) -> None:
    """How long a chunk is on its way from Gemini to a caller."""
    QuickGemini.pace = 0.05
    p50: list[list[float]] = [[] for _ in ports]
    p99: list[list[float]] = [[] for _ in ports]
    for _ in range(4):
        for side, port in enumerate(ports):
            delays = await crowd(port, 100, turns=2, pause=1)
            cuts = quantiles([delay.since_gemini for delay in delays], n=100)
            p50[side].append(cuts[49])
            p99[side].append(cuts[98])
    show("ms added to a chunk, 100 callers with pauses, p50 (<= 1.2)", *p50)
    show("ms added to a chunk, 100 callers with pauses, p99 (<= 1.5)", *p99)


async def measure_memory(ports: list[int]) -> None:
    """What 500 turns and 200 answers in flight hold."""
    turns: list[list[float]] = []
    streams: list[list[float]] = []
    for port in ports:
        QuickGemini.pace = 0
        QuickGemini.goes_on = True
        empty = await ask(port, "bytes")
        await crowd(port, 20, turns=25)
        talked = await ask(port, "bytes")
        QuickGemini.goes_on = False
        callers = [Caller(port, f"live-{one}") for one in range(200)]
        await asyncio.gather(*[caller.connect() for caller in callers])
        answers = [caller.say_something() for caller in callers]
        await asyncio.gather(*[anext(answer) for answer in answers])
        speaking = await ask(port, "bytes")
        for caller in callers:
            caller.writer.close()
        turns.append([(talked - empty) / 500])
        streams.append([(speaking - talked) / 200 / 1024])
    show("bytes of a stored turn (<= 1024)", *turns)
    show("KiB of a live stream (<= 100)", *streams)


async def benchmark() -> None:
    """Measures everything."""
    gemini = await asyncio.get_running_loop().create_server(QuickGemini, "127.0.0.1", 0)
    host, port = gemini.sockets[0].getsockname()
    os.environ["GOOGLE_GEMINI_BASE_URL"] = f"http://{host}:{port}"
    os.environ["LAYERCODE_WEBHOOK_SECRET"] = SECRET
    # A free one, for those that are started to be timed.
    os.environ["PORT"] = "0"
    print(f"{'':65}   floor     ours  ratio   no SDK  ratio")
    for key in ("", "key"):
        measure_start(key)
    with ExitStack() as stack:
        ports = [start_server(stack, name) for name in SERVERS]
        for port in ports:
            # To warm up.
            await crowd(port, 50, turns=2)
        await measure_throughput(ports)
        await measure_length(ports[1])
        await measure_delay(ports)
        await measure_memory(ports)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        SERVERS[sys.argv.pop()]()
    else:
        asyncio.run(benchmark())
