"""Checks that the project is small, and that its Python reads plainly.

    python .ci/plain.py

Prints each figure beside its ceiling; ruff's rules hold for README.md's blocks as for
the files. Exits with status 1 if a figure is over its ceiling.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
AGENT = (ROOT / "agent.py").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def count_code(source: str) -> int:
    """The lines that are not blank, comments or docstrings."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    return sum(not line.startswith("#") for line in map(str.strip, lines) if line)


def count_lines(*names: str) -> int:
    """The lines of some files together."""
    texts = [(ROOT / name).read_text("utf-8") for name in names]
    return sum(len(text.splitlines()) for text in texts)


def check_blocks(folder: Path, blocks: list[str]) -> int:
    """Runs ruff on the blocks, as files beside agent.py; returns how often it fails."""
    for name in ("agent.py", ".ruff.toml"):
        shutil.copy(ROOT / name, folder)
    for number, block in enumerate(blocks):
        named = re.match(r'"""(\w+\.py):', block)
        name = named[1] if named else f"block_{number}.py"
        (folder / name).write_text(block, "utf-8")
    commands = ("ruff check .", "ruff format --check .")
    runs = [subprocess.run(command.split(), cwd=folder) for command in commands]
    return sum(run.returncode > 0 for run in runs)


def check_types(folder: Path) -> tuple[int, float]:
    """Whether mypy fails, and the percentage of expressions that it has no type for."""
    command = ["mypy", "--strict", "--any-exprs-report", str(folder), "agent.py"]
    status = subprocess.run(command, cwd=ROOT).returncode
    report = (folder / "any-exprs.txt").read_text().rstrip()
    return status, round(100 - float(report.rpartition(" ")[2].rstrip("%")), 2)


def main() -> None:
    """Prints all figures, and exits with status 1 if one is over its ceiling."""
    fences = re.findall(r"(?ms)^```(\w*).*?\n(.*?)^```", README)
    fenced = sum(code.count("\n") for _, code in fences)
    sizes = {code.partition(":")[0]: code.count("\n") for _, code in fences}
    talk = sizes.pop('"""talk.py', 0)
    widths = sorted(len(line) for line in AGENT.splitlines() if line.strip())
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        blocks = [block for name, block in fences if name == "python"]
        ruff_failures = check_blocks(Path(one), blocks)
        mypy_failures, untyped = check_types(Path(other))
    ours = subprocess.check_output(["git", "ls-files", ".ci"], cwd=ROOT, text=True)
    figures: list[tuple[str, float, float]] = [
        ("agent.py, lines", count_lines("agent.py"), 1150),
        ("agent.py, lines of code", count_code(AGENT), 800),
        ("agent.py, columns of half of the lines", widths[len(widths) // 2], 48),
        ("agent.py, columns of nine in ten", widths[len(widths) * 9 // 10], 80),
        ("agent.py, % of expressions without a type", untyped, 5),
        ("README.md's blocks, failures of ruff", ruff_failures, 0),
        ("agent.py, failures of mypy", mypy_failures, 0),
        ("README.md, lines", count_lines("README.md"), 900),
        ("README.md, lines in fences", fenced, 600),
        ("README.md, lines of talk.py", talk, 140),
        ("README.md, lines of the longest other", max(sizes.values()), 80),
        ("test_agent.py, lines", count_lines("test_agent.py"), 1500),
        (".ci, lines of all files", count_lines(*ours.splitlines()), 2500),
    ]
    for name, figure, ceiling in figures:
        verdict = "over" if figure > ceiling else ""
        print(f"{name:45}{figure:>8}{ceiling:>8} {verdict}".rstrip())
    if any(figure > ceiling for _, figure, ceiling in figures):
        sys.exit("Something is over its ceiling.")


if __name__ == "__main__":
    main()
