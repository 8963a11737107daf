"""The forecaster: its losses worked out by hand, what it may not see, and how heads make up a longer forecast."""

import pytest
import torch
from transformers import AutoModelForTimeSeriesPrediction

from pikv_core.errors import UsageError
from pikv_core.model import PiKVConfig, PiKVForTimeSeriesPrediction

SIZES = {
    "vocab_size": 0,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "router": "time",
    "horizons": [1, 3, 8],
    "season_length": 5,
    "initializer_range": 0.3,
}


def make(anchor="season", **more):
    torch.manual_seed(0)
    model = PiKVForTimeSeriesPrediction(PiKVConfig(**{**SIZES, "anchor": anchor, **more})).eval()
    for layer in model.model.layers:  # time has no say before it has learned one
        torch.nn.init.normal_(layer.mlp.gate.time_weight, std=0.5)
    return model


def series(num=4, length=24, seed=1):
    steps = torch.arange(length) + torch.randint(9, (num, 1), generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(num, length, generator=torch.Generator().manual_seed(seed))
    return 300 + 0.5 * steps + 4 * torch.sin(steps * 2 * torch.pi / 5) + noise


@pytest.mark.parametrize("anchor", ["none", "last", "season"])
def test_losses_are_those_of_every_step_that_is_known(anchor):
    model, values = make(anchor), series(length=20)
    past, future = values[:, :12], values[:, 12:]
    output = model(past, future_values=future)
    mean, deviation = past.mean(1, keepdim=True), past.std(1, correction=0, keepdim=True)
    for steps in (1, 3, 8):
        predicted = output.predictions[steps]
        assert predicted.shape == (4, 19, steps)
        found = []
        for row in range(4):
            for token in range(19):
                for step in range(steps):
                    if token + 1 + step < 20:
                        error = predicted[row, token, step] - values[row, token + 1 + step]
                        error = (error / deviation[row]).abs()
                        found.append(torch.where(error < 2, error**2 / 2, 2 * (error - 1)))
        assert output.losses[f"horizon_{steps}"].item() == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)
    torch.testing.assert_close(output.loss, torch.stack(list(output.losses.values())).mean())
    torch.testing.assert_close(output.loc.float(), mean)
    model.train()
    output = model(past, future_values=future)
    torch.testing.assert_close(output.loss, torch.stack(list(output.losses.values())).mean() + output.aux_loss)


@pytest.mark.parametrize("anchor", ["none", "last", "season"])
def test_a_later_value_changes_no_earlier_prediction(anchor):
    model, values = make(anchor), series()
    past = values[:, :16]  # what normalises is the context; what changes comes after it
    changed = values.clone()
    changed[:, 19] += 5
    one, other = (model(past, future_values=given[:, 16:]) for given in (values, changed))
    for steps in (1, 3, 8):
        torch.testing.assert_close(one.predictions[steps][:, :19], other.predictions[steps][:, :19])
        assert not torch.allclose(one.predictions[steps][:, 19], other.predictions[steps][:, 19])


def test_rows_units_and_futures_are_independent():
    model, values = make(), series()
    forecast = model.forecast(values, 12)
    torch.testing.assert_close(model.forecast(values[2:3], 12), forecast[2:3])
    torch.testing.assert_close(model.forecast(-20 + 3 * values, 12), -20 + 3 * forecast, rtol=1e-4, atol=1e-3)
    past = model(values[:, :16], future_values=values[:, 16:])
    alone = model(values[:, :16])
    assert alone.loss is None
    for steps in (1, 3, 8):
        torch.testing.assert_close(past.predictions[steps][:, :16], alone.predictions[steps])


def test_time_is_told_to_the_router():
    model, values = make(), series()
    times = torch.arange(24).expand(4, -1)
    torch.testing.assert_close(model.forecast(values, 12, past_time=times), model.forecast(values, 12))
    assert not torch.allclose(model.forecast(values, 12, past_time=times + 3), model.forecast(values, 12))


@pytest.mark.parametrize(
    ("num_steps", "horizons", "taken"),
    [
        (8, None, [8]),
        (12, None, [8, 3, 1]),
        (7, None, [3, 3, 1]),
        (4, (1,), [1] * 4),
        (5, (3,), [3, 3]),
        (2, (8,), [8]),
    ],
)
def test_a_forecast_is_made_of_the_largest_heads_that_fit(num_steps, horizons, taken):
    model, values = make(), series()
    mean, deviation = values.double().mean(1, keepdim=True), values.double().std(1, correction=0, keepdim=True)
    z = ((values.double() - mean) / deviation).float()
    for steps in taken:
        outputs = model.decode(z, torch.arange(z.shape[1]).expand(4, -1))
        z = torch.cat([z, model.predict(outputs.last_hidden_state, z, steps)[:, -1]], dim=1)
    expected = z[:, 24 : 24 + num_steps] * deviation + mean
    torch.testing.assert_close(model.forecast(values, num_steps, horizons), expected, rtol=1e-5, atol=1e-4)


def test_an_untrained_season_is_the_season_repeated_and_its_excess_fading():
    model, values = make(), series()
    for head in model.heads.values():
        torch.nn.init.zeros_(head.linear.weight)
    rise = values[:, -1:] - values[:, -6:-5]
    steps = torch.arange(8)
    expected = values[:, 24 - 5 + steps % 5] + 0.8 ** (steps + 1) * rise
    torch.testing.assert_close(model.forecast(values, 8).float(), expected, rtol=1e-5, atol=1e-3)
    last = make("last")
    torch.nn.init.zeros_(last.heads["horizon_8"].linear.weight)
    torch.testing.assert_close(last.forecast(values, 8).float(), values[:, -1:].expand(-1, 8))


def test_flat_and_distant_series_stay_finite():
    model = make()
    flat = torch.full((2, 24), 315.3)
    assert torch.isfinite(model.forecast(flat, 8)).all()
    values = series()
    near, far = model.forecast(values.double(), 8), model.forecast(1e9 + values.double(), 8)
    torch.testing.assert_close(far - 1e9, near, atol=1e-2, rtol=1e-4)


def test_the_auto_class_loads_the_same_model(tmp_path):
    model, values = make(), series()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path).eval()
    assert loaded.config.horizons == [1, 3, 8]
    assert torch.equal(loaded.forecast(values, 12), model.forecast(values, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons": [0]}, "horizons: expected different"),
        ({"horizons": [2, 2]}, "horizons: expected different"),
        ({"anchor": "mean"}, "anchor: expected none, last or season, got 'mean'"),
        ({"anchor": "season", "season_length": None}, "needs a season_length"),
    ],
)
def test_what_is_no_forecaster_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make(**options)


def test_horizons_without_a_head_are_refused():
    model = make()
    for horizons in ((2,), ()):
        with pytest.raises(UsageError, match=r"horizons: the model has \[1, 3, 8\]"):
            model.forecast(series(), 4, horizons)
    with pytest.raises(UsageError, match="num_steps"):
        model.forecast(series(), 0)
