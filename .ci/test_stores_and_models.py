"""Tests of three recipes of README.md: Redis, another model, Gemini without its SDK.

python -m pytest -p test_agent .ci/test_stores_and_models.py
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import recipes
from aiohttp import web
from ports import free_port, listens

import agent
from agent import Agent, Event, Histories
from test_agent import (
    GEMINI_KEY,
    SECRET,
    WITH_GEMINI,
    Cut,
    Gemini,
    Hang,
    Layercode,
    Stall,
    Start,
    Status,
    Step,
    chunk,
    report,
    served,
)

pytestmark = pytest.mark.asyncio

KEYS = {
    "LAYERCODE_WEBHOOK_SECRET": SECRET,
    "GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY,
}


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Waits until something is so, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not await check():
            await asyncio.sleep(0.01)


def users(gemini: Gemini) -> list[str]:
    """What the caller has said, as the last request showed it."""
    return [text for role, text in gemini.heard() if role == "user"]


# ---- Redis ---------------------------------------------------------------------------


class Redis:
    """A real redis-server, which can be started, stopped and asked."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.url = f"redis://127.0.0.1:{port}"
        self.process: Process | None = None

    async def start(self) -> None:
        """Starts it, with nothing in it."""
        self.process = await asyncio.create_subprocess_exec(
            "redis-server",
            *("--port", str(self.port), "--save", "", "--dir", str(self.folder)),
            stdout=PIPE,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(10):
            async for line in self.process.stdout:
                if b"Ready to accept" in line:
                    return
        raise AssertionError("redis-server ended")

    async def stop(self) -> None:
        """Kills it, and with it what it had."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()
        self.process = None

    def freeze(self) -> None:
        """Lets it answer nothing until thaw()."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def ask(self, *words: object) -> str:
        """What redis-cli prints."""
        command = ["redis-cli", "-p", str(self.port), *map(str, words)]
        cli = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        return (await cli.communicate())[0].decode()

    async def facts(self, caller: Layercode) -> list[str]:
        """The facts of a caller's conversation."""
        key = f"conversation:{caller.conversation}:facts"
        return (await self.ask("lrange", key, 0, -1)).splitlines()

    async def wait_for(self, words: str, caller: Layercode) -> None:
        """Waits until a fact has these words."""

        async def there() -> bool:
            return words in str(await self.facts(caller))

        await until(there)


@pytest_asyncio.fixture
async def redis(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> AsyncIterator[Redis]:
    """A Redis with nothing in it."""
    pytest.importorskip("redis")
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    server = Redis(tmp_path, unused_tcp_port_factory())
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def redis_agent(redis: Redis, tmp_path: Path) -> ModuleType:
    """The recipe, with patience for a machine that is busy."""
    module = recipes.load("redis_agent.py", tmp_path)
    module.PATIENCE = 5
    module.PAUSE = 0.1
    return module


@dataclasses.dataclass
class Pair:
    """Two agents with one Redis, the stores of both, and one caller's ends of them."""

    a: Layercode
    b: Layercode
    store_a: Any
    store_b: Any

    def __iter__(self) -> Any:
        return iter((self.a, self.b))

    async def recovered(self) -> None:
        """Waits until both know that Redis is back, and have written what it missed."""

        async def so() -> bool:
            stores = (self.store_a, self.store_b)
            return not any(one.away or one.due or one.under_way for one in stores)

        await until(so)


@pytest_asyncio.fixture
async def pair(
    redis: Redis, redis_agent: ModuleType, start: Start, gemini: Gemini
) -> Pair:
    """Two agents, each as in a process of its own."""
    settings = redis_agent.RedisSettings(
        **dataclasses.asdict(WITH_GEMINI), redis_url=redis.url
    )
    one = redis_agent.RedisAgent(settings)
    other = redis_agent.RedisAgent(settings)
    a = await start(one)
    b = await start(other)
    b.conversation = a.conversation
    return Pair(a, b, one.store, other.store)


@asynccontextmanager
async def running(
    file: Path, before: str = "", **settings: str
) -> AsyncIterator[tuple[Process, str]]:
    """Runs a recipe in a process of its own, after some code; gives its URL, too."""
    code = f"{before}\nimport runpy\nrunpy.run_path({file.name!r}, run_name='__main__')"
    port = settings.setdefault("PORT", str(free_port()))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        cwd=file.parent,
        env={**os.environ, **KEYS, **settings},
        stdout=PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert b"Up: " in await process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        # The pipe is read to its end, or waiting would never end.
        await process.communicate()


async def test_a_conversation_that_alternates_between_two_processes_is_whole(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    await pair.a.send(pair.a.event("session.start"))
    said = [("user", "(The caller says nothing.)"), ("model", Agent.greeting)]
    for number, end in enumerate([pair.b, pair.a] * 3):
        gemini.scripts = [[f"Answer {number}."]]
        await end.say(f"Question {number}")
        assert gemini.heard() == [*said, ("user", f"Question {number}")]
        said += [("user", f"Question {number}"), ("model", f"Answer {number}.")]
    key = f"conversation:{pair.a.conversation}:facts"
    assert 86_000 < int(await redis.ask("ttl", key)) <= 86_400
    # Before the answer, and when it is over.
    assert "cmdstat_lrange:calls=14," in await redis.ask("info", "commandstats")


async def test_a_barge_in_on_one_process_is_exact_on_the_other_whatever_comes_late(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    gemini.scripts = [["The first step ", "is flour. ", Stall()]]
    event = pair.a.event("message", text="How do I bake?")
    async with pair.a.post(event) as response:
        await pair.a.hear(response, "is flour. ")
        # The first process still speaks.
        assert await pair.b.say("Cake!", **report(event, "The first"))
        response.close()
    await redis.wait_for("is flour", pair.a)
    for end in pair:
        await end.say("And then?")
        assert gemini.heard()[:3] == [
            ("user", "How do I bake?"),
            ("model", "The first [interrupted]"),
            ("user", "Cake!"),
        ]


async def test_what_was_heard_of_a_turn_counts_even_if_the_turn_is_told_later(
    pair: Pair, gemini: Gemini
) -> None:
    await pair.b.say("Cake!", **report({"turn_id": "late"}, "The first"))
    name = pair.a.conversation
    await pair.store_a.record(name, "late", user="How do I bake?")
    await pair.store_a.record(name, "late", spoken="The first step is", finished=True)
    for end in pair:
        await end.say("And then?")
        assert ("model", "The first [interrupted]") in gemini.heard()


async def test_a_message_on_the_process_that_still_speaks_finds_what_it_has_said(
    pair: Pair, gemini: Gemini
) -> None:
    gemini.scripts = [["The first step ", "is flour.", Stall()]]
    async with pair.a.post(pair.a.event("message", text="How?")) as response:
        await pair.a.hear(response, "is flour.")
        await pair.a.say("Cake!")
    assert gemini.heard()[1] == ("model", "The first step is flour. [interrupted]")


async def test_a_turn_that_was_cut_off_and_is_answered_elsewhere_counts_once(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    gemini.scripts = [["The first step ", Stall()]]
    event = pair.a.event("message", text="How do I bake?")
    async with pair.a.post(event) as response:
        await pair.a.hear(response, "step ")
        gemini.scripts = [["Sure."]]
        assert await pair.b.send(event) == "Sure."
        response.close()
    # The first process tells late how far it came.
    await redis.wait_for("The first step", pair.a)
    assert await pair.a.send(event) == "Sure."
    assert len(gemini.asked) == 2
    for end in pair:
        await end.say("And then?")
        assert gemini.heard()[:2] == [("user", "How do I bake?"), ("model", "Sure.")]


async def test_after_a_kill_in_mid_reply_the_other_process_has_the_callers_words(
    pair: Pair, gemini: Gemini, redis: Redis, tmp_path: Path
) -> None:
    file = recipes.save("redis_agent.py", tmp_path)
    async with running(file, REDIS_URL=redis.url) as (process, url):
        doomed = Layercode(pair.a.http, url, pair.a.conversation)
        gemini.scripts = [["Well, ", Stall()]]
        async with doomed.post(doomed.event("message", text="I am Ada.")) as response:
            await doomed.hear(response, "Well, ")
            process.kill()
            await process.wait()
    await pair.b.say("Who am I?")
    assert users(gemini) == ["I am Ada.", "Who am I?"]


async def test_what_a_stop_cuts_off_is_written(
    pair: Pair, gemini: Gemini, redis: Redis, tmp_path: Path
) -> None:
    file = recipes.save("redis_agent.py", tmp_path)
    soon = "import agent\nagent.GRACE = 0.5"
    async with running(file, soon, REDIS_URL=redis.url) as (process, url):
        callers = [Layercode(pair.a.http, url) for _ in range(20)]
        gemini.scripts = [["Well, ", Stall()] for _ in callers]
        for caller in callers:
            response = await caller.post(caller.event("message", text="A story!"))
            await caller.hear(response, "Well, ")
        process.terminate()
        async with asyncio.timeout(20):
            await process.wait()
    for caller in callers:
        await Layercode(caller.http, pair.b.url, caller.conversation).say("Go on.")
        assert gemini.heard()[1] == ("model", "Well,  [interrupted]")


async def test_while_redis_is_gone_calls_go_on_and_it_gets_what_it_missed(
    pair: Pair, gemini: Gemini, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await pair.a.say("One")
    await redis.stop()
    for text in ("Two", "Three", "Four"):
        assert await pair.a.say(text) == "Sure, no problem."
    assert users(gemini) == ["One", "Two", "Three", "Four"]
    assert caplog.text.count("without Redis: ConnectionError") == 1
    # It comes back empty. What it had and what it missed is written without a webhook.
    await redis.start()
    await pair.recovered()
    await pair.b.say("Five")
    assert users(gemini) == ["One", "Two", "Three", "Four", "Five"]
    assert [role for role, _ in gemini.heard()] == ["user", "model"] * 4 + ["user"]


async def test_a_redis_that_comes_back_empty_gets_what_a_process_has_only_read_too(
    pair: Pair, gemini: Gemini, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await pair.a.say("One")
    await pair.b.say("Two")
    await redis.stop()
    await redis.start()
    await pair.b.say("Three")
    await pair.a.say("Four")
    assert users(gemini) == ["One", "Two", "Three", "Four"]
    assert "without Redis" not in caplog.text


async def test_a_redis_that_loses_everything_during_a_reply_gets_it_in_order(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    await pair.a.say("One")
    flushed = asyncio.Event()
    gemini.scripts = [["Well, ", flushed, "yes."]]
    async with pair.a.post(pair.a.event("message", text="Two")) as response:
        await pair.a.hear(response, "Well, ")
        await redis.ask("flushall")
        flushed.set()
        await response.read()
    await pair.b.say("Three")
    assert users(gemini) == ["One", "Two", "Three"]
    assert ("model", "Well, yes.") in gemini.heard()


async def test_nobody_waits_for_a_redis_that_is_stuck_but_the_first(
    pair: Pair,
    gemini: Gemini,
    redis: Redis,
    redis_agent: ModuleType,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await pair.a.say("One")
    redis_agent.PATIENCE = 0.3
    redis.freeze()
    await pair.a.say("Two")
    # Whoever waited for Redis now would wait for too long.
    redis_agent.PATIENCE = 15
    async with asyncio.timeout(5):
        await pair.a.say("Three")
    assert users(gemini) == ["One", "Two", "Three"]
    assert caplog.text.count("without Redis: TimeoutError") == 1
    redis.thaw()
    await pair.recovered()
    await pair.b.say("Four")
    assert users(gemini) == ["One", "Two", "Three", "Four"]


async def test_however_many_callers_come_at_once_a_stuck_redis_holds_up_none_for_long(
    pair: Pair, redis: Redis, redis_agent: ModuleType
) -> None:
    redis_agent.BATCH = 1
    redis_agent.PATIENCE = 0.3
    redis_agent.PAUSE = 10
    callers = [Layercode(pair.a.http, pair.a.url) for _ in range(5)]
    redis.freeze()
    async with asyncio.timeout(5):
        await asyncio.gather(*[caller.say("One") for caller in callers])


async def test_a_caller_who_hangs_up_while_redis_is_slow_leaves_their_words(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    await pair.a.say("One")
    redis.freeze()
    async with pair.a.post(pair.a.event("message", text="I am Ada.")):
        # The answer has begun: its head is there, and the agent waits for Redis.
        pass
    redis.thaw()
    await redis.wait_for("I am Ada.", pair.a)
    for end in pair:
        await end.say("Who am I?")
        assert users(gemini)[:3] == ["One", "I am Ada.", "Who am I?"]
    assert len(gemini.asked) == 3


@pytest.mark.parametrize(
    ("ill", "well"),
    [
        # Too few replicas: it can only be read.
        ("min-replicas-to-write 1", "min-replicas-to-write 0"),
        # It is full, and gives nothing up.
        ("maxmemory 1", "maxmemory 0"),
    ],
)
async def test_a_redis_that_takes_nothing_is_logged_once_and_gets_all_of_it_later(
    pair: Pair,
    gemini: Gemini,
    redis: Redis,
    caplog: pytest.LogCaptureFixture,
    ill: str,
    well: str,
) -> None:
    await pair.a.say("One")
    await redis.ask("config", "set", *ill.split())
    for text in ("Two", "Three", "Four"):
        assert await pair.a.say(text) == "Sure, no problem."
    assert caplog.text.count("without Redis") == 1
    await redis.ask("config", "set", *well.split())
    await pair.recovered()
    await pair.b.say("Five")
    assert users(gemini) == ["One", "Two", "Three", "Four", "Five"]


async def test_a_redis_that_fails_is_tried_once_and_then_left_alone_for_a_while(
    pair: Pair, redis: Redis, redis_agent: ModuleType
) -> None:
    redis_agent.PAUSE = 10
    await redis.stop()
    tries = []

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(writer)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", redis.port):
        for text in ("One", "Two", "Three"):
            await pair.a.say(text)
    assert len(tries) == 1


async def test_a_fact_reaches_redis_even_if_nobody_waits_for_it(
    pair: Pair, redis: Redis
) -> None:
    name = pair.a.conversation
    await pair.store_a.record(name, "turn", user="I am Ada.")
    await redis.wait_for("I am Ada.", pair.a)
    # As an agent with tools does while it speaks.
    await pair.store_a.record(name, "turn", done=[{"role": "model", "parts": []}])
    await redis.wait_for("model", pair.a)


async def test_each_outage_is_logged_again_after_a_quiet_time(
    pair: Pair, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for outages in (1, 2):
        await redis.stop()
        await pair.a.say("One")
        await pair.a.say("Two")
        assert caplog.text.count("without Redis") == outages
        await redis.start()
        await pair.recovered()
        # As if that had been a minute ago.
        pair.store_a.failed_at -= 60


async def test_what_a_stop_finds_unwritten_is_written_if_redis_is_back(
    pair: Pair, gemini: Gemini, redis: Redis, redis_agent: ModuleType
) -> None:
    redis_agent.PAUSE = 10
    await redis.stop()
    await pair.a.say("I am Ada.")
    await redis.start()
    async with asyncio.timeout(5):
        await pair.store_a.close()

    async def nobody_is_connected() -> bool:
        # But redis-cli.
        return "connected_clients:1\r" in await redis.ask("info")

    await until(nobody_is_connected)
    await pair.b.say("Who am I?")
    assert users(gemini) == ["I am Ada.", "Who am I?"]


async def test_connections_that_redis_has_closed_are_not_used(
    pair: Pair, gemini: Gemini, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    for end in pair:
        await end.say("Hello")
    await redis.ask("client", "kill", "type", "normal")
    for end in pair:
        await end.say("And again")
    assert users(gemini) == ["Hello", "Hello", "And again", "And again"]
    assert "without Redis" not in caplog.text


async def test_after_an_outage_everything_is_written_at_once_by_one_connection(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    callers = [Layercode(pair.a.http, pair.a.url) for _ in range(50)]
    await asyncio.gather(*[caller.say("One") for caller in callers])
    await redis.stop()
    for text in ("Two", "Three"):
        await asyncio.gather(*[caller.say(text) for caller in callers])
    await redis.start()
    await pair.recovered()
    stats = await redis.ask("info", "commandstats")
    # One RPUSH for each conversation, however much it has missed.
    assert "cmdstat_rpush:calls=50," in stats
    others = [Layercode(pair.a.http, pair.b.url, one.conversation) for one in callers]
    await asyncio.gather(*[caller.say("Four") for caller in [*callers, *others]])
    await callers[7].say("Five")
    assert users(gemini) == ["One", "Two", "Three", "Four", "Four", "Five"]
    # Those of the two processes, and redis-cli's own.
    assert "connected_clients:3\r" in await redis.ask("info")


async def test_few_conversations_go_to_redis_at_a_time_so_that_callers_are_served(
    pair: Pair, redis_agent: ModuleType
) -> None:
    redis_agent.BATCH = 3
    sizes = []
    exchange = pair.store_a._exchange

    async def note_size(conversations: list[str]) -> None:
        sizes.append(len(conversations))
        await exchange(conversations)

    pair.store_a._exchange = note_size
    names = [f"conversation {number}" for number in range(10)]
    await asyncio.gather(*[pair.store_a.load(name) for name in names])
    assert sizes == [3, 3, 3, 1]


async def test_no_time_out_of_redis_py_itself_can_lose_a_cancellation(
    pair: Pair,
) -> None:
    # On Python 3.11 it would take the right two events within a microsecond.
    how = pair.store_a.redis.connection_pool.connection_kwargs
    assert how["socket_timeout"] is None


async def test_callers_who_hang_up_leave_the_connection_to_redis_as_it_is(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    async def hang_up_soon(number: int) -> None:
        caller = Layercode(pair.a.http, pair.a.url)
        saying = asyncio.create_task(caller.say("Hello"))
        await asyncio.sleep(number / 5000)
        saying.cancel()
        await asyncio.wait([saying])

    await asyncio.gather(*[hang_up_soon(number) for number in range(200)])
    await pair.a.say("One")
    await pair.b.say("Two")
    assert users(gemini) == ["One", "Two"]
    assert "total_connections_received:3\r" in await redis.ask("info")


async def test_what_has_expired_is_not_written_again(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    await pair.a.say("I am Ada.")
    await redis.ask("flushall")
    pair.store_a.known[pair.a.conversation].told -= 86_401
    await pair.a.say("Hello")
    await pair.b.say("Who am I?")
    assert users(gemini) == ["Hello", "Who am I?"]


async def test_a_call_that_goes_on_does_not_expire(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    for text in ("One", "Two"):
        await pair.a.say(text)
        pair.store_a.known[pair.a.conversation].told -= 86_000
    await redis.ask("flushall")
    await pair.a.say("Three")
    assert users(gemini) == ["One", "Two", "Three"]


async def test_what_another_version_wrote_ends_no_call(
    pair: Pair, gemini: Gemini, redis: Redis
) -> None:
    await pair.a.say("One")
    name = pair.a.conversation
    rubbish = [
        json.dumps({"turn_id": "newer", "facts": {"mood": "good", "user": "Newer"}}),
        json.dumps({"turn_id": "other", "facts": {"user": 5, "done": "all"}}),
        json.dumps({"turn_id": 5, "facts": []}),
        *("hello", "[]", "[" * 10_000, b"\xff"),
    ]
    await redis.ask("rpush", f"conversation:{name}:facts", *rubbish)
    for end in pair:
        assert await end.say("Two") == "Sure, no problem."
    assert users(gemini) == ["One", "Newer", "Two", "Two"]


async def test_a_process_keeps_no_more_conversations_and_facts_than_it_may(
    pair: Pair, gemini: Gemini, redis: Redis, redis_agent: ModuleType
) -> None:
    redis_agent.MAX_CONVERSATIONS = 5
    redis_agent.MAX_FACTS = 8
    callers = [Layercode(pair.a.http, pair.a.url) for _ in range(7)]
    for number in range(7):
        for caller in callers:
            await caller.say(str(number))
    assert len(pair.store_a.known) == 5
    # Those that were spoken in last are kept.
    await callers[2].say("And again")
    await callers[0].say("And again")
    assert callers[2].conversation in pair.store_a.known
    assert callers[3].conversation not in pair.store_a.known
    assert len(await redis.facts(callers[0])) == 8
    await redis.stop()
    for number in range(7, 20):
        await callers[0].say(str(number))
    known = pair.store_a.known[callers[0].conversation]
    assert len(known.stored) + len(known.unwritten) <= 2 * 8 + 2
    await redis.start()
    await pair.recovered()
    elsewhere = Layercode(pair.b.http, pair.b.url, callers[0].conversation)
    await elsewhere.say("Who am I?")
    assert users(gemini)[-4:] == ["17", "18", "19", "Who am I?"]


async def test_facts_that_a_full_list_has_given_up_do_not_come_back(
    pair: Pair, gemini: Gemini, redis_agent: ModuleType
) -> None:
    redis_agent.MAX_FACTS = 8
    await pair.a.say("Long ago")
    for number in range(6):
        await pair.b.say(str(number))
    await pair.a.say("Now")
    assert users(gemini) == ["2", "3", "4", "5", "Now"]
    await pair.b.say("And now")
    assert users(gemini)[-4:] == ["4", "5", "Now", "And now"]
    assert "Long ago" not in users(gemini)


async def test_what_an_agent_with_tools_has_done_is_known_to_the_other_process(
    redis: Redis, redis_agent: ModuleType, start: Start, gemini: Gemini, tmp_path: Path
) -> None:
    tool_agent = recipes.load("tool_agent.py", tmp_path)
    settings = redis_agent.RedisSettings(
        **dataclasses.asdict(WITH_GEMINI), redis_url=redis.url
    )

    def order(pizza: str) -> str:
        """Orders a pizza."""
        return f"a {pizza} is on its way"

    class Pizzeria(redis_agent.RedisAgent, tool_agent.ToolAgent):
        """Takes orders, in several processes."""

        tools = [order]

    one = await start(Pizzeria(settings))
    other = await start(Pizzeria(settings))
    call = {"functionCall": {"id": "1", "name": "order", "args": {"pizza": "salami"}}}
    gemini.scripts = [[[call]], ["It's ", Stall()]]
    cut = await one.barge_in("A salami!", after="It's ")
    other.conversation = one.conversation
    await other.say("Hello?", **report(cut, ""))
    assert "a salami is on its way" in json.dumps(gemini.asked[-1]["contents"])


@pytest.mark.parametrize("url", ["secret@localhost", "redis://:secret@localhost:no"])
async def test_a_redis_url_that_is_wrong_ends_the_start_with_one_line(
    tmp_path: Path, url: str
) -> None:
    pytest.importorskip("redis")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, recipes.save("redis_agent.py", tmp_path)),
        env={**os.environ, "REDIS_URL": url},
        stdout=PIPE,
        stderr=PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == 1
    assert error == b"redis_agent.py: REDIS_URL is not like redis://localhost:6379\n"


async def test_two_recipes_make_one_agent(
    redis: Redis,
    redis_agent: ModuleType,
    start: Start,
    gemini: Gemini,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in {
        "REDIS_URL": redis.url,
        "LOGIN_SECRET": "a login secret",
        "LAYERCODE_WEBHOOK_SECRET": SECRET,
        "LAYERCODE_API_KEY": "API-KEY",
        "GOOGLE_GENERATIVE_AI_API_KEY": "key",
    }.items():
        monkeypatch.setenv(name, value)
    recipes.load("login_agent.py", tmp_path)
    pizza = recipes.load("pizza_for_users.py", tmp_path).Pizza
    one, two = [await start(pizza()) for _ in range(2)]
    two.conversation = one.conversation
    ada = {"custom_metadata": {"name": "Ada"}}
    greeting = "Hi Ada! How can I help you today?"
    assert await one.send(one.event("session.start", **ada)) == greeting
    await two.say("Hello.")
    assert gemini.heard()[-2:] == [("model", greeting), ("user", "Hello.")]
    page = {"agent_id": "a"}
    async with one.http.post(one.url + "/authorize", json=page) as response:
        assert (response.status, response.reason) == (403, "log in first")


@dataclasses.dataclass
class Said:
    """A turn of a story, with what the caller has heard of the answer."""

    event: Event
    heard: str
    finished: bool = True

    def shown(self) -> list[tuple[str, str]]:
        """The turn as Gemini must be shown it."""
        user = ("user", self.event.get("text", agent.SILENCE))
        answer = self.heard if self.finished else f"{self.heard} [interrupted]"
        return [user, ("model", answer)] if self.heard else [user]


class Story:
    """A call that goes on in one or the other of two processes, by the dice."""

    def __init__(self, pair: Pair, gemini: Gemini, seed: int) -> None:
        self.dice = random.Random(seed)
        self.gemini = gemini
        name = f"story_{seed}"
        self.ends = [Layercode(end.http, end.url, name) for end in pair]
        self.turns: list[Said] = []
        self.open: list[aiohttp.ClientResponse] = []

    async def play(self) -> None:
        """A few turns, each of which may be cut off, or delivered twice."""
        for _ in range(self.dice.randrange(1, 7)):
            await self.dice.choice(
                [self.speak, self.speak, self.cut_in, self.repeat, self.greet]
            )()
        await self.speak()
        for response in self.open:
            response.close()

    def message(self) -> Event:
        """The caller's next words, with what they heard of the turn before."""
        text = f"words {len(self.turns)}"
        last = self.turns[-1] if self.turns else None
        # Layercode tells of a turn that was cut off, and of one that it has not
        # played to its end.
        if last is None or (last.finished and self.dice.random() < 0.7):
            return self.ends[0].event("message", text=text)
        last.heard = last.heard[: self.dice.randrange(len(last.heard) + 1)]
        last.finished = False
        return self.ends[0].event(
            "message", text=text, **report(last.event, last.heard)
        )

    async def speak(self) -> None:
        """A turn that is spoken to its end."""
        event = self.message()
        self.turns.append(Said(event, f"Well {len(self.turns)} so yes"))
        self.gemini.scripts = [[self.turns[-1].heard]]
        assert await self.dice.choice(self.ends).send(event)
        self.check()

    async def cut_in(self) -> None:
        """A turn that is cut off, of which the agent may notice that late."""
        event = self.message()
        end = self.dice.choice(self.ends)
        self.turns.append(Said(event, "Well so yes", finished=False))
        self.gemini.scripts = [["Well ", "so ", "yes", Stall()]]
        response = await end.post(event)
        await end.hear(response, "yes")
        self.check()
        self.open.append(response)
        if self.dice.random() < 0.7:
            self.dice.choice(self.open).close()

    async def repeat(self) -> None:
        """The last turn is delivered again, after it was spoken to its end."""
        if self.turns and self.turns[-1].finished:
            last = self.turns[-1]
            assert await self.dice.choice(self.ends).send(last.event) == last.heard

    async def greet(self) -> None:
        """The caller connects again, and is greeted."""
        event = self.ends[0].event("session.start")
        # What Layercode has not told by now, it never tells.
        if self.turns and not self.turns[-1].finished:
            return
        self.turns.append(Said(event, await self.dice.choice(self.ends).send(event)))

    def check(self) -> None:
        """Gemini was shown what was said and heard, up to the last words."""
        wanted = [pair for turn in self.turns for pair in turn.shown()]
        last = ("user", self.turns[-1].event["text"])
        assert self.gemini.heard() == [*wanted[: wanted.index(last)], last]


async def test_whatever_happens_to_a_caller_of_two_processes_the_history_is_exact(
    pair: Pair, gemini: Gemini
) -> None:
    first = int(os.environ.get("SEED", random.randrange(1_000_000)))
    for seed in range(first, first + 150):
        try:
            await Story(pair, gemini, seed).play()
        except AssertionError as error:
            raise AssertionError(f"SEED={seed}") from error


@asynccontextmanager
async def nginx(folder: Path, *ports: int) -> AsyncIterator[str]:
    """README.md's nginx, before copies at these ports; gives its URL."""
    readme = recipes.README.read_text("utf-8")
    (block,) = re.findall(r"(?ms)^```nginx\n(upstream agents.*?)^```$", readme)
    listen = free_port()
    block = block.replace("listen 80;", f"listen 127.0.0.1:{listen};")
    for default, port in zip((3000, 3001), ports, strict=True):
        block = block.replace(f"127.0.0.1:{default};", f"127.0.0.1:{port};")
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}"
        f"http {{ access_log off; {block} }}"
    )
    process = await asyncio.create_subprocess_exec(
        *("nginx", "-p", folder, "-c", config)
    )
    try:
        async with asyncio.timeout(10):
            while not await listens(listen):
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{listen}"
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
async def test_two_copies_behind_nginx_are_one_agent_also_while_one_is_restarted(
    redis: Redis, gemini: Gemini, tmp_path: Path
) -> None:
    file = recipes.save("redis_agent.py", tmp_path)
    async with AsyncExitStack() as stack:
        one, url = await stack.enter_async_context(running(file, REDIS_URL=redis.url))
        _, other_url = await stack.enter_async_context(
            running(file, REDIS_URL=redis.url)
        )
        ports = [int(each.rpartition(":")[2]) for each in (url, other_url)]
        front = await stack.enter_async_context(nginx(tmp_path, *ports))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        caller = Layercode(http, front)
        gemini.scripts = [["Once upon ", Stall()]]
        cut = await caller.barge_in("A story!", after="Once upon ")
        await gemini.until(streams=0)
        await caller.say("Another!", **report(cut, "Once"))
        one.terminate()
        await one.wait()
        # The next is the dead copy's turn, or the one after it.
        for text in ("Two", "Three", "Four"):
            assert await caller.say(text) == "Sure, no problem."
    assert gemini.heard()[:3] == [
        ("user", "A story!"),
        ("model", "Once [interrupted]"),
        ("user", "Another!"),
    ]
    assert users(gemini)[2:] == ["Two", "Three", "Four"]


# ---- Another model -------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"


def completion(words: str, finish: str | None = None) -> bytes:
    """A chunk as OpenAI streams it."""
    choice = {"index": 0, "delta": {"content": words}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


SURE = [completion("Sure, "), completion("no problem.")]
STOP = completion("", "stop")


class OpenAI:
    """Speaks OpenAI's streaming format, as the next of its scripts says."""

    def __init__(self) -> None:
        self.url = ""
        # Bytes are sent as they are, a number is the status of the answer.
        self.scripts: list[list[bytes | int | asyncio.Event | Stall]] = []
        self.asked: list[Event] = []
        self.keys: list[str | None] = []
        self.connections: set[asyncio.BaseTransport | None] = set()
        # Streams that are not over.
        self.open = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answers a question."""
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        self.connections.add(request.transport)
        script = self.scripts.pop(0) if self.scripts else [*SURE, STOP, DONE]
        status = script[0] if isinstance(script[0], int) else 200
        response = web.StreamResponse(status=status)
        if status == 307:
            response.headers["Location"] = request.path
        self.open += 1
        try:
            await response.prepare(request)
            # What a server may send beside its chunks.
            await response.write(b": a comment\n\n")
            await response.write(completion("", ""))
            await response.write(b'data: {"choices": [{"delta": null}]}\n\n')
            await response.write(b'data: {"choices": null}\n\n')
            for step in script:
                if isinstance(step, Stall):
                    await asyncio.Event().wait()
                if isinstance(step, asyncio.Event):
                    await step.wait()
                if isinstance(step, bytes):
                    await response.write(step)
        finally:
            self.open -= 1
        return response

    async def is_quiet(self) -> bool:
        """Whether no stream is open."""
        return self.open == 0


@pytest_asyncio.fixture
async def openai() -> AsyncIterator[OpenAI]:
    """An OpenAI-compatible server."""
    fake = OpenAI()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.complete)
    async with served(app, handler_cancellation=True) as url:
        fake.url = f"{url}/v1"
        yield fake


@pytest.fixture
def another_model(tmp_path: Path) -> ModuleType:
    """The recipe."""
    return recipes.load("another_model.py", tmp_path)


@pytest_asyncio.fixture
async def openai_caller(
    another_model: ModuleType, openai: OpenAI, start: Start
) -> Layercode:
    """A caller of the agent with another model. Its server's URL ends with a slash."""
    settings = another_model.OpenAISettings(
        layercode_webhook_secret=SECRET,
        openai_api_key="a key",
        openai_model="small",
        openai_base_url=openai.url + "/",
    )
    return await start(another_model.OpenAIAgent(settings))


async def test_another_model_is_asked_as_openai_has_it(
    openai_caller: Layercode, openai: OpenAI
) -> None:
    await openai_caller.send(openai_caller.event("session.start"))
    openai.scripts = [[completion("Sure, "), completion("**the first** step"), Stall()]]
    cut = await openai_caller.barge_in("How do I bake?", after="step")
    await until(openai.is_quiet)
    assert (
        await openai_caller.say("Cake!", **report(cut, "Sure")) == "Sure, no problem."
    )
    asked = openai.asked[-1]
    assert (asked["model"], asked["stream"]) == ("small", True)
    assert [(one["role"], one["content"]) for one in asked["messages"]] == [
        ("system", Agent.persona + "\n" + Agent.voice_rules),
        ("user", agent.SILENCE),
        ("assistant", Agent.greeting),
        ("user", "How do I bake?"),
        ("assistant", "Sure [interrupted]"),
        ("user", "Cake!"),
    ]
    assert set(openai.keys) == {"Bearer a key"}


async def test_another_model_says_no_asterisks(
    openai_caller: Layercode, openai: OpenAI
) -> None:
    openai.scripts = [[completion("**Sure**, `yes`."), STOP, DONE]]
    assert await openai_caller.say("Hi") == "Sure, yes."


@pytest.mark.parametrize(
    "ending",
    [
        [STOP],
        [DONE],
        [completion("", "length"), DONE],
        [completion("", ""), completion("", ""), DONE],
        [STOP, b'data: {"choices": [], "usage": {}}\n\n', DONE],
        [STOP, Stall()],
    ],
)
async def test_however_a_server_ends_a_whole_answer_it_is_one(
    openai_caller: Layercode, openai: OpenAI, ending: list[bytes]
) -> None:
    openai.scripts = [[*SURE, *ending]]
    assert await openai_caller.say("Hi") == "Sure, no problem."


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        ([], "the answer broke off"),
        ([completion("", "content_filter"), DONE], "ended the answer: content_filter"),
        ([completion("", "tool_calls"), DONE], "ended the answer: tool_calls"),
        ([b'data: {"error": {"code": 500}}\n\n', DONE], "reported an error"),
    ],
)
async def test_an_answer_of_another_model_that_ends_badly_ends_with_the_apology(
    openai_caller: Layercode,
    openai: OpenAI,
    caplog: pytest.LogCaptureFixture,
    ending: list[bytes],
    why: str,
) -> None:
    openai.scripts = [[*SURE, *ending]]
    assert await openai_caller.say("Hi") == f"Sure, no problem. {Agent.apology}"
    assert why in caplog.text
    assert len(openai.asked) == 1


@pytest.mark.parametrize("first", [[503], [DONE], [Stall()], [completion(" ")]])
async def test_another_model_is_asked_once_more_before_the_first_word(
    openai_caller: Layercode,
    openai: OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    first: list[bytes | int | Stall],
) -> None:
    monkeypatch.setattr(agent, "ASK_AGAIN_AFTER", 0.2)
    openai.scripts = [first]
    assert await openai_caller.say("Hi") == "Sure, no problem."
    assert len(openai.asked) == 2
    await until(openai.is_quiet)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 307])
async def test_a_refusal_of_another_model_is_logged_and_not_asked_for_twice(
    openai_caller: Layercode,
    openai: OpenAI,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    openai.scripts = [[status], [status]]
    assert await openai_caller.say("Hi") == Agent.apology
    assert f"the model's server answered {status}" in caplog.text
    # A redirection may come to its end the next time.
    assert len(openai.asked) == (2 if status == 307 else 1)


async def test_the_connection_to_another_model_is_used_again(
    openai_caller: Layercode, openai: OpenAI
) -> None:
    for ending in ([STOP, DONE], [STOP], [DONE]):
        openai.scripts = [[*SURE, *ending]]
        await openai_caller.say("Hi")
    assert len(openai.connections) == 1


async def test_the_end_of_a_stream_of_another_model_is_waited_for_to_use_it_again(
    openai_caller: Layercode, openai: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["another_model"], "STREAM_END_PATIENCE", 5)
    over = asyncio.Event()
    openai.scripts = [[*SURE, STOP, over, DONE]]
    asyncio.get_running_loop().call_later(0.2, over.set)
    for _ in range(2):
        await openai_caller.say("Hi")
    assert len(openai.connections) == 1


async def test_another_model_needs_no_key_of_gemini_and_its_own_only_from_who_has_one(
    another_model: ModuleType, openai: OpenAI, start: Start
) -> None:
    settings = another_model.OpenAISettings(
        layercode_webhook_secret=SECRET, openai_base_url=openai.url
    )
    assert [one.partition(" ")[0] for one in settings.missing()] == [
        "LAYERCODE_API_KEY",
        "OPENAI_API_KEY",
    ]
    caller = await start(another_model.OpenAIAgent(settings))
    assert await caller.say("Hi") == "Sure, no problem."
    assert openai.keys == [None]
    with pytest.raises(agent.SettingsError, match="OPENAI_BASE_URL=localhost"):
        another_model.OpenAISettings(openai_base_url="localhost")


async def test_another_model_is_set_by_the_environment(
    another_model: ModuleType,
    openai: OpenAI,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAYERCODE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "another key")
    monkeypatch.setenv("OPENAI_MODEL", "large")
    monkeypatch.setenv("OPENAI_BASE_URL", openai.url)
    histories = Histories()
    caller = await start(another_model.OpenAIAgent(histories=histories))
    assert await caller.say("Hi") == "Sure, no problem."
    assert await histories.load(caller.conversation)
    assert (openai.keys, openai.asked[0]["model"]) == (["Bearer another key"], "large")


# ---- Gemini without its SDK ----------------------------------------------------------


@pytest.fixture
def lean_agent(tmp_path: Path) -> Any:
    """The recipe's agent."""
    return recipes.load("without_sdk.py", tmp_path).LeanAgent


@pytest_asyncio.fixture
async def lean_caller(lean_agent: Any, start: Start, gemini: Gemini) -> Layercode:
    """A caller of the agent that asks Gemini without its SDK."""
    return await start(lean_agent(WITH_GEMINI))


def thinking_of(asked: Event) -> Event:
    """How much thinking was asked for. The SDK spells it differently."""
    config = asked.get("generationConfig", {}).get("thinkingConfig", {})
    return {name.replace("_", "").lower(): config[name] for name in config}


@pytest.mark.parametrize("thinking", ["", "low", "0", "-1"])
async def test_without_its_sdk_gemini_is_sent_what_the_sdk_sends(
    lean_agent: Any, start: Start, gemini: Gemini, thinking: str
) -> None:
    settings = dataclasses.replace(WITH_GEMINI, gemini_thinking=thinking)
    for one in (Agent(settings), lean_agent(settings)):
        caller = await start(one)
        await caller.send(caller.event("session.start"))
        gemini.scripts = [["Sure, the first ", "step is ", Stall()]]
        cut = await caller.barge_in("How do I bake?", after="step is ")
        await gemini.until(streams=0)
        assert await caller.say("No, cake!", **report(cut, "Sure")) == (
            "Sure, no problem."
        )
    by_sdk, without = gemini.asked[1], gemini.asked[3]
    assert thinking_of(without) == thinking_of(by_sdk)
    for name in ("contents", "systemInstruction"):
        assert without[name] == by_sdk[name]
    assert without["contents"][-2]["parts"] == [{"text": "Sure [interrupted]"}]


async def test_google_genai_is_not_imported_where_it_is_not_needed(
    gemini: Gemini, tmp_path: Path
) -> None:
    file = recipes.save("without_sdk.py", tmp_path)
    # It could not be.
    barred = "import sys\nsys.modules['google.genai'] = None"
    async with running(file, barred) as (_, url), aiohttp.ClientSession() as http:
        assert await Layercode(http, url).say("Hi") == "Sure, no problem."


async def test_without_its_sdk_nothing_is_said_that_gemini_only_thinks_or_formats(
    lean_caller: Layercode, gemini: Gemini
) -> None:
    thought = {"text": "They want to bake.", "thought": True}
    gemini.scripts = [[[thought], [thought, {"text": "**Sure**, "}], "`yes`."]]
    assert await lean_caller.say("Hi") == "Sure, yes."


def told(body: Event) -> bytes:
    """A chunk of Gemini's."""
    return f"data: {json.dumps(body)}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (b"", "the answer broke off"),
        (chunk("", "SAFETY"), "Gemini ended the answer: SAFETY"),
        (
            told({"promptFeedback": {"blockReason": "OTHER"}}),
            "Gemini blocked the prompt: OTHER",
        ),
        (
            told(
                {"error": {"code": 503, "message": "SECRET", "status": "UNAVAILABLE"}}
            ),
            "Gemini answered 503 UNAVAILABLE",
        ),
        (b"data: rubbish\r\n\r\n", "JSONDecodeError"),
    ],
)
async def test_without_its_sdk_an_answer_that_ends_badly_ends_with_the_apology(
    lean_caller: Layercode,
    gemini: Gemini,
    caplog: pytest.LogCaptureFixture,
    ending: bytes,
    why: str,
) -> None:
    gemini.scripts = [["Sure, ", ending]]
    assert await lean_caller.say("Hi") == f"Sure,  {Agent.apology}"
    assert f"failed: {why}" in caplog.text
    assert "SECRET" not in caplog.text
    assert len(gemini.asked) == 1


async def test_without_its_sdk_an_answer_at_its_greatest_length_is_no_failure(
    lean_caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Sure, ", chunk("and", "MAX_TOKENS")]]
    assert await lean_caller.say("Hi") == "Sure, and"


@pytest.mark.parametrize(
    "first", [Status(503), Stall(), chunk("", "STOP"), " ", b"", Cut()]
)
async def test_without_its_sdk_gemini_is_asked_once_more_before_the_first_word(
    lean_caller: Layercode,
    gemini: Gemini,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    first: Step,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(agent, "ASK_AGAIN_AFTER", 0.2)
    gemini.scripts = [[first]]
    assert await lean_caller.say("Hi") == "Sure, no problem."
    assert len(gemini.asked) == 2
    assert "(asked twice: " in caplog.text
    await gemini.until(streams=0)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 429])
async def test_without_its_sdk_a_refusal_is_logged_and_gemini_not_asked_twice(
    lean_caller: Layercode,
    gemini: Gemini,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    gemini.scripts = [[Status(code, "NO_WAY", "SECRET-KEY: API_KEY_INVALID")]]
    assert await lean_caller.say("Hi") == Agent.apology
    assert f"failed: Gemini answered {code} NO_WAY API_KEY_INVALID" in caplog.text
    assert GEMINI_KEY not in caplog.text
    assert len(gemini.asked) == 1


async def test_without_its_sdk_a_barge_in_closes_the_stream(
    lean_caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Once upon ", Stall()]]
    await lean_caller.barge_in("A story!", after="Once upon ")
    await gemini.until(streams=0)
    gemini.scripts = [[Stall()]]
    async with lean_caller.post(lean_caller.event("message", text="A story!")):
        await gemini.until(streams=1)
    await gemini.until(streams=0)


async def test_without_its_sdk_an_answer_is_over_with_the_finish_reason(
    lean_caller: Layercode, gemini: Gemini
) -> None:
    gemini.scripts = [["Sure.", Hang()]]
    assert await lean_caller.say("Hi") == "Sure."
    await gemini.until(streams=0)


async def test_without_its_sdk_one_connection_is_opened_ahead_and_used_again(
    lean_agent: Any, start: Start, gemini: Gemini
) -> None:
    one = lean_agent(WITH_GEMINI)
    caller = await start(one)
    await one.warming_up
    await caller.send(caller.event("session.start"))
    await one.warming_up
    # At a time, one is enough.
    one.warm_up()
    one.warm_up()
    await one.warming_up
    for _ in range(3):
        assert await caller.say("Hi") == "Sure, no problem."
    assert (gemini.looked_up, len(gemini.connections)) == (3, 1)


async def test_without_its_sdk_the_end_of_a_stream_is_waited_for_to_use_it_again(
    lean_caller: Layercode, gemini: Gemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["without_sdk"], "STREAM_END_PATIENCE", 5)
    over = asyncio.Event()
    gemini.scripts = [["Sure.", chunk("", "STOP"), over, b""]]
    asyncio.get_running_loop().call_later(0.2, over.set)
    for _ in range(2):
        await lean_caller.say("Hi")
    assert len(gemini.connections) == 1


async def test_without_its_sdk_gemini_gets_the_key(
    lean_agent: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    @web.middleware
    async def note_key(request: web.Request, handler: Any) -> web.StreamResponse:
        keys.append((request.method, request.headers["x-goog-api-key"]))
        return await handler(request)

    app = Gemini().app()
    app.middlewares.append(note_key)
    async with served(app) as url:
        # A slash at the end is no error.
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url + "/")
        one = lean_agent(WITH_GEMINI)
        caller = await start(one)
        await one.warming_up
        assert await caller.say("Hi") == "Sure, no problem."
    assert keys == [("GET", GEMINI_KEY), ("POST", GEMINI_KEY)]


async def test_without_its_sdk_a_key_that_is_refused_is_told_at_the_start(
    lean_agent: Any, start: Start, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dataclasses.replace(WITH_GEMINI, gemini_model="no/such/model")
    one = lean_agent(settings)
    await start(one)
    await one.warming_up
    assert "Gemini answered 404" in caplog.text


async def test_without_its_sdk_a_stop_does_not_wait_for_the_connection_ahead(
    lean_agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = asyncio.Event()

    async def stall(request: web.Request) -> web.Response:
        looked_up.set()
        await asyncio.Event().wait()
        return web.Response()

    app = web.Application()
    app.router.add_get("/{path:.*}", stall)
    async with served(app) as url:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
        one = lean_agent(WITH_GEMINI)
        async with asyncio.timeout(5), one.connected():
            await looked_up.wait()
        assert one.warming_up.cancelled()


async def test_without_a_key_the_stand_in_replies_without_the_sdk_too(
    lean_agent: Any, start: Start, gemini: Gemini
) -> None:
    keyless = dataclasses.replace(WITH_GEMINI, google_generative_ai_api_key="")
    caller = await start(lean_agent(keyless))
    await caller.send(caller.event("session.start"))
    assert "I'm the offline stand-in" in await caller.say("Hi")
    assert not gemini.asked
    assert not gemini.looked_up
