"""Calibrations of small random models: every codec that is fitted, and random tensors for policies."""

import torch

from pikv_core.cache import calibration
from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.evaluation.samples import collect
from pikv_core.scheduling import strategy_history
from pikv_core.scheduling.learned_scorer import NUM_EXTRA
from pikv_core.scheduling.moe_router import num_features


def gates(model):
    """Return random gates for DuoAttention."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(11))
    return calibration.Member("duo-attention", "policy", {}, {"gates": values})


def networks(num_layers, num_heads, head_dim, width=4):
    """Return random networks for the learned scorer."""
    generator = torch.Generator().manual_seed(13)
    shape, F = (num_layers, num_heads), 2 * head_dim + NUM_EXTRA
    shapes = {"mean": (F,), "scale": (F,), "into": (F, width), "bias": (width,), "out": (width,), "level": ()}
    return {name: torch.randn(*shape, *own, generator=generator) for name, own in shapes.items()}


def routers(num_layers, head_dim, num_strategies=6, cache_aware=False):
    """Return random routers over the default strategies; where they are aware of the cache, with a random history."""
    generator, F = torch.Generator().manual_seed(14), num_features(head_dim) + cache_aware * 2 * num_strategies
    shapes = {"feature_mean": (F,), "feature_scale": (F,), "router/weight": (num_strategies, F)}
    if cache_aware:
        shapes |= {name: tuple(x.shape[1:]) for name, x in strategy_history.empty(1, num_strategies).items()}
    return {name: torch.randn(num_layers, *own, generator=generator) for name, own in shapes.items()}


def policies(model):
    """Return every calibrated policy, with random tensors."""
    config = model.config
    shape = config.num_hidden_layers, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    learned = {"learned-scorer": networks(*shape, head_dim), "moe-router": routers(shape[0], head_dim)}
    return [gates(model), *(calibration.Member(name, "policy", {}, tensors) for name, tensors in learned.items())]


def codecs(model, names=None):
    """Return every calibrated codec, or those named, fitted to what the model makes of random tokens."""
    samples = collect(model, torch.randint(1, 97, (2, 192), generator=torch.Generator().manual_seed(12)), 2)
    members = []
    for name in names or CODECS.names():
        codec = build(CODECS, Component(name))
        if codec.calibrated:
            fitted = codec.fit(samples)
            members.append(calibration.Member(name, "codec", {}, fitted.tensors, fitted.notes))
    return members


def write(model, folder, members):
    """Write them as a calibration of the model; return its folder."""
    corpus = calibration.Corpus(source="random tokens", sha256="0" * 64, num_tokens=384)
    calibration.save(folder, "small", model, corpus, members)
    return str(folder)
