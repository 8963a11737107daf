"""`pikv train`: train a model from a recipe, measure it on held-out data, and save what transformers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pikv_core.components import build
from pikv_core.data import TASKS
from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Reporter, Run
from pikv_core.schema import TrainRecipe
from pikv_core.training import hardware
from pikv_core.training.checkpoint import drop_checkpoints
from pikv_core.training.curriculum import Curriculum
from pikv_core.training.distillation import Distillation
from pikv_core.training.gates import gates_of
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import Lesson
from pikv_core.training.loop import Loop
from pikv_core.training.optimizers import Optimizers
from pikv_core.training.router_log import draw_load
from pikv_core.training.start import start_model


@dataclass(frozen=True)
class TrainResult:
    """model: the folder for AutoModelForCausalLM. tokens_per_s: of the last process. stages: lengths mastered."""

    model: str
    metrics: dict[str, float]
    num_steps: int
    tokens_per_s: float
    stages: list[dict[str, Any]]


def run(recipe: TrainRecipe, run: Run) -> TrainResult:
    """Train, or go on where the run folder's checkpoint left off; the recipe is checked before any file is made."""
    finished = _stored_result(run)
    if finished is not None:
        run.reporter.status(f"{run.folder}: the run is finished; this is its result")
        return finished
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    chosen = hardware.choose(recipe.device, recipe.dtype)
    settings = recipe.train
    lesson = _open(recipe, run.reporter)
    curriculum = Curriculum(settings, lesson.has_answers)
    torch.manual_seed(recipe.seed)
    model = start_model(recipe, lesson).to(chosen.device)
    gates = gates_of(model, recipe.model.balance_loss, recipe.model.z_loss)
    num_weights = sum(weight.numel() for weight in model.parameters())
    backends = {**chosen.describe(), "optimizer": settings.optimizer, "weights": f"{num_weights:,}"}
    run.reporter.status(", ".join(f"{name} {value}" for name, value in backends.items()))

    teach = settings.distill
    distillation = None if teach is None else Distillation.load(teach, lesson, model, chosen)
    optimizers = Optimizers(model, settings, [] if distillation is None else distillation.parameters())
    loop = Loop(run, model, lesson, gates, settings, chosen, curriculum, optimizers, distillation)
    num_steps, tokens_per_s = loop.train()
    if curriculum.has_answers and not curriculum.mastered:
        run.reporter.status(
            f"max_steps reached before the curriculum's end: {len(curriculum.state.stages)} of "
            f"{len(settings.curriculum)} lengths mastered"
        )
    metrics = lesson.evaluate(model.eval(), gates, chosen)
    folder = _save_model(run.folder / "model", model, lesson)
    told = {f"test/{name}": value for name, value in metrics.items()}
    run.telemetry.metrics(num_steps, told)
    run.telemetry.hyperparameters(flat(recipe.model_dump()), told)
    draw_load(run.telemetry)
    result = TrainResult(str(folder), metrics, num_steps, tokens_per_s, curriculum.state.stages)
    run.finish(result, backends)
    drop_checkpoints(run.folder)
    return result


def _open(recipe: TrainRecipe, reporter: Reporter) -> Lesson:
    """Return the lesson of the recipe's task over its data, read or made."""
    data = recipe.data
    task = build(TASKS, data.task)
    if not hasattr(task, "open"):
        raise UsageError(f"data.task: '{data.task.name}' is no task to train on", hint="for example recall or text")
    source = task.open(data.path, recipe.seed, data.text, data.column, reporter)
    return LESSONS[source.lesson](source, recipe.train)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, str | float | bool]:
    """Return the settings of a recipe by dotted key; what is neither number nor text is told as text."""
    found: dict[str, str | float | bool] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        elif value is not None:
            found[above + name] = value if isinstance(value, int | float | str) else str(value)
    return found


def _save_model(folder: Path, model: Any, lesson: Lesson) -> Path:
    transformers.utils.logging.disable_progress_bar()
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        lesson.save(temporary)
    return folder


def _stored_result(run: Run) -> TrainResult | None:
    if not run.resumed:
        return None
    path = run.folder / "result.json"
    if not (path.is_file() and (run.folder / "model").is_dir()):
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))["result"]
    return TrainResult(**{**stored, "model": str(Path(run.folder) / "model")})
