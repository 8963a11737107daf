"""`pikv train`: train a model from a recipe, measure it on held-out data, and save what transformers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pikv_core.components import build
from pikv_core.data import TASKS
from pikv_core.data.source import Source
from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Run
from pikv_core.schema import TrainRecipe, TrainSettings
from pikv_core.training import hardware
from pikv_core.training.architectures import build_model
from pikv_core.training.checkpoint import drop_checkpoints
from pikv_core.training.curriculum import Curriculum
from pikv_core.training.gates import gates_of
from pikv_core.training.held_out import evaluate
from pikv_core.training.loop import Loop
from pikv_core.training.optimizers import Optimizers


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
    data, settings = recipe.data, recipe.train
    task = build(TASKS, data.task)
    if not hasattr(task, "open"):
        raise UsageError(f"data.task: '{data.task.name}' is no task to train on", hint="for example recall or text")
    source = task.open(data.path, recipe.seed, data.text, data.column, run.reporter)
    curriculum = Curriculum(settings, _check_batches(source, settings))
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, source.vocab_size).to(chosen.device)
    gates = gates_of(model, recipe.model)
    num_weights = sum(weight.numel() for weight in model.parameters())
    backends = {**chosen.describe(), "optimizer": settings.optimizer, "weights": f"{num_weights:,}"}
    run.reporter.status(", ".join(f"{name} {value}" for name, value in backends.items()))

    loop = Loop(run, model, source, gates, settings, chosen, curriculum, Optimizers(model, settings))
    num_steps, tokens_per_s = loop.train()
    if curriculum.has_answers and not curriculum.mastered:
        run.reporter.status(
            f"max_steps reached before the curriculum's end: {len(curriculum.state.stages)} of "
            f"{len(settings.curriculum)} lengths mastered"
        )
    metrics = evaluate(model, source, settings, gates, chosen)
    folder = _save_model(run.folder / "model", model, source)
    run.telemetry.metrics(num_steps, {f"test/{name}": value for name, value in metrics.items()})
    result = TrainResult(str(folder), metrics, num_steps, tokens_per_s, curriculum.state.stages)
    run.finish(result, backends)
    drop_checkpoints(run.folder)
    return result


def _save_model(folder: Path, model: Any, source: Source) -> Path:
    transformers.utils.logging.disable_progress_bar()
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        source.save(temporary)
    return folder


def _stored_result(run: Run) -> TrainResult | None:
    if not run.resumed:
        return None
    path = run.folder / "result.json"
    if not (path.is_file() and (run.folder / "model").is_dir()):
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))["result"]
    return TrainResult(**{**stored, "model": str(Path(run.folder) / "model")})


def _check_batches(source: Source, settings: TrainSettings) -> bool:
    """Draw one sample of every length, so that an impossible one is told first; return whether there are answers."""
    has_answers = False
    for split, lengths in (("train", settings.curriculum), ("test", settings.eval_lengths)):
        for length in lengths:
            batch = source.batch(np.random.default_rng(0), 1, length, split)
            has_answers = has_answers or bool(batch.answer_mask.any())
    return has_answers
