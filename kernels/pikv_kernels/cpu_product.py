"""Products of a few rows with a matrix of codes or numbers, in explicit vectors whose sums stay in registers.

What LLVM makes of the same loops by itself loads and stores the sums at every step, and takes 1.6 times as long.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pikv_kernels.pack_bits import parts_of

_FEATURES = llvmlite.binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4
SUMS = 8 if LANES == 8 else 16  # vectors of sums: half of the registers there are
LINE_BYTES = 64
READS_HALF = platform.machine() not in ("x86_64", "AMD64") or bool(_FEATURES.get("f16c"))  # in one instruction
_INT, _INT32, _FLOAT, _FAST = ir.IntType(64), ir.IntType(32), ir.FloatType(), ("contract",)


def _typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an intrinsic, whose callers leave the typing context to numba."""
    return intrinsic(prefer_literal=True)(function)


@_typed
def add_product(typing_context, rows, matrix, output, num_rows, depth, width, num_groups, bits, ahead_bytes):
    """Add rows times matrix [K,width] to output [num_rows,width]; the columns fall into groups with rows of their own.

    rows: [num_groups·num_rows,K] and output are float32, the matrix packed codes of `bits` (uint8, see `pack_bits`;
    less 2^(bits-1), so that large sums do not cancel) or numbers as `_numbers` reads them; all C-contiguous, and all
    sizes but the depth K, at least 1, and ahead_bytes constants. ahead_bytes: from a row to what will be read next, and
    is fetched into the caches; a constant 0 fetches nothing.
    """
    sizes = (num_rows, width, num_groups, bits)
    R, W, C, code_bits = (size.literal_value for size in sizes)
    runs = _runs_of(W, code_bits) if matrix.dtype is types.uint8 else [_Run(0, W, 0, 0)]
    signature = types.void(rows, matrix, output, num_rows, types.int64, *sizes[1:], types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        views = [context.make_array(kind)(context, builder, x) for kind, x in zip(signature.args[:3], arguments[:3])]
        data, strides = zip(*((view.data, cgutils.unpack_tuple(builder, view.shape)[1]) for view in views))
        for group in range(C):
            columns = range(group * (W // C), (group + 1) * (W // C))
            for first in range(0, R, 4):
                count = min(4, R - first)
                for lanes, starts in _tiles(columns, min(run.length for run in runs), SUMS // max(2, count)):
                    tile = _Tile(group * R, first, count, lanes, starts, runs, signature.args[1].dtype)
                    ahead = None if _is_zero(ahead_bytes) else arguments[8]
                    tile.emit(builder, _Operands(*data), _Operands(*strides), arguments[4], ahead)
        return context.get_dummy_value()

    return signature, generate


def _is_zero(constant: Any) -> bool:
    return isinstance(constant, types.IntegerLiteral) and constant.literal_value == 0


class _Operands(NamedTuple):
    rows: Any
    matrix: Any
    output: Any


class _Run(NamedTuple):
    """Where a part of a row's codes lies: in `length` elements from `first`, `width` bits that belong `shift` bits up.

    8 bits hold the parts of 8/width columns that lie `length` apart. Of numbers there is one run, and width 0.
    """

    first: int
    length: int
    width: int
    shift: int

    def bytes_read(self, column: int, lanes: int, element_bytes: int) -> set[int]:
        """Return where the lines begin that a vector reads, and no vector before it."""
        if column >= self.length:
            return set()
        start = (self.first + column) * element_bytes
        end = start + lanes * element_bytes
        return {at for at in range(start, end) if at == self.first * element_bytes or at % LINE_BYTES == 0}


def _runs_of(width: int, bits: int) -> list[_Run]:
    """Return where the parts of `width` codes lie, as `pack_bits` packs them."""
    runs: list[_Run] = []
    for shift, part in parts_of(bits):
        runs.append(_Run(sum(run.length for run in runs), width * part // 8, part, shift))
    return runs


def _tiles(columns: range, run: int, most: int) -> list[tuple[int, list[int]]]:
    """Return (lanes, first columns of vectors) of tiles that cover the columns; no vector reaches over a run's end."""
    tiles: list[tuple[int, list[int]]] = []
    column = columns.start
    while column < columns.stop:
        lanes = LANES
        while lanes > min(run - column % run, columns.stop - column):
            lanes //= 2
        if not tiles or tiles[-1][0] != lanes or len(tiles[-1][1]) == most:
            tiles.append((lanes, []))
        tiles[-1][1].append(column)
        column += lanes
    return tiles


@dataclass(frozen=True)
class _Tile:
    """A loop over the depth that sums `num_rows` rows in one vector for each of `starts`."""

    group_row: int
    first_row: int
    num_rows: int
    lanes: int
    starts: list[int]
    runs: list[_Run]
    dtype: Any

    def emit(self, builder: Any, data: _Operands, strides: _Operands, depth: Any, ahead: Any) -> None:
        vector = ir.VectorType(_FLOAT, self.lanes)
        targets = [
            builder.bitcast(
                builder.gep(data.output, [_at(builder, strides.output, self.first_row + r, start)]),
                vector.as_pointer(),
            )
            for r in range(self.num_rows)
            for start in self.starts
        ]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        held = [builder.load(target, align=4) for target in targets]
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_INT)
        sums = [builder.phi(vector) for _ in targets]
        row = builder.gep(data.matrix, [builder.mul(step, strides.matrix)])
        numbers = [_numbers(builder, row, start, self.lanes, self.dtype, self.runs) for start in self.starts]
        if self.first_row == 0 and ahead is not None:
            element_bytes = self.dtype.bitwidth // 8
            read = (run.bytes_read(start, self.lanes, element_bytes) for start in self.starts for run in self.runs)
            _fetch(builder, row, ahead, set().union(*read))
        new: list[Any] = []
        for r in range(self.num_rows):
            first = builder.mul(strides.rows, _INT(self.group_row + self.first_row + r))
            weight = _spread(builder, builder.load(builder.gep(data.rows, [builder.add(first, step)])), self.lanes)
            for number in numbers:
                new.append(builder.fadd(builder.fmul(weight, number, flags=_FAST), sums[len(new)], flags=_FAST))
        following = builder.add(step, _INT(1))
        step.add_incoming(_INT(0), before)
        step.add_incoming(following, loop)
        for phi, old, added in zip(sums, held, new):
            phi.add_incoming(old, before)
            phi.add_incoming(added, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for target, total in zip(targets, new):
            builder.store(total, target, align=4)


def _at(builder: Any, stride: Any, row: int, column: int) -> Any:
    return builder.add(builder.mul(stride, _INT(row)), _INT(column))


def _numbers(builder: Any, row: Any, column: int, lanes: int, dtype: Any, runs: list[_Run]) -> Any:
    """Load a vector of a matrix's row as float32: of float32, or of the bits of bfloat16 (uint16), float16 (int16) and
    e4m3 (int8, NaN not among them), or of codes (uint8), parts of which lie in `runs`."""
    if dtype is types.uint8:
        return _codes(builder, row, column, lanes, runs)
    vector, wide = ir.VectorType(_FLOAT, lanes), ir.VectorType(_INT32, lanes)
    pointer = builder.gep(row, [_INT(column)])
    if dtype is types.float32:
        return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)
    bits = _load(builder, pointer, lanes, dtype.bitwidth)
    if dtype is types.uint16:
        return builder.bitcast(builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes)), vector)
    if dtype is types.int16:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes)), vector)
    assert dtype is types.int8
    # The sign at bit 31, exponent and mantissa at float32's own place: less by the difference of the biases, 127 - 7.
    moved = builder.shl(builder.sext(bits, wide), ir.Constant(wide, [20] * lanes))
    small = builder.bitcast(builder.and_(moved, ir.Constant(wide, [0x87FFFFFF] * lanes)), vector)
    return builder.fmul(small, ir.Constant(vector, [2.0**120] * lanes))


def _codes(builder: Any, row: Any, column: int, lanes: int, runs: list[_Run]) -> Any:
    """Put codes together from their parts; return them less half their range, as float32."""
    wide = ir.VectorType(_INT32, lanes)

    def all_lanes(number: int) -> Any:
        return ir.Constant(wide, [number] * lanes)

    codes: Any = None
    for first, length, width, shift in runs:
        place = column // length * width
        part = builder.zext(_load(builder, builder.gep(row, [_INT(first + column % length)]), lanes, 8), wide)
        if place:
            part = builder.lshr(part, all_lanes(place))
        if place + width < 8:
            part = builder.and_(part, all_lanes((1 << width) - 1))
        codes = part if codes is None else builder.or_(codes, builder.shl(part, all_lanes(shift)))
    middle = 1 << sum(run.width for run in runs) - 1
    return builder.sitofp(builder.sub(codes, all_lanes(middle)), ir.VectorType(_FLOAT, lanes))


def _load(builder: Any, pointer: Any, lanes: int, bits: int) -> Any:
    """Load a vector of whole numbers from an address that is aligned to one."""
    packed = ir.VectorType(ir.IntType(bits), lanes)
    return builder.load(builder.bitcast(pointer, packed.as_pointer()), align=bits // 8)


def _fetch(builder: Any, row: Any, ahead: Any, bytes_read: set[int]) -> None:
    """Ask for the lines that lie `ahead` bytes further on than these bytes of a row."""
    byte = ir.IntType(8).as_pointer()
    prefetch = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32]), "llvm.prefetch.p0"
    )
    for line in sorted({start // LINE_BYTES for start in bytes_read}):
        place = builder.gep(builder.bitcast(row, byte), [builder.add(ahead, _INT(line * LINE_BYTES))])
        builder.call(prefetch, [place, _INT32(0), _INT32(3), _INT32(1)])


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined), number, _INT32(0))
    return _pick(builder, one, one, [0] * lanes)


def _pick(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes))


@_typed
def write_dots(typing_context, rows, matrix, output, num_rows, num_vectors, width, ahead_bytes):
    """Write rows [R,width] times the transpose of matrix [V,width] to output [R,V].

    rows and output are float32, the matrix numbers as `_numbers` reads them; all C-contiguous. num_rows and width are
    constants. ahead_bytes: see `add_product`.
    """
    R, W = num_rows.literal_value, width.literal_value
    signature = types.void(rows, matrix, output, num_rows, types.int64, width, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        views = [context.make_array(kind)(context, builder, x) for kind, x in zip(signature.args[:3], arguments[:3])]
        data, strides = zip(*((view.data, cgutils.unpack_tuple(builder, view.shape)[1]) for view in views))
        for first in range(0, R, 4):
            count = min(4, R - first)
            at_once = max(1, SUMS // 4)
            whole = builder.and_(arguments[4], _INT(-at_once))
            dots = _Dots(first, count, W, signature.args[1].dtype)
            dots.emit(builder, _Operands(*data), _Operands(*strides), (_INT(0), whole), at_once, arguments[6])
            dots.emit(builder, _Operands(*data), _Operands(*strides), (whole, arguments[4]), 1, arguments[6])
        return context.get_dummy_value()

    return signature, generate


@dataclass(frozen=True)
class _Dots:
    """A loop over the vectors of a matrix, some of them at once, each times `num_rows` rows."""

    first_row: int
    num_rows: int
    width: int
    dtype: Any

    def emit(self, builder: Any, data: _Operands, strides: _Operands, bounds: Any, at_once: int, ahead: Any) -> None:
        start, end = bounds
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", start, end), loop, after)
        builder.position_at_end(loop)
        place = builder.phi(_INT)
        place.add_incoming(start, before)
        vectors = [
            builder.gep(data.matrix, [builder.mul(builder.add(place, _INT(i)), strides.matrix)]) for i in range(at_once)
        ]
        own = [
            builder.gep(data.rows, [builder.mul(strides.rows, _INT(self.first_row + r))]) for r in range(self.num_rows)
        ]
        element_bytes, run = self.dtype.bitwidth // 8, _Run(0, self.width, 0, 0)
        sums: list[Any] = [None] * (self.num_rows * at_once)
        for lanes, (first, *_) in _tiles(range(self.width), self.width, 1):
            if self.first_row == 0:
                for vector in vectors:
                    _fetch(builder, vector, ahead, run.bytes_read(first, lanes, element_bytes))
            numbers = [_numbers(builder, vector, first, lanes, self.dtype, []) for vector in vectors]
            for r, row in enumerate(own):
                weights = _numbers(builder, row, first, lanes, types.float32, [])
                for i, number in enumerate(numbers):
                    product = _widen(builder, builder.fmul(weights, number, flags=_FAST), lanes)
                    held = sums[r * at_once + i]
                    sums[r * at_once + i] = product if held is None else builder.fadd(product, held, flags=_FAST)
        totals = _sum_lanes(builder, sums)
        for r in range(self.num_rows):
            target = builder.gep(data.output, [builder.add(_at(builder, strides.output, self.first_row + r, 0), place)])
            for i in range(at_once):
                total = builder.extract_element(totals, _INT32(r * at_once + i))
                builder.store(total, builder.gep(target, [_INT(i)]))
        following = builder.add(place, _INT(at_once))
        place.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)


def _widen(builder: Any, vector: Any, lanes: int) -> Any:
    """Fill a vector up with zeros."""
    if lanes == LANES:
        return vector
    zero = ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)
    return _pick(builder, vector, zero, [i if i < lanes else lanes for i in range(LANES)])


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Return a vector whose lane i is the sum of the lanes of vector i, of up to LANES vectors."""
    even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
    width = LANES
    while width > 1:
        vectors = vectors + vectors[-1:] * (len(vectors) % 2)
        vectors = [
            builder.fadd(_pick(builder, a, b, even), _pick(builder, a, b, odd))
            for a, b in zip(vectors[::2], vectors[1::2])
        ]
        width //= 2
    return vectors[0]
