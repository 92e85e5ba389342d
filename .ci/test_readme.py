"""What README.md and .env.example say, held against the agent.

    python -m pytest -p test_agent .ci/test_readme.py

What it needs and does not find fails: nginx, openssl, curl, mypy, and node with the
path of Layercode's SDK's dist/esm/index.js in LAYERCODE_NODE_SDK.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from asyncio.subprocess import PIPE
from dataclasses import fields
from pathlib import Path
from typing import Any

import recipes
from served import free_port
from test_recipes import barge_in

import agent
from agent import Agent, Settings, sign, verify
from test_agent import SECRET, SETTINGS, Caller, Serve, forever

HERE = recipes.README.parent
README = recipes.README.read_text("utf-8")
EXAMPLE = (HERE / ".env.example").read_text("utf-8")
NAMES = [one.name.upper() for one in fields(Settings)]


async def shell(script: str, **settings: str) -> str:
    """What a script prints."""
    how: Any = {"stdout": PIPE, "env": {**os.environ, **settings}}
    bash = await asyncio.create_subprocess_exec("bash", "-euc", script, **how)
    printed, _ = await bash.communicate()
    assert bash.returncode == 0, printed
    return printed.decode()


def listens(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def test_what_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert README.count(f'<a id="{target[1:]}"></a>\n<details>') == 1, target
        elif not target.startswith("http"):
            assert (HERE / target).is_file(), target


async def test_each_recipe_is_typed(tmp_path: Path) -> None:
    names = re.findall(r'(?m)^"""(\w+\.py): ', README)
    for name in names:
        recipes.save(name, tmp_path)
    assert len(names) == 8
    await shell(f"cd {tmp_path} && {sys.executable} -m mypy --strict {' '.join(names)}")


async def test_the_example_of_a_dotenv_has_every_setting_and_says_its_default() -> None:
    entries = re.findall(r"(?m)((?:^#.*\n)+)^(\w+)=$", EXAMPLE)
    assert [name for _, name in entries] == NAMES
    for (comment, name), one in zip(entries, fields(Settings), strict=True):
        if one.default and name != "ALLOWED_ORIGINS":
            assert f"Default: {one.default}" in comment
    assert not any(agent.read_dotenv(HERE / ".env.example").values())


async def test_readme_names_the_limits_that_there_are() -> None:
    five = {5: "five"}
    readme = " ".join(README.split())
    for words in (
        f"says nothing for {Agent.ask_again_after} seconds (`ask_again_after`)",
        f"nothing comes for {Agent.patience:g} seconds (`patience`)",
        f"Gemini said nothing for {Agent.patience:g} seconds",
        f'the `filler`, "{Agent.filler}"',
        f"have run for {agent.FILLER_AFTER} seconds",
        f"the last {agent.MAX_TURNS} turns",
        f"the last {agent.MAX_CONVERSATIONS:,} conversations",
        f"to arrive within {agent.BODY_PATIENCE:g} seconds",
        f"has {agent.NOTICE_PATIENCE:g} seconds",
        f"either has {five[int(agent.TOOL_PATIENCE)]} seconds",
        f"After {five[agent.MAX_ROUNDS]} rounds",
        f"for up to {five[int(agent.GRACE)]} seconds",
        "has at most 1 MiB",
        f"at most {agent.MAX_PAGE / 2**10:g} KiB",
    ):
        assert words in readme, words


async def test_the_table_of_endpoints_has_them_all() -> None:
    told = set()
    for method, paths in re.findall(r"(?m)^\| `(GET|POST) ([^|]*)` \|", README):
        told |= {(method, path) for path in paths.split("`, `")}
    routes = Agent(SETTINGS).make_app().router.routes()
    served = {(one.method, one.resource.canonical) for one in routes if one.resource}
    # Preflights and HEAD go without saying.
    assert {one for one in served if one[0] in ("GET", "POST")} == told


async def test_what_is_said_in_the_terminal_is_what_readme_says(tmp_path: Path) -> None:
    recipes.save("pizzeria.py", tmp_path)
    chats = re.findall(r"`\.venv/bin/python (pizz\w+\.py chat.*?)`", README)
    greetings = ["Luigi's Pizza! What can I get you?", "Hi Ada! What can I get you?"]
    for command, greeting in zip(chats, greetings, strict=True):
        said = await shell(f"cd {tmp_path} && {sys.executable} {command} </dev/null")
        assert f"\n{greeting}\n" in said


async def test_a_few_lines_of_shell_play_layercode(
    serve: Serve, tmp_path: Path
) -> None:
    script = recipes.blocks("sh")[-1]
    [data] = re.findall(r"`(\{\"type\": \"data\".*?)`", README)
    pizzeria = recipes.load("pizzeria.py", tmp_path).Pizzeria(SETTINGS)
    settings = {"LAYERCODE_WEBHOOK_SECRET": SECRET}
    settings["AGENT"] = (await serve(Agent(SETTINGS))).url
    said = await shell(script, **settings)
    assert said.count("data: ") == 2
    for frame in said.split("\n\n")[:-1]:
        assert f"`{frame}`" in README
    settings["AGENT"] = (await serve(pizzeria)).url
    told = await shell(re.sub("body='.*'", f"body='{data}'", script), **settings)
    assert json.loads(told)["content"] == {"price": 11}


async def test_the_log_says_how_each_turn_went_in_the_words_of_readme(
    caller: Caller,
) -> None:
    caller = caller.another()
    caller.gemini.scripts = [["Hi."], ["Well, ", forever]]
    await caller.say("Hello")
    await barge_in(caller, "Hello?", after="Well, ")
    caller.gemini.scripts = [[""], [""]]
    await caller.say("Hello?")
    lines = [line for line in caller.log() if "first_word" in line]
    for line, outcome in zip(lines, ("spoken", "interrupted", "failed"), strict=True):
        assert re.search(rf" {outcome}[ :]", line)
        assert re.search(rf"`{outcome}(: \.\.\.)?`: ", README)
    [shown] = re.findall(r"`[\d-]+ [\d:,]+ INFO (conversation=.*?)`", README)
    shape, expected = [re.sub(r"'\w+'|\d+", "", line) for line in (lines[0], shown)]
    assert shape == expected


async def test_words_and_interruptions_go_through_nginx_at_once(
    caller: Caller, tmp_path: Path
) -> None:
    [block] = recipes.blocks("nginx")
    assert block.count("http://127.0.0.1:3000;") == 1
    port = free_port()
    block = block.replace("http://127.0.0.1:3000", caller.url)
    server = f"listen 127.0.0.1:{port}; {block}"
    config = f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} "
    config += f"http {{ access_log off; server {{ {server} }} }}"
    (tmp_path / "nginx.conf").write_text(config)
    words = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf"]
    process = await asyncio.create_subprocess_exec(*words)
    try:
        async with asyncio.timeout(20):
            while not listens(port):
                await asyncio.sleep(0.05)
        caller.url = f"http://127.0.0.1:{port}"
        caller.gemini.scripts = [["Once upon ", forever]]
        # That it is heard at all shows that nginx does not hold it back.
        await barge_in(caller, "A story!", after="Once upon ")
        for size, status in ((2**20, 400), (2**20 + 1, 413)):
            assert (await caller.status(bytes(size)))[0] == status
    finally:
        process.terminate()
        await process.wait()


async def test_the_unit_and_the_container_start_the_agent(tmp_path: Path) -> None:
    [unit], [dockerfile] = recipes.blocks("ini"), recipes.blocks("dockerfile")
    assert "WorkingDirectory=/srv/agent\n" in unit
    assert "ExecStart=/srv/agent/.venv/bin/python agent.py\n" in unit
    assert "COPY requirements.txt *.py *.html ./\n" in dockerfile
    assert 'CMD ["python", "agent.py"]' in dockerfile
    [run] = re.findall(r"`(docker run .*? --env-file \.env .*?)`", README)
    # As Docker reads them: the .env, and then each -e.
    given = dict(re.findall(r"(?m)^(\w+)=(.*)$", EXAMPLE))
    given |= dict(re.findall(r"-e (\w+)=(\S+)", run))
    shutil.copy(agent.__file__, tmp_path)
    script = "import agent; s = agent.Settings.load(); print(s.host, s.port)"
    where = await shell(f"cd {tmp_path} && {sys.executable} -c '{script}'", **given)
    [published] = re.findall(r"-p 127\.0\.0\.1:3000:(\d+)", run)
    assert where.split() == ["0.0.0.0", published]


BODY = '{"a": "b"}'
NODE = """
    const { verifySignature } = await import(process.argv[1]);
    const [payload, secret, signatures] = JSON.parse(process.argv[2]);
    const verify = (signature) => verifySignature({ payload, signature, secret });
    console.log(JSON.stringify(signatures.map(verify)));
"""
AGES = (-400, -310, -290, 0, 290, 310, 10**9)


def test_verify_agrees_with_layercodes_node_sdk() -> None:
    now = str(int(time.time()))
    right = sign(BODY.encode(), SECRET, now)
    v1 = right.partition("v1=")[2]
    # What Layercode could send, and what somebody could who does not know the secret.
    alike = [
        *[sign(BODY.encode(), SECRET, str(int(now) - age)) for age in AGES],
        *(sign(b'{"a":"b"}', SECRET, now), sign(BODY.encode(), "another", now)),
        *(right.upper(), right.replace(v1, v1.upper()), right + "0", right[:-1]),
        *(right + ",v0=aa", "", "t=1", f"t={now}, v1={v1}", f"t={now},v0={v1}"),
        *(f"t={now}.0,v1={v1}", f"t=+{now},v1={v1}", f"t={'9' * 5000},v1={v1}"),
        *(f"t={now};v1={v1}", f"T={now},v1={v1}", f"t={now},v1="),
    ]
    # A secret that is being rotated, a newer scheme, another order.
    only_ours = [f"t={now},v1=00,v1={v1}", f"t={now},v0=a,v1={v1}", f"v1={v1},t={now}"]
    # It looks for the signature anywhere in the header.
    only_theirs = ["x" + right, right + "zz", right + ";v1=0"]
    given = [*alike, *only_ours, *only_theirs]
    node = ["node", "--input-type=module", "-e", NODE, os.environ["LAYERCODE_NODE_SDK"]]
    printed = subprocess.check_output([*node, json.dumps([BODY, SECRET, given])])
    theirs = dict(zip(given, json.loads(printed), strict=True))
    ours = {one: verify(one, BODY.encode(), SECRET) for one in given}
    assert ours[right]
    assert [one for one in given if ours[one] and not theirs[one]] == only_ours
    assert [one for one in given if theirs[one] and not ours[one]] == only_theirs
