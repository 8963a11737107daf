"""Answers as spans of a context, which is read after the question, and perhaps again.

Shapes: B questions, R copies of the context, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_core.data import token_rows
from pikv_core.data.rereading import Reading
from pikv_core.errors import PiKVError
from pikv_core.evaluation import spans
from pikv_core.training.gates import Gates, load_statistics
from pikv_core.training.hardware import Hardware
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import Lesson, Step, slices, to_device
from pikv_core.training.lessons.by_length import rows_of_step
from pikv_core.training.lessons.own_text import text_loss

QUESTIONS_AT_A_TIME = 16
NEVER = -1e9  # the logit of a token that can be no answer's


@dataclass(frozen=True)
class Readings:
    """ids, mask (False for padding on the right) [B, T]; copies [B, R, T], True in each copy; first and last [B, R]."""

    ids: np.ndarray
    mask: np.ndarray
    copies: np.ndarray
    first: np.ndarray
    last: np.ndarray


@LESSONS.register("spans")
class Spans(Lesson):
    """Point at the first and the last token of the answer, and predict the text with the weight filler_loss.

    The answer is given in the last copy, and learned in every one. A length is the most tokens of a question with all
    copies, and those of half of it or less are left to the
    lengths before it. Contexts that are too long for the last one are cut.
    """

    head = "question-answering"

    @property
    def has_answers(self) -> bool:
        return True

    @property
    def model_options(self) -> dict[str, Any]:
        return {**super().model_options, "pad_token_id": self.source.pad_id}

    @functools.cached_property
    def longest_answer(self) -> int:
        """Return the tokens of the longest answer to learn from; no longer one is given."""
        return max(last - first for first, last in (one.answer for one in self.source.questions["train"])) + 1

    def batch(self, seed: int, step: int, length: int) -> Readings:
        readings = self._to_learn[length]
        if not readings:
            raise PiKVError(
                f"no question to learn from has {length // 2 + 1} to {length} tokens with its context",
                hint="drop this length from train.curriculum",
            )
        num_questions = max(1, self.settings.batch_tokens // length)
        rows = rows_of_step(seed, step, num_questions, [len(one.ids) for one in readings])
        return self._readings([readings[row] for row in rows])

    def step(self, model: Any, batch: Readings) -> Step:
        outputs, first_BRT, last_BRT, mask_BT = _run(model, batch)
        losses = {}
        right_BR = torch.ones(batch.first.shape, dtype=torch.bool, device=mask_BT.device)
        for name, logits_BRT, answer in (("first", first_BRT, batch.first), ("last", last_BRT, batch.last)):
            answer_BR = to_device(answer, model)
            losses[name] = F.cross_entropy(logits_BRT.transpose(1, 2), answer_BR) / 2 * answer_BR.shape[1]
            right_BR &= logits_BRT.argmax(-1) == answer_BR
        if self.settings.filler_loss:
            ids_BT = to_device(batch.ids, model)
            losses["text"] = self.settings.filler_loss * text_loss(model, outputs.last_hidden_state, ids_BT, mask_BT)
        logits = torch.cat([first_BRT[:, -1], last_BRT[:, -1]])
        return Step(losses, outputs, logits, float(right_BR[:, -1].float().mean()), mask_BT)

    @torch.no_grad()
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return token_f1 and exact_match, overall and by kind, of the whole test split, and the task's baselines.

        cut_share: of the questions whose answer was cut with its context, so that it could not be given.
        """
        rows = self.source.rows["test"]
        readings = self._all_readings("test")
        given = [""] * len(rows)
        order = np.argsort([len(one.ids) for one in readings], kind="stable")
        gates.reset()
        for part in slices(len(order), QUESTIONS_AT_A_TIME):
            some = [readings[row] for row in order[part]]
            with hardware.autocast():
                outputs, first_BRT, last_BRT, mask_BT = _run(model, self._readings(some))
                gates.losses(outputs, mask_BT)
            chosen = best_span(first_BRT[:, -1], last_BRT[:, -1], self.longest_answer).tolist()
            for row, reading, span in zip(order[part].tolist(), some, chosen, strict=True):
                first, last = (place - reading.starts[-1] + reading.skipped for place in span)
                given[row] = self.source.text("test", row, first, last)
        score = spans.score(given, [[row.answer] for row in rows], [row.kind for row in rows])
        metrics = {"token_f1": score.overall.token_f1, "exact_match": score.overall.exact_match}
        if len(score.by_kind) > 1:
            metrics |= {f"exact_match_{kind}": share.exact_match for kind, share in score.by_kind.items()}
        metrics["cut_share"] = float(np.mean([one.answer is None for one in readings]))
        return metrics | load_statistics(gates.statistics()) | self.source.baselines

    @functools.cached_property
    def _to_learn(self) -> dict[int, list[Reading]]:
        """The training questions of each length of the curriculum that keep their answer."""
        kept = [one for one in self._all_readings("train") if one.answer is not None]
        return {
            length: [one for one in kept if length // 2 < len(one.ids) <= length] for length in self.settings.curriculum
        }

    def _all_readings(self, split: str) -> list[Reading]:
        length = self.settings.curriculum[-1]
        return [self.source.reading(split, row, length) for row in range(len(self.source.rows[split]))]

    def _readings(self, readings: list[Reading]) -> Readings:
        """Return a batch; an answer that was cut stands as the first token."""
        ids, mask = token_rows.pad([one.ids for one in readings], self.source.pad_id)
        starts = np.array([one.starts for one in readings])
        ends = np.array([[*one.starts[1:], len(one.ids)] for one in readings])
        places = np.arange(ids.shape[1])
        copies = (places >= starts[..., None]) & (places < ends[..., None])
        answers = np.array([one.answer or (0, 0) for one in readings])
        return Readings(ids, mask, copies, starts + answers[:, :1], starts + answers[:, 1:])


def best_span(first_BT: Tensor, last_BT: Tensor, longest: int) -> Tensor:
    """Return the places [B, 2] whose logits sum to most, the last not before the first, of `longest` tokens at most."""
    num_places = first_BT.shape[1]
    places = torch.arange(num_places, device=first_BT.device)
    more = places[None] - places[:, None]  # [first, last]
    sums = (first_BT[:, :, None] + last_BT[:, None]).masked_fill((more < 0) | (more >= longest), -torch.inf)
    best_B = sums.flatten(1).argmax(-1)
    return torch.stack([best_B // num_places, best_B % num_places], dim=-1)


def _run(model: Any, batch: Readings) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return the decoder's outputs, the logits [B, R, T] of the first and the last token in float32, and the mask."""
    mask_BT = to_device(batch.mask, model)
    outputs = model.base_model(input_ids=to_device(batch.ids, model), attention_mask=mask_BT.long(), use_cache=False)
    logits_BT2 = model.qa_outputs(outputs.last_hidden_state).float()
    elsewhere = ~to_device(batch.copies, model)
    first_BRT, last_BRT = (logits_BT2[:, None, :, one].masked_fill(elsewhere, NEVER) for one in (0, 1))
    return outputs, first_BRT, last_BRT, mask_BT
