"""Train the routers that `moe-router` goes by, and write them into a folder that `--calibration` takes."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Run, find_model, num_processes
from pikv_core.scheduling import POLICIES
from pikv_core.schema import PolicyRouterSettings, TrainRecipe

if TYPE_CHECKING:
    import torch

    from pikv_core.scheduling.moe_router import MoERouter

CALIBRATION, CHOICES = "calibration", "choices.png"


@dataclass(frozen=True)
class PolicyRouterResult:
    """model: whose cache is routed. calibration: the folder to hand on. metrics: of held-out prompts, costs in nats.

    usage: how often each layer's router takes each of the strategies there. best_single: in validation, the strategy to
    improve on; aversion and margin: see `policy_router.hedge`. num_tokens: of the prompts trained on. tokens_per_s: of
    those, every round's, over all.
    """

    model: str
    calibration: str
    corpus: str
    metrics: dict[str, float]
    strategies: list[str]
    usage: list[list[float]]
    num_steps: int
    best_single: str
    aversion: float | None
    margin: float
    num_tokens: int
    tokens_per_s: float


def run(recipe: TrainRecipe, run: Run) -> PolicyRouterResult:
    """Measure what strategies cost, train, measure on held-out prompts, and save."""
    settings = recipe.policy_router
    assert recipe.start is not None and settings is not None
    if num_processes() > 1:
        raise UsageError("training a policy's routers is the work of one process", hint="start it without torchrun")
    if run.resumed:
        raise UsageError(
            f"{run.folder}: training a policy's routers has no checkpoints to go on from",
            hint=f"start again with `pikv train --recipe {run.folder / 'recipe.yaml'}`",
        )
    find_model(recipe.start)
    policy = _policy(settings)

    from pikv_core.cache import calibration
    from pikv_core.cache.calibration import layer_shapes
    from pikv_core.model.loading import load_model
    from pikv_core.scheduling.moe_router import num_features
    from pikv_core.training import policy_router, router_lessons
    from pikv_core.training.needles import open_needles
    from pikv_core.training.strategy_picture import HEIGHT, WIDTH, draw_choices

    loaded = load_model(recipe.start, recipe)
    model = loaded.model
    loaded.check_length(settings.length, run.reporter)
    calibration.check_model(settings.calibration, model)
    learnt = _learnt(policy, settings, model.config)
    needles, corpus = open_needles(loaded, settings.text, settings.column, recipe.seed, run.reporter)
    width = num_features(layer_shapes(model.config)[0].head_dim)
    start = policy_router.untrained(model, policy, learnt, recipe.seed, width)
    options = {"strategies": list(policy.strategies), "router": policy.router, "mode": policy.mode}
    kinds = " and ".join(router_lessons.domains(needles))
    run.reporter.status(f"{loaded.backend}; {settings.samples} prompts of {kinds}: {corpus}")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:  # a cache takes what was fitted from a folder alone
        folder = str(Path(temporary) / CALIBRATION)
        member = calibration.Member("moe-router", "policy", options, start)
        nothing = calibration.Corpus(source="", sha256="", num_tokens=0)
        calibration.save(folder, loaded.source, model, nothing, [member])
        cache: dict[str, Any] = {"policy": {"name": "moe-router", **options}, "calibration": [folder]}
        prompts = partial(router_lessons.held_prompts, model, cache, needles, settings)
        validation = partial(prompts, settings.validation_samples, policy_router.VALIDATION_SEED, "train")
        best = policy_router.best_single(validation())
        others = router_lessons.always(best)
        for _ in range(settings.rounds):
            lessons = router_lessons.gather(prompts(settings.samples, recipe.seed, "train"), others)
            learnt_by = (lessons, policy, start, settings, run, best)
            by_aversion = {aversion: policy_router.learn(*learnt_by, aversion) for aversion in settings.aversions}
            fitted, aversion, margin = policy_router.hedge(validation(), policy, by_aversion, best)
            others = policy_router.choice(policy, fitted)
        unseen = prompts(settings.eval_samples, policy_router.EVALUATION_SEED, "test")
        metrics, chosen, kinds_of = policy_router.measure(unseen, policy, fitted, start, recipe.seed)
    usage = policy_router.usage(chosen)
    picture = draw_choices(chosen, kinds_of, policy.strategies)
    with replacing(run.folder / CHOICES) as temporary:
        temporary.write_bytes(picture)
    run.telemetry.image("router/choices", picture, WIDTH, HEIGHT, settings.steps)
    seconds = time.perf_counter() - begun
    folder_out = run.folder / CALIBRATION
    leaning = {"best_single": policy.strategies[best], "aversion": aversion, "margin": margin}
    notes = {"length": settings.length, "budgets": settings.budgets, **leaning, "measured": metrics}
    calibration.save(
        folder_out,
        loaded.source,
        model,
        calibration.Corpus(source=corpus, sha256=lessons.sha256, num_tokens=lessons.num_tokens),
        [calibration.Member("moe-router", "policy", options, fitted, notes)],
    )
    run.telemetry.metrics(settings.steps, {f"test/{name}": value for name, value in metrics.items()})
    result = PolicyRouterResult(
        model=loaded.source,
        calibration=str(folder_out),
        corpus=corpus,
        metrics=metrics,
        strategies=list(policy.strategies),
        usage=[[round(share, 4) for share in shares] for shares in usage],
        num_steps=settings.steps,
        best_single=policy.strategies[best],
        aversion=aversion,
        margin=margin,
        num_tokens=lessons.num_tokens,
        tokens_per_s=settings.rounds * lessons.num_tokens / seconds,
    )
    run.finish(result, {"attention": loaded.backend})
    return result


def _policy(settings: PolicyRouterSettings) -> MoERouter:
    """Return the policy whose routers are trained; raises UsageError for strategies that it cannot have."""
    strategies = {} if settings.strategies is None else {"strategies": tuple(settings.strategies)}
    given = {"router": settings.router, "mode": settings.mode}
    policy: MoERouter = build(POLICIES, Component("moe-router", {**strategies, **given}))
    return policy


def _learnt(policy: MoERouter, settings: PolicyRouterSettings, config: Any) -> dict[str, torch.Tensor]:
    """Return what the strategies' calibrations hold, under their names."""
    from pikv_core.cache import calibration

    tensors: dict[str, torch.Tensor] = {}
    for name, member in policy.members.items():
        if member.calibrated:
            own = calibration.fitted(settings.calibration, "policy", Component(name), config)[1]
            tensors |= {f"{name}/{key}": x for key, x in own.items()}
    return tensors
