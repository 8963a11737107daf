"""The sampled curve: the exact one at rate 1, and its measured error holds the truth on zipf traces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pikv_core.errors import UsageError
from pikv_core.simulation.curve import curve
from pikv_core.simulation.shards import SampledCurve, sampled_curve
from pikv_core.simulation.trace import Trace, make_trace


def zipf(exponent: float, seed: int, num_blocks: int = 30_000, num_accesses: int = 200_000) -> Trace:
    """Return single accesses; the block of rank k has a weight of k ** -exponent."""
    weights = np.arange(1, num_blocks + 1) ** -exponent
    chosen = np.random.default_rng(seed).choice(num_blocks, num_accesses, p=weights / weights.sum())
    return make_trace([[block] for block in chosen.tolist()])


def truth_at(trace: Trace, found: SampledCurve) -> np.ndarray:
    """Return the exact hit ratio at the estimate's capacities."""
    exact = curve(trace, semantics="object")
    return exact.block_hits[np.minimum(found.capacity_blocks, trace.num_blocks)] / trace.ids.size


@pytest.mark.parametrize("exponent", [0.7, 1.0])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_truth_lies_within_the_error(exponent: float, rate: float) -> None:
    trace = zipf(exponent, seed=1)
    covered, errors = [], []
    for seed in range(8):
        found = sampled_curve(trace, rate, seed)
        told = found.capacity_blocks >= found.least_capacity_blocks
        off = np.abs(found.block_hit_ratio - truth_at(trace, found))[told]
        covered.append(np.mean(off <= found.block_hit_ratio_error[told]))
        errors.append(off.mean())
    assert np.mean(covered) > 0.85
    assert np.mean(errors) < 0.04


def test_error_falls_with_the_rate_and_is_not_all_there_is() -> None:
    trace = zipf(0.8, seed=2)
    widths = [sampled_curve(trace, rate, 3).block_hit_ratio_error.mean() for rate in (0.02, 0.1, 0.5)]
    assert widths[0] > widths[1] > widths[2] > 0
    assert widths[2] < 0.02


def test_rate_1_is_the_exact_curve() -> None:
    trace = zipf(0.9, seed=4, num_blocks=2000, num_accesses=6000)
    found, exact = sampled_curve(trace, 1.0, seed=5), curve(trace, semantics="object")
    np.testing.assert_array_equal(found.capacity_blocks, np.arange(trace.num_blocks + 1))
    np.testing.assert_allclose(found.block_hit_ratio, exact.block_hits / trace.ids.size)
    np.testing.assert_array_equal(found.block_hit_ratio_error, 0)
    assert (found.num_sampled_blocks, found.num_sampled_accesses) == (trace.num_blocks, trace.ids.size)
    assert found.least_capacity_blocks == 0


def test_sample_holds_all_accesses_of_its_blocks_and_about_the_rate_of_the_blocks() -> None:
    trace = make_trace([[block, (7 * block) % 5000, block] for block in range(5000)])
    found = sampled_curve(trace, 0.3, seed=1)
    assert found.num_sampled_accesses == 3 * found.num_sampled_blocks
    assert abs(found.num_sampled_blocks - 1500) < 4 * np.sqrt(5000 * 0.3 * 0.7)
    assert found.warning is None


def test_seeds_choose_the_sample() -> None:
    trace = zipf(0.8, seed=6, num_blocks=1000, num_accesses=3000)
    first, again, other = (sampled_curve(trace, 0.3, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.block_hit_ratio, again.block_hit_ratio)
    assert first.num_sampled_accesses != other.num_sampled_accesses


def test_curve_grows_from_nothing_and_stays_a_ratio() -> None:
    for seed in range(20):
        found = sampled_curve(zipf(1.1, seed, num_blocks=500, num_accesses=2000), 0.05, seed)
        assert found.block_hit_ratio[0] == found.capacity_blocks[0] == 0
        assert (np.diff(found.block_hit_ratio) >= 0).all()
        assert (np.diff(found.capacity_blocks) > 0).all()
        assert found.block_hit_ratio[-1] <= 1


def test_small_samples_are_told() -> None:
    few = sampled_curve(zipf(0.8, seed=1, num_blocks=900, num_accesses=5000), 0.5)
    assert few.num_sampled_accesses > 1000 > few.num_sampled_blocks
    assert few.warning is not None
    assert f"{few.num_sampled_blocks:,} blocks" in few.warning
    none = sampled_curve(make_trace([[0], [0], [1]]), 1e-6)
    assert none.num_sampled_blocks == 0
    assert none.block_hit_ratio.tolist() == [0]
    assert none.warning is not None


def test_twin_equals_compiled() -> None:
    trace = zipf(0.9, seed=8, num_blocks=300, num_accesses=900)
    compiled, twin = sampled_curve(trace, 0.4), sampled_curve(trace, 0.4, backend="python")
    for field in dataclasses.fields(compiled):
        np.testing.assert_array_equal(getattr(compiled, field.name), getattr(twin, field.name))


def test_no_prefixes_in_a_sample() -> None:
    with pytest.raises(UsageError, match="no prefixes"):
        sampled_curve(make_trace([[0, 1]]), 0.5, semantics="prefix")


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_no_rate_outside_0_to_1(rate: float) -> None:
    with pytest.raises(UsageError, match="sample: expected a share"):
        sampled_curve(make_trace([[0, 1]]), rate)
