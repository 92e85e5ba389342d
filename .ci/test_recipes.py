"""The recipes of README.md, as they stand there: python -m pytest -p test_agent .ci

What they need and do not find fails: the package redis, redis-server, node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import recipes
from aiohttp import web
from served import free_port

import test_agent
from agent import Agent, Histories
from test_agent import SECRET, SETTINGS, SURE, Caller, Serve, call, cases, forever

ORDER = call("order", pizza="salami", number=2)
ERROR = b'data: {"error": {"message": "overloaded"}}\n\n'


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Imports a recipe, from a folder in which it stands beside agent.py."""
    return lambda name: recipes.load(name, tmp_path)


@pytest.fixture
def begin(run: Any, caller: Caller, tmp_path: Path) -> Any:
    """Runs a recipe in a process of its own; gives it and a caller of it."""

    async def begin(name: str) -> tuple[Any, Caller]:
        port = str(free_port())
        settings = {"PORT": port, "LAYERCODE_WEBHOOK_SECRET": SECRET}
        settings |= {"PIZZA_SECRET": SECRET, "ROSES_SECRET": "another secret"}
        settings["GOOGLE_GENERATIVE_AI_API_KEY"] = "key"
        code = recipes.save(name, tmp_path).read_text()
        process = await run(code=code.replace("port=3000", f"port={port}"), **settings)
        await test_agent.printed(process, "http://127.0.0.1:")
        return process, replace(caller, url=f"http://127.0.0.1:{port}")

    return begin


async def barge_in(caller: Caller, text: str, after: str) -> str:
    """Says something, and hangs up after some words of the answer; gives the turn."""
    event = caller.event(text)
    async with caller.post(event) as response:
        await caller.hear(response, after)
        response.close()
    # Before the agent's patience ends it.
    async with asyncio.timeout(5):
        await caller.gemini.until(open=0)
    return str(event["turn_id"])


async def authorize(caller: Caller, token: str = "", **page: Any) -> tuple[str, Any]:
    """What a page gets: a status with its reason, and the answer."""
    body = json.dumps({"agent_id": "a", **page}).encode()
    headers = {"Authorization": f"Bearer {token}"}
    answer = await caller.answer(body, "/authorize", headers)
    told = await answer.json() if answer.ok else None
    return f"{answer.status} {answer.reason}", told


async def test_two_lines_are_an_agent_and_six_more_a_tool(
    serve: Serve, load: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    caller = await serve(load("pizza.py").Pizza(SETTINGS), [[[ORDER]], ["Soon!"]])
    assert await caller.say() == "Luigi's Pizza! What can I get you?"
    assert await caller.say("Two salami.") == "Soon!"
    assert "They'll be ready in twenty minutes." in str(caller.gemini.results())
    assert capfd.readouterr().out == f"{caller.conversation} 2 salami\n"
    asked = json.dumps(caller.gemini.asked[0])
    assert "You take orders for Luigi's Pizza in Leeds." in asked
    assert "Orders so many pizzas of a kind" in asked


async def test_a_pizzeria_greets_shows_a_menu_hangs_up(serve: Serve, load: Any) -> None:
    goodbye: list[Any] = ["There you are. ", [{"text": "Ciao!"}, call("hang_up")]]
    scripts = [["Luigi's! ", "Try it."], [[call("show_menu")]], goodbye, [""]]
    caller = await serve(load("pizzeria.py").Pizzeria(SETTINGS), scripts)
    ada = {"custom_metadata": {"name": "Ada"}}
    assert await caller.another().say(**ada) == "Hi Ada! What can I get you?"
    assert not caller.gemini.asked
    assert await caller.say() == "Luigi's! Try it."
    direction = "(The phone rings. Answer it, and praise a pizza.)"
    assert caller.gemini.shown() == [direction]
    frames = await caller.frames(caller.event("What is there?"))
    shown = [one["content"] for one in frames if one["type"] == "response.data"]
    assert {"margherita": 9, "salami": 11} in shown
    assert {"tool": "show_menu", "state": "done"} in shown
    assert frames[-1] == {"type": "response.hangup"}
    assert caller.gemini.shown()[1:3] == ["Luigi's! Try it.", "What is there?"]
    assert direction not in caller.gemini.shown()
    declared = json.dumps(caller.gemini.asked[-1]["tools"])
    for words in ('"order"', "Shows the caller the pizzas", "Ends the call, once you"):
        assert words in declared


async def test_its_page_gets_prices_and_needs_a_code(serve: Serve, load: Any) -> None:
    caller = await serve(load("pizzeria.py").Pizzeria(SETTINGS))
    for pizza, price in (("salami", 11), ("tuna", None)):
        data = await caller.answer(caller.event(type="data", data={"pizza": pizza}))
        shown = {"type": "response.data", "content": {"price": price}}
        assert await data.json() == shown
    assert await (await caller.answer(caller.event(type="session.end"))).json() == {}
    async with caller.http.get(f"{caller.url}/menu") as menu:
        assert await menu.json() == {"margherita": 9, "salami": 11}
    for metadata in (None, {}, {"code": "funghi"}, "tonno"):
        refused, _ = await authorize(caller, metadata=metadata)
        assert refused == "403 The code is on the menu."
    assert not caller.gemini.sessions
    assert (await authorize(caller, metadata={"code": "tonno"}))[0] == "200 OK"


class Redis:
    """A real redis-server, its recipe, and the ends of one call at two agents of it."""

    one: Caller
    other: Caller

    def __init__(self, folder: Path, load: Any) -> None:
        self.folder, self.port = folder, str(free_port())
        self.recipe = load("redis_agent.py")

    def start(self) -> None:
        """Starts it, with nothing in it."""
        options = ["--port", self.port, "--save", "", "--dir", str(self.folder)]
        self.process: Any = subprocess.Popen(["redis-server", *options], stdout=PIPE)
        next(line for line in self.process.stdout if b"Ready to accept" in line)

    async def stop(self) -> None:
        """Kills it, and with it what it had."""
        self.process.kill()
        self.process.wait()

    def ask(self, command: str, *words: str, key: str = "a conversation") -> str:
        """What redis-cli prints of a conversation."""
        cli = ["redis-cli", "-p", self.port, command, f"conversation:{key}", *words]
        return subprocess.check_output(cli, text=True)

    def shown(self) -> list[str]:
        """What Gemini was shown last."""
        return self.one.gemini.shown()


@pytest.fixture
async def redis(
    serve: Serve, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Redis]:
    """A Redis with nothing in it; one that has failed is asked again at once."""
    server = Redis(tmp_path, load)
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{server.port}")
    assert (server.recipe.PATIENCE, server.recipe.PAUSE) == (1, 5)
    assert server.recipe.RedisSettings().redis_url == "redis://localhost:6379"
    server.recipe.PAUSE = 0
    server.start()
    # Together with another recipe, and an agent of one's own.
    kinds = load("login_agent.py").LoginAgent, load("pizza.py").Pizza
    kind = type("Both", (server.recipe.RedisAgent, *kinds), {})
    server.one, server.other = [await serve(kind(SETTINGS)) for _ in range(2)]
    yield server
    await server.stop()


async def test_a_call_that_alternates_is_whole_and_kept_a_day(redis: Redis) -> None:
    said = [await redis.one.say()]
    for end in (redis.other, redis.one, redis.one, redis.other):
        redis.ask("expire", "100")
        question = f"Question {len(said)}"
        end.gemini.scripts = [[f"Answer {len(said)}."]]
        answer = await end.say(question)
        assert redis.shown()[1:] == [*said, question]
        said += [question, answer]
        assert 86_300 < int(redis.ask("ttl")) <= 86_400
    assert "Redis" not in str(redis.one.log())


async def test_what_a_tool_gave_is_known_before_it_is_spoken(redis: Redis) -> None:
    redis.one.gemini.scripts = [[[ORDER]], ["It's ", forever]]
    turn = await barge_in(redis.one, "Two salami!", after="It's ")
    await redis.other.say("Hello?", **test_agent.report("It", turn))
    await redis.one.say("And?")
    assert "ready in twenty minutes" in str(redis.shown())
    assert redis.shown()[3:] == ["It [interrupted]", "Hello?", SURE, "And?"]


async def test_a_process_that_is_killed_knows_all_later(
    redis: Redis, begin: Any
) -> None:
    process, one = await begin("redis_agent.py")
    one.gemini.scripts = [["Hello, Ada."], ["Well, ", forever]]
    await one.say("I am Ada.")
    async with one.post(one.event("Who am I?")) as response:
        await one.hear(response, "Well, ")
        process.kill()
        await process.wait()
    await redis.other.say("Hello?")
    _, again = await begin("redis_agent.py")
    await again.say("And now?")
    said = ["I am Ada.", "Hello, Ada.", "Who am I?", "Hello?", SURE, "And now?"]
    assert redis.shown() == said


async def test_while_it_is_gone_calls_go_on_and_are_told_later(redis: Redis) -> None:
    await redis.one.say("One")
    await redis.other.say("Two")
    redis.one.gemini.scripts = [["Well, ", redis.stop, "yes."]]
    assert await redis.other.say("Three") == "Well, yes."
    assert await redis.other.say("Four") == SURE
    assert "goes on without Redis: ConnectionError" in str(redis.one.log())
    redis.start()
    await redis.other.say("Five")
    await redis.one.say("Six")
    said = ["One", SURE, "Two", SURE, "Three", "Well, yes.", "Four", SURE, "Five", SURE]
    assert redis.shown() == [*said, "Six"]


async def test_nobody_waits_for_one_that_is_stuck_but_the_first(redis: Redis) -> None:
    await redis.one.say("One")
    redis.recipe.PATIENCE, redis.recipe.PAUSE = 0.1, 3600
    redis.process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(3):
        assert await redis.one.say("Two") == SURE
    # Whoever waited now would wait for too long.
    redis.recipe.PATIENCE = 3600
    assert await redis.one.say("Three") == SURE
    assert redis.shown()[::2] == ["One", "Two", "Three"]


@cases("set hello", "rpush hello", "rpush [1]", "rpush [[],2]")
async def test_a_spoilt_key_affects_one_call(redis: Redis, spoilt: str) -> None:
    redis.recipe.PAUSE = 3600
    redis.ask(*spoilt.split())
    for text in ("One", "Two"):
        assert await redis.one.say(text) == SURE
    assert redis.shown() == ["One", SURE, "Two"]
    one, other = [replace(end, conversation="b") for end in (redis.one, redis.other)]
    await one.say("I am Ada.")
    await other.say("Who am I?")
    assert redis.shown() == ["I am Ada.", SURE, "Who am I?"]


async def test_many_calls_at_once_find_redis_and_have_its_order(redis: Redis) -> None:
    redis.recipe.PATIENCE = 20
    one, other = [redis.recipe.RedisHistories() for _ in range(2)]
    for first in range(1, 1_200, 300):
        names = [str(first + number) for number in range(300)]
        facts = [one.record(name, "1", user="Hi") for name in ["0", *names]]
        await asyncio.gather(*facts)
    one.away_until = float("inf")
    known = [name for name in ("0", "1", "200", "250") if await one.load(name)]
    assert known == ["0", "250"]
    await one.record("0", "missed", user="Hi")
    await other.record("0", "between", user="Hi")
    one.away_until = 0
    for histories in (one, other):
        assert list(await histories.load("0")) == ["1", "between", "missed"]
    assert redis.ask("llen", key="0") == "3\n"
    assert "Redis" not in str(redis.one.log())


class OpenAI(test_agent.Gemini):
    """An OpenAI-compatible server. In a script, a number is a status, bytes are sent as
    they are, a function is waited for, a dict is a delta, anything else a content."""

    async def generate(self, request: web.Request) -> web.StreamResponse:
        key = request.headers["Authorization"]
        self.asked.append({**await request.json(), "key": key})
        script = self.scripts.pop(0) if self.scripts else [SURE]
        status = script.pop(0) if isinstance(script[0], int) else 200
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for step in [*script, b"data: [DONE]\n\n"]:
            if callable(step):
                await step()
            elif isinstance(step, bytes):
                await response.write(step)
            else:
                delta = step if isinstance(step, dict) else {"content": step}
                await response.write(test_agent.raw(choices=[{"delta": delta}]))
        return response


@pytest.fixture
async def one(aiohttp_server: Any, serve: Serve, load: Any, monkeypatch: Any) -> Caller:
    """A caller of openai_agent.py, and the server that it asks."""
    server = OpenAI()
    app = web.Application(middlewares=[server.count])
    app.router.add_post("/v1/chat/completions", server.generate)
    url = test_agent.url_of(await aiohttp_server(app, shutdown_timeout=0))
    for name, value in {"BASE_URL": f"{url}/v1/", "API_KEY": "k", "MODEL": "m"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    agent = load("openai_agent.py").OpenAIAgent(SETTINGS)
    agent.ask_again_after = 0.5
    return replace(await serve(agent), gemini=server)


async def test_any_model_is_asked_as_openai_has_it(one: Caller) -> None:
    defaults = sys.modules["openai_agent"].OpenAISettings()
    assert defaults.openai_base_url.startswith("https://generativelanguage.googleapis")
    assert defaults.openai_model == defaults.gemini_model
    greeting = await one.say()
    one.gemini.scripts = [["Sure, ", "the first ", forever], [forever]]
    turn = await barge_in(one, "How?", after="the first ")
    async with one.post(one.event("Cake!", **test_agent.report("Sure", turn))):
        pass
    assert await one.say("Hello?") == SURE
    asked = one.gemini.asked[-1]
    assert (asked["model"], asked["key"], asked["stream"]) == ("m", "Bearer k", True)
    told = [(one["role"], one["content"]) for one in asked["messages"]]
    assert told[0] == ("system", f"{Agent.persona}\n{Agent.voice_rules}")
    assert told[2:4] == [("assistant", greeting), ("user", "How?")]
    assert told[4:] == [("assistant", "Sure [interrupted]"), ("user", "Cake! Hello?")]


@cases(
    ["Sure, ", "no < problem."],
    ["<think>They\n", "want</thi", "nk>\n\n", "Sure, ", "no <", " problem."],
    ["<", "th", "ink>So", "</think>Sure, no < problem."],
    [{"reasoning_content": "Let me see."}, "Sure, no < problem."],
    [[{"text": "Sure, "}], [{"text": "no < "}, {"text": "problem."}]],
    [[{"type": "thinking", "thinking": []}], "Sure, no < problem."],
    [b": comment\n\n", b'data: {"choices": null}\n\n', "Sure, no < problem."],
    [b'data: {"choices": [{"delta": null}]}\n\n', "Sure, no < problem."],
    [b'data:{"choices": [{"delta": {"content": "Sure, "}}]}\n', "no < problem."],
    ["Sure, no < problem.", b"data: [DONE]\n\n", forever],
)
async def test_only_words_are_spoken(one: Caller, script: Any) -> None:
    one.gemini.scripts = [[*script]]
    assert await one.say("Hi") == "Sure, no < problem."
    assert len(one.gemini.asked) == 1


@cases(
    ([401], 1, Agent.apology, "server answered 401"),
    ([429], 1, Agent.apology, "server answered 429"),
    ([500], 2, SURE, "server answered 500"),
    ([" "], 2, SURE, "no words"),
    ([forever], 2, SURE, "no word in 0.5 s"),
    (["Well.", ERROR], 1, f"Well. {Agent.apology}", "server reported an error"),
)
async def test_what_says_nothing_is_asked_twice_unless_it_refuses(
    one: Caller, script: Any, asked: int, said: str, why: str
) -> None:
    one.gemini.scripts = [[*script]]
    assert await one.say("Hi") == said
    assert len(one.gemini.asked) == asked
    assert why in str(one.log())


async def test_who_has_logged_in_is_greeted_by_name(serve: Serve, load: Any) -> None:
    login = load("login_agent.py")
    login.LoginAgent.welcome_back = "Welcome back, {name}! {What} now?"
    caller = await serve(login.LoginAgent(SETTINGS))
    token = login.make_token("u1", "Zoë O. Byrne", SECRET)
    forged = {"custom_metadata": {"name": "Mallory"}}
    assert token.isascii() and (await authorize(caller, token, **forged))[0] == "200 OK"
    known = {"custom_metadata": {"user": "u1", "name": "Zoë O. Byrne"}}
    assert caller.gemini.sessions == [{"agent_id": "a", **known}]
    assert await caller.say(**known) == "Hi Zoë O. Byrne! How can I help you today?"
    await caller.say("Hello.")
    assert await caller.say(**known) == "Welcome back, Zoë O. Byrne! {What} now?"
    assert (await caller.another().say()).startswith("Hi there!")
    async with caller.http.get(caller.url) as shown:
        assert await shown.text() == "The agent is up.\n"
    caller.gemini.session = {"status": 400, "text": '{"error": "no such agent"}'}
    assert "no such agent" in (await authorize(caller, token))[0]


async def test_who_has_not_logged_in_is_refused(serve: Serve, load: Any) -> None:
    login = load("login_agent.py")
    agent = login.LoginAgent(SETTINGS)
    caller = await serve(agent)
    token = login.make_token("u1", "Ada", SECRET)
    who, _, signature = token.rpartition(" ")
    another, unsigned = [login.make_token("u1", "Ada", key) for key in ("other", "")]
    late, forged = token.replace("t=", "t=1"), f"{who.replace('u1', 'u2')} {signature}"
    for given in ("", "é é", who, f"{who} ", forged, late, another, unsigned):
        assert (await authorize(caller, given))[0] == "403 Log in first.", given
    head = "POST /authorize HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    head += "Authorization: Bearer \xe9 \xe9\r\nContent-Length: 16\r\n\r\n"
    assert await caller.stranger(head + '{"agent_id":"a"}') == "403 Log in first."
    agent.settings = replace(agent.settings, layercode_webhook_secret="")
    assert (await authorize(caller, unsigned))[0] == "403 Log in first."
    assert not caller.gemini.sessions


async def test_who_began_a_conversation_alone_resumes_it(
    serve: Serve, load: Any
) -> None:
    login = load("login_agent.py")
    ada, bob = [login.make_token(user, "Al", SECRET) for user in ("ada", "bob")]
    store = Histories()
    caller, other = [await serve(login.LoginAgent(SETTINGS, store)) for _ in range(2)]
    for name in ("ada", "bob"):
        call = replace(caller, conversation=f"{name}'s")
        await call.say(custom_metadata={"user": name, "name": "Al"})
    assert (await authorize(other, ada, conversation_id="ada's"))[0] == "200 OK"
    assert caller.gemini.sessions[-1]["conversation_id"] == "ada's"
    for token, stolen in (
        (bob, "ada's"),
        (ada, "bob's"),
        (ada, "new"),
        (bob, "\u00e9"),
    ):
        refused, _ = await authorize(caller, token, conversation_id=stolen)
        assert refused == "403 This conversation is not yours."
    assert len(caller.gemini.sessions) == 1


NODE = """
globalThis.fetch = async (...call) => {
  console.log(JSON.stringify(call));
  return new Response("TOKEN", { status: STATUS });
};
FUNCTION
await authorizeSessionRequest({ url: "URL", body: { a: 1 } }).catch(() => {});
"""


@cases((200, 2), (401, 1))
def test_the_page_sends_its_users_token(status: int, requests: int) -> None:
    page, [lines] = recipes.block("index.html"), recipes.blocks("js")
    [function] = re.findall(r"(?ms)^  async function authorize.*?^  }$", page)
    function = function.replace(";\n", f";\n{lines}", 1)
    script = NODE.replace("FUNCTION", function)
    node = ["node", "--input-type=module", "-e", script.replace("STATUS", f"{status}")]
    headers = {"Authorization": "Bearer TOKEN"}
    request = {"method": "POST", "body": '{"a":1}', "headers": headers}
    calls = [["/voice-token"], ["URL", request]]
    printed = subprocess.check_output(node).splitlines()
    assert [json.loads(call) for call in printed] == calls[:requests]


@pytest.fixture
def calls(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A database to which another program, this one, writes until it commits."""
    file = tmp_path / "calls.sqlite"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as calls:
        calls.execute("BEGIN EXCLUSIVE")
        yield calls


async def test_each_transcript_is_kept_once_although_the_database_was_locked(
    serve: Serve, load: Any, calls: sqlite3.Connection
) -> None:
    recipe = load("transcripts.py")
    caller = await serve(recipe.TranscriptsAgent(SETTINGS))
    end, other = [caller.event(type="session.end", transcript=[1]) for _ in range(2)]
    again = [end, dict(reversed(end.items()))] * 20
    told = [asyncio.create_task(caller.answer(event)) for event in again]
    assert await caller.say("Still there?") == SURE
    assert recipe.PATIENCE == 25 and not any(one.done() for one in told)
    calls.execute("COMMIT")
    assert {one.status for one in await asyncio.gather(*told)} == {200}
    for event in (other, *[caller.event(type=it) for it in ("data", "session.update")]):
        assert (await caller.answer(event)).status == 200
    kept = calls.execute("SELECT event FROM calls ORDER BY rowid").fetchall()
    assert [json.loads(event) for (event,) in kept] == [end, other]


async def test_a_locked_database_does_not_hold_up_the_stop(
    begin: Any, calls: Any
) -> None:
    process, caller = await begin("transcripts.py")
    told = asyncio.create_task(caller.answer(caller.event(type="session.end")))
    await caller.say()
    process.terminate()
    status, log = await asyncio.wait_for(test_agent.end_of(process), 15)
    await asyncio.gather(told, return_exceptions=True)
    assert (status, "failed in notice(): CancelledError at " in log) == (0, True)


async def test_an_application_has_two_agents_and_barge_ins(
    begin: Any, load: Any
) -> None:
    with pytest.raises(KeyError, match="PIZZA_SECRET"):
        load("own_app.py").make_app()
    process, caller = await begin("own_app.py")
    pizza = replace(caller, url=f"{caller.url}/pizza")
    roses = replace(caller, url=f"{caller.url}/roses", secret="another secret")
    assert (await roses.say()).startswith("Rosa")
    assert (await pizza.say()).startswith("Luigi")
    caller.gemini.scripts = [["Well, ", forever]]
    await barge_in(pizza, "A salami.", after="Well, ")
    await roses.say("Roses.")
    assert "A salami." not in caller.gemini.shown()
    pizza.secret = "another secret"
    assert (await pizza.status(pizza.event("Hi")))[0] == 401
    process.terminate()
    _, log = await test_agent.end_of(process)
    assert " interrupted first_word=" in log
