"""What README.md and .env.example say, where no other test runs it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import recipes
from ports import listens

import agent
from agent import Agent, Event, Settings, Speech, Turn, sign
from test_agent import SECRET, Gemini, Layercode, Stall, Start, Status

pytestmark = pytest.mark.asyncio

HERE = Path(agent.__file__).parent
README = (HERE / "README.md").read_text("utf-8")
WITHOUT_GEMINI = Settings(layercode_webhook_secret=SECRET)


def blocks(language: str) -> list[str]:
    """The blocks of README.md in this language; "" has what is in none."""
    return [
        source
        for name, source in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)
        if name == language
    ]


def block(language: str, containing: str) -> str:
    """The block in this language that contains this text."""
    [found] = [one for one in blocks(language) if containing in one]
    return found


def table(heading: str) -> list[list[str]]:
    """The rows of the table that has this heading."""
    lines = README.partition(f"| {heading} |")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


async def shell(script: str, **settings: str) -> str:
    """What a script prints."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", script), stdout=PIPE, env={**os.environ, **settings}
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


# ---- The first screen ----------------------------------------------------------------


async def test_the_first_agent_greets_in_the_terminal(tmp_path: Path) -> None:
    first = blocks("python")[0]
    assert class_of(first) == class_of(recipes.block("pizza.py"))
    (tmp_path / "pizza.py").write_text(first, "utf-8")
    shutil.copy(agent.__file__, tmp_path)
    script = f"cd {tmp_path} && {sys.executable} pizza.py chat </dev/null"
    assert await shell(script) == "Luigi's Pizza! What can I get you?\n"


def class_of(source: str) -> str:
    """The class in a file, without regard to how the rest is written."""
    [one] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return ast.unparse(one)


async def test_the_first_command_asks_for_a_newer_python_in_one_line() -> None:
    check = blocks("sh")[0].partition("&&")[0]
    assert await shell(check) == ""
    older = check.replace("(3, 11)", "(4, 0)")
    assert older != check
    process = await asyncio.create_subprocess_exec("bash", "-c", older, stderr=PIPE)
    _, told = await process.communicate()
    assert (process.returncode, told) == (1, b"Python 3.11 or later is needed.\n")


async def test_what_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (HERE / target).is_file(), target
    for file in re.findall(r"python (\.ci/\w+\.py)", README):
        assert (HERE / file).is_file(), file


# ---- Settings ------------------------------------------------------------------------


def default(name: str) -> str:
    """A setting's default as text."""
    [one] = [one for one in fields(Settings) if one.name.upper() == name]
    assert one.default is not MISSING
    return str(one.default)


async def test_the_table_of_settings_has_them_all_with_their_defaults() -> None:
    rows = table("setting | default")
    names = [name.strip("`") for name, _ in rows]
    assert names == [one.name.upper() for one in fields(Settings)]
    for name, told in zip(names, [told for _, told in rows], strict=True):
        if name == "ALLOWED_ORIGINS":
            hosts = ("localhost", "127.0.0.1", "[::1]")
            assert default(name) == ",".join(f"*://{h},*://{h}:*" for h in hosts)
            assert told.startswith("Pages on `localhost`, `127.0.0.1` and `[::1]`")
        elif default(name):
            assert told == f"`{default(name)}`"
        else:
            assert told.startswith("None: ")


async def test_the_example_of_a_dotenv_has_every_setting_and_says_its_default() -> None:
    example = (HERE / ".env.example").read_text("utf-8")
    entries = re.findall(r"(?m)((?:^#.*\n)+)^(\w+)=$", example)
    assert [name for _, name in entries] == [
        one.name.upper() for one in fields(Settings)
    ]
    for comment, name in entries:
        if default(name) and name != "ALLOWED_ORIGINS":
            assert f"Default: {default(name)}" in comment
    assert set(agent.read_dotenv(HERE / ".env.example").values()) == {""}


async def test_a_dotenv_is_read_as_the_example_says(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text('# A comment\nA="it\'s # here"\nB=\'a "quote"\'\nC=plain # not\n')
    assert agent.read_dotenv(file) == {
        "A": "it's # here",
        "B": 'a "quote"',
        "C": "plain",
    }


async def test_the_limits_are_those_that_readme_names() -> None:
    assert f"the last {agent.MAX_TURNS} turns" in README
    assert f"the last {agent.MAX_CONVERSATIONS:,} conversations" in README
    assert f"its last {agent.MAX_TURNS} turns" in README
    assert f"no word within {agent.ASK_AGAIN_AFTER} seconds" in README
    assert f"Gemini said nothing for {agent.PATIENCE:g} seconds" in README
    assert f"nothing comes for {agent.PATIENCE:g} seconds" in README
    ends = "body takes more than {:g} seconds, or whose head takes more than {:g}."
    keeps_alive = agent.RUNNER_OPTIONS["keepalive_timeout"]
    assert ends.format(agent.BODY_PATIENCE, keeps_alive) in README
    assert (agent.GRACE, "for up to five seconds" in README) == (5, True)
    assert (agent.MAX_BODY, "over 1 MiB" in README) == (2**20, True)
    assert (agent.TOLERANCE, "more than five minutes" in README) == (300, True)


# ---- Endpoints -----------------------------------------------------------------------


async def test_the_table_of_endpoints_has_them_all() -> None:
    told = set()
    for cell, _ in table("endpoint | what it does"):
        method, _, paths = cell.replace("`", "").partition(" ")
        told |= {(method, path) for path in paths.split(", ")}
    routes = Agent(WITHOUT_GEMINI).make_app().router.routes()
    served = {(one.method, one.resource.canonical) for one in routes if one.resource}
    # Preflights and HEAD go without saying.
    assert {one for one in served if one[0] in ("GET", "POST")} == told


async def test_a_webhook_is_refused_as_the_table_of_endpoints_says(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "BODY_PATIENCE", 0.2)
    caller = await start(Agent(WITHOUT_GEMINI))
    no_secret = await start(Agent(Settings(layercode_webhook_secret="")))
    seen = {}

    async def stall() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def refused(request: Layercode, **more: object) -> None:
        url = request.url + "/agent"
        async with request.http.post(url, **more) as response:
            assert isinstance((await response.json())["error"], str)
            seen[response.status] = response.reason

    body = b"not JSON"
    signed = {"layercode-signature": sign(body, SECRET)}
    await refused(caller, data=body, headers=signed)
    await refused(caller, data=body)
    await refused(caller, data=stall())
    await refused(caller, data=bytes(agent.MAX_BODY + 1))
    await refused(caller, data=body, headers={"Content-Encoding": "gzip"})
    await refused(caller, data=body, headers={"Origin": "https://evil.example"})
    await refused(no_secret, data=body)
    [told] = [
        text for cell, text in table("endpoint | what it does") if "/agent" in cell
    ]
    assert sorted(seen) == [int(code) for code in re.findall(r"\b\d{3}\b", told)]


# ---- On the wire ---------------------------------------------------------------------


async def test_a_few_lines_of_shell_play_layercode(start: Start) -> None:
    caller = await start(Agent(WITHOUT_GEMINI))
    script = block("sh", "openssl")
    said = await shell(script, AGENT=caller.url, LAYERCODE_WEBHOOK_SECRET=SECRET)
    assert said.endswith("\n\n")
    assert said in block("", "POST /agent HTTP/1.1")


async def test_what_goes_over_the_wire_is_what_readme_shows(start: Start) -> None:
    shown = block("", "POST /agent HTTP/1.1")
    request, _, answer = shown.partition("\n\nHTTP/1.1 ")
    head, _, body = request.partition("\n\n")
    told = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    stamp = told["layercode-signature"].partition(",")[0].removeprefix("t=")
    assert told["layercode-signature"] == sign(body.encode(), "secret", stamp)
    assert int(told["Content-Length"]) == len(body)
    caller = await start(Agent(WITHOUT_GEMINI))
    async with caller.post(body=body.encode()) as response:
        names = [name.decode() for name, _ in response.raw_headers]
        status = f"{response.status} {response.reason}"
    shown_head = answer.partition("\n\n")[0].splitlines()
    assert shown_head[0] == status
    assert [line.partition(":")[0] for line in shown_head[1:]] == names


# ---- The log -------------------------------------------------------------------------


async def test_the_log_line_is_the_one_that_readme_explains(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await caller.say("Hello")
    record = caplog.records[-1]
    line = logging.Formatter(agent.LOG_FORMAT).format(record)
    shown = block("", "first_word=").strip()
    pattern = re.sub(r"\d+", r"\\d+", re.escape(shown))
    pattern = re.sub(r"'[ct]\\d\+'", r"'\\w+'", pattern)
    assert re.fullmatch(pattern, line), (pattern, line)


async def test_the_log_says_how_each_turn_went_in_the_words_of_readme(
    caller: Layercode, gemini: Gemini, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    event = caller.event("message", text="Hello")
    await caller.send(event)
    await caller.send(event)
    gemini.scripts = [["Well, ", Stall()]]
    await caller.barge_in("Hello?", after="Well, ")
    await gemini.until(streams=0)
    gemini.scripts = [[Status(503)], ["Sure."]]
    await caller.say("Again")
    gemini.scripts = [[Status(403)]]
    await caller.say("And again")
    outcomes = re.findall(r"turn='\w+' (\w.*?):? first_word", caplog.text)
    explained = README.partition("### Reading the log")[2].partition("\n## ")[0]
    for outcome in outcomes:
        name = re.sub(r": .*", ": ...", outcome)
        assert f"`{name}`" in explained, outcome
    assert len(set(outcomes)) == 4
    assert "(asked twice: " in caplog.text
    assert "`(asked twice: ...)`" in explained


async def test_a_caller_who_hangs_up_is_no_failure_in_the_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    over = asyncio.Event()

    class Stubborn(Agent):
        async def reply(self, event: Event, history: list[Turn]) -> Speech:
            yield "Well, "
            # So that the next words meet a closed connection.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            over.set()
            yield "are you there?"

    caller = await start(Stubborn(WITHOUT_GEMINI))
    caplog.set_level(logging.INFO)
    await caller.barge_in("Hi", after="Well, ")
    async with asyncio.timeout(5):
        await over.wait()
        while "interrupted" not in caplog.text:
            await asyncio.sleep(0.01)
    assert "failed" not in caplog.text
    assert "Error" not in caplog.text


# ---- Running it for real -------------------------------------------------------------


@asynccontextmanager
async def nginx(folder: Path, agent_url: str, port: int) -> AsyncIterator[str]:
    """README.md's nginx in front of the agent at this URL, with shorter patience."""
    server = block("nginx", "client_header_timeout")
    assert server.count("http://127.0.0.1:3000") == 1
    server = server.replace("http://127.0.0.1:3000", agent_url)
    assert server.count("timeout 10s;") == 2
    server = server.replace("timeout 10s;", "timeout 1s;")
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; server {{ listen 127.0.0.1:{port};\n{server} }} }}"
    )
    process = await asyncio.create_subprocess_exec("nginx", "-p", folder, "-c", config)
    try:
        async with asyncio.timeout(10):
            while not await listens(port):
                assert process.returncode is None
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")


@needs_nginx
async def test_barge_in_works_through_nginx_and_words_come_at_once(
    caller: Layercode, gemini: Gemini, tmp_path: Path, unused_tcp_port: int
) -> None:
    async with nginx(tmp_path, caller.url, unused_tcp_port) as url:
        through = Layercode(caller.http, url)
        gemini.scripts = [["Once upon ", Stall()]]
        # That it hears them at all shows that nginx does not hold them back.
        await through.barge_in("Tell me a story.", after="Once upon ")
        await gemini.until(streams=0)


@needs_nginx
@pytest.mark.parametrize(
    "sent",
    [
        b"POST /agent HTTP/1.1\r\nHost: x\r\n",
        b"POST /agent HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /agent HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n",
    ],
    ids=["a head without end", "a body without end", "a body that is too large"],
)
async def test_nginx_keeps_from_the_agent_what_does_not_end(
    sent: bytes, start: Start, tmp_path: Path, unused_tcp_port: int
) -> None:
    heard = []

    class Listener(Agent):
        async def notice(self, event: Event) -> Event | None:
            heard.append(event)
            return None

    caller = await start(Listener(WITHOUT_GEMINI))
    async with nginx(tmp_path, caller.url, unused_tcp_port):
        reader, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
        writer.write(sent)
        async with asyncio.timeout(5):
            answer = await reader.read(1000)
        writer.close()
    too_large = b"1048577" in sent
    assert answer.startswith(b"HTTP/1.1 413") if too_large else b"200" not in answer
    # The agent's own answers are JSON.
    assert b'"error"' not in answer
    assert not heard


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
async def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "agent.service"
    text = block("ini", "LimitNOFILE")
    command = "/srv/agent/.venv/bin/python agent.py"
    assert f"ExecStart={command}\n" in text
    unit.write_text(text.replace(command, f"{sys.executable} agent.py"))
    assert "WorkingDirectory=/srv/agent\n" in text
    process = await asyncio.create_subprocess_exec(
        *("systemd-analyze", "verify", unit), stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(60):
        _, told = await process.communicate()
    assert "agent.service" not in told.decode()


async def test_a_container_listens_where_its_port_is_published(tmp_path: Path) -> None:
    [run] = [
        line
        for line in block("sh", "docker build").splitlines()
        if line.startswith("docker run ")
    ]
    assert "--env-file .env " in run
    # As Docker reads it: the .env, and then each -e.
    given = {}
    for line in (HERE / ".env.example").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            given[name] = value
    given |= dict(re.findall(r"-e (\w+)=(\S+)", run))
    dockerfile = block("dockerfile", "FROM")
    command = json.loads(dockerfile.partition("CMD ")[2])
    copied = tmp_path / "image"
    copied.mkdir()
    assert "COPY requirements.txt *.py ./\n" in dockerfile
    shutil.copy(agent.__file__, copied)
    script = "import agent; s = agent.Settings.load(); print(s.host, s.port)"
    listens = await shell(f"cd {copied} && {sys.executable} -c '{script}'", **given)
    [published] = re.findall(r"-p 127\.0\.0\.1:3000:(\d+)", run)
    assert listens.split() == ["0.0.0.0", published]
    assert command == ["python", "agent.py"]


async def test_the_options_of_a_runner_are_those_that_readme_explains() -> None:
    explained = README.partition("<summary>A runner of your own</summary>")[2]
    explained = explained.partition("</details>")[0]
    assert "`**agent.RUNNER_OPTIONS`" in explained
    assert agent.RUNNER_OPTIONS["handler_cancellation"] is True
    assert "`handler_cancellation`" in explained
    assert agent.RUNNER_OPTIONS["auto_decompress"] is False
    assert "`auto_decompress=False`" in explained
