"""The embedded corpus: CPython's language topics and the docstrings of its library, read, never imported."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from pikv_core.errors import PiKVError

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
MIN_CHARACTERS = 40


def read() -> list[str]:
    """Return the documents in a fixed order: about 2 million characters in a few seconds."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = [*_topics(library / "pydoc_data" / "topics.py")]
    for file in _sources(library):
        documents += _docstrings(file)
    if not documents:
        raise PiKVError(f"{library}: no text found in the standard library", hint="give text of yours with --text")
    return documents


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if entry.name not in SKIPPED:
                yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


def _parse(file: Path) -> ast.Module | None:
    """Return the tree of a source; None for the few that are templates, not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _topics(file: Path) -> Iterator[str]:
    tree = _parse(file) if file.is_file() else None
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
            yield from ast.literal_eval(statement.value).values()


def _docstrings(file: Path) -> Iterator[str]:
    if b'"""' not in file.read_bytes():
        return
    pending: list[ast.AST] = [tree] if (tree := _parse(file)) else []
    while pending:
        node = pending.pop()
        text = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
        if text and len(cleaned := inspect.cleandoc(text)) >= MIN_CHARACTERS:
            yield cleaned
        pending += [
            child
            for child in reversed(node.body)  # type: ignore[attr-defined]
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
