"""Our decoder against transformers' Mixtral and Qwen3-MoE with the same weights, and as a citizen of transformers."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core.model import PiKVConfig, PiKVForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def our_model(**more):
    torch.manual_seed(0)
    return PiKVForCausalLM(PiKVConfig(**{**SIZES, "num_experts": 4, **more})).eval()


def ids(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def mixtral_and_ours():
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES)).eval()
    return theirs, our_model()


def qwen3_moe_and_ours():
    torch.manual_seed(0)
    sizes = {**SIZES, "moe_intermediate_size": SIZES["intermediate_size"], "num_experts_per_tok": 2}
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, norm_topk_prob=True, attention_bias=True, **sizes))
    for name, weight in theirs.named_parameters():
        if "_norm." in name or name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")):
            torch.nn.init.normal_(weight)
    return theirs.eval(), our_model(qk_bias=True, vo_bias=True, qk_norm=True)


PEERS = pytest.mark.parametrize("peers", [mixtral_and_ours, qwen3_moe_and_ours])


@PEERS
def test_logits_equal_transformers_with_the_same_weights(peers):
    theirs, ours = peers()
    ours.load_state_dict(theirs.state_dict())
    for x, mask in [
        (ids(2, 20), None),
        (ids(3, 33), torch.arange(33)[None] >= torch.tensor([[0], [5], [9]])),
    ]:
        expected = theirs(x, attention_mask=mask, output_hidden_states=True)
        got = ours(x, attention_mask=mask, output_hidden_states=True)
        kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(got.logits[kept], expected.logits[kept], atol=1e-5, rtol=1e-4)
        assert len(got.hidden_states) == len(expected.hidden_states)
        for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one[kept], other[kept], atol=1e-5, rtol=1e-4)


@PEERS
def test_gradients_equal_transformers_with_the_same_weights(peers):
    theirs, ours = peers()
    ours.load_state_dict(theirs.state_dict())
    x = ids(2, 20)
    for model in (ours, theirs):
        model(x, labels=x).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, atol=1e-5, rtol=1e-3)


def test_greedy_generation_with_a_cache_equals_none():
    model = our_model(qk_bias=True)
    x = ids(2, 9)
    plain = model.generate(x, max_new_tokens=12, do_sample=False, use_cache=False)
    cached = model.generate(x, max_new_tokens=12, do_sample=False, past_key_values=DynamicCache())
    assert plain.shape == (2, 21)
    assert torch.equal(plain, cached)


def test_left_padding_does_not_change_the_logits():
    model = our_model()
    x = ids(1, 10)
    padded = torch.cat([ids(1, 4, seed=2), x], 1)
    mask = torch.tensor([[0] * 4 + [1] * 10])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
    torch.testing.assert_close(got, model(x).logits, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded_models_are_the_same_to_the_bit(tmp_path):
    model = our_model(qk_bias=True, head_dim=16)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PiKVConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, PiKVForCausalLM)
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    x = ids(2, 15)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_eager_attention_equals_sdpa_and_returns_its_weights():
    model = our_model()
    x = ids(2, 15)
    expected = model(x).logits
    model.set_attn_implementation("eager")
    got = model(x, output_attentions=True)
    torch.testing.assert_close(got.logits, expected, atol=1e-5, rtol=1e-4)
    assert [tuple(weights.shape) for weights in got.attentions] == [(2, 4, 15, 15)] * 3
    torch.testing.assert_close(got.attentions[0].sum(-1), torch.ones(2, 4, 15))


def test_a_custom_attention_receives_what_a_custom_cache_returned():
    seen = []

    class Marked(torch.Tensor):
        pass

    class MarkingCache(DynamicCache):
        def update(self, key, value, layer_idx, *args, **kwargs):
            keys, values = super().update(key, value, layer_idx, *args, **kwargs)
            return keys.as_subclass(Marked), values

    def attention(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        seen.append((module.layer_idx, isinstance(key, Marked)))
        groups = module.num_key_value_groups
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.as_subclass(torch.Tensor).repeat_interleave(groups, 1),
            value.repeat_interleave(groups, 1),
            is_causal=query.shape[2] > 1,
            scale=scaling,
        )
        return out.transpose(1, 2), None

    model = our_model()
    x = ids(1, 9)
    expected = model.generate(x, max_new_tokens=5, do_sample=False)
    ALL_ATTENTION_FUNCTIONS.register("marked_test", attention)
    model.set_attn_implementation("marked_test")
    got = model.generate(x, max_new_tokens=5, do_sample=False, past_key_values=MarkingCache())
    assert torch.equal(got, expected)
    assert {layer for layer, _ in seen} == {0, 1, 2}
    assert all(marked for _, marked in seen)


def test_logits_to_keep_gives_the_last_or_the_asked_positions():
    model = our_model()
    x = ids(2, 15)
    everything = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=3).logits, everything[:, -3:])
    positions = torch.tensor([1, 4, 9])
    torch.testing.assert_close(model(x, logits_to_keep=positions).logits, everything[:, positions])


def test_the_loss_is_cross_entropy_plus_the_routers_loss_in_training():
    model = our_model(balance_loss=0.5, z_loss=0.25)
    x = ids(2, 15)
    plain = model(x, labels=x)
    logits = plain.logits[:, :-1].reshape(-1, 97)
    expected = torch.nn.functional.cross_entropy(logits, x[:, 1:].reshape(-1))
    torch.testing.assert_close(plain.loss, expected)
    assert plain.aux_loss is None
    model.train()
    training = model(x, labels=x, output_router_logits=True)
    torch.testing.assert_close(training.loss, expected + training.aux_loss)
    probs = [logits.softmax(-1) for logits in training.router_logits]
    by_hand = []
    for layer_probs, layer_logits in zip(probs, training.router_logits, strict=True):
        counts = torch.bincount(layer_probs.topk(2).indices.reshape(-1), minlength=4)
        balance = 4 * (counts / counts.sum() * layer_probs.mean(0)).sum()
        by_hand.append(0.5 * balance + 0.25 * layer_logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(training.aux_loss, torch.stack(by_hand).mean())


def test_padding_counts_in_no_router_statistic():
    model = our_model()
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[0, :6] = 0
    model(ids(2, 15), attention_mask=mask)
    assert sum(model.model.layers[0].mlp.get_stats()["expert_tokens"]) == (9 + 15) * 2


def test_gradient_checkpointing_gives_the_same_gradients():
    model = our_model().train()
    x = ids(2, 15)
    model(x, labels=x, use_cache=False).loss.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(x, labels=x, use_cache=False).loss.backward()
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_ids_and_embeddings_exclude_each_other():
    model = our_model()
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids(1, 3), inputs_embeds=torch.zeros(1, 3, 32))
