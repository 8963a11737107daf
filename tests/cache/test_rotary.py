"""The rotary embedding, against what real models hand to transformers' own cache."""

import pytest
import torch
import transformers
from small_models import CONFIGS, SMALL

from pikv_core.cache.rotary import Rotary
from pikv_core.errors import PiKVError

NUM_TOKENS = 20
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
MORE_CONVENTIONS = {
    "by layer type": lambda: transformers.Gemma3TextConfig(
        head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **SMALL
    ),
    "interleaved": lambda: transformers.CohereConfig(**SMALL),
    "interleaved, half of the channels": lambda: transformers.GlmConfig(head_dim=16, **SMALL),
    "half of the channels": lambda: transformers.PhiConfig(**SMALL),
    "scaled": lambda: transformers.LlamaConfig(rope_parameters=YARN, **SMALL),
}
ALL_CONFIGS = {**CONFIGS, **MORE_CONVENTIONS}


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def rotary_of(name):
    return Rotary.of(model_of(ALL_CONFIGS[name]()))


def keys_before_and_after(model, position):
    """Return per layer the keys [B,G,S,D] before the rotation and as a cache gets them."""
    before, cache = {}, transformers.DynamicCache()
    attentions = [module for module in model.modules() if hasattr(module, "k_proj")]
    for attention in attentions:
        last = getattr(attention, "k_norm", None) or attention.k_proj
        last.register_forward_hook(lambda _, inputs, out, index=attention.layer_idx: before.update({index: out}))
    tokens = torch.randint(1, SMALL["vocab_size"], position.shape)
    model(tokens, position_ids=position, past_key_values=cache)
    for index, out in before.items():
        after = cache.layers[index].keys
        heads = out.view(*position.shape, -1, after.shape[-1]).transpose(1, 2) if out.dim() == 3 else out
        yield index, heads if heads.shape == after.shape else heads.transpose(1, 2), after


@pytest.mark.parametrize("name", ALL_CONFIGS)
@torch.no_grad()
def test_rotation_is_the_models_own(name):
    model = model_of(ALL_CONFIGS[name]())
    rotary = Rotary.of(model)
    position = torch.stack((torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS) + 7))
    seen = 0
    for layer, before, after in keys_before_and_after(model, position):
        torch.testing.assert_close(rotary.rotate(before, position, layer), after)
        torch.testing.assert_close(rotary.unrotate(after, position, layer), before)
        per_head = position[:, None].expand(after.shape[:3])
        torch.testing.assert_close(rotary.rotate(before, per_head, layer), after)
        seen += 1
    assert seen == SMALL["num_hidden_layers"]


@pytest.mark.parametrize("name", ALL_CONFIGS)
@torch.no_grad()
def test_pairs_and_turns_make_the_rotation(name):
    rotary = rotary_of(name)
    position = torch.arange(40, 60)
    for layer in range(SMALL["num_hidden_layers"]):
        x = torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(layer))
        (one, other), turns = rotary.pairs(layer), rotary.turns(layer, 60)[position]
        assert len(turns.T) == 2 * len(one) <= 16
        (cos, sin), turned = turns.chunk(2, dim=-1), x.clone()
        turned[..., one] = x[..., one] * cos - x[..., other] * sin
        turned[..., other] = x[..., other] * cos + x[..., one] * sin
        torch.testing.assert_close(turned, rotary.rotate(x, position, layer))


def test_a_function_that_is_no_rotation_of_pairs_has_none():
    rotary = rotary_of("llama")
    rotary.apply = lambda x, y, cos, sin: (x * cos + x.roll(1, -1) * sin, y)
    assert rotary.pairs(0) is None


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "interleaved, half of the channels", "scaled"])
@torch.no_grad()
def test_rotation_in_bfloat16(name):
    model = model_of(ALL_CONFIGS[name](), torch.bfloat16)
    rotary = Rotary.of(model)
    position = torch.arange(NUM_TOKENS)[None] + 100
    for layer, before, after in keys_before_and_after(model, position):
        rotated = rotary.rotate(before, position[0], layer)
        assert rotated.dtype == torch.bfloat16
        scale = after.abs().max().item()
        torch.testing.assert_close(rotated, after, atol=2**-7 * scale, rtol=0)
        torch.testing.assert_close(rotary.unrotate(after, position, layer), before, atol=2**-7 * scale, rtol=0)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_shift_moves_positions_and_counts_the_scaling_once(name):
    rotary = rotary_of(name)
    x = torch.randn(2, 3, 9, 16)
    old, new = torch.randint(0, 500, (2, 3, 9)), torch.randint(0, 500, (2, 3, 9))
    for layer in range(SMALL["num_hidden_layers"]):
        moved = rotary.shift(rotary.rotate(x, old, layer), new - old, layer)
        torch.testing.assert_close(moved, rotary.rotate(x, new, layer), atol=2e-4, rtol=0)
        torch.testing.assert_close(rotary.shift(x, torch.zeros_like(old), layer), x)


def test_scaled_embedding_lengthens_rotated_keys_alone():
    rotary = rotary_of("scaled")
    x = torch.randn(1, 2, 5, 16)
    factor = rotary.embedding.attention_scaling
    assert factor > 1.1
    length = x.norm(dim=-1)
    torch.testing.assert_close(rotary.rotate(x, torch.arange(5), 0).norm(dim=-1), factor * length)
    torch.testing.assert_close(rotary.shift(x, torch.arange(5), 0).norm(dim=-1), length)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_unrotate_is_the_inverse_even_of_empty_slots(name):
    rotary = rotary_of(name)
    x = torch.randn(2, 3, 9, 16, dtype=torch.float64)
    position = torch.randint(-1, 2000, (2, 3, 9))
    position[:, :, 0] = -1
    for layer in range(SMALL["num_hidden_layers"]):
        torch.testing.assert_close(
            rotary.unrotate(rotary.rotate(x, position, layer), position, layer), x, atol=1e-6, rtol=0
        )


def test_slots_do_not_disturb_each_other():
    rotary = rotary_of("llama")
    x, position = torch.randn(1, 2, 6, 16), torch.tensor([4, -1, 2, -1, 0, 9]).expand(1, 2, 6)
    x[:, :, position[0, 0] < 0] = float("nan")
    filled = position[0, 0] >= 0
    rotated = rotary.rotate(x, position, 1)
    assert rotated[:, :, filled].equal(rotary.rotate(x[:, :, filled], position[:, :, filled], 1))


def test_model_with_learned_positions_has_none():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=97, bos_token_id=None, eos_token_id=None
    )
    assert Rotary.of(model_of(config)) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: transformers.LlamaConfig(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, **SMALL
            ),
            "'dynamic', whose frequencies depend on the length",
        ),
        (
            lambda: transformers.Phi3Config(
                rope_parameters={
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 512,
                },
                **SMALL,
            ),
            "'longrope', whose frequencies depend on the length",
        ),
        (lambda: transformers.SmolLM3Config(**SMALL), "'smollm3' rotates keys under a condition"),
    ],
)
def test_what_cannot_be_undone_is_refused_where_it_is_asked_for(config, message):
    rotary = Rotary.of(model_of(config()))
    for turn in (rotary.rotate, rotary.unrotate, rotary.shift):
        with pytest.raises(PiKVError, match=message):
            turn(torch.randn(1, 2, 3, 16), torch.arange(3), 0)
