"""The synthetic attention: seeded, a proper softmax, and policies rank on it as its strengths say they must."""

import numpy as np
import pytest

from pikv_core.components import Component
from pikv_core.data.attention import Attention
from pikv_core.errors import UsageError
from pikv_core.runs import Reporter
from pikv_core.schema import CacheRecipe
from pikv_core.simulation.attention.replay import Replay
from pikv_core.simulation.attention.trace import load

NONE = {"sink_strength": 0.0, "local_strength": 0.0, "heavy_strength": 0.0, "drift": 0.0, "noise": 0.5}
SMALL = {"num_layers": 1, "num_heads": 4, "prompt_tokens": 96, "num_heavy": 8, "local_tokens": 4}


def write(folder, num_samples=48, seed=0, **options):
    task = Attention(**{**SMALL, **options})
    assert task.write(folder, num_samples, seed, [], None, Reporter()) == {"attention.safetensors": num_samples}
    return load(folder / "attention.safetensors")


def recalls(trace, *names, budget=24):
    """Return each policy's mean attention recall."""
    return [
        Replay(trace, CacheRecipe(policy=Component(name), budget=budget)).run(8).attention_recall.mean()
        for name in names
    ]


def test_rows_are_causal_and_sum_to_one(tmp_path):
    trace = write(tmp_path, 20, num_layers=2, top_p=1.0, dtype="float32")
    assert (trace.header.num_prompt_tokens, trace.header.num_steps) == (96, 20)
    for layer in range(2):
        rows = trace.rows(layer, 0, 116)
        np.testing.assert_allclose(rows.sum(axis=2), 1, atol=1e-5)
        assert not rows[:, ~np.tri(116, dtype=bool)].any()
    assert not np.array_equal(trace.rows(0, 0, 116), trace.rows(1, 0, 116))


def test_the_seed_decides_and_a_shorter_trace_is_the_beginning_of_a_longer_one(tmp_path):
    first, longer, other = write(tmp_path / "a"), write(tmp_path / "b", 70), write(tmp_path / "c", seed=1)
    assert np.array_equal(first.rows(0, 0, 144), longer.rows(0, 0, 144))
    assert not np.array_equal(first.rows(0, 0, 144), other.rows(0, 0, 144))


def test_each_strength_favours_the_policy_that_goes_by_it(tmp_path):
    heavy = write(tmp_path / "heavy", **{**NONE, "heavy_strength": 4.0})
    h2o, streaming, window = recalls(heavy, "h2o", "streaming-llm", "window")
    assert h2o > 3 * max(streaming, window)
    sinks = write(tmp_path / "sinks", **{**NONE, "sink_strength": 5.0})
    streaming, window = recalls(sinks, "streaming-llm", "window")
    assert streaming > 10 * window
    local = write(tmp_path / "local", **{**NONE, "local_strength": 6.0})
    window, lfu, at_random = recalls(local, "window", "lfu", "random")
    assert window > 1.3 * max(lfu, at_random)


def test_drift_takes_the_advantage_from_who_counts_the_past(tmp_path):
    options = {**NONE, "heavy_strength": 4.0, "noise": 0.2}
    still, drifting = write(tmp_path / "still", **options), write(tmp_path / "drift", **{**options, "drift": 0.05})
    h2o, at_random = recalls(still, "h2o", "random")
    assert h2o > 5 * at_random
    h2o, at_random, tova = recalls(drifting, "h2o", "random", "tova")
    assert h2o < at_random < tova


def test_as_it_comes_all_of_it_counts_and_no_policy_has_it_easy(tmp_path):
    trace = write(tmp_path, num_layers=2, num_heavy=24, prompt_tokens=256)
    h2o, streaming, window, at_random = recalls(trace, "h2o", "streaming-llm", "window", "random", budget=64)
    assert 0.9 > h2o > streaming > 1.3 * window
    assert h2o > 1.5 * at_random


def test_a_sparse_trace_tells_nearly_what_the_whole_one_does(tmp_path):
    whole = write(tmp_path / "whole", top_p=1.0, dtype="float32")
    sparse = write(tmp_path / "sparse", top_p=0.99)
    assert 0.99 <= sparse.recorded_mass() < 0.999 < whole.recorded_mass()
    for name in ("h2o", "tova", "oracle"):
        exact, rough = recalls(whole, name) + recalls(sparse, name)
        assert rough == pytest.approx(exact, abs=0.02)
        assert rough != exact


@pytest.mark.parametrize(("given", "message"), [({"text": ["a.txt"]}, "'a.txt'"), ({"column": "body"}, "'body'")])
def test_text_is_refused(given, message, tmp_path):
    asked = {"text": [], "column": None, **given}
    with pytest.raises(UsageError, match=message):
        Attention().write(tmp_path, 4, 0, asked["text"], asked["column"], Reporter())


def test_heads_come_in_groups():
    with pytest.raises(UsageError, match="7 query heads for 2"):
        Attention(num_heads=7)
