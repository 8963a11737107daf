"""Check what kernels read and write under Triton's interpreter, which itself checks nothing.

Within `checked_memory` an access fails where it is not aligned, or lies outside the elements of the tensor (the view,
not its storage) that its pointer was made from; and where it races: it touches what another program of the launch
wrote, or writes what another read, unless both are atomic. So do two accesses of one program with no barrier between
them, since different threads may do them, but for a store by the pointers that loaded. What a masked load leaves
undefined is NaN, or 0xA5 bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None

# Pointers of an argument are numbers of its own, around the middle of a span, so that none strays into another tensor.
SPAN = 1 << 40
CONFLICTS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
NEEDED = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw", "create_barrier")


class BadAccess(AssertionError):
    """What a kernel may not do to memory."""


def why_unchecked() -> str | None:
    """Return why this version of triton cannot be checked, or None."""
    if interpreter is None:
        return "triton is not installed"
    builder = getattr(interpreter, "interpreter_builder", None)
    missing = [name for name in (*NEEDED, "set_grid_idx") if not hasattr(builder, name)]
    missing += [name for name in ("GridExecutor", "_implicit_cvt", "TensorHandle") if not hasattr(interpreter, name)]
    return f"this version of triton's interpreter has no {', '.join(missing)}" if missing else None


class Storage:
    """When each granule (the smallest element of the arguments in it) was touched first and last, by kind of access.

    Times are phases: the stretches of programs between barriers, numbered from 1 through a launch.
    """

    def __init__(self, num_bytes: int, granule: int) -> None:
        self.granule, self.num_granules = granule, num_bytes // granule
        self.first: dict[str, np.ndarray] = {}
        self.last: dict[str, np.ndarray] = {}
        self.loads: list[tuple[np.ndarray, np.ndarray, int]] = []

    def touch(
        self, kind: str, at: np.ndarray, pointers: np.ndarray, phase: int, program_began: int
    ) -> tuple[str, int] | None:
        """Note an access; return kind and granule of one that it races with, or None."""
        if kind == "load":
            self.loads.append((at, pointers, phase))
            if not self.last:  # loads matter once something is stored, and mostly nothing is
                return None
        elif not self.last:
            for loaded, _, when in self.loads:
                self.note("load", loaded, when)
        self.loads = [load for load in self.loads if load[2] == phase]
        for other in CONFLICTS[kind]:
            if other in self.first:
                first, last = self.first[other][at], self.last[other][at]
                races = (first > 0) & (first < program_began)
                in_place = kind == "store" and other == "load"
                races |= self.is_loaded_otherwise(at, pointers) if in_place else last == phase
                if races.any():
                    return other, int(at[races.argmax()])
        self.note(kind, at, phase)
        return None

    def is_loaded_otherwise(self, at: np.ndarray, pointers: np.ndarray) -> np.ndarray:
        """Return which granules this phase loaded by other pointers than the ones that now store."""
        loaded = np.zeros(at.shape, bool)
        for granules, where, _ in self.loads:
            if not np.array_equal(where, pointers):
                loaded |= np.isin(at, granules)
        return loaded

    def note(self, kind: str, at: np.ndarray, phase: int) -> None:
        if kind not in self.first:
            self.first[kind], self.last[kind] = (np.zeros(self.num_granules, np.int32) for _ in range(2))
        first = self.first[kind][at]
        self.first[kind][at] = np.where(first == 0, phase, first)
        self.last[kind][at] = phase


class Argument(NamedTuple):
    """A tensor of a launch: where its pointers begin, and which granules of its storage are elements of it."""

    name: str
    base: int
    real_base: int
    offset_bytes: int
    inside: np.ndarray
    storage: Storage


class Launch:
    """The arguments of a running kernel, and what was touched so far."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.kernel, self.names, self.arguments = kernel, list(tensors), []
        self.phase = self.program_began = 0
        self.program: tuple[int, ...] = ()
        sizes: dict[int, list[int]] = {}
        for tensor in tensors.values():
            sizes.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor.element_size())
        self.granules = {place: min(elements) for place, elements in sizes.items()}
        self.storages: dict[int, Storage] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Take the next tensor; return the number that stands for its address."""
        storage = tensor.untyped_storage()
        granule = self.granules[storage.data_ptr()]
        known = self.storages.setdefault(storage.data_ptr(), Storage(storage.nbytes(), granule))
        width = tensor.element_size() // granule
        inside = np.zeros(known.num_granules, bool)
        elements = inside[tensor.storage_offset() * width :]
        strides = [stride * width for stride in tensor.stride()]
        as_strided(elements, (*tensor.shape, width), (*strides, 1))[...] = True
        base = (len(self.arguments) + 1) * SPAN + SPAN // 2
        name, offset = self.names[len(self.arguments)], tensor.storage_offset() * tensor.element_size()
        self.arguments.append(Argument(name, base, storage.data_ptr(), offset, inside, known))
        return base + offset

    def begin_program(self, *program: int) -> None:
        self.program = program
        self.pass_barrier()
        self.program_began = self.phase

    def pass_barrier(self) -> None:
        self.phase += 1

    def check(self, kind: str, pointers: np.ndarray, mask: np.ndarray | None, element_bytes: int) -> np.ndarray:
        """Return the addresses for pointers, of which those that the mask leaves are touched."""
        places = pointers if mask is None or mask.all() else pointers[np.broadcast_to(mask, pointers.shape)]
        if not places.size:
            return pointers
        index = int(places.flat[0]) // SPAN - 1
        if not 0 <= index < len(self.arguments):
            raise BadAccess(f"{self.told(kind)} at {places.flat[0]}, the address of no argument")
        argument, storage = self.arguments[index], self.arguments[index].storage
        offset = places.ravel().view(np.int64) - argument.base

        def complain(what: str, bad_offset: int) -> None:
            element = (bad_offset - argument.offset_bytes) / element_bytes
            raise BadAccess(f"{self.told(kind)} of {argument.name}, element {element:g}: {what}")

        for part in range(0, element_bytes, storage.granule):
            at = (offset + part) >> storage.granule.bit_length() - 1
            if at.min() < 0 or at.max() >= storage.num_granules or not argument.inside[at].all():
                there = (at >= 0) & (at < storage.num_granules)
                there &= argument.inside[np.where(there, at, 0)]
                complain("outside the tensor", offset[there.argmin()])
            if kind == "store" and not (np.diff(at) > 0).all() and np.unique(at).size < at.size:
                complain("two of one store at one place", offset[0])
            raced = storage.touch(kind, at, pointers, self.phase, self.program_began)
            if raced:
                complain(f"races with a {raced[0]}", raced[1] * storage.granule)
        apart = offset & element_bytes - 1
        if apart.any():
            complain("not aligned", offset[apart.argmax()])
        return pointers - np.uint64(argument.base) + np.uint64(argument.real_base)

    def told(self, kind: str) -> str:
        return f"{self.kernel}, program {self.program}: {kind}"


class Checker:
    """Stands between the interpreter and memory."""

    def __init__(self) -> None:
        self.launch: Launch | None = None
        self.kernels: list[str] = []
        builder = interpreter.interpreter_builder
        self.real = {name: getattr(builder, name) for name in (*NEEDED, "set_grid_idx")}
        self.call, self.convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt

    def run(self, executor: Any, *arguments: Any, **named: Any) -> None:
        """Run a kernel's grid, checked."""
        known = {name: value for name, value in named.items() if name in executor.arg_names}
        given = inspect.getcallargs(executor.fn, *arguments, **known)
        tensors = {name: value for name, value in given.items() if hasattr(value, "data_ptr")}
        self.launch = Launch(executor.fn.__name__, tensors)
        self.kernels.append(f"{executor.fn.__module__}.{executor.fn.__name__}")
        try:
            self.call(executor, *arguments, **named)
        finally:
            self.launch = None

    def to_handle(self, argument: Any) -> Any:
        """Make a kernel's argument of what it was called with."""
        if isinstance(argument, torch.Tensor):
            assert self.launch is not None
            made = self.convert(argument)
            made.handle.data[:] = self.launch.add(argument)
            return made
        assert not isinstance(argument, tuple), "tuples of tensors are not checked"
        return self.convert(argument)

    def set_grid_idx(self, *program: int) -> None:
        self.running.begin_program(*program)
        self.real["set_grid_idx"](*program)

    def barrier(self) -> None:
        self.running.pass_barrier()
        self.real["create_barrier"]()

    def load(self, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        if other is None and not mask.data.all():
            element = pointers.get_element_ty()
            fresh = np.zeros(pointers.data.shape, interpreter._get_np_dtype(element))
            fresh.view(np.uint8)[...] = 0xFF if element.is_floating() else 0xA5
            other = interpreter.TensorHandle(fresh, element)
        return self.real["create_masked_load"](self.checked("load", pointers, mask), mask, other, *options)

    def store(self, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        return self.real["create_masked_store"](self.checked("store", pointers, mask), value, mask, *options)

    def compare_and_swap(self, pointers: Any, *options: Any) -> Any:
        return self.real["create_atomic_cas"](self.checked("atomic", pointers, None), *options)

    def read_modify_write(self, op: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        return self.real["create_atomic_rmw"](op, self.checked("atomic", pointers, mask), value, mask, *options)

    def checked(self, kind: str, pointers: Any, mask: Any) -> Any:
        element_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        places = self.running.check(kind, pointers.data, None if mask is None else mask.data, element_bytes)
        return interpreter.TensorHandle(places, pointers.dtype)

    @property
    def running(self) -> Launch:
        assert self.launch is not None
        return self.launch


@contextmanager
def checked_memory() -> Iterator[list[str]]:
    """Check every kernel that is interpreted within; yield the list of their names (module.function), which grows.

    One at a time: a second one within would take addresses for pointers.
    """
    checker = Checker()
    builder = interpreter.interpreter_builder
    replaced: dict[str, Callable[..., Any]] = {
        "create_masked_load": checker.load,
        "create_masked_store": checker.store,
        "create_atomic_cas": checker.compare_and_swap,
        "create_atomic_rmw": checker.read_modify_write,
        "create_barrier": checker.barrier,
        "set_grid_idx": checker.set_grid_idx,
    }
    with ExitStack() as patches:
        for name, method in replaced.items():
            patches.enter_context(patch.object(builder, name, method))
        patches.enter_context(patch.object(interpreter, "_implicit_cvt", checker.to_handle))

        def call(executor: Any, *arguments: Any, **named: Any) -> None:
            checker.run(executor, *arguments, **named)

        patches.enter_context(patch.object(interpreter.GridExecutor, "__call__", call))
        yield checker.kernels
