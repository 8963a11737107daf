"""The course of training over sequence lengths: short ones first, the next when a length is mastered.

Small attention models that start at long sequences never find retrieval; started at 16 tokens, they do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pikv_core.schema import TrainSettings

AVERAGE_MEMORY = 0.9
LAST_LENGTHS = 3
LEAST_LR = 0.02


@dataclass
class CurriculumState:
    """What a checkpoint keeps: the stage, since which step, its moving accuracy, and when the decay began."""

    stage: int = 0
    stage_start: int = 0
    accuracy: float = 0.0
    decay_start: int | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)


class Curriculum:
    """Say the length and the learning rate of a step, given the accuracy of the steps before.

    has_answers: without answers, or without a stage_accuracy, there is nothing to master: all steps have the last
    length, and there are max_steps of them.
    """

    def __init__(self, settings: TrainSettings, has_answers: bool):
        self._settings = settings
        self.has_stages = has_answers and settings.stage_accuracy is not None
        self._lengths = settings.curriculum if self.has_stages else settings.curriculum[-1:]
        self.state = CurriculumState()

    @property
    def accuracy(self) -> float:
        return self.state.accuracy

    @property
    def mastered(self) -> bool:
        """Whether every length was mastered."""
        return len(self.state.stages) == len(self._lengths)

    def length(self, step: int) -> int:
        """Return the tokens of a sample at this step; the decay goes round the last lengths."""
        if self.state.decay_start is None:
            return self._lengths[self.state.stage]
        known = self._lengths[: self.state.stage + 1][-LAST_LENGTHS:]
        return known[-1 - (step - self.state.decay_start) % len(known)]

    def lr(self, step: int) -> float:
        """Return the learning rate of this step: a linear warm-up, constant, a linear decay."""
        factor = min(1.0, (step + 1) / self._settings.warmup_steps)
        if self.state.decay_start is not None:
            factor *= max(LEAST_LR, 1 - (step - self.state.decay_start) / self._settings.decay_steps)
        return self._settings.lr * factor

    def is_over(self, step: int) -> bool:
        """Return whether all steps before `step` were the whole training."""
        start = self.state.decay_start
        return step >= self._settings.max_steps or (start is not None and step - start >= self._settings.decay_steps)

    def observe(self, step: int, accuracy: float | None) -> dict[str, Any] | None:
        """Take in the batch accuracy of a step; return the stage that it completed, if any."""
        state, settings = self.state, self._settings
        done = None
        if accuracy is not None:
            first = step == state.stage_start
            state.accuracy = accuracy if first else AVERAGE_MEMORY * state.accuracy + (1 - AVERAGE_MEMORY) * accuracy
            if state.decay_start is None and self._ends_stage(step):
                done = self._next_stage(step)
        if state.decay_start is None and step + 1 >= settings.max_steps - settings.decay_steps:
            state.decay_start = step + 1
        return done

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = CurriculumState(**state)

    def _ends_stage(self, step: int) -> bool:
        enough_steps = step + 1 - self.state.stage_start >= self._settings.stage_steps
        target = self._settings.stage_accuracy
        return enough_steps and target is not None and self.state.accuracy >= target

    def _next_stage(self, step: int) -> dict[str, Any]:
        state = self.state
        done = {
            "length": self._lengths[state.stage],
            "num_steps": step + 1 - state.stage_start,
            "accuracy": state.accuracy,
        }
        state.stages.append(done)
        if self.mastered:
            state.decay_start = step + 1
        else:
            state.stage += 1
            state.stage_start = step + 1
        return done
