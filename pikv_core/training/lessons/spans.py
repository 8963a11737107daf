"""Answers as spans of a context, which is read before the question and again after it.

Shapes: B questions, T tokens.
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
from pikv_core.data.read_twice import Reading, lay_out
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
    """ids, mask (False for padding on the right), choices (True in the second copy), all [B, T]; first and last [B]."""

    ids: np.ndarray
    mask: np.ndarray
    choices: np.ndarray
    first: np.ndarray
    last: np.ndarray


@LESSONS.register("spans")
class Spans(Lesson):
    """Point at the first and the last token of the answer; the text itself with the weight filler_loss.

    A length is the most tokens of a question with its context twice. At the last one contexts that are too long are
    cut, at those before it they are left out.
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
                f"no question to learn from has {length} tokens or fewer with its context twice",
                hint="drop this length from train.curriculum",
            )
        num_questions = max(1, self.settings.batch_tokens // length)
        rows = rows_of_step(seed, step, num_questions, [len(one.ids) for one in readings])
        return self._readings([readings[row] for row in rows])

    def step(self, model: Any, batch: Readings) -> Step:
        outputs, first_BT, last_BT, mask_BT = _run(model, batch)
        losses = {}
        right = torch.ones(len(batch.ids), dtype=torch.bool, device=mask_BT.device)
        for name, logits_BT, answer in (("first", first_BT, batch.first), ("last", last_BT, batch.last)):
            answer_B = to_device(answer, model)
            losses[name] = F.cross_entropy(logits_BT, answer_B)
            right &= logits_BT.argmax(-1) == answer_B
        if self.settings.filler_loss:
            ids_BT = to_device(batch.ids, model)
            losses["text"] = self.settings.filler_loss * text_loss(model, outputs.last_hidden_state, ids_BT, mask_BT)
        logits = torch.cat([first_BT, last_BT])
        return Step(losses, outputs, logits, float(right.float().mean()), mask_BT)

    @torch.no_grad()
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return token_f1 and exact_match, overall and by kind, of the whole test split, and the task's baselines.

        cut_share: of the questions whose answer was cut with its context, so that it could not be given.
        """
        rows = self.source.rows["test"]
        readings = [lay_out(one, self.settings.curriculum[-1]) for one in self.source.questions["test"]]
        given = [""] * len(rows)
        order = np.argsort([len(one.ids) for one in readings], kind="stable")
        gates.reset()
        for part in slices(len(order), QUESTIONS_AT_A_TIME):
            some = [readings[row] for row in order[part]]
            with hardware.autocast():
                outputs, first_BT, last_BT, mask_BT = _run(model, self._readings(some))
                gates.losses(outputs, mask_BT)
            chosen = best_span(first_BT, last_BT, self.longest_answer).tolist()
            for row, reading, span in zip(order[part].tolist(), some, chosen, strict=True):
                first, last = (place - reading.second + reading.skipped for place in span)
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
        questions, lengths = self.source.questions["train"], self.settings.curriculum
        longest = [reading for one in questions if (reading := lay_out(one, lengths[-1])).answer is not None]
        short = {length: [lay_out(one, length) for one in questions if one.num_tokens <= length] for length in lengths}
        return short | {lengths[-1]: longest}

    def _readings(self, readings: list[Reading]) -> Readings:
        ids, mask = token_rows.pad([one.ids for one in readings], self.source.pad_id)
        choices = mask & (np.arange(ids.shape[1]) >= np.array([one.second for one in readings])[:, None])
        answers = np.array([one.answer or (one.second, one.second) for one in readings])
        return Readings(ids, mask, choices, answers[:, 0], answers[:, 1])


def best_span(first_BT: Tensor, last_BT: Tensor, longest: int) -> Tensor:
    """Return the places [B, 2] whose logits sum to most, the last not before the first, of `longest` tokens at most."""
    num_places = first_BT.shape[1]
    places = torch.arange(num_places, device=first_BT.device)
    more = places[None] - places[:, None]  # [first, last]
    sums = (first_BT[:, :, None] + last_BT[:, None]).masked_fill((more < 0) | (more >= longest), -torch.inf)
    best_B = sums.flatten(1).argmax(-1)
    return torch.stack([best_B // num_places, best_B % num_places], dim=-1)


def _run(model: Any, batch: Readings) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return the decoder's outputs, the logits [B, T] of the first and the last token in float32, and the mask."""
    mask_BT = to_device(batch.mask, model)
    outputs = model.base_model(input_ids=to_device(batch.ids, model), attention_mask=mask_BT.long(), use_cache=False)
    logits = model.qa_outputs(outputs.last_hidden_state).float()
    logits = logits.masked_fill(~to_device(batch.choices, model)[..., None], NEVER)
    return outputs, logits[..., 0], logits[..., 1], mask_BT
