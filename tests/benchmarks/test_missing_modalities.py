"""The table of missing modalities: its sums against numpy and scipy; and how a section finds its place on the page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.missing_modalities_table import HEADING, PARTS, RECIPE, VARIANTS, gain, section, word
from benchmarks.results_page import with_section

SEEDS = list(range(7))


@pytest.fixture
def found() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = [
        {"seed": seed, "variant": variant, "accuracy": rng.integers(80, 90) / 100, "log_loss": rng.random()}
        for seed in SEEDS
        for variant in VARIANTS
    ]
    rng.shuffle(rows)
    told = {"machine": "a machine", "commit": "0123456789ab", "seeds": SEEDS, "missing_share": 0.4}
    return told | {"num_train": 455, "num_test": 114, "rows": rows}


def column(rows: list[dict[str, Any]], variant: str, metric: str) -> np.ndarray:
    by_seed = {row["seed"]: row[metric] for row in rows if row["variant"] == variant}
    return np.asarray([by_seed[seed] for seed in SEEDS])


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("log_loss", -1)])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != RECIPE])
def test_gains_are_paired_by_split(found: dict[str, Any], variant: str, metric: str, sign: int) -> None:
    expected = sign * (column(found["rows"], RECIPE, metric) - column(found["rows"], variant, metric))
    told = gain(found["rows"], RECIPE, variant, metric, 114 / 455)
    assert told.mean == pytest.approx(expected.mean())
    assert told.error == pytest.approx(stats.sem(expected))
    assert told.corrected == pytest.approx(np.sqrt(expected.var(ddof=1) * (1 / len(SEEDS) + 114 / 455)))
    assert (told.num_better, told.num_equal) == ((expected > 0).sum(), (expected == 0).sum())
    interval = stats.t.interval(0.95, len(SEEDS) - 1, expected.mean(), stats.sem(expected))
    np.testing.assert_allclose(told.interval(told.error), interval)


def test_the_section_tells_means_and_gains(found: dict[str, Any]) -> None:
    lines = section(found)
    for metric in ("accuracy", "log_loss"):
        zero = column(found["rows"], "zero", metric)
        gains = (1 if metric == "accuracy" else -1) * (column(found["rows"], RECIPE, metric) - zero)
        start = f"| {VARIANTS['zero'][1]} | {zero.mean():.3f} | {gains.mean():.3f} ± {stats.sem(gains):.3f} | "
        assert sum(line.startswith(start) for line in lines) == 1


@pytest.mark.parametrize("pair", PARTS)
def test_the_section_tells_what_each_part_brings(found: dict[str, Any], pair: tuple[str, str]) -> None:
    one, other = (column(found["rows"], variant, "accuracy") for variant in pair)
    start = f"- {PARTS[pair]}: accuracy {(one - other).mean():.3f} ± {stats.sem(one - other):.3f}, log loss "
    assert sum(line.startswith(start) for line in section(found)) == 1


def test_a_missing_split_is_refused(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if (row["seed"], row["variant"]) != (3, "zero")]
    with pytest.raises(ValueError, match="shorter"):
        gain(rows, RECIPE, "zero", "accuracy", 0.25)


def test_an_interval_around_nothing_tells_nothing() -> None:
    assert [word(interval) for interval in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        "better",
        "not told apart",
        "worse",
    ]


def test_a_section_takes_its_place_and_leaves_the_others() -> None:
    page = "# Page\n\n## One\n\n### Part\n\n1\n\n## Two\n\n2\n"
    added = with_section(page, HEADING, [HEADING, "", "new", ""])
    assert added == page + f"\n{HEADING}\n\nnew\n"
    assert with_section(added, HEADING, [HEADING, "", "new", ""]) == added
    assert with_section(page, "## One", ["## One", "", "one"]) == "# Page\n\n## One\n\none\n\n## Two\n\n2\n"
