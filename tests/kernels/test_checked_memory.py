"""The checker of interpreted kernels finds what small broken kernels do, and lets right ones run."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from checked_memory import why_unchecked
from kernel_checks import CPU

import pikv_kernels
from pikv_kernels.attend_codes import attend_codes
from pikv_kernels.backends import jit, tl
from pikv_kernels.compact import compact
from pikv_kernels.decode_attention import FullKV, decode_attention
from pikv_kernels.page_scores import page_scores
from pikv_kernels.quantize_kv import quantize_kv

pytestmark = [CPU, pytest.mark.skipif(why_unchecked() is not None, reason=str(why_unchecked()))]
SIZE = 8


@jit
def _copy(source, target, first, num, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < num
    numbers = tl.load(source + first + place * stride, mask=there, other=0.0)
    if MASKED:
        tl.store(target + place, numbers, mask=there)
    else:
        tl.store(target + place, numbers)


@jit
def _sum_twice(source, target, IN_ONE: tl.constexpr, ATOMIC: tl.constexpr):
    program = tl.program_id(0)
    if ATOMIC:
        tl.atomic_add(target, tl.load(source + program))
    elif IN_ONE:
        tl.store(target, tl.load(source + program))
    else:
        tl.store(target + program, tl.load(source + program))


@jit
def _read_neighbour(buffer, num, AHEAD: tl.constexpr):
    program = tl.program_id(0)
    other = program + 1 if AHEAD else program - 1
    number = tl.load(buffer + other, mask=(other >= 0) & (other < num), other=0.0)
    tl.debug_barrier()
    tl.store(buffer + program, number)


@jit
def _rotate(buffer, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    place = tl.arange(0, BLOCK)
    numbers = tl.load(buffer + (place + 1) % BLOCK)
    if BARRIER:
        tl.debug_barrier()
    tl.store(buffer + place, numbers)


@jit
def _double(buffer, num, BLOCK: tl.constexpr, SHIFTED: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(buffer + place, mask=place < num, other=0.0)
    if SHIFTED:
        numbers += tl.load(buffer + place + 1, mask=place + 1 < num, other=0.0)
    else:
        numbers += numbers
    tl.store(buffer + place, numbers, mask=place < num)


@jit
def _store_all_in_one(target, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(target + place // 2, place.to(tl.float32))


@jit
def _read_what_no_mask_gives(source, target, num, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < num))


@jit
def _read_bytes_as_words(source, target, first):
    words = (source + first).to(tl.pointer_type(tl.int32))
    tl.store(target, tl.load(words))


def copy(source, target, first=0, num=SIZE, stride=1, masked=True):
    _copy[(-(-num // 4),)](source, target, first, num, stride, BLOCK=4, MASKED=masked)


def fails(message):
    return pytest.raises(Exception, match=message)


def test_right_kernels_run_and_are_counted(checked_kernels):
    source, target = torch.arange(8.0), torch.full((7,), torch.nan)
    copy(source, target, num=7)
    assert torch.equal(target, source[:7])
    _sum_twice[(8,)](source, target[:1], IN_ONE=True, ATOMIC=True)
    assert target[0] == source.sum()
    _rotate[(1,)](source, BLOCK=8, BARRIER=True)
    assert source.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert [name.rpartition(".")[2] for name in checked_kernels] == ["_copy", "_sum_twice", "_rotate"]


def test_a_launch_forgets_what_the_one_before_wrote():
    first, second = torch.arange(8.0), torch.zeros(8)
    copy(first, second)
    copy(second, first)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_load_past_the_end_by_one(dtype):
    source, target = torch.ones(SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype)
    with fails(r"_copy, program \(1, 0, 0\): load of source, element 8: outside the tensor"):
        copy(source, target, first=1)
    with fails(r"program \(0, 0, 0\): load of source, element -1: outside the tensor"):
        copy(source, target, first=-1)


def test_a_load_of_a_buffer_outside_the_view_of_it():
    buffer = torch.ones(4, 6)
    whole, column = buffer[:, 1:3], buffer[:, 2]
    copy(column, torch.zeros(4), num=4, stride=6)
    with fails("load of source, element 2: outside the tensor"):  # a hole of the view
        copy(whole, torch.zeros(4), num=4)
    with fails("load of source, element 24: outside the tensor"):
        copy(column, torch.zeros(5), num=5, stride=6)


def test_a_load_that_strays_into_another_tensor_of_the_launch():
    both = torch.ones(2 * SIZE)
    with fails("load of source, element 8: outside the tensor"):
        copy(both[:SIZE], both[SIZE:], first=1)


def test_a_store_without_its_mask():
    target = torch.full((SIZE,), 5.0)
    with fails("store of target, element 7: outside the tensor"):
        copy(torch.ones(7), target[:7], num=7, masked=False)
    assert target[7] == 5, "it was written before it was refused"


def test_two_programs_that_write_one_number():
    source = torch.arange(8.0)
    _sum_twice[(8,)](source, torch.zeros(8), IN_ONE=False, ATOMIC=False)
    with fails(r"program \(1, 0, 0\): store of target, element 0: races with a store"):
        _sum_twice[(8,)](source, torch.zeros(1), IN_ONE=True, ATOMIC=False)


@pytest.mark.parametrize(("ahead", "other"), [(True, "store of buffer.*with a load"), (False, "load of.*with a store")])
def test_a_program_that_reads_what_another_writes_before_or_after(ahead, other):
    with fails(rf"program \(1, 0, 0\): {other}"):
        _read_neighbour[(4,)](torch.zeros(4), 4, AHEAD=ahead)


def test_threads_of_a_program_that_do_not_wait():
    with fails("store of buffer, element 0: races with a load"):
        _rotate[(1,)](torch.arange(8.0), BLOCK=8, BARRIER=False)


def test_a_program_may_change_numbers_in_place():
    numbers = torch.arange(7.0)
    _double[(2,)](numbers, 7, BLOCK=4, SHIFTED=False)
    assert torch.equal(numbers, 2 * torch.arange(7.0))
    with fails(r"program \(0, 0, 0\): store of buffer, element 1: races with a load"):
        _double[(1,)](numbers, 7, BLOCK=8, SHIFTED=True)


def test_one_store_of_two_numbers_at_one_place():
    with fails("store of target, element 0: two of one store at one place"):
        _store_all_in_one[(1,)](torch.zeros(4), BLOCK=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_a_masked_load_leaves_undefined_is_seen(dtype):
    target = torch.zeros(4, dtype=dtype)
    _read_what_no_mask_gives[(1,)](torch.ones(4, dtype=dtype), target, 3, BLOCK=4)
    assert (target[:3] == 1).all() and (target[3] != target[3] or abs(target[3]) > 1e6)


def test_a_word_that_is_not_aligned():
    source, target = torch.ones(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    _read_bytes_as_words[(1,)](source, target, 4)
    assert target.item() == 0x01010101
    with fails("load of source, element 0.5: not aligned"):
        _read_bytes_as_words[(1,)](source, target, 2)


def test_every_kernel_of_the_package_is_checked(checked_kernels):
    query, keys = torch.randn(1, 2, 64), torch.randn(1, 1, 64, 64)
    decode_attention(query, FullKV(keys, keys), 1.0, with_mass=True, backend="triton")
    codes = quantize_kv(keys, keys, 4, 64, 64, backend="triton")
    attend_codes(query[:, None], codes, 4, None, 1.0, backend="triton")
    page_scores(query[:, None], keys, keys, "triton")
    compact(keys, torch.arange(9)[None, None], "triton")
    assert set(checked_kernels) == set(launched_kernels())


def launched_kernels():
    """Yield the names of the package's functions that Triton launches, unlike those that these call."""
    from triton.runtime.interpreter import InterpretedFunction

    for _, module, _ in pkgutil.iter_modules(pikv_kernels.__path__, "pikv_kernels."):
        for kernel in vars(importlib.import_module(module)).values():
            is_own = isinstance(kernel, InterpretedFunction) and kernel.fn.__module__ == module
            if is_own and "tl.program_id" in inspect.getsource(kernel.fn):
                yield f"{module}.{kernel.fn.__name__}"
