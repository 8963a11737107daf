"""Calibrations of small random models: every codec that is fitted, and random gates."""

import torch

from pikv_core.cache import calibration
from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.evaluation.samples import collect


def gates(model):
    """Return random gates for DuoAttention."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(11))
    return calibration.Member("duo-attention", "policy", {}, {"gates": values})


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
