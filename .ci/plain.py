"""Checks that agent.py and the Python blocks of README.md read plainly.

python .ci/plain.py

Ruff's rules hold for the blocks as for the files, half of agent.py's lines are short,
and nearly all of its expressions are typed. Exits with status 1 if not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Columns within which half of the lines, and nine in ten of them, are.
HALF_WITHIN = 45
MOST_WITHIN = 80
# Percent of agent.py's expressions that mypy has a type for.
TYPED = 95.0


def python_blocks(readme: str) -> list[str]:
    """The Python blocks of README.md."""
    return re.findall(r"(?ms)^```python\n(.*?)^```$", readme)


def check_blocks(folder: Path) -> None:
    """Runs ruff on each block, as a file of its own name beside agent.py."""
    shutil.copy(ROOT / "agent.py", folder)
    shutil.copy(ROOT / ".ruff.toml", folder)
    blocks = python_blocks((ROOT / "README.md").read_text("utf-8"))
    for number, block in enumerate(blocks):
        name = f"block_{number}.py"
        if block.startswith('"""'):
            name = block.removeprefix('"""').partition(":")[0]
        (folder / name).write_text(block, "utf-8")
    for command in (["check"], ["format", "--check"]):
        subprocess.run(["ruff", *command, "."], check=True, cwd=folder)


def check_widths() -> None:
    """Exits if the lines of agent.py are too wide."""
    lines = (ROOT / "agent.py").read_text("utf-8").splitlines()
    widths = sorted(len(line) for line in lines if line.strip())
    half = widths[len(widths) // 2]
    most = widths[len(widths) * 9 // 10]
    print(f"agent.py: {len(widths)} lines, half within {half}, 90 % within {most}")
    if half > HALF_WITHIN or most > MOST_WITHIN:
        sys.exit("agent.py has too many wide lines")


def check_types(folder: Path) -> None:
    """Runs mypy, and exits if too few expressions are typed."""
    command = ["mypy", "--strict", "--any-exprs-report", folder, ROOT / "agent.py"]
    subprocess.run(command, check=True, cwd=ROOT)
    report = (folder / "any-exprs.txt").read_text()
    typed = float(report.rstrip().rpartition(" ")[2].rstrip("%"))
    print(f"agent.py: {typed} % of the expressions are typed")
    if typed < TYPED:
        sys.exit("agent.py has too many expressions without a type")


def main() -> None:
    """Runs all checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_blocks(folder)
        check_widths()
        check_types(folder)


if __name__ == "__main__":
    main()
