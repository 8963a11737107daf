"""What a cache holds more, or otherwise, than at an earlier step: what a log of its states has to write.

What is stored of a token never changes, only its place and its statistics do. So the change of a store is where each of
its units was before, what is in the new ones, and the statistics that are others. Shapes: B batch, G key/value heads, S
slots, U units, N new units of all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pikv_core.cache.snapshot import DTYPES, Snapshot
from pikv_core.cache.store import EMPTY, Slots

CHUNK_ELEMENTS = 2**22  # positions compared at a time


@dataclass(frozen=True)
class Change:
    """facts: JSON values; tensors by name, copies on the CPU.

    whole: whether it stands without an earlier state. only_adds: whether all that stood before still does.
    """

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    whole: bool
    only_adds: bool


class Changes:
    """Tell what has changed from call to call."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, torch.Tensor]] = {}
        self._num_rows: dict[str, int] = {}
        self._begun = False

    def since(self, now: Snapshot, anew: bool = False) -> Change:
        """Return the change since the last call; all that there is in the first, and `anew`."""
        if anew:
            self._columns, self._num_rows, self._begun = {}, {}, False
        tensors = {f"small/{name}": _copy(x) for name, x in now.small.items()}
        facts: dict[str, Any] = {"cache": now.facts, "small": list(now.small), "slots": {}, "growing": {}}
        for name, slots in now.slots.items():
            facts["slots"][name], own = _of_slots(self._columns.get(name), slots)
            tensors |= {f"slots/{name}/{key}": _copy(x) for key, x in own.items()}
        for name, x in now.growing.items():
            first = max(0, min(self._num_rows.get(name, 0), x.shape[-2]) - 1)  # the last one was still open
            facts["growing"][name] = first
            tensors[f"growing/{name}"] = _copy(x[..., first:, :])
        moved = any(name.endswith("/origin") for name in tensors)
        change = Change(facts, tensors, not self._begun, self._begun and not moved)
        self._columns = {
            name: {key: x.clone() for key, x in slots.columns.items()} for name, slots in now.slots.items()
        }
        self._num_rows = {name: x.shape[-2] for name, x in now.growing.items()}
        self._begun = True
        return change


class Replay:
    """Go from change to change; `snapshot` is what the cache held at the last one."""

    def __init__(self) -> None:
        self._slots: dict[str, _Parts] = {}
        self._growing: dict[str, torch.Tensor] = {}
        self._facts: dict[str, Any] = {}
        self._small: dict[str, torch.Tensor] = {}

    def apply(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in the next change."""
        self._facts = facts["cache"]
        self._small = {name: tensors[f"small/{name}"] for name in facts["small"]}
        slots = {}
        for name, about in facts["slots"].items():
            prefix = f"slots/{name}/"
            own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            before = self._slots.get(name) if about["has_before"] else None
            slots[name] = (before or _Parts(about)).after(about, own)
        self._slots = slots
        growing = {}
        for name, first in facts["growing"].items():
            new = tensors[f"growing/{name}"]
            growing[name] = torch.cat([self._growing[name][..., :first, :], new], dim=-2) if first else new
        self._growing = growing

    def snapshot(self) -> Snapshot:
        """Return what the cache held."""
        return Snapshot(self._facts, self._small, {name: x.slots() for name, x in self._slots.items()}, self._growing)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _of_slots(before: dict[str, torch.Tensor] | None, slots: Slots) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the change of a store whose columns were `before`; new parts as [N,...], of one head after the other."""
    position, unit = slots.columns["position"], slots.unit
    B, G, S = position.shape
    facts = {
        "shape": [B, G],
        "unit": unit,
        "dtype": str(slots.dtype).removeprefix("torch."),
        "has_before": before is not None,
        "codes": list(slots.codes),
        "columns": list(slots.columns),
    }
    before = before or {"position": position[:, :, :0]}
    old = before["position"]
    num_old = old.shape[2]
    tensors = {}
    if S >= num_old and torch.equal(old, position[:, :, :num_old]):  # nothing has moved
        new = {f"codes/{name}": x[:, :, num_old // unit :].flatten(0, 2) for name, x in slots.codes.items()}
        kept = {name: (x, slots.columns[name][:, :, :num_old]) for name, x in before.items() if name in slots.columns}
        later = {name: x[:, :, num_old:].reshape(-1, unit) for name, x in slots.columns.items()}
    else:
        origin = _origin(old, position, unit)
        tensors["origin"] = origin
        is_new = origin < 0
        new = {f"codes/{name}": x[is_new] for name, x in slots.codes.items()}
        by_unit = {name: x.unflatten(2, (-1, unit)) for name, x in slots.columns.items()}
        from_before = {
            name: _gathered(x.unflatten(2, (-1, unit)), origin) for name, x in before.items() if name in by_unit
        }
        kept = {name: (x[~is_new], by_unit[name][~is_new]) for name, x in from_before.items()}
        later = {name: x[is_new] for name, x in by_unit.items()}
    whole = [name for name in slots.columns if name not in kept or not torch.equal(*kept[name])]
    tensors |= new
    for name, x in later.items():
        tensors[f"columns/{name}"] = slots.columns[name].unflatten(2, (-1, unit)) if name in whole else x
    return {**facts, "whole": whole}, tensors


def _gathered(x: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    """Return the units [B,G,U,...] of x that `origin` names, the first one for new ones."""
    if x.shape[2] == 0:
        return x.new_zeros(*origin.shape, *x.shape[3:])
    index = origin.clamp(min=0).long().view(*origin.shape, *[1] * (x.dim() - 3))
    return x.gather(2, index.expand(*origin.shape, *x.shape[3:]))


def _origin(old: torch.Tensor | None, position: torch.Tensor, unit: int) -> torch.Tensor:
    """Return where each unit of `position` [B,G,S] was in `old` [B,G,S'], int32 [B,G,U]; -1 for what is new.

    A unit is known by any token it still has; one without tokens counts as the first, since nothing reads it.
    """
    B, G, S = position.shape
    token = position.unflatten(2, (-1, unit)).amax(dim=-1)
    origin = torch.full_like(token, -1)
    if old is None or old.shape[2] == 0:
        return origin
    common = min(S, old.shape[2]) // unit
    same = (old[:, :, : common * unit] == position[:, :, : common * unit]).unflatten(2, (-1, unit)).all(dim=-1)
    order = torch.arange(common, dtype=origin.dtype, device=origin.device).expand(B, G, -1)
    origin[:, :, :common] = torch.where(same, order, -1)
    sought = origin < 0
    if unit == 1:
        sought &= token <= old.amax(dim=-1, keepdim=True)
    row, place = sought.flatten(0, 1).nonzero(as_tuple=True)
    flat_old, flat_token, flat_origin = old.flatten(0, 1), token.flatten(0, 1), origin.flatten(0, 1)
    step = max(1, CHUNK_ELEMENTS // old.shape[2])
    for start in range(0, len(row), step):
        rows, places = row[start : start + step], place[start : start + step]
        found = flat_old[rows] == flat_token[rows, places][:, None]
        where = found.int().argmax(dim=-1) // unit
        known = found.any(dim=-1)
        flat_origin[rows, places] = torch.where(known, where, -1).to(origin.dtype)
    return flat_origin.view_as(origin).masked_fill(token == EMPTY, 0)


class _Parts:
    """A store's tensors, those that were only ever added to in pieces that are put together when asked for."""

    def __init__(self, about: Mapping[str, Any]):
        self._about = dict(about)
        self._pieces: dict[str, list[torch.Tensor]] = {}

    def after(self, about: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> _Parts:
        """Return the parts after a change."""
        B, G = about["shape"]
        moved = _Parts(about)
        origin = own.get("origin")
        for kind in ("codes", "columns"):
            for name in about[kind]:
                key = f"{kind}/{name}"
                new = own[key]
                if kind == "columns" and name in about["whole"]:
                    moved._pieces[key] = [new]
                elif origin is None:
                    moved._pieces[key] = [*self._pieces.get(key, []), new.view(B, G, -1, *new.shape[1:])]
                else:
                    x = _gathered(self._whole(key), origin)
                    x[origin < 0] = new
                    moved._pieces[key] = [x]
        return moved

    def slots(self) -> Slots:
        codes = {name: self._whole(f"codes/{name}") for name in self._about["codes"]}
        columns = {name: self._whole(f"columns/{name}").flatten(2) for name in self._about["columns"]}
        return Slots(self._about["unit"], DTYPES[self._about["dtype"]], codes, columns)

    def _whole(self, key: str) -> torch.Tensor:
        if len(self._pieces[key]) > 1:
            self._pieces[key] = [torch.cat(self._pieces[key], dim=2)]
        return self._pieces[key][0]
