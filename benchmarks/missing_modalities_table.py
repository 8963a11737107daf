"""The section of docs/results.md on missing modalities: means over splits, and differences paired by split."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from scipy import stats

HEADING = "## Samples that lack modalities"
CONFIDENCE = 0.95
BETTER = {"accuracy": 1, "log_loss": -1}  # the sign of what is better
NAMES = {"accuracy": "accuracy", "log_loss": "log loss"}
RECIPE = "bank"
VARIANTS = {  # overrides of the recipe, and what it is; "logistic" is no model of ours
    RECIPE: ((), "the recipe: a bank of stand-ins, modalities hidden in training"),
    "bank_unhidden": (("data.task.hide_share=0",), "the bank, nothing hidden"),
    "zero_hidden": (("data.task.missing=zero",), "zeros, as much hidden"),
    "zero": (("data.task.missing=zero", "data.task.hide_share=0"), "zeros, nothing hidden"),
    "drop": (
        ("data.task.missing=drop", "data.task.hide_share=0"),
        "trained on complete samples alone, zeros in the test",
    ),
    "logistic": (None, "logistic regression on zeros"),
}


PARTS = {  # what the recipe's gain over zeros is made of: the one, the other, and what is changed
    ("bank_unhidden", "zero"): "the bank for zeros, nothing hidden",
    ("zero_hidden", "zero"): "hiding, with zeros",
}


@dataclass(frozen=True)
class Gain:
    """How much better one variant is than another, with standard errors: over splits, and for splits that overlap.

    corrected: after Nadeau and Bengio (2003), who add the share test / train to 1 / n, for splits of the same samples.
    """

    mean: float
    error: float
    corrected: float
    num_better: int
    num_equal: int
    num_splits: int

    def interval(self, error: float) -> tuple[float, float]:
        """Return the interval of Student's t that belongs to a standard error."""
        width = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.num_splits - 1)) * error
        return self.mean - width, self.mean + width


def gain(rows: list[dict[str, Any]], one: str, other: str, metric: str, test_over_train: float) -> Gain:
    """Return by how much one variant beats the other; positive is better for the log loss too."""
    pairs = zip(values(rows, one, metric), values(rows, other, metric), strict=True)
    gains = [BETTER[metric] * (ours - theirs) for ours, theirs in pairs]
    spread, share = statistics.stdev(gains), 1 / len(gains)
    return Gain(
        statistics.mean(gains),
        spread * math.sqrt(share),
        spread * math.sqrt(share + test_over_train),
        sum(gain > 0 for gain in gains),
        sum(gain == 0 for gain in gains),
        len(gains),
    )


def values(rows: list[dict[str, Any]], variant: str, metric: str) -> list[float]:
    """Return the metric of a variant, by split."""
    return [row[metric] for row in sorted(rows, key=lambda row: row["seed"]) if row["variant"] == variant]


def section(found: dict[str, Any]) -> list[str]:
    """Return the lines of the section."""
    seeds: list[int] = found["seeds"]
    lines = [
        HEADING,
        "",
        f"Tumours told by three modalities, each missing by a chance of {100 * found['missing_share']:.0f} %, in "
        f"training and test: means over {len(seeds)} splits of {found['num_train']} and {found['num_test']} samples "
        f"(seeds {seeds[0]} to {seeds[-1]}, fixed with the settings before any of them was run), by "
        "`recipes/train/modalities.yaml`. The bank also tells the router what is missing. Gains of the recipe are "
        "paired by split, positive where it is better; ± is their standard error, the interval that of "
        f"{100 * CONFIDENCE:.0f} % (Student's t). Splits are of the same samples, so that this speaks of these "
        "tumours; the last interval has the correction of Nadeau and Bengio (2003) for it, and speaks of others like "
        "them. Made by `benchmarks/missing_modalities.py` on "
        f"{found['machine']}, commit {found['commit']}.",
        "",
    ]
    for metric, name in NAMES.items():
        lines += [
            f"| | {name} | gain of the recipe | interval | better, equal, worse on | corrected interval |",
            "|---|---|---|---|---|---|",
            *(_line(found, variant, metric) for variant in VARIANTS),
            "",
        ]
    return [*lines, *_verdict(found), "", *_parts(found), ""]


def _line(found: dict[str, Any], variant: str, metric: str) -> str:
    mean = statistics.mean(values(found["rows"], variant, metric))
    start = f"| {VARIANTS[variant][1]} | {mean:.3f} |"
    if variant == RECIPE:
        return f"{start} | | | |"
    told = _gain(found, RECIPE, variant, metric)
    num_worse = told.num_splits - told.num_better - told.num_equal
    return (
        f"{start} {told.mean:.3f} ± {told.error:.3f} | {_interval(told, told.error)} | "
        f"{told.num_better}, {told.num_equal}, {num_worse} | {_interval(told, told.corrected)} |"
    )


def _verdict(found: dict[str, Any]) -> list[str]:
    """Say what the intervals say of the recipe beside what could do in its place."""
    lines = ["The recipe against, by the interval (by the corrected one):", ""]
    for variant in ("zero", "zero_hidden", "drop", "logistic"):
        words = []
        for metric, name in NAMES.items():
            told = _gain(found, RECIPE, variant, metric)
            plain, corrected = (word(told.interval(error)) for error in (told.error, told.corrected))
            words.append(f"{name} {plain} ({corrected})")
        lines.append(f"- {VARIANTS[variant][1]}: {', '.join(words)}")
    return lines


def _parts(found: dict[str, Any]) -> list[str]:
    """List what the bank and the hiding bring each alone."""
    lines = ["What each brings alone, a comparison made after the results were seen:", ""]
    for pair, text in PARTS.items():
        gains = {name: _gain(found, *pair, metric) for metric, name in NAMES.items()}
        told = ", ".join(f"{name} {part.mean:.3f} ± {part.error:.3f}" for name, part in gains.items())
        lines.append(f"- {text}: {told}")
    return lines


def word(interval: tuple[float, float]) -> str:
    """Return what an interval of a gain says."""
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def _gain(found: dict[str, Any], one: str, other: str, metric: str) -> Gain:
    return gain(found["rows"], one, other, metric, found["num_test"] / found["num_train"])


def _interval(told: Gain, error: float) -> str:
    low, high = told.interval(error)
    return f"{low:.3f} to {high:.3f}"
