"""The comparison of training steps: equal losses from equal weights, and a page that tells ratios."""

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.transformers_moe_table import table

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import transformers_moe_steps as steps


@pytest.mark.parametrize("architecture", steps.ARCHITECTURES)
def test_all_sides_begin_with_the_same_loss_and_learn(monkeypatch, architecture):
    for name, value in {"VOCABULARY": 97, "HIDDEN": 32, "LAYERS": 2, "HEAD_DIM": 8, "EXPERT_WIDTH": 16}.items():
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "LR", 1e-2)
    ids = np.random.default_rng(0).integers(97, size=(2, 40))
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
        sides = {
            side: steps.contender(architecture, side, "cpu")
            for side in steps.SIDES[precision]
            if steps.COMPILED not in side
        }
        losses = {side: one.cross_entropy(ids) for side, one in sides.items()}
        assert max(losses.values()) - min(losses.values()) < tolerance * max(losses.values()), losses
        for side, one in sides.items():
            assert [one.step(ids) for _ in range(6)] and one.cross_entropy(ids) < 0.9 * losses[side], side


def test_the_page_tells_how_many_times_as_fast():
    def row(step_ms):
        return {"step_ms": step_ms, "tokens_per_s": 4096e3 / step_ms, "cross_entropy": 8.8, "peak_bytes": 2**30}

    found = {
        "machine": "a machine",
        "device": "cpu",
        "commit": "0123456789abcdef0123456789abcdef01234567 with changes",
        "versions": {"pikv": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
        "load_average": [0.25, 0, 0],
        "environment": {},
        "setting": {"samples": 8, "context_tokens": 512, "steps": 3, "threads": 1},
        "results": {"mixtral": {"fp32": {"transformers fp32 eager": row(1500.0), "pikv fp32": row(1000.0)}}},
    }
    shown = table(found)
    assert "| fp32 | transformers fp32 eager | 1,500.0 | 2,731 | 1.50 | 8.80000 | 1,024 |" in shown
    assert "| fp32 | pikv fp32 | 1,000.0 | 4,096 |  | 8.80000 | 1,024 |" in shown
    assert "commit 0123456789ab with changes" in shown
