"""Recall samples as JSON lines: the decoded text, the ids, and every answer with its place and depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pikv_core.data.needles import RecallBatch
from pikv_core.errors import UsageError
from pikv_core.files import replacing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.data.recall import RecallSource
    from pikv_core.runs import Reporter

TEST_SHARE = 0.1
SAMPLES_AT_A_TIME = 100


def write(
    source: RecallSource, folder: Path, num_samples: int, length: int, seed: int, reporter: Reporter
) -> dict[str, int]:
    """Write samples.train.jsonl and samples.test.jsonl, `num_samples` together; return the number by file."""
    if num_samples < 2:
        raise UsageError("num_samples: a training and a test split need 2 samples or more, got 1")
    num_test = max(1, round(TEST_SHARE * num_samples))
    files = {}
    for stream, (split, number) in enumerate([("train", num_samples - num_test), ("test", num_test)]):
        name = f"samples.{split}.jsonl"
        rng = np.random.default_rng([seed, stream])
        with replacing(folder / name) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for start in range(0, number, SAMPLES_AT_A_TIME):
                batch = source.batch(rng, min(SAMPLES_AT_A_TIME, number - start), length, split)
                for row in rows(batch, source.tokenizer):
                    handle.write(json.dumps(row, ensure_ascii=False) + "\n")
                reporter.progress(f"{name}: {start} samples", start, number)
        files[name] = number
    return files


def rows(batch: RecallBatch, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Yield one object a sample.

    `prompt` is the context with the first question, for `pikv generate --prompts`; `text` is everything.
    An answer's `position` is that of its token in `ids`, its `depth` that of its needle in the context.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    for ids, mask, depths in zip(batch.ids.tolist(), batch.answer_mask, batch.depth.tolist(), strict=True):
        asked = np.flatnonzero(mask).tolist()
        yield {
            "prompt": decode(ids[: asked[0] + 1]),
            "text": decode(ids),
            "ids": ids,
            "context_length": batch.context_length,
            "question_tokens": batch.question_tokens,
            "answers": [
                {
                    "position": at + 1,
                    "key": decode([ids[at]]),
                    "value": decode([ids[at + 1]]),
                    "depth": round(depth, 6),
                }
                for at, depth in zip(asked, depths, strict=True)
            ],
        }
