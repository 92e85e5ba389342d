"""What few can get wrong in a copy of agent.py: tests beside those of test_agent.py."""

import asyncio
import gc
import os
import re
import signal
import socket
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import certifi
import pytest
from aiohttp import web

import agent
import test_agent
from agent import Agent, Event, Histories, Turn
from test_agent import APOLOGY, OFFLINE, SETTINGS, SURE, Own, Patch, Serve, cases, until


async def test_reply_can_be_called_without_a_server_or_a_key() -> None:
    history, began = [Turn("one"), Turn("two")], time.monotonic()
    said = "".join([str(piece) async for piece in Agent(OFFLINE).reply({}, history)])
    assert "You said 'two'. Set GOOGLE" in said and time.monotonic() > began + 1
    with pytest.raises(AssertionError, match="GOOGLE_GENERATIVE_AI_API_KEY"):
        await anext(Agent(OFFLINE).ask(history))


async def test_ask_takes_a_config_but_calls_no_function(serve: Serve) -> None:
    def order() -> None:
        called.append("order")

    async def ask() -> None:
        called.extend([chunk async for chunk in one.ask([Turn("hello")], config)])

    called: list[Any] = []
    config: Any = {"system_instruction": "Be brief."}
    config |= {"thinking_config": {"thinking_budget": 7}, "tools": [order]}
    config |= {"automatic_function_calling": {"disable": False}}
    one = Own(ask, settings=replace(SETTINGS, gemini_thinking="low"))
    # A call of a tool is as good as a word: nothing is asked again.
    caller = await serve(one, [[[test_agent.call("order")]]])
    await caller.say()
    [asked] = caller.gemini.asked
    assert len(called) > 1 and "order" not in called
    assert asked["systemInstruction"]["parts"] == [{"text": "Be brief."}]
    assert asked["generationConfig"] == {"thinkingConfig": {"thinking_budget": 7}}


@cases(("INFO", False), ("DEBUG", True))
async def test_debug_tells_an_error_s_message(
    serve: Serve, caplog: pytest.LogCaptureFixture, level: str, told: bool
) -> None:
    caller = await serve(Own(partial(int, "a message")))
    caplog.set_level(level, "agent")
    await caller.say("hello")
    assert [text in caplog.text for text in ("Traceback", "a message")] == [told] * 2


async def test_memory_is_bounded(monkeypatch: Patch) -> None:
    monkeypatch.setattr(agent, "MAX_CONVERSATIONS", 3)
    histories = Histories()
    for number in range(120):
        await histories.record("a", str(number), user="hello")
        await histories.record("a", str(number), finished=True)
    assert list(await histories.load("a")) == [str(number) for number in range(70, 120)]
    for conversation in ("b", "c", "a", "d"):
        await histories.record(conversation, "a turn", user="hello")
    assert [one for one in "abcd" if await histories.load(one)] == ["a", "c", "d"]


class Wrong(Agent):
    async def greet(self, event: Event, history: list[Turn]) -> Any:  # type: ignore[override]
        return "Hello"

    def reply(self, event: Event, history: list[Turn]) -> Any:
        return "Hello"


async def test_a_method_that_does_not_yield_is_told_by_its_name(serve: Serve) -> None:
    caller = await serve(Wrong(SETTINGS))
    assert [await caller.say(), await caller.say("hi")] == [APOLOGY, APOLOGY]
    for line, method in zip(caller.log(), ("greet", "reply"), strict=True):
        assert f" failed: Wrong.{method}() needs async def and yield" in line


@cases((0.05, 2), (test_agent.NEVER, 1))
async def test_a_slow_answer_counts_after_a_second_failed(
    serve: Serve, after: float, times: int
) -> None:
    one = Own(ask_again_after=after, patience=test_agent.NEVER)
    caller = await serve(one, [[gate := test_agent.Gate(), "Here I am."], (503,)])
    answer = asyncio.create_task(caller.say("hello"))
    await until(lambda: len(caller.gemini.asked) == times)
    await caller.another().say()
    gate.open()
    assert await answer == "Here I am."
    first_word = re.search(r" first_word=(\d+)ms ", caller.log()[-1])
    assert first_word and (times == 1 or int(first_word[1]) >= 50)
    caller.gemini.scripts = [(500,), (503,)]
    assert await caller.say("Once more!") == APOLOGY
    assert " failed: ServerError 503 " in caller.log()[-1]


async def test_how_the_beaten_request_ends_is_not_told(caplog: Any) -> None:
    async def asked(words: str) -> Any:
        await (test_agent.nothing if words else test_agent.waits_and_fails)()
        yield words

    requests = iter([asked(""), asked("Well.")])
    answer = agent.ask_twice(lambda: next(requests), bool, 0.01)
    assert [words async for words in answer] == ["Well."]
    await until(lambda: len(asyncio.all_tasks()) == 1)
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_stop_ends_a_reply_that_would_go_on(serve: Serve) -> None:
    async def stays() -> None:
        with suppress(asyncio.CancelledError):
            await test_agent.forever()

    caller = await serve(one := Own(stays, "on "), GRACE=0.01)
    answer = asyncio.create_task(caller.frames(caller.event("hello")))
    await until(lambda: one.events)
    held = one.running[caller.conversation]
    await one.stop(web.Application())
    assert await answer == []
    await one.stop(web.Application())
    assert held.done() and str(caller.log()).count("Finishing") == 1


async def test_a_stop_ends_no_record(serve: Serve) -> None:
    store = test_agent.Store(finished=(gate := test_agent.Gate()))
    caller = await serve(one := Agent(SETTINGS, store), GRACE=0)
    answer = asyncio.create_task(caller.say("one"))
    await gate.reached.wait()
    agent.cut_off(*one.tasks, *one.tasks)
    assert [task.cancelling() for task in one.tasks] == [1]
    stopping = asyncio.create_task(one.stop(web.Application()))
    await caller.status(b"")
    assert not stopping.done()
    gate.open()
    await asyncio.wait([answer, stopping])
    assert store.facts[-1][2]["finished"]


async def test_gemini_is_connected_at_the_start_and_at_a_greeting(caller: Any) -> None:
    await caller.say()
    await until(lambda: str(caller.gemini.requests).count("GET") == 2)


async def test_an_interruption_after_the_filler_ends_no_tool(serve: Serve) -> None:
    kitchen, store = test_agent.Kitchen(is_open=False), test_agent.Store()
    one = Own(histories=store, given=[kitchen.order])
    caller = await serve(one, [[[test_agent.HAM]]], FILLER_AFTER=0)
    async with caller.post(caller.event("A ham!")) as response:
        await caller.hear(response, Agent.filler)
        response.close()
    await until(caller.log)
    kitchen.gate.open()
    await until(lambda: "number 1" in str(store.facts))


async def test_a_reply_may_take_long(serve: Serve, monkeypatch: Patch) -> None:
    async def five_seconds_go_by() -> None:
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 5)
        await asyncio.sleep(0)

    loop = asyncio.get_running_loop()
    caller = await serve(Own("Once ", *[five_seconds_go_by, "more "] * 3))
    assert await caller.say("A story!") == "Once more more more "


@cases(("high", {"thinking_level": "HIGH"}), ("", None))
async def test_gemini_is_asked_as_our_settings_say_and_no_others(
    serve: Serve, monkeypatch: Patch, thinking: str, sent: Event | None
) -> None:
    for name in ("GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "true")
    caller = await serve(Agent(replace(SETTINGS, gemini_thinking=thinking)))
    assert await caller.say("hello") == SURE
    [asked] = caller.gemini.asked
    assert asked.get("generationConfig", {}).get("thinkingConfig") == sent
    key = caller.gemini.requests[-1].headers["x-goog-api-key"]
    assert key == SETTINGS.google_generative_ai_api_key


AWAY = "Layercode could not be reached:"


@cases("GOOGLE_GEMINI_BASE_URL", "")
async def test_a_proxy_is_used_and_who_is_away_is_told(
    serve: Serve, gemini: Any, monkeypatch: Patch, proxy: str
) -> None:
    away = "http://127.0.0.9:1"
    monkeypatch.setenv("http_proxy", os.environ.get(proxy, ""))
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", away)
    caller = await serve(Own(settings=replace(SETTINGS, layercode_api_url=away)))
    assert await caller.say("hello") == (SURE if proxy else APOLOGY)
    assert proxy or " failed: ClientConnectorError at" in caller.log()[-1]
    told = (502, f"{AWAY} ClientConnectorError")
    asked = await caller.status(test_agent.ASKED, "/authorize")
    assert asked == ((200, "OK") if proxy else told)


async def test_visitors_share_no_cookies_and_do_not_queue(serve: Serve) -> None:
    await serve(one := Agent(SETTINGS))
    assert isinstance(one.http.cookie_jar, aiohttp.DummyCookieJar)
    limit = one.http.connector and one.http.connector.limit
    assert (one.http.trust_env, limit, gc.get_freeze_count() > 0) == (0, 0, True)
    assert gc.get_threshold()[0] == 10_000


KEY = SETTINGS.layercode_api_key
QUOTED = {"text": f'{{"error": "no {KEY},\\nn\u00f4r that"}}' + "x" * 200}
WHY = ('{"error": "no ***,\\nn r that"}' + "x" * 200)[:200]


@cases(
    ({"status": 201}, {}, (200, "OK")),
    ({"status": 400, **QUOTED}, {}, (400, f"Layercode answered 400: {WHY}")),
    ({"status": 402, **QUOTED}, {}, (402, f"Layercode answered 402: {WHY}")),
    ({"status": 401, **QUOTED}, {}, (502, f"Layercode answered 401: {WHY}")),
    ({"status": 307}, {}, (502, "Layercode answered 307: {***}")),
    ({}, {"AUTHORIZE_PATIENCE": 0}, (502, f"{AWAY} TimeoutError")),
)
async def test_the_page_gets_layercode_s_answer_or_why_there_is_none(
    serve: Serve, answer: Event, limits: Any, told: tuple[int, str]
) -> None:
    caller = await serve(Agent(SETTINGS), **limits)
    caller.gemini.session = {"text": f"{{{KEY}}}", **answer}
    got = await caller.answer(test_agent.ASKED, "/authorize")
    assert (got.status, got.reason) == told and KEY not in await got.text()
    assert got.status == 200 or f"{got.status} {got.reason}" in caller.log()[-1]


async def test_metadata_is_passed_on_whole_or_refused(caller: Any) -> None:
    nested = [b"[" * depth + b"]" * depth for depth in range(940, 1_000)]
    for metadata in (*nested, b"NaN"):
        page = b'{"agent_id": "a", "metadata": %b}' % metadata
        status, _ = await caller.status(page, "/authorize")
        assert status in (200, 400)
    assert status == 400


async def test_certifi_s_authorities_are_known(monkeypatch: Patch) -> None:
    monkeypatch.setattr(certifi, "where", lambda: "nowhere.pem")
    with pytest.raises(FileNotFoundError):
        await web.AppRunner(Agent(OFFLINE).make_app()).setup()


@cases("The agent is up.\n", "A page.")
async def test_a_browser_is_shown_the_page_or_that_the_agent_is_up(
    caller: Any, monkeypatch: Patch, tmp_path: Path, page: str
) -> None:
    monkeypatch.setattr(agent, "__file__", str(tmp_path / "agent.py"))
    if page == "A page.":
        (tmp_path / "index.html").write_text(page)
    up = "The agent is up.\n"
    for method, path, text in (("GET", "", page), ("OPTIONS", "/authorize", up)):
        async with caller.http.request(method, caller.url + path) as response:
            assert (response.status, await response.text()) == (200, text)
    async with caller.http.get(caller.url + "/agent") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_a_chat_is_served_to_this_machine_alone(run: Any) -> None:
    code = "import agent; print(agent.serve_beside(agent.Agent())); input()"
    process = await run(code=code)
    url = await test_agent.printed(process, "/agent\n")
    port = int(url.rpartition(":")[2].partition("/")[0])
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.2", port))


@cases(0.15, 0.2, 0.3)
async def test_ctrl_c_while_it_starts_is_no_traceback(run: Any, delay: float) -> None:
    process = await run(PORT="0")
    await asyncio.sleep(delay)
    process.send_signal(signal.SIGINT)
    # Before the first line of agent.py, it is Python's own.
    assert "agent.py" not in (await test_agent.end_of(process))[1]


async def test_strangers_write_few_lines_and_the_rest_is_counted(
    caller: Any, run: Any, unused_tcp_port: int
) -> None:
    port = str(unused_tcp_port)
    process = await run(PORT=port, LAYERCODE_WEBHOOK_SECRET=caller.secret)
    await test_agent.printed(process, "Next: ")
    caller.url = f"http://127.0.0.1:{port}"
    seen, refused = b"", 0
    while b"left out" not in seen:
        assert await caller.stranger("GET / HTTP/1.1\r\nsecret\r\n\r\n")
        refused += (await caller.status(b"", "/agent", {"a": "b"}))[0] == 401
        with suppress(TimeoutError):
            seen += await asyncio.wait_for(process.stderr.read(10_000), 0.001)
    process.terminate()
    seen += await process.stderr.read()
    told = re.findall(rb"\((\d+) lines like this were left out before\)\n", seen)
    assert told and sum(map(int, told)) + seen.count(b"\n") <= 2 * refused
    assert not re.search(b"Traceback|secret", seen) and seen.count(b"\n") <= 3


async def test_gemini_is_shown_that_tools_were_interrupted_before_a_word() -> None:
    assert Turn("A ham!", done=[{"role": "model"}]).answer() == "[interrupted]"


@cases(("/agent", 401, "WEBHOOK_SECRET"), ("/authorize", 500, "API_KEY"))
async def test_a_missing_secret_is_told(
    serve: Serve, path: str, status: int, name: str
) -> None:
    caller = await serve(Agent(agent.Settings()))
    caller.secret = ""
    answer = await caller.status({**test_agent.ASKED, **caller.event()}, path)
    assert answer[0] == status and f"LAYERCODE_{name}" in answer[1]
