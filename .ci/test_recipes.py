"""The recipes, each block taken out of README.md as it stands."""

import ast
import asyncio
import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

import agent
from test_agent import SECRET, STALL, Layercode, report

pytestmark = pytest.mark.asyncio
README, KEY = Path(agent.__file__).with_name("README.md"), {"GOOGLE_GENERATIVE_AI_API_KEY": "SECRET-KEY"}


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe(name):
    """The source of a block of README.md."""
    return re.search(rf"```python\n(# recipe: {name}\n.*?)```", README.read_text(), re.S)[1]


def module(source, name="recipe"):
    made = types.ModuleType(name)
    made.__file__, sys.modules[name] = agent.__file__, made  # dataclasses look there
    exec(compile(source, name, "exec"), made.__dict__)
    return made


def pasted(name):
    """A fresh agent.py with a block pasted over the function of the same name."""
    block, lines = recipe(name), Path(agent.__file__).read_text().splitlines()
    new = {node.name for node in ast.parse(block).body if isinstance(node, ast.AsyncFunctionDef)}
    (old,) = [node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") in new]
    lines[old.lineno - 1 : old.end_lineno] = block.splitlines()
    return module("\n".join(lines), "pasted")


def frames_of(frames):
    return [(frame["type"][9:], frame.get("content")) for frame in frames]


def call(name, id="1", **args):
    return {"functionCall": {"name": name, "args": args, "id": id}}


@pytest_asyncio.fixture
async def tools(start, gemini):
    made = pasted("tools")
    made.caller = await start(KEY, make_app=made.make_app)
    return made


def results(gemini):
    """What the last request told of the tools."""
    return [part["functionResponse"] for part in gemini.asked[-1]["contents"][-1]["parts"]]


async def test_a_tool_is_declared_and_run_and_shown_and_its_signature_goes_back_byte_for_byte(tools, gemini):
    signature = "8PHy8/T19vf4+fr7/P3+//Dx8vP09fb3+Pn6+/z9/v//"
    called = call("current_time", timezone="UTC") | {"thoughtSignature": signature}
    thought = {"text": "They want the time.", "thought": True}
    gemini.scripts = [["Let me ", "see.", [thought, called]], ["It's noon."]]
    spoken, frames = await tools.caller.send(tools.caller.event("message", text="What time is it?"))
    assert spoken == "Let me see. It's noon."
    states = [content for kind, content in frames_of(frames) if kind == "data"]
    assert states == [{"tool": "current_time", "state": state} for state in ("running", "done")]
    declared = gemini.asked[0]["tools"][0]["functionDeclarations"]
    assert [tool["name"] for tool in declared] == ["current_time", "hang_up"]
    assert "time zone" in declared[0]["description"] and "timezone" in json.dumps(declared[0])
    assert gemini.asked[1]["contents"][1]["parts"] == [{"text": "Let me "}, {"text": "see."}, thought, called]
    assert results(gemini)[0]["name"] == "current_time" and "20" in results(gemini)[0]["response"]["output"]


async def test_two_tools_run_side_by_side_and_a_sync_one_holds_up_nobody(tools, gemini):
    loop, met = asyncio.get_running_loop(), asyncio.Barrier(2)

    def sync():
        return asyncio.run_coroutine_threadsafe(met.wait(), loop).result(5) * 0

    async def other():
        await met.wait()
        return {"on": datetime.date(2026, 11, 21)}

    tools.TOOLS += sync, other
    gemini.scripts = [[[call("sync", "1"), call("other", "2")]], ["Both."]]
    assert await tools.caller.say("Do both") == "Both."
    given = [(result["id"], result["response"]["output"]) for result in results(gemini)]
    assert given == [("1", 0), ("2", {"on": "2026-11-21"})]


async def test_what_goes_wrong_with_a_tool_is_told_to_the_model_and_logged(tools, gemini, caplog):
    tools.TOOL_PATIENCE = 0.01

    async def stuck():
        await asyncio.Event().wait()

    async def cancelled():
        raise asyncio.CancelledError

    def not_a_number():
        return float("nan")

    tools.TOOLS += stuck, cancelled, not_a_number
    wrong = [
        call("stuck"),
        call("unknown"),
        call("current_time", zone="UTC"),
        call("current_time", timezone="No/Where"),
        call("cancelled"),
        call("not_a_number"),
    ]
    gemini.scripts = [[wrong], ["Sorry, I can't."]]
    spoken, frames = await tools.caller.send(tools.caller.event("message", text="Try"))
    assert spoken == "Sorry, I can't." and str(frames).count("'failed'") == 6
    errors = [result["response"]["error"].partition(":")[0] for result in results(gemini)]
    assert errors == ["TimeoutError", "KeyError", "TypeError", "ZoneInfoNotFoundError", "CancelledError", "ValueError"]
    assert "unknown failed: KeyError" in caplog.text


async def test_after_five_rounds_the_model_has_to_speak(tools, gemini):
    gemini.scripts = [[[call("current_time", timezone="UTC")]]] * 5 + [["Enough."]]
    assert await tools.caller.say("Loop") == "Enough."
    modes = [asked["toolConfig"]["functionCallingConfig"]["mode"] for asked in gemini.asked]
    assert modes == ["AUTO"] * 5 + ["NONE"]
    gemini.scripts = [[[call("current_time", timezone="UTC")]]] * 6
    said, frames = await tools.caller.send(tools.caller.event("message", text="Loop"))
    assert said == agent.APOLOGY and str(frames).count("running") == 5


async def test_any_number_of_stuck_sync_tools_holds_up_no_other(tools, gemini):
    free, began = threading.Event(), threading.Semaphore(0)

    def stuck():
        began.release()
        free.wait()

    tools.TOOLS.append(stuck)
    gemini.scripts = [[[call("stuck")] * 100]]
    stuck_caller = asyncio.create_task(tools.caller.say("Get stuck"))
    try:
        async with asyncio.timeout(4):
            while began._value < 100:
                await asyncio.sleep(0)
            gemini.scripts = [[[call("current_time", timezone="UTC")]], ["It's noon."]]
            assert await Layercode(tools.caller.http, tools.caller.url).say("The time?") == "It's noon."
    finally:
        free.set()
    await stuck_caller


async def test_a_barge_in_cancels_the_tool(tools, gemini):
    cancelled = asyncio.Event()

    async def slow():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    tools.TOOLS.append(slow)
    gemini.scripts = [["One moment.", [call("slow")]]]
    event = tools.caller.event("message", text="Look it up")
    async with tools.caller.post(event) as response:
        while b"running" not in await response.content.readline():
            pass
        response.close()
    async with asyncio.timeout(4):
        await cancelled.wait()
    assert await tools.caller.say("Never mind", **report(event, "One")) == "Sure, no problem."
    assert ("model", "One [interrupted]") in gemini.heard()


THOUGHT = {"text": "They want to go.", "thought": True}


@pytest.mark.parametrize(
    "scripts",
    [
        [["Goodbye!", [call("hang_up")]]],
        [[[call("hang_up")]], ["Goodbye!"]],
        [[[THOUGHT, call("hang_up")]], ["Goodbye!"]],
    ],
)
async def test_hanging_up_comes_after_the_last_words_and_nothing_more(tools, gemini, scripts):
    gemini.scripts, asked = list(scripts), len(scripts)
    spoken, frames = await tools.caller.send(tools.caller.event("message", text="Bye"))
    assert spoken == "Goodbye!" and len(gemini.asked) == asked
    assert [frame["type"] for frame in frames][-2:] == ["response.hangup", "response.end"]


async def test_with_another_tool_beside_it_hanging_up_waits_for_what_that_brings(tools, gemini):
    gemini.scripts = [["One moment.", [call("current_time", timezone="UTC"), call("hang_up")]], ["It's noon. Bye!"]]
    spoken, frames = await tools.caller.send(tools.caller.event("message", text="The time, and goodbye."))
    assert spoken == "One moment. It's noon. Bye!" and frames[-2]["type"] == "response.hangup"


class Server:
    """A real redis-server, started and stopped."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port, self.folder = free.getsockname()[1], folder

    async def start(self):
        quiet = {"cwd": self.folder, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(["redis-server", "--port", str(self.port), "--save", ""], **quiet)
        while b"Ready to accept" not in (line := await asyncio.to_thread(self.process.stdout.readline)):
            assert line, "redis-server ended"

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest_asyncio.fixture
async def redis(tmp_path, monkeypatch):
    pytest.importorskip("redis")
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    server = Server(tmp_path)
    await server.start()
    server.url = f"redis://127.0.0.1:{server.port}"
    yield server
    server.stop()


@pytest_asyncio.fixture
async def pair(redis, gemini, aiohttp_server, monkeypatch):
    """Two processes' worth of modules, and the one caller's ends of them."""
    monkeypatch.setenv("LAYERCODE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("GOOGLE_GENERATIVE_AI_API_KEY", "SECRET-KEY")
    async with aiohttp.ClientSession() as http:
        ends, name = [], f"conversation_{os.urandom(4).hex()}"
        for which in "AB":
            own = module(Path(agent.__file__).read_text(), f"agent_{which}")
            monkeypatch.setitem(sys.modules, "agent", own)
            store = module(recipe("redis"), f"serve_redis_{which}").RedisHistories(redis.url)
            server = await aiohttp_server(own.make_app(histories=store))
            ends.append(Layercode(http, str(server.make_url("")).rstrip("/"), name))
            ends[-1].store = store
        yield ends
        for end in ends:
            await end.store.redis.aclose()


async def test_a_conversation_that_alternates_between_two_processes_is_whole(pair, gemini):
    await pair[0].send(pair[0].event("session.start"))
    for number in range(6):
        gemini.scripts = [[f"Answer {number}."]]
        await pair[(number + 1) % 2].say(f"Question {number}")
    lines = [("user", "(The caller says nothing.)"), ("model", agent.GREETING)]
    for number in range(5):
        lines += [("user", f"Question {number}"), ("model", f"Answer {number}.")]
    assert gemini.heard() == [*lines, ("user", "Question 5")]
    assert 86000 < await pair[0].store.redis.ttl(f"conversation:{pair[0].conversation}") <= 86400


async def test_a_barge_in_on_one_process_is_exact_on_the_other_and_no_late_save_undoes_it(pair, gemini):
    one, other = pair
    gemini.scripts = [["The first step ", "is flour. ", STALL]]
    event = one.event("message", text="How do I bake?")
    async with one.post(event) as response:
        await one.hear(response, "is flour. ")  # and the connection stays: the first process still speaks
        assert await other.say("Cake!", **report(event, "The first")) == "Sure, no problem."
        response.close()
    await gemini.until(streams=0)
    await written(one.store, one.conversation, "is flour")  # the late save is there
    expected = [("user", "How do I bake?"), ("model", "The first [interrupted]"), ("user", "Cake!")]
    assert gemini.heard() == expected
    for end in (one, other):
        await end.say("And then?")
        assert gemini.heard()[:3] == expected


@pytest.fixture
def process(redis, gemini, tmp_path, monkeypatch):
    """serve_redis.py in a process of its own, and its URL."""
    monkeypatch.setenv("LAYERCODE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("GOOGLE_GENERATIVE_AI_API_KEY", "SECRET-KEY")
    patient = "import agent\nagent.PATIENCE = 60\n"  # beyond the ten seconds in which a stopped process finishes replies
    (tmp_path / "serve_redis.py").write_text(patient + recipe("redis"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PORT": str(port), "PYTHONPATH": str(Path(agent.__file__).parent), "REDIS_URL": redis.url}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": env}
    process = subprocess.Popen([sys.executable, tmp_path / "serve_redis.py"], **out)
    while b"Up: " not in (line := process.stdout.readline()):
        assert line, "serve_redis.py ended"
    process.url = f"http://127.0.0.1:{port}"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


async def test_after_a_kill_in_mid_reply_the_other_process_has_the_callers_words(pair, gemini, process):
    doomed = Layercode(pair[0].http, process.url, pair[0].conversation)
    gemini.scripts = [["Well, ", STALL]]
    async with doomed.post(doomed.event("message", text="My name is Ada.")) as response:
        await doomed.hear(response, "Well, ")
        process.kill()
    await pair[1].say("Who am I?")
    assert gemini.heard() == [("user", "My name is Ada."), ("user", "Who am I?")]


async def test_what_is_cut_off_when_a_process_is_stopped_is_written(pair, gemini, process):
    callers = [Layercode(pair[0].http, process.url, f"stopped {number}") for number in range(20)]
    gemini.scripts = [["Well, ", STALL] for _ in callers]
    responses = [await caller.post(caller.event("message", text="Tell me a story.")) for caller in callers]
    for caller, response in zip(callers, responses, strict=True):
        await caller.hear(response, "Well, ")
    process.terminate()
    await asyncio.to_thread(process.wait, 40)
    for caller in callers:
        await Layercode(pair[0].http, pair[0].url, caller.conversation).say("Go on.")
        assert gemini.heard()[1] == ("model", "Well,  [interrupted]")


async def test_without_redis_the_call_goes_on_and_what_was_missed_is_written_later(pair, gemini, redis, caplog):
    await pair[0].say("One")
    redis.stop()
    assert [await pair[0].say("Two"), await pair[0].say("Three")] == ["Sure, no problem."] * 2
    pair[0].store.failed -= 2  # as if PAUSE were over
    await pair[0].say("Still there?")
    assert ("user", "One") in gemini.heard() and caplog.text.count("without Redis") == 1
    await redis.start()
    for end in pair:
        end.store.failed -= 2
    await pair[0].say("Four")
    await pair[1].say("Five")
    assert [text for role, text in gemini.heard() if role == "user"] == [
        *("One", "Two", "Three", "Still there?", "Four", "Five")
    ]


async def test_a_redis_that_is_stuck_is_waited_for_once_and_then_left_alone(pair, gemini, redis, caplog, monkeypatch):
    monkeypatch.setattr(sys.modules["serve_redis_A"], "PAUSE", 1000)
    await pair[0].say("One")
    redis.process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(4):
        assert [await pair[0].say(text) for text in ("Two", "Three")] == ["Sure, no problem."] * 2
    redis.process.send_signal(signal.SIGCONT)
    assert ("user", "One") in gemini.heard() and caplog.text.count("without Redis: TimeoutError") == 1
    assert await pair[0].store.query(pair[0].store.redis.ping) is None


async def test_a_message_on_the_process_that_still_speaks_finds_what_it_has_said(pair, gemini):
    gemini.scripts = [["The first step ", "is flour. ", STALL]]
    async with pair[0].post(pair[0].event("message", text="How do I bake?")) as response:
        await pair[0].hear(response, "is flour. ")
        await pair[0].say("Cake!")
    assert gemini.heard()[1] == ("model", "The first step is flour.  [interrupted]")


async def test_what_has_expired_is_not_written_again(pair, gemini):
    turns = await pair[0].store.load(pair[0].conversation)
    turns["old"] = agent.Turn("My name is Ada.", "Hello, Ada.", True, began=time.time() - 100_000)
    await pair[0].say("Hello")
    await pair[1].say("Who am I?")
    assert gemini.heard()[0] == ("user", "Hello")


async def test_connections_that_redis_has_closed_are_not_used(pair, gemini, redis, caplog):
    for end in pair:
        await end.say("Hello")
    subprocess.run(["redis-cli", "-p", str(redis.port), "client", "kill", "type", "normal"], check=True)
    await pair[0].say("One")
    await pair[1].say("Two")
    assert [text for role, text in gemini.heard() if role == "user"] == ["Hello", "Hello", "One", "Two"]
    assert "without Redis" not in caplog.text


async def test_a_redis_that_can_only_be_read_is_told_once(pair, gemini, caplog):
    await pair[0].say("One")
    await pair[0].store.redis.config_set("min-replicas-to-write", 1)
    for number in range(3):
        pair[0].store.failed -= 2  # as if PAUSE were over
        await pair[0].say("Again")
    assert caplog.text.count("without Redis") == 1
    await pair[0].store.redis.config_set("min-replicas-to-write", 0)
    pair[0].store.failed -= 2
    await pair[0].say("And again")
    await pair[1].say("Who am I?")
    assert [text for role, text in gemini.heard() if role == "user"] == ["One", *["Again"] * 3, "And again", "Who am I?"]


async def test_what_another_version_wrote_ends_no_call(pair, gemini):
    await pair[0].say("One")
    key = f"conversation:{pair[0].conversation}"
    await pair[0].store.redis.hset(key, mapping={"newer": '{"mood": "good"}', "older": "hello"})
    await pair[1].say("Two")
    assert [text for role, text in gemini.heard() if role == "user"] == ["One", "Two"]


async def test_a_turn_is_written_although_its_handler_is_cancelled(pair):
    store = pair[0].store
    saving = asyncio.create_task(store.save(pair[0].conversation, "turn", agent.Turn("hello")))
    await asyncio.sleep(0)  # until it has begun
    saving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await saving
    await written(store, pair[0].conversation, "hello")


async def written(store, conversation, words):
    async with asyncio.timeout(5):
        while words not in str(await store.redis.hgetall(f"conversation:{conversation}")):
            await asyncio.sleep(0)


async def test_a_turn_that_was_cut_off_and_delivered_again_elsewhere_counts_once(pair, gemini):
    one, other = pair
    gemini.scripts = [["The first step ", STALL]]
    event = await one.barge_in("How do I bake?", after="step ")
    await written(one.store, one.conversation, "The first step ")
    gemini.scripts = [["Sure."]]
    assert (await other.send(event))[0] == "Sure."
    assert (await one.send(event))[0] == "Sure."  # said already: Gemini isn't asked
    for end in (one, other):
        await end.say("And then?")
        assert gemini.heard()[:3] == [("user", "How do I bake?"), ("model", "Sure."), ("user", "And then?")]


async def test_whatever_happens_to_a_caller_of_two_processes_gemini_is_sent_what_was_said_and_heard(pair, gemini):
    seed = int(os.environ.get("SEED", time.time()))
    for number in range(300):
        dice, name = random.Random(seed + number), f"conversation_{seed}_{number}"
        ends, turns, still_open, cut = [Layercode(end.http, end.url, name) for end in pair], [], [], None
        for step in range(dice.randrange(1, 7)):
            fields, end = {}, dice.choice(ends)
            what = dice.choice(["message", "message", "drop", "late drop", "duplicate", "greeting"])
            if what == "duplicate":
                if turns and turns[-1][2]:
                    assert (await end.send(turns[-1][3]))[0] == turns[-1][1]
                continue
            if cut or (turns and dice.random() < 0.3):  # Layercode tells what was heard with the next message
                turns[-1][1], turns[-1][2] = turns[-1][1][: dice.randrange(len(turns[-1][1]) + 1)], False
                fields = report(turns[-1][3], turns[-1][1])
            event, said = end.event("message", text=f"words {step}", **fields), [f"Well {step} ", "so ", "yes "]
            cut = what in ("drop", "late drop")
            if what == "greeting":
                event["type"] = "session.start"
                turns.append(["(The caller says nothing.)", (await end.send(event))[0], True, event])
                continue
            gemini.scripts = [said + [STALL] * cut]
            turns.append([event["text"], "".join(said), not cut, event])
            if not cut:
                assert await end.send(event)
                continue
            response = await end.post(event)
            await end.hear(response, "yes ")
            still_open.append(response)
            if what == "drop":
                response.close()
            if dice.random() < 0.5:
                dice.choice(still_open).close()
        last = dice.choice(ends)
        gemini.scripts = []
        await last.say("And now?", **(report(turns[-1][3], turns[-1][1]) if cut else {}))
        for response in still_open:
            response.close()
        wanted = []
        for user, heard, finished, _ in turns:
            wanted += [("user", user), *[("model", heard + " [interrupted]" * (not finished))] * bool(heard)]
        assert gemini.heard() == [*wanted, ("user", "And now?")], f"SEED={seed + number}"


async def test_what_was_heard_of_a_turn_counts_even_if_that_is_stored_later(pair, gemini):
    one, other = pair
    late = agent.Turn("How do I bake?", "The first step is flour.", True)
    await other.say("Cake!", **report({"turn_id": "late"}, "The first"))
    await one.store.save(one.conversation, "late", late)
    for end in pair:
        await end.say("And then?")
        assert gemini.heard()[:3] == [("user", "How do I bake?"), ("model", "The first [interrupted]"), ("user", "Cake!")]


async def test_another_model_streams_from_an_openai_compatible_server(start, aiohttp_server):
    stop = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
    made, asked = pasted("another model"), []
    endings = [b"data: [DONE]\n\n", stop, b"", b'data: {"error": "!"}\n\ndata: [DONE]\n\n', stop.replace(b"stop", b"content_filter")]

    async def complete(request):
        asked.append((request.headers["Authorization"], await request.json()))
        response = web.StreamResponse()
        await response.prepare(request)
        for delta in ({"role": "assistant"}, {"content": "Sure, "}, {"content": "no problem."}):
            line = json.dumps({"choices": [{"delta": delta, "finish_reason": ""}]})
            await response.write(f": a comment\n\ndata: {line}\n\n".encode())
        await response.write(endings.pop(0))
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    url = str((await aiohttp_server(app)).make_url("/v1"))
    settings = {name: default for name, (default, *_) in made.VARIABLES.items()} | {"LAYERCODE_WEBHOOK_SECRET": SECRET}
    settings |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "a key", "OPENAI_MODEL": "small"}
    caller = await start(settings, make_app=made.make_app)
    assert await caller.say("Hi") == "Sure, no problem."
    assert await caller.say("Again") == "Sure, no problem."
    for _ in range(3):  # it breaks off, or has an error, or a filter
        assert await caller.say("Again") == "Sure, no problem. " + agent.APOLOGY
    roles = [(said["role"], said["content"]) for said in asked[1][1]["messages"][1:]]
    assert roles == [("user", "Hi"), ("assistant", "Sure, no problem."), ("user", "Again")]
    assert asked[0][0] == "Bearer a key" and asked[0][1]["stream"] and asked[0][1]["model"] == "small"


async def test_only_who_has_logged_in_is_authorized(start, aiohttp_server):
    made, layercode = pasted("log-in"), web.Application()

    async def authorized(request):
        return web.json_response({"client_session_key": "a session"})

    layercode.router.add_post("/v1/agents/web/authorize_session", authorized)
    url = str((await aiohttp_server(layercode)).make_url("")).rstrip("/")
    settings = {"LAYERCODE_API_KEY": "API-KEY", "LAYERCODE_API_URL": url, "LOGIN_SECRET": "login"}
    caller, token = await start(settings, make_app=made.make_app), made.make_token("ada", "login")
    expired, foreign = made.make_token("ada", "login", -1), made.make_token("ada", "another secret")
    later = re.sub(r"[0-9]+", lambda expiry: str(int(expiry[0]) + 9), token, count=1)
    for header in (
        "",
        "Bearer",
        "Bearer x",
        f"Bearer {expired}",
        f"Bearer {foreign}",
        f"Bearer {later}",
        f"Basic {token}",
    ):
        headers = {"Authorization": header}
        async with caller.http.post(caller.url + "/authorize", json={"agent_id": "a"}, headers=headers) as response:
            assert response.status == 403, header
    headers = {"Authorization": f"Bearer {token}"}
    async with caller.http.post(caller.url + "/authorize", json={"agent_id": "a"}, headers=headers) as response:
        assert (response.status, await response.json()) == (200, {"client_session_key": "a session"})


async def test_mounted_in_an_app_the_agent_answers_beside_its_routes_and_notices_a_barge_in(
    gemini, aiohttp_server, monkeypatch
):
    monkeypatch.setenv("LAYERCODE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("GOOGLE_GENERATIVE_AI_API_KEY", "SECRET-KEY")
    parent = module(recipe("mount")).parent

    async def home(request):
        return web.Response(text="A route of yours.")

    parent.router.add_get("/", home)
    server = await aiohttp_server(parent)
    async with aiohttp.ClientSession() as http:
        caller, origin = Layercode(http, str(server.make_url("/voice"))), {"Origin": "http://localhost:5173"}
        gemini.scripts = [["Well, ", STALL]]
        await caller.barge_in("Hello", after="Well, ")
        await gemini.until(streams=0)
        assert await caller.say("Hello again") == "Sure, no problem."
        async with http.get(server.make_url("/")) as response:
            assert await response.text() == "A route of yours."
        async with http.options(server.make_url("/voice/authorize"), headers=origin) as response:
            assert response.headers["Access-Control-Allow-Origin"] == origin["Origin"]


async def test_transcripts_are_kept_once_if_they_are_signed(gemini, aiohttp_server, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERCODE_WEBHOOK_SECRET", SECRET)
    monkeypatch.chdir(tmp_path)
    server = await aiohttp_server(module(recipe("transcripts")).make_app(None))
    async with aiohttp.ClientSession() as http:
        caller = Layercode(http, str(server.make_url("")).rstrip("/"))
        end = caller.event("session.end", transcript=[{"role": "user", "text": "Hé \ud800"}], duration=1000)
        update = caller.event("session.update", recording_status="completed", recording_url="https://x/y")
        for event, signature, status in [
            (end, None, 200),
            (end, None, 200),
            (update, None, 200),
            (end, "t=1,v1=0", 401),
        ]:
            async with caller.post(event, signature=signature) as response:
                assert response.status == status
        await caller.say("Hello")
    with contextlib.closing(sqlite3.connect("calls.sqlite")) as database:
        kept = database.execute("SELECT conversation, event FROM calls ORDER BY rowid").fetchall()
    assert [conversation for conversation, _ in kept] == [caller.conversation] * 2
    assert json.loads(kept[0][1])["transcript"][0]["text"] == "Hé ?" and "https://x/y" in kept[1][1]
