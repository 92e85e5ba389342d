"""Draws the pictures of README.md: a chat in the terminal, and the page in a call.

    python .ci/pictures.py             draws them anew; needs Chromium
    python .ci/pictures.py --check     fails if they are no longer true

Scripts stand in for Gemini and for Layercode's SDK. Behind the end of page.png is a
hash of what the page has shown.
"""

import asyncio
import base64
import contextlib
import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from served import ROOT, Answer, start_gemini

CHAT = ROOT / ".github" / "chat.svg"
PAGE = ROOT / ".github" / "page.png"
ANSWERS = [
    Answer(("One large salami. ", "It'll be ready in "), finish=""),
    Answer(("Two large salami, then. ", "They'll be ready in twenty minutes!")),
]
# What is typed when what is shown: \x03 is Ctrl-C, \x04 Ctrl-D. The last is the end.
STEPS = [
    ("\n> ", "A large salami, please.\r"),
    ("ready in ", "\x03"),
    ("\n> ", "Make it two!\r"),
    ("\n> ", "\x04"),
    ("\0", ""),
]
# Stands in for the SDK: it clicks the button, and has a call.
SDK = """
export default function (page) {
  setTimeout(() => document.querySelector("button").click());
  const say = (turn_id, type, content) => page.onMessage({ turn_id, type, content });
  function connect() {
    this.status = "connected";
    page.onStatusChange("connected");
    say(1, "response.text", "Luigi's Pizza! What can I get you?");
    say(2, "user.transcript", "A large salami, please.");
    page.onDataMessage({ turn_id: 2, content: { "ready in": "20 minutes" } });
    say(2, "response.text", "One large salami, ready in twenty minutes.");
    page.onAgentSpeakingChange(true);
  }
  return { status: "disconnected", connect };
}
"""


def block(language: str, words: str) -> str:
    """The block of README.md in a language that has these words in it."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks: list[str] = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", readme)
    return next(block for block in blocks if words in block)


def save_page(folder: Path, sdk: str, agent_id: str) -> Path:
    """Saves the page as README.md has it, but for the SDK and the agent's id."""
    page = block("html", "js-sdk").replace("your-agent-id", agent_id, 1)
    if sdk:
        url = f"data:text/javascript;base64,{base64.b64encode(sdk.encode()).decode()}"
        page = re.sub(r"https://cdn\.\S+\.esm\.js", url, page)
    file = folder / "index.html"
    file.write_text(page, "utf-8")
    return file


async def chat() -> str:
    """What a terminal shows of a chat with an interruption in it."""
    answers = iter(ANSWERS)
    gemini = await start_gemini(lambda words: next(answers))
    settings = {"GOOGLE_GENERATIVE_AI_API_KEY": "key", "TERM": "xterm"}
    settings["GOOGLE_GEMINI_BASE_URL"] = gemini
    with TemporaryDirectory() as folder:
        shutil.copy(ROOT / "agent.py", folder)
        Path(folder, "pizza.py").write_text(block("python", "pizza.py:"), "utf-8")
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, "pizza.py", "chat"], settings)
        return "$ python pizza.py chat\n" + await asyncio.to_thread(order, terminal)


def order(terminal: int) -> str:
    """Types at a terminal; returns what it shows, without its control sequences."""
    shown = ""
    with contextlib.suppress(OSError):
        for words, keys in STEPS:
            seen = len(shown)
            while words not in shown[seen:]:
                text = os.read(terminal, 65536).decode()
                shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)
            os.write(terminal, keys.encode())
    return shown


def draw(shown: str) -> str:
    """What a terminal shows, as SVG."""
    lines = shown.rstrip().split("\n")
    height = 22 * len(lines) + 46
    drawn = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 722 {height}">\n'
    drawn += f'<rect width="722" height="{height}" rx="10" fill="#0d1117"/>\n'
    drawn += '<g fill="#e6edf3" font-family="ui-monospace, monospace" font-size="14">\n'
    for number, line in enumerate(lines, 2):
        drawn += f'<text x="24" y="{22 * number}">{escape(line, quote=False)}</text>\n'
    return drawn + "</g>\n</svg>\n"


def photograph() -> bytes:
    """A picture of README.md's page in a call, as PNG, and behind it the hash."""
    with TemporaryDirectory() as folder:
        url = save_page(Path(folder), SDK, "agent_1").as_uri()
        picture = Path(folder, "page.png")
        command = "chromium --headless --no-sandbox --hide-scrollbars --dump-dom"
        command += " --virtual-time-budget=2000 --force-device-scale-factor=2"
        command += f" --window-size=620,370 --screenshot={picture} {url}"
        shown = subprocess.check_output(command.split(), stderr=subprocess.DEVNULL)
        return picture.read_bytes() + hashlib.sha256(shown).hexdigest().encode()


def main() -> None:
    """Draws the pictures, or checks them."""
    signal.alarm(60)
    drawn = draw(asyncio.run(chat()))
    photo = photograph()
    if sys.argv[1:] != ["--check"]:
        CHAT.write_text(drawn, "utf-8")
        PAGE.write_bytes(photo)
    elif (CHAT.read_text("utf-8"), PAGE.read_bytes()[-64:]) != (drawn, photo[-64:]):
        sys.exit("The pictures are not what is shown now: draw them anew.")


if __name__ == "__main__":
    main()
