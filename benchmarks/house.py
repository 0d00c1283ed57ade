"""The packages of src/hpr with their first sentence, files and lines, and what stands out: long files and long signatures.

Run: python benchmarks/house.py [folder of the package]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "hpr"
MOST = 6  # parameters of a function


def sentence(file: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def packages(root: Path) -> list[tuple[str, str, int, int]]:
    """Name, sentence, files and lines of every package, in the order of their names; subpackages are apart."""
    rows = []
    for start in sorted(root.rglob("__init__.py")):
        files = sorted(start.parent.glob("*.py"))
        name = ".".join(start.parent.relative_to(root).parts) or root.name
        rows.append((name, sentence(start), len(files), sum(map(lines, files))))
    return rows


def signatures(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of parameters of every function, without self, cls, * and **."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node.name, sum(argument.arg not in ("self", "cls") for argument in given)


def long_signatures(root: Path) -> tuple[list[str], list[str]]:
    """Functions with more than six parameters: those of the package, and those of its command line."""
    found: tuple[list[str], list[str]] = [], []
    for file in sorted(root.rglob("*.py")):
        command_line = file.relative_to(root).parts[0] == "cli"
        found[command_line].extend(
            f"{file.relative_to(root)}: {name} ({count})" for name, count in signatures(file) if count > MOST
        )
    return found


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    rows = packages(root)
    width = max(len(name) for name, *_ in rows)
    for name, text, files, count in rows:
        print(f"{name:{width}}  {files:3} files {count:6,} lines  {text}")
    every = sorted(root.rglob("*.py"), key=lines)
    longest, total = every[-1], sum(map(lines, every))
    print(f"\n{len(every)} files, {total:,} lines; the longest is {longest.relative_to(root)}, {lines(longest)}")
    modules = [file.name for file in root.glob("*.py") if file.name != "__init__.py"]
    print(f"modules at the root: {len(modules)} ({', '.join(sorted(modules)) or 'none'})")
    library, command_line = long_signatures(root)
    print(f"functions with more than {MOST} parameters: {len(library)}", *library, sep="\n  ")
    print(f"commands under hpr.cli with more than {MOST}: {len(command_line)}", *command_line, sep="\n  ")


if __name__ == "__main__":
    main()
