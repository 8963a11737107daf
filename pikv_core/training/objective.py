"""The training objective: cross-entropy on the answers, and on the text around them with a weight of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_core.collectives import mean_count
from pikv_core.data.source import Batch


@dataclass(frozen=True)
class Scores:
    """Sums over the predicted tokens of one batch, apart for answers and text (nats)."""

    answer_loss: Tensor
    num_answers: int
    num_correct: Tensor
    text_loss: Tensor
    num_text: int
    logits: Tensor  # [N, V] of the answers, or of the text where there are none

    def losses(self, filler_loss: float) -> dict[str, Tensor]:
        """Return the mean answer loss and filler_loss times the mean text loss; a batch without answers is all text."""
        text = self.text_loss / mean_count(self.num_text)
        if not self.num_answers:
            return {"text": text}
        answers = {"answers": self.answer_loss / mean_count(self.num_answers)}
        return answers | {"text": filler_loss * text} if filler_loss else answers


def score(model: Any, batch: Batch, with_text: bool) -> tuple[Scores, Any]:
    """Run a batch; return its scores and the decoder's outputs.

    with_text: whether the natural text is scored too. The head sees only the positions that are scored.
    """
    ids_BT = torch.from_numpy(batch.ids).to(model.device)
    outputs = model.base_model(input_ids=ids_BT, use_cache=False)
    hidden_BTD = outputs.last_hidden_state

    def predict(mask: Any) -> tuple[Tensor, Tensor]:
        places_BT = torch.from_numpy(mask[:, :-1]).to(model.device)
        logits = model.get_output_embeddings()(hidden_BTD[:, :-1][places_BT]).float()
        return logits, ids_BT[:, 1:][places_BT]

    zero = hidden_BTD.new_zeros((), dtype=torch.float32)
    answers, answer_targets = predict(batch.answer_mask)
    text_loss, num_text, logits = zero, 0, answers
    if with_text and batch.text_mask.any():
        text, text_targets = predict(batch.text_mask)
        text_loss, num_text = F.cross_entropy(text, text_targets, reduction="sum"), len(text)
        logits = answers if len(answers) else text
    scores = Scores(
        F.cross_entropy(answers, answer_targets, reduction="sum") if len(answers) else zero,
        len(answers),
        (answers.argmax(-1) == answer_targets).sum(),
        text_loss,
        num_text,
        logits,
    )
    return scores, outputs
