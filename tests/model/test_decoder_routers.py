"""What the decoder passes to its routers and experts: options, what tokens are told, low-rank experts."""

import pytest
import torch
from model.test_decoder import ids, our_model
from transformers import AutoModelForCausalLM

from pikv_core.moe import ROUTERS
from pikv_core.moe.lora import LoRAExperts

TOLD = {"modality_info": torch.arange(12).view(2, 6) % 7, "time_info": torch.arange(12.0).view(2, 6)}


@pytest.mark.parametrize("router", ROUTERS.names())
def test_a_router_is_told_what_is_its_own_and_nothing_else(router):
    model, x = our_model(router=router), ids(2, 6)
    for layer in model.model.layers:
        if router == "time":
            torch.nn.init.normal_(layer.mlp.gate.time_weight)
    plain, told = model(x), model(x, router_info=TOLD)
    losses = [model.model(x, router_info=info).aux_losses for info in (None, TOLD)]
    assert torch.equal(plain.logits, told.logits) == (router != "time")
    changed = [name for name in losses[0] if losses[0][name] != losses[1][name]]
    assert changed == {"flex": ["combination"], "time": ["balance", "z"]}.get(router, [])


def test_the_parts_of_the_routers_loss_add_up():
    outputs = our_model(balance_loss=0.3, z_loss=0.2).model(ids(2, 6))
    assert set(outputs.aux_losses) == {"balance", "z"}
    torch.testing.assert_close(outputs.aux_loss, sum(outputs.aux_losses.values()))


def test_options_and_low_rank_experts_are_saved_and_loaded(tmp_path):
    options = {"router": "fast", "router_options": {"gate": "noisy", "capacity_factor": 1.5}}
    model = our_model(
        **options, expert_rank=3, expert_alpha=6.0, train_base=False, shared_expert=True, balance_loss=0.5
    )
    x = ids(2, 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(x).logits, model(x).logits)
    for layer in loaded.model.layers:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        assert (gate.gate, gate.capacity_factor, gate.loss_weights["load"]) == ("noisy", 1.5, 0.5)
        assert isinstance(experts, LoRAExperts) and experts.scaling == 2.0
        assert layer.mlp.shared_expert is not None
    loaded(x).logits.sum().backward()
    experts = loaded.model.layers[0].mlp.experts
    assert experts.gate_up_proj.grad is None and experts.gate_up_A.grad is not None


def test_an_option_wins_over_the_general_weight():
    gate = our_model(balance_loss=0.5, router_options={"balance_weight": 0.0}).model.layers[0].mlp.gate
    assert gate.loss_weights["balance"] == 0.0


def test_low_rank_experts_begin_as_their_base():
    experts = our_model(expert_rank=3).model.layers[0].mlp.experts
    assert not experts.gate_up_B.any() and not experts.down_B.any()
    assert experts.gate_up_A.std() > 0.1 and experts.gate_up_proj.std() > 0.1
