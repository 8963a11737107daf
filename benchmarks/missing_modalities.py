"""What a bank of stand-ins gains where modalities are missing: beside zeros, dropped samples and a linear model.

    python benchmarks/missing_modalities.py

recipes/train/modalities.yaml and variants of it on the same splits, each with the seed of its split. The seeds are new:
no setting was chosen by them. Five to seven minutes on one thread. It writes benchmarks/results/missing_modalities.json
and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from missing_modalities_table import HEADING, VARIANTS, section
from results_page import ROOT, commit, origin, put_section
from sklearn.linear_model import LogisticRegression

from pikv_core.jobs import train
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run, versions
from pikv_core.schema import TrainRecipe
from pikv_core.training.lessons.whole_samples import label_metrics
from pikv_core.training.opening import open_lesson

RESULTS = ROOT / "benchmarks/results/missing_modalities.json"
SEEDS = range(100, 140)
METRICS = ("accuracy", "log_loss")


def main() -> None:
    """Measure every variant on every split, then write the results."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    at = commit()
    rows = []
    for seed in SEEDS:
        rows += measure(seed)
        print(f"split {seed} of {SEEDS[-1]}", flush=True)
    source = open_lesson(_recipe(SEEDS[0]), Reporter())[0].source
    found = {
        **origin({"versions": versions()}, at),
        "seeds": list(SEEDS),
        "missing_share": source.task.missing_share,
        **{name: source.described[name] for name in ("source", "num_train", "num_test")},
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    put_section(HEADING, section(found))


def measure(seed: int) -> list[dict[str, Any]]:
    """Return a row for each variant on one split."""
    rows = []
    for variant, (overrides, _) in VARIANTS.items():
        metrics = linear(_recipe(seed)) if overrides is None else trained(seed, overrides)
        rows.append({"seed": seed, "variant": variant, **{name: metrics[name] for name in METRICS}})
    return rows


def trained(seed: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Return the test metrics of a model trained by the recipe with overrides."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(seed, overrides, out=str(Path(folder) / "run"))
        return train.run(recipe, Run(recipe)).metrics


def linear(recipe: TrainRecipe) -> dict[str, float]:
    """Return the test metrics of logistic regression (scikit-learn's, C = 1) with zeros for what is missing."""
    source = open_lesson(recipe, Reporter())[0].source
    inputs = {name: split["modalities"].reshape(len(split["labels"]), -1) for name, split in source.splits.items()}
    model = LogisticRegression(max_iter=1000).fit(inputs["train"], source.labels("train"))
    margins = torch.from_numpy(model.decision_function(inputs["test"]))  # the second class's logit over the first's
    return label_metrics(torch.stack([torch.zeros_like(margins), margins], 1), source.labels("test"), source.classes)


def _recipe(seed: int, overrides: tuple[str, ...] = (), **flags: Any) -> TrainRecipe:
    flags |= {"seed": seed, "threads": 1, "device": "cpu"}
    return load("train", ROOT / "recipes/train/modalities.yaml", overrides, flags)


if __name__ == "__main__":
    main()
