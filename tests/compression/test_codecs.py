"""Every codec keeps which tokens exist, in order; int8 stays within half a step; bytes are what they should be."""

import pytest
import torch

from pikv_core.cache.store import Store
from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.compression.int8 import Int8
from pikv_kernels.quantize_kv import dequantize, quantize


@pytest.mark.parametrize("name", CODECS.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_round_trip(name, dtype, head_dim):
    codec = build(CODECS, Component(name))
    T = 3 * codec.unit_tokens
    keys, values = torch.randn(2, 2, 2, T, head_dim).to(dtype).unbind(0)
    encoded = codec.encode(keys, values)
    assert all(x.shape[:3] == (2, 2, 3) if codec.unit_tokens > 1 else x.shape[2] == T for x in encoded.values())
    for found, exact in zip(codec.decode(encoded, dtype), (keys, values)):
        assert found.shape == exact.shape and found.dtype == dtype
        relative = (found.float() - exact.float()).norm() / exact.float().norm()
        assert relative <= 0.01, f"{name}: {relative}"


@pytest.mark.parametrize("offset", [0.0, 50.0, -3.0])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
def test_quantisation_error_is_at_most_half_a_step(offset, spread):
    x = offset + spread * torch.randn(7, 64)
    codes, scale, zero = quantize(x, dim=-1)
    error = (dequantize(codes, scale, zero, torch.float32) - x).abs()
    assert (error <= 0.5001 * scale.float() + 1e-6 * x.abs()).all()


def test_constant_groups_are_kept():
    for value in (0.0, 3.25, -1000.0, 1e-6):
        codes, scale, zero = quantize(torch.full((1, 32), value), dim=-1)
        found = dequantize(codes, scale, zero, torch.float32)
        assert (found - value).abs().max() <= max(2**-10 * abs(value), 2**-24)


def test_int8_bytes_per_token():
    codec = Int8(group=64)
    encoded = codec.encode(*torch.randn(2, 1, 1, 128, 64).unbind(0))
    per_token = sum(x.numel() * x.element_size() for x in encoded.values()) / 128
    assert per_token == 2 * 64 + 64 * 4 / 64 + 4  # codes, key scales and zeros by group, value scale and zero


@pytest.mark.parametrize("codec", [Int8(group=8), build(CODECS, Component("none"))])
def test_a_store_keeps_tokens_and_columns_together(codec):
    generator = torch.Generator().manual_seed(0)
    store = Store(codec, ("mass",))
    keys, values = torch.randn(2, 2, 2, 40, 16, generator=generator).unbind(0)
    position = torch.arange(40).expand(2, 2, 40)
    mass = torch.rand(2, 2, 40, generator=generator)
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        store.append(keys[:, :, part], values[:, :, part], position[:, :, part], {"mass": mass[:, :, part]})
    before = store.nbytes
    units = torch.tensor([[[0, 3], [4, 1]], [[2, 3], [0, 4]]]) if codec.unit_tokens == 8 else None
    if units is None:
        units = torch.rand(2, 2, 40, generator=generator).topk(16, -1).indices
    store.keep(units)
    assert store.num_slots == 16 and store.nbytes < 0.6 * before
    slots = store.position.long()
    assert torch.equal(store.columns()["mass"], mass.gather(2, slots))
    expected = keys.gather(2, slots[..., None].expand(-1, -1, -1, 16))
    assert (store.decoded()[0] - expected).abs().max() < 0.02


@pytest.mark.parametrize("name", CODECS.names())
def test_spare_room_is_finite(name, monkeypatch):
    """Pages read with the last, partial one multiply unused slots by a weight of 0: NaN there would spread."""

    def poisoned(x, *shape, **options):
        return torch.full(shape, torch.nan if x.is_floating_point() else 77, dtype=options.get("dtype", x.dtype))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    codec = build(CODECS, Component(name))
    store = Store(codec, ("mass",), grain_slots=4 * codec.unit_tokens)
    for _ in range(5):
        T = codec.unit_tokens
        store.append(*torch.randn(2, 1, 2, T, 16).unbind(0), torch.zeros(1, 2, T))
        for tensor in (*store._encoded.values(), *store._columns.values()):
            assert tensor.isfinite().all()
