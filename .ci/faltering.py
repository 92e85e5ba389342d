"""Measures what callers hear of a Gemini that falters.

    python .ci/faltering.py                 this agent, in a minute
    python .ci/faltering.py --agent WHICH   another edition: a file, or a git revision

The agent has a process of its own. All callers begin within a few seconds and say one
thing each, in a conversation of their own. Exits with status 1 if one of those whose
first question fails waits too long, or for nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fakes import Answer, Caller, Heard, start_gemini
from served import SERVE, edition, served, show

FAULTS = {
    "stalled before the first chunk": Answer(after=60),
    "503": Answer(status=503, chunks=()),
    "empty, and ends with STOP": Answer(chunks=("",)),
    "connection reset": Answer(status=0),
    "MALFORMED_FUNCTION_CALL": Answer(("",), "MALFORMED_FUNCTION_CALL"),
}
# Seconds to the first word that are promised whatever happens to the first question.
PROMISE = 3.5
# Seconds between two callers, so that they do not wait for each other.
GAP = 0.05
NEVER_AGAIN = f"import agent; agent.Agent.ask_again_after = float('inf'); {SERVE}"
# What a caller has heard, and how often Gemini was asked for it.
Call = tuple[Heard, int]
# Says what Gemini does when it is asked about a turn for the first time, second, ...
Plan = Callable[[int, int], Answer]


async def talk(folder: Path, plan: Plan, callers: int, code: str = SERVE) -> list[Call]:
    """What so many callers hear while Gemini answers as planned."""
    asks: Counter[int] = Counter()

    def answer(words: str) -> Answer:
        turn = int(words)
        asks[turn] += 1
        return plan(turn, asks[turn])

    async def call(port: int, turn: int) -> Heard:
        await asyncio.sleep(turn * GAP)
        caller = Caller(port, f"conversation_{turn}")
        await caller.connect()
        return await caller.say(str(turn))

    with served(folder, await start_gemini(answer), code) as agent:
        turns = range(callers)
        heard = await asyncio.gather(*[call(agent.port, turn) for turn in turns])
    return [(heard[turn], asks[turn]) for turn in turns]


def show_calls(name: str, calls: list[Call]) -> None:
    """Prints what some callers have heard, in one row."""
    heard = [one for one, _ in calls]
    asks = [number for _, number in calls]
    whole = [one for one in heard if one.is_whole]
    answered = sum(bool(one.delays) for one in whole)
    counts = (answered, len(whole) - answered, len(calls) - len(whole))
    waits = sorted(round(one.first_word, 2) for one in heard)
    cuts = (waits[len(waits) // 2], waits[len(waits) * 95 // 100], waits[-1])
    show(name, *counts, *cuts, statistics.mean(asks), max(asks))


async def measure(folder: Path) -> None:
    """Measures everything. Exits with status 1 if the promise is broken."""
    columns = "answered apology silence word,p50 p95 slowest,s asks,mean most"
    show("", *columns.split())
    names = list(FAULTS)

    def falters_once(turn: int, ask: int) -> Answer:
        return FAULTS[names[turn % len(names)]] if ask == 1 else Answer(after=0.02)

    def stalls_at_times(turn: int, ask: int) -> Answer:
        # The same ones each time, in whichever order they come.
        luck = random.Random(f"turn {turn}, ask {ask}").random()
        return Answer(after=20 if luck < 0.1 else 0.3)

    def is_slow(turn: int, ask: int) -> Answer:
        return Answer(after=5)

    faltered = await talk(folder, falters_once, 50)
    for number, name in enumerate(names):
        show_calls(f"first ask: {name}", faltered[number :: len(names)])
    show_calls("all of these", faltered)
    at_times = await talk(folder, stalls_at_times, 200)
    show_calls("0.3 s, or 20 s in one ask of ten", at_times)
    show_calls("always 5 s", await talk(folder, is_slow, 50))
    never = await talk(folder, is_slow, 50, NEVER_AGAIN)
    show_calls("always 5 s, without a second ask", never)
    in_time = sum(heard.first_word <= PROMISE for heard, _ in faltered)
    print(f"a first word within {PROMISE} s: {in_time} of {len(faltered)}")
    if in_time < len(faltered):
        sys.exit("Some waited longer.")


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description="What callers hear of bad moments.")
    parser.add_argument("--agent", default="agent.py", metavar="WHICH")
    with edition(parser.parse_args().agent) as folder:
        asyncio.run(measure(folder))


if __name__ == "__main__":
    main()
