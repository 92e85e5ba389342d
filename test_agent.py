"""The tests: the real agent over real HTTP, Layercode's part played with real signatures, against a small Gemini.

python -m pytest test_agent.py     the tests
python test_agent.py               the benchmark
"""

import asyncio
import atexit
import gc
import inspect
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from asyncio.subprocess import PIPE
from functools import cache
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

import agent

pytestmark = pytest.mark.asyncio
HERE = Path(__file__).parent
SECRET, CUT, STALL = "a webhook secret", object(), object()
ids = count(1)

class Gemini:
    """Speaks Gemini's streaming format over real HTTP: says the next of scripts, and remembers what it was asked."""

    def __init__(self):
        self.scripts = []  # each a list of: str to say, dict as the parts of a chunk, bytes as they are, an error's status, CUT, STALL, Event
        self.asked = []  # the JSON of each request
        self.connections = set()
        self.open = 0  # streams that are not over
        self.changed = asyncio.Condition()

    async def stream(self, request):
        self.asked.append(await request.json())
        self.connections.add(request.transport)
        script = self.scripts.pop(0) if self.scripts else ["Sure, ", "no problem."]
        if script and isinstance(script[0], int):
            error = {"code": script[0], "message": "the key SECRET-KEY said hello", "status": "SOME_STATUS"}
            return web.json_response({"error": error}, status=script[0])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await self.change(+1)
        try:
            await response.prepare(request)
            for step in script:
                if step is CUT:
                    request.transport.abort()
                elif step is STALL:
                    await asyncio.Event().wait()
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    await response.write(step if isinstance(step, bytes) else chunk(step))
            await response.write(chunk("", "STOP"))
        finally:
            await asyncio.shield(self.change(-1))
        return response

    async def change(self, by):
        async with self.changed:
            self.open += by
            self.changed.notify_all()

    async def until(self, streams):
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.open == streams)

    async def model(self, request):
        self.connections.add(request.transport)
        return web.json_response({"name": "models/" + request.match_info["model"]})

    def heard(self, request=-1):
        """What a request showed of the conversation, as (role, text) pairs."""
        return [(said["role"], part["text"]) for said in self.asked[request]["contents"] for part in said["parts"]]

def chunk(step, finish=None):
    """A chunk as Gemini streams it; step is a text, or a list of parts."""
    parts = [{"text": step}] if isinstance(step, str) else step
    candidate = {"content": {"parts": parts, "role": "model"}, "index": 0} | ({"finishReason": finish} if finish else {})
    return f"data: {json.dumps({'candidates': [candidate], 'modelVersion': 'gemini-test'})}\r\n\r\n".encode()

class Layercode:
    """Plays Layercode's part against the agent at url, in one conversation."""

    def __init__(self, http, url, conversation=None):
        self.http, self.url, self.conversation = http, url, conversation or f"conversation_{next(ids)}"

    def post(self, event=None, body=None, signature=None, path="/agent"):
        body = body if body is not None else json.dumps(event).encode()
        headers = {"layercode-signature": agent.sign(body, SECRET) if signature is None else signature}
        return self.http.post(self.url + path, data=body, headers=headers)

    def event(self, kind, **fields):
        turn = {"turn_id": f"turn_{next(ids)}", "conversation_id": self.conversation, "session_id": "session_1"}
        return {"type": kind} | turn | fields

    async def send(self, event):
        """The words that one webhook is answered with, and the frames of the answer."""
        async with self.post(event) as response:
            assert response.status == 200, await response.text()
            frames = [json.loads(line[6:]) for line in (await response.text()).split("\n\n") if line]
        assert all(frame["turn_id"] == event["turn_id"] for frame in frames)
        return "".join(frame["content"] for frame in frames if frame["type"] == "response.tts"), frames

    async def say(self, text, **fields):
        return (await self.send(self.event("message", text=text, **fields)))[0]

    async def hear(self, response, words):
        """Reads the answer up to these words."""
        heard = ""
        while words not in heard:
            line = await response.content.readline()
            assert line, f"heard only {heard!r}"
            frame = json.loads(line[6:]) if line.startswith(b"data: ") else {}
            heard += frame.get("content", "") if frame.get("type") == "response.tts" else ""
        return heard

    async def barge_in(self, text, after, **fields):
        """Says text, drops the connection when the words `after` were heard; returns the webhook."""
        event = self.event("message", text=text, **fields)
        async with self.post(event) as response:
            await self.hear(response, after)
            response.close()
        return event

def report(event, heard):
    words = len(heard.split())
    cut = {"previous_turn_interrupted": True, "words_heard": words, "text_heard": heard}
    return {"interruption_context": cut | {"assistant_turn_id": event["turn_id"]}}

@pytest_asyncio.fixture
async def gemini(aiohttp_server, monkeypatch):
    fake, app = Gemini(), web.Application()
    app.router.add_post("/{version}/models/{model}", fake.stream)
    app.router.add_get("/{version}/models/{model}", fake.model)
    server = await aiohttp_server(app)
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", str(server.make_url("/")))
    return fake

@pytest_asyncio.fixture
async def start(aiohttp_server):
    """Starts an agent with these settings; gives the caller's end of it."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def start(settings=None, make_app=agent.make_app, **parts):
            known = {name: default for name, (default, *_) in agent.VARIABLES.items()}
            settings = known | {"LAYERCODE_WEBHOOK_SECRET": SECRET} | (settings or {})
            server = await aiohttp_server(make_app(settings, **parts))
            return Layercode(http, str(server.make_url("")).rstrip("/"))

        yield start

@pytest_asyncio.fixture
async def caller(start, gemini):
    return await start({"GOOGLE_GENERATIVE_AI_API_KEY": "SECRET-KEY"})

async def test_a_conversation_reaches_gemini_as_it_was_said_and_heard(caller, gemini):
    greeting, _ = await caller.send(caller.event("session.start"))
    gemini.scripts = [["Sure, the first ", "step is ", STALL]]
    cut = await caller.barge_in("How do I bake?", after="step is ")
    await gemini.until(streams=0)
    assert await caller.say("No, cake!", **report(cut, "Sure, the first")) == "Sure, no problem."
    assert gemini.heard() == [
        ("user", "(The caller says nothing.)"),
        ("model", agent.GREETING),
        ("user", "How do I bake?"),
        ("model", "Sure, the first [interrupted]"),
        ("user", "No, cake!"),
    ]
    assert (greeting, gemini.asked[-1]["systemInstruction"]["parts"]) == (agent.GREETING, [{"text": agent.SYSTEM_PROMPT}])

# ---- the signature ------------------------------------------------------------------------------------------
async def test_a_webhook_is_verified_as_it_was_sent_and_not_as_parsed_and_written_again(caller):
    event = caller.event("message", text="caf\u00e9", metadata={"price": 1.0})
    for body in (json.dumps(event, indent=2), json.dumps(event, ensure_ascii=False), json.dumps(event)):
        async with caller.post(body=body.encode()) as response:
            assert response.status == 200

@pytest.mark.parametrize("path", ["/agent", "/api/agent"])
@pytest.mark.parametrize("signature", ["", "nonsense", "t=1,v1=00", "t=,v1=", "stale", "future", "other", "v0", "\u00e9"])
async def test_a_webhook_without_a_right_signature_is_refused(caller, gemini, signature, path):
    body, now = b'{"type": "message"}', time.time()
    special = {name: agent.sign(body, SECRET, str(int(now + age))) for name, age in {"stale": -310, "future": 310}.items()}
    special |= {"other": agent.sign(body, "another secret"), "v0": agent.sign(body, SECRET).replace("v1=", "v0=")}
    async with caller.post(body=body, signature=special.get(signature, signature), path=path) as response:
        assert (response.status, list(await response.json())) == (401, ["error"])
    assert not gemini.asked

async def test_while_a_secret_is_rotated_one_right_v1_of_several_is_enough():
    timestamp, v1 = agent.sign(b"{}", SECRET).split(",")
    assert agent.verify(f"{timestamp},v1={'0' * 64},{v1}", b"{}", SECRET)
    assert not agent.verify(f"{timestamp},v1={'0' * 64},{v1.replace('v1', 'v0')}", b"{}", SECRET)

# ---- webhooks -----------------------------------------------------------------------------------------------
async def test_without_a_webhook_secret_nothing_is_accepted(start):
    caller = await start({"LAYERCODE_WEBHOOK_SECRET": ""})
    async with caller.post(caller.event("message", text="hello"), signature=agent.sign(b"", "x")) as response:
        assert response.status == 500 and "LAYERCODE_WEBHOOK_SECRET" in (await response.json())["error"]

@pytest.mark.parametrize("value", [5, ["x"], {"x": 1}])
@pytest.mark.parametrize("field", ["type", "conversation_id", "turn_id", "text"])
async def test_the_error_names_the_field_that_is_not_as_it_should_be(caller, field, value):
    async with caller.post(caller.event("message", text="hello") | {field: value}) as response:
        assert response.status == 400 and field in (await response.json())["error"]

async def test_a_message_without_a_text_is_an_error_and_one_with_an_empty_text_is_not(caller, gemini):
    async with caller.post(caller.event("message")) as response:
        assert (response.status, await response.json()) == (400, {"error": "text is missing or not a text"})
    async with caller.post(caller.event("message", text="hello") | {"turn_id": None}) as response:
        assert (response.status, await response.json()) == (400, {"error": "turn_id is missing or not a text"})
    assert [await caller.say(text) for text in ("", None, "  ")] == [agent.APOLOGY] * 3
    assert not gemini.asked

@pytest.mark.parametrize("kind", ["data", "session.update", "session.end", "session.start", "something.new"])
async def test_what_asks_for_no_words_gets_a_mere_200(caller, kind):
    async with caller.post({"type": kind, "session_id": "session_1", "data": {"a": 1}}) as response:
        assert (response.status, await response.json()) == (200, {})

async def test_who_comes_back_is_welcomed_back_and_nothing_is_forgotten(caller, gemini):
    words = [(await caller.send(caller.event(kind)))[0] for kind in ("welcome", "session.start")]
    assert words == [agent.GREETING, agent.WELCOME_BACK]
    await caller.say("Hello.")
    assert [text for role, text in gemini.heard() if role == "model"] == words

async def test_old_payloads_without_conversation_id_are_one_conversation_a_session(caller, gemini):
    for text in ("one", "two"):
        event = {"type": "message", "session_id": caller.conversation, "turn_id": text, "text": text}
        await caller.send(event)
    assert [text for role, text in gemini.heard() if role == "user"] == ["one", "two"]

async def test_the_answer_has_the_form_that_layercode_reads(caller):
    event = caller.event("message", text="hello")
    async with caller.post(event) as response:
        frames = (await response.text()).split("\n\n")
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    turn = event["turn_id"]
    assert frames[0] == f'data: {{"type": "response.tts", "content": "Sure, ", "turn_id": "{turn}"}}'
    assert frames[-2:] == [f'data: {{"type": "response.end", "turn_id": "{turn}"}}', ""]

async def test_reply_may_yield_events_beside_words(start):
    async def reply(event, history):
        yield {"type": "response.data", "content": {"said": history[-1].user}}
        if history[-1].user == "bye":
            yield "Goodbye."
            yield {"type": "response.hangup"}

    caller = await start(reply=reply)
    words, frames = await caller.send(caller.event("message", text="bye"))
    assert words == "Goodbye."
    assert [frame["type"] for frame in frames] == ["response.data", "response.tts", "response.hangup", "response.end"]
    assert await caller.say("only data, which nobody hears") == agent.APOLOGY

async def test_words_are_passed_on_the_moment_they_come(caller, gemini):
    more = asyncio.Event()
    gemini.scripts = [["Hello ", more, "there."]]
    async with caller.post(caller.event("message", text="hi")) as response:
        assert await caller.hear(response, "Hello ") == "Hello "
        more.set()
        assert await caller.hear(response, "there.") == "there."

@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"5", b'"x"', b"\xff\xfe", b"{", b"[" * 100_000, b'{"a":' * 50_000, b'{"type": 1' + b"0" * 5000 + b"}",
        b"\x00", b'{"type": {}, "session_id": []}', b'{"type": NaN}', b"[1, 2]", b'[["type", "message"]]',
    ],
)  # fmt: skip
async def test_rubbish_is_a_clear_400(caller, body):
    async with caller.post(body=body) as response:
        assert (response.status, list(await response.json())) == (400, ["error"])

async def test_lone_surrogates_and_nuls_do_not_break_a_conversation(caller, gemini):
    for field in ("text", "turn_id", "conversation_id", "interruption_context"):
        event = caller.event("message", text="hello") | {field: "a\ud800b\x00\n"}
        async with caller.post(event) as response:
            assert response.status == 200
    assert gemini.heard(0)[-1] == ("user", "a?b\x00")

async def test_bodies_of_one_mebibyte_are_read_and_no_larger_ones(caller):
    event = caller.event("message", text="hello", padding="")
    room = 2**20 - len(json.dumps(event))
    async with caller.post(event | {"padding": "x" * room}) as response:
        assert response.status == 200
    async with caller.post(event | {"padding": "x" * (room + 1)}) as response:
        assert (response.status, list(await response.json())) == (413, ["error"])

# ---- barge-in -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [[STALL], ["Well, ", STALL], ["Well, ", "x" * 10_000, *["y" * 60_000] * 200]])
async def test_when_the_connection_drops_gemini_stops(caller, gemini, script):
    gemini.scripts = [script]
    async with caller.post(caller.event("message", text="hi")) as response:
        await gemini.until(streams=1)
        if script[0] != STALL:
            await caller.hear(response, "Well, ")
        response.close()
    await gemini.until(streams=0)

async def test_a_new_message_ends_the_reply_to_an_earlier_one(caller, gemini):
    gemini.scripts = [["Once upon ", STALL]]
    async with caller.post(caller.event("message", text="Tell me a story.")) as response:
        await caller.hear(response, "Once upon ")
        assert await caller.say("Stop!") == "Sure, no problem."
        await gemini.until(streams=0)
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert gemini.heard()[1] == ("model", "Once upon  [interrupted]")

async def test_what_was_heard_overrules_what_was_sent_even_if_that_is_nothing(caller, gemini):
    event = caller.event("message", text="one")
    await caller.send(event)
    await caller.say("two", **report(event, ""))
    assert gemini.heard() == [("user", "one"), ("user", "two")]

WRONG = {"assistant_turn_id": "unknown"}, {"text_heard": None}, {"text_heard": 5}, {"previous_turn_interrupted": False}

@pytest.mark.parametrize("wrong", WRONG)
async def test_a_report_about_nothing_known_changes_nothing(caller, gemini, wrong):
    event = caller.event("message", text="one")
    await caller.send(event)
    context = report(event, "Su")["interruption_context"] | wrong
    await caller.say("two", interruption_context=context)
    await caller.say("three", interruption_context=[context])
    assert ("model", "Sure, no problem.") in gemini.heard(1)

async def test_a_thousand_interruptions_leave_nothing_behind(caller, gemini):
    gemini.scripts = [["Well, ", STALL] for _ in range(1000)]
    await caller.barge_in("warm up", after="Well, ")
    await gemini.until(streams=0)
    before = len(asyncio.all_tasks())
    for _ in range(99):
        await asyncio.gather(*(Layercode(caller.http, caller.url).barge_in("hi", after="Well, ") for _ in range(10)))
    await gemini.until(streams=0)
    while len(asyncio.all_tasks()) > before:
        await asyncio.sleep(0)
    assert not [one for one in gc.get_objects() if inspect.isasyncgen(one) and one.__name__ == "reply"]

async def test_a_store_gets_each_turn_before_gemini_is_asked_and_when_it_is_over(start, gemini):
    class Store(agent.Histories):
        async def save(self, conversation, turn_id, turn):
            saved.append((turn.assistant, turn.finished, turn.interrupts, len(gemini.asked)))

    saved, caller = [], await start({"GOOGLE_GENERATIVE_AI_API_KEY": "SECRET-KEY"}, histories=Store())
    event = caller.event("message", text="one")
    (said, _), heard = await caller.send(event), [event["turn_id"], "Su"]
    await caller.say("two", **report(event, "Su"))
    assert saved == [("", False, None, 0), (said, True, None, 1), ("", False, heard, 1), (said, True, heard, 2)]

# ---- delivered twice ----------------------------------------------------------------------------------------
async def test_a_finished_turn_delivered_again_is_spoken_again_without_gemini(caller, gemini):
    event = caller.event("message", text="hello")
    assert [(await caller.send(event))[0] for _ in range(3)] == ["Sure, no problem."] * 3
    assert len(gemini.asked) == 1
    await caller.say("two")
    assert gemini.heard() == [("user", "hello"), ("model", "Sure, no problem."), ("user", "two")]

async def test_a_running_turn_delivered_again_gets_a_new_reply_on_the_new_connection(caller, gemini):
    gemini.scripts = [["Well, ", STALL]]
    event = caller.event("message", text="hello")
    async with caller.post(event) as response:
        await caller.hear(response, "Well, ")
        assert (await caller.send(event))[0] == "Sure, no problem."
        await gemini.until(streams=0)
    await caller.say("two")
    assert gemini.heard() == [("user", "hello"), ("model", "Sure, no problem."), ("user", "two")]

# ---- Gemini fails -------------------------------------------------------------------------------------------
FAILURES = {
    "ClientError 400": [400], "ClientError 401": [401], "ClientError 403": [403], "ClientError 429": [429],
    "no words": [], "SAFETY": [b'data: {"candidates": [{"finishReason": "SAFETY"}]}\r\n\r\n', STALL],
    "UnknownApiResponseError": [b"data: {hello\r\n\r\n"],
    "TimeoutError": [STALL], "ClientPayloadError": [CUT],
}  # fmt: skip

@pytest.mark.parametrize("spoken", ["", "Well, "])
@pytest.mark.parametrize("cause", FAILURES)
async def test_when_gemini_fails_an_apology_is_heard_and_the_cause_logged(caller, gemini, monkeypatch, caplog, cause, spoken):
    script = FAILURES[cause]
    if spoken and script and not isinstance(script[0], int):
        script = [spoken, *script]
    if cause == "TimeoutError":
        monkeypatch.setattr(agent, "PATIENCE", 0.2)
    gemini.scripts = [script]
    caplog.set_level("INFO")
    words, frames = await caller.send(caller.event("message", text="hello secret"))
    said = spoken + " " * bool(spoken) if script[:1] == [spoken] else ""
    assert words == said + agent.APOLOGY
    assert frames[-1]["type"] == "response.end"
    [line] = [record.getMessage() for record in caplog.records if record.name == "agent"]
    assert cause in line and "failed" in line
    assert "secret" not in caplog.text and "KEY" not in caplog.text and "Traceback" not in caplog.text
    await caller.say("again")
    assert gemini.heard()[:2] == [("user", "hello secret"), ("model", words)]

@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_gemini_is_asked_once_more_where_that_can_help(caller, gemini, status):
    gemini.scripts = [[status], [chunk("Here I am.", "MAX_TOKENS")], [status], [status]]  # a long answer is one, too
    assert [await caller.say("hello") for _ in range(2)] == ["Here I am.", agent.APOLOGY]
    assert len(gemini.asked) == 4

async def test_gemini_is_not_asked_again_after_its_first_word_nor_where_it_would_not_help(caller, gemini):
    gemini.scripts = [["Well, ", CUT], [400], [429]]
    for _ in range(3):
        assert (await caller.say("hello")).endswith(agent.APOLOGY)
    assert len(gemini.asked) == 3

async def test_a_gemini_that_refuses_connections_is_an_apology(caller, gemini, unused_tcp_port, monkeypatch, start):
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", f"http://127.0.0.1:{unused_tcp_port}")
    caller = await start({"GOOGLE_GENERATIVE_AI_API_KEY": "SECRET-KEY"})
    assert await caller.say("hello") == agent.APOLOGY

async def test_the_limits_are_those_that_are_promised():
    assert (agent.PATIENCE, agent.AUTHORIZE_PATIENCE, agent.TOLERANCE) == (8, 10, 300)
    assert (agent.MAX_TURNS, agent.MAX_CONVERSATIONS) == (50, 10_000)

# ---- bounds, logs, stopping ---------------------------------------------------------------------------------
async def test_gemini_is_sent_the_last_fifty_turns(caller, gemini):
    for number in range(55):
        await caller.say(f"number {number}")
    asked = [text for role, text in gemini.heard() if role == "user"]
    assert (asked[0], asked[-1], len(asked)) == ("number 5", "number 54", 50)

async def test_the_least_recently_used_conversations_go_but_none_that_is_being_answered(caller, gemini, monkeypatch):
    monkeypatch.setattr(agent, "MAX_CONVERSATIONS", 3)
    other = [Layercode(caller.http, caller.url) for _ in range(5)]
    gemini.scripts = [["Once upon ", STALL]]
    async with caller.post(caller.event("message", text="Tell me a story.")) as response:
        await caller.hear(response, "Once upon ")
        for one in other:
            await one.say("hello")
        await caller.say("Go on.")
        assert len(gemini.heard()) == 3
    for number in (3, 0, 3):  # one that is there, one that is not, and the first again, now recently used
        await other[number].say("again")
    assert [len(gemini.heard(request)) for request in (-3, -2, -1)] == [3, 1, 5]

async def test_a_hundred_thousand_conversations_leave_memory_flat():
    histories = agent.Histories()
    for number in range(100_000):
        (await histories.load(f"conversation {number}"))["turn"] = agent.Turn("hello", "hi", True)
    assert len(histories) == agent.MAX_CONVERSATIONS

async def test_the_log_has_a_line_a_turn_and_neither_words_nor_secrets(caller, gemini, caplog):
    caplog.set_level("DEBUG")
    gemini.scripts = [["spoken words"], [403], ["spoken", STALL]]
    event = caller.event("message", text="heard words")
    await caller.send(event)
    await caller.say("heard words")
    await caller.barge_in("heard words", after="spoken")
    await gemini.until(streams=0)
    async with caller.post(body=b"{}", signature="t=1,v1=00") as response:
        assert response.status == 401
    lines = [record.getMessage() for record in caplog.records if record.name == "agent" and record.levelname != "DEBUG"]
    form = "first_word=[0-9]+ms total=[0-9]+ms chunks=1"
    assert re.fullmatch(f"conversation='{caller.conversation}' turn='{event['turn_id']}' spoken {form}", lines[0])
    assert re.search(f"failed: ClientError 403 {form}", lines[1]) and re.search(f"interrupted {form}", lines[2])
    assert len(lines) == 4 and "401" in lines[3]
    assert "Traceback" not in caplog.text and "in reply" in caplog.text  # the stack, at DEBUG
    assert not [secret for secret in ("heard words", "spoken words", "SECRET-KEY", SECRET) if secret in caplog.text]

async def run(*arguments, stdin=PIPE, **settings):
    """Runs agent.py in a process of its own, with these settings and no others, whatever .env says."""
    command, env = [sys.executable, agent.__file__, *arguments], os.environ | dict.fromkeys(agent.VARIABLES, "") | settings
    return await asyncio.create_subprocess_exec(*command, stdin=stdin, stdout=PIPE, stderr=PIPE, env=env)

@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_when_it_is_stopped_replies_in_flight_finish(gemini, unused_tcp_port, how):
    settings = {"PORT": str(unused_tcp_port), "LAYERCODE_WEBHOOK_SECRET": SECRET, "GOOGLE_GENERATIVE_AI_API_KEY": "k"}
    process = await run(**settings)
    assert b"Up: http://127.0.0.1:" in await process.stdout.readline()
    more = asyncio.Event()
    gemini.scripts = [["Once upon ", more, "a time."]]
    async with aiohttp.ClientSession() as http:
        caller = Layercode(http, f"http://127.0.0.1:{unused_tcp_port}")
        async with caller.post(caller.event("message", text="hi")) as response:
            await caller.hear(response, "Once upon ")
            process.send_signal(how)
            with pytest.raises(aiohttp.ClientError):
                while True:
                    await Layercode(http, caller.url).say("no new webhooks")
            more.set()
            assert "a time." in await response.text()
    _, said = await process.communicate()
    assert (process.returncode, b"Traceback" in said) == (0, False)

async def test_killed_outright_the_next_start_works_at_once(unused_tcp_port):
    for _ in range(2):
        process = await run(PORT=str(unused_tcp_port))
        assert b"Up: " in await process.stdout.readline()
        process.kill()
        await process.wait()

# ---- settings -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", ["PORT=abc", "PORT=65536", "LOG_LEVEL=loud", "LAYERCODE_API_URL=layercode", "ALLOWED_ORIGINS=*"])
async def test_a_setting_that_cannot_be_right_ends_the_start_with_one_clear_line(wrong):
    process = await run(**dict([wrong.split("=")]))
    _, said = await process.communicate()
    assert (process.returncode, said.decode().count("\n")) == (1, 1)
    assert wrong in said.decode()

async def test_it_says_what_is_not_configured_and_where_to_get_it(unused_tcp_port):
    process = await run(PORT=str(unused_tcp_port))
    said = b"".join([await process.stdout.readline() for _ in range(5)]).decode()
    process.kill()
    await process.communicate()
    assert all(name in said for name in [*list(agent.VARIABLES)[:3], "aistudio.google.com", "Dashboard", "tunnel"])

async def test_settings_come_from_the_environment_and_from_dotenv(tmp_path, monkeypatch):
    lines = ["# a comment", "export GEMINI_MODEL=a-b#c # comment", "LAYERCODE_API_KEY='a # \"b'", "HOST=", "LOG_LEVEL=WARNING"]
    lines += ['LAYERCODE_WEBHOOK_SECRET="a \\"b\\" # c"', "  PORT = 80 "]
    (tmp_path / ".env").write_text("\n".join(lines))
    monkeypatch.setattr(agent, "__file__", str(tmp_path / "agent.py"))
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    settings = agent.load_settings()
    wanted = ("a-b#c", 'a # "b', "127.0.0.1", "ERROR", 'a "b" # c', "80")
    names = "GEMINI_MODEL", "LAYERCODE_API_KEY", "HOST", "LOG_LEVEL", "LAYERCODE_WEBHOOK_SECRET", "PORT"
    assert tuple(settings[name] for name in names) == wanted

async def test_the_example_of_dotenv_lists_every_setting():
    example = (HERE / ".env.example").read_text()
    assert re.findall(r"(?m)^#? ?([A-Z_]+)=", example) == list(agent.VARIABLES)

# ---- authorize ----------------------------------------------------------------------------------------------
@pytest_asyncio.fixture
async def layercode_api(aiohttp_server, start):
    """Layercode's REST API, which answers what it is told; gives it with an agent that uses it."""
    api = SimpleNamespace(asked=[], status=200, answer={"client_session_key": "k", "conversation_id": "c", "config": {}})

    async def authorize_session(request):
        api.asked.append((request.headers["Authorization"], await request.json()))
        if api.status == STALL:
            await asyncio.Event().wait()
        body = json.dumps(api.answer, ensure_ascii=False).encode("latin-1")  # not always valid UTF-8
        return web.Response(body=body, content_type="application/json", status=api.status, headers={"Location": "/"})

    app = web.Application()
    app.router.add_post("/v1/agents/web/authorize_session", authorize_session)
    url = str((await aiohttp_server(app)).make_url("")).rstrip("/")
    api.settings = {"LAYERCODE_API_KEY": "API-KEY", "LAYERCODE_API_URL": url}
    caller = await start(api.settings)
    api.url, api.http = caller.url, caller.http
    return api

def ask(api, page=None, path="/authorize", **headers):
    return api.http.post(api.url + path, json=page or {"agent_id": "a"}, headers=headers)

async def test_a_page_on_another_localhost_port_gets_its_session(layercode_api):
    origin = {"Origin": "http://localhost:5173"}
    preflight = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    async with layercode_api.http.options(layercode_api.url + "/authorize", headers=preflight) as response:
        assert response.status == 200 and response.headers["Access-Control-Allow-Origin"] == origin["Origin"]
        assert "Content-Type" in response.headers["Access-Control-Allow-Headers"]
    page = {"agent_id": "a", "metadata": {}, "sdk_version": "2.7.0"}
    async with ask(layercode_api, page, "/api/authorize", **origin) as response:
        assert (response.status, await response.json()) == (200, layercode_api.answer)
        assert (response.headers["Access-Control-Allow-Origin"], response.headers["Vary"]) == (origin["Origin"], "Origin")
    assert layercode_api.asked == [("Bearer API-KEY", page)]

async def test_a_page_of_another_origin_gets_nothing(layercode_api):
    for call in (layercode_api.http.options, layercode_api.http.post):
        headers = {"Origin": "https://localhost.evil.example"}
        async with call(layercode_api.url + "/authorize", json={"agent_id": "a"}, headers=headers) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
    assert not layercode_api.asked

async def test_a_visitor_cannot_set_more_than_four_fields(layercode_api):
    page = {"agent_id": "a", "conversation_id": "c", "metadata": {"b": 1}, "sdk_version": "2"}
    async with ask(layercode_api, page | {"config": {"x": 1}, "custom_headers": {}, "custom_metadata": {}}) as response:
        assert response.status == 200
    async with ask(layercode_api, {"pipeline_id": "a", "session_id": "c"}) as response:
        assert response.status == 200
    assert [asked for _, asked in layercode_api.asked] == [page, {"agent_id": "a", "conversation_id": "c"}]

@pytest.mark.parametrize(("upstream", "status"), [(400, 400), (402, 402), (307, 502), (401, 502), (500, 502)])
async def test_the_page_learns_why_there_is_no_session_but_not_the_key(layercode_api, upstream, status):
    reason = "bad key: ***" if status == upstream else f"Layercode answered {upstream}"
    layercode_api.status, layercode_api.answer = upstream, {"error": "bad\n\u00e9key: API-KEY"}
    async with ask(layercode_api) as response:
        assert (response.status, response.reason) == (status, reason)
        assert "API-KEY" not in await response.text() and "error" in await response.json()

async def test_a_silent_layercode_is_a_504_and_one_that_is_away_a_502(layercode_api, start, monkeypatch, unused_tcp_port):
    monkeypatch.setattr(agent, "AUTHORIZE_PATIENCE", 0.1)
    layercode_api.status = STALL
    async with ask(layercode_api) as response:
        assert response.status == 504
    away = await start(layercode_api.settings | {"LAYERCODE_API_URL": f"http://127.0.0.1:{unused_tcp_port}"})
    async with ask(away) as response:
        assert response.status == 502

async def test_only_the_agent_of_the_settings_and_visitors_that_may_are_authorized(layercode_api, start, monkeypatch):
    settings = {"LAYERCODE_AGENT_ID": "the one", "ALLOWED_ORIGINS": "https://app.example.com"}
    one = await start(layercode_api.settings | settings)
    for agent_id, status in {"the one": 200, "another": 403}.items():
        async with ask(one, {"agent_id": agent_id}, Origin=one.url) as response:  # a page of the agent's own host
            assert response.status == status

    async def nobody(request):
        return False

    monkeypatch.setattr(agent, "may_authorize", nobody)
    async with ask(layercode_api) as response:
        assert response.status == 403
    assert len(layercode_api.asked) == 1

async def test_without_an_api_key_no_browser_is_authorized(start):
    caller = await start()
    async with ask(SimpleNamespace(http=caller.http, url=caller.url)) as response:
        assert (response.status, response.reason) == (400, "LAYERCODE_API_KEY is missing or not a text")

async def test_health_checks_hear_that_it_is_up(caller):
    async with caller.http.get(caller.url + "/") as response:
        assert (response.status, await response.text()) == (200, "The agent is up.\n")

# ---- connections --------------------------------------------------------------------------------------------
async def test_more_than_a_hundred_callers_are_answered_at_once(caller, gemini):
    more = asyncio.Event()
    gemini.scripts = [[more, "Hi."] for _ in range(120)]
    calls = [asyncio.create_task(Layercode(caller.http, caller.url).say("hi")) for _ in range(120)]
    await gemini.until(streams=120)
    more.set()
    assert await asyncio.gather(*calls) == ["Hi."] * 120

async def test_a_call_needs_one_connection_to_gemini_and_the_greeting_opens_it(caller, gemini):
    await caller.send(caller.event("session.start"))
    async with asyncio.timeout(5):
        while not gemini.connections:
            await asyncio.sleep(0)
    for _ in range(5):
        await caller.say("hello")
    assert len(gemini.connections) == 1

# ---- the terminal client ------------------------------------------------------------------------------------
async def test_the_terminal_chat_needs_no_keys_and_shows_the_history():
    process = await run("chat")
    said, wrong = await process.communicate(b"hello\nwhat did I say\n")
    greeting, first, second = said.decode().splitlines()[:3]
    assert (process.returncode, wrong, greeting) == (0, b"", agent.GREETING)
    assert "offline stand-in" in first and "hello" in second

async def test_the_terminal_chat_checks_a_webhook_elsewhere(caller):
    good = await run("chat", caller.url + "/agent", LAYERCODE_WEBHOOK_SECRET=SECRET)
    said, _ = await good.communicate(b"hello\n")
    assert (said.decode().splitlines()[:2], good.returncode) == ([agent.GREETING, "Sure, no problem."], 0)
    wrong = (caller.url + "/agent", "wrong", b"LAYERCODE_WEBHOOK_SECRET"), ("http://127.0.0.1:9/", SECRET, b"connect")
    for url, secret, why in wrong:
        process = await run("chat", url, LAYERCODE_WEBHOOK_SECRET=secret)
        said, wrong = await process.communicate(b"hello\n")
        assert process.returncode == 1 and why in wrong and b"Traceback" not in wrong

async def test_a_line_typed_while_the_agent_speaks_is_a_barge_in(caller, gemini):
    gemini.scripts = [["Once ", *["and again "] * 10_000, STALL]]
    terminal, end = os.openpty()
    process = await run("chat", caller.url + "/agent", stdin=end, LAYERCODE_WEBHOOK_SECRET=SECRET)
    await process.stdout.readline()
    os.write(terminal, b"Tell me a story.\n")
    await process.stdout.readuntil(b"Once ")
    os.write(terminal, b"Stop!\n")
    await process.stdout.readuntil(b"Sure, no problem.")
    os.write(terminal, b"\x04")
    assert await process.wait() == 0
    story = gemini.heard()[3]
    assert story[1].startswith("Once and again") and story[1].endswith("[interrupted]")

async def test_importing_the_agent_does_nothing():
    code = "import sys, agent, threading; assert 'google.genai' not in sys.modules and threading.active_count() == 1"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=HERE, stdout=PIPE, stderr=PIPE)
    assert await process.communicate() == (b"", b"") and process.returncode == 0

# ---- any history ------------------------------------------------------------------------------------------
async def play(caller, gemini, dice):
    """Plays one short history; returns what Gemini should be sent next, by a plain model of what was said and heard."""
    turns, open_responses = [], []  # turns: [user, heard, finished, webhook]
    for _ in range(dice.randrange(1, 7)):
        what = dice.choice(["greeting", "message", "drop", "late drop", "duplicate", "running duplicate", "failure", "silence"])
        fields, said = {"session_id": f"session_{dice.random()}"}, [f"{dice.choice(['So', 'Well'])}{n} " for n in range(3)]
        if turns and dice.random() < 0.4:
            heard = turns[-1][1][: dice.randrange(len(turns[-1][1]) + 1)]
            fields |= report(turns[-1][3], heard)
        event = caller.event("message", text=f"words {dice.random()}", **fields)
        if what == "duplicate":
            if turns and turns[-1][2]:
                assert (await caller.send(turns[-1][3]))[0] == turns[-1][1]
            continue
        if "interruption_context" in fields:
            turns[-1][1:3] = heard, False
        if what == "greeting":
            event = caller.event(dice.choice(["welcome", "session.start"]), **fields)
            turns.append(["", (await caller.send(event))[0], True, event])
        elif what == "silence":
            turns.append(["", (await caller.send(event | {"text": ""}))[0], True, event])
        elif what in ("message", "failure"):
            gemini.scripts = [said + [CUT] * (what == "failure")]
            turns.append([event["text"], (await caller.send(event))[0], True, event])
            assert turns[-1][1] == "".join(said) + (" " + agent.APOLOGY) * (what == "failure")
        else:
            gemini.scripts = [[*said, STALL]]
            response = await caller.post(event)
            turns.append([event["text"], await caller.hear(response, said[-1]), False, event])
            open_responses.append(response)
            if what == "drop":
                response.close()
            if what == "running duplicate":
                turns[-1][1:3] = (await caller.send(event))[0], True
    await caller.say("And now?")
    for response in open_responses:
        response.close()
    wanted = []
    for user, heard, finished, _ in turns:
        wanted.append(("user", user or "(The caller says nothing.)"))
        wanted += [("model", heard + " [interrupted]" * (not finished))] * bool(heard)
    return [*wanted, ("user", "And now?")]

async def test_gemini_is_sent_what_was_said_and_heard_whatever_happened(caller, gemini):
    seed = int(os.environ.get("SEED", time.time()))
    for number in range(2000):
        one = Layercode(caller.http, caller.url)
        wanted = await play(one, gemini, random.Random(seed + number))
        assert gemini.heard() == wanted, f"SEED={seed + number}"

# ---- the benchmark ---------------------------------------------------------------------------------------------------
# The callers and Gemini are this process; ours and the floor have one each, so that they are what there is to wait for.
class QuickGemini(asyncio.Protocol):
    """Gemini at the least cost: answers with 5 chunks of 20 characters, each the time at which it was written."""

    pace = 0.005  # seconds between two chunks; None: no second one

    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        head, _, body = self.data.partition(b"\r\n\r\n")
        if len(body) == int((re.search(rb"(?i)content-length: (\d+)", head) or "00")[1]):
            self.data = b""
            self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.speak(5)

    def speak(self, left):
        frame = chunk(f"{time.perf_counter():019.9f} ", "STOP" if left == 1 else None)
        self.transport.write(b"%x\r\n%s\r\n" % (len(frame), frame) + b"0\r\n\r\n" * (left == 1))
        if left > 1 and self.pace is not None:
            asyncio.get_running_loop().call_later(self.pace, self.speak, left - 1)

def floor():
    """The least that speaks: no signature, no history, no error handling."""
    from google import genai

    config = {"system_instruction": agent.SYSTEM_PROMPT, "automatic_function_calling": {"disable": True}}
    ask = {"model": agent.VARIABLES["GEMINI_MODEL"][0], "config": config}

    async def answer(request):
        event, response = await request.json(), web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for part in await gemini().generate_content_stream(contents=event["text"], **ask):
            frame = {"type": "response.tts", "content": part.text, "turn_id": event["turn_id"]}
            await response.write(f"data: {json.dumps(frame)}\n\n".encode())
        await response.write(f'data: {{"type": "response.end", "turn_id": "{event["turn_id"]}"}}\n\n'.encode())
        return response

    @cache
    def gemini():
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        options = {"aiohttp_client": session, "retry_options": {"attempts": 2}}
        return genai.Client(api_key="key", http_options=options).aio.models

    app = web.Application()
    app.router.add_post("/agent", answer)
    return app

def serve(app):
    """Serves at a port that it prints; /used tells the processor time, and with a query the bytes in use."""

    async def used(request):
        seconds, _ = time.process_time(), request.query and (gc.collect(), tracemalloc.start())
        return web.json_response([seconds, tracemalloc.get_traced_memory()[0]])

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    agent.log.setLevel("INFO")
    app.router.add_get("/used", used)
    sock = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(sock.getsockname()[1], flush=True)
    web.run_app(app, sock=sock, handler_cancellation=True, access_log=None, print=None)

async def talk(port, conversation, turns=1, pause=0, stay=False):
    """A caller's turns: for each chunk, the ms from the webhook, and from Gemini's write, to our frame."""
    (reader, writer), measured = await asyncio.open_connection("127.0.0.1", port), []
    for _ in range(turns):
        await asyncio.sleep(random.uniform(0.2, 1.8) * pause)
        event = {"type": "message", "text": "x" * 100, "turn_id": f"turn_{next(ids)}", "conversation_id": conversation}
        body, delays, line = json.dumps(event).encode(), [], b"-"
        head = f"Host: x\r\nlayercode-signature: {agent.sign(body, SECRET)}\r\nContent-Length: {len(body)}\r\n\r\n"
        asked = time.perf_counter()
        writer.write(b"POST /agent HTTP/1.1\r\n" + head.encode() + body)
        while line not in (b"0\r\n", b"") and not (stay and delays):
            line = await reader.readline()
            if b'"response.tts"' in line:
                now = time.perf_counter()
                delays.append((1000 * (now - asked), 1000 * (now - float(json.loads(line[6:])["content"]))))
        measured += delays
    return writer if stay else writer.close() or measured

def crowd(port, callers, name="", **how):
    return asyncio.gather(*[talk(port, f"{name or next(ids)}-{caller}", **how) for caller in range(callers)])

def seconds_to_start(key):
    """Those of Python to import the libraries, and of agent.py to listen."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    settings, begun = {"GOOGLE_GENERATIVE_AI_API_KEY": key, "HOST": host, "PORT": str(port)}, time.perf_counter()
    subprocess.run([sys.executable, "-c", "import aiohttp.web" + ", google.genai" * bool(key)], check=True)
    imported = time.perf_counter()
    command, quiet = [sys.executable, agent.__file__], subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, env=os.environ | settings) as ours:
        while socket.socket().connect_ex((host, port)):
            time.sleep(0.002)
        listening = time.perf_counter()
        ours.kill()
    return imported - begun, listening - imported

async def benchmark():
    gemini, rows, ports = await asyncio.get_running_loop().create_server(QuickGemini, "127.0.0.1", 0), {}, []
    os.environ["GOOGLE_GENERATIVE_AI_API_KEY"], url = "key", "http://127.0.0.1:" + str(gemini.sockets[0].getsockname()[1])
    os.environ |= {"GOOGLE_GEMINI_BASE_URL": url, "LAYERCODE_WEBHOOK_SECRET": SECRET}

    def row(name, floor, ours):
        rows.setdefault(name, []).append((floor, ours))
        print(f"\r{name:65}{floor:8.3g}{ours:8.3g} ", end="", file=sys.stderr, flush=True)

    async def used(port, query=""):
        async with aiohttp.request("GET", f"http://127.0.0.1:{port}/used{query}") as response:
            return (await response.json())[bool(query)]

    for key in ("", "key") * 3:
        row(f"seconds to start {'with' if key else 'without'} a key (imports only; <= 1.5)", *seconds_to_start(key))
    for role in ("floor", "ours"):
        command = [sys.executable, __file__, role]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        atexit.register(server.kill)
        ports.append(int(server.stdout.readline()))
        await crowd(ports[-1], 50, turns=2)  # to warm up
    for part in range(12):  # two conversations of 30 turns, in parts that take turns
        times = [time.perf_counter()]
        for port in ports:
            await crowd(port, 50, f"long{part // 6}", turns=5)
            times.append(time.perf_counter())
        row("turns/s of 50 callers (>= 0.85)", 250 / (times[1] - times[0]), 250 / (times[2] - times[1]))
    await crowd(ports[1], 50, "long0", turns=10)
    QuickGemini.pace = 0
    for part in range(8):
        first_word, cost = [], []
        for name in (f"fresh{part}", "long0"):
            before = await used(ports[1])
            first_word.append(median([(await talk(ports[1], f"{name}-{caller}"))[0][0] for caller in range(50)]))
            cost.append(1000 / 50 * (await used(ports[1]) - before))
        row("processor ms of a turn after 40 (beside: a first one; <= 1.25)", *cost)
        row("ms to the first word after 40 turns (beside: at first; <= 1.2)", *first_word)
    QuickGemini.pace = 0.05
    for _ in range(4):
        talks = [await crowd(port, 100, turns=2, pause=1) for port in ports]
        cuts = [quantiles((d for turns in side for _, d in turns), n=100) for side in talks]
        row("ms added to a chunk, 100 callers with pauses, p50 (<= 1.2)", cuts[0][49], cuts[1][49])
        row("ms added to a chunk, 100 callers with pauses, p99 (<= 1.5)", cuts[0][98], cuts[1][98])
    sizes = []
    for port in ports:
        QuickGemini.pace, empty = 0, await used(port, "?memory=1")
        await crowd(port, 20, turns=25)
        QuickGemini.pace, talked = None, await used(port, "?memory=1")
        writers = await crowd(port, 200, stay=True)
        sizes.append(((talked - empty) / 500, (await used(port, "?memory=1") - talked) / 200 / 1024))
        del writers  # which hangs up
    row("bytes of a stored turn (<= 1024)", sizes[0][0], sizes[1][0])
    row("KiB of a live stream (<= 100)", sizes[0][1], sizes[1][1])
    print(f"\r{'':85}\r{'':65}{'floor':>8}{'ours':>8}{'ratio':>8}")
    for name, pairs in rows.items():
        ratio = median(ours / floor if floor > 0 else 0 for floor, ours in pairs)
        print(f"{name:65}" + "".join(f"{median(side):8.3g}" for side in zip(*pairs, strict=True)) + f"{ratio:8.2f}")

if __name__ == "__main__":
    make_app = {"floor": floor, "ours": agent.make_app}.get(sys.argv[-1])
    serve(make_app()) if make_app else asyncio.run(benchmark())
