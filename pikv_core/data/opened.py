"""The files of a task that a model is to train on: a folder of gen-data, or made now in one that is then removed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_core.data.manifest import agree, read_manifest, read_options
from pikv_core.errors import UsageError

if TYPE_CHECKING:
    from pikv_core.runs import Reporter


@contextmanager
def opened(
    task: Any,
    path: str | None,
    seed: int,
    text: list[str],
    column: str | None,
    reporter: Reporter,
    num_samples: int,
    of_training: Iterable[str] = (),
) -> Iterator[tuple[Path, Any]]:
    """Yield a folder that the task wrote, and the task as it was written; num_samples: to make where there is no path.

    of_training: names of options that the files do not depend on, which are as `task` has them. The folder of a path
    has the other ones in NAME.json. Raises UsageError for text beside a path, PiKVError where the two disagree.
    """
    given = {name: getattr(task, name) for name in of_training}
    if path is None:
        with tempfile.TemporaryDirectory() as temporary:
            _of_data(task, given).write(Path(temporary), num_samples, seed, text, column, reporter)
            yield Path(temporary), task
        return
    if text or column is not None:
        raise UsageError(f"text: the data in {path} bring their own", hint="drop the text, or the path")
    folder = Path(path)
    read_manifest(folder, task.name)
    file = folder / f"{task.name}.json"
    written = read_options(file, type(task))
    agree(_of_data(task, given), _of_data(written, given), file)
    yield folder, dataclasses.replace(written, **given)


def refuse_of_training(task: Any, of_training: Iterable[str]) -> None:
    """Raise UsageError where data are to be written with options that they do not depend on."""
    if task != _of_data(task, of_training):
        raise UsageError(f"{', '.join(of_training)}: nothing of the data depends on these", hint="give them to train")


def _of_data(task: Any, of_training: Iterable[str]) -> Any:
    """Return the task with these options at their defaults."""
    names = set(of_training)
    return dataclasses.replace(task, **{one.name: one.default for one in dataclasses.fields(task) if one.name in names})
