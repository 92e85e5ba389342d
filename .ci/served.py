"""An agent in a process of its own, for the measurements: any edition's agent.py."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fakes import SECRET
from ports import free_port

ROOT = Path(__file__).parent.parent
# By the agent's main(), as a user serves it.
SERVE = "import agent; agent.main()"
# What a process tells on SIGUSR1: its tasks, and the bytes in use, counted from the
# first time on.
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

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def tell(self) -> tuple[int, int]:
        """Its tasks, and the bytes in use, counted from the first time on."""
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = re.fullmatch(rb"(\d+) (\d+)\n", line)
            if told:
                return int(told[1]), int(told[2])
        raise EOFError(self.log.read_text())

    def forget_peak(self) -> None:
        """Begins anew to look for the most memory that it uses."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def mib(self, name: str) -> int:
        """Its memory now (VmRSS), or the most since forget_peak() (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) // 1024

    def files(self) -> int:
        """How many files and connections it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def log_size(self) -> int:
        """How many bytes it has logged."""
        return self.log.stat().st_size


def show(name: str, *cells: object) -> None:
    """Prints a row of a table."""
    print(f"{name:34}" + "".join(f"{cell!s:>11}" for cell in cells), flush=True)


@contextlib.contextmanager
def served(
    folder: Path, gemini: str, code: str = SERVE, **settings: str
) -> Iterator[Served]:
    """Runs the agent.py of a folder, or other code; its first line begins with Up."""
    port = free_port()
    given = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "LAYERCODE_WEBHOOK_SECRET": SECRET,
        "GOOGLE_GENERATIVE_AI_API_KEY": "key",
        "GOOGLE_GEMINI_BASE_URL": gemini,
    }
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", TELL + code],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **given, **settings},
        )
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith(b"Up"):
                raise EOFError(Path(log.name).read_text())
            yield Served(process, port, Path(log.name))
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def edition(name: str) -> Iterator[Path]:
    """A folder with the agent.py that is a file of this name, or of a git revision."""
    command = ["git", "show", f"{name}:agent.py"]
    if (ROOT / name).is_file():
        command = ["cat", name]
    with tempfile.TemporaryDirectory() as folder:
        text = subprocess.check_output(command, cwd=ROOT)
        Path(folder, "agent.py").write_bytes(text)
        yield Path(folder)
