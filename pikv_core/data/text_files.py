"""Documents from files and folders of users: txt and md, and a column of jsonl and parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError, UsageError

DEFAULT_COLUMN = "text"
PART_CHARACTERS = 2000


def read(paths: list[str], column: str | None = None) -> list[str]:
    """Return the documents of files and folders, in order; a row of a table is one document.

    column: of jsonl and parquet, "text" unless given. Raises PiKVError naming the file, and the line.
    """
    files = [file for path in paths for file in _files(Path(path))]
    if column is not None and not any(file.suffix.lower() in TABLES for file in files):
        raise UsageError(
            f"column: '{column}' names a column of jsonl and parquet files, but no such file is given",
            hint="drop --column",
        )
    documents: list[str] = []
    for file in files:
        reader = READERS.get(file.suffix.lower())
        table = TABLES.get(file.suffix.lower())
        try:
            if table is not None:
                documents += table(file, column or DEFAULT_COLUMN)
            elif reader is not None:
                documents += reader(file)
        except OSError as error:
            raise PiKVError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not any(document.strip() for document in documents):
        raise PiKVError(f"{', '.join(paths)}: no text found", hint=_allowed())
    return documents


def refuse(task: str, paths: list[str], column: str | None) -> None:
    """Raise UsageError where a task that is made without text got some."""
    if paths or column:
        got = f"text '{paths[0]}'" if paths else f"column '{column}'"
        raise UsageError(f"task '{task}' is made without text, got {got}", hint="drop --text and --column")


def _allowed() -> str:
    return f"a text file is one of: {', '.join((*READERS, *TABLES))}"


def _files(path: Path) -> list[Path]:
    known = {*READERS, *TABLES}
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
        if not found:
            raise PiKVError(f"{path}: no text found in the folder", hint=_allowed())
        return found
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder", hint="give --text a file or a folder")
    if path.suffix.lower() not in known:
        raise UsageError(f"{path}: unknown kind of text file '{path.suffix}'", hint=_allowed())
    return [path]


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PiKVError(
            f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8", hint="convert the file to UTF-8"
        ) from error


def _plain(file: Path) -> Iterator[str]:
    """Cut a text at blank lines into parts of about PART_CHARACTERS, so that one long file can be split."""
    part = ""
    for paragraph in _decode(file).replace("\r\n", "\n").split("\n\n"):
        part = f"{part}\n\n{paragraph}" if part else paragraph
        if len(part) >= PART_CHARACTERS:
            yield part
            part = ""
    if part:
        yield part


def _jsonl(file: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PiKVError(f"{file}:{number}: not valid JSON: {error.msg}, column {error.colno}") from error
        if not isinstance(row, dict):
            raise PiKVError(f"{file}:{number}: expected an object with the key '{column}'")
        if column not in row:
            raise _missing(f"{file}:{number}", column, list(row))
        yield _cell(row[column], f"{file}:{number}: {column}")


def _parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise _missing(str(file), column, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _cell(value, f"{file}: row {number}: {column}")
    except pyarrow.ArrowException as error:
        raise PiKVError(f"{file}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _missing(where: str, column: str, present: list[str]) -> PiKVError:
    return PiKVError(
        f"{where}: no column '{column}'; present: {', '.join(map(repr, present)) or 'none'}",
        hint="name the column that holds the text with --column",
    )


def _cell(value: Any, where: str) -> str:
    """Return the text of a cell; an empty cell is an empty document, which is dropped later."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PiKVError(f"{where}: expected text, got {type(value).__name__}")
    return value


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _plain, ".md": _plain}
TABLES: dict[str, Callable[[Path, str], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet}
