"""Measures what strangers cost callers: 20 of them take turns beside the uninvited.

    python .ci/strangers.py                       everything, in four minutes
    python .ci/strangers.py bombs one-byte-16     only these strangers
    python .ci/strangers.py --agent WHICH         another edition: a file, or a revision

All strangers are unsigned, in a process of their own, the least important to all.
Linux only. Exits with status 1 if a first word takes longer than is promised.
"""

import argparse
import asyncio
import contextlib
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from served import Answer, Caller, Served, served, show, start_gemini

# Milliseconds to the first word that are promised beside all of them.
PROMISE = 250
CALLERS = 20
MIB = 2**20


@dataclass(frozen=True)
class Stranger:
    """What one sends; then, one waits for an answer, or until the agent hangs up."""

    first: bytes = b""
    leaves: bool = False
    # Sent until the agent hangs up, as fast as it is taken, but with a pause.
    more: bytes = b""
    pause: float = 0

    async def come(self, port: int) -> None:
        """Connects, sends, and waits."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(self.first)
            while self.more:
                writer.write(self.more)
                await writer.drain()
                await asyncio.sleep(self.pause)
            await reader.read(MIB if self.leaves else -1)
        finally:
            writer.transport.abort()


def post(path: str, body: bytes, head: str = "", missing: int = 0) -> bytes:
    """A POST request, of which the last bytes are missing."""
    head = head or f"Content-Length: {len(body) + missing}"
    return f"POST {path} HTTP/1.1\r\nHost: agent\r\n{head}\r\n\r\n".encode() + body


def bomb() -> bytes:
    """1 MB of gzip that inflates to 1 GB."""
    gzip = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    header = gzip.compress(b"") + gzip.flush(zlib.Z_FULL_FLUSH)
    zeros = gzip.compress(bytes(MIB)) + gzip.flush(zlib.Z_FULL_FLUSH)
    head = f"Content-Encoding: gzip\r\nContent-Length: {len(header + zeros * 1000)}"
    return post("/agent", header + zeros * 1000, head)


BOMB = Stranger(bomb(), leaves=True)
ENDLESS = Stranger(post("/agent", bytes(MIB), missing=100))
CHUNKED = post("/agent", b"", "Transfer-Encoding: chunked")
SINGLE_BYTES = Stranger(CHUNKED, more=b"1\r\nx\r\n" * 10_000)
BODIES = Stranger(more=post("/agent", bytes(10**6)))
# Asks for a session, which Layercode's API does not give.
PAGE = Stranger(post("/authorize", b'{"agent_id": "me"}'), leaves=True)
# 100 webhooks without a signature in a second.
REFUSED = Stranger(more=post("/agent", b"{}") * 10, pause=0.1)
NONSENSE = Stranger(b"\x16\x03\x01 \r\n\r\n")
IDLE = Stranger()
# How many come, by the name of their row.
ROWS: dict[str, dict[Stranger, int]] = {
    "nobody": {},
    "bombs": {BOMB: 3},
    "one-byte-4": {SINGLE_BYTES: 4},
    "one-byte-16": {SINGLE_BYTES: 16},
    "bodies": {BODIES: 4},
    "authorize": {PAGE: 500},
    "idle": {IDLE: 1000},
    "refused": {REFUSED: 30, NONSENSE: 20},
    "endless": {ENDLESS: 1000},
    "together": {BOMB: 3, ENDLESS: 300, SINGLE_BYTES: 4, PAGE: 500, IDLE: 1000},
}


async def be_strangers(port: int, row: str, seconds: float) -> int:
    """Has strangers come, and come again, for some seconds; says how often they did."""
    times = 0

    async def be(stranger: Stranger, pause: float) -> None:
        nonlocal times
        await asyncio.sleep(random.uniform(0, seconds / 4))
        while True:
            times += 1
            with contextlib.suppress(OSError):
                await stranger.come(port)
            await asyncio.sleep(pause)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            for stranger, many in ROWS[row].items():
                for _ in range(many):
                    tasks.create_task(be(stranger, many / 2000))
    return times


async def take_turns(port: int, seconds: float) -> list[float]:
    """The milliseconds that callers wait for first words, from new connections on."""
    waits = []
    over = time.perf_counter() + seconds

    async def call(number: int) -> None:
        await asyncio.sleep(number / CALLERS)
        caller = Caller(port, f"{over}-{number}")
        while time.perf_counter() < over:
            begun = time.perf_counter()
            await caller.connect()
            wait = time.perf_counter() - begun
            heard = await caller.say("Hello.")
            caller.writer.close()
            wait += (
                heard.first_word if heard.is_whole and heard.delays else float("inf")
            )
            waits.append(1000 * wait)
            await asyncio.sleep(random.uniform(0.3, 1.1))

    await asyncio.gather(*(call(number) for number in range(CALLERS)))
    return waits


def send_strangers(row: str, agent: Served, seconds: float) -> subprocess.Popen[bytes]:
    """Has strangers come, in a process of their own."""
    command = ["nice", "-n", "19", sys.executable, __file__, row]
    command += ["--be", str(agent.port), "--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def mib(proc: Path, name: str) -> int:
    """Memory of a process: what it has (VmRSS), or the most that it had (VmHWM)."""
    status = (proc / "status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) // 1024


async def measure(agent: Served, proc: Path, row: str, seconds: float) -> bool:
    """Prints a row; returns whether it is as promised."""
    (proc / "clear_refs").write_text("5")
    logged = agent.log.stat().st_size
    begun = time.perf_counter()
    with send_strangers(row, agent, seconds) as process:
        waits = await take_turns(agent.port, seconds)
        came = int(process.communicate()[0])
    took = time.perf_counter() - begun
    kib = (agent.log.stat().st_size - logged) / 1024
    figures = [f"{statistics.median(waits):.1f}", f"{max(waits):.1f}", len(waits)]
    show(row, *figures, mib(proc, "VmHWM"), round(came / took), round(kib / took))
    return max(waits) <= PROMISE


async def measure_all(given: argparse.Namespace) -> None:
    """Measures rows of an edition; fails if they are not as promised."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    gemini = await start_gemini(lambda words: Answer())
    # The system takes connections for it, and it never answers.
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as layercode:
        url = f"http://127.0.0.1:{layercode.getsockname()[1]}"
        api = {"LAYERCODE_API_KEY": "key", "LAYERCODE_API_URL": url}
        columns = "median,ms worst,ms turns peak,MiB come/s log,KiB/s"
        with served(given.agent, gemini, **api) as agent:
            os.sched_setaffinity(agent.process.pid, cores[:1])
            proc = Path(f"/proc/{agent.process.pid}")
            await take_turns(agent.port, 2)
            show("", *columns.split())
            wrong = []
            for row in given.rows:
                wrong += [row] * (not await measure(agent, proc, row, given.seconds))
                await asyncio.sleep(1)
            await asyncio.sleep(given.minute)
            files = len(list((proc / "fd").iterdir()))
            held = f"{mib(proc, 'VmRSS')} MiB, {files} files, {agent.tell()[0]} tasks"
            print(f"{given.minute:g} s after: {held}")
            with send_strangers("together", agent, given.seconds) as process:
                await asyncio.sleep(given.seconds / 2)
                begun = time.perf_counter()
                agent.process.terminate()
                await asyncio.to_thread(agent.process.wait, 60)
                print(f"a stop beside all: {time.perf_counter() - begun:.1f} s")
                process.communicate()
    if wrong:
        sys.exit(f"More than {PROMISE} ms, or no answer: {', '.join(wrong)}")


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # For the agent, too.
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parser = argparse.ArgumentParser(description="What strangers cost callers.")
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--agent", default="agent.py", metavar="WHICH")
    parser.add_argument("--seconds", type=float, default=10, help="of a row")
    parser.add_argument("--minute", type=float, default=60, help="seconds of rest")
    parser.add_argument("--be", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        print(asyncio.run(be_strangers(given.be, given.rows[0], given.seconds)))
    else:
        asyncio.run(measure_all(given))


if __name__ == "__main__":
    main()
