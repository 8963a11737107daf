"""The training loop: a step is a function of the seed, its number and the state before it, so resuming is exact."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pikv_core.errors import PiKVError
from pikv_core.runs import Run
from pikv_core.schema import TrainSettings
from pikv_core.training.checkpoint import (
    Checkpoint,
    drop_metrics_after,
    load_checkpoint,
    save_checkpoint,
)
from pikv_core.training.compressed_context import CompressedContext
from pikv_core.training.curriculum import Curriculum
from pikv_core.training.distillation import Distillation
from pikv_core.training.gates import Gates
from pikv_core.training.hardware import Hardware
from pikv_core.training.interrupt import Interrupt
from pikv_core.training.lessons.base import Lesson, Step
from pikv_core.training.optimizers import Optimizers
from pikv_core.training.router_log import router_values
from pikv_core.training.team import Team


@dataclass
class Loop:
    """Everything a step touches."""

    run: Run
    model: Any
    lesson: Lesson
    gates: Gates
    settings: TrainSettings
    hardware: Hardware
    curriculum: Curriculum
    optimizers: Optimizers
    distillation: Distillation | None = None
    context: CompressedContext | None = None
    team: Team = field(default_factory=Team)

    def __post_init__(self) -> None:
        self._forward = self.team.stepper(self.model, self.lesson)

    @torch.no_grad()
    def log_start(self) -> None:
        """Tell the held-out metrics of the model as it is; this leaves no trace in what follows."""
        with torch.random.fork_rng():
            metrics = self.lesson.evaluate(self.model.eval(), self.gates, self.hardware)
        if self.team.leads:
            self.run.telemetry.metrics(0, {f"start/{name}": value for name, value in metrics.items()})

    def train(self) -> tuple[int, float]:
        """Run all steps that are left; return their total number and this process's tokens per second."""
        step = self._restore()
        begun, num_tokens = time.perf_counter(), 0
        self.model.train()
        folder = self.team.tell(str(self.run.folder) if self.team.leads else "")
        how_to_go_on = f"go on with `pikv train --resume {folder}`"
        with Interrupt() as interrupt, self.team.lost(how_to_go_on):
            while not self.curriculum.is_over(step):
                tokens_per_s = num_tokens / max(1e-9, time.perf_counter() - begun)
                tokens_of_step, is_wanted = self._step(step, tokens_per_s, interrupt)
                num_tokens += tokens_of_step
                step += 1
                if is_wanted:
                    self._save(step)
                    if not self.team.leads:
                        raise SystemExit(1)
                    self.run.telemetry.close()
                    raise PiKVError(f"interrupted at step {step}", hint=how_to_go_on)
                if step % self.settings.checkpoint_every == 0 and not self.curriculum.is_over(step):
                    self._save(step)
        return step, num_tokens / max(1e-9, time.perf_counter() - begun)

    def _step(self, step: int, tokens_per_s: float, interrupt: Interrupt) -> tuple[int, bool]:
        """Take a step; return its tokens over all ranks, and whether one of them was told to stop."""
        length, lr = self.curriculum.length(step), self.curriculum.lr(step)
        is_logged = (step + 1) % self.settings.log_every == 0
        if is_logged:
            self.gates.reset()  # what is told is of this step alone, so that a resumed run tells the same
        everyones = self.lesson.batch(self.run.recipe.seed, step, length)
        done, losses = self._losses(self.team.rows(everyones))
        parts = torch.stack(list(losses.values()))
        total = parts.sum()
        total.backward()
        told = [*torch.cat([total[None], parts]).tolist(), done.accuracy or 0.0, interrupt.wanted]
        value, *by_part, accuracy, wanted = self.team.means(told)
        if not math.isfinite(value):
            raise PiKVError(f"the loss is {value} at step {step}", hint="lower train.lr or train.clip_norm")
        grad_norm = self.optimizers.step(lr)
        self.gates.end_step()
        stage = self.curriculum.observe(step, None if done.accuracy is None else accuracy)
        if stage is not None:
            self.run.reporter.status(
                f"length {stage['length']} mastered after {stage['num_steps']} steps, {step + 1} in all"
            )
        self.run.reporter.progress(
            f"training: step {step + 1}, length {length}, loss {value:.3f}", step + 1, self.settings.max_steps
        )
        if is_logged:
            values = {
                "train/loss": value,
                **{f"train/loss/{name}": part for name, part in zip(losses, by_part, strict=True)},
                "train/length_tokens": length,
                "train/lr": lr,
                "train/grad_norm": grad_norm,
                "train/tokens_per_s": tokens_per_s,
            }
            if done.accuracy is not None:
                values |= {"train/accuracy": accuracy, "train/accuracy_average": self.curriculum.accuracy}
            self._log(step + 1, values)
        if (step + 1) % self.settings.parallel.place_every == 0:
            self.team.place_experts()
        # Ranks have to stop at one step; one alone need not be asked before the step's end.
        return self.lesson.num_tokens(everyones), wanted > 0 or (self.team.count == 1 and interrupt.wanted)

    def _losses(self, batch: Any) -> tuple[Step, dict[str, Tensor]]:
        """Return what a pass over a batch gave, and all losses, weighted."""
        with self.hardware.autocast():
            if self.context is not None:
                self.context.read(self.lesson.context(self.model, batch))
            done = self._forward(batch)
            losses = done.losses | self.gates.losses(done.outputs, done.mask)
            if self.context is not None and self.settings.selection_loss:
                losses["selection"] = self.settings.selection_loss * self.context.selection_loss
            if self.distillation is not None:
                losses |= self.distillation.losses(self.lesson, batch, done)
        return done, losses

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """Tell the values of a step, and what routers and cache counted in it, which every rank has to ask for."""
        if self.context is not None:
            values |= {f"cache/{name}": value for name, value in vars(self.context.statistics).items()}
        values |= router_values(self.gates.statistics())
        if self.team.leads:
            self.run.telemetry.metrics(step, values)

    def _save(self, step: int) -> None:
        beside = {} if self.distillation is None else self.distillation.state_dict()
        checkpoint = Checkpoint(
            step,
            self.model.state_dict(),
            self.optimizers.state_dict(),
            self.curriculum.state_dict(),
            torch.get_rng_state(),
            beside | self.team.state_dict(),
        )
        save_checkpoint(self.run.folder if self.team.leads else None, checkpoint, self.team)

    def _restore(self) -> int:
        """Take over the run's newest checkpoint; return the number of steps it has behind it."""
        checkpoint = load_checkpoint(self.run.folder, self.team) if self.run.resumed else None
        if checkpoint is not None:
            self._take_over(checkpoint)
        step = checkpoint.step if checkpoint else 0
        if checkpoint is not None and checkpoint.random_state is not None:
            torch.set_rng_state(checkpoint.random_state)
        elif self.team.count > 1 or checkpoint is not None:  # each rank draws what its router draws by itself
            seed = np.random.default_rng([self.run.recipe.seed, step, self.team.rank]).integers(2**63)
            torch.manual_seed(int(seed))
        if self.team.leads:
            drop_metrics_after(self.run.folder, step)
        if self.run.resumed:
            self.run.reporter.status(f"going on after step {step}")
        return step

    def _take_over(self, checkpoint: Checkpoint) -> None:
        try:
            self.model.load_state_dict(checkpoint.weights)
            self.optimizers.load_state_dict(checkpoint.optimizers)
            self.curriculum.load_state_dict(checkpoint.curriculum)
            self.team.load_state_dict(checkpoint.beside)
            if self.distillation is not None:
                own = self.distillation.state_dict()
                self.distillation.load_state_dict({name: checkpoint.beside[name] for name in own})
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise PiKVError(
                f"{self.run.folder}: the checkpoint does not fit the run's recipe: {str(error).splitlines()[0]}",
                hint="it may be of another version of pikv, or of other data; train anew in a new folder",
            ) from error
