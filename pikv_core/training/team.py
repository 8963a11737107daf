"""The processes that train together, as torchrun starts them: whose rows, whose gradients, who writes.

Data are parallel over all ranks: each has its rows of every batch. Experts may be parallel too: `expert_ranks` ranks
in a row then share those of every layer, and the next ones have them again. Rank 0 alone writes and reports.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pikv_core.collectives import is_of_connection
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import replacing
from pikv_core.moe.experts import Experts
from pikv_core.moe.layer import MoE
from pikv_core.moe.lora import LoRAExperts
from pikv_core.moe.parallel import DistributedPiKVMoE
from pikv_core.runs import num_processes
from pikv_core.training.lessons.base import Lesson, Step

PLACES = "places."  # before the names of layers whose experts are placed


class Team:
    """One rank of `count`; alone, what it does is nothing."""

    def __init__(self, rank: int = 0, count: int = 1, mesh: Any = None):
        self.rank = rank
        self.count = count
        self._mesh = mesh  # of dimensions data and experts
        self._layers: dict[str, DistributedPiKVMoE] = {}
        self._sharded: dict[str, nn.Parameter] = {}  # by the weight's name in the model

    @classmethod
    @contextmanager
    def of_torchrun(cls, device: torch.device, expert_ranks: int) -> Iterator[Team]:
        """Join the processes that torchrun started, each on a GPU of its own where it is to be one.

        Raises UsageError where they do not divide into groups of expert_ranks.
        """
        count = num_processes()
        if count % expert_ranks:
            raise UsageError(
                f"train.parallel.expert_ranks: {count} processes do not divide into groups of {expert_ranks}",
                hint="start a multiple of it: torchrun --nproc-per-node N -m pikv_cli train ...",
            )
        if count == 1:
            yield cls()
            return
        from torch.distributed.device_mesh import init_device_mesh

        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        shape = (count // expert_ranks, expert_ranks)
        yield cls(dist.get_rank(), count, init_device_mesh(device.type, shape, mesh_dim_names=("data", "experts")))
        if dist.is_initialized():  # after an error the others are gone, and there is nothing to take leave of
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def describe(self) -> dict[str, str]:
        """Return who shares what, for result.json."""
        if self.count == 1:
            return {}
        groups, expert_ranks = self._mesh.shape
        return {"ranks": f"{self.count}, experts in {groups} groups of {expert_ranks}"}

    def share_experts(self, model: nn.Module) -> None:
        """Share the experts of every layer out; raise UsageError for a model whose experts are not of our kind."""
        if self.count == 1 or self._mesh.shape[1] == 1:
            return
        group = self._mesh["experts"].get_group()
        for name, layer in list(model.named_modules()):
            if isinstance(layer, MoE) and isinstance(layer.experts, Experts | LoRAExperts):
                self._layers[name] = DistributedPiKVMoE(layer, group)
                model.set_submodule(name, self._layers[name])
                if hasattr(layer.gate, "plan"):
                    layer.gate.plan(layer.gate.num_slots, self._mesh.shape[1])  # says now where it cannot
                experts = self._layers[name].experts
                self._sharded |= {f"{name}.experts.{one}": getattr(experts, one) for one in experts.sharded}
        if not self._layers:
            raise UsageError(
                "train.parallel.expert_ranks: the model has no experts that can be shared out",
                hint="it wants model.arch: pikv, without train.lora; with expert_ranks: 1 every rank has all experts",
            )

    def place_experts(self) -> None:
        """Have hot experts twice and the load even, where a layer's router plans so."""
        for layer in self._layers.values():
            plan = getattr(layer.gate, "plan", None)
            if plan is not None:
                layer.experts.place(plan(layer.gate.num_slots, layer.experts.num_ranks))

    def state_dict(self) -> dict[str, Tensor]:
        """Return where the experts are, to be saved."""
        return {f"{PLACES}{name}": layer.experts.slots for name, layer in self._layers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Have the experts where they were, or, of another number of ranks, where the routers plan them."""
        places = {name: state[f"{PLACES}{name}"] for name in self._layers if f"{PLACES}{name}" in state}
        if len(places) < len(self._layers) or any(len(slots) != self._mesh.shape[1] for slots in places.values()):
            self.place_experts()
            return
        for name, slots in places.items():
            self._layers[name].experts.slots = slots

    def unite_experts(self, model: nn.Module) -> None:
        """Give every rank all experts again."""
        for name, layer in self._layers.items():
            model.set_submodule(name, layer.whole())
        self._layers, self._sharded = {}, {}

    def stepper(self, model: nn.Module, lesson: Lesson) -> Callable[[Any], Step]:
        """Return what runs a batch and, at its backward pass, averages the gradients of all but shared-out experts."""
        run = _Run(model, lesson)
        if self.count == 1:
            return run
        data_parallel = nn.parallel.DistributedDataParallel
        # Buffers are what routers count: of a rank itself, or added up over all.
        kept_apart = [*self._sharded, *(name for name, _ in model.named_buffers())]
        data_parallel._set_params_and_buffers_to_ignore_for_model(run, [f"model.{name}" for name in kept_apart])
        return data_parallel(run, find_unused_parameters=True, gradient_as_bucket_view=True)

    def average_gradients(self, beside: Iterable[Tensor]) -> None:
        """Average what the stepper leaves: the gradients of shared-out experts, and of weights beside the model."""
        if self.count == 1:
            return
        for weights, group in ((self._sharded.values(), self._mesh["data"].get_group()), (beside, dist.group.WORLD)):
            for weight in weights:
                if weight.requires_grad:
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    dist.all_reduce(weight.grad, group=group)
                    weight.grad /= self.count

    def gradient_norm(self, weights: Iterable[Tensor]) -> Tensor:
        """Return the norm of the gradients of the whole model, the same on every rank."""
        apart = {id(weight) for weight in self._sharded.values()}
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for weight in weights:
            if weight.grad is not None:
                parts[id(weight) in apart].append(weight.grad)
        norm = get_total_norm(parts[False], foreach=True)
        if not apart:
            return norm
        square = get_total_norm(parts[True], foreach=True).square()
        dist.all_reduce(square, group=self._mesh["experts"].get_group())
        return (norm.square() + square).sqrt()

    def check_rows(self, lesson: Lesson, seed: int, lengths: Iterable[int]) -> None:
        """Raise UsageError where a step at one of the lengths, perhaps hours away, does not divide by the ranks."""
        for length in lengths if self.count > 1 else ():
            self.rows(lesson.batch(seed, 0, length))

    def rows(self, batch: Any) -> Any:
        """Return this rank's rows of a batch, whose arrays all have a row for each sample."""
        return batch if self.count == 1 else _part(batch, self.rank, self.count)

    def means(self, values: list[float]) -> list[float]:
        """Return the mean of each value over the ranks."""
        if self.count == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums / self.count).tolist()

    def tell(self, value: Any) -> Any:
        """Return what rank 0 gives."""
        told = [value]
        if self.count > 1:
            dist.broadcast_object_list(told)
        return told[0]

    @contextmanager
    def writing(self, path: Path | None) -> Iterator[Path]:
        """Yield a temporary folder that all ranks write into; it becomes `path` when all have. Rank 0 names it."""
        with nullcontext() if path is None else replacing(path) as temporary:
            if temporary is not None:
                temporary.mkdir()
            temporary = self.tell(temporary)
            assert temporary is not None
            yield temporary
            if self.count > 1:
                dist.barrier()

    def as_whole(self, name: str, value: Tensor) -> Any:
        """Return a rank's part of a weight, or of its optimizer's state, as a part of the whole."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if name not in self._sharded or value.dim() == 0:
            return value
        return DTensor.from_local(value, self._mesh, [Replicate(), Shard(0)], run_check=False)

    def room_for(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> Any:
        """Return an empty tensor that a rank's part of the whole, of this shape, is read into."""
        shape = list(shape)
        if name in self._sharded and shape:
            shape[0] //= self._mesh.shape[1]
        return self.as_whole(name, torch.empty(shape, dtype=dtype))

    def own_part(self, value: Any) -> Tensor:
        """Return what this rank has of a tensor that `room_for` made."""
        return value.to_local() if hasattr(value, "to_local") else value

    @contextmanager
    def lost(self, hint: str) -> Iterator[None]:
        """Say in one line that another rank is gone, where that is what ended this one."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not is_of_connection(error):
                raise
            raise PiKVError(
                f"rank {self.rank}: another rank is lost, and the run ends", hint=f"{hint}, on any number of ranks"
            ) from error

    def leave(self) -> bool:
        """End the common work; return whether this rank goes on alone."""
        if self.count > 1:
            dist.barrier()
            dist.destroy_process_group()
        return self.leads


class _Run(nn.Module):
    """A lesson's step, as data-parallel wrappers want it: a module called with a batch."""

    def __init__(self, model: nn.Module, lesson: Lesson):
        super().__init__()
        self.model = model
        self._lesson = lesson

    def forward(self, batch: Any) -> Step:
        return self._lesson.step(self.model, batch)


def _part(value: Any, rank: int, count: int) -> Any:
    if isinstance(value, np.ndarray):
        if len(value) % count:
            raise UsageError(
                f"train.batch_tokens: a step of {len(value)} samples does not divide by {count} ranks",
                hint="every rank takes as many samples; change batch_tokens, or the number of processes",
            )
        size = len(value) // count
        return value[rank * size : (rank + 1) * size]
    if isinstance(value, dict):
        return {name: _part(one, rank, count) for name, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [item.name for item in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _part(getattr(value, name), rank, count) for name in fields})
    return value
