"""Learn the head gates that `duo-attention` goes by, and write them into a folder that `--calibration` takes."""

from __future__ import annotations

from dataclasses import dataclass

from pikv_core.errors import UsageError
from pikv_core.runs import Run, find_model, num_processes
from pikv_core.schema import TrainRecipe

CALIBRATION = "calibration"


@dataclass(frozen=True)
class DuoGatesResult:
    """model: whose heads they are. calibration: the folder to hand on. gates: of each key/value head, by layer."""

    model: str
    calibration: str
    corpus: str
    metrics: dict[str, float]
    gates: list[list[float]]
    num_steps: int
    num_tokens: int
    tokens_per_s: float


def run(recipe: TrainRecipe, run: Run) -> DuoGatesResult:
    """Learn, measure on held-out samples, and save."""
    settings = recipe.duo_gates
    assert recipe.start is not None and settings is not None
    if num_processes() > 1:
        raise UsageError("learning gates is the work of one process", hint="start it without torchrun")
    if run.resumed:
        raise UsageError(
            f"{run.folder}: learning gates has no checkpoints to go on from",
            hint=f"start again with `pikv train --recipe {run.folder / 'recipe.yaml'}`",
        )
    find_model(recipe.start)

    import numpy as np

    from pikv_core.cache import calibration
    from pikv_core.model.loading import load_model
    from pikv_core.training.duo_gates import learn, measure
    from pikv_core.training.needles import open_needles

    loaded = load_model(recipe.start, recipe)
    loaded.check_length(settings.length, run.reporter)
    needles, corpus = open_needles(loaded, settings.text, settings.column, recipe.seed, run.reporter)
    for split in ("train", "test"):
        needles.batch(np.random.default_rng(0), 1, settings.length, split)  # an impossible sample is told first
    run.reporter.status(f"{loaded.backend}; {corpus}")
    learned = learn(loaded.model, needles, settings, run)
    metrics = measure(loaded.model, needles, settings, learned.gates)
    folder = run.folder / CALIBRATION
    calibration.save(
        folder,
        loaded.source,
        loaded.model,
        calibration.Corpus(source=corpus, sha256=learned.sha256, num_tokens=learned.num_tokens),
        [
            calibration.Member(
                "duo-attention",
                "policy",
                options={"sinks": settings.sinks, "recent": settings.recent},
                tensors={"gates": learned.gates},
                notes={"l1": settings.l1, "length": settings.length, "steps": settings.steps, "measured": metrics},
            )
        ],
    )
    run.telemetry.metrics(settings.steps, {f"test/{name}": value for name, value in metrics.items()})
    result = DuoGatesResult(
        model=loaded.source,
        calibration=str(folder),
        corpus=corpus,
        metrics=metrics,
        gates=[[round(gate, 6) for gate in heads] for heads in learned.gates.tolist()],
        num_steps=settings.steps,
        num_tokens=learned.num_tokens,
        tokens_per_s=learned.tokens_per_s,
    )
    run.finish(result, {"attention": loaded.backend})
    return result
