"""Windows of series: cut from the series as it is, test after train, and baselines that can be worked out."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file
from statsmodels.datasets import co2, elnino, sunspots

from pikv_core.data import real_series
from pikv_core.data.series import Series
from pikv_core.errors import PiKVError, UsageError
from pikv_core.runs import Reporter

REAL = ["co2", "co2-weekly", "sunspots", "elnino"]


def write(folder, num_samples=10_000, seed=0, **options):
    """Return the tensors of the training and the test split, and what corpus.json says."""
    files = Series(**options).write(folder, num_samples, seed, [], None, Reporter())
    train, test = (load_file(folder / f"series.{split}.safetensors") for split in ("train", "test"))
    assert files == {"series.train.safetensors": len(train["start"]), "series.test.safetensors": len(test["start"])}
    return train, test, json.loads((folder / "corpus.json").read_text())


def mse(told, name):
    return {row["horizon"]: row["mse"] for row in told["baselines"][name]}


@pytest.mark.parametrize("num_samples", [10_000, 40])
@pytest.mark.parametrize("source", REAL)
def test_windows_are_cut_from_the_series_and_no_test_future_is_trained_on(source, num_samples, tmp_path):
    train, test, told = write(tmp_path, num_samples, source=source, context_length=60, horizons=(2, 32))
    record = real_series.read(source)
    step_of = {day: step for step, day in enumerate(record.days.astype(int).tolist())}
    last_seen = first_future = None
    for split in (train, test):
        assert split["context"].shape == (len(split["start"]), 60)
        assert split["future"].shape == (len(split["start"]), 32)
        assert split["context"].dtype == np.float32
        assert split["start"].dtype == np.int64
        assert len(set(split["start"].tolist())) == len(split["start"])
        steps = [step_of[start] for start in split["start"].tolist()]
        assert steps == sorted(steps)
        for row, step in enumerate(steps):
            expected = record.values[step : step + 92].astype(np.float32)
            assert np.array_equal(np.concatenate([split["context"][row], split["future"][row]]), expected)
        if split is train:
            last_seen = steps[-1] + 91
        else:
            first_future = steps[0] + 60
    assert last_seen < first_future
    assert told["first_test_future"] == str(record.days[first_future])
    assert (told["num_train"], told["num_test"]) == (len(train["start"]), len(test["start"]))
    assert told["num_test"] == round(0.2 * min(num_samples, told["num_windows"]))
    if num_samples > told["num_windows"]:  # nothing lies idle between the splits, or at either end
        assert steps[-1] + 92 == len(record.values)
        assert first_future == last_seen + 1
        assert record.days[0].astype(int) == train["start"][0]


def test_real_series_are_those_of_the_source():
    table = co2.load_pandas().data["co2"]
    weekly = real_series.read("co2-weekly")
    known = table.notna().to_numpy()
    assert (len(weekly.values), int((~known).sum())) == (2284, 59)
    assert np.array_equal(weekly.values[known], table.to_numpy()[known])
    np.testing.assert_allclose(weekly.values, table.interpolate("time").to_numpy(), rtol=1e-12)
    assert set(np.diff(weekly.days).astype(int)) == {7}

    monthly = real_series.read("co2")
    expected = table.interpolate("time").resample("MS").mean()
    np.testing.assert_allclose(monthly.values, expected.to_numpy(), rtol=1e-12)
    assert [str(monthly.days[0]), str(monthly.days[-1])] == ["1958-03-01", "2001-12-01"]
    assert np.array_equal(monthly.days, expected.index.to_numpy().astype("datetime64[D]"))

    years = real_series.read("sunspots")
    assert np.array_equal(years.values, sunspots.load_pandas().data["SUNACTIVITY"])
    assert [str(years.days[0]), str(years.days[-1]), len(years.days)] == ["1700-01-01", "2008-01-01", 309]

    sea = real_series.read("elnino")
    rows = elnino.load_pandas().data.set_index("YEAR")
    assert sea.values[12 * 7 + 2] == rows.loc[1957, "MAR"]
    assert [str(sea.days[12 * 7 + 2]), str(sea.days[-1])] == ["1957-03-01", "2010-12-01"]
    assert np.isfinite(sea.values).all()


@pytest.mark.parametrize("source", REAL)
def test_the_stated_period_is_that_of_the_series(source):
    record = real_series.read(source)
    steps = np.arange(len(record.values))
    rest = record.values - np.polynomial.Polynomial.fit(steps, record.values, 3)(steps)
    num_cycles = np.argmax(np.abs(np.fft.rfft(rest)))
    assert round(len(steps) / num_cycles) == record.period


def test_synthetic_errors_are_what_the_formula_says(tmp_path):
    options = {"period": 12, "trend": 0.05, "amplitude": 2.0, "noise": 0.5}
    _, _, told = write(tmp_path, 40_000, horizons=(1, 12, 24), context_length=24, **options)
    variance = 0.25
    assert told["num_train"] == 32_000
    for found in mse(told, "optimum").values():
        assert found == pytest.approx(variance, rel=0.05)
    # step h of a season repeated is (h-1)//12 + 1 seasons late, 12 * 0.05 each; noise counts twice
    late = [((h - 1) // 12 + 1) * 12 * 0.05 for h in range(1, 25)]
    for horizon, found in mse(told, "seasonal_naive").items():
        assert found == pytest.approx(2 * variance + np.mean(np.square(late[:horizon])), rel=0.05)
    assert mse(told, "naive")[12] > 2 * variance + 2 * 2.0**2 * 0.9


def test_without_noise_the_series_is_its_trend_and_season(tmp_path):
    train, test, told = write(tmp_path, 100, noise=0.0, trend=0.5, period=6, amplitude=3.0, context_length=12)
    assert set(mse(told, "optimum").values()) == {0}
    # a season later, the same and the trend
    rise = train["context"][:, 6:] - train["context"][:, :6]
    np.testing.assert_allclose(rise, 3.0, atol=1e-4)
    season = train["context"][0, :6] - 0.5 * np.arange(6)
    assert season.std() == pytest.approx(3, abs=1e-5)
    assert test["start"].min() + 12 == train["start"].max() + 12 + 64


def test_the_seed_decides_every_byte(tmp_path):
    for source in ("synthetic", "elnino"):
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            write(tmp_path / source / name, 50, seed, source=source)
        first, again, other = (
            {file.name: file.read_bytes() for file in (tmp_path / source / name).iterdir()} for name in ("a", "b", "c")
        )
        assert first == again
        assert first.keys() == other.keys()
        assert [name for name in first if first[name] == other[name]] == ["series.json"]  # the options alone


def test_a_longer_synthetic_series_begins_as_a_shorter_one():
    short, long = (Series().synthetic(5, number)[0].values for number in (100, 300))
    assert np.array_equal(short, long[:100])


def test_a_context_below_a_season_has_no_seasonal_baseline(tmp_path):
    _, _, told = write(tmp_path, source="co2-weekly", context_length=51)
    assert told["baselines"]["seasonal_naive"] is None
    assert told["baselines"]["naive"]


def test_too_little_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"'sunspots' has 0 with a context of 128 and 128 steps ahead, and 9 are"):
        write(tmp_path, 9, source="sunspots", horizons=(128,))
    with pytest.raises(UsageError, match="and 1 are asked for"):
        write(tmp_path, 1)
    train, test, _ = write(tmp_path, 2)
    assert (len(train["start"]), len(test["start"])) == (1, 1)
    train, test, _ = write(tmp_path, 5, test_share=0.95)
    assert (len(train["start"]), len(test["start"])) == (1, 4)


def test_options_of_the_synthetic_series_are_refused_elsewhere():
    with pytest.raises(UsageError, match="source 'co2' has no option 'noise'"):
        Series(source="co2", noise=0.1)


@pytest.mark.parametrize("wrong", [{"horizons": []}, {"horizons": [0]}, {"source": "tides"}, {"period": 1}])
def test_options_are_checked(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(Series).validate_python(wrong)


def test_without_the_package_the_extra_is_named_and_the_synthetic_series_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(PiKVError, match="statsmodels") as caught:
        write(tmp_path, source="co2")
    assert "pikv[tasks]" in caught.value.hint
    assert not list(tmp_path.iterdir())
    write(tmp_path, 20)


def test_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="'series' is made without text"):
        Series().write(tmp_path, 10, 0, [], "body", Reporter())
