"""What predicts the steps of one horizon of a series from the hidden states and the values seen.

B batch, T tokens, S values seen, H steps of the horizon, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_core.model.config import PiKVConfig

CARRY = 0.8
GAIN = 10.0


class HorizonHead(nn.Module):
    """Predict so many steps by a linear map of the hidden state, added to what the configuration's anchor names.

    none: nothing. last: the last value. season: the value a season before the one predicted, and what the last value
    exceeds the one a season before it by, each with a learned weight of every step: at first 1 and CARRY^step. These
    learn GAIN times as fast as other weights, which have a short series by heart within few steps.
    """

    def __init__(self, config: PiKVConfig, steps: int):
        super().__init__()
        self.anchor, self.season_length, self.steps = config.anchor, config.season_length, steps
        self.linear = nn.Linear(config.hidden_size, steps)
        if self.anchor == "season":
            self.season = nn.Parameter(torch.full((steps,), 1 / GAIN))
            self.carry = nn.Parameter(CARRY ** torch.arange(1.0, steps + 1) / GAIN)

    def forward(self, hidden_BTD: Tensor, z_BS: Tensor) -> Tensor:
        """Return the predictions [B, T, H] after the last T of the normalised values z, in float32."""
        with torch.autocast(z_BS.device.type, enabled=False):
            predicted_BTH = self.linear(hidden_BTD.to(self.linear.weight.dtype))
            return predicted_BTH if self.anchor == "none" else predicted_BTH + self.anchors(z_BS, hidden_BTD.shape[1])

    def anchors(self, z_BS: Tensor, num_tokens: int) -> Tensor:
        """Return [B, T, H] for the last T values; before a whole season has passed, the last value stands for all."""
        last_T1 = torch.arange(z_BS.shape[1] - num_tokens, z_BS.shape[1], device=z_BS.device)[:, None]
        last_BT1 = z_BS[:, last_T1]
        if self.anchor == "last":
            return last_BT1
        assert self.season_length is not None
        steps_H = torch.arange(self.steps, device=z_BS.device) % self.season_length
        before_T1 = last_T1 - self.season_length
        season_BTH = z_BS[:, torch.where(before_T1 >= -1, before_T1 + 1 + steps_H, last_T1)]
        rise_BT1 = last_BT1 - z_BS[:, torch.where(before_T1 >= 0, before_T1, last_T1)]
        return GAIN * (self.season * season_BTH + self.carry * rise_BT1)
