"""The recipes: an agent of your own, tools, your log-in, your own app, transcripts.

Each block is taken out of README.md as it stands.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import sqlite3
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from recipes import README, load, save

import agent
from agent import Agent, Event, Histories, Settings
from test_agent import (
    GEMINI_KEY,
    SECRET,
    WITH_GEMINI,
    Gemini,
    Layercode,
    Stall,
    Start,
    Step,
    report,
    served,
    words,
)

pytestmark = pytest.mark.asyncio


async def until(condition: Callable[[], object]) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def until_refused(url: str) -> None:
    """Waits until the server at a URL takes no more connections: it is stopping."""
    async with asyncio.timeout(10):
        while True:
            try:
                async with aiohttp.ClientSession() as http, http.get(url):
                    pass
            except aiohttp.ClientError:
                return


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@asynccontextmanager
async def process(file: Path, **settings: str) -> AsyncIterator[Process]:
    """Runs a file with these settings and no others; its log goes to a file.log."""
    unset = {one.name.upper(): "" for one in dataclasses.fields(Settings)}
    with file.with_suffix(".log").open("wb") as log:
        running = await asyncio.create_subprocess_exec(
            sys.executable,
            file,
            stdout=PIPE,
            stderr=log,
            env={**os.environ, **unset, **settings},
        )
    try:
        assert running.stdout is not None
        async with asyncio.timeout(30):
            while b"http://" not in (line := await running.stdout.readline()):
                assert line, file.with_suffix(".log").read_text()
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


# ---- An agent of your own ------------------------------------------------------------


async def test_six_lines_are_an_agent_of_your_own(
    start: Start, gemini: Gemini, tmp_path: Path
) -> None:
    pizza = load("pizza.py", tmp_path).Pizza
    caller = await start(pizza(WITH_GEMINI))
    greeting = await caller.send(caller.event("session.start"))
    assert greeting == "Luigi's Pizza! What can I get you?"
    await caller.say("Who are you?")
    told = gemini.asked[-1]["systemInstruction"]["parts"][0]["text"]
    assert told == f"You take orders for Luigi's Pizza in Leeds.\n{Agent.voice_rules}"


async def test_an_agent_of_your_own_chats_in_the_terminal(tmp_path: Path) -> None:
    chat = await asyncio.create_subprocess_exec(
        sys.executable,
        save("pizza.py", tmp_path),
        "chat",
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "GOOGLE_GENERATIVE_AI_API_KEY": ""},
    )
    printed, _ = await asyncio.wait_for(chat.communicate(b"Hello\n"), 30)
    assert b"Luigi's Pizza! What can I get you?\n" in printed
    assert b"You said 'Hello'" in printed


@pytest.mark.parametrize(
    ("about_them", "greeting"),
    [
        ({"name": "Ada"}, "Hi Ada! What can I get you?"),
        ({}, "Hi there! What can I get you?"),
        (None, "Hi there! What can I get you?"),
    ],
)
async def test_a_caller_is_greeted_by_name(
    start: Start, tmp_path: Path, about_them: object, greeting: str
) -> None:
    pizza = load("pizza_by_name.py", tmp_path).Pizza
    caller = await start(pizza(Settings(layercode_webhook_secret=SECRET)))
    event = caller.event("session.start", custom_metadata=about_them)
    assert await caller.send(event) == greeting


async def test_what_a_page_sends_is_answered(start: Start, tmp_path: Path) -> None:
    pizza = load("pizza_for_pages.py", tmp_path).Pizza
    caller = await start(pizza(Settings(layercode_webhook_secret=SECRET)))
    async with caller.post(caller.event("data", data={"table": 5})) as response:
        answer = await response.json()
    assert answer == {"type": "response.data", "content": {"seated at": 5}}
    async with caller.post(caller.event("session.end")) as response:
        assert await response.json() == {}


async def test_a_webhook_can_be_posted_by_hand(start: Start, tmp_path: Path) -> None:
    pizza = load("pizza_by_name.py", tmp_path).Pizza
    caller = await start(pizza(Settings(layercode_webhook_secret=SECRET)))
    post = save("post.py", tmp_path)
    for name in (b"Ada", b"Bob"):
        post.write_bytes(post.read_bytes().replace(b"Ada", name))
        posting = await asyncio.create_subprocess_exec(
            sys.executable,
            post,
            env={**os.environ, "AGENT": caller.url, "LAYERCODE_WEBHOOK_SECRET": SECRET},
            stdout=PIPE,
        )
        answer, _ = await posting.communicate()
        assert b"Hi " + name + b"! What can I get you?" in answer


async def test_gemini_writes_the_greeting(
    start: Start, gemini: Gemini, tmp_path: Path
) -> None:
    pizza = load("pizza_of_the_day.py", tmp_path).Pizza
    caller = await start(pizza(WITH_GEMINI))
    gemini.scripts = [["Luigi's! ", "The funghi is divine."]]
    greeting = await caller.send(caller.event("session.start"))
    assert greeting == "Luigi's! The funghi is divine."
    directed = "(The phone rings. Answer it, and praise a pizza.)"
    assert gemini.heard() == [("user", directed)]
    await caller.say("Two, please.")
    assert gemini.heard() == [
        ("user", "(The caller says nothing.)"),
        ("model", "Luigi's! The funghi is divine."),
        ("user", "Two, please."),
    ]


async def test_who_interrupts_a_greeting_of_geminis_ends_it(
    start: Start, gemini: Gemini, tmp_path: Path
) -> None:
    pizza = load("pizza_of_the_day.py", tmp_path).Pizza
    caller = await start(pizza(WITH_GEMINI))
    gemini.scripts = [["Luigi's! ", Stall()]]
    event = caller.event("session.start")
    async with caller.post(event) as response:
        await caller.hear(response, "Luigi's! ")
        response.close()
    await gemini.until(streams=0)
    await caller.say("A salami.", **report(event, "Luigi's!"))
    assert ("model", "Luigi's! [interrupted]") in gemini.heard()


# ---- Tools ---------------------------------------------------------------------------


class Tools:
    """tool_agent.py, and agents with tools."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def agent(
        self,
        *tools: Callable[..., object],
        shown: tuple[Callable[..., object], ...] = (),
        histories: Histories | None = None,
    ) -> Any:
        """An agent of the recipe's with these tools."""
        one = self.module.ToolAgent(WITH_GEMINI, histories)
        one.tools = [*self.module.ToolAgent.tools, *tools]
        one.shown = shown
        return one


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    one = Tools(load("tool_agent.py", tmp_path))
    # However slow this machine is, there is no filler unless a test wants one.
    one.module.FILLER_AFTER = 1000
    return one


def call(name: str, id: str = "1", **arguments: object) -> Event:
    """A part of Gemini's that calls a tool."""
    return {"functionCall": {"name": name, "args": arguments, "id": id}}


def response(name: str, id: str = "1", **result: object) -> Event:
    """The part that tells Gemini what a tool gave."""
    return {"functionResponse": {"name": name, "response": result, "id": id}}


def results(gemini: Gemini) -> list[Event]:
    """What the last request told of the tools that were called just before."""
    last = gemini.asked[-1]["contents"][-1]
    return [part["functionResponse"] for part in last["parts"]]


def parameters(declaration: Event) -> Event:
    """What Gemini is told of a tool's parameters; it takes both spellings."""
    for name in ("parametersJsonSchema", "parameters_json_schema"):
        if name in declaration:
            return dict(declaration[name])
    return {}


def data(frames: list[Event]) -> list[Event]:
    """What the page gets."""
    return [frame["content"] for frame in frames if frame["type"] == "response.data"]


async def test_a_tool_is_declared_and_called_and_its_signature_goes_back_byte_for_byte(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    caller = await start(tools.agent())
    signature = "8PHy8/T19vf4+fr7/P3+//Dx8vP09fb3+Pn6+/z9/v//"
    called = call("current_time", timezone="UTC") | {"thoughtSignature": signature}
    thought = {"text": "They want the time.", "thought": True}
    gemini.scripts = [["Let me ", "see.", [thought, called]], ["It's noon."]]
    frames = await caller.frames(caller.event("message", text="What time is it?"))
    assert words(frames) == "Let me see. It's noon."
    assert data(frames) == [
        {"tool": "current_time", "state": "running"},
        {"tool": "current_time", "state": "done"},
    ]
    declared = gemini.asked[0]["tools"][0]["functionDeclarations"]
    assert [tool["name"] for tool in declared] == ["current_time", "hang_up"]
    assert "time zone" in declared[0]["description"]
    assert parameters(declared[0]) == {
        "type": "object",
        "properties": {"timezone": {"type": "string"}},
        "required": ["timezone"],
    }
    said, told = gemini.asked[1]["contents"][1:]
    assert said["parts"] == [{"text": "Let me "}, {"text": "see."}, thought, called]
    assert [said["role"], told["role"]] == ["model", "user"]
    assert told["parts"][0]["functionResponse"]["id"] == "1"
    assert str(datetime.date.today().year) in results(gemini)[0]["response"]["output"]


async def test_a_tool_knows_the_turn_and_gemini_cannot_choose_it(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    async def note(text: str, event: Event) -> list[str]:
        return [text, event["turn_id"], event["conversation_id"]]

    async def whoami(event: Event) -> str:
        return str(event["from_phone_number"])

    caller = await start(tools.agent(note, whoami))
    forged = call("note", "1", text="hello", event={"turn_id": "another"})
    gemini.scripts = [[[forged, call("whoami", "2")]], ["Noted."]]
    event = caller.event("message", text="Note it", from_phone_number="+44")
    assert await caller.send(event) == "Noted."
    declared = gemini.asked[0]["tools"][0]["functionDeclarations"][2:]
    assert list(parameters(declared[0])["properties"]) == ["text"]
    assert parameters(declared[0])["required"] == ["text"]
    assert parameters(declared[1]) == {}
    told = [event["turn_id"], event["conversation_id"]]
    assert [one["response"]["output"] for one in results(gemini)] == [
        ["hello", *told],
        "+44",
    ]


async def test_two_tools_run_side_by_side_and_a_sync_one_holds_up_nobody(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    loop = asyncio.get_running_loop()
    met = asyncio.Barrier(2)

    def sync() -> int:
        asyncio.run_coroutine_threadsafe(met.wait(), loop).result(5)
        return 7

    async def other() -> dict[str, object]:
        await met.wait()
        return {"on": datetime.date(2026, 11, 21), "half": "\ud800"}

    caller = await start(tools.agent(sync, other))
    gemini.scripts = [[[call("sync", "1"), call("other", "2")]], ["Both."]]
    assert await caller.say("Do both") == "Both."
    given = [(one["id"], one["response"]["output"]) for one in results(gemini)]
    assert given == [("1", 7), ("2", {"on": "2026-11-21", "half": "?"})]


async def test_what_goes_wrong_with_a_tool_is_told_to_gemini_and_logged_by_its_type(
    start: Start, gemini: Gemini, tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    # A thread may need a while to begin.
    tools.module.TOOL_PATIENCE = 2

    async def stuck() -> None:
        await asyncio.Event().wait()

    async def cancelled() -> None:
        raise asyncio.CancelledError

    def not_a_number() -> float:
        return float("nan")

    def private() -> None:
        raise ValueError("a secret of the caller's \ud800")

    caller = await start(tools.agent(stuck, cancelled, not_a_number, private))
    wrong = [
        call("stuck"),
        call("unknown"),
        call("current_time", zone="UTC"),
        call("current_time", timezone="No/Where"),
        call("cancelled"),
        call("not_a_number"),
        call("private"),
    ]
    gemini.scripts = [[wrong], ["Sorry, I can't."]]
    frames = await caller.frames(caller.event("message", text="Try"))
    assert words(frames) == "Sorry, I can't."
    assert [one["state"] for one in data(frames)] == ["running"] * 7 + ["failed"] * 7
    errors = [one["response"]["error"].partition(":")[0] for one in results(gemini)]
    assert errors == [
        "TimeoutError",
        "KeyError",
        "TypeError",
        "ZoneInfoNotFoundError",
        "CancelledError",
        "ValueError",
        "ValueError",
    ]
    told = results(gemini)[6]["response"]["error"]
    assert told == "ValueError: a secret of the caller's ?"
    assert "'unknown' failed: KeyError at tool_agent.py" in caplog.text
    assert "'private' failed: ValueError at test_recipes.py" in caplog.text
    assert "'stuck' failed" in caplog.text
    assert "a secret" not in caplog.text


async def test_an_async_tool_that_outlasts_its_time_is_cancelled_and_may_not_refuse(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    tools.module.TOOL_PATIENCE = 0.05
    free = asyncio.Event()
    cancelled = asyncio.Event()

    async def stubborn() -> None:
        while not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                cancelled.set()

    caller = await start(tools.agent(stubborn))
    gemini.scripts = [[[call("stubborn")]], ["It takes too long."]]
    try:
        assert await caller.say("Go") == "It takes too long."
        assert cancelled.is_set()
    finally:
        free.set()


async def test_after_five_rounds_gemini_has_to_speak(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    caller = await start(tools.agent())
    one_round: list[Step] = [[call("current_time", timezone="UTC")]]
    gemini.scripts = [*[one_round] * 5, ["Enough."]]
    assert await caller.say("Loop") == "Enough."
    configs = [asked["toolConfig"]["functionCallingConfig"] for asked in gemini.asked]
    assert [one["mode"] for one in configs] == ["AUTO"] * 5 + ["NONE"]
    gemini.scripts = [one_round] * 6
    frames = await caller.frames(caller.event("message", text="Loop"))
    assert words(frames) == Agent.apology
    assert str(frames).count("running") == 5


async def test_any_number_of_stuck_sync_tools_holds_up_no_other(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    free = threading.Event()
    began = threading.Semaphore(0)

    def stuck() -> None:
        began.release()
        free.wait(60)

    one = tools.agent(stuck)
    caller = await start(one)
    gemini.scripts = [[[call("stuck")] * 100]]
    waiting = asyncio.create_task(caller.say("Get stuck"))
    try:
        await until(lambda: began._value == 100)
        gemini.scripts = [[[call("current_time", timezone="UTC")]], ["It's noon."]]
        other = Layercode(caller.http, caller.url)
        assert await other.say("The time?") == "It's noon."
    finally:
        free.set()
    await waiting


FATAL = '''
import sys
import tool_agent
from agent import main

def quit() -> None:
    """Quits."""
    sys.exit(1)

async def quit_async() -> None:
    """Quits."""
    sys.exit(1)

def interrupt() -> None:
    """Interrupts."""
    raise KeyboardInterrupt

async def interrupt_async() -> None:
    """Interrupts."""
    raise KeyboardInterrupt

def stop() -> None:
    """Stops."""
    raise StopIteration

async def stop_async() -> None:
    """Stops."""
    raise StopIteration

class Fatal(tool_agent.ToolAgent):
    tools = [quit, quit_async, interrupt, interrupt_async, stop, stop_async]

main(Fatal)
'''


def settings_of(port: int) -> dict[str, str]:
    """The settings of an agent in a process of its own."""
    return {
        "PORT": str(port),
        "LAYERCODE_WEBHOOK_SECRET": SECRET,
        "GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY,
    }


async def test_no_tool_can_end_the_server(
    gemini: Gemini, http: aiohttp.ClientSession, tmp_path: Path, unused_tcp_port: int
) -> None:
    save("tool_agent.py", tmp_path)
    file = tmp_path / "fatal.py"
    file.write_text(FATAL)
    errors = []
    async with process(file, **settings_of(unused_tcp_port)):
        caller = Layercode(http, f"http://127.0.0.1:{unused_tcp_port}")
        for name in re.findall(r"def (\w+)", FATAL):
            gemini.scripts = [[[call(name)]], ["It went wrong."]]
            assert await caller.say(name) == "It went wrong."
            errors.append(results(gemini)[0]["response"]["error"].partition(":")[0])
        assert await caller.say("Still there?") == "Sure, no problem."
    assert "Traceback" not in file.with_suffix(".log").read_text()
    assert errors == [
        "SystemExit",
        "SystemExit",
        "KeyboardInterrupt",
        "KeyboardInterrupt",
        "StopIteration",
        # What Python makes of a StopIteration that leaves a coroutine.
        "RuntimeError",
    ]


STUCK = '''
import time
import tool_agent
from agent import main

def stuck() -> None:
    """Blocks its thread."""
    time.sleep(600)

class Stuck(tool_agent.ToolAgent):
    tools = [stuck]

tool_agent.TOOL_PATIENCE = 0.1
main(Stuck)
'''


async def test_a_tool_that_blocks_its_thread_does_not_delay_the_stop(
    gemini: Gemini, http: aiohttp.ClientSession, tmp_path: Path, unused_tcp_port: int
) -> None:
    save("tool_agent.py", tmp_path)
    file = tmp_path / "stuck.py"
    file.write_text(STUCK)
    async with process(file, **settings_of(unused_tcp_port)) as server:
        caller = Layercode(http, f"http://127.0.0.1:{unused_tcp_port}")
        gemini.scripts = [[[call("stuck")]], ["It takes too long."]]
        assert await caller.say("Go") == "It takes too long."
        server.terminate()
        # Far less than it sleeps.
        await asyncio.wait_for(server.wait(), 60)
        assert server.returncode == 0
    assert "Traceback" not in file.with_suffix(".log").read_text()


class Order:
    """A tool that places orders, and takes until it is released."""

    def __init__(self) -> None:
        self.placed: list[str] = []
        self.free = threading.Event()

    def order(self, pizza: str) -> str:
        """Orders a pizza."""
        self.placed.append(pizza)
        self.free.wait(60)
        return f"{pizza} ordered"


@pytest.fixture
def orders() -> Iterator[Order]:
    one = Order()
    yield one
    one.free.set()


SIGNED = call("order", pizza="salami") | {"thoughtSignature": "8PHy8/+/"}


async def cut_off_while_it_runs(
    caller: Layercode, gemini: Gemini, orders: Order, heard: str
) -> Event:
    """Orders a salami, and interrupts while the order is being placed."""
    gemini.scripts = [[[{"text": "Salami.", "thought": True}, SIGNED]]]
    event = caller.event("message", text="Order a salami.")
    async with caller.post(event) as response:
        await until(lambda: orders.placed)
        if heard:
            await caller.hear(response, heard)
        response.close()
    return event


@pytest.mark.parametrize("filler", ["", "One moment, please."])
async def test_what_a_tool_has_begun_is_known_and_finished_if_the_caller_interrupts(
    start: Start, gemini: Gemini, tools: Tools, orders: Order, filler: str
) -> None:
    if filler:
        tools.module.FILLER_AFTER = 0
    one = tools.agent(orders.order)
    caller = await start(one)
    event = await cut_off_while_it_runs(caller, gemini, orders, filler)
    assert await caller.say("Hello?", **report(event, "")) == "Sure, no problem."
    begun = [
        {"role": "user", "parts": [{"text": "Order a salami."}]},
        {"role": "model", "parts": [SIGNED]},
        {"role": "user", "parts": [response("order", **tools.module.NOT_KNOWN_YET)]},
        {"role": "model", "parts": [{"text": "[interrupted]"}]},
        {"role": "user", "parts": [{"text": "Hello?"}]},
    ]
    assert gemini.asked[-1]["contents"] == begun
    orders.free.set()
    await until(lambda: not one.at_work)
    assert await caller.say("Did it work?") == "Sure, no problem."
    ended = {"role": "user", "parts": [response("order", output="salami ordered")]}
    assert gemini.asked[-1]["contents"][:5] == [*begun[:2], ended, *begun[3:]]
    assert orders.placed == ["salami"]


async def test_later_turns_show_what_the_tools_of_all_rounds_did_without_the_words(
    start: Start, gemini: Gemini, tools: Tools, orders: Order
) -> None:
    orders.free.set()
    caller = await start(tools.agent(orders.order))
    again = [call("order", "2", pizza="funghi"), call("order", "3", pizza="")]
    gemini.scripts = [["One salami. ", [SIGNED]], ["And two. ", again], ["Done."]]
    assert await caller.say("Three") == "One salami.  And two.  Done."
    said = [content["parts"] for content in gemini.asked[2]["contents"]]
    assert said[1] == [{"text": "One salami. "}, SIGNED]
    assert said[3] == [{"text": "And two. "}, *again]
    await caller.say("Thanks")
    assert gemini.asked[-1]["contents"] == [
        {"role": "user", "parts": [{"text": "Three"}]},
        {"role": "model", "parts": [SIGNED]},
        {"role": "user", "parts": [response("order", output="salami ordered")]},
        {"role": "model", "parts": again},
        {
            "role": "user",
            "parts": [
                response("order", "2", output="funghi ordered"),
                response("order", "3", output=" ordered"),
            ],
        },
        {"role": "model", "parts": [{"text": "One salami.  And two.  Done."}]},
        {"role": "user", "parts": [{"text": "Thanks"}]},
    ]


async def test_a_webhook_that_comes_again_while_its_tool_runs_does_not_call_it_again(
    start: Start, gemini: Gemini, tools: Tools, orders: Order
) -> None:
    caller = await start(tools.agent(orders.order))
    gemini.scripts = [[[SIGNED]], ["It's ordered."]]
    event = caller.event("message", text="Order a salami.")
    async with caller.post(event) as first:
        await until(lambda: orders.placed)
        second = asyncio.create_task(caller.send(event))
        # The first delivery is cut off: the second has taken its place.
        with contextlib.suppress(aiohttp.ClientError):
            await first.read()
    for _ in range(3):
        # Meanwhile it had the time to ask Gemini, and has not.
        other = Layercode(caller.http, caller.url)
        await other.send(other.event("session.start"))
    assert len(gemini.asked) == 1
    orders.free.set()
    assert await second == "It's ordered."
    assert results(gemini)[0]["response"] == {"output": "salami ordered"}
    assert orders.placed == ["salami"]


async def test_a_webhook_that_comes_again_after_it_was_cut_off_does_not_call_it_again(
    start: Start, gemini: Gemini, tools: Tools, orders: Order
) -> None:
    orders.free.set()
    caller = await start(tools.agent(orders.order))
    gemini.scripts = [[[SIGNED]], ["It's ", Stall()]]
    event = await caller.barge_in("Order a salami.", after="It's ")
    await gemini.until(streams=0)
    gemini.scripts = [["It's ordered."]]
    assert await caller.send(event) == "It's ordered."
    assert results(gemini)[0]["response"] == {"output": "salami ordered"}
    assert orders.placed == ["salami"]


async def test_an_order_counts_once_even_if_two_processes_get_its_webhook(
    start: Start, gemini: Gemini, tools: Tools, tmp_path: Path
) -> None:
    pizzeria = load("pizzeria.py", tmp_path)
    tools.module.FILLER_AFTER = 1000
    ordered = call("order", pizza="salami", number=2)
    gemini.scripts = [[[ordered]], ["Ordered."], [[ordered]], ["Ordered."]]
    one = await start(pizzeria.Pizzeria(WITH_GEMINI))
    other = await start(pizzeria.Pizzeria(WITH_GEMINI))
    event = one.event("message", text="Two salami")
    for caller in (one, other):
        frames = await caller.frames(event)
        assert words(frames) == "Ordered."
        assert data(frames)[1] == {
            "tool": "order",
            "state": "done",
            "result": {"ordered": "salami", "number": 2},
        }
    await one.say("And the same again.")
    gemini.scripts = [[[ordered]]]
    await one.say("And the same again.")
    with contextlib.closing(sqlite3.connect(tmp_path / "orders.sqlite")) as database:
        rows = database.execute("SELECT pizza, number FROM orders").fetchall()
    assert rows == [("salami", 2), ("salami", 2)]
    assert pizzeria.order("funghi", 1, event) == {"ordered": "funghi", "number": 1}
    pizzeria.order("funghi", 3, event)
    with contextlib.closing(sqlite3.connect(tmp_path / "orders.sqlite")) as database:
        corrected = "SELECT number FROM orders WHERE pizza = 'funghi'"
        assert database.execute(corrected).fetchall() == [(3,)]
    declared = gemini.asked[0]["tools"][0]["functionDeclarations"][0]
    pizzas = parameters(declared)["properties"]["pizza"]["enum"]
    assert pizzas == ["margherita", "salami", "funghi"]


async def test_a_tool_that_has_begun_is_finished_before_the_server_stops(
    gemini: Gemini, http: aiohttp.ClientSession, tools: Tools
) -> None:
    free = asyncio.Event()
    begun = asyncio.Event()

    async def slow() -> str:
        begun.set()
        await free.wait()
        # Many times what a stop that does not wait would take.
        for _ in range(1000):
            await asyncio.sleep(0)
        return "done"

    one = tools.agent(slow)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(one.make_app()))
        caller = Layercode(http, url)
        gemini.scripts = [[[call("slow")]]]
        event = caller.event("message", text="Go")
        async with caller.post(event) as response:
            await begun.wait()
            response.close()
        stopping = asyncio.create_task(stack.aclose())
        await until_refused(url)
        free.set()
        await stopping
    turns = await one.histories.load(caller.conversation)
    assert "'output': 'done'" in str(turns[event["turn_id"]].done)


async def test_a_stop_waits_for_no_tool_longer_than_the_grace(
    gemini: Gemini, http: aiohttp.ClientSession, tools: Tools
) -> None:
    tools.module.GRACE = 0.05
    tools.module.TOOL_PATIENCE = 1000
    begun = asyncio.Event()

    async def stuck() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(30):
        async with served(tools.agent(stuck).make_app()) as url:
            caller = Layercode(http, url)
            gemini.scripts = [[[call("stuck")]]]
            async with caller.post(caller.event("message", text="Go")) as response:
                await begun.wait()
                response.close()


async def test_what_a_tool_did_is_told_to_gemini_even_if_it_cannot_be_recorded(
    start: Start, gemini: Gemini, tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Histories):
        async def record(self, conversation: str, turn_id: str, **facts: Any) -> None:
            if "done" in facts:
                raise OSError("no room for a secret")
            await super().record(conversation, turn_id, **facts)

    caller = await start(tools.agent(histories=Full()))
    gemini.scripts = [[[call("current_time", timezone="UTC")]], ["It's noon."]]
    assert await caller.say("The time?") == "It's noon."
    assert "output" in results(gemini)[0]["response"]
    assert "what a tool did is not recorded: OSError" in caplog.text
    assert "secret" not in caplog.text


async def test_while_a_slow_tool_runs_a_filler_is_spoken_once(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    tools.module.FILLER_AFTER = 0.01
    heard = asyncio.Event()

    async def slow() -> None:
        await heard.wait()

    async def slower() -> None:
        await asyncio.sleep(0.2)

    caller = await start(tools.agent(slow, slower))
    gemini.scripts = [["Let me see.", [call("slow")]], [[call("slower")]], ["Done."]]
    async with caller.post(caller.event("message", text="Go")) as response:
        spoken = await caller.hear(response, "One moment, please.")
        heard.set()
        spoken += await caller.hear(response, "Done.")
    assert spoken == "Let me see. One moment, please. Done."


async def test_the_filler_comes_after_1_2_seconds_without_a_word(
    start: Start, gemini: Gemini, tools: Tools, tmp_path: Path
) -> None:
    tools = Tools(load("tool_agent.py", tmp_path))
    heard = asyncio.Event()

    async def slow() -> None:
        await heard.wait()

    caller = await start(tools.agent(slow))
    gemini.scripts = [[[call("slow")]], ["Done."]]
    began = time.monotonic()
    async with caller.post(caller.event("message", text="Go")) as response:
        await caller.hear(response, "One moment, please.")
        assert time.monotonic() - began >= 1.2
        heard.set()
        assert await caller.hear(response, "Done.") == "Done."


async def test_the_page_is_told_while_a_tool_runs_and_gets_the_result_of_one_that_shows(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    shown = asyncio.Event()

    async def menu() -> list[str]:
        await shown.wait()
        return ["salami", "funghi"]

    async def price() -> int:
        return 9

    async def wrong() -> int:
        return 1 // 0

    caller = await start(tools.agent(menu, price, wrong, shown=(menu, wrong)))
    gemini.scripts = [[[call("menu"), call("price"), call("wrong")]], ["Salami."]]
    frames: list[Event] = []
    async with caller.post(caller.event("message", text="The menu")) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                frames.append(json.loads(line[6:]))
            if len(frames) == 3:
                shown.set()
    assert data(frames) == [
        {"tool": "menu", "state": "running"},
        {"tool": "price", "state": "running"},
        {"tool": "wrong", "state": "running"},
        {"tool": "menu", "state": "done", "result": ["salami", "funghi"]},
        {"tool": "price", "state": "done"},
        {"tool": "wrong", "state": "failed"},
    ]


THOUGHT = {"text": "They want to go.", "thought": True}


@pytest.mark.parametrize(
    "scripts",
    [
        [["Goodbye!", [call("hang_up")]]],
        [[[call("hang_up")]], ["Goodbye!"]],
        [[[THOUGHT, call("hang_up")]], ["Goodbye!"]],
    ],
)
async def test_hanging_up_comes_after_the_last_words_and_nothing_more(
    start: Start, gemini: Gemini, tools: Tools, scripts: list[Any]
) -> None:
    caller = await start(tools.agent())
    gemini.scripts = list(scripts)
    frames = await caller.frames(caller.event("message", text="Bye"))
    assert words(frames).strip() == "Goodbye!"
    assert len(gemini.asked) == len(scripts)
    ending = [frame["type"] for frame in frames][-2:]
    assert ending == ["response.hangup", "response.end"]


async def test_with_another_tool_beside_it_hanging_up_waits_for_what_that_brings(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    caller = await start(tools.agent())
    both = [call("current_time", timezone="UTC"), call("hang_up", "2")]
    gemini.scripts = [["One moment.", both], ["It's noon. Bye!"]]
    frames = await caller.frames(caller.event("message", text="The time, and bye."))
    assert words(frames) == "One moment. It's noon. Bye!"
    assert frames[-2]["type"] == "response.hangup"


async def test_an_agent_without_that_tool_does_not_hang_up(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    one = tools.agent()
    one.tools = [tools.module.current_time]
    caller = await start(one)
    gemini.scripts = [["Goodbye!", [call("hang_up")]], ["I'm still here."]]
    frames = await caller.frames(caller.event("message", text="Bye"))
    assert words(frames) == "Goodbye! I'm still here."
    assert "response.hangup" not in str(frames)


async def test_words_between_tools_are_heard_at_once_and_read_aloud_plainly(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    caller = await start(tools.agent())
    stay = asyncio.Event()
    gemini.scripts = [["*Let* ", "me `see`.", stay, [call("hang_up")]], ["Bye."]]
    async with caller.post(caller.event("message", text="Go")) as response:
        await caller.hear(response, "Let me see.")
        stay.set()
        await response.read()


async def test_a_barge_in_before_a_tool_is_called_closes_the_stream_of_gemini(
    start: Start, gemini: Gemini, tools: Tools
) -> None:
    caller = await start(tools.agent())
    gemini.scripts = [["Let me ", Stall()]]
    await caller.barge_in("Go", after="Let me ")
    await gemini.until(streams=0)


async def test_without_a_key_an_agent_with_tools_has_the_stand_in(
    start: Start, tools: Tools
) -> None:
    settings = Settings(layercode_webhook_secret=SECRET)
    caller = await start(tools.module.ToolAgent(settings))
    assert "You said 'hello'" in await caller.say("hello")


async def test_a_tool_whose_parameter_has_no_type_is_refused_at_the_start(
    start: Start, tools: Tools
) -> None:
    def untyped(thing):  # type: ignore[no-untyped-def]
        return thing

    with pytest.raises(ValueError, match="parameter thing of function untyped"):
        await start(tools.agent(untyped))


# ---- Your log-in ---------------------------------------------------------------------


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """login_agent.py, with a secret, as it is found in the environment."""
    monkeypatch.setenv("LOGIN_SECRET", "login secret")
    monkeypatch.setenv("LAYERCODE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("LAYERCODE_API_KEY", "API-KEY")
    return load("login_agent.py", tmp_path)


@pytest_asyncio.fixture
async def sessions(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Event]]:
    """The sessions that Layercode's REST API was asked for, while the test runs."""
    asked: list[Event] = []

    async def authorize(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.json_response({"client_session_key": "a session"})

    app = web.Application()
    app.router.add_post("/v1/agents/web/authorize_session", authorize)
    async with served(app) as url:
        monkeypatch.setenv("LAYERCODE_API_URL", url)
        yield asked


async def authorize(caller: Layercode, authorization: str) -> int:
    """The status with which a visitor is answered."""
    async with caller.http.post(
        caller.url + "/authorize",
        json={"agent_id": "a", "custom_metadata": {"name": "Mallory"}},
        headers={"Authorization": authorization},
    ) as response:
        return response.status


async def test_who_has_logged_in_is_authorized_and_greeted_by_name(
    start: Start, login: ModuleType, sessions: list[Event]
) -> None:
    caller = await start(login.LoginAgent())
    token = login.make_token("Zoë O. Byrne", "login secret")
    assert await authorize(caller, f"Bearer {token}") == 200
    assert sessions == [{"agent_id": "a", "custom_metadata": {"name": "Zoë O. Byrne"}}]
    told = {"custom_metadata": sessions[0]["custom_metadata"]}
    greeting = await caller.send(caller.event("session.start", **told))
    assert greeting == "Hi Zoë O. Byrne! How can I help you today?"


async def test_who_has_not_logged_in_is_refused(
    start: Start, login: ModuleType, sessions: list[Event]
) -> None:
    caller = await start(login.LoginAgent())
    token = login.make_token("ada", "login secret")
    claim, _, signature = token.partition(".")
    forged = base64.urlsafe_b64encode(b'{"name": "bob", "until": 9999999999}').decode()
    for authorization in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer .",
        "Bearer x",
        "Bearer é.é",
        f"Basic {token}",
        f"Bearer {claim}",
        f"Bearer {claim}.",
        f"Bearer {forged}.{signature}",
        f"Bearer {login.make_token('ada', 'login secret', -1)}",
        f"Bearer {login.make_token('ada', 'another secret')}",
        f"Bearer {login.make_token('ada', '')}",
    ):
        assert await authorize(caller, authorization) == 403, authorization
    assert sessions == []


async def test_without_a_login_secret_nobody_is_let_in_and_the_log_says_so(
    start: Start,
    login: ModuleType,
    sessions: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOGIN_SECRET")
    one = login.LoginAgent()
    caller = await start(one)
    assert await authorize(caller, f"Bearer {login.make_token('ada', '')}") == 403
    assert "LOGIN_SECRET is not set" in one.settings.missing()[-1]
    assert "login secret" not in repr(login.LoginSettings(login_secret="login secret"))


STAND_IN = """
const agentId = "a", sent = [];
const answer = { ok: GIVEN, text: async () => "TOKEN" };
globalThis.fetch = async (...call) => (sent.push(call), answer);
class LayercodeClient {
  constructor(options) {
    options.authorizeSessionRequest({ url: "URL", body: { agent_id: "a" } });
  }
}
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
async def test_the_page_sends_the_token_with_what_the_sdk_would_send() -> None:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer TOKEN"}
    request = {"method": "POST", "headers": headers, "body": '{"agent_id":"a"}'}
    assert await requests_of_the_page(ok="true") == [["/voice-token"], ["URL", request]]


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
async def test_a_page_without_a_token_asks_for_no_session() -> None:
    assert await requests_of_the_page(ok="false") == [["/voice-token"]]


async def requests_of_the_page(ok: str) -> list[list[object]]:
    """What README.md's page fetches, if the answer about a token is ok or not."""
    blocks = re.findall(r"(?ms)^```js\n(.*?)^```$", README.read_text("utf-8"))
    (own,) = [one for one in blocks if "authorizeSessionRequest" in one]
    script = STAND_IN.replace("GIVEN", ok) + own
    script += "setImmediate(() => console.log(JSON.stringify(sent)))"
    script += "\nprocess.on('unhandledRejection', () => {})"
    node = await asyncio.create_subprocess_exec("node", "-e", script, stdout=PIPE)
    printed, _ = await asyncio.wait_for(node.communicate(), 30)
    requests: list[list[object]] = json.loads(printed)
    return requests


# ---- In your own aiohttp app ---------------------------------------------------------

OWN = {
    "PIZZA_WEBHOOK_SECRET": SECRET,
    "FLOWERS_WEBHOOK_SECRET": "another secret",
    "GOOGLE_GENERATIVE_AI_API_KEY": GEMINI_KEY,
}


async def test_two_agents_answer_beside_the_routes_of_an_app_and_stay_apart(
    gemini: Gemini, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    module = load("own_app.py", tmp_path)
    lower = {name.lower(): value for name, value in OWN.items()}
    same = {**lower, "flowers_webhook_secret": SECRET}
    app = module.make_app(module.OwnSettings(**same))
    async with served(app) as url:
        pizza = Layercode(http, f"{url}/pizza")
        flowers = Layercode(http, f"{url}/flowers", pizza.conversation)
        greetings = [
            await one.send(one.event("session.start")) for one in (pizza, flowers)
        ]
        assert greetings == [module.Pizza.greeting, module.Flowers.greeting]
        await flowers.say("Roses")
        await pizza.say("A salami")
        assert gemini.heard()[1:] == [
            ("model", module.Pizza.greeting),
            ("user", "A salami"),
        ]
        instruction = gemini.asked[-1]["systemInstruction"]["parts"][0]["text"]
        assert "Luigi" in instruction
        async with http.get(url) as response:
            assert await response.text() == "Luigi and Rosa are open.\n"
        origin = {"Origin": "http://localhost:5173"}
        async with http.options(f"{url}/flowers/authorize", headers=origin) as response:
            allowed = response.headers["Access-Control-Allow-Origin"]
        assert allowed == origin["Origin"]


async def test_your_own_app_notices_a_barge_in_and_logs_the_turns(
    gemini: Gemini, http: aiohttp.ClientSession, tmp_path: Path, unused_tcp_port: int
) -> None:
    file = save("own_app.py", tmp_path)
    async with process(file, PORT=str(unused_tcp_port), **OWN) as server:
        url = f"http://127.0.0.1:{unused_tcp_port}"
        pizza = Layercode(http, f"{url}/pizza")
        gemini.scripts = [["Well, ", Stall()]]
        await pizza.barge_in("Hello", after="Well, ")
        await gemini.until(streams=0)
        flowers = Layercode(http, f"{url}/flowers")
        async with flowers.post(flowers.event("session.start")) as response:
            assert response.status == 401
        server.terminate()
        await asyncio.wait_for(server.wait(), 60)
    log = file.with_suffix(".log").read_text()
    assert "Traceback" not in log
    assert f"INFO conversation='{pizza.conversation}'" in log
    assert " interrupted first_word=" in log


async def test_your_own_app_logs_as_much_as_log_level_says(
    http: aiohttp.ClientSession, tmp_path: Path, unused_tcp_port: int
) -> None:
    file = save("own_app.py", tmp_path)
    settings = {"PORT": str(unused_tcp_port), "LOG_LEVEL": "ERROR", **OWN}
    async with process(file, **settings):
        pizza = Layercode(http, f"http://127.0.0.1:{unused_tcp_port}/pizza")
        await pizza.send(pizza.event("session.start"))
    assert "conversation=" not in file.with_suffix(".log").read_text()


async def test_each_agent_of_your_own_app_authorizes_for_itself_alone(
    http: aiohttp.ClientSession, tmp_path: Path, sessions: list[Event]
) -> None:
    module = load("own_app.py", tmp_path)
    settings = module.OwnSettings(
        layercode_api_key="API-KEY",
        layercode_api_url=os.environ["LAYERCODE_API_URL"],
        pizza_agent_id="pizza",
        flowers_agent_id="flowers",
    )
    async with served(module.make_app(settings)) as url:
        for name, agent_id, status in (
            ("pizza", "pizza", 200),
            ("flowers", "flowers", 200),
            ("pizza", "flowers", 403),
            ("flowers", "pizza", 403),
        ):
            page = {"agent_id": agent_id}
            async with http.post(f"{url}/{name}/authorize", json=page) as response:
                assert response.status == status


async def test_the_replies_of_both_agents_have_their_grace_at_the_same_time(
    gemini: Gemini,
    http: aiohttp.ClientSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "GRACE", 2)
    module = load("own_app.py", tmp_path)
    app = module.make_app(
        module.OwnSettings(
            pizza_webhook_secret=SECRET,
            flowers_webhook_secret=SECRET,
            google_generative_ai_api_key=GEMINI_KEY,
        )
    )
    ends = []

    async def read(response: aiohttp.ClientResponse) -> None:
        await response.read()
        ends.append(time.monotonic())

    gemini.scripts = [["Well, ", Stall()], ["Well, ", Stall()]]
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(app))
        readers = []
        for name in ("pizza", "flowers"):
            one = Layercode(http, f"{url}/{name}")
            response = await one.post(one.event("message", text="Hello"))
            await one.hear(response, "Well, ")
            readers.append(asyncio.create_task(read(response)))
        await stack.aclose()
        await asyncio.gather(*readers)
    assert ends[1] - ends[0] < 1


# ---- Transcripts ---------------------------------------------------------------------


class Transcripts:
    """transcripts_agent.py, and what its database has."""

    def __init__(self, module: Any) -> None:
        self.module = module
        # Webhooks that notice() was given, and those that it is done with.
        self.arrived = 0
        self.left = 0

    def agent(self) -> Agent:
        """An agent of the recipe's, which needs a thread for each of its words."""
        transcripts = self

        class Threaded(self.module.TranscriptsAgent):  # type: ignore[misc,name-defined]
            async def reply(self, event: Event, history: list[Any]) -> Any:
                yield await asyncio.to_thread(str.upper, history[-1].user)

            async def notice(self, event: Event) -> Any:
                transcripts.arrived += 1
                try:
                    return await super().notice(event)
                finally:
                    transcripts.left += 1

        return Threaded(Settings(layercode_webhook_secret=SECRET))

    def rows(self) -> list[tuple[Any, ...]]:
        """What is kept: the type, the conversation and the webhook of each."""
        with contextlib.closing(sqlite3.connect(self.module.CALLS)) as database:
            database.execute(self.module.TABLE)
            return database.execute(
                "SELECT type, conversation, event FROM calls ORDER BY rowid"
            ).fetchall()

    @contextlib.contextmanager
    def locked(self) -> Any:
        """Has another program write to the database for a while."""
        with contextlib.closing(
            sqlite3.connect(self.module.CALLS, isolation_level=None)
        ) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield
            other.execute("COMMIT")


@pytest.fixture
def transcripts(tmp_path: Path) -> Transcripts:
    return Transcripts(load("transcripts_agent.py", tmp_path))


async def post(caller: Layercode, event: Event) -> int:
    """The status with which a webhook is answered."""
    async with caller.post(event) as response:
        return int(response.status)


async def test_transcripts_are_kept_once_if_they_are_signed(
    start: Start, transcripts: Transcripts
) -> None:
    caller = await start(transcripts.agent())
    said = [{"role": "user", "text": "Hé \ud800"}]
    end = caller.event("session.end", transcript=said, duration=1000)
    update = caller.event("session.update", recording_url="https://x/y")
    for event in (end, end, update, caller.event("data", data={}), end):
        assert await post(caller, event) == 200
    async with caller.post(end, signature="t=1,v1=0") as response:
        assert response.status == 401
    rows = transcripts.rows()
    assert [row[:2] for row in rows] == [
        ("session.end", caller.conversation),
        ("session.update", caller.conversation),
    ]
    assert json.loads(rows[0][2]) == {
        **end,
        "transcript": [{"role": "user", "text": "Hé ?"}],
    }
    assert "https://x/y" in rows[1][2]


async def test_a_locked_database_takes_no_thread_that_a_caller_needs(
    start: Start, transcripts: Transcripts
) -> None:
    caller = await start(transcripts.agent())
    # More than asyncio has threads on any machine.
    events = [caller.event("session.end") for _ in range(40)]
    with transcripts.locked():
        posts = [asyncio.create_task(post(caller, event)) for event in events]
        await until(lambda: transcripts.arrived == 40)
        assert await caller.say("still there?") == "STILL THERE?"
    assert await asyncio.gather(*posts) == [200] * 40
    assert len(transcripts.rows()) == 40


async def test_a_transcript_is_kept_although_its_connection_drops(
    start: Start, transcripts: Transcripts
) -> None:
    caller = await start(transcripts.agent())
    with transcripts.locked():
        first = asyncio.create_task(post(caller, caller.event("session.end")))
        await until(lambda: transcripts.arrived == 1)
        second = asyncio.create_task(post(caller, caller.event("session.end")))
        await until(lambda: transcripts.arrived == 2)
        second.cancel()
        await until(lambda: transcripts.left == 1)
    assert await first == 200
    await until(lambda: len(transcripts.rows()) == 2)


async def test_a_stop_waits_for_the_transcripts_that_are_not_written_yet(
    http: aiohttp.ClientSession, transcripts: Transcripts
) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(transcripts.agent().make_app()))
        caller = Layercode(http, url)
        with transcripts.locked():
            events = [caller.event("session.end") for _ in range(3)]
            posts = [asyncio.create_task(post(caller, event)) for event in events]
            await until(lambda: transcripts.arrived == 3)
            stopping = asyncio.create_task(stack.aclose())
            await asyncio.gather(*posts, return_exceptions=True)
        await stopping
    assert len(transcripts.rows()) == 3


async def test_a_transcript_that_cannot_be_written_is_an_error_in_the_log(
    start: Start, transcripts: Transcripts, caplog: pytest.LogCaptureFixture
) -> None:
    transcripts.module.CALLS.mkdir()
    caller = await start(transcripts.agent())
    assert await post(caller, caller.event("session.end")) == 500
    assert "OperationalError at transcripts_agent.py" in caplog.text
