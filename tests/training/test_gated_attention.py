"""Gated attention against softmax over explicit masks, and that a model attends as before once it is gone."""

import pytest
import torch
from small_models import use_stock_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core.errors import PiKVError
from pikv_core.training.gated_attention import ENTRY, GatedAttention, gated_attention

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "pikv"]


class Layer(torch.nn.Module):
    """What an attention module tells of itself."""

    is_causal = True

    def __init__(self, layer_idx, num_key_value_groups):
        super().__init__()
        self.layer_idx, self.num_key_value_groups = layer_idx, num_key_value_groups


def masked(query, key, value, scale, is_visible):
    """Softmax attention over the visible tokens, in float64; output [B,T,H,D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = (query.double() @ key.mT * scale).masked_fill(~is_visible, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).float()


def hidden(model, ids):
    with torch.no_grad():
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("num_tokens", [1, 20, 63, 257, 600])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (4, 16), (300, 40), (3, 500)])
def test_a_gate_mixes_full_with_streaming_attention(num_tokens, sinks, recent):
    draw = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(2, 6, num_tokens, 8, generator=draw)
    key, value = torch.randn(2, 2, 3, num_tokens, 8, generator=draw)
    attention = GatedAttention([None, None], sinks, recent)
    attention.gates = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.25, 1.0]])
    output, _ = attention(Layer(1, 2), query, key, value, None, scaling=0.7)

    place = torch.arange(num_tokens)
    age = place[:, None] - place
    full = masked(query, key, value, 0.7, age >= 0)
    streaming = masked(query, key, value, 0.7, (age >= 0) & ((place < sinks) | (age < recent)))
    gate = torch.tensor([0.0, 0.0, 0.25, 0.25, 1.0, 1.0])[:, None]
    torch.testing.assert_close(output, gate * full + (1 - gate) * streaming, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_open_gates_change_nothing_and_closed_ones_do(small_model, arch):
    model = small_model(arch)
    use_stock_attention(model)
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))
    expected = hidden(model, ids)
    num_layers, num_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    with gated_attention(model, 2, 8) as attention:
        without_gates = hidden(model, ids)
        attention.gates = torch.ones(num_layers, num_heads)
        opened = hidden(model, ids)
        attention.gates = torch.zeros(num_layers, num_heads)
        closed = hidden(model, ids)
    assert torch.allclose(without_gates, expected, atol=1e-5)
    assert torch.allclose(opened, expected, atol=1e-5)
    assert torch.allclose(closed[:, :10], expected[:, :10], atol=1e-5)
    changed = not torch.allclose(closed, expected, atol=1e-2)
    assert changed == (arch != "mistral"), "layers with a sliding window have no gates"
    assert attention.has_gate == [arch != "mistral"] * num_layers


@pytest.mark.parametrize("before", ["sdpa", "eager", "pikv"])
def test_the_model_attends_as_before_even_after_an_error(small_model, before):
    model = small_model("llama")
    model.set_attn_implementation(before)
    entries = set(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), gated_attention(model, 2, 8):
        assert model.config._attn_implementation == ENTRY
        raise KeyError
    assert model.config._attn_implementation == before
    assert set(ALL_ATTENTION_FUNCTIONS) == entries
    assert ENTRY not in entries


@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss"])
def test_an_attention_of_another_kind_is_refused(small_model, arch):
    model = small_model(arch)
    with pytest.raises(PiKVError, match="soft caps or sinks"), gated_attention(model, 2, 8):
        hidden(model, torch.zeros(1, 4, dtype=torch.long))
