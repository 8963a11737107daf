"""Tell two trainings of one architecture apart by a few of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

NUM_VALUES = 64  # of each parameter
KEY_PROJECTIONS = ("k_proj", "qkv", "query_key_value", "c_attn")
RELATIVE, ABSOLUTE = 2.0**-8, 1e-6  # what rounding to bfloat16 or float16 may change


def fingerprint(model: nn.Module) -> list[list[float]]:
    """Return evenly spaced values of the model's first and last key projection."""
    matrices = [(name, x) for name, x in model.named_parameters() if x.dim() > 1]
    keys = [x for name, x in matrices if any(part in name for part in KEY_PROJECTIONS)]
    chosen = keys or [x for _, x in matrices]
    return [_sampled(chosen[0]), _sampled(chosen[-1])]


def is_same(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    """Return whether two fingerprints are of one model, in whatever precision each was loaded."""
    if [len(values) for values in found] != [len(values) for values in expected]:
        return False
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(torch.tensor(ours), torch.tensor(theirs), RELATIVE, ABSOLUTE) for ours, theirs in pairs)


def _sampled(x: torch.Tensor) -> list[float]:
    flat = x.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, min(NUM_VALUES, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().tolist()
