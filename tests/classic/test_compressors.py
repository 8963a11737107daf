"""Compressors: what they return decodes from live storage, and what they report is measured on it."""

import numpy as np
import pytest
import torch

from pikv_core.classic import (
    Compressor,
    FastVCompressor,
    LoRACompressor,
    PiKVCompressor,
    PyramidCompressor,
    QuantizedCompressor,
    SVDCompressor,
)
from pikv_core.errors import PiKVError, RecipeError, UsageError

B, S, HIDDEN = 2, 256, 32


def low_rank(seed=0, rank=6, noise=0.1, shape=(B, S, HIDDEN)):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(*shape[:-1], rank, generator=generator) @ torch.randn(rank, shape[-1], generator=generator)
    return mixed + noise * torch.randn(*shape, generator=generator)


KEYS, VALUES = low_rank(1), low_rank(2)
IMPORTANCE = torch.rand(B, S, generator=torch.Generator().manual_seed(3))
MADE = {
    "none": lambda: Compressor(HIDDEN),
    "lora": lambda: LoRACompressor(HIDDEN, rank=8),
    "svd": lambda: SVDCompressor(HIDDEN, rank=8),
    "pyramid": lambda: PyramidCompressor(HIDDEN),
    "fastv": lambda: FastVCompressor(HIDDEN, 0.25),
    "int8": lambda: QuantizedCompressor(HIDDEN),
    "int4": lambda: QuantizedCompressor(HIDDEN, bits=4),
    "fp8": lambda: Compressor(HIDDEN, "fp8"),
    "lora-int4": lambda: Compressor(HIDDEN, "lora-int4"),
    "auto": lambda: Compressor(HIDDEN, "auto"),
}


@pytest.mark.parametrize("name", MADE)
def test_the_report_is_of_what_is_returned_and_of_live_storage(name):
    compressor = MADE[name]()
    compressor.calibrate(KEYS, VALUES)
    keys, values = compressor(KEYS, VALUES, IMPORTANCE)
    stats = compressor.get_compression_stats()
    places = compressor.positions
    assert keys.shape == values.shape == (B, stats["num_kept"], HIDDEN) and keys.dtype == KEYS.dtype
    assert (places.diff(dim=-1) > 0).all() and places.shape == (B, 1, stats["num_kept"])
    for found, given, error in ((keys, KEYS, "key_error"), (values, VALUES, "value_error")):
        whole = torch.zeros_like(given).scatter(1, places[:, 0, :, None].expand_as(found), found)
        assert stats[error] == pytest.approx(float((whole - given).norm() / given.norm()), abs=1e-6)
    storages = {}
    for layer, _ in compressor.held.parts:
        for lane in layer.lanes:
            for store in lane.stores:
                for x in (*store._encoded.values(), *store._columns.values()):
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    assert stats["resident_bytes"] == sum(storages.values())
    assert stats["full_bytes"] == KEYS.nbytes + VALUES.nbytes
    assert stats["compression_ratio"] == stats["resident_bytes"] / stats["full_bytes"]
    assert stats["compression_ratio"] < 0.55 or name == "none"
    assert name != "none" or (torch.equal(keys, KEYS) and stats["key_error"] == 0)


def test_codes_are_within_half_a_step():
    for bits in (8, 4):
        keys, _ = QuantizedCompressor(HIDDEN, bits=bits)(KEYS, VALUES)
        blocks = KEYS.unflatten(1, (-1, 64))
        step = (blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)) / (2**bits - 1)
        error = (keys - KEYS).unflatten(1, (-1, 64)).abs()
        assert (error <= step * 0.51 + 2e-3).all() and (error > 0).any()


def test_svd_errs_by_the_discarded_singular_values():
    compressor = SVDCompressor(HIDDEN, rank=5)
    compressor.calibrate(KEYS, VALUES)
    compressor(KEYS, VALUES)
    stats = compressor.get_compression_stats()
    for x, name in ((KEYS, "key_error"), (VALUES, "value_error")):
        singular = np.linalg.svd(x.double().reshape(-1, HIDDEN).numpy(), compute_uv=False)
        expected = np.sqrt((singular[5:] ** 2).sum() / (singular**2).sum())
        assert stats[name] == pytest.approx(expected, rel=1e-4)


def test_fastv_keeps_each_rows_most_important_tokens():
    compressor = FastVCompressor(HIDDEN, 0.25)
    keys, values = compressor(KEYS, VALUES, IMPORTANCE)
    for row in range(B):
        best = sorted(np.argsort(-IMPORTANCE[row].numpy())[:64].tolist())
        assert compressor.positions[row, 0].tolist() == best
        assert torch.equal(keys[row], KEYS[row, best]) and torch.equal(values[row], VALUES[row, best])
    with pytest.raises(UsageError, match="goes by importance"):
        compressor(KEYS, VALUES)


def test_the_pyramid_gives_importance_more_bits():
    keys, _ = PyramidCompressor(HIDDEN, compression_ratio=0.25, decay_factor=0.5)(
        KEYS[:, :192], VALUES[:, :192], IMPORTANCE[:, :192]
    )
    error = (keys - KEYS[:, :192]).square().sum(-1)
    by_importance = error.gather(1, IMPORTANCE[:, :192].argsort(dim=1, descending=True))
    top, middle, bottom = by_importance.unflatten(1, (3, 64)).mean(dim=(0, 2)).tolist()
    assert top * 2 < middle and middle * 2 < bottom


@pytest.mark.parametrize("method", ["quantized", "fastv", "svd"])
def test_tokens_over_the_threshold_stay_as_they_are(method):
    compressor = PiKVCompressor(HIDDEN, [method], importance_threshold=0.875)
    compressor.calibrate(KEYS, VALUES)
    importance = IMPORTANCE.clone()
    importance[:, 11] = torch.tensor([0.875, 0.0])
    keys, _ = compressor(KEYS, VALUES, importance)
    exact = [place for place in range(S) if float(importance[:, place].max()) >= 0.875]
    assert 11 in exact
    assert 20 < len(exact) < 80
    place_of = compressor.chosen.positions[:, 0]
    for row in range(B):
        found = {int(place): keys[row, index] for index, place in enumerate(place_of[row])}
        assert all(torch.equal(found[place], KEYS[row, place]) for place in exact)
        if method != "fastv":
            assert not all(torch.equal(found[place], KEYS[row, place]) for place in found)
    assert compressor.get_compression_stats()["num_kept"] == (128 if method == "fastv" else S)


def test_every_token_over_the_threshold_is_no_compression():
    compressor = PiKVCompressor(HIDDEN, ["fastv", "int4"], importance_threshold=0.0)
    keys, values = compressor(KEYS, VALUES, IMPORTANCE)
    assert torch.equal(keys, KEYS) and torch.equal(values, VALUES)


def test_heads_are_compressed_as_heads():
    keys, values = low_rank(5, shape=(B, 4, 128, 8)), low_rank(6, shape=(B, 4, 128, 8))
    for name in ("svd", "int8", "pyramid"):
        compressor = PiKVCompressor(HIDDEN, [name])
        compressor.calibrate(keys, values)
        found = compressor(keys, values)
        assert found[0].shape == found[1].shape == keys.shape
    one_head = QuantizedCompressor(HIDDEN)
    three, four = one_head(KEYS, VALUES), one_head(KEYS[:, None], VALUES[:, None])
    assert all(torch.equal(x, y[:, 0]) for x, y in zip(three, four))


METHODS = ["int8", "quantized", "pyramid", "fastv", "int4", "int2", "svd"]


@pytest.mark.parametrize("max_ratio", [1.0, 0.3, 0.2, 0.01])
@pytest.mark.parametrize("importance", [IMPORTANCE, None], ids=["importance", ""])
def test_adaptive_selection_takes_the_least_error_within_the_bytes(max_ratio, importance):
    compressor = PiKVCompressor(HIDDEN, METHODS, importance_threshold=2.0, max_ratio=max_ratio)
    compressor.calibrate(KEYS, VALUES)
    found = compressor(KEYS, VALUES, importance)
    stats = compressor.get_compression_stats()
    alone = {}
    for name in METHODS:
        if name == "fastv" and importance is None:
            continue
        one = PiKVCompressor(HIDDEN, [name], importance_threshold=2.0)
        one.calibrate(KEYS, VALUES)
        alone[name] = (one(KEYS, VALUES, importance), one.get_compression_stats())
    assert stats["candidates"] == {name: x["candidates"][name] for name, (_, x) in alone.items()}
    within = {name: x for name, (_, x) in alone.items() if x["compression_ratio"] <= max_ratio}
    if within:
        best = min(within, key=lambda name: within[name]["key_error"] + within[name]["value_error"])
    else:
        best = min(alone, key=lambda name: alone[name][1]["compression_ratio"])
    assert stats["method"] == best and all(torch.equal(x, y) for x, y in zip(found, alone[best][0]))


def test_without_adaptive_selection_the_first_method_compresses():
    compressor = PiKVCompressor(HIDDEN, ["int2", "int8"], adaptive_selection=False)
    compressor(KEYS, VALUES)
    assert compressor.get_compression_stats()["method"] == "int2"
    assert list(compressor.get_compression_stats()["candidates"]) == ["int2"]


@pytest.mark.parametrize("name", ["lora", "svd", "auto", "lora-int8"])
def test_uncalibrated_use_is_refused(name):
    compressor = PiKVCompressor(HIDDEN, ["int8", name])
    with pytest.raises(UsageError, match=f"'{name}' runs only after calibration") as error:
        compressor(KEYS, VALUES)
    assert "calibrate(keys, values)" in error.value.hint
    compressor.calibrate(KEYS, VALUES, low_rank(4))
    compressor(KEYS, VALUES)
    with pytest.raises(UsageError, match=r"was calibrated on \(heads, channels\) \(1, 32\), not \(2, 16\)"):
        compressor(KEYS.unflatten(2, (2, 16)).transpose(1, 2), VALUES.unflatten(2, (2, 16)).transpose(1, 2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PiKVCompressor(HIDDEN, ["pyramide"]), "did you mean 'pyramid'?"),
        (lambda: PiKVCompressor(HIDDEN, []), "no compression methods"),
        (lambda: QuantizedCompressor(HIDDEN, bits=3), "unknown codec 'int3'"),
        (lambda: QuantizedCompressor(HIDDEN, group=7), "multiple of 8"),
        (lambda: PyramidCompressor(HIDDEN, compression_ratio=2.0), "less than or equal to 1"),
        (lambda: LoRACompressor(HIDDEN, rank=0), "greater than or equal to 1"),
        (lambda: Compressor(HIDDEN, "int8", groups=8), "no option 'groups'; did you mean 'group'?"),
        (lambda: FastVCompressor(HIDDEN, 0.0), r"a share in \(0, 1\], got 0.0"),
        (lambda: Compressor(HIDDEN).get_compression_stats(), "nothing has been compressed yet"),
        (lambda: PiKVCompressor(HIDDEN, ["int8"]).get_compression_stats(), "nothing has been compressed yet"),
        (lambda: Compressor(HIDDEN)(KEYS[..., :16], VALUES[..., :16]), r"keys are \[2, 256, 16\]"),
        (lambda: Compressor(HIDDEN)(KEYS, VALUES[:, :3]), r"values \[2, 3, 32\]"),
        (lambda: Compressor(HIDDEN)(KEYS, VALUES, IMPORTANCE[:, :3]), r"importance \[2, 3\]"),
        (lambda: Compressor(HIDDEN)(KEYS * torch.nan, VALUES), "not finite"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises((UsageError, RecipeError, PiKVError), match=message):
        make()
