"""Measures what strangers cost callers: 20 of them take turns beside the uninvited.

    python .ci/strangers.py                       everything, in four minutes
    python .ci/strangers.py bombs one-byte-16     only these strangers
    python .ci/strangers.py --agent WHICH         another edition: a file, or a revision
    python .ci/strangers.py --seconds 5 --minute 15     in less time

All strangers are unsigned. They have a process of their own, which goes to 127.0.0.1
alone, ends after its seconds, and is the least important to the system; the agent has a
core to itself if there are two. Linux only. Exits with status 1 if a first word takes
longer than is promised, or does not come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable

from fakes import Answer, Caller, start_gemini
from served import Served, edition, served, show

# Milliseconds to the first word that are promised beside all of them.
PROMISE = 250
# What is counted of what strangers send.
SENT = ("kB", "connects", "requests")
CALLERS = 20
MIB = 2**20

# ---- The strangers -------------------------------------------------------------------


class Stranger:
    """A connection to the agent, which counts what it sends."""

    def __init__(self, sock: socket.socket, sent: Counter[str]) -> None:
        self.sock = sock
        self.sent = sent
        self.loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """Sends all of it."""
        await self.loop.sock_sendall(self.sock, data)
        self.sent["kB"] += len(data) // 1000

    async def receive(self) -> bytes:
        """Something that the agent sends; nothing if it has hung up."""
        return await self.loop.sock_recv(self.sock, MIB)

    async def hear_out(self) -> None:
        """Waits until the agent has hung up."""
        while await self.receive():
            pass


def request(path: str, *head: str) -> bytes:
    """A POST request without its body."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: agent", *head, "", ""]).encode()


def bomb() -> bytes:
    """1 MB of gzip that inflates to 1 GB."""
    with_gzip_header = 31
    gzip = zlib.compressobj(9, zlib.DEFLATED, with_gzip_header)
    header = gzip.compress(b"") + gzip.flush(zlib.Z_FULL_FLUSH)
    zeros = gzip.compress(bytes(MIB)) + gzip.flush(zlib.Z_FULL_FLUSH)
    return header + zeros * 1000


BOMB = bomb()


async def send_bombs(stranger: Stranger) -> None:
    """Sends 1 MB that inflates to 1 GB, and waits for the answer."""
    head = ("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}")
    await stranger.send(request("/agent", *head) + BOMB)
    await stranger.receive()


async def never_end(stranger: Stranger) -> None:
    """Sends a body of 1 MB, but for its last bytes."""
    length = f"Content-Length: {MIB}"
    await stranger.send(request("/agent", length) + bytes(MIB - 100))
    await stranger.hear_out()


async def send_single_bytes(stranger: Stranger) -> None:
    """Sends a body in chunks of one byte, as fast as they are taken."""
    await stranger.send(request("/agent", "Transfer-Encoding: chunked"))
    chunks = b"1\r\nx\r\n" * 10_000
    while True:
        await stranger.send(chunks)


async def send_bodies(stranger: Stranger) -> None:
    """Sends bodies of 1 MB, as fast as they are taken."""
    message = request("/agent", f"Content-Length: {10**6}") + bytes(10**6)
    while True:
        await stranger.send(message)
        if not await stranger.receive():
            return


async def authorize(stranger: Stranger) -> None:
    """Asks for a session, which Layercode's API does not give."""
    await stranger.send(request("/authorize", "Content-Length: 18"))
    await stranger.send(b'{"agent_id": "me"}')
    await stranger.receive()


async def be_refused(stranger: Stranger) -> None:
    """Sends 100 webhooks without a signature in a second."""
    message = request("/agent", "Content-Length: 2") + b"{}"
    while True:
        await stranger.send(message * 10)
        stranger.sent["requests"] += 10
        await asyncio.sleep(0.1)
        if not await stranger.receive():
            return


async def talk_nonsense(stranger: Stranger) -> None:
    """Sends what is not HTTP."""
    stranger.sent["requests"] += 1
    await stranger.send(b"\x16\x03\x01 \r\n\r\n")
    await stranger.hear_out()


Kind = Callable[[Stranger], Awaitable[None]]
# How many come, by the name of their row.
ROWS: dict[str, dict[Kind, int]] = {
    "nobody": {},
    "bombs": {send_bombs: 3},
    "one-byte-4": {send_single_bytes: 4},
    "one-byte-16": {send_single_bytes: 16},
    "bodies": {send_bodies: 4},
    "authorize": {authorize: 500},
    "idle": {Stranger.hear_out: 1000},
    "refused": {be_refused: 30, talk_nonsense: 20},
    "endless": {never_end: 1000},
    "together": {
        send_bombs: 3,
        never_end: 300,
        send_single_bytes: 4,
        authorize: 500,
        Stranger.hear_out: 1000,
    },
}


async def be_strangers(port: int, row: str, seconds: float) -> Counter[str]:
    """Has strangers come, and come again, for some seconds; returns what they sent."""
    sent: Counter[str] = Counter()

    async def be(kind: Kind, pause: float) -> None:
        await asyncio.sleep(random.uniform(0, seconds / 4))
        while True:
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, ("127.0.0.1", port))
                sent["connects"] += 1
                await kind(Stranger(sock, sent))
            await asyncio.sleep(pause)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            for kind, many in ROWS[row].items():
                for _ in range(many):
                    # A few come back at once, a thousand together as often.
                    tasks.create_task(be(kind, many / 2000))
    return sent


# ---- The callers ---------------------------------------------------------------------


async def take_turns(port: int, seconds: float) -> list[float]:
    """Has the callers talk for some seconds, with a new connection for each turn.

    Returns the milliseconds to each first word; without a whole answer, infinity.
    """
    waits = []
    over = time.perf_counter() + seconds

    async def call(number: int) -> None:
        # Not all at once.
        await asyncio.sleep(number / CALLERS)
        caller = Caller(port, f"{over}-{number}")
        while time.perf_counter() < over:
            begun = time.perf_counter()
            await caller.connect()
            connected = time.perf_counter() - begun
            heard = await caller.say("Hello.")
            caller.writer.close()
            is_answer = heard.is_whole and heard.delays
            wait = connected + heard.first_word if is_answer else float("inf")
            waits.append(1000 * wait)
            await asyncio.sleep(random.uniform(0.3, 1.1))

    await asyncio.gather(*(call(number) for number in range(CALLERS)))
    return waits


# ---- The measurements ----------------------------------------------------------------


def send_strangers(row: str, agent: Served, seconds: float) -> subprocess.Popen[bytes]:
    """Has strangers come, in a process of their own."""
    command = ["nice", "-n", "19", sys.executable, __file__, row]
    command += ["--be", str(agent.port), "--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def measure(agent: Served, row: str, seconds: float) -> bool:
    """Prints a row; returns whether it is as promised."""
    agent.forget_peak()
    logged = agent.log_size()
    begun = time.perf_counter()
    with send_strangers(row, agent, seconds) as process:
        waits = await take_turns(agent.port, seconds)
        sent = json.loads(process.communicate()[0])
    took = time.perf_counter() - begun
    figures = [sent.get(what, 0) for what in SENT]
    figures.append((agent.log_size() - logged) / 1024)
    rates = [round(figure / took) for figure in figures]
    median = round(statistics.median(waits), 1)
    worst = round(max(waits), 1)
    show(row, median, worst, len(waits), agent.mib("VmHWM"), *rates)
    return worst <= PROMISE


async def measure_all(
    which: str, rows: list[str], seconds: float, minute: float
) -> list[str]:
    """Measures rows of an edition; returns those that are not as promised."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    gemini = await start_gemini(lambda words: Answer())
    with (
        # The system takes connections for it, and it never answers.
        socket.create_server(("127.0.0.1", 0), backlog=4096) as layercode,
        edition(which) as folder,
        served(
            folder,
            gemini,
            LAYERCODE_API_KEY="key",
            LAYERCODE_API_URL=f"http://127.0.0.1:{layercode.getsockname()[1]}",
        ) as agent,
    ):
        os.sched_setaffinity(agent.process.pid, cores[:1])
        await take_turns(agent.port, 2)
        rates = [f"{what}/s" for what in (*SENT, "log KiB")]
        show("", "median ms", "worst ms", "turns", "peak MiB", *rates)
        broken = []
        for row in rows:
            if not await measure(agent, row, seconds):
                broken.append(row)
            await asyncio.sleep(1)
        await asyncio.sleep(minute)
        tasks, _ = agent.tell()
        mib = agent.mib("VmRSS")
        print(f"{minute:g} s after: {mib} MiB, {agent.files()} files, {tasks} tasks")
        with send_strangers("together", agent, seconds) as process:
            await asyncio.sleep(seconds / 2)
            begun = time.perf_counter()
            agent.process.terminate()
            await asyncio.to_thread(agent.process.wait, 60)
            print(f"a stop beside all of them: {time.perf_counter() - begun:.1f} s")
            process.communicate()
        return broken


def main() -> None:
    """Reads the command line and measures."""
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
        sent = asyncio.run(be_strangers(given.be, given.rows[0], given.seconds))
        print(json.dumps(sent))
        return
    broken = asyncio.run(
        measure_all(given.agent, given.rows, given.seconds, given.minute)
    )
    if broken:
        sys.exit(f"More than {PROMISE} ms, or no answer: {', '.join(broken)}")


if __name__ == "__main__":
    main()
