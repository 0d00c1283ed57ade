"""The page docs/families.md from the rows of the sweep."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from common.promises import PROMISES

OUTCOMES = {
    "passes": "keep every promise that applies to them",
    "differs": "break a promise",
    "refused": "are refused in words by HPR",
    "crashes": "end in an error that HPR does not word",
    "too slow": "take longer than the limit",
    "not built": "cannot be built here from their defaults, or take no input that the rules make",
}
Rows = list[dict[str, Any]]


def table(rows: Rows, took: str, exist: int) -> str:
    """The whole page; ``took`` says how long the sweep ran, ``exist`` how many classes there are, with or without a row."""
    return "\n".join(_lines(rows, took, exist))


def _lines(rows: Rows, took: str, exist: int) -> Iterator[str]:
    counts = Counter(row["outcome"] for row in rows)
    kinds = {row["kind"] for row in rows}
    yield "# Families\n"
    yield (
        f"Every model class that the auto classes of Transformers list, as a tiny random model built from its configuration's "
        f"defaults. {len(rows)} of the {exist} classes were run, of {len(kinds)} types of configuration. Made by "
        f"`python benchmarks/families.py --jobs 2 > docs/families.md` {took}.\n"
    )
    yield "| outcome | classes | types |\n|---|---|---|"
    yield f"| were run | {len(rows)} | {len(kinds)} |"
    built = [row for row in rows if row["outcome"] != "not built"]
    yield f"| are built | {len(built)} | {len({row['kind'] for row in built})} |"
    for outcome, words in OUTCOMES.items():
        types = {row["kind"] for row in rows if row["outcome"] == outcome}
        yield f"| {words} | {counts[outcome]} | {len(types)} |"
    yield "\nWhat is promised, and of how many classes it was checked. A promise does not apply where the original does not"
    yield "generate, draws its outputs at random, or is itself changed when Transformers saves and loads it.\n"
    yield "| promise | kept | broken | does not apply |\n|---|---|---|---|"
    for key, words in PROMISES.items():
        marks = Counter(row["kept"].get(key, "") for row in rows)
        yield f"| {words} | {marks[True]} | {marks[False]} | {marks[None]} |"
    yield from _by_task(rows)
    for outcome in ("differs", "refused", "crashes", "too slow", "not built"):
        if counts[outcome]:
            yield f"\n## Classes that {OUTCOMES[outcome]}\n"
            yield from _reasons([row for row in rows if row["outcome"] == outcome])


def _by_task(rows: Rows) -> Iterator[str]:
    """The classes that pass, by the first auto class that lists them."""
    yield "\n## By task\n\nA class counts for the first auto class that lists it; `base` are the models without a head.\n"
    yield "| auto class | exist | built | pass | share sites | generate |\n|---|---|---|---|---|---|"
    tasks: dict[str, Rows] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    for task, group in sorted(tasks.items(), key=lambda pair: -len(pair[1])):
        built = sum(row["outcome"] != "not built" for row in group)
        passed = [row for row in group if row["outcome"] == "passes"]
        shared = sum(row["shared"] > 0 for row in group)
        generate = sum(row["kept"].get("cache") is True for row in group)
        yield f"| {task} | {len(group)} | {built} | {len(passed)} | {shared} | {generate} |"
    yield "\n## Classes that keep every promise\n"
    for task, group in sorted(tasks.items(), key=lambda pair: -len(pair[1])):
        if names := [f"`{row['name']}`" for row in group if row["outcome"] == "passes"]:
            yield f"- {task}: {', '.join(names)}"


def _reasons(rows: Rows) -> Iterator[str]:
    """One line for each reason, with the classes that it holds for."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[reason(row)].append(f"`{row['name']}`")
    for words, names in sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        yield f"- {words}: {', '.join(names)}"


def reason(row: dict[str, Any]) -> str:
    """Why a class does not pass, in one line."""
    if row["outcome"] == "differs":
        return "not " + ", not ".join(PROMISES[key] for key, kept in row["kept"].items() if kept is False)
    words = " ".join(row["reason"].split()).replace("|", "/").replace("`", "'")
    if "requires the" in words and "library" in words:
        return f"needs the package {words.partition('requires the ')[2].partition(' library')[0]}"
    return words[:200] + ("…" if len(words) > 200 else "")
