"""The tests: the real agent over real HTTP, Layercode's part played with real signatures, against a small Gemini.

    python -m pytest test_agent.py     the tests
    python test_agent.py               the benchmark
"""

import asyncio
import json
import os
from itertools import count

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

import agent

pytestmark = pytest.mark.asyncio
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
    async with aiohttp.ClientSession() as http:

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
    assert greeting == agent.GREETING
