"""The recipe of `pikv gen-data`."""

from __future__ import annotations

from typing import Literal

from pikv_core.schema.base import Positive, Recipe, TaskSpec


class GenDataRecipe(Recipe):
    verb: Literal["gen-data"] = "gen-data"
    task: TaskSpec
    num_samples: Positive = 1000
    text: list[str] = []  # files and folders (txt, md, jsonl, parquet) in place of the embedded corpus
    column: str | None = None  # the text column of jsonl and parquet
