"""What the code of a class does with its attributes, read from its source.

The source is parsed (``ast``), never matched against byte code: byte code differs from one version of Python to the next.
If the source of a function cannot be found, ``names_in`` still says which names its code mentions, in every version.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import textwrap
from collections.abc import Iterator
from types import CodeType
from typing import Any

_log = logging.getLogger(__name__)


def functions_of(kind: Any) -> Iterator[tuple[str, Any]]:
    """Name and function of every method that a class or one of its bases defines, overridden ones too."""
    for owner in kind.__mro__:
        for name, function in vars(owner).items():
            if inspect.isfunction(function):
                yield name, inspect.unwrap(function)


def names_in(function: Any) -> frozenset[str]:
    """Attributes and global names that the code of a function mentions, nested functions included. Empty for built-ins."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else _names(code)


def _names(code: CodeType) -> frozenset[str]:
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*nested)


@functools.cache
def tree_of(function: Any) -> ast.AST | None:
    """The syntax tree of a function; None, and a note in the log, if its source cannot be found."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        _log.debug("%s has no source to read", getattr(function, "__qualname__", function))
        return None


def attribute_of_self(node: ast.AST) -> str | None:
    """``"up"`` for the node ``self.up``, None for any other."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None
