"""Measures the agent beside the least that speaks, the floor, in the same minutes.

    python .ci/benchmark.py                    two minutes, in which nothing else runs
    python .ci/benchmark.py --before WHICH     another edition, too: a file, or a git
                                               revision; the two take turns

A row begins with what the agents stand beside (the floor, the imports alone, a first
turn) and what is promised. Each has its figure, and the median of the ratios to that.
"""

import argparse
import asyncio
import json
import os
import random
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

from served import SERVE, Answer, Caller, Heard, Served, served, show, start_gemini

SERVE_FLOOR = "import benchmark; benchmark.serve_floor()"
# As `python agent.py` does it, which compiles the file.
START = "import runpy; runpy.run_path('agent.py', run_name='__main__')"


def serve_floor() -> None:
    """Serves the least that speaks: no signature, no history, no error handling."""
    import aiohttp
    from aiohttp import web
    from google.genai import Client
    from google.genai.types import GenerateContentConfigDict, HttpOptions

    client = web.AppKey("client", Client)
    config: GenerateContentConfigDict = {
        "automatic_function_calling": {"disable": True}
    }
    config["system_instruction"] = "You're a friendly voice assistant on a call. " * 10

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

    async def make_app() -> web.Application:
        app = web.Application()
        http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        options = HttpOptions(aiohttp_client=http)
        app[client] = Client(api_key="key", http_options=options)
        app.router.add_post("/agent", answer)
        return app

    port = int(os.environ["PORT"])
    web.run_app(make_app(), port=port, handler_cancellation=True, access_log=None)


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
    name = name or f"new{time.time_ns()}"
    calls = [talk(port, f"{name}-{one}", turns, pause) for one in range(callers)]
    return [heard for caller in await asyncio.gather(*calls) for heard in caller]


def show_ratios(name: str, times: list[list[float]]) -> None:
    """Prints medians of what was measured several times, and of the ratios."""
    beside, *agents = zip(*times, strict=True)
    cells = [f"{median(beside):.4g}"]
    for number, own in enumerate(agents, 1):
        ratio = median(figures[number] / figures[0] for figures in times)
        cells += [f"{median(own):.4g}", f"{ratio:.2f}"]
    show(name, *cells)


def measure_start(editions: list[str], key: str, libraries: str) -> None:
    """How long Python takes to import the libraries, and an agent to listen."""
    programs = [("agent.py", f"import {libraries}; print('Up')")]
    programs += [(one, START) for one in editions]

    def seconds(which: str, code: str) -> float:
        begun = time.perf_counter()
        with served(which, "", code, GOOGLE_GENERATIVE_AI_API_KEY=key):
            return time.perf_counter() - begun

    times = [[seconds(*program) for program in programs] for _ in range(5)]
    show_ratios(f"s to start {'with' if key else 'without'} a key (<= 1.5)", times)


async def turns_a_second(server: Served, name: str) -> float:
    """How many turns 50 callers have in a second."""
    begun = time.perf_counter()
    await crowd(server.port, 50, 2, name)
    return 100 / (time.perf_counter() - begun)


async def wait_for_word(server: Served, name: str) -> float:
    """The seconds to a first word in 50 conversations, one after another."""
    waits = [(await talk(server.port, f"{name}-{one}", 1, 0))[0] for one in range(50)]
    return median(one.first_word for one in waits)


async def cuts_of_delays(server: Served) -> list[float]:
    """The 99 cuts of the milliseconds that chunks are on their way."""
    heard = await crowd(server.port, 100, 2, pause=1)
    return quantiles([1000 * delay for one in heard for delay in one.delays], n=100)


async def measure(editions: list[str]) -> None:
    """Measures the floor and the agents, which take turns."""
    programs = [("agent.py", SERVE_FLOOR), *[(one, SERVE) for one in editions]]
    answer = Answer(("now at {:f}, ",) * 5, pace=0.005)
    gemini = await start_gemini(lambda words: answer)
    here = str(Path(__file__).parent)
    times: list[list[float]] = []
    with ExitStack() as stack:
        # One start may be 3 % faster than the next. 30 turns of each caller.
        for part in range(60):
            if part % 15 == 0:
                stack.close()
                servers = []
                for which, code in programs:
                    one = served(which, gemini, code, PYTHONPATH=here)
                    servers.append(stack.enter_context(one))
                    await crowd(servers[-1].port, 50, 2)
            times.append([await turns_a_second(one, "long0") for one in servers])
        show_ratios("turns/s of 50 callers (>= 0.85)", times)
        answer = replace(answer, pace=0)
        for agent in servers[1:]:
            await crowd(agent.port, 50, 2, "long0")
        times = []
        for part in range(16):
            figures = [1.0]
            for agent in servers[1:]:
                first = await wait_for_word(agent, f"new{part}")
                figures.append(await wait_for_word(agent, "long0") / first)
            times.append(figures)
        show_ratios("wait for a word after 40 turns (<= 1.2)", times)
        answer = replace(answer, pace=0.05)
        cuts = [[await cuts_of_delays(one) for one in servers] for _ in range(4)]
        for name, at in (("p50 (<= 1.2)", 49), ("p99 (<= 1.5)", 98)):
            times = [[each[at] for each in time] for time in cuts]
            show_ratios(f"ms added to a chunk, {name}", times)


def main() -> None:
    parser = argparse.ArgumentParser(description="The agent beside the floor.")
    parser.add_argument("--before", metavar="WHICH", help="a file, or a git revision")
    before = parser.parse_args().before
    editions = [*([before] if before else []), "agent.py"]
    show("", "beside", *[cell for one in editions for cell in (one[-9:], "ratio")])
    measure_start(editions, "", "aiohttp.web")
    measure_start(editions, "key", "aiohttp.web, google.genai")
    asyncio.run(measure(editions))


if __name__ == "__main__":
    main()
