"""Held-out measurement: recall by length, and the perplexity of text where the task has any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pikv_core.data.source import Source
from pikv_core.schema import TrainSettings
from pikv_core.training.gates import Gates, load_statistics
from pikv_core.training.hardware import Hardware
from pikv_core.training.objective import score

EVALUATION_SEED = 20_260
TOKENS_AT_A_TIME = 8192


@torch.no_grad()
def evaluate(model: Any, source: Source, settings: TrainSettings, gates: Gates, hardware: Hardware) -> dict[str, float]:
    """Return recall_<length> for every length; answer_loss, perplexity and load at the longest one.

    The samples are the same for every seed of training.
    """
    model.eval()
    metrics: dict[str, float] = {}
    for length in sorted(settings.eval_lengths):
        rng = np.random.default_rng([EVALUATION_SEED, length])
        gates.reset_load()
        answer_loss = text_loss = 0.0
        num_answers = num_correct = num_text = 0
        left = settings.eval_samples
        while left:
            num_samples = min(left, max(1, TOKENS_AT_A_TIME // length))
            with hardware.autocast():
                scores, outputs = score(model, source.batch(rng, num_samples, length, "test"), True)
                gates.loss(outputs)
            answer_loss += float(scores.answer_loss)
            text_loss += float(scores.text_loss)
            num_answers += scores.num_answers
            num_correct += int(scores.num_correct)
            num_text += scores.num_text
            left -= num_samples
        if num_answers:
            metrics[f"recall_{length}"] = num_correct / num_answers
            metrics["answer_loss"] = answer_loss / num_answers
        if num_text:
            metrics["perplexity"] = math.exp(text_loss / num_text)
        metrics |= load_statistics(gates.load())
    model.train()
    return metrics
