"""Fit the networks that `learned-scorer` goes by, and write them into a folder that `--calibration` takes."""

from __future__ import annotations

from dataclasses import dataclass

from pikv_core.errors import UsageError
from pikv_core.runs import Run, find_model, num_processes
from pikv_core.schema import TrainRecipe

CALIBRATION = "calibration"


@dataclass(frozen=True)
class TokenScorerResult:
    """model: whose tokens are scored. calibration: the folder to hand on. metrics: of held-out samples.

    num_tokens: that were read. tokens_per_s: of the fit, drawn from them for each head.
    """

    model: str
    calibration: str
    corpus: str
    metrics: dict[str, float]
    num_steps: int
    num_tokens: int
    num_weights: int
    tokens_per_s: float


def run(recipe: TrainRecipe, run: Run) -> TokenScorerResult:
    """Read, fit, measure on held-out samples, and save."""
    settings = recipe.token_scorer
    assert recipe.start is not None and settings is not None
    if num_processes() > 1:
        raise UsageError("fitting a scorer is the work of one process", hint="start it without torchrun")
    if run.resumed:
        raise UsageError(
            f"{run.folder}: fitting a scorer has no checkpoints to go on from",
            hint=f"start again with `pikv train --recipe {run.folder / 'recipe.yaml'}`",
        )
    find_model(recipe.start)

    from pikv_core.cache import calibration
    from pikv_core.model.loading import load_model
    from pikv_core.training import token_scorer
    from pikv_core.training.needles import open_needles

    loaded = load_model(recipe.start, recipe)
    loaded.check_length(2 * settings.num_context, run.reporter)
    needles, corpus = open_needles(loaded, settings.text, settings.column, recipe.seed, run.reporter)
    num_samples = min(settings.samples, token_scorer.most_samples(loaded.model, settings))
    if num_samples < settings.samples:
        run.reporter.status(f"memory for samples holds {num_samples} of {settings.samples}")
    run.reporter.status(f"{loaded.backend}; reading {num_samples} samples of {corpus}")
    lessons = token_scorer.gather(loaded.model, needles, settings, num_samples, recipe.seed, "train")
    fitted = token_scorer.learn(lessons, settings, run)
    held_out = token_scorer.gather(
        loaded.model, needles, settings, settings.eval_samples, token_scorer.EVALUATION_SEED, "test"
    )
    metrics = {"loss": fitted.loss, **token_scorer.measure(held_out, fitted.networks, recipe.seed)}
    folder = run.folder / CALIBRATION
    notes = {name: getattr(settings, name) for name in ("length", "context", "width", "steps")}
    calibration.save(
        folder,
        loaded.source,
        loaded.model,
        calibration.Corpus(source=corpus, sha256=lessons.sha256, num_tokens=lessons.num_tokens),
        [
            calibration.Member(
                "learned-scorer", "policy", options={}, tensors=fitted.networks, notes={**notes, "measured": metrics}
            )
        ],
    )
    run.telemetry.metrics(settings.steps, {f"test/{name}": value for name, value in metrics.items()})
    result = TokenScorerResult(
        model=loaded.source,
        calibration=str(folder),
        corpus=corpus,
        metrics=metrics,
        num_steps=settings.steps,
        num_tokens=lessons.num_tokens,
        num_weights=sum(x.numel() for x in fitted.networks.values()),
        tokens_per_s=fitted.tokens_per_s,
    )
    run.finish(result, {"attention": loaded.backend})
    return result
