"""What a training run leaves: the model's folder, and the adapter's where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from pikv_core.files import replacing
from pikv_core.runs import find_model
from pikv_core.schema import TrainRecipe
from pikv_core.training.lessons.base import Lesson
from pikv_core.training.lora import Adapter


def save_model(folder: Path, model: Any, lesson: Lesson, tokenizer: Any) -> str:
    """Write `folder/model`, which transformers loads, with what its lesson needs beside it; return where it is."""
    transformers.utils.logging.disable_progress_bar()
    with replacing(folder / "model") as temporary:
        model.save_pretrained(temporary)
        lesson.save(temporary)
        if tokenizer is not None:  # with what ours do not know of, such as a chat template
            tokenizer.save_pretrained(temporary)
    return str(folder / "model")


def save_adapter(folder: Path, adapter: Adapter, recipe: TrainRecipe) -> tuple[str, int]:
    """Write `folder/adapter`, then merge it where the recipe says so; return its place and the bytes of its weights."""
    base: str | None = str(folder / "model")
    if adapter.settings.merge:  # what it belongs to is then not in this run
        base = None if recipe.builds else find_model(str(recipe.train.init_from))
    with replacing(folder / "adapter") as temporary:
        num_bytes = adapter.save(temporary, base)
    if adapter.settings.merge:
        adapter.merge()
    return str(folder / "adapter"), num_bytes
