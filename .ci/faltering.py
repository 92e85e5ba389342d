"""Measures what callers hear of a Gemini that falters, in half a minute.

    python .ci/faltering.py

Each caller says one thing. Exits with status 1 if one of those whose first question
fails waits too long, or for an apology.
"""

import asyncio
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable

from served import Answer, Caller, Heard, served, show, start_gemini

FAULTS = {
    "stalled before the first chunk": Answer(after=60),
    "503": Answer(status=503, chunks=()),
    "empty, and ends with STOP": Answer(chunks=("",)),
    "connection reset": Answer(status=0),
    "MALFORMED_FUNCTION_CALL": Answer(("",), "MALFORMED_FUNCTION_CALL"),
}
# Seconds to the first word that are promised whatever happens to the first question.
PROMISE = 3.5
# What a caller has heard, and how often Gemini was asked for it.
Call = tuple[Heard, int]


async def talk(plan: Callable[[int, int], Answer], callers: int) -> list[Call]:
    """What so many callers hear; the plan says how each one's nth ask is answered."""
    asks: Counter[int] = Counter()

    def answer(words: str) -> Answer:
        turn = int(words)
        asks[turn] += 1
        return plan(turn, asks[turn])

    async def call(port: int, turn: int) -> Heard:
        await asyncio.sleep(turn * 0.05)
        caller = Caller(port, f"conversation_{turn}")
        await caller.connect()
        return await caller.say(str(turn))

    with served("agent.py", await start_gemini(answer)) as agent:
        turns = range(callers)
        heard = await asyncio.gather(*[call(agent.port, turn) for turn in turns])
    return [(heard[turn], asks[turn]) for turn in turns]


def show_calls(name: str, calls: list[Call]) -> None:
    """Prints what some callers have heard, in one row."""
    heard, asks = zip(*calls, strict=True)
    whole = [one for one in heard if one.is_whole]
    answered = sum(bool(one.delays) for one in whole)
    counts = (answered, len(whole) - answered, len(calls) - len(whole))
    waits = sorted(round(one.first_word, 2) for one in heard)
    cuts = (waits[len(waits) // 2], waits[len(waits) * 95 // 100], waits[-1])
    show(name, *counts, *cuts, statistics.mean(asks), max(asks))


async def main() -> None:
    columns = "answered apology silence word,p50 p95 slowest,s asks,mean most"
    show("", *columns.split())
    names = list(FAULTS)

    def falters_once(turn: int, ask: int) -> Answer:
        return FAULTS[names[turn % len(names)]] if ask == 1 else Answer(after=0.02)

    def stalls_at_times(turn: int, ask: int) -> Answer:
        luck = random.Random(f"turn {turn}, ask {ask}").random()
        return Answer(after=20 if luck < 0.1 else 0.3)

    faltered = await talk(falters_once, 50)
    for number, name in enumerate(names):
        show_calls(f"first ask: {name}", faltered[number :: len(names)])
    show_calls("0.3 s, or 20 s in one ask of ten", await talk(stalls_at_times, 200))
    show_calls("always 5 s", await talk(lambda *_: Answer(after=5), 50))
    late = [one for one, _ in faltered if one.first_word > PROMISE or not one.delays]
    print(f"an answer within {PROMISE} s: {len(faltered) - len(late)}")
    if late:
        sys.exit("Some waited longer, or for an apology.")


if __name__ == "__main__":
    asyncio.run(main())
