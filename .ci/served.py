"""What the measurements share: a Gemini that tells the time, callers, and an agent."""

import asyncio
import contextlib
import hmac
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import NamedTemporaryFile, TemporaryDirectory

ROOT = Path(__file__).parent.parent
SECRET = "a webhook secret"
# Seconds that a caller waits for an answer.
PATIENCE = 30.0


def free_port() -> int:
    """A port that nobody listens on, below those of outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass(frozen=True)
class Answer:
    """What Gemini does when it is asked. A {} in a chunk is the time of its sending."""

    chunks: tuple[str, ...] = ("Now at {:f}, ", "now at {:f}.")
    # Without a reason, the stream stays open.
    finish: str = "STOP"
    # Seconds to the first chunk, and between two.
    after: float = 0
    pace: float = 0
    # With 0, the connection is reset in place of the first chunk.
    status: int = 200

    async def write(self, writer: StreamWriter) -> None:
        """Writes it, as Gemini does."""
        writer.write(b"HTTP/1.1 %d -\r\n" % (self.status or 200))
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        if not self.status:
            writer.transport.abort()
        for number, words in enumerate(self.chunks, 1):
            await asyncio.sleep(self.after if number == 1 else self.pace)
            parts = [{"text": words.format(time.perf_counter())}]
            candidate: dict[str, object] = {"content": {"parts": parts}}
            if number == len(self.chunks) and self.finish:
                candidate["finishReason"] = self.finish
            data = f"data: {json.dumps({'candidates': [candidate]})}\r\n\r\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await asyncio.sleep(0 if self.finish else 60)
        writer.write(b"0\r\n\r\n")


async def start_gemini(plan: Callable[[str], Answer]) -> str:
    """Serves a Gemini that answers a caller's words as planned; returns its URL."""

    async def take(reader: StreamReader, writer: StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if length is None:
                    # The agent looks the model up, which is how it connects.
                    writer.write(b"HTTP/1.1 200 -\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                body = json.loads(await reader.readexactly(int(length[1])))
                words = body["contents"][-1]["parts"][-1]["text"]
                await plan(words).write(writer)
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, backlog=4096)
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@dataclass
class Heard:
    """What a caller hears of an answer."""

    # Seconds since the webhook.
    first_word: float = PATIENCE
    # Seconds of each chunk since Gemini has sent it. An apology has none.
    delays: list[float] = field(default_factory=list)
    is_whole: bool = False


@dataclass
class Caller:
    """A caller in one conversation, with a connection of their own."""

    port: int
    conversation: str

    async def connect(self) -> None:
        """Opens the connection."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, text: str) -> Heard:
        """Says something, as Layercode would, and listens until the answer is over."""
        event = {"type": "message", "text": text, "turn_id": str(time.time_ns())}
        body = json.dumps({**event, "conversation_id": self.conversation}).encode()
        now = str(int(time.time()))
        signed = now.encode() + b"." + body
        signature = hmac.new(SECRET.encode(), signed, "sha256").hexdigest()
        head = f"POST /agent HTTP/1.1\r\nHost: agent\r\nContent-Length: {len(body)}\r\n"
        head += f"layercode-signature: t={now},v1={signature}\r\n\r\n"
        heard = Heard()
        begun = time.perf_counter()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                self.writer.write(head.encode() + body)
                async for line in self.reader:
                    when = time.perf_counter()
                    if b'"response.tts"' in line:
                        heard.first_word = min(heard.first_word, when - begun)
                    for sent in re.findall(rb"at (\d+\.\d+)", line):
                        heard.delays.append(when - float(sent))
                    if b'"response.end"' in line:
                        heard.is_whole = True
                        break
        return heard


# By the agent's main(), as a user serves it.
SERVE = "import agent; agent.main()"
# Has the process answer Served.tell().
TELL = """
import asyncio, gc, signal, tracemalloc
def tell(*_):
    gc.collect()
    tracemalloc.start()
    print(len(asyncio.all_tasks()), tracemalloc.get_traced_memory()[0], flush=True)
signal.signal(signal.SIGUSR1, tell)
"""


@dataclass
class Served:
    """A process that serves."""

    process: Popen[bytes]
    port: int
    url: str
    log: Path

    def tell(self) -> tuple[int, int]:
        """Its tasks, and the bytes in use, counted from the first time on."""
        self.process.send_signal(signal.SIGUSR1)
        told = self.wait_for(r"^(\d+) (\d+)$")
        return int(told[1]), int(told[2])

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until it prints something."""
        for line in self.process.stdout or ():
            if found := re.search(pattern, line.decode()):
                return found
        raise EOFError(self.log.read_text())


@contextlib.contextmanager
def running(*command: str, up: str, folder: str = ".", **env: str) -> Iterator[Served]:
    """Runs a program, from when it says that it is up, at a free port or env's PORT."""
    port = env.setdefault("PORT", str(free_port()))
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
    with NamedTemporaryFile() as log:
        process = Popen(command, cwd=folder, stdout=PIPE, stderr=log, env=env)
        try:
            url = f"http://127.0.0.1:{port}"
            one = Served(process, int(port), url, Path(log.name))
            one.wait_for(up)
            yield one
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def served(
    which: str, gemini: str, code: str = SERVE, **settings: str
) -> Iterator[Served]:
    """Runs code beside an agent.py, which is a file or that of a git revision."""
    command = ["git", "show", f"{which}:agent.py"]
    if (ROOT / which).is_file():
        command = ["cat", which]
    given = {"HOST": "127.0.0.1", "LAYERCODE_WEBHOOK_SECRET": SECRET}
    given |= {"GOOGLE_GENERATIVE_AI_API_KEY": "key", "GOOGLE_GEMINI_BASE_URL": gemini}
    program = (sys.executable, "-c", TELL + code)
    with TemporaryDirectory() as folder:
        with Path(folder, "agent.py").open("wb") as file:
            subprocess.run(command, cwd=ROOT, stdout=file, check=True)
        with running(
            *program, up="Up|Running on", folder=folder, **given | settings
        ) as one:
            yield one


def show(name: str, *cells: object) -> None:
    """Prints a row of a table."""
    print(f"{name:34}" + "".join(f"{cell!s:>11}" for cell in cells), flush=True)
