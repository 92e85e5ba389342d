"""The recipes of README.md, taken out of it as they stand.

A recipe is a python block whose docstring begins with the name of its file.
"""

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


def block(file_name: str) -> str:
    """The python block of README.md whose docstring begins with this name."""
    readme = README.read_text("utf-8")
    for source in re.findall(r"(?ms)^```python\n(.*?)^```$", readme):
        if source.startswith(f'"""{file_name}:'):
            return str(source)
    raise LookupError(f"README.md has no block that begins with {file_name}")


def save(file_name: str, folder: Path) -> Path:
    """Saves a recipe in a folder, beside a copy of agent.py, to run it from there."""
    shutil.copy(AGENT, folder)
    file = folder / file_name
    file.write_text(block(file_name), "utf-8")
    return file


def load(file_name: str, folder: Path) -> ModuleType:
    """Saves a recipe in a folder and imports it; it imports the tests' own agent.py."""
    file = save(file_name, folder)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and typing look for it.
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
