"""Next tokens: the answers of recall, and the text around them; or text alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pikv_core.data.source import Batch
from pikv_core.training.gates import Gates, load_statistics
from pikv_core.training.hardware import Hardware
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import EVALUATION_SEED, Lesson, Step, to_device
from pikv_core.training.objective import score

TOKENS_AT_A_TIME = 8192


@LESSONS.register("next-token")
class NextToken(Lesson):
    """Predict the answers where the task has any, and the text with the weight filler_loss; else the text."""

    @functools.cached_property
    def has_answers(self) -> bool:
        """Whether there are answers, by a sample of every length, so that an impossible one is told first."""
        found = False
        for split, lengths in (("train", self.settings.curriculum), ("test", self.settings.eval_lengths)):
            for length in lengths:
                batch = self.source.batch(np.random.default_rng(0), 1, length, split)
                found = found or bool(batch.answer_mask.any())
        return found

    def batch(self, seed: int, step: int, length: int) -> Batch:
        num_samples = max(1, self.settings.batch_tokens // length)
        return self.source.batch(np.random.default_rng([seed, step]), num_samples, length)

    def step(self, model: Any, batch: Batch) -> Step:
        with_text = self.settings.filler_loss > 0 or not batch.answer_mask.any()
        scores, outputs = score(model, batch, with_text, with_logits=self.settings.distill is not None)
        accuracy = int(scores.num_correct) / scores.num_answers if scores.num_answers else None
        return Step(scores.losses(self.settings.filler_loss), outputs, scores.logits, accuracy)

    def context(self, model: Any, batch: Batch) -> Tensor:
        """Return the tokens before the questions, or half of a text."""
        return to_device(batch.ids[:, : getattr(batch, "context_length", batch.ids.shape[1] // 2)], model)

    @torch.no_grad()
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return recall_<length> for every length; answer_loss, perplexity and load at the longest one."""
        metrics: dict[str, float] = {}
        for length in sorted(self.settings.eval_lengths):
            rng = np.random.default_rng([EVALUATION_SEED, length])
            gates.reset()
            answer_loss = text_loss = 0.0
            num_answers = num_correct = num_text = 0
            left = self.settings.eval_samples
            while left:
                num_samples = min(left, max(1, TOKENS_AT_A_TIME // length))
                with hardware.autocast():
                    scores, outputs = score(model, self.source.batch(rng, num_samples, length, "test"), True)
                    gates.losses(outputs)
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
            metrics |= load_statistics(gates.statistics())
        return metrics
