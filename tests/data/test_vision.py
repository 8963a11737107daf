"""Digits and modalities: the pixels and numbers of the source, in stratified splits, with what is missing told."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_breast_cancer, load_digits

from pikv_core.data import strata, tensor_files
from pikv_core.data.vision import Vision, draw_present, patches
from pikv_core.errors import PiKVError, UsageError
from pikv_core.runs import Reporter


def write(folder, num_samples=2000, seed=0, **options):
    """Return the tensors of the training and the test split, and what corpus.json says."""
    files = Vision(**options).write(folder, num_samples, seed, [], None, Reporter())
    train, test = (load_file(folder / f"vision.{split}.safetensors") for split in ("train", "test"))
    assert files == {
        "vision.train.safetensors": len(train["labels"]),
        "vision.test.safetensors": len(test["labels"]),
    }
    return train, test, json.loads((folder / "corpus.json").read_text())


def rows(*splits):
    """Return the samples of `patches` and their labels as a sorted list."""
    return sorted(
        (bytes(patch.tobytes()), int(label))
        for split in splits
        for patch, label in zip(split["patches"], split["labels"], strict=True)
    )


def test_a_patch_is_a_square_of_the_image():
    images = np.arange(2 * 64, dtype=float).reshape(2, 8, 8)
    for side in (1, 2, 4, 8):
        cut = patches(images, side)
        assert cut.shape == (2, 64 // side**2, side**2)
        for number in range(cut.shape[1]):
            down, right = divmod(number, 8 // side)
            square = images[1, down * side : (down + 1) * side, right * side : (right + 1) * side]
            assert np.array_equal(cut[1, number], square.ravel().astype(np.float32) / 16)


def test_digits_are_all_there_once_and_bounded(tmp_path):
    train, test, told = write(tmp_path)
    assert (train["patches"].shape, train["patches"].dtype) == ((1438, 16, 4), np.float32)
    assert (test["patches"].shape, test["labels"].dtype) == ((359, 16, 4), np.int64)
    assert (told["num_train"], told["num_test"], told["num_available"]) == (1438, 359, 1797)
    source = load_digits()
    assert rows(train, test) == rows({"patches": patches(source.images, 2), "labels": source.target})
    assert train["patches"].min() == 0
    assert train["patches"].max() == 1


@pytest.mark.parametrize(("source", "num_samples"), [("digits", 2000), ("digits", 333), ("modalities", 101)])
def test_every_class_has_its_share_of_both_splits(source, num_samples, tmp_path):
    train, test, told = write(tmp_path, num_samples, source=source)
    full = (load_digits if source == "digits" else load_breast_cancer)().target
    drawn = np.bincount(train["labels"]) + np.bincount(test["labels"])
    assert drawn.sum() == min(num_samples, told["num_available"])
    assert np.all(np.abs(drawn - np.bincount(full) * drawn.sum() / len(full)) < 1)
    assert np.all(np.abs(np.bincount(test["labels"]) - drawn * len(test["labels"]) / drawn.sum()) < 1)
    assert len(test["labels"]) == round(0.2 * drawn.sum())


def test_strata_of_unlike_classes():
    labels = np.repeat(np.arange(5), [1, 2, 30, 300, 3000])
    for num_samples, num_test in ((3333, 333), (1000, 100), (7, 3), (2, 1)):
        train, test = strata.split(labels, num_samples, num_test, np.random.default_rng(num_samples))
        assert (len(train), len(test)) == (num_samples - num_test, num_test)
        assert len(np.union1d(train, test)) == num_samples
        drawn = np.bincount(labels[np.concatenate([train, test])], minlength=5)
        assert np.all(np.abs(drawn - np.bincount(labels) * num_samples / 3333) < 1)
        assert np.all(np.abs(np.bincount(labels[test], minlength=5) - drawn * num_test / num_samples) < 1)


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed=seed, source="modalities", missing_share=0.3)
    first, again, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("a", "b", "c")
    )
    assert first == again
    assert {name for name in first if first[name] == other[name]} == {"vision.json"}  # the options


def test_modalities_hold_the_three_kinds_of_feature_standardised_on_the_training_split(tmp_path):
    train, test, told = write(tmp_path, source="modalities")
    assert train["modalities"].shape == (455, 3, 10)
    np.testing.assert_allclose(train["modalities"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train["modalities"].std(axis=0), 1, atol=1e-5)
    assert np.abs(test["modalities"].mean(axis=0)).max() > 0.01
    source = load_breast_cancer()
    assert told["classes"] == ["malignant", "benign"]
    both = np.concatenate([train["modalities"], test["modalities"]])
    labels = np.concatenate([train["labels"], test["labels"]])
    raw = source.data.reshape(-1, 3, 10)  # the source has the thirty in this order
    assert [str(name) for name in source.feature_names[[0, 10, 20]]] == ["mean radius", "radius error", "worst radius"]
    for modality, feature in ((0, 0), (1, 3), (2, 9)):
        ranks = np.sort(both[:, modality, feature])
        expected = np.sort(raw[:, modality, feature])
        assert np.corrcoef(ranks, expected)[0, 1] == pytest.approx(1, abs=1e-6)
    benign = [values[target == 1, 0, 0].mean() for values, target in ((both, labels), (raw, source.target))]
    spread = raw[:, 0, 0].std()
    assert benign[0] == pytest.approx((benign[1] - raw[:, 0, 0].mean()) / spread, abs=0.1)


def test_what_is_missing_is_empty_and_told(tmp_path):
    whole, missing = (write(tmp_path / str(share), source="modalities", missing_share=share)[0] for share in (0.0, 0.5))
    assert np.all(whole["combination"] == 0)
    assert np.all(whole["present"])
    present = missing["present"]
    assert present.any(axis=1).all()
    assert np.array_equal(missing["labels"], whole["labels"])
    assert np.array_equal(missing["modalities"][present], whole["modalities"][present])
    assert not missing["modalities"][~present].any()
    by_hand = [sum(2**m for m in range(3) if not row[m]) for row in present]
    assert missing["combination"].tolist() == by_hand
    assert set(by_hand) == set(range(7))


@pytest.mark.parametrize("missing_share", [0.0, 0.2, 0.7])
def test_modalities_are_missing_in_their_share(missing_share):
    present = draw_present(np.random.default_rng(0), (200_000, 3), missing_share)
    # of the samples that lose all three, one modality comes back
    expected = 1 - missing_share + missing_share**3 / 3
    np.testing.assert_allclose(present.mean(axis=0), expected, atol=0.005)
    assert present.any(axis=1).all()


def test_baselines_by_hand(tmp_path):
    train, test, told = write(tmp_path, 400, source="modalities", missing_share=0.2)
    assert told["baselines"]["majority_accuracy"] == np.mean(test["labels"] == 1)
    means = [train["modalities"][train["labels"] == label].mean(axis=0) for label in (0, 1)]
    nearer = [np.sum((row - means[1]) ** 2) < np.sum((row - means[0]) ** 2) for row in test["modalities"]]
    assert told["baselines"]["nearest_mean_accuracy"] == np.mean(test["labels"] == nearer)
    assert 0.8 < told["baselines"]["nearest_mean_accuracy"] < 1


def test_two_samples_are_enough_and_one_is_not(tmp_path):
    train, test, _ = write(tmp_path / "two", 2, source="modalities")
    assert np.isfinite(train["modalities"]).all()
    assert np.isfinite(test["modalities"]).all()
    with pytest.raises(UsageError, match=r"num_samples: .* need 2 samples or more, got 1"):
        write(tmp_path / "one", 1)


def test_a_share_leaves_both_splits_a_sample():
    assert [strata.num_held_out(0.2, number) for number in (2, 7, 10, 1797)] == [1, 1, 2, 359]
    assert [strata.num_held_out(0.95, number) for number in (2, 5, 100)] == [1, 4, 95]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"missing_share": 0.1}, "missing_share"), ({"source": "modalities", "patch": 4}, "patch")],
)
def test_an_option_of_the_other_source_is_refused(options, name):
    with pytest.raises(UsageError, match=f"no option '{name}'"):
        Vision(**options)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(PiKVError, match="scikit-learn") as caught:
        write(tmp_path)
    assert "pikv[tasks]" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="'vision' is made without text"):
        Vision().write(tmp_path, 10, 0, ["a.txt"], None, Reporter())


def test_a_tensor_of_any_layout_reads_back(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor_files.save({"turned": values.T, "every_other": values[:, ::2]}, tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert np.array_equal(read["turned"], values.T)
    assert np.array_equal(read["every_other"], values[:, ::2])
