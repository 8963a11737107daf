"""Descriptions of parameters in the standard library's docstrings, as spans: `timeout -- seconds to wait`.

What is described has to be a parameter of the function in its source, so that other lists are not taken for it.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass

from pikv_core.data import stdlib_text

# `name: text`, `name -- text`, `name - text`, perhaps after a bullet or `:param`.
ENTRY = re.compile(
    r"^(?P<indent> *)(?:[-*] +)?(?::param +)?[`'\"*]{0,2}(?P<name>[A-Za-z_]\w*)[`'\"*]{0,2}(?: *:| +--?) +(?=[^\s>=])",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Described:
    """A docstring, a parameter of the function or class that it is of, and the span of its description."""

    context: str
    function: str
    parameter: str
    start: int
    end: int


@functools.cache
def read() -> tuple[Described, ...]:
    """Return every description in the standard library, in a fixed order, each docstring's once."""
    found: dict[str, list[Described]] = {}
    for _, tree in stdlib_text.trees():
        for node in stdlib_text.definitions(tree):
            names = parameters(node)
            text = stdlib_text.docstring(node) if names else None
            if text and not isinstance(node, ast.Module):
                found.setdefault(" ".join(text.split()), describe(text, node.name, names))
    return tuple(one for described in found.values() for one in described)


def parameters(node: stdlib_text.Definition) -> set[str]:
    """Return the names of a function's parameters, or of those of a class's `__init__`; none of a module."""
    if isinstance(node, ast.ClassDef):
        return set().union(
            *(parameters(one) for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")
        )
    if isinstance(node, ast.Module):
        return set()
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {one.arg for one in every if one is not None} - {"self", "cls"}


def describe(text: str, function: str, names: set[str]) -> list[Described]:
    """Return the descriptions of parameters, each up to a blank line or one that is not indented further.

    A parameter that is described twice is left out, and one whose text breaks off: within brackets, at a comma.
    """
    entries = [entry for entry in ENTRY.finditer(text) if entry["name"] in names]
    spans: dict[str, list[tuple[int, int]]] = {}
    for entry in entries:
        deeper = re.compile(rf"[^\n]*(?:\n {{{len(entry['indent']) + 1},}}\S[^\n]*)*")
        lines = deeper.match(text, entry.end())
        assert lines is not None
        # An entry indented under another is one of its own.
        inner = [other.start() for other in entries if entry.end() <= other.start() < lines.end()]
        end = min([lines.end(), *inner])
        spans.setdefault(entry["name"], []).append((entry.end(), entry.end() + len(text[entry.end() : end].rstrip())))
    return [
        Described(text, function, name, *found[0])
        for name, found in spans.items()
        if len(found) == 1 and _is_whole(text[slice(*found[0])])
    ]


def _is_whole(description: str) -> bool:
    return description.count("(") == description.count(")") and not description.endswith(",")
