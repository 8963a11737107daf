"""`pikv train`: train a model from a recipe, measure it on held-out data, and save what transformers loads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pikv_core.runs import Run
from pikv_core.schema import TrainRecipe
from pikv_core.training import hardware
from pikv_core.training.checkpoint import drop_checkpoints
from pikv_core.training.compressed_context import compressed_attention
from pikv_core.training.curriculum import Curriculum
from pikv_core.training.distillation import Distillation
from pikv_core.training.gates import gates_of
from pikv_core.training.loop import Loop
from pikv_core.training.lora import add_adapter
from pikv_core.training.opening import open_lesson
from pikv_core.training.optimizers import Optimizers
from pikv_core.training.products import save_adapter, save_model
from pikv_core.training.router_log import draw_load
from pikv_core.training.start import start_model
from pikv_core.training.team import Team


@dataclass(frozen=True)
class TrainResult:
    """model: the folder for AutoModelForCausalLM. tokens_per_s: of the last process. stages: lengths mastered.

    num_weights: the model's, num_trainable those that learned. adapter: the folder for peft, adapter_bytes what its
    weights take there; None without one.
    """

    model: str
    metrics: dict[str, float]
    num_steps: int
    tokens_per_s: float
    stages: list[dict[str, Any]]
    num_weights: int
    num_trainable: int
    adapter: str | None = None
    adapter_bytes: int | None = None


def run(recipe: TrainRecipe, run: Run) -> TrainResult | None:
    """Train, or go on where the run folder's checkpoint left off; the recipe is checked before any file is made.

    Under torchrun the ranks share every step; rank 0 alone measures the end, saves and returns a result.
    """
    finished = _stored_result(run)
    if finished is not None:
        run.reporter.status(f"{run.folder}: the run is finished; this is its result")
        return finished
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    chosen, settings = hardware.choose(recipe.device, recipe.dtype), recipe.train
    with Team.of_torchrun(chosen.device, settings.parallel.expert_ranks) as team:
        return _train(recipe, run, chosen, team)


def _train(recipe: TrainRecipe, run: Run, chosen: hardware.Hardware, team: Team) -> TrainResult | None:
    settings = recipe.train
    lesson, tokenizer = open_lesson(recipe, run.reporter)
    team.check_rows(lesson, recipe.seed, settings.curriculum)
    curriculum = Curriculum(settings, lesson.has_answers)
    torch.manual_seed(recipe.seed)
    model = start_model(recipe, lesson)
    adapter = None if settings.lora is None else add_adapter(model, settings.lora, lesson.head)
    num_weights, num_trainable = _count(model)
    model.to(chosen.device)
    team.share_experts(model)
    gates = gates_of(model, recipe.model.balance_loss, recipe.model.z_loss)
    distil = settings.distill
    distillation = None if distil is None else Distillation.load(distil, lesson, model, chosen)
    beside = None if distillation is None else dict(distillation.named_parameters())
    optimizers = Optimizers(model, settings, beside, team)
    loop = Loop(run, model, lesson, gates, settings, chosen, curriculum, optimizers, distillation, team=team)
    told = f"{num_weights:,}" if num_trainable == num_weights else f"{num_trainable:,} of {num_weights:,}"
    backends = {**chosen.describe(), **team.describe(), "optimizer": settings.optimizer, "weights": told}
    run.reporter.status(", ".join(f"{name} {value}" for name, value in backends.items()))

    with nullcontext() if settings.cache is None else compressed_attention(model, settings.cache) as loop.context:
        if settings.cache is not None:  # a lesson without a context says so before anything is written
            lesson.context(model, lesson.batch(recipe.seed, 0, curriculum.length(0)))
        if settings.init_from is not None and not run.resumed:
            loop.log_start()
        num_steps, tokens_per_s = loop.train()
    team.unite_experts(model)
    if not team.leave():
        return None
    if team.count > 1:
        gates = gates_of(model, recipe.model.balance_loss, recipe.model.z_loss)
    if curriculum.has_stages and not curriculum.mastered:
        run.reporter.status(
            f"max_steps reached before the curriculum's end: {len(curriculum.state.stages)} of "
            f"{len(settings.curriculum)} lengths mastered"
        )
    adapted = (None, None) if adapter is None else save_adapter(run.folder, adapter, recipe)
    metrics = lesson.evaluate(model.eval(), gates, chosen)
    folder = save_model(run.folder, model if adapter is None else adapter.take_out(), lesson, tokenizer)
    result = TrainResult(
        folder, metrics, num_steps, tokens_per_s, curriculum.state.stages, num_weights, num_trainable, *adapted
    )
    tested = {f"test/{name}": value for name, value in metrics.items()}
    run.telemetry.metrics(num_steps, tested)
    run.telemetry.hyperparameters(recipe.model_dump(), tested)
    draw_load(run.telemetry)
    run.finish(result, backends)
    drop_checkpoints(run.folder)
    return result


def _count(model: Any) -> tuple[int, int]:
    """Return the number of weights, and of those that learn."""
    weights = list(model.parameters())
    return sum(weight.numel() for weight in weights), sum(weight.numel() for weight in weights if weight.requires_grad)


def _stored_result(run: Run) -> TrainResult | None:
    if not run.resumed:
        return None
    path = run.folder / "result.json"
    if not (path.is_file() and (run.folder / "model").is_dir()):
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))["result"]
    return TrainResult(**{**stored, "model": str(Path(run.folder) / "model")})
