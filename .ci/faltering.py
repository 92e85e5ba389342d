"""Measures what callers hear of a Gemini that falters.

    python .ci/faltering.py                  this agent, in a minute
    python .ci/faltering.py --agent PATH     another agent.py

The agent has a process of its own. All callers begin within a few seconds and say one
thing each, in a conversation of their own.
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
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from ports import listens

ROOT = Path(__file__).parent.parent
SECRET = "a webhook secret"
WORDS = "Sure, no problem."
# Seconds between two callers, so that they do not wait for each other.
GAP = 0.05
# Seconds after which a caller hangs up, and the agent must be up.
PATIENCE = 30.0

# ---- Gemini --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What Gemini does when it is asked."""

    # Seconds to the first chunk.
    after: float = 0.02
    words: str = WORDS
    finish: str = "STOP"
    status: int = 200
    # Whether the connection is reset before the first chunk.
    reset: bool = False


FAULTS = {
    "stalled before the first chunk": Answer(after=60),
    "503": Answer(status=503),
    "empty, and ends with STOP": Answer(words=""),
    "connection reset": Answer(reset=True),
    "MALFORMED_FUNCTION_CALL": Answer(words="", finish="MALFORMED_FUNCTION_CALL"),
}
# Says what Gemini does when it is asked about a turn for the first, second, ... time.
Plan = Callable[[int, int], Answer]


class Gemini:
    """Answers as planned, and counts how often it was asked about each turn."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.asks: Counter[int] = Counter()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Answers a question, whose last words are the number of the turn."""
        question = await request.json()
        turn = int(question["contents"][-1]["parts"][-1]["text"])
        self.asks[turn] += 1
        answer = self.plan(turn, self.asks[turn])
        if answer.status != 200:
            error = {"code": answer.status, "message": "", "status": "UNAVAILABLE"}
            return web.json_response({"error": error}, status=answer.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if answer.reset:
            assert request.transport is not None
            request.transport.abort()
            return response
        await asyncio.sleep(answer.after)
        candidate = {
            "content": {"parts": [{"text": answer.words}], "role": "model"},
            "finishReason": answer.finish,
        }
        chunk = json.dumps({"candidates": [candidate]})
        await response.write(f"data: {chunk}\r\n\r\n".encode())
        return response

    async def model(self, request: web.Request) -> web.Response:
        """Answers whoever looks the model up."""
        return web.json_response({"name": "models/" + request.match_info["model"]})

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Serves it on a free port; gives its URL."""
        app = web.Application()
        app.router.add_post("/{version}/models/{model}", self.stream)
        app.router.add_get("/{version}/models/{model}", self.model)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


# ---- The agent -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def agent_at_work(folder: Path, changes: str, gemini: str) -> AsyncIterator[str]:
    """Runs the agent.py of a folder, with changes to it; gives its webhook's URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"import agent; {changes}; agent.main()",
        cwd=folder,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={
            **os.environ,
            "LAYERCODE_WEBHOOK_SECRET": SECRET,
            "GOOGLE_GENERATIVE_AI_API_KEY": "key",
            "GOOGLE_GEMINI_BASE_URL": gemini,
            "PORT": str(port),
        },
    )
    try:
        async with asyncio.timeout(PATIENCE):
            while not await listens(port):
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}/agent"
    finally:
        process.kill()
        await process.wait()


# ---- Callers -------------------------------------------------------------------------


@dataclass
class Heard:
    """What the caller of a turn has heard."""

    words: str = ""
    # Seconds to the first of them.
    first_word: float = PATIENCE
    # How often Gemini was asked.
    asks: int = 0


async def say(http: aiohttp.ClientSession, url: str, turn: int) -> Heard:
    """Says the number of the turn, as Layercode would."""
    await asyncio.sleep(turn * GAP)
    event = {
        "type": "message",
        "text": str(turn),
        "turn_id": f"turn_{turn}",
        "conversation_id": f"conversation_{turn}",
    }
    body = json.dumps(event).encode()
    now = str(int(time.time()))
    signed = f"{now}.".encode() + body
    signature = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    headers = {"layercode-signature": f"t={now},v1={signature}"}
    heard = Heard()
    begun = time.monotonic()
    # Who hangs up, or is hung up on, has heard what they have heard.
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with http.post(url, data=body, headers=headers) as response:
            async for line in response.content:
                if b'"response.tts"' not in line:
                    continue
                if not heard.words:
                    heard.first_word = time.monotonic() - begun
                heard.words += json.loads(line.removeprefix(b"data:"))["content"]
    return heard


async def talk(folder: Path, plan: Plan, turns: int, changes: str = "") -> list[Heard]:
    """What the callers of so many turns hear while Gemini answers as planned."""
    gemini = Gemini(plan)
    async with (
        gemini.served() as gemini_url,
        agent_at_work(folder, changes or "pass", gemini_url) as url,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        ) as http,
    ):
        all_heard = await asyncio.gather(*[say(http, url, one) for one in range(turns)])
    for turn, heard in enumerate(all_heard):
        heard.asks = gemini.asks[turn]
    return all_heard


# ---- What is measured ----------------------------------------------------------------


def show(name: str, all_heard: list[Heard]) -> None:
    """Prints what some callers have heard, in one row."""
    answered = sum(heard.words == WORDS for heard in all_heard)
    silent = sum(not heard.words for heard in all_heard)
    apologized = len(all_heard) - answered - silent
    waits = [heard.first_word for heard in all_heard]
    cuts = statistics.quantiles(waits, n=100, method="inclusive")
    asks = [heard.asks for heard in all_heard]
    row = f"{name:42}{len(all_heard):6}{answered:10}{apologized:10}{silent:8}"
    row += f"{cuts[49]:8.2f}{cuts[94]:8.2f}{cuts[98]:8.2f}{max(waits):9.2f}"
    row += f"{statistics.mean(asks):7.2f}{max(asks):5}"
    print(row, flush=True)


async def measure(folder: Path) -> None:
    """Measures everything, of the agent in a folder."""
    print(f"{'':42}{'':24}{'':10}{'first word after, in seconds':>33}{'asks':>12}")
    columns = f"{'turns':>6}{'answered':>10}{'apology':>10}{'silence':>8}"
    columns += f"{'p50':>8}{'p95':>8}{'p99':>8}{'slowest':>9}{'mean':>7}{'max':>5}"
    print(f"{'':42}{columns}")

    names = list(FAULTS)

    def falters_once(turn: int, ask: int) -> Answer:
        return FAULTS[names[turn % len(names)]] if ask == 1 else Answer()

    def stalls_at_times(turn: int, ask: int) -> Answer:
        # The same ones each time, in whichever order they come.
        luck = random.Random(f"turn {turn}, ask {ask}").random()
        return Answer(after=20 if luck < 0.1 else 0.3)

    def is_slow(turn: int, ask: int) -> Answer:
        return Answer(after=5)

    all_heard = await talk(folder, falters_once, 50)
    for number, name in enumerate(names):
        show(f"first ask {name}", all_heard[number :: len(names)])
    show("all of these", all_heard)
    show("0.3 s, or 20 s in one ask of ten", await talk(folder, stalls_at_times, 200))
    show("always 5 s", await talk(folder, is_slow, 50))
    never = "agent.ASK_AGAIN_AFTER = 60"
    show("always 5 s, without a second ask", await talk(folder, is_slow, 50, never))


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description="What callers hear of bad moments.")
    parser.add_argument("--agent", type=Path, default=ROOT / "agent.py", metavar="PATH")
    asyncio.run(measure(parser.parse_args().agent.resolve().parent))


if __name__ == "__main__":
    main()
