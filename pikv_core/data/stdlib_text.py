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

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read() -> list[str]:
    """Return the documents in a fixed order: about 2 million characters in a few seconds."""
    library = _library()
    documents = [*_topics(library / "pydoc_data" / "topics.py")]
    documents += [text for _, tree in trees() for node in definitions(tree) if (text := docstring(node))]
    if not documents:
        raise PiKVError(f"{library}: no text found in the standard library", hint="give text of yours with --text")
    return documents


def trees(folder: Path | None = None) -> Iterator[tuple[str, ast.Module]]:
    """Yield the dotted name and the tree of each source that may hold docstrings, in a fixed order.

    folder: of the sources; the standard library's unless given.
    """
    library = folder or _library()
    for file in _sources(library):
        if b'"""' in file.read_bytes() and (tree := _parse(file)):
            yield ".".join(file.relative_to(library).with_suffix("").parts), tree


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Yield a module, its classes and functions, and theirs, in the order of the source."""
    pending: list[Definition] = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending += [
            child
            for child in reversed(node.body)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]


def docstring(node: Definition) -> str | None:
    """Return the docstring without its indentation; None where there is none, or next to nothing in it."""
    text = ast.get_docstring(node, clean=False)
    return cleaned if text and len(cleaned := inspect.cleandoc(text)) >= MIN_CHARACTERS else None


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


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
