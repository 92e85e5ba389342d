"""The blocks of README.md that no other test runs: the wire in shell, the example of reply(), nginx."""

import asyncio
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

import agent
from test_agent import SECRET, STALL, Layercode

pytestmark = pytest.mark.asyncio
README = Path(agent.__file__).with_name("README.md").read_text()


def block(language, containing):
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
    return next(block for block in blocks if containing in block)


async def test_a_few_lines_of_shell_play_layercode(start):
    caller = await start()
    env = os.environ | {"AGENT": caller.url, "LAYERCODE_WEBHOOK_SECRET": SECRET}
    shell = await asyncio.create_subprocess_exec(
        "bash", "-euc", block("sh", "openssl"), env=env, stdout=asyncio.subprocess.PIPE
    )
    said = (await shell.communicate())[0].decode()
    assert said.endswith("\n\n") and said in README


async def test_the_example_of_reply_speaks_and_sends_an_event(start):
    names = {}
    exec(block("python", 'yield "You said: "'), names)
    caller = await start(reply=names["reply"])
    words, frames = await caller.send(caller.event("message", text="hello"))
    assert words == "You said: hello"
    assert frames[2]["content"] == {"turns": 1}


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
async def test_barge_in_works_through_nginx(caller, gemini, tmp_path, unused_tcp_port_factory):
    port = unused_tcp_port_factory()
    location = block("nginx", "location / {").replace("http://127.0.0.1:3000", caller.url)
    upstream, directives = block("nginx", "upstream agents").splitlines()
    directives = directives.partition("location: ")[2].replace("http://agents", caller.url)
    location = location.replace("}", re.sub(r"proxy_(pass|buffering) \S+;", "", directives) + "}")
    server = f"{upstream} server {{ listen 127.0.0.1:{port}; {location} }}"
    config = f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {server} }}"
    (tmp_path / "nginx.conf").write_text(config)
    nginx = await asyncio.create_subprocess_exec("nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf")
    try:
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        writer.close()
        through = Layercode(caller.http, f"http://127.0.0.1:{port}")
        gemini.scripts = [["Once upon ", STALL]]
        await through.barge_in("Tell me a story.", after="Once upon ")
        await gemini.until(streams=0)
    finally:
        nginx.terminate()
        await nginx.wait()


async def test_failed_in_the_log_means_that_the_caller_heard_the_apology_and_not_that_they_hung_up(start, caplog):
    async def reply(event, history):
        yield "Well, "
        with contextlib.suppress(asyncio.CancelledError):  # so that the next words meet a closed connection
            await asyncio.Event().wait()
        over.set()
        yield "are you there?"

    over, caller = asyncio.Event(), await start(reply=reply)
    caplog.set_level("INFO")
    await caller.barge_in("Hi", after="Well, ")
    async with asyncio.timeout(5):
        await over.wait()
        while "interrupted" not in caplog.text:
            await asyncio.sleep(0)
    assert "failed" not in caplog.text and "Error" not in caplog.text


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
async def test_the_log_in_recipe_sends_the_token_with_what_the_sdk_would_send():
    stand_in = """const agentId = "a", sent = [];
        globalThis.fetch = async (...call) => (sent.push(call), { text: async () => "TOKEN" });
        class LayercodeClient { constructor(options) { options.authorizeSessionRequest({url: "URL", body: {agent_id: "a"}}) } }
        BLOCK setImmediate(() => console.log(JSON.stringify(sent)))"""
    script = stand_in.replace("BLOCK", block("js", "authorizeSessionRequest"))
    node = await asyncio.create_subprocess_exec("node", "-e", script, stdout=asyncio.subprocess.PIPE)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer TOKEN"}
    call = {"method": "POST", "body": '{"agent_id":"a"}', "headers": headers}
    assert json.loads((await node.communicate())[0]) == [["/voice-token"], ["URL", call]]
