"""Training forecasters: exact resuming, samples as stated, held-out errors that can be worked out again."""

import json

import numpy as np
import pytest
import torch
from test_train import InterruptedAt, assert_same_end, logged, train_to
from transformers import AutoModelForTimeSeriesPrediction

from pikv_core.data import tensor_files
from pikv_core.data.naive import naive, seasonal_naive
from pikv_core.data.series import Series
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import gen_data
from pikv_core.recipes import load
from pikv_core.runs import Reporter, Run
from pikv_core.schema import TrainSettings
from pikv_core.training.lessons.forecast import Forecast, interpolate

TASK = {"source": "sunspots", "context_length": 40, "horizons": (1, 4, 16)}
OPTIONS = "name: series, source: sunspots, context_length: 40, horizons: [1, 4, 16]"
SMALL = ["model.arch=pikv", "model.router=time", "model.balance_loss=0.02", "train.batch_tokens=1024", "dtype=float32"]


def run_of(*more, options=OPTIONS):
    return [f"data.task={{{options}}}", *SMALL, *more]


def source_of(**options):
    return Series(**{**TASK, **options}).open(None, 0, [], None, Reporter())


def test_a_run_interrupted_in_mid_epoch_ends_as_one_that_was_not(tmp_path):
    overrides = run_of(options=f"{OPTIONS}, jitter: 0.1, stretch: 0.2, shortest_context: 0.5")
    train_to(tmp_path / "whole", *overrides, "train.curriculum=[48]")
    with pytest.raises(PiKVError, match="interrupted at step 10"):  # 21 windows a step, of more than 200
        train_to(tmp_path / "cut", *overrides, "train.curriculum=[48]", reporter=InterruptedAt(10))
    torch.manual_seed(99)
    train_to(tmp_path / "cut", *overrides, "train.curriculum=[48]", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    names = {name for name in logged(tmp_path / "whole")[0] if name.startswith("train/loss/")}
    assert names == {f"train/loss/{name}" for name in ("horizon_1", "horizon_4", "horizon_16", "balance", "z")}


def test_the_held_out_errors_are_those_of_the_saved_model(tmp_path):
    result = train_to(tmp_path / "run", *run_of())
    model = AutoModelForTimeSeriesPrediction.from_pretrained(result.model).eval()
    held_out = tensor_files.load(tmp_path / "run" / "model" / "series.held_out.safetensors")
    context, future = torch.from_numpy(held_out["context"]), held_out["future"]
    times = torch.from_numpy(held_out["start"])[:, None] + torch.arange(40)
    assert next(iter(result.metrics)) == "mse_16"
    for steps in (1, 4, 16):
        error = model.forecast(context, steps, past_time=times).numpy() - future[:, :steps]
        assert result.metrics[f"mse_{steps}"] == pytest.approx(np.mean(error**2), rel=1e-4)
        assert result.metrics[f"mae_{steps}"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
        for name, reference in (
            ("naive", naive(context.numpy(), steps)),
            ("seasonal", seasonal_naive(context.numpy(), steps, 11)),
        ):
            expected = np.mean((reference - future[:, :steps]).astype(np.float64) ** 2)
            assert result.metrics[f"{name}_mse_{steps}"] == pytest.approx(expected, rel=1e-6)
        skill = 1 - result.metrics[f"mse_{steps}"] / result.metrics[f"seasonal_mse_{steps}"]
        assert result.metrics[f"skill_seasonal_{steps}"] == pytest.approx(skill)
    rolled = model.forecast(context, 16, horizons=(1,), past_time=times).numpy() - future
    assert result.metrics["rolled_mse_16"] == pytest.approx(np.mean(rolled**2), rel=1e-4)
    assert "load_cv" in result.metrics


def test_a_folder_of_gen_data_is_trained_on_as_it_was_written(tmp_path):
    task = "{name: series, context_length: 40, horizons: [1, 4, 16], period: 8, noise: 0.2}"
    written = load("gen-data", None, [f"task={task}", "num_samples=300"], {"out": str(tmp_path / "data")})
    gen_data.run(written, Run(written))
    told = json.loads((tmp_path / "data" / "corpus.json").read_text())
    result = train_to(tmp_path / "run", *run_of(f"data.path={tmp_path / 'data'}", options="name: series, jitter: 0.1"))
    for row in told["baselines"]["optimum"]:
        assert result.metrics[f"optimum_mse_{row['horizon']}"] == row["mse"]
    saved = json.loads((tmp_path / "run" / "model" / "series.json").read_text())
    assert (saved["period"], saved["jitter"]) == (8, 0.1)
    with pytest.raises(PiKVError, match="period: the data were written with 8, the task asks for 9"):
        train_to(tmp_path / "no", *run_of(f"data.path={tmp_path / 'data'}", options="name: series, period: 9"))


def test_training_lowers_the_loss(tmp_path):
    overrides = run_of("train.max_steps=60", "train.decay_steps=20", options=f"{OPTIONS}, anchor: none")
    train_to(tmp_path / "run", *overrides)
    losses = [line["train/loss"] for line in logged(tmp_path / "run") if "train/loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_a_batch_is_a_function_of_its_arguments_and_goes_through_all_windows():
    lesson = Forecast(source_of(), TrainSettings(batch_tokens=560))  # ten windows
    windows = lesson.source.train
    batches = [lesson.batch(3, step, 1024) for step in range(-(-len(windows) // 10))]
    again = Forecast(source_of(), TrainSettings(batch_tokens=560)).batch(3, 5, 1024)
    assert np.array_equal(batches[5].values, again.values)
    assert not np.array_equal(batches[5].values, lesson.batch(4, 5, 1024).values)
    seen = np.concatenate([batch.times[:, 0] for batch in batches])[: len(windows)]
    assert sorted(seen.tolist()) == windows.start.tolist()
    row = np.flatnonzero(windows.start == batches[0].times[0, 0])[0]
    np.testing.assert_allclose(batches[0].values[0], windows.values[row], rtol=1e-6)
    assert batches[0].context_length == 40


def test_shorter_and_stretched_samples_are_parts_of_a_window():
    source = source_of(stretch=0.5, shortest_context=0.5)
    lesson = Forecast(source, TrainSettings(batch_tokens=2400))
    batches = [lesson.batch(0, step, 48) for step in range(6)]
    assert len({batch.context_length for batch in batches}) > 1
    for batch in batches:
        assert batch.values.shape == (50, 48)
        assert 16 <= batch.context_length <= 32
        spacing = np.diff(batch.times, axis=1)
        np.testing.assert_allclose(spacing, spacing[:, :1].repeat(47, axis=1))
        assert spacing.min() >= np.exp(-0.5) - 1e-9 and spacing.max() <= 55 / 47 + 1e-9
        assert spacing[:, 0].std() > 0.05
    line = np.arange(10.0)[None].repeat(2, axis=0)
    places = np.array([[0, 0.25, 9], [3.5, 8.75, 9]])
    np.testing.assert_allclose(interpolate(line, places), places, rtol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_validation_windows_come_after_those_trained_on(share):
    whole, parted = source_of(), source_of(validation_share=share)
    assert len(parted.held_out) == round(share * len(whole.train))
    assert np.array_equal(parted.held_out.context, whole.train.context[-len(parted.held_out) :])
    last_seen = parted.train.start[-1] + 55
    assert last_seen < parted.held_out.start[0] + 40
    assert parted.held_out.start[-1] < whole.held_out.start[0]
    assert parted.optimum is None


def test_months_and_years_are_steps():
    for source in ("co2", "sunspots"):
        start = source_of(source=source).train.start
        assert np.array_equal(np.diff(start), np.ones(len(start) - 1))


def test_what_cannot_be_trained_is_told(tmp_path):
    with pytest.raises(PiKVError, match="length 17 is too short for 16 steps ahead"):
        train_to(tmp_path / "run", *run_of("train.curriculum=[17]"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"model.arch: 'llama' reads tokens"):
        train_to(tmp_path / "run", *run_of("model.router=base", "model.arch=llama"))
    with pytest.raises(PiKVError, match="no window of"):
        source_of(validation_share=0.95)
    with pytest.raises(UsageError, match="nothing of the data depends on these"):
        Series(jitter=0.1).write(tmp_path, 10, 0, [], None, Reporter())
    with pytest.raises(UsageError, match="made without text"):
        Series().open(None, 0, ["notes"], None, Reporter())


def test_without_a_whole_season_the_last_value_is_the_anchor():
    lesson = Forecast(source_of(source="co2-weekly"), TrainSettings())
    assert lesson.model_options["anchor"] == "last"
    assert lesson.source.period is None
