"""The decoder's way through a training step against that through its modules, and against transformers."""

import numpy as np
import pytest
import torch
from test_decoder import PEERS, ids, our_model

from pikv_core.data.source import Batch
from pikv_core.model import PiKVForCausalLM
from pikv_core.model.attention import PiKVAttention
from pikv_core.training.objective import head_loss, score


@pytest.fixture
def passes(monkeypatch):
    """Return a list that grows by one whenever a layer attends as for training."""
    seen, attend = [], PiKVAttention.attend_causally
    monkeypatch.setattr(PiKVAttention, "attend_causally", lambda *given: seen.append(given[0]) or attend(*given))
    return seen


def gradients(model, x, **more):
    model.zero_grad()
    outputs = model.base_model(input_ids=x, use_cache=False, **more)
    hidden = outputs.last_hidden_state
    loss = head_loss(model.get_output_embeddings(), hidden[:, :-1].flatten(0, 1), x[:, 1:].flatten()) / x[:, 1:].numel()
    (loss + outputs.aux_loss).backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@PEERS
@pytest.mark.parametrize("num_tokens", [20, 128])
def test_loss_and_gradients_equal_transformers(peers, passes, num_tokens):
    theirs, ours = peers()
    ours.load_state_dict(theirs.state_dict())
    for layer in ours.model.layers:
        layer.mlp.gate.loss_weights = {"balance": 0.0, "z": 0.0}
    x = ids(2, num_tokens)
    loss, got = gradients(ours, x)
    assert len(passes) == 3
    expected = theirs(x, labels=x, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_bias": True, "vo_bias": True, "qk_norm": True},
        {"router": "time", "num_key_value_heads": 4},
        {"router": "fast", "router_options": {"gate": "switch", "capacity_factor": 0.5}, "num_experts_per_tok": 1},
        {"expert_rank": 2},
    ],
)
def test_training_takes_the_same_way_as_the_modules(options, passes):
    model, x = our_model(**options).double().eval(), ids(3, 150)
    loss, got = gradients(model, x)
    assert len(passes) == 3
    expected_loss, expected = gradients(model, x, attention_mask=full_mask(3, 150))
    assert len(passes) == 3, "a mask is for the modules"
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=2e-3)  # the modules norm in float32


def test_long_samples_are_attended_to_by_sdpa(monkeypatch, passes):
    model, x = our_model(), ids(2, 21)
    loss, in_blocks = gradients(model, x)
    monkeypatch.setattr("pikv_core.model.attention.MOST_BLOCK_TOKENS", 20)
    monkeypatch.setattr("pikv_core.model.attention.block_causal_attention", lambda *_: pytest.fail("in blocks"))
    long_loss, got = gradients(model, x)
    assert len(passes) == 6
    torch.testing.assert_close(long_loss, loss)
    for name, gradient in in_blocks.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)


def full_mask(num_samples, num_tokens):
    """Return a mask [B, 1, T, T] that says what none says."""
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    return torch.zeros(num_samples, 1, num_tokens, num_tokens, dtype=torch.float64).masked_fill_(hidden, -torch.inf)


def test_bfloat16_comes_near_float32_and_leaves_float32_gradients(passes):
    model, x = our_model(qk_norm=True).train(), ids(4, 100)
    expected_loss, expected = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.base_model(input_ids=x, use_cache=False, output_hidden_states=True)
        assert outputs.last_hidden_state.dtype == torch.float32
        loss, got = gradients(model, x)
    assert len(passes) == 9
    torch.testing.assert_close(loss, expected_loss, atol=2e-3, rtol=2e-3)
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        near = torch.nn.functional.cosine_similarity(got[name].flatten(), gradient.flatten(), 0)
        assert near > 0.98, f"{name}: {near}"


def test_what_is_put_in_place_of_a_projection_is_asked(passes):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = our_model(), ids(2, 9)
    plain = model.base_model(input_ids=x, use_cache=False).last_hidden_state
    assert len(passes) == 3
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, given, out: 2 * out)
    hooked = model.base_model(input_ids=x, use_cache=False).last_hidden_state
    hook.remove()
    old = model.model.layers[1].self_attn.v_proj
    new = model.model.layers[1].self_attn.v_proj = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    replaced = model.base_model(input_ids=x, use_cache=False).last_hidden_state
    assert len(passes) == 3
    torch.testing.assert_close(hooked, replaced)
    assert not torch.allclose(hooked, plain)


def test_without_gradients_or_with_a_cache_the_modules_are_asked(passes):
    model, x = our_model(), ids(2, 9)
    model(x)
    model.train()(x, use_cache=True)
    with torch.no_grad():
        model(x, use_cache=False)
    model.set_attn_implementation("eager")
    model(x, use_cache=False)
    assert not passes
    dropping = our_model(attention_dropout=0.5)
    dropping.train()(x, use_cache=False)
    assert not passes
    dropping.eval()(x, use_cache=False)
    assert len(passes) == 3


def test_the_text_is_scored_alike_with_and_without_its_logits():
    model: PiKVForCausalLM = our_model()
    tokens = ids(3, 17).numpy()
    batch = Batch(tokens, np.zeros(tokens.shape, dtype=bool), np.random.default_rng(0).random(tokens.shape) < 0.7)
    told, _ = score(model, batch, with_text=True, with_logits=True)
    short, _ = score(model, batch, with_text=True)
    assert short.logits is None and len(told.logits) == told.num_text == short.num_text
    torch.testing.assert_close(short.text_loss, told.text_loss)
    one, other = (torch.autograd.grad(one.text_loss, list(model.parameters())) for one in (told, short))
    for gradient, again in zip(one, other, strict=True):
        torch.testing.assert_close(again, gradient, atol=1e-5, rtol=1e-4)
