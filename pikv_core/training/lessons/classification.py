"""Classes of texts: told at the last token, and learned at every one, as if the text ended there.

Shapes: B texts, T tokens, D hidden size, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_core.collectives import mean_count
from pikv_core.data import token_rows
from pikv_core.evaluation import classification
from pikv_core.training.gates import Gates, load_statistics
from pikv_core.training.hardware import Hardware
from pikv_core.training.lessons import LESSONS
from pikv_core.training.lessons.base import Lesson, Step, slices, to_device
from pikv_core.training.lessons.by_length import rows_of_step
from pikv_core.training.lessons.own_text import text_loss

TEXTS_AT_A_TIME = 32
PREFIXES = 1.0  # weight of the labels at every token, against 1 for those at the last one


@dataclass(frozen=True)
class LabelledTexts:
    """ids and mask [B, T], False for padding on the right; shown: ids, some of them hidden; labels [B]."""

    ids: np.ndarray
    shown: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


@LESSONS.register("classification")
class Classification(Lesson):
    """Tell the class of a text of `length` tokens at most, more are cut; its text with the weight filler_loss."""

    head = "sequence-classification"

    @property
    def model_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.source.classes))
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        return {**super().model_options, "pad_token_id": self.source.pad_id, **labels}

    def batch(self, seed: int, step: int, length: int) -> LabelledTexts:
        lengths = np.minimum([len(row) for row in self.source.splits["train"].ids], length)
        num_texts = max(1, self.settings.batch_tokens // length)
        texts = self._texts("train", rows_of_step(seed, step, num_texts, lengths), length)
        hidden = np.random.default_rng([seed, step, 2]).random(texts.ids.shape) < self.source.task.hide_share
        return replace(texts, shown=np.where(hidden & texts.mask, self.source.hidden_id, texts.ids))

    def step(self, model: Any, batch: LabelledTexts) -> Step:
        outputs, logits_BTC, mask_BT = _run(model, batch)
        labels_B = to_device(batch.labels, model)
        logits_BC = _at_the_end(logits_BTC, mask_BT)
        places_BT = labels_B[:, None].expand(mask_BT.shape)
        everywhere = F.cross_entropy(logits_BTC[mask_BT], places_BT[mask_BT], reduction="sum")
        losses = {
            "labels": F.cross_entropy(logits_BC, labels_B),
            "prefixes": PREFIXES * everywhere / mean_count(mask_BT.sum()),
        }
        if self.settings.filler_loss:
            ids_BT = to_device(batch.ids, model)
            losses["text"] = self.settings.filler_loss * text_loss(model, outputs.last_hidden_state, ids_BT, mask_BT)
        return Step(losses, outputs, logits_BC, mask=mask_BT)

    @torch.no_grad()
    def evaluate(self, model: Any, gates: Gates, hardware: Hardware) -> dict[str, float]:
        """Return macro_f1 and accuracy of the whole test split, the load, and the scores of the task's baselines."""
        split, length = self.source.splits["test"], self.settings.curriculum[-1]
        gates.reset()
        given = np.zeros(len(split.labels), np.int64)
        order = np.argsort([len(row) for row in split.ids], kind="stable")
        for part in slices(len(order), TEXTS_AT_A_TIME):
            with hardware.autocast():
                outputs, logits_BTC, mask_BT = _run(model, self._texts("test", order[part], length))
                gates.losses(outputs, mask_BT)
            given[order[part]] = _at_the_end(logits_BTC, mask_BT).argmax(-1).cpu().numpy()
        names = self.source.classes
        score = classification.score([names[one] for one in given], [names[one] for one in split.labels])
        metrics = {"macro_f1": score.macro_f1, "accuracy": score.accuracy}
        return metrics | load_statistics(gates.statistics()) | self.source.baselines

    def _texts(self, split: str, rows: np.ndarray, length: int) -> LabelledTexts:
        of = self.source.splits[split]
        ids, mask = token_rows.pad([of.ids[row][:length] for row in rows], self.source.pad_id)
        return LabelledTexts(ids, ids, mask, of.labels[rows])


def _run(model: Any, batch: LabelledTexts) -> tuple[Any, Tensor, Tensor]:
    """Return the decoder's outputs, the logits [B, T, C] in float32 after each token, and the mask."""
    mask_BT = to_device(batch.mask, model)
    outputs = model.base_model(input_ids=to_device(batch.shown, model), attention_mask=mask_BT.long(), use_cache=False)
    return outputs, model.score(outputs.last_hidden_state).float(), mask_BT


def _at_the_end(logits_BTC: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the logits [B, C] at the last token that is no padding."""
    last_B = (mask_BT.sum(1) - 1).clamp(min=0)
    return logits_BTC[torch.arange(len(last_B), device=last_B.device), last_B]
