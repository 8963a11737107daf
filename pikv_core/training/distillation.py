"""A teacher beside the training: what it says of each batch, and how far the student is from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pikv_core.errors import UsageError
from pikv_core.model.loading import load_pretrained
from pikv_core.moe.distillation import HiddenMatch, logit_loss
from pikv_core.schema import DistillSettings
from pikv_core.training.architectures import HEADS
from pikv_core.training.hardware import Hardware
from pikv_core.training.lessons.base import Lesson, Step


class Distillation(nn.Module):
    """The losses of a student towards its teacher; the teacher attends to everything and learns nothing.

    What learns here is the projection between hidden states of different sizes alone: the trainer's, not the student's.
    """

    def __init__(self, settings: DistillSettings, student: Any, teacher: Any):
        super().__init__()
        self._settings = settings
        self._teacher = (teacher.requires_grad_(False).eval(),)  # in a tuple: no part of this module's state
        sizes = [model.config.get_text_config().hidden_size for model in (student, teacher)]
        self.match = HiddenMatch(*sizes) if settings.hidden > 0 else None

    @classmethod
    def load(cls, settings: DistillSettings, lesson: Lesson, student: Any, hardware: Hardware) -> Distillation:
        """Load the teacher that the settings name; raise UsageError where it speaks of other tokens or classes."""
        teacher = load_pretrained(settings.teacher, HEADS[lesson.head], "float32")
        for name in ("vocab_size", "num_labels"):
            theirs, ours = (getattr(model.config.get_text_config(), name, None) for model in (teacher, student))
            if theirs != ours:
                raise UsageError(
                    f"train.distill.teacher: its {name} is {theirs}, the student's {ours}",
                    hint="teacher and student have to be of one task, with one tokenizer",
                )
        return cls(settings, student, teacher.to(hardware.device)).to(hardware.device)

    def losses(self, lesson: Lesson, batch: Any, done: Step) -> dict[str, Tensor]:
        """Return the weighted losses of a step that the student has done; the teacher does it here."""
        with torch.no_grad():
            shown = lesson.step(self._teacher[0], batch)
        found: dict[str, Tensor] = {}
        if self._settings.logits > 0:
            if done.logits is None or shown.logits is None:
                raise UsageError(
                    "train.distill.logits: this task predicts numbers, not classes",
                    hint="set it to 0, and hidden above 0",
                )
            found["distill_logits"] = self._settings.logits * logit_loss(
                done.logits, shown.logits, self._settings.temperature
            )
        if self.match is not None:
            hidden = (one.outputs.last_hidden_state for one in (done, shown))
            found["distill_hidden"] = self._settings.hidden * self.match(*hidden, done.mask)
        return found
