"""FastV: what the last query attends to in an early layer decides for all later ones (arXiv 2403.06764).

Shapes: B batch, G key/value heads, S stored tokens, P positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pikv_core.errors import UsageError
from pikv_core.observation import LayerRun, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens

if TYPE_CHECKING:
    import torch

ATTENTION = "fastv"  # in the layers' shared memory: [B,G,P] of the newest query, by true position


@POLICIES.register("fastv")
@dataclass(frozen=True)
class FastV(Evictor):
    """Keep everything in the first `first_layer` layers, and pay for it in the later ones.

    These keep the tokens that the last query of the prompt attends to in the last of the first layers, mean over heads.
    """

    decides_once: ClassVar[bool] = True
    first_layer: Annotated[int, Field(ge=1)] = 2

    @property
    def observes(self) -> int:
        return 1

    def observe(self, columns: Mapping[str, torch.Tensor], rows: Rows) -> None:
        import torch

        if rows.layer.index != self.first_layer - 1:
            return
        newest = rows.probs[:, :, :, -1].mean(dim=2)
        held = rows.layer.shared.get(ATTENTION)
        length = max(int(rows.position.max()) + 1, 0 if held is None else held.shape[2])
        by_position = newest.new_zeros(*newest.shape[:2], length + 1)  # the last place takes what empty slots hold
        if held is not None:
            by_position[:, :, : held.shape[2]] = held
        by_position.scatter_(2, torch.where(rows.position < 0, length, rows.position).long(), newest)
        rows.layer.shared[ATTENTION] = by_position[:, :, :length]

    def score(self, tokens: Tokens) -> torch.Tensor:
        attention = tokens.layer.shared.get(ATTENTION)
        if tokens.layer.index < self.first_layer or attention is None:
            return tokens.position.float()
        by_position = attention.mean(dim=1)[tokens.row, None].expand(*tokens.position.shape[:2], -1)
        return by_position.gather(2, tokens.position.clamp(min=0, max=by_position.shape[2] - 1).long())

    def capacity(self, mean: torch.Tensor, num_seen: torch.Tensor, layer: LayerRun) -> torch.Tensor:
        """Return the tokens per head [B,G] that bring the mean of all layers to `mean`; raises UsageError."""
        import torch

        num_later = layer.num_layers - self.first_layer
        if num_later < 1:
            raise UsageError(
                f"policy '{self.name}' keeps the first {self.first_layer} layers whole, and the model has "
                f"{layer.num_layers}",
                hint=f"first_layer has to be less than {layer.num_layers}; of a model of one layer it drops nothing",
            )
        later = (layer.num_layers * mean - self.first_layer * num_seen) // num_later
        if (later < 1).any():
            row = int(later.argmin())
            least = -(-(self.first_layer * int(num_seen[row]) + num_later) // layer.num_layers)
            raise UsageError(
                f"policy '{self.name}' keeps the first {self.first_layer} of {layer.num_layers} layers whole: after "
                f"{int(num_seen[row])} tokens they alone are over a budget of {int(mean[row])} tokens per head",
                hint=f"give a budget of at least {least} tokens, or a share of {least / int(num_seen[row]):.3f}",
            )
        own = num_seen if layer.index < self.first_layer else torch.minimum(later, num_seen)
        return own[:, None].expand(-1, layer.num_kv_heads)
