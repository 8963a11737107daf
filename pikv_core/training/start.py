"""The model that training starts with: built from a recipe, or taken over from a trained one."""

from __future__ import annotations

from typing import Any

from pikv_core.schema import TrainRecipe
from pikv_core.training.architectures import build_model
from pikv_core.training.lessons.base import Lesson


def start_model(recipe: TrainRecipe, lesson: Lesson) -> Any:
    """Return the model of a run before its first step, float32 on the CPU."""
    return build_model(recipe.model, lesson.head, **lesson.model_options)
