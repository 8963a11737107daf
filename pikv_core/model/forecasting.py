"""The PiKV decoder as a forecaster of series: a value is a token, and every horizon has a head (Time-MoE, 2409.16040).

B batch, C values of context, F values after it, T tokens, S values seen, H steps of a horizon, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from pikv_core.errors import UsageError
from pikv_core.model.config import PiKVConfig
from pikv_core.model.decoder import PiKVModel, PiKVModelOutput, PiKVPreTrainedModel
from pikv_core.model.horizon_head import HorizonHead

HUBER_DELTA = 2.0


@dataclass
class PiKVForecastOutput(PiKVModelOutput):
    """The decoder's output, and by horizon the predictions [B, T, H] after each token, in the units of the series.

    losses: of the normalised predictions, by horizon; loss is their mean, plus aux_loss in training. loc and scale
    [B, 1] normalise the values.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    predictions: dict[int, Tensor] | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None


class ValueEmbedding(nn.Module):
    """Embed values by a SwiGLU of the value itself; its biases keep the sign of small ones through the norms."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gate = nn.Linear(1, hidden_size)
        self.value = nn.Linear(1, hidden_size)

    def forward(self, z_BT: Tensor) -> Tensor:
        """Return [B, T, D], computed in float32: half precision would round the values."""
        with torch.autocast(z_BT.device.type, enabled=False):
            z_BT1 = z_BT.to(self.gate.weight.dtype)[..., None]
            return F.silu(self.gate(z_BT1)) * self.value(z_BT1)


class PiKVForTimeSeriesPrediction(PiKVPreTrainedModel):
    """Normalise each series by the mean and the deviation of its context, and predict every horizon after each value.

    The values run through the decoder as embeddings, one a token; a head for each horizon predicts all of its steps.
    """

    main_input_name = "past_values"

    def __init__(self, config: PiKVConfig):
        super().__init__(config)
        check(config)
        self.model = PiKVModel(config)
        self.embedding = ValueEmbedding(config.hidden_size)
        # Names without numbers between dots: those are matrices of blocks to the optimizers.
        self.heads = nn.ModuleDict({name_of(steps): HorizonHead(config, steps) for steps in config.horizons})
        self.post_init()

    def forward(
        self,
        past_values: Tensor,
        past_time: Tensor | None = None,
        future_values: Tensor | None = None,
        **kwargs: Any,
    ) -> PiKVForecastOutput:
        """Predict after each value of past_values [B, C] and, with future_values [B, F], of these but the last.

        past_time [B, C]: when the values are, in steps, for a router that is told; by default 0 to C - 1. With
        future_values there are losses: Huber's, of all that is predicted of the values given.
        """
        loc, scale = statistics(past_values)
        values_BS = past_values if future_values is None else torch.cat([past_values, future_values], dim=1)
        z_BS = normalise(values_BS, loc, scale)
        z_BT = z_BS if future_values is None else z_BS[:, :-1]
        time_BT = _times(past_values, past_time, z_BT.shape[1])
        outputs = self.decode(z_BT, time_BT, use_cache=False, **kwargs)
        hidden_BTD = cast(Tensor, outputs.last_hidden_state)
        predicted = {steps: self.predict(hidden_BTD, z_BT, steps) for steps in self.config.horizons}
        loss = losses = None
        if future_values is not None:
            losses = {name_of(steps): huber(forecast, z_BS) for steps, forecast in predicted.items()}
            loss = torch.stack(list(losses.values())).mean()
            if self.training:
                loss = loss + cast(Tensor, outputs.aux_loss)
        units = {steps: forecast * scale[..., None] + loc[..., None] for steps, forecast in predicted.items()}
        return PiKVForecastOutput(**outputs, loss=loss, losses=losses, predictions=units, loc=loc, scale=scale)

    @torch.no_grad()
    def forecast(
        self,
        past_values: Tensor,
        num_steps: int,
        horizons: Sequence[int] | None = None,
        past_time: Tensor | None = None,
    ) -> Tensor:
        """Return the num_steps [B, num_steps] after past_values [B, C], in their units.

        The largest of the horizons (by default all) that fits is taken, what it predicts goes after the context, and
        so on; horizons=(1,) rolls one step. Where none fits, the smallest is cut. Raises UsageError for a horizon
        without a head.
        """
        heads = sorted(self.config.horizons if horizons is None else horizons)
        if not heads or not set(heads) <= set(self.config.horizons):
            raise UsageError(f"horizons: the model has {list(self.config.horizons)}, got {heads}")
        if num_steps < 1:
            raise UsageError(f"num_steps: expected a whole number of at least 1, got {num_steps}")
        loc, scale = statistics(past_values)
        z_BS = new_BT = normalise(past_values, loc, scale)
        context_length, end = z_BS.shape[1], z_BS.shape[1] + num_steps
        cache = DynamicCache(config=self.config)
        while z_BS.shape[1] < end:
            time_BT = _times(past_values, past_time, z_BS.shape[1])[:, -new_BT.shape[1] :]
            outputs = self.decode(new_BT, time_BT, past_key_values=cache, use_cache=True)
            left = end - z_BS.shape[1]
            steps = max((steps for steps in heads if steps <= left), default=heads[0])
            last_B1D = cast(Tensor, outputs.last_hidden_state)[:, -1:]
            new_BT = self.predict(last_B1D, z_BS, steps)[:, 0, :left]
            z_BS = torch.cat([z_BS, new_BT], dim=1)
        return z_BS[:, context_length:] * scale + loc

    def decode(self, z_BT: Tensor, time_BT: Tensor, **kwargs: Any) -> PiKVModelOutput:
        """Return what the decoder makes of normalised values at their times, in steps."""
        embedded_BTD = self.embedding(z_BT)
        return self.model(inputs_embeds=embedded_BTD, router_info={"time_info": time_BT}, **kwargs)

    def predict(self, hidden_BTD: Tensor, z_BS: Tensor, steps: int) -> Tensor:
        """Return the normalised predictions [B, T, H] of the head for `steps` after the last T of the values z."""
        return self.heads[name_of(steps)](hidden_BTD, z_BS)


def check(config: PiKVConfig) -> None:
    """Raise UsageError where a configuration describes no forecaster."""
    horizons = config.horizons
    if not horizons or min(horizons) < 1 or len(set(horizons)) < len(horizons):
        raise UsageError(f"horizons: expected different numbers of steps of at least 1, got {horizons}")
    if config.anchor not in ("none", "last", "season"):
        raise UsageError(f"anchor: expected none, last or season, got '{config.anchor}'")
    if config.anchor == "season" and not config.season_length:
        raise UsageError("anchor: 'season' needs a season_length", hint="give its steps, or choose the anchor 'last'")


def name_of(horizon: int) -> str:
    """Return the name of a horizon's head and loss."""
    return f"horizon_{horizon}"


def statistics(past_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation [B, 1] of contexts [B, C]; a flat context has a deviation of 1."""
    values_BC = past_values.double()
    loc, scale = values_BC.mean(1, keepdim=True), values_BC.std(1, correction=0, keepdim=True)
    flat = scale <= 1e-12 * loc.abs()  # what rounding leaves of equal values
    return loc, torch.where(flat, torch.ones_like(scale), scale)


def normalise(values: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Return float32 values in units of the scale around the loc, taken in float64: series may be far from zero."""
    return ((values.double() - loc) / scale).float()


def huber(forecast_BTH: Tensor, z_BS: Tensor) -> Tensor:
    """Return the mean Huber loss of the predictions after each of the first T values z, of the values there are."""
    num_tokens, steps = forecast_BTH.shape[1:]
    truth_BTH = F.pad(z_BS, (0, steps)).unfold(1, steps, 1)[:, 1 : num_tokens + 1]
    ends_T1 = torch.arange(1, num_tokens + 1, device=z_BS.device)[:, None]
    known_TH = ends_T1 + torch.arange(steps, device=z_BS.device) < z_BS.shape[1]
    losses_BTH = F.huber_loss(forecast_BTH, truth_BTH, reduction="none", delta=HUBER_DELTA)
    return (losses_BTH * known_TH).sum() / (len(z_BS) * known_TH.sum())


def _times(past_values: Tensor, past_time: Tensor | None, num_tokens: int) -> Tensor:
    """Return the times [B, T] of so many tokens from the start of the context on, one step apart after it."""
    steps_T = torch.arange(num_tokens, device=past_values.device)
    if past_time is None:
        return steps_T.expand(len(past_values), -1)
    num_past = past_values.shape[1]
    later = past_time[:, -1:] + steps_T[: max(0, num_tokens - num_past)] + 1
    return torch.cat([past_time, later], dim=1)[:, :num_tokens]
