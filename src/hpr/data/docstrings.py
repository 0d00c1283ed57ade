"""Default texts for users who give no data: the docstrings of Python's standard library.

They are on every machine that runs this code, need no network and raise no licence question. A hash of each sentence decides
between the calibration part and the held-out part, so the two parts share no sentence on any machine and for any size.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hpr.errors import DataError

Split = Literal["calibration", "heldout"]
_HELD_OUT_SHARE = 0.25
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def docstrings(split: Split, limit: int | None = None) -> list[str]:
    """Sentences of 5 to 60 words from the standard library's docstrings, without repetition, in a fixed shuffled order.

    ``split`` is ``"calibration"`` (three quarters) or ``"heldout"`` (one quarter). The two parts share no sentence. Raises
    ``DataError`` if ``limit`` is above the number of sentences.
    """
    chosen = [text for key, text in _hashed_sentences() if (key < _HELD_OUT_SHARE) == (split == "heldout")]
    if limit is not None and limit > len(chosen):
        raise DataError(
            f"{limit} sentences are wanted, but this Python's standard library has {len(chosen)} in the {split} part: "
            f"ask for at most {len(chosen)}, or give a text file"
        )
    return chosen[:limit]


@lru_cache(maxsize=1)
def _hashed_sentences() -> list[tuple[float, str]]:
    """(hash in [0, 1), sentence) pairs, ordered by a second hash so that any prefix is a fair sample."""
    texts = {sentence for docstring in _stdlib_docstrings() for sentence in _sentences(docstring)}
    digests = {text: hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts}
    ordered = sorted(texts, key=lambda text: digests[text][8:16])
    return [(int.from_bytes(digests[text][:8], "big") / 2**64, text) for text in ordered]


def _stdlib_docstrings() -> list[str]:
    """The docstrings of all modules, classes and functions of the standard library, in the order of the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    collected = []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules warn while they are parsed
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # the standard library contains templates and sources that are broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    collected.append(docstring)
    return collected


def _sentences(docstring: str) -> list[str]:
    """The sentences of a docstring that have 5 to 60 words."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    flat = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs]
    sentences = [sentence for paragraph in flat for sentence in _SENTENCE_END.split(paragraph)]
    return [sentence for sentence in sentences if 5 <= len(sentence.split()) <= 60]
