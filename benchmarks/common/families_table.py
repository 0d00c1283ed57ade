"""The page docs/families.md from the rows of the sweep."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    return ""
