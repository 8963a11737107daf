"""The training objective: cross-entropy on the answers, and on the text around them with a weight of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pikv_core.collectives import mean_count
from pikv_core.data.source import Batch
from pikv_core.moe.experts import compute_dtype
from pikv_kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Scores:
    """Sums over the predicted tokens of one batch, apart for answers and text (nats)."""

    answer_loss: Tensor
    num_answers: int
    num_correct: Tensor
    text_loss: Tensor
    num_text: int
    logits: Tensor | None  # [N, V] of the answers, or of the text where there are none; None where nobody needs those

    def losses(self, filler_loss: float) -> dict[str, Tensor]:
        """Return the mean answer loss and filler_loss times the mean text loss; a batch without answers is all text."""
        text = self.text_loss / mean_count(self.num_text)
        if not self.num_answers:
            return {"text": text}
        answers = {"answers": self.answer_loss / mean_count(self.num_answers)}
        return answers | {"text": filler_loss * text} if filler_loss else answers


def score(model: Any, batch: Batch, with_text: bool, with_logits: bool = False) -> tuple[Scores, Any]:
    """Run a batch; return its scores and the decoder's outputs.

    with_text: whether the natural text is scored too. with_logits: whether the text's logits are wanted; else they are
    never all held. The head sees only the positions that are scored.
    """
    ids_BT = torch.from_numpy(batch.ids).to(model.device)
    outputs = model.base_model(input_ids=ids_BT, use_cache=False)
    hidden_ND, targets_N = outputs.last_hidden_state[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    head = model.get_output_embeddings()

    def scored(mask: Any) -> tuple[Tensor, Tensor]:
        places = torch.from_numpy(mask[:, :-1].reshape(-1).nonzero()[0]).to(model.device)
        return hidden_ND.index_select(0, places), targets_N.index_select(0, places)

    zero = hidden_ND.new_zeros((), dtype=torch.float32)
    hidden, answer_targets = scored(batch.answer_mask)
    answers = head(hidden).float()
    text_loss, num_text, logits = zero, 0, answers if len(answers) else None
    if with_text and batch.text_mask.any():
        hidden, text_targets = scored(batch.text_mask)
        num_text = len(hidden)
        if logits is None and with_logits:
            logits = head(hidden).float()
            text_loss = F.cross_entropy(logits, text_targets, reduction="sum")
        else:
            text_loss = head_loss(head, hidden, text_targets)
    scores = Scores(
        F.cross_entropy(answers, answer_targets, reduction="sum") if len(answers) else zero,
        len(answers),
        (answers.argmax(-1) == answer_targets).sum(),
        text_loss,
        num_text,
        logits,
    )
    return scores, outputs


def head_loss(head: Any, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the cross-entropy of a head's predictions, summed, without holding them where the head is a plain one."""
    if type(head) is not nn.Linear or head.bias is not None:
        return F.cross_entropy(head(hidden_ND).float(), targets_N, reduction="sum")
    dtype = compute_dtype(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return linear_cross_entropy(hidden_ND.to(dtype), head.weight.to(dtype), targets_N)
