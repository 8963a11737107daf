"""From a recipe to its lesson: the task's data, read or made, in the tokens of the model that is gone on with."""

from __future__ import annotations

import inspect
from typing import Any

from pikv_core.components import build
from pikv_core.data import TASKS
from pikv_core.errors import UsageError
from pikv_core.runs import Reporter
from pikv_core.schema import TrainRecipe
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import Lesson
from pikv_core.training.start import check_tokens, checkpoint_tokenizer


def open_lesson(recipe: TrainRecipe, reporter: Reporter) -> tuple[Lesson, Any]:
    """Return the lesson of the recipe's task, and the tokenizer of train.init_from.

    Of a new model, or one that reads no tokens, that is None. Tasks that take a tokenizer get it; all have its tokens.
    """
    data = recipe.data
    task = build(TASKS, data.task)
    if not hasattr(task, "open"):
        raise UsageError(f"data.task: '{data.task.name}' is no task to train on", hint="for example recall or text")
    name = recipe.train.init_from
    given, tokenizer = {}, None
    if name is not None and "tokenizer" in inspect.signature(task.open).parameters:
        tokenizer = checkpoint_tokenizer(name)
        given["tokenizer"] = tokenizer.backend_tokenizer
    source = task.open(data.path, recipe.seed, data.text, data.column, reporter, **given)
    if name is not None and hasattr(source, "tokenizer"):
        tokenizer = tokenizer or checkpoint_tokenizer(name)
        check_tokens(name, tokenizer, source)
    return LESSONS[source.lesson](source, recipe.train), tokenizer
