"""Measures the agent beside the least that speaks, the floor, in the same minutes.

    python .ci/benchmark.py                    two minutes, in which nothing else runs
    python .ci/benchmark.py --before WHICH     another edition, too: a file, or a git
                                               revision; the two take turns

The floor and the agents have a process each; Gemini and the callers are this one. An
agent is served by its main(), as a user serves it. A row has, for each agent, what it
stands beside (the floor, the imports alone, a first turn, what is promised), its own
figure, and the median of their ratios, which is the result: what is promised of it is
behind the name of the row.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median, quantiles

from fakes import Answer, Caller, Heard, start_gemini
from served import Served, edition, served, show

HERE = Path(__file__).parent
SERVE_FLOOR = "import benchmark; benchmark.serve_floor()"
# As `python agent.py` does it, which compiles the file.
START = "import runpy; runpy.run_path('agent.py', run_name='__main__')"
NOBODY = "http://127.0.0.1:1"
names = count(1)

# ---- The floor -----------------------------------------------------------------------


def serve_floor() -> None:
    """Serves the least that speaks: no signature, no history, no error handling."""
    import aiohttp
    from aiohttp import web
    from google.genai import Client
    from google.genai.types import GenerateContentConfigDict, HttpOptions

    config: GenerateContentConfigDict = {
        "system_instruction": "You're a friendly voice assistant on a call. " * 10,
        "automatic_function_calling": {"disable": True},
    }

    async def answer(request: web.Request) -> web.StreamResponse:
        event = await request.json()
        frame = {"turn_id": event["turn_id"], "type": "response.tts"}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        parts = await request.app[client].aio.models.generate_content_stream(
            model="gemini", contents=event["text"], config=config
        )
        async for part in parts:
            frame["content"] = part.text or ""
            await response.write(f"data: {json.dumps(frame)}\n\n".encode())
        await response.write(b'data: {"type": "response.end"}\n\n')
        return response

    client = web.AppKey("client", Client)

    async def make_app() -> web.Application:
        app = web.Application()
        http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app[client] = Client(
            api_key="key", http_options=HttpOptions(aiohttp_client=http)
        )
        app.router.add_post("/agent", answer)
        return app

    web.run_app(
        make_app(),
        port=int(os.environ["PORT"]),
        print=lambda _: print("Up", flush=True),
        handler_cancellation=True,
        access_log=None,
    )


# ---- Callers -------------------------------------------------------------------------


async def talk(port: int, conversation: str, turns: int, pause: float) -> list[Heard]:
    """Says something in each turn, after a pause of about so many seconds."""
    caller = Caller(port, conversation)
    await caller.connect()
    heard = []
    for _ in range(turns):
        await asyncio.sleep(random.uniform(0.2, 1.8) * pause)
        heard.append(await caller.say("x" * 100))
    caller.writer.close()
    assert all(one.is_whole and one.delays for one in heard)
    return heard


async def crowd(
    port: int, callers: int, turns: int, name: str = "", pause: float = 0
) -> list[Heard]:
    """What so many callers hear, in conversations of this name, or in new ones."""
    name = name or f"new{next(names)}"
    each = await asyncio.gather(
        *[talk(port, f"{name}-{one}", turns, pause) for one in range(callers)]
    )
    return [heard for caller in each for heard in caller]


# ---- What is measured ----------------------------------------------------------------

# For each agent, what it is held against, and its own figures.
Column = tuple[list[float], list[float]]


def show_ratios(name: str, columns: list[Column]) -> None:
    """Prints medians, and the median of the ratios."""
    cells = []
    for beside, own in columns:
        ratio = median(ours / other for other, ours in zip(beside, own, strict=True))
        cells += [f"{median(beside):.4g}", f"{median(own):.4g}", f"{ratio:.2f}"]
    show(name, *cells)


def beside_floor(figures: list[list[float]]) -> list[Column]:
    """The columns of figures of which the floor's are the first."""
    floor, *agents = figures
    return [(floor, own) for own in agents]


def measure_start(folders: list[Path], key: str) -> None:
    """How long Python takes to import the libraries, and an agent to listen."""
    libraries = "aiohttp.web, google.genai" if key else "aiohttp.web"
    imports = (HERE, f"import {libraries}; print('Up')")
    programs = [imports, *[(folder, START) for folder in folders]]
    figures: list[list[float]] = [[] for _ in programs]
    for _ in range(5):
        for (folder, code), own in zip(programs, figures, strict=True):
            begun = time.perf_counter()
            with served(folder, NOBODY, code, GOOGLE_GENERATIVE_AI_API_KEY=key):
                own.append(time.perf_counter() - begun)
    with_key = "with" if key else "without"
    name = f"s to start {with_key} a key (<= 1.5)"
    show_ratios(name, beside_floor(figures))


class Benchmark:
    """The floor and the agents, which take turns, and their Gemini's answers."""

    def __init__(self) -> None:
        self.servers: list[Served] = []
        self.answer = Answer(("now at {:f}, ",) * 5, pace=0.005)

    async def run(self, folders: list[Path]) -> None:
        """Measures everything."""
        gemini = await start_gemini(lambda words: self.answer)
        with ExitStack() as stack:
            floor = stack.enter_context(served(HERE, gemini, SERVE_FLOOR))
            agents = [stack.enter_context(served(one, gemini)) for one in folders]
            self.servers = [floor, *agents]
            for server in self.servers:
                # To warm up.
                await crowd(server.port, 50, 2)
            await self.measure_throughput()
            await self.measure_length()
            await self.measure_delay()
            await self.measure_memory()

    async def measure_throughput(self) -> None:
        """Two conversations of 30 turns of each caller, in parts that take turns."""
        figures: list[list[float]] = [[] for _ in self.servers]
        for part in range(30):
            for server, own in zip(self.servers, figures, strict=True):
                begun = time.perf_counter()
                await crowd(server.port, 50, 2, f"long{part // 15}")
                own.append(100 / (time.perf_counter() - begun))
        show_ratios("turns/s of 50 callers (>= 0.85)", beside_floor(figures))

    async def measure_length(self) -> None:
        """What a caller waits for after 40 turns."""
        agents = self.servers[1:]
        columns: list[Column] = [([], []) for _ in agents]
        self.answer = replace(self.answer, pace=0)
        for agent in agents:
            await crowd(agent.port, 50, 10, "long0")
        for part in range(8):
            for agent, (first, later) in zip(agents, columns, strict=True):
                for name, waits in ((f"fresh{part}", first), ("long0", later)):
                    # One after another, so that none waits for others.
                    heard = [
                        (await talk(agent.port, f"{name}-{one}", 1, 0))[0]
                        for one in range(50)
                    ]
                    waits.append(1000 * median(one.first_word for one in heard))
        show_ratios("ms to a word after 40 turns (<= 1.2)", columns)

    async def measure_delay(self) -> None:
        """How long a chunk is on its way from Gemini to a caller."""
        self.answer = replace(self.answer, pace=0.05)
        middle: list[list[float]] = [[] for _ in self.servers]
        worst: list[list[float]] = [[] for _ in self.servers]
        for _ in range(4):
            for side, server in enumerate(self.servers):
                heard = await crowd(server.port, 100, 2, pause=1)
                delays = [1000 * delay for one in heard for delay in one.delays]
                middle[side].append(median(delays))
                worst[side].append(quantiles(delays, n=100)[98])
        show_ratios("ms added to a chunk, p50 (<= 1.2)", beside_floor(middle))
        show_ratios("ms added to a chunk, p99 (<= 1.5)", beside_floor(worst))

    async def measure_memory(self) -> None:
        """What 500 turns and 200 answers in flight hold, beside what is promised."""
        turns: list[Column] = []
        streams: list[Column] = []
        for agent in self.servers[1:]:
            self.answer = replace(self.answer, pace=0, finish="STOP")
            empty = await bytes_in_use(agent)
            await crowd(agent.port, 20, 25)
            talked = await bytes_in_use(agent)
            self.answer = replace(self.answer, finish="")
            speaking = asyncio.create_task(crowd(agent.port, 200, 1))
            # Time enough for the words of all of them; they then go on for a minute.
            await asyncio.sleep(3)
            live = await bytes_in_use(agent)
            speaking.cancel()
            turns.append(([1024], [(talked - empty) / 500]))
            streams.append(([100], [(live - talked) / 200 / 1024]))
        show_ratios("bytes of a turn (<= 1)", turns)
        show_ratios("KiB of a live stream (<= 1)", streams)


async def bytes_in_use(agent: Served) -> int:
    """How many bytes an agent uses for what is going on."""
    # By then, connections that were closed are closed there, too.
    await asyncio.sleep(0.5)
    _, used = agent.tell()
    return used


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description="The agent beside the floor.")
    parser.add_argument("--before", metavar="WHICH", help="a file, or a git revision")
    parser.add_argument("--agent", default="agent.py", metavar="WHICH")
    arguments = parser.parse_args()
    editions = [one for one in (arguments.before, arguments.agent) if one]
    header = [("beside", one[-9:], "ratio") for one in editions]
    show("", *[cell for three in header for cell in three])
    with ExitStack() as stack:
        folders = [stack.enter_context(edition(one)) for one in editions]
        for key in ("", "key"):
            measure_start(folders, key)
        asyncio.run(Benchmark().run(folders))


if __name__ == "__main__":
    main()
