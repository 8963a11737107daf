"""Building a layer by name: what is asked for is what is built, what does not exist is refused."""

import pytest
import torch

from pikv_core.errors import UsageError
from pikv_core.moe import ROUTERS, create_moe, create_moe_router
from pikv_core.moe.experts import Experts
from pikv_core.moe.lora import LoRAExperts

E, K, D, F = 6, 2, 16, 24


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("kind", ROUTERS.names())
def test_every_router_drives_both_kinds_of_experts(kind, rank):
    torch.manual_seed(0)
    moe = create_moe(kind, D, E, K, F, rank=rank)
    assert isinstance(moe.experts, Experts if rank is None else LoRAExperts)
    x = torch.randn(2, 9, D)
    y, routing = moe(x)
    assert y.shape == x.shape and y.isfinite().all()
    (y.square().sum() + routing.loss).backward()
    assert moe.gate.weight.grad.abs().sum() > 0
    assert sum(moe.get_stats()["expert_tokens"]) == routing.expert_tokens.sum()


def test_the_shared_expert_follows_the_router_unless_told():
    assert create_moe("base", D, E, K).shared_expert is None
    assert create_moe("base", D, E, K, shared_expert=True).shared_expert.gate is not None
    assert create_moe("base", D, E, K, shared_expert=True, shared_expert_gated=False).shared_expert.gate is None
    assert create_moe("time", D, E, K).shared_expert is not None
    assert create_moe("time", D, E, K, shared_expert=False).shared_expert is None


def test_the_shared_expert_is_as_wide_as_a_tokens_experts_together_unless_told():
    assert create_moe("base", D, E, K, F, shared_expert=True).shared_expert.down_proj.in_features == K * F
    moe = create_moe("base", D, E, K, F, shared_expert=True, shared_expert_size=7)
    assert moe.shared_expert.down_proj.in_features == 7


def test_rank_and_alpha_reach_the_experts():
    experts = create_moe("base", D, E, K, F, rank=4, alpha=2.0, train_base=False).experts
    assert experts.scaling == 0.5 and experts.gate_up_A.shape == (E, 4, D)
    assert not experts.gate_up_proj.requires_grad and experts.gate_up_A.requires_grad


def test_options_reach_the_router():
    assert create_moe("base", D, E, K, balance_weight=0.5).gate.loss_weights["balance"] == 0.5


@pytest.mark.parametrize("options", [{"modality_info": torch.tensor([[0, 1, 2]])}])
def test_what_the_router_is_told_passes_through_the_layer(options):
    torch.manual_seed(0)
    moe = create_moe("flex", D, E, K, F)
    x = torch.randn(1, 3, D)
    _, routing = moe(x, **options)
    assert routing.losses["combination"] == moe.gate(x, **options).losses["combination"]
    assert routing.losses["combination"] != moe(x)[1].losses["combination"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance_wieght": 1.0}, "the router 'base' has no option 'balance_wieght'; did you mean 'balance_weight'"),
        ({"teacher_hidden_size": 8}, "teacher_hidden_size: there is no teacher"),
        ({"teacher_hidden_size": 0, "use_distillation": True}, "teacher_hidden_size: expected a whole number"),
        ({"rank": 0}, "rank: expected a whole number of at least 1, got 0"),
        ({"expert_size": 0}, "expert_size: expected a whole number of at least 1, got 0"),
        ({"shared_expert_size": -1}, "shared_expert_size: expected a whole number of at least 1, got -1"),
        ({"backend": "cutlass"}, "unknown expert backend 'cutlass'"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_moe("base", D, E, K, **options)


def test_options_of_a_routers_base_are_among_the_allowed():
    with pytest.raises(UsageError) as caught:
        create_moe_router("time", D, E, K, sharde=1)
    assert {"num_periods", "balance_weight", "capacity_factor"} <= set(
        caught.value.hint.removeprefix("options of 'time' are: ").split(", ")
    )


def test_sizes_are_checked_before_anything_is_built():
    with pytest.raises(UsageError, match="num_experts: expected a whole number of at least 1, got 0"):
        create_moe("base", D, 0, K)
    with pytest.raises(UsageError, match="top_k: 9 is more than the 6 experts"):
        create_moe("base", D, E, 9)
