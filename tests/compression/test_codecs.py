"""What every registered codec promises: shapes, dtypes, finite numbers, and heads and units that do not mix."""

import pytest
import torch
from compression.calibrated import ready

from pikv_core.cache.store import EMPTY, Store
from pikv_core.compression import CODECS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = CODECS.names()


def random_tokens(codec, num_units, dtype=torch.float32, head_dim=64, B=2, G=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N = num_units * codec.unit_tokens
    keys, values = torch.randn(2, B, G, N, head_dim, generator=generator).to(dtype).unbind(0)
    return keys, values, torch.arange(N).expand(B, G, N)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_decoding_returns_the_same_shape_and_finite_numbers(name, dtype, head_dim):
    codec = ready(name, head_dim)
    keys, values, position = random_tokens(codec, 3, dtype, head_dim)
    encoded = codec.encode(keys, values, position)
    assert all(x.shape[:3] == (2, 2, 3) for x in encoded.values())
    for found in codec.decode(encoded, position, dtype):
        assert found.shape == keys.shape and found.dtype == dtype and found.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if not CODECS[name].calibrated])
def test_the_output_dtype_is_the_one_asked_for(name):
    codec = ready(name)
    keys, values, position = random_tokens(codec, 2, torch.bfloat16)
    encoded = codec.encode(keys, values, position)
    exact, rounded = (codec.decode(encoded, position, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all(torch.equal(a.to(torch.bfloat16), b.to(torch.bfloat16)) for a, b in zip(exact, rounded))


def assert_same(name, codec, found, expected, position):
    """Compare two encodings: bit for bit, or what they decode to where a product of matrices may round differently."""
    if not CODECS[name].calibrated:
        assert all(torch.equal(found[key], x) for key, x in expected.items())
        return
    for x, y in zip(codec.decode(found, position, torch.float32), codec.decode(expected, position, torch.float32)):
        assert (x - y).norm() <= 1e-3 * y.norm()


@pytest.mark.parametrize("name", NAMES)
def test_each_head_and_row_is_encoded_alone(name):
    codec = ready(name)
    keys, values, position = random_tokens(codec, 2)
    encoded = codec.encode(keys, values, position)
    row = slice(1, 2)
    alone = codec.encode(keys[row], values[row], position[row])
    assert_same(name, codec, alone, {key: x[row] for key, x in encoded.items()}, position[row])
    swapped = codec.encode(keys.flip(0), values.flip(0), position)
    assert_same(name, codec, swapped, {key: x.flip(0) for key, x in encoded.items()}, position)
    other = keys.clone()
    other[:, 1] *= 3
    changed = codec.encode(other, values, position)
    mixed = {key: torch.cat([x[:, :1], changed[key][:, 1:]], dim=1) for key, x in encoded.items()}
    assert_same(name, codec, changed, mixed, position)


@pytest.mark.parametrize("name", NAMES)
def test_units_encoded_apart_equal_units_encoded_together(name):
    codec = ready(name)
    keys, values, position = random_tokens(codec, 3)
    together = codec.encode(keys, values, position)
    parts = [slice(unit * codec.unit_tokens, (unit + 1) * codec.unit_tokens) for unit in range(3)]
    apart = [codec.encode(keys[:, :, part], values[:, :, part], position[:, :, part]) for part in parts]
    assert_same(
        name, codec, {key: torch.cat([one[key] for one in apart], dim=2) for key in together}, together, position
    )
    whole = codec.decode(together, position, torch.float32)
    for part, one in zip(parts, apart):
        decoded = codec.decode(one, position[:, :, part], torch.float32)
        assert all((x - y[:, :, part]).norm() <= 1e-3 * y.norm() for x, y in zip(decoded, whole))


@pytest.mark.parametrize("name", NAMES)
def test_empty_slots_change_nothing_of_the_tokens_beside_them(name):
    codec = ready(name)
    keys, values, position = random_tokens(codec, 2)
    is_empty = torch.rand(position.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    is_empty[0, 0, : codec.unit_tokens] = True
    position = position.masked_fill(is_empty, EMPTY)
    found = []
    for filler in (0.0, 1e4, torch.nan):
        held = [x.masked_fill(is_empty[..., None], filler) for x in (keys, values)]
        decoded = codec.decode(codec.encode(*held, position), position, torch.float32)
        found.append([x[~is_empty] for x in decoded])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_is_encoded_once_whatever_comes_later(name):
    """10,000 tokens arrive in pieces of many sizes: the bytes of early units never change."""
    codec = ready(name, 16, 1)
    generator = torch.Generator().manual_seed(2)
    store = Store(codec)
    early, num_tokens, seen = None, 0, []
    while num_tokens < 10_000:
        T = codec.unit_tokens * int(torch.randint(1, 8 if codec.unit_tokens > 1 else 500, (), generator=generator))
        keys, values = torch.randn(2, 1, 1, T, 16, generator=generator).unbind(0)
        position = (num_tokens + torch.arange(T)).view(1, 1, T)
        store.append(keys, values, position)
        seen.append((keys, values))
        num_tokens += T
        num_units = seen[0][0].shape[2] // codec.unit_tokens
        first = {key: x[:, :, :num_units] for key, x in store._encoded.items()}
        early = early or {key: x.clone() for key, x in first.items()}
        assert all(torch.equal(early[key], x) for key, x in first.items())
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen))
    position = torch.arange(num_tokens).view(1, 1, num_tokens)
    at_once = codec.encode(keys, values, position)
    assert_same(
        name, codec, {key: store._encoded[key][:, :, : x.shape[2]] for key, x in at_once.items()}, at_once, position
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_store_keeps_tokens_and_columns_together(name):
    codec = ready(name)
    unit = codec.unit_tokens
    store = Store(codec, ("mass",))
    keys, values, position = random_tokens(codec, 6)
    mass = torch.rand(position.shape, generator=torch.Generator().manual_seed(3))
    for start in range(0, 6 * unit, 2 * unit):
        part = slice(start, start + 2 * unit)
        store.append(keys[:, :, part], values[:, :, part], position[:, :, part], {"mass": mass[:, :, part]})
    decoded = store.decoded()
    units = torch.tensor([[[0, 3], [4, 1]], [[2, 3], [0, 4]]])
    store.keep(units)
    assert store.num_slots == 2 * unit
    slots = store.position.long()
    assert torch.equal(slots, (units[..., None] * unit + torch.arange(unit)).flatten(2))
    assert torch.equal(store.columns()["mass"], mass.gather(2, slots))
    for found, whole in zip(store.decoded(), decoded):
        assert torch.allclose(found, whole.gather(2, slots[..., None].expand(-1, -1, -1, 64)), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_frees_its_bytes(name):
    codec = ready(name)
    store = Store(codec)
    store.append(*random_tokens(codec, 40))
    before = store.nbytes
    store.keep(torch.arange(10).expand(2, 2, 10))
    assert store.nbytes <= 0.26 * before


@pytest.mark.parametrize("name", NAMES)
def test_spare_room_is_finite(name, monkeypatch):
    """Pages read with the last, partial one multiply unused slots by a weight of 0: NaN there would spread."""

    def poisoned(x, *shape, **options):
        return torch.full(shape, torch.nan if x.is_floating_point() else 77, dtype=options.get("dtype", x.dtype))

    codec = ready(name, 16)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    store = Store(codec, ("mass",), grain_slots=4 * codec.unit_tokens)
    for _ in range(5):
        store.append(*random_tokens(codec, 1, head_dim=16, B=1))
        for tensor in (*store._encoded.values(), *store._columns.values()):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_probs", [False, True])
def test_attending_equals_attention_over_what_is_decoded(name, with_probs):
    codec = ready(name)
    keys, values, position = random_tokens(codec, 3)
    N = keys.shape[2]
    query = torch.randn(2, 2, 5, 64, generator=torch.Generator().manual_seed(4))
    visible = torch.rand(2, 2, 5, N, generator=torch.Generator().manual_seed(5)) < 0.7
    visible[..., 0] = True
    encoded = codec.encode(keys, values, position)
    found = codec.attend(query, encoded, position, visible, 0.125, 30.0, with_probs)
    k, v = (x.double() for x in codec.decode(encoded, position, torch.float32))
    logits = (30 * torch.tanh(query.double() @ k.mT * 0.125 / 30)).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(found.output.double(), logits.softmax(-1) @ v, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.lse.double(), logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    if with_probs:
        torch.testing.assert_close(found.probs.double(), logits.softmax(-1), atol=1e-5, rtol=1e-4)
    else:
        assert found.probs is None
