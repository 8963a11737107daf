"""The shared expert, which every token goes to beside its own, behind a sigmoid gate as in Time-MoE (2409.16040)."""

from __future__ import annotations

from torch import Tensor, nn

from pikv_core.moe.experts import swiglu


class SharedExpert(nn.Module):
    """One SwiGLU block for all tokens: sigmoid(x·w)·down(silu(gate(x))·up(x)).

    gated: without it the sigmoid is left out, as in DeepSeekMoE (2401.06066).
    """

    def __init__(self, hidden_size: int, expert_size: int, gated: bool = True):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * expert_size, bias=False)
        self.down_proj = nn.Linear(expert_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, 1, bias=False) if gated else None
        for linear in (self.gate_up_proj, self.down_proj, self.gate):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output of the chosen experts, like x [..., D]."""
        y = self.down_proj(swiglu(self.gate_up_proj(x)))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return y.to(x.dtype)

    def get_stats(self) -> dict[str, int]:
        """Return the bytes of the weights."""
        return {"shared_expert_bytes": sum(weight.nbytes for weight in self.parameters())}
