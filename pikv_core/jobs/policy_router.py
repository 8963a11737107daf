"""Train the routers that `moe-router` goes by, and write them into a folder that `--calibration` takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.files import replacing
from pikv_core.runs import Run, find_model
from pikv_core.scheduling import POLICIES
from pikv_core.schema import PolicyRouterSettings, TrainRecipe

if TYPE_CHECKING:
    import torch

    from pikv_core.model.loading import LoadedModel
    from pikv_core.scheduling.moe_router import MoERouter
    from pikv_core.training.team import Team

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


def run(recipe: TrainRecipe, run: Run) -> PolicyRouterResult | None:
    """Measure what strategies cost, train, measure on held-out prompts, and save.

    Under torchrun the ranks share the prompts to measure on; rank 0 alone trains, saves and returns a result.
    """
    settings = recipe.policy_router
    assert recipe.start is not None and settings is not None
    if run.resumed:
        raise UsageError(
            f"{run.folder}: training a policy's routers has no checkpoints to go on from",
            hint=f"start again with `pikv train --recipe {run.folder / 'recipe.yaml'}`",
        )
    find_model(recipe.start)
    policy = _policy(settings)

    from pikv_core.model.loading import device_of
    from pikv_core.training.team import Team

    with Team.of_torchrun(device_of(recipe), expert_ranks=1) as team, team.lost("start again"):
        return _train(recipe, settings, run, policy, team)


def _train(
    recipe: TrainRecipe, settings: PolicyRouterSettings, run: Run, policy: MoERouter, team: Team
) -> PolicyRouterResult | None:
    from pikv_core.cache import calibration
    from pikv_core.model.loading import load_model
    from pikv_core.scheduling import strategy_history
    from pikv_core.training import policy_router, router_lessons, useful_strategies
    from pikv_core.training.needles import open_needles
    from pikv_core.training.strategy_picture import HEIGHT, WIDTH, draw_choices

    assert recipe.start is not None
    loaded = load_model(recipe.start, recipe)
    model = loaded.model
    loaded.check_length(settings.length, run.reporter)
    calibration.check_model(settings.calibration, model)
    history = _history(policy, settings, model.config)
    needles, corpus = open_needles(loaded, settings.text, settings.column, recipe.seed, run.reporter)
    kinds = " and ".join(router_lessons.domains(needles))
    run.reporter.status(f"{loaded.backend}; {settings.samples} prompts of {kinds}: {corpus}")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:  # a cache takes what was fitted from a folder alone
        start, cache = _start(recipe, loaded, policy, history, f"{temporary}/all")
        prompts = partial(router_lessons.held_prompts, model, cache, needles, settings)
        validation = partial(prompts, settings.validation_samples, policy_router.VALIDATION_SEED, "train")
        best = policy_router.best_single(validation())
        others = router_lessons.always(best)
        for number in range(settings.rounds):
            lessons = router_lessons.gather(prompts(settings.samples, recipe.seed, "train"), others)
            if number == 0 and settings.num_strategies is not None:
                kept = useful_strategies.most_useful(lessons.cost, settings.num_strategies, best)
                lessons, policy = useful_strategies.of_strategies(lessons, policy, kept)
                run.reporter.status(f"kept {', '.join(policy.strategies)}")
                best, history = kept.index(best), strategy_history.of_strategies(history, kept)
                start, cache = _start(recipe, loaded, policy, history, f"{temporary}/kept")
                prompts = partial(router_lessons.held_prompts, model, cache, needles, settings)
                validation = partial(prompts, settings.validation_samples, policy_router.VALIDATION_SEED, "train")
            by_aversion = policy_router.learn_each(lessons, policy, start, settings, run, best)
            fitted, aversion, margin = policy_router.hedge(validation(), policy, by_aversion, best)
            others = policy_router.choice(policy, fitted)
        unseen = prompts(settings.eval_samples, policy_router.EVALUATION_SEED, "test")
        metrics, chosen, kinds_of = policy_router.measure(unseen, policy, fitted, start, recipe.seed)
    if not team.leave():
        return None
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
        [calibration.Member("moe-router", "policy", _options(policy), fitted, notes)],
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
    run.finish(result, {"attention": loaded.backend, "ranks": str(team.count)})
    return result


def _policy(settings: PolicyRouterSettings) -> MoERouter:
    """Return the policy whose routers are trained; raises UsageError for strategies that it cannot have."""
    options = {name: getattr(settings, name) for name in ("router", "mode", "cache_aware")}
    if settings.strategies is not None:
        options["strategies"] = tuple(settings.strategies)
    policy: MoERouter = build(POLICIES, Component("moe-router", options))
    num, of = settings.num_strategies, len(policy.strategies)
    if isinstance(num, int) and num > of:
        raise UsageError(
            f"policy_router.num_strategies: {num} cannot be kept of the {of} strategies {', '.join(policy.strategies)}",
            hint=f"2 to {of}, or auto",
        )
    return policy


def _options(policy: MoERouter) -> dict[str, Any]:
    """Return what the routers depend on."""
    own = {name: getattr(policy, name) for name in ("router", "mode", "cache_aware")}
    return {"strategies": list(policy.strategies), **own}


def _start(
    recipe: TrainRecipe, loaded: LoadedModel, policy: MoERouter, history: Mapping[str, torch.Tensor], folder: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return untrained routers, and a cache's recipe that goes by them, saved in a folder."""
    from pikv_core.cache import calibration
    from pikv_core.training.policy_router import untrained

    assert recipe.policy_router is not None
    model = loaded.model
    learnt = _learnt(policy, recipe.policy_router, model.config)
    width = policy.width(calibration.layer_shapes(model.config)[0].head_dim)
    start = untrained(model, policy, {**learnt, **history}, recipe.seed, width)
    member = calibration.Member("moe-router", "policy", _options(policy), start)
    nothing = calibration.Corpus(source="", sha256="", num_tokens=0)
    calibration.save(folder, loaded.source, model, nothing, [member])
    return start, {"policy": {"name": "moe-router", **_options(policy)}, "calibration": [folder]}


def _history(policy: MoERouter, settings: PolicyRouterSettings, config: Any) -> dict[str, torch.Tensor]:
    """Return the history to go on with: of routers over the same strategies, where a calibration holds some.

    Raises UsageError where they are of others, or have no history.
    """
    from pikv_core.cache import calibration
    from pikv_core.scheduling import strategy_history

    folders = [folder for folder in settings.calibration if policy.name in calibration.read(folder).members]
    if not policy.cache_aware or not folders:
        return {}
    asked = Component(policy.name, {"strategies": policy.strategies})
    tensors = calibration.fitted(folders, "policy", asked, config)[1]
    names = (strategy_history.COST, strategy_history.COUNT)
    if any(name not in tensors for name in names):
        raise UsageError(
            f"{folders[0]}: its routers were trained without cache_aware and have no history",
            hint="leave it out of policy_router.calibration",
        )
    return {name: tensors[name] for name in names}


def _learnt(policy: MoERouter, settings: PolicyRouterSettings, config: Any) -> dict[str, torch.Tensor]:
    """Return what the strategies' calibrations hold, under their names."""
    from pikv_core.cache import calibration

    tensors: dict[str, torch.Tensor] = {}
    for name, member in policy.members.items():
        if member.calibrated:
            own = calibration.fitted(settings.calibration, "policy", Component(name), config)[1]
            tensors |= {f"{name}/{key}": x for key, x in own.items()}
    return tensors
