"""Draws the pictures of README.md, from a real chat and from a real page.

    python .ci/pictures.py             draws them anew
    python .ci/pictures.py --check     fails if they are no longer true

chat.svg is what a terminal shows while somebody talks to README.md's pizza.py: the
terminal, the agent and the interruption are real, and a script stands in for Gemini.
page.png is README.md's page in Chromium; it needs what test_browser.py needs.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import struct
import sys
import zlib
from dataclasses import replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))

import recipes
from test_browser import (
    ALLOW_MICROPHONE,
    SETTINGS,
    SOUND,
    Browser,
    Cloud,
    Pizzeria,
    chromium,
    page_of_readme,
)
from test_terminal import CTRL_D, Person, sit_down

import agent
from test_agent import Gemini, Layercode, Stall, served

HERE = Path(agent.__file__).parent
CHAT = HERE / ".github" / "chat.svg"
PAGE = HERE / ".github" / "page.png"

# ---- The chat ------------------------------------------------------------------------

SCRIPTS = [
    ["One large salami. ", "It'll be ready in ", Stall()],
    ["Two large salami, then. ", "What's the name?"],
    ["Thank you, Ada. They'll be ready in twenty minutes!"],
]
COLUMNS = 80
LINE_HEIGHT = 22
LETTER_WIDTH = 8.43
MARGIN = 24
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
# By their ANSI codes: what is typed, and what the agent says.
COLOURS = {"0": "#e6edf3", "36": "#56d4dd"}


async def chat() -> str:
    """What a terminal shows of a chat with an interruption in it."""
    gemini = Gemini()
    gemini.scripts = list(SCRIPTS)
    with TemporaryDirectory() as folder:
        recipes.save("pizza.py", Path(folder))
        async with served(gemini.app(), handler_cancellation=True) as url:
            settings = {
                "PS1": "$ ",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "GOOGLE_GENERATIVE_AI_API_KEY": "a key",
                "GOOGLE_GEMINI_BASE_URL": url,
            }
            shell = ("bash", "--norc", "--noprofile", "-i")
            async with sit_down(*shell, cwd=folder, **settings) as person:
                await order(person, gemini)
                return person.shown


async def order(person: Person, gemini: Gemini) -> None:
    """Starts the agent, orders a pizza, and has a better idea meanwhile."""
    await person.see("$ ")
    person.type("python pizza.py chat\r")
    await person.see("\n> ")
    person.type("A large salami, please.\r")
    await person.see("ready in ")
    # One key is enough to silence the agent.
    person.type("M")
    await gemini.until(streams=0)
    await person.see("\n> M")
    person.type("ake it two!\r")
    await person.see("\n> ")
    person.type("Ada.\r")
    await person.see("\n> ")
    person.type(CTRL_D)
    await person.see("$ ")


def draw(shown: str) -> str:
    """A terminal's output as SVG."""
    # Of the shell's, readline's and the chat's orders only the colours are drawn.
    shown = re.sub(r"\x1b\[\?2004[hl]|\r", "", shown).removesuffix("\n$ ")
    lines = shown.split("\n")
    width = round(COLUMNS * LETTER_WIDTH) + 2 * MARGIN
    height = (len(lines) + 2) * LINE_HEIGHT + MARGIN // 2
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#0d1117"/>',
    ]
    buttons = (28, 48, 68)
    drawn += [f'<circle cx="{x}" cy="22" r="6" fill="#30363d"/>' for x in buttons]
    drawn.append(f'<g font-family="{FONTS}" font-size="14" xml:space="preserve">')
    for number, line in enumerate(lines):
        spans = ""
        for colour, text in runs(line):
            spans += f'<tspan fill="{colour}">{escape(text, quote=False)}</tspan>'
        y = (number + 2.5) * LINE_HEIGHT
        drawn.append(f'<text x="{MARGIN}" y="{y:g}">{spans}</text>')
    return "\n".join([*drawn, "</g>", "</svg>", ""])


def runs(line: str) -> list[tuple[str, str]]:
    """The texts of a line that have one colour each, as (colour, text)."""
    found = []
    # Text, code, text, code, ..., text.
    parts = re.split(r"\x1b\[([0-9]*)m", line)
    codes = ["0", *parts[1::2]]
    for code, text in zip(codes, parts[::2], strict=True):
        if text and found and found[-1][0] == COLOURS[code]:
            found[-1] = (COLOURS[code], found[-1][1] + text)
        elif text:
            found.append((COLOURS[code], text))
    return found


# ---- The page ------------------------------------------------------------------------


async def photograph() -> bytes:
    """A picture of README.md's page in a call, as PNG with a note of what it shows."""
    cloud = Cloud()
    cloud.script = ["A large salami, please."]
    # Time enough for a picture while it speaks.
    cloud.sound = 5 * SOUND
    with TemporaryDirectory() as profile:
        async with (
            served(cloud.app()) as url,
            served(Pizzeria(replace(SETTINGS, layercode_api_url=url)).make_app()) as us,
            aiohttp.ClientSession() as http,
            chromium(Path(profile), ALLOW_MICROPHONE) as browser,
        ):
            cloud.show(Layercode(http, us))
            await browser.command("/url", url=url.replace("127.0.0.1", "localhost"))
            await browser.click("Start talking")
            await browser.until("document.querySelector('.data')")
            await browser.until("document.querySelector('.speaks')")
            # Otherwise it may be photographed while its light is dim.
            await browser.run(
                "document.getAnimations().forEach((one) => one.cancel());"
            )
            picture = await browser.screenshot(620, 370)
            return noted(picture, await note(browser))


async def note(browser: Browser) -> str:
    """What a picture of the page shows, and of which page it is."""
    words = await browser.run("return document.querySelector('main').innerText;")
    return f"{hashlib.sha256(page_of_readme().encode()).hexdigest()}\n{words}"


def noted(png: bytes, text: str) -> bytes:
    """A PNG with a note in it, in front of its end."""
    told = b"iTXtnote\0\0\0\0\0" + text.encode()
    size = struct.pack(">I", len(told) - 4)
    check = struct.pack(">I", zlib.crc32(told))
    end = png.rindex(b"IEND") - 4
    return png[:end] + size + told + check + png[end:]


def note_of(png: bytes) -> str:
    """The note in a PNG."""
    start = png.index(b"iTXtnote")
    size = struct.unpack(">I", png[start - 4 : start])[0]
    return png[start + 4 : start + 4 + size].partition(b"\0\0\0\0\0")[2].decode()


def main() -> None:
    """Draws the pictures, or checks them."""
    drawn = draw(asyncio.run(chat()))
    photo = asyncio.run(photograph())
    if sys.argv[1:] != ["--check"]:
        CHAT.write_text(drawn, "utf-8")
        PAGE.write_bytes(photo)
        return
    if CHAT.read_text("utf-8") != drawn:
        sys.exit(f"{CHAT} is not what a terminal shows now:\n{drawn}")
    if note_of(PAGE.read_bytes()) != note_of(photo):
        sys.exit(f"{PAGE} is not the page of README.md: {note_of(photo)}")


if __name__ == "__main__":
    main()
