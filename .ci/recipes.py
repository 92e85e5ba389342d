"""The recipes of README.md, as they stand: blocks that begin with their file's name."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import agent

AGENT = Path(agent.__file__)
README = AGENT.with_name("README.md")


def blocks(language: str) -> list[str]:
    """README.md's blocks in a language; "" has those that are in none."""
    readme = README.read_text("utf-8")
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", readme)
    return [source for name, source in found if name == language]


def block(file_name: str) -> str:
    """The block of README.md that is to be saved under this name."""
    if file_name == "index.html":
        [page] = blocks("html")
        return page
    for source in blocks("python"):
        if source.startswith(f'"""{file_name}: '):
            return source
    raise LookupError(f"README.md has no block that begins with {file_name}")


def save(file_name: str, folder: Path) -> Path:
    """Saves a recipe in a folder, beside agent.py and pizza.py, to be run there."""
    shutil.copy(AGENT, folder)
    for name in ("pizza.py", file_name):
        (folder / name).write_text(block(name), "utf-8")
    return folder / file_name


def load(file_name: str, folder: Path) -> ModuleType:
    """Saves a recipe in a folder and imports it; it imports the tests' own agent.py."""
    save(file_name, folder)
    for name in ("pizza.py", file_name):
        spec = importlib.util.spec_from_file_location(Path(name).stem, folder / name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Where dataclasses and other recipes look for it.
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
    return module
