"""Every Triton kernel at every dtype, group and head dim equals its definition, and touches nothing it should not.

Tensors are views into larger buffers of NaN (or 0xFF bytes), fresh memory is NaN, and accesses are checked.
"""

import importlib
import inspect
import itertools
import pkgutil

import pytest
import torch
from checked_memory import why_unchecked
from kernel_checks import CPU, DTYPES, TOLERANCE, assert_near, seeded

import pikv_kernels
from pikv_kernels.attend_pages import attend_pages
from pikv_kernels.compact import compact
from pikv_kernels.decode_attention import Float8KV, FullKV, decode_attention
from pikv_kernels.page_scores import page_scores
from pikv_kernels.quantize_kv import dequantize_kv, quantize_kv

pytestmark = pytest.mark.usefixtures("nan_memory", "three_splits")
B, G, S, PAGE = 2, 2, 70, 24
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
# Head dim, query heads of a group, dtype: each value of each, and what takes the most registers.
COVERING = [(64, 8, FLOAT16), (80, 1, BFLOAT16), (96, 4, FLOAT32), (128, 8, BFLOAT16), (256, 4, FLOAT16)]
ALL = list(itertools.product((64, 80, 96, 128, 256), (1, 4, 8), DTYPES))
OTHERS = [pytest.param(*shape, marks=pytest.mark.slow) for shape in ALL if shape not in COVERING]
LENGTHS = torch.tensor([[0, 1], [37, S]])


def within(x, rooms=(1, 2, 3, 8)):
    """Return x as a view into a larger buffer, where all else is NaN or 0xFF."""
    rooms = rooms[-x.dim() :]
    wide = x.new_full(
        [size + 2 * room for size, room in zip(x.shape, rooms)], torch.nan if x.is_floating_point() else 255
    )
    view = wide[tuple(slice(room, room + size) for size, room in zip(x.shape, rooms))]
    return view.copy_(x)


def normal(*shape, dtype, device, seed=0):
    return within(seeded(*shape, dtype=dtype, device=device, seed=seed))


def full_store(tokens, D, dtype, device):
    return FullKV(*(normal(B, G, tokens, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2)))


def float8_store(tokens, D, device):
    parts = []
    for seed in (1, 2):
        x = seeded(B, G, tokens // 64, 64, D, seed=seed)
        scale = x.abs().amax((-1, -2)) / 448
        codes = (x / scale[..., None, None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(2, 3)
        parts += [within(codes.to(device)), within(scale.to(device))]
    return Float8KV(*parts)


def coded_store(bits, tokens, D, dtype, device):
    return quantize_kv(*full_store(tokens, D, dtype, device), bits, backend="torch")


def some_mask(tokens, device):
    mask = torch.rand(B, G, tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1, 0] = False  # sees nothing
    return within(mask.to(device))


def compare_decoding(store, tokens, D, R, dtype, device, tolerance):
    query = normal(B, R * G, D, dtype=dtype, device=device)
    lengths, mask = LENGTHS.clamp(max=tokens).to(device), some_mask(tokens, device)
    found, expected = (
        decode_attention(query, store, D**-0.5, lengths, mask, with_mass=True, backend=backend)
        for backend in ("triton", "torch")
    )
    for name in ("output", "lse", "mass"):
        assert_near(getattr(found, name), getattr(expected, name), tolerance, name)


@pytest.mark.parametrize(("D", "R", "dtype"), COVERING + OTHERS)
def test_decoding_full_precision(D, R, dtype, device):
    compare_decoding(full_store(S, D, dtype, device), S, D, R, dtype, device, TOLERANCE[dtype])


@pytest.mark.parametrize(("D", "R", "dtype"), COVERING + OTHERS)
def test_decoding_8_bit_floats(D, R, dtype, device):
    compare_decoding(float8_store(64, D, device), 64, D, R, dtype, device, max(4e-3, TOLERANCE[dtype]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "R", "dtype"), COVERING + OTHERS)
def test_decoding_codes(D, R, dtype, bits, device):
    store = coded_store(bits, 64, D, dtype, device)
    compare_decoding(store, 64, D, R, dtype, device, max(1e-2, TOLERANCE[dtype]))


@pytest.mark.parametrize(("D", "R", "dtype"), COVERING + OTHERS)
def test_attending_over_pages(D, R, dtype, device):
    query = normal(B, R * G, D, dtype=dtype, device=device)
    store = full_store(S, D, dtype, device)
    pages = within(torch.tensor([[[2, 0], [-1, -1]], [[1, -1], [0, 2]]])).to(device)
    for lengths in (None, LENGTHS.to(device)):
        found, expected = (
            attend_pages(query, store, pages, PAGE, D**-0.5, lengths, backend) for backend in ("triton", "torch")
        )
        assert_near(found.output, expected.output, TOLERANCE[dtype], "output")
        assert_near(found.lse, expected.lse, TOLERANCE[dtype], "lse")


@pytest.mark.parametrize("num_pages", [0, 1, 45])
@pytest.mark.parametrize(("D", "R", "dtype"), COVERING + OTHERS)
def test_scores_of_pages(D, R, dtype, num_pages, device):
    query = normal(B, G, R, D, dtype=dtype, device=device)
    lowest, highest = (normal(B, G, num_pages, D, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    found = page_scores(query, lowest, highest, "triton")
    exact = (query.float().clamp(min=0).sum(2, keepdim=True) * highest.float()).sum(-1)
    exact += (query.float().clamp(max=0).sum(2, keepdim=True) * lowest.float()).sum(-1)
    assert found.shape == (B, G, num_pages)
    assert_near(found, exact, 1e-4 * D**0.5 * R)


WITHOUT_GROUPS = [(D, dtype) for D, _, dtype in COVERING]
OTHERS_WITHOUT_GROUPS = [
    pytest.param(D, dtype, marks=pytest.mark.slow) for D, R, dtype in ALL if R == 1 and (D, dtype) not in WITHOUT_GROUPS
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("D", "dtype"), WITHOUT_GROUPS + OTHERS_WITHOUT_GROUPS)
def test_quantising(D, dtype, bits, device):
    keys, values = full_store(64, D, dtype, device)
    found, expected = (
        dequantize_kv(quantize_kv(keys, values, bits, backend=backend), torch.float32)
        for backend in ("triton", "torch")
    )
    for exact, x, y in zip((keys, values), found, expected):
        apart, step = (x - y).abs(), (exact.max() - exact.min()).item() / (2**bits - 1)
        assert apart.max() <= 1.01 * step, f"{apart.max()} apart, in steps of at most {step}"
        # Only where a number lies halfway between two codes.
        assert (apart > 1e-3 * step).float().mean() < 0.002


@pytest.mark.parametrize("num_kept", [0, 1, 29, 200])
@pytest.mark.parametrize(("D", "dtype"), [*WITHOUT_GROUPS, (24, torch.uint8), *OTHERS_WITHOUT_GROUPS])
def test_compacting(D, dtype, num_kept, device):
    stored = within((seeded(B, G, 200, D) * 50).to(dtype).to(device))
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(200, generator=generator)[:num_kept].sort().values for _ in range(B * G)]
    keep = within(torch.stack(chosen).view(B, G, num_kept)).to(device)
    expected = stored.gather(2, keep[..., None].expand(-1, -1, -1, D))
    assert torch.equal(compact(stored, keep, "triton"), expected)


def test_a_split_for_each_tile(device, monkeypatch):
    monkeypatch.setattr("pikv_kernels.split_tokens.count_splits", lambda heads, tiles, slots: tiles)
    tokens = 64 * 66 + 5
    store = FullKV(*(seeded(1, 1, tokens, 64, dtype=BFLOAT16, device=device, seed=seed) for seed in (1, 2)))
    query = seeded(1, 2, 64, dtype=BFLOAT16, device=device)
    lengths = torch.tensor([[tokens - 200]], device=device)  # the last splits see nothing
    found, expected = (
        decode_attention(query, store, 0.3, lengths, with_mass=True, backend=backend) for backend in ("triton", "torch")
    )
    for name in ("output", "lse", "mass"):
        assert_near(getattr(found, name), getattr(expected, name), 3e-2, name)


@CPU
@pytest.mark.skipif(why_unchecked() is not None, reason=str(why_unchecked()))
def test_every_kernel_of_the_package_is_among_these(checked_kernels):
    test_decoding_full_precision(64, 1, FLOAT16, "cpu")
    test_decoding_codes(64, 1, FLOAT16, 4, "cpu")
    test_scores_of_pages(64, 1, FLOAT16, 45, "cpu")
    test_quantising(64, FLOAT16, 4, "cpu")
    test_compacting(64, FLOAT16, 29, "cpu")
    assert set(checked_kernels) == set(launched_kernels())


def launched_kernels():
    """Yield the names of the package's functions that Triton launches, rather than calls from others."""
    from triton.runtime.interpreter import InterpretedFunction

    for _, name, _ in pkgutil.iter_modules(pikv_kernels.__path__, "pikv_kernels."):
        for kernel in vars(importlib.import_module(name)).values():
            is_own = isinstance(kernel, InterpretedFunction) and kernel.fn.__module__ == name
            if is_own and "tl.program_id" in inspect.getsource(kernel.fn):
                yield f"{name}.{kernel.__name__}"
