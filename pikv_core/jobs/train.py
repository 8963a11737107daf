"""`pikv train`: train a model from a recipe, measure it on held-out data, and save what transformers loads."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pikv_core.components import build
from pikv_core.data import TASKS
from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Reporter, Run, find_model
from pikv_core.schema import TrainRecipe
from pikv_core.training import hardware
from pikv_core.training.checkpoint import drop_checkpoints
from pikv_core.training.compressed_context import compressed_attention
from pikv_core.training.curriculum import Curriculum
from pikv_core.training.distillation import Distillation
from pikv_core.training.gates import Gates, gates_of
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import Lesson
from pikv_core.training.loop import Loop
from pikv_core.training.lora import Adapter, add_adapter
from pikv_core.training.optimizers import Optimizers
from pikv_core.training.router_log import draw_load
from pikv_core.training.start import check_tokens, checkpoint_tokenizer, start_model


@dataclass(frozen=True)
class TrainResult:
    """model: the folder for AutoModelForCausalLM. tokens_per_s: of the last process. stages: lengths mastered.

    weights: the model's, trainable_weights those that learned. adapter: the folder for peft, adapter_bytes what its
    weights take there; None without one.
    """

    model: str
    metrics: dict[str, float]
    num_steps: int
    tokens_per_s: float
    stages: list[dict[str, Any]]
    weights: int | None = None
    trainable_weights: int | None = None
    adapter: str | None = None
    adapter_bytes: int | None = None


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
    lesson, tokenizer = _open(recipe, run.reporter)
    curriculum = Curriculum(settings, lesson.has_answers)
    torch.manual_seed(recipe.seed)
    model = start_model(recipe, lesson)
    adapter = None if settings.lora is None else add_adapter(model, settings.lora, lesson.head)
    model.to(chosen.device)
    gates = gates_of(model, recipe.model.balance_loss, recipe.model.z_loss)
    num_weights, num_trainable = _count(model.parameters())
    told_weights = f"{num_weights:,}" if num_trainable == num_weights else f"{num_trainable:,} of {num_weights:,}"
    backends = {**chosen.describe(), "optimizer": settings.optimizer, "weights": told_weights}
    run.reporter.status(", ".join(f"{name} {value}" for name, value in backends.items()))

    teach = settings.distill
    distillation = None if teach is None else Distillation.load(teach, lesson, model, chosen)
    optimizers = Optimizers(model, settings, [] if distillation is None else distillation.parameters())
    loop = Loop(run, model, lesson, gates, settings, chosen, curriculum, optimizers, distillation)
    if settings.init_from is not None and not run.resumed:
        before = _measure(lesson, model, gates, chosen)
        run.telemetry.metrics(0, {f"start/{name}": value for name, value in before.items()})
    with nullcontext() if settings.cache is None else compressed_attention(model, settings.cache) as loop.context:
        num_steps, tokens_per_s = loop.train()
    if curriculum.has_stages and not curriculum.mastered:
        run.reporter.status(
            f"max_steps reached before the curriculum's end: {len(curriculum.state.stages)} of "
            f"{len(settings.curriculum)} lengths mastered"
        )
    adapter_bytes = None if adapter is None else _save_adapter(run.folder, adapter, recipe)
    metrics = lesson.evaluate(model.eval(), gates, chosen)
    if adapter is not None:
        model = adapter.take_out()
    folder = _save_model(run.folder / "model", model, lesson, tokenizer)
    told = {f"test/{name}": value for name, value in metrics.items()}
    run.telemetry.metrics(num_steps, told)
    run.telemetry.hyperparameters(flat(recipe.model_dump()), told)
    draw_load(run.telemetry)
    result = TrainResult(
        str(folder),
        metrics,
        num_steps,
        tokens_per_s,
        curriculum.state.stages,
        num_weights,
        num_trainable,
        None if adapter is None else str(run.folder / "adapter"),
        adapter_bytes,
    )
    run.finish(result, backends)
    drop_checkpoints(run.folder)
    return result


def _open(recipe: TrainRecipe, reporter: Reporter) -> tuple[Lesson, Any]:
    """Return the lesson of the recipe's task over its data, read or made, and the tokenizer of train.init_from.

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


def _count(weights: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Return the number of weights, and of those that learn."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in weights]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def _measure(lesson: Lesson, model: Any, gates: Gates, chosen: hardware.Hardware) -> dict[str, float]:
    """Return the held-out metrics in mid-training, which leave no trace in it."""
    with torch.random.fork_rng():
        metrics = lesson.evaluate(model.eval(), gates, chosen)
    gates.reset()
    return metrics


def flat(tree: dict[str, Any], above: str = "") -> dict[str, str | float | bool]:
    """Return the settings of a recipe by dotted key; what is neither number nor text is told as text."""
    found: dict[str, str | float | bool] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        elif value is not None:
            found[above + name] = value if isinstance(value, int | float | str) else str(value)
    return found


def _save_model(folder: Path, model: Any, lesson: Lesson, tokenizer: Any) -> Path:
    transformers.utils.logging.disable_progress_bar()
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        lesson.save(temporary)
        if tokenizer is not None:  # with what ours do not know of, such as a chat template
            tokenizer.save_pretrained(temporary)
    return folder


def _save_adapter(folder: Path, adapter: Adapter, recipe: TrainRecipe) -> int:
    """Save the adapter, then merge it where the recipe says so; return the bytes of its weights."""
    base: str | None = str(folder / "model")
    if adapter.settings.merge:  # what it belongs to is then not in this run
        base = None if recipe.builds else find_model(str(recipe.train.init_from))
    with replacing(folder / "adapter") as temporary:
        num_bytes = adapter.save(temporary, base)
    if adapter.settings.merge:
        adapter.merge()
    return num_bytes


def _stored_result(run: Run) -> TrainResult | None:
    if not run.resumed:
        return None
    path = run.folder / "result.json"
    if not (path.is_file() and (run.folder / "model").is_dir()):
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))["result"]
    return TrainResult(**{**stored, "model": str(Path(run.folder) / "model")})
