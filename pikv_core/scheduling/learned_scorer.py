"""A learned scorer: the tokens that later queries are expected to attend to, by what the cache holds of each.

Shapes: B batch, L layers, G key/value heads, S stored tokens, D head dim, F features, W width of the hidden layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pikv_core.errors import PiKVError
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch

NUM_EXTRA = 4  # features beside key and value
TOKENS_AT_A_TIME = 4096
SMALLEST = 1e-6  # of a length, so that its logarithm is finite


@POLICIES.register("learned-scorer")
@dataclass(frozen=True)
class LearnedScorer(Evictor):
    """Keep the tokens of which a small network per head expects the largest attention by any later query.

    It reads each token's key and value once, at the end of the prompt, needs no attention, and knows nothing of the
    question that comes after. The networks are learnt (`LayerRun.fitted`).
    """

    calibrated: ClassVar[bool] = True
    fitted_by: ClassVar[str] = "token-scorer"
    decides_once: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "rotary")

    def score(self, tokens: Tokens) -> torch.Tensor:
        import torch

        fitted, layer, x = tokens.layer.fitted, tokens.layer, features(tokens)
        expected = (layer.num_layers, layer.num_kv_heads, x.shape[-1])
        if tuple(fitted["mean"].shape) != expected:
            raise PiKVError(
                f"policy '{self.name}' has networks for layers, heads and features {tuple(fitted['mean'].shape)}, "
                f"the model has {expected}",
                hint="give the calibration that was made for this model",
            )
        own = {name: x[layer.index].to(tokens.position.device)[tokens.head] for name, x in fitted.items()}
        return torch.cat([expect(own, part) for part in x.split(TOKENS_AT_A_TIME, dim=2)], dim=2)


def features(tokens: Tokens) -> torch.Tensor:
    """Return float32 [B,G,S,F] of every token: key before its rotation, value, and what its place in the context is.

    That is the logarithm of the lengths of both, the cosine of the key to the mean direction of the head's keys, and
    the logarithm of the number of tokens after it.
    """
    import torch
    from torch.nn import functional

    layer, position = tokens.layer, tokens.position
    keys, values = tokens.keys().float(), tokens.values().float()
    is_token = (position >= 0)[..., None]
    direction = functional.normalize(keys, dim=-1)
    anchor = functional.normalize(direction.masked_fill(~is_token, 0.0).sum(dim=2, keepdim=True), dim=-1)
    age = (tokens.num_seen[:, None, None] - position).clamp(min=1)
    plain = layer.rotary_for(LearnedScorer.name).unrotate(keys, position.clamp(min=0), layer.index)
    extra = [
        keys.norm(dim=-1).clamp(min=SMALLEST).log(),
        values.norm(dim=-1).clamp(min=SMALLEST).log(),
        (direction * anchor).sum(dim=-1),
        age.float().log(),
    ]
    assert len(extra) == NUM_EXTRA
    return torch.cat([plain, values, torch.stack(extra, dim=-1)], dim=-1)


def expect(network: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return what the networks of the heads [...] make of features [...,S,F]: [...,S].

    network: mean, scale [...,F], into [...,F,W], bias, out [...,W], level [...].
    """
    import torch

    normal = (x - network["mean"][..., None, :]) * network["scale"][..., None, :]
    hidden = torch.nn.functional.gelu(normal @ network["into"] + network["bias"][..., None, :])
    return (hidden @ network["out"][..., None])[..., 0] + network["level"][..., None]
