"""One new token over codes and over numbers as they are, by numba: against float64, whatever the shapes."""

import pytest
import torch

from pikv_kernels import backends
from pikv_kernels.attend_codes import attend_codes, decode, define_attend_codes
from pikv_kernels.attend_tokens import attend_alone, attend_pages, attend_tokens
from pikv_kernels.cpu_heads import by_head
from pikv_kernels.pack_bits import pack
from pikv_kernels.page_scores import page_scores
from pikv_kernels.quantize_kv import quantize

SHAPES = [(1, 64), (4, 128), (8, 96), (3, 80), (5, 20), (1, 256)]  # query rows of a group, head dim


def random_codes(U, T, D, V, bits, B=1, G=2, room=0):
    """Return codes of U units in a buffer with room behind them that holds NaN and large codes."""
    generator = torch.Generator().manual_seed(U)
    keys = torch.randn(B, G, U, D, T, generator=generator)
    values = torch.randn(B, G, U, T, V, generator=generator)
    channels = next(c for c in range(min(V, T), 0, -1) if V % c == 0)
    key = quantize(keys, -1, bits)
    value = quantize(values.unflatten(-1, (-1, channels)), -1, bits)
    codes = {}
    for name, (code, scale, zero) in {"key": key, "value": (value[0].flatten(-2), *value[1:])}.items():
        codes |= {f"{name}_codes": pack(code, bits), f"{name}_scale": scale[..., 0], f"{name}_zero": zero[..., 0]}
    return {name: roomy(x, room) for name, x in codes.items()}


def roomy(x, room):
    """Return x [B,G,S,...] as the start of a buffer with more rows, of NaN."""
    wide = x.new_full((*x.shape[:2], x.shape[2] + room, *x.shape[3:]), torch.nan if x.is_floating_point() else 255)
    wide[:, :, : x.shape[2]] = x
    return wide[:, :, : x.shape[2]]


def expect(query, keys, values, visible, scale, softcap=None):
    """Return output, log-sum-exp and probabilities in float64."""
    logits = query.double() @ keys.double().mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    probs = logits.softmax(-1).nan_to_num(0.0)
    return probs @ values.double(), logits.logsumexp(-1), probs


def assert_equal(found, expected, rows):
    for name, x, y in zip(("output", "lse", "probs"), found, expected):
        if x is None:
            continue
        assert x.shape == y.shape and x.dtype == torch.float32
        if not x.numel():
            continue
        error = (x.double() - y).nan_to_num(0.0, 0.0, 0.0).abs()
        assert error.max() < 1e-5, f"{name}: max {error.max()}, mean {error.mean()}"
        assert (x.isfinite() == y.isfinite()).all(), name
    assert (found.probs is not None) == rows


@pytest.mark.parametrize("R, D", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_every_shape_equal_float64(R, D, bits):
    codes = random_codes(3, 64, D, D, bits, room=2)
    query = torch.randn(1, 2, R, D, generator=torch.Generator().manual_seed(1))
    found = attend_codes(query, codes, bits, None, D**-0.5, with_probs=True, backend="numba")
    assert_equal(found, expect(query, *decode(codes, bits, torch.float64), None, D**-0.5), True)


@pytest.mark.parametrize("bits, T, D, V", [(2, 64, 64, 64), (8, 8, 64, 64), (4, 32, 96, 96), (8, 64, 24, 40)])
def test_codes_of_other_units_and_of_keys_unlike_values(bits, T, D, V):
    codes = random_codes(5, T, D, V, bits)
    query = torch.randn(1, 2, 4, D, generator=torch.Generator().manual_seed(1))
    found = attend_codes(query, codes, bits, None, 0.2, backend="numba")
    assert_equal(found, expect(query, *decode(codes, bits, torch.float64), None, 0.2), False)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("num_units", [0, 1, 4])
def test_codes_under_a_mask(num_units, softcap, heads):
    codes = random_codes(num_units, 64, 64, 64, 8, B=3, room=1)
    visible = torch.rand(3, heads, 1, num_units * 64, generator=torch.Generator().manual_seed(2)) < 0.5
    visible[0] = False
    visible[1, :, :, :64] = False
    query = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(1)).transpose(0, 1)  # not contiguous
    found = attend_codes(query, codes, 8, visible, 0.3, softcap, True, backend="numba")
    expected = expect(query, *decode(codes, 8, torch.float64), visible, 0.3, softcap)
    assert_equal(found, expected, True)
    assert (found.output[0] == 0).all() and (found.lse[0] == -torch.inf).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_units_that_are_picked(backend):
    codes = random_codes(6, 64, 64, 64, 4, room=1)
    units = torch.tensor([[[4, 0], [1, 3]]])
    visible = torch.rand(1, 1, 1, 6 * 64, generator=torch.Generator().manual_seed(2)) < 0.7
    query = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    found = attend_codes(query, codes, 4, visible, 0.3, units=units, backend=backend)
    picked = torch.zeros(1, 2, 6, dtype=torch.bool).scatter_(2, units, True).repeat_interleave(64, dim=2)
    seen = visible & picked[:, :, None]
    assert_equal(found, expect(query, *decode(codes, 4, torch.float64), seen, 0.3), False)


@pytest.mark.parametrize("R, D", SHAPES)
def test_tokens_of_every_shape_equal_float64(R, D):
    for num_tokens in (1, 3, 63, 64, 65, 200, 1000):
        keys, values = (roomy(x, 7) for x in random_tokens(num_tokens, D))
        query = torch.randn(1, 2, R, D, generator=torch.Generator().manual_seed(1))
        found = attend_tokens(query, keys, values, None, D**-0.5, with_probs=True, backend="numba")
        assert_equal(found, expect(query, keys, values, None, D**-0.5), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tokens_under_a_mask(dtype, heads, softcap):
    for num_tokens in (0, 1, 65, 200):
        keys, values = (roomy(x.to(dtype), 9) for x in random_tokens(num_tokens, 64, B=3))
        visible = torch.rand(3, heads, 1, num_tokens, generator=torch.Generator().manual_seed(2)) < 0.5
        visible[0] = False
        query = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
        found = attend_tokens(query, keys, values, visible, 0.3, softcap, True, backend="numba")
        assert_equal(found, expect(query, keys, values, visible, 0.3, softcap), True)
        if dtype is torch.bfloat16:
            low = attend_tokens(query.to(dtype), keys, values, visible, 0.3, softcap, backend="numba")
            assert low.output.dtype is dtype and low.lse.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_that_are_picked(dtype):
    keys, values = (roomy(x.to(dtype), 9) for x in random_tokens(71, 64))
    pages = torch.tensor([[[4, 0], [1, 3]]])
    query = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    found = attend_pages(query, keys, values, pages, 16, None, 0.3, None)
    picked = torch.zeros(1, 2, 5, dtype=torch.bool).scatter_(2, pages, True).repeat_interleave(16, dim=2)
    assert_equal(found, expect(query, keys, values, picked[:, :, None, :71], 0.3), False)


def random_tokens(num_tokens, D, B=1, G=2):
    return torch.randn(2, B, G, num_tokens, D, generator=torch.Generator().manual_seed(num_tokens)).unbind(0)


def test_extreme_logits_lose_nothing():
    keys, values = random_tokens(200, 64)
    query = 100 * torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    found = attend_tokens(query, keys, values, None, 1.0, with_probs=True, backend="numba")
    expected = expect(query, keys, values, None, 1.0)
    assert (found.output - expected[0]).abs().max() < 5e-3  # of logits of 5,000 in float32
    plain = attend_tokens(query, keys, values, None, 1.0, backend="torch")
    assert (plain.output - expected[0]).abs().max() < 5e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_queries_that_are_not_finite_give_nan(bad):
    query = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    query[0, 1, 2, 3] = bad
    over_tokens = attend_tokens(query, *random_tokens(200, 64), None, 0.3, backend="numba")
    over_codes = attend_codes(query, random_codes(3, 64, 64, 64, 8), 8, None, 0.3, backend="numba")
    for found in (over_tokens.output, over_codes.output):
        assert found[0, 1, 2].isnan().all()
        assert found[0, 0].isfinite().all() and found[0, 1, :2].isfinite().all() and found[0, 1, 3].isfinite().all()


def test_heads_spread_over_threads_are_the_same(monkeypatch):
    keys, values = random_tokens(200, 64, B=3)
    query = torch.randn(3, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    alone, spread = [], []
    for threads, found in ((1, alone), (2, spread)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found += attend_tokens(query, keys, values, None, 0.3, None, True, backend="numba")
    for one, two in zip(alone, spread):
        assert torch.equal(one, two)


def test_the_choice_is_told_and_forced(monkeypatch):
    monkeypatch.setattr(backends, "_choices", {})  # what other tests forced is known, and not asked again
    keys, values = random_tokens(backends.LEAST_NUMBERS // 128, 64)
    query = torch.randn(1, 2, 4, 64)
    by_default = attend_tokens(query, keys, values, None, 0.3)
    attend_tokens(query, keys[:, :, 1:], values[:, :, 1:], None, 0.3)
    with backends.forced("torch"):
        plain = attend_tokens(query, keys, values, None, 0.3)
    with pytest.raises(ValueError, match="no kernel for float64"):
        attend_tokens(query.double(), keys.double(), values.double(), None, 0.3, backend="numba")
    attend_tokens(query.double(), keys.double(), values.double(), None, 0.3)
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend 'triton' needs a GPU, the tensors are on 'cpu'"):
        attend_tokens(query[:, :, :3], keys, values, None, 0.3, backend="triton")
    told = {
        (choice.dtype, choice.backend, choice.reason)
        for choice in backends.backend_report()
        if choice.op == "attend_tokens"
    }
    assert told >= {
        ("float32", "numba", "a CPU and one new token"),
        ("float32", "torch", "too few tokens for a kernel to pay"),
        ("float32", "torch", "forced"),
        ("float64", "torch", "no kernel for float64"),
    }
    torch.testing.assert_close(by_default.output, plain.output, atol=1e-5, rtol=1e-5)


def test_gradients_are_torchs():
    keys, values = random_tokens(1000, 64)
    query = torch.randn(1, 2, 4, 64, requires_grad=True)
    attend_alone(query, keys, values, None, 0.3).sum().backward()
    assert query.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="gradients"):
        attend_tokens(query, keys, values, None, 0.3, backend="numba")
    with torch.no_grad():
        found = attend_tokens(query, keys, values, None, 0.3, backend="numba")
    assert_equal(found, expect(query.detach(), keys, values, None, 0.3), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_scores_equal_their_definition(dtype):
    keys = roomy(random_tokens(16 * 37, 80, B=2)[0].to(dtype).unflatten(2, (-1, 16)).flatten(3), 3)
    lowest, highest = (f(keys.unflatten(3, (16, 80)), dim=3) for f in (torch.amin, torch.amax))
    query = torch.randn(2, 2, 4, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = page_scores(query, lowest, highest, "numba")
    expected = torch.maximum(
        query.double()[:, :, :, None] * highest.double()[:, :, None],
        query.double()[:, :, :, None] * lowest.double()[:, :, None],
    )
    assert (found - expected.sum((2, 4))).abs().max() < (1e-4 if dtype is torch.float32 else 0.5)


def test_the_definition_gives_what_the_kernel_gives():
    codes = random_codes(3, 64, 64, 64, 8)
    query = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    found = attend_codes(query, codes, 8, None, 0.3, None, True, backend="numba")
    for one, two in zip(found, define_attend_codes(query, codes, 8, None, 0.3, None, True)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_any_layout_is_the_array_it_stands_for():
    base = torch.arange(2 * 3 * 8 * 10, dtype=torch.float32).view(2, 3, 8, 10)
    layouts = {
        "dense": base,
        "start of a buffer": base[:, :, :5],
        "end of a buffer": base[:, :, 5:],
        "one row": base[1:, :, :5],
        "one head": base[:, 1:2, :5],
        "heads apart": base[:, ::2, :5],
        "rows and heads swapped": base.transpose(0, 1)[:, :, :5],
        "channels of more": base[..., :4],
        "channels apart": base[..., ::2],
        "one row for all": base[:1].expand(4, -1, -1, -1),
        "one head for all": base[:, :1].expand(-1, 4, -1, -1),
        "heads at odd places": base.flatten()[: 3 * 47].view(1, 3, 47)[..., :40].unflatten(-1, (4, 10)),
        "nothing": base[:, :, :0],
    }
    for name, x in layouts.items():
        found = by_head(x)
        assert found.flags.c_contiguous, name
        assert (found[:, : x.shape[2]] == x.flatten(0, 1).numpy()).all(), name
    assert by_head(base[:, :, :5]).base is not None and by_head(base[:, :, :5]).shape == (6, 8, 10)
