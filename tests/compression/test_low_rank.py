"""Low-rank codecs against singular values in float64 and plain attention; the choice of codecs against all choices."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pikv_core.cache.rotary import Rotary
from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.compression.base import LayerSamples
from pikv_core.compression.knapsack import choose
from pikv_core.compression.low_rank import Basis, LowRank
from pikv_core.compression.measured import measure
from pikv_core.errors import PiKVError, UsageError
from pikv_kernels.backends import backend_report, forced
from pikv_kernels.partial_attention import partial_attention

TRAINED = ["lora", "lora-int8", "lora-int4"]


def make_samples(head_dim=16, G=2, windows=3, num_tokens=64, seed=0, rotary=None, dtype=torch.float32, mixed=2.0):
    """Return samples whose channels have very unequal sizes, mixed differently in each head."""
    mixing = torch.Generator().manual_seed(7)
    sizes = mixed ** -torch.arange(head_dim)
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        basis = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=mixing)).Q
        return (torch.randn(windows, heads, num_tokens, head_dim, generator=generator) * sizes * 4) @ basis

    position = torch.arange(num_tokens)
    keys, values, queries = draw(G), draw(G), draw(2 * G)
    if rotary is not None:
        keys, queries = (rotary.rotate(x, position, 0) for x in (keys, queries))
    return LayerSamples(queries.to(dtype), keys.to(dtype), values.to(dtype), position, head_dim**-0.5, rotary)


@pytest.fixture(scope="module")
def rotary(small_model):
    return Rotary.of(small_model("llama"))


def fitted(samples, name="svd", **options):
    codec = build(CODECS, Component(name, options))
    found = codec.fit([samples])
    return codec.for_layer(0, found.tensors, samples.rotary), found


def round_trip(codec, samples):
    position = samples.position.expand(samples.keys.shape[:3])
    return codec.decode(codec.encode(samples.keys, samples.values, position), position, samples.keys.dtype)


def by_head(x):
    return x.double().transpose(0, 1).flatten(1, 2).numpy()


@pytest.mark.parametrize("rope", ["after", "before"])
@pytest.mark.parametrize("rank", [1, 5, 15, 16])
def test_the_error_of_svd_is_the_discarded_singular_values(rotary, rope, rank):
    samples = make_samples(rotary=rotary)
    codec, _ = fitted(samples, rank=rank, rope=rope)
    bare = rotary.unrotate(samples.keys, samples.position, 0) if rope == "before" else samples.keys
    for found, exact, coded in zip(round_trip(codec, samples), (samples.keys, samples.values), (bare, samples.values)):
        for difference, rows in zip(by_head(found - exact), by_head(coded)):
            squares = np.linalg.svd(rows, compute_uv=False) ** 2
            np.testing.assert_allclose(
                (difference**2).sum(), squares[rank:].sum(), rtol=1e-3, atol=1e-10 * squares.sum()
            )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_rank_is_the_smallest_that_keeps_the_energy_in_every_head(energy):
    samples = make_samples(mixed=1.3)
    codec, found = fitted(samples, energy=energy)
    for basis, x in ((codec.key, samples.keys), (codec.value, samples.values)):
        ranks = []
        for rows in by_head(x):
            squares = np.linalg.svd(rows, compute_uv=False) ** 2
            kept = np.cumsum(squares) / squares.sum()
            ranks.append(next(r + 1 for r in range(16) if kept[r] >= energy - 1e-12 or r == 15))
        assert basis.rank == max(ranks)
    assert found.notes["layers"][0]["key_rank"] == codec.key.rank


def test_rope_auto_codes_keys_as_they_are_simpler(rotary):
    for coded, expected in ((rotary, "before"), (None, "after")):
        samples = make_samples(rotary=coded, mixed=4.0)
        samples = dataclasses.replace(samples, rotary=rotary)  # without rotation, keys are simple as they are
        found = fitted(samples, rank=4)[1]
        assert found.notes["layers"][0]["rope"] == expected


@pytest.mark.parametrize("name", ["svd", "lora-int8"])
@pytest.mark.parametrize("rope", ["after", "before"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_codes_is_attention_over_what_they_decode_to(rotary, monkeypatch, name, rope, softcap, dtype):
    monkeypatch.setattr("pikv_core.compression.low_rank.CPU_TILE", 48 * 3 * 2 * 16)  # 48 tokens
    samples = make_samples(num_tokens=128, rotary=rotary, dtype=dtype)
    codec = fitted(samples, name, rank=6, rope=rope, **({"steps": 5} if name != "svd" else {}))[0]
    position = samples.position.expand(samples.keys.shape[:3])
    encoded = codec.encode(samples.keys, samples.values, position)
    query = samples.queries.unflatten(1, (2, 2))[:, :, :, ::13].flatten(2, 3)
    visible = torch.rand(3, 1, query.shape[2], 128, generator=torch.Generator().manual_seed(1)) < 0.4
    visible[0, 0, 3] = False
    keys, values = codec.decode(encoded, position, torch.float32)
    for mask in (None, visible):
        expected = partial_attention(query.float(), keys, values, mask, 0.3, softcap, True)
        found = codec.attend(query, encoded, position, mask, 0.3, softcap, True)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        assert found.output.dtype == dtype
        torch.testing.assert_close(found.output.float(), expected.output, **close)
        torch.testing.assert_close(found.lse, expected.lse, **close)
        torch.testing.assert_close(found.probs, expected.probs, **close)
        assert codec.attend(query, encoded, position, mask, 0.3, softcap, False).probs is None


@pytest.mark.parametrize(
    "name, rope",
    [
        ("lora-int8", "before"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in itertools.product(["svd", "lora-int8", "lora-int4"], ["after", "before"])
            if x != ("lora-int8", "before")
        ),
    ],
)
def test_one_token_by_kernels_is_the_one_over_what_codes_decode_to(rotary, name, rope):
    samples = make_samples(num_tokens=128, rotary=rotary)
    codec = fitted(samples, name, rank=6, rope=rope, **({"steps": 5} if name != "svd" else {}))[0]
    position = samples.position.expand(samples.keys.shape[:3])
    encoded = codec.encode(samples.keys, samples.values, position)
    query = samples.queries.unflatten(1, (2, 2))[:, :, :, 5]
    visible = torch.rand(3, 1, 1, 128, generator=torch.Generator().manual_seed(1)) < 0.4
    keys, values = codec.decode(encoded, position, torch.float32)
    picked = codec.for_heads(torch.tensor([[1, 0]] * 3)), {name: x.flip(1) for name, x in encoded.items()}
    for mask in (None, visible):
        expected = partial_attention(query, keys, values, mask, 0.3, None, True)
        with forced("numba"):
            found = codec.attend(query, encoded, position, mask, 0.3, None, True)
            flipped = picked[0].attend(query.flip(1), picked[1], position, mask, 0.3, None, True)
        for one, two, three in zip(found, expected, flipped):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(three.flip(1), two, rtol=1e-4, atol=1e-4)
    with forced("numba"):
        pages = torch.tensor([[[1], [0]]] * 3)
        found = codec.attend_pages(query, encoded, pages, 64, visible, 0.3, None)
    if rope == "before":
        assert found is None
    else:
        is_read = torch.nn.functional.one_hot(pages[..., 0], 2).bool().repeat_interleave(64, dim=-1)[:, :, None]
        expected = partial_attention(query, keys, values, visible & is_read, 0.3)
        torch.testing.assert_close(found.output, expected.output, rtol=1e-4, atol=1e-4)
    ran = {choice.op for choice in backend_report() if (choice.backend, choice.reason) == ("numba", "forced")}
    assert {"before": "attend_rebuilt", "after": "attend_tokens" if name == "svd" else "attend_codes"}[rope] in ran


@pytest.mark.parametrize("name", ["svd", "lora-int8"])
def test_one_token_by_triton_where_the_query_is_taken_into_the_basis(rotary, name, monkeypatch):
    monkeypatch.setattr("pikv_kernels.backends._choices", {})
    samples = make_samples(num_tokens=128, rotary=rotary)
    codec = fitted(samples, name, rank=8, rope="after", **({"steps": 5} if name != "svd" else {}))[0]
    position = samples.position.expand(samples.keys.shape[:3])
    encoded = codec.encode(samples.keys, samples.values, position)
    query = samples.queries.unflatten(1, (2, 2))[:, :, :, 5]
    with forced("torch"):
        expected = codec.attend(query, encoded, position, None, 0.3, None, True)
    with forced("triton"):
        found = codec.attend(query, encoded, position, None, 0.3, None, True)
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
    ran = {choice.op for choice in backend_report() if choice.backend == "triton"}
    assert ("attend_tokens" if name == "svd" else "attend_codes") in ran


@pytest.mark.parametrize("rope", ["after", "before"])
def test_codes_take_the_bytes_of_the_ranks(rotary, rope):
    samples = make_samples(rotary=rotary, dtype=torch.bfloat16)
    codec = fitted(samples, rank=5, rope=rope)[0]
    position = samples.position.expand(samples.keys.shape[:3])
    encoded = codec.encode(samples.keys, samples.values, position)
    assert all(x.dtype == torch.bfloat16 for x in encoded.values())
    assert sum(x.nbytes for x in encoded.values()) == 2 * position.numel() * 5 * 2
    assert measure(codec, samples).num_bytes == position.numel() * (20 + 4)


@pytest.mark.parametrize("name", ["svd", *TRAINED])
def test_heads_that_are_picked_use_their_own_bases(rotary, name):
    samples = make_samples(G=3, rotary=rotary)
    codec = fitted(samples, name, rank=4, **({} if name == "svd" else {"steps": 2}))[0]
    whole = round_trip(codec, samples)
    heads = torch.tensor([[2], [0], [2], [1]])
    rows = torch.tensor([0, 2, 1, 1])
    picked = codec.for_heads(heads)
    position = samples.position.expand(4, 1, -1)
    keys, values = (x[rows, heads[:, 0]][:, None] for x in (samples.keys, samples.values))
    encoded = picked.encode(keys, values, position)
    for found, expected in zip(picked.decode(encoded, position, torch.float32), whole):
        torch.testing.assert_close(found[:, 0], expected[rows, heads[:, 0]], rtol=1e-4, atol=1e-4)
    query = samples.queries[rows, 2 * heads[:, 0]][:, None, ::9]
    expected = partial_attention(query, *picked.decode(encoded, position, torch.float32), None, 0.25)
    torch.testing.assert_close(
        picked.attend(query, encoded, position, None, 0.25, None, False).output, expected.output, rtol=1e-3, atol=1e-4
    )


def test_empty_slots_stay_finite_and_change_nobody(rotary):
    samples = make_samples(rotary=rotary)
    codec = fitted(samples, rank=6)[0]
    position = samples.position.expand(samples.keys.shape[:3]).clone()
    position[:, :, 5] = -1
    found = codec.decode(codec.encode(samples.keys, samples.values, position), position, torch.float32)
    rest = torch.arange(64) != 5
    for x, y in zip(found, round_trip(codec, samples)):
        assert x.isfinite().all() and torch.equal(x[:, :, rest], y[:, :, rest])


def blind_samples(seed, windows=8):
    """Return samples with large channels that no query looks at, which singular vectors nonetheless go after."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, sizes):
        return torch.randn(windows, heads, 48, 16, generator=generator) * torch.tensor(sizes)

    return LayerSamples(
        queries=draw(4, [0.0] * 4 + [3.0] * 12),
        keys=draw(2, [3.0] * 4 + [1.0] * 4 + [0.1] * 8),
        values=draw(2, [1.0] * 4 + [0.01] * 12),
        position=torch.arange(48),
        scale=0.25,
        rotary=None,
    )


@pytest.mark.parametrize("name", TRAINED)
def test_trained_bases_beat_singular_vectors_on_held_out_and_on_new_text(name):
    codec, found = fitted(blind_samples(0), name, rank=4, steps=300)
    notes = found.notes["layers"][0]
    assert notes["held_out_error"] < 0.5 * notes["held_out_error_of_svd"]
    if name == "lora":
        svd = fitted(blind_samples(0), rank=4)[0]
        assert measure(codec, blind_samples(1)).output_error < 0.5 * measure(svd, blind_samples(1)).output_error


@pytest.mark.parametrize("windows", [1, 8])
@pytest.mark.parametrize("options", [{"lr": 30.0}, {"dropout": 0.9}, {"alpha": 64.0, "lr": 1e-9}])
def test_training_never_ends_worse_than_it_started(windows, options):
    samples = make_samples(windows=windows)
    codec, found = fitted(samples, "lora", rank=4, steps=10, **options)
    notes = found.notes["layers"][0]
    assert notes["held_out_error"] <= notes["held_out_error_of_svd"]
    # The error in the notes is that of what is kept, on a quarter of the windows, or of the tokens of one.
    rows, tokens = (slice(windows // 4), slice(None)) if windows > 1 else (slice(None), slice(48, None))
    parts = (x[rows, :, tokens] for x in (samples.queries, samples.keys, samples.values))
    held_out = LayerSamples(*parts, samples.position[tokens], samples.scale, None)
    assert measure(codec, held_out).output_error == pytest.approx(notes["held_out_error"], rel=1e-4)


def test_training_is_the_same_each_time():
    twice = [fitted(blind_samples(0), "lora", rank=4, dropout=0.1, steps=20)[1].tensors for _ in range(2)]
    assert all(torch.equal(x, twice[1][name]) for name, x in twice[0].items())


@pytest.mark.parametrize(("name", "smallest"), [("lora-int8", 8), ("lora-int4", 4)])
def test_quantised_codes_are_the_low_rank_ones_within_half_a_step(name, smallest):
    samples = make_samples(num_tokens=128)
    codec = fitted(samples, name, rank=8, steps=2)[0]
    exact = dataclasses.replace(codec, codes=build(CODECS, Component("none")))
    position = samples.position.expand(samples.keys.shape[:3])
    encoded = codec.encode(samples.keys, samples.values, position)
    found = codec.codes.decode(encoded, position, torch.float32)
    codes = exact.encode(samples.keys, samples.values, position)
    assert codec.unit_tokens == 64
    keys = codes["keys"].unflatten(2, (-1, 64))
    step = (keys.amax(3) - keys.amin(3)) / (2**smallest - 1)
    error = (found[0] - codes["keys"]).unflatten(2, (-1, 64)).abs().amax(3)
    assert (error <= 0.51 * step + 1e-6).all()


def test_what_cannot_be_fitted_is_refused():
    samples = make_samples()
    with pytest.raises(PiKVError, match="rank 17 is more than the 16 channels"):
        fitted(samples, rank=17)
    with pytest.raises(PiKVError, match="rank 20 is more than"):
        fitted(samples, "lora", rank=20)
    with pytest.raises(PiKVError, match="no rotary embedding"):
        fitted(samples, rank=4, rope="before")


@pytest.mark.parametrize("name", [name for name in CODECS.names() if CODECS[name].calibrated])
def test_nothing_runs_uncalibrated(name):
    codec = build(CODECS, Component(name)).for_layer(0, {}, None)
    x = torch.zeros(1, 1, 64, 16)
    with pytest.raises(PiKVError, match="only after calibration") as caught:
        codec.encode(x, x, torch.zeros(1, 1, 64, dtype=torch.int32))
    assert f"--calibrate --method {name}" in caught.value.hint


def test_a_calibration_before_rotation_needs_the_rotation(rotary):
    codec = build(CODECS, Component("svd", {"rope": "before", "rank": 4}))
    found = codec.fit([make_samples(rotary=rotary)])
    with pytest.raises(PiKVError, match="rotary embedding"):
        codec.for_layer(0, found.tensors, None)


def test_the_knapsack_equals_the_best_of_all_choices():
    rng = np.random.default_rng(0)
    for _ in range(200):
        places, candidates = rng.integers(1, 6), rng.integers(1, 5)
        errors = rng.random((places, candidates)).tolist()
        costs = (rng.integers(0, 12, (places, candidates)) * rng.integers(1, 9)).tolist()
        budget = int(rng.integers(0, 12 * 4 * places))
        best = None
        for picks in itertools.product(range(candidates), repeat=places):
            if sum(costs[i][p] for i, p in enumerate(picks)) <= budget:
                error = sum(errors[i][p] for i, p in enumerate(picks))
                best = error if best is None else min(best, error)
        found = choose(errors, costs, budget)
        if best is None:
            assert found is None
            continue
        assert sum(costs[i][p] for i, p in enumerate(found)) <= budget
        assert sum(errors[i][p] for i, p in enumerate(found)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("share", [0.13, 0.2, 0.3, 0.6])
def test_auto_spends_its_bytes_where_they_help_most(share):
    names = ["none", "int8", "int4", "svd"]
    samples = [make_samples(64, num_tokens=128, mixed=mixed, dtype=torch.float32) for mixed in (1.02, 1.5, 1.1)]
    auto = build(CODECS, Component("auto", {"bytes_share": share, "candidates": names}))
    found = auto.fit(samples)
    layers = [auto.for_layer(i, found.tensors, None) for i in range(3)]
    measured = [measure(codec, sample) for codec, sample in zip(layers, samples)]
    full = sum(x.full_bytes for x in measured)
    assert sum(x.num_bytes for x in measured) <= share * full
    assert found.notes["bytes_share"] == pytest.approx(sum(x.num_bytes for x in measured) / full)

    svd = build(CODECS, Component("svd"))
    tensors = svd.fit(samples).tensors
    options = [
        [
            measure(svd.for_layer(i, tensors, None) if name == "svd" else build(CODECS, Component(name)), sample)
            for name in names
        ]
        for i, sample in enumerate(samples)
    ]
    best = min(
        sum(x.output_error for x in picks)
        for picks in itertools.product(*options)
        if sum(x.num_bytes for x in picks) <= share * full
    )
    assert sum(x.output_error for x in measured) == pytest.approx(best, rel=1e-6)


def test_auto_refuses_what_it_cannot_choose_or_reach():
    samples = [make_samples(64, num_tokens=256)]
    for name in ("auto", "levels"):
        with pytest.raises(UsageError, match=f"cannot choose '{name}'"):
            build(CODECS, Component("auto", {"candidates": ["int8", name]})).fit(samples)
    with pytest.raises(PiKVError, match=r"bytes_share 0\.05 is below"):
        build(CODECS, Component("auto", {"bytes_share": 0.05, "candidates": ["int8"]})).fit(samples)
    with pytest.raises(PiKVError, match="a unit is 64 tokens"):
        build(CODECS, Component("auto", {"candidates": ["int8"]})).fit([make_samples(num_tokens=63)])


def test_a_basis_moves_to_the_tensors_it_is_used_on_and_is_shared_by_copies():
    down = torch.eye(4)[None, :, :2]
    codec = LowRank(Basis(down, down), Basis(down, down), build(CODECS, Component("none")))
    x = torch.zeros(1, 1, 3, 4, device="meta")
    assert codec.key.project(x).device.type == "meta" and codec.key.rank == 2
    assert copy.deepcopy(codec).key is codec.key
