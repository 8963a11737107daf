"""Bytes and weights of known models, from the built-in list and from configs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pikv_core.errors import PiKVError
from pikv_core.simulation.cost.config import built_in
from pikv_core.simulation.cost.kv_model import KvModel

# as published: weights without embeddings, or those one token uses less the embeddings; in billions
PUBLISHED = {
    "llama-3.1-8b": 8.03 - 2 * 128256 * 4096 / 1e9,
    "llama-3.1-70b": 70.55 - 2 * 128256 * 8192 / 1e9,
    "mistral-7b": 7.24 - 2 * 32000 * 4096 / 1e9,
    "mixtral-8x7b": 12.9 - 2 * 32000 * 4096 / 1e9,
    "qwen2.5-7b": 6.53,
    "qwen2.5-72b": 70.0,
    "qwen3-0.6b": 0.44,
    "qwen3-4b": 3.6,
    "qwen3-8b": 6.95,
    "qwen3-14b": 13.2,
    "qwen3-32b": 31.2,
    "qwen3-30b-a3b": 3.34 - 2 * 151936 * 2048 / 1e9,
    "qwen3-235b-a22b": 22.2 - 2 * 151936 * 4096 / 1e9,
    "gpt-oss-20b": 3.61 - 201088 * 2880 / 1e9,  # counted with the output head alone
    "gpt-oss-120b": 5.13 - 201088 * 2880 / 1e9,
    "deepseek-v3": 37.5 - 2 * 129280 * 7168 / 1e9,
    "kimi-k2": 32.9 - 2 * 163840 * 7168 / 1e9,
}
KIB_PER_TOKEN = {
    "llama-3.1-8b": 128,
    "llama-3.1-70b": 320,
    "mistral-7b": 128,
    "mixtral-8x7b": 128,
    "qwen2.5-7b": 56,
    "qwen3-8b": 144,
    "qwen3-32b": 256,
    "qwen3-30b-a3b": 96,
    "qwen3-235b-a22b": 188,
    "gpt-oss-20b": 48,
    "gpt-oss-120b": 72,
}
DENSE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_weights_are_those_published(name: str) -> None:
    assert KvModel.load(name).num_active_params / 1e9 == pytest.approx(PUBLISHED[name], rel=0.012)


@pytest.mark.parametrize("name", KIB_PER_TOKEN)
def test_bytes_per_token(name: str) -> None:
    assert KvModel.load(name).bytes_per_token == KIB_PER_TOKEN[name] * 1024
    assert KvModel.load(name, "float8").bytes_per_token == KIB_PER_TOKEN[name] * 512


def test_latent_attention_keeps_the_latent_and_the_rotary_key() -> None:
    assert KvModel.load("deepseek-v3").bytes_per_token == 70272
    assert KvModel.load("kimi-k2").bytes_per_token == 70272


def test_every_built_in_config_is_whole() -> None:
    for name in built_in():
        model = KvModel.load(name.upper())
        assert model.bytes_per_token > 0 and model.num_active_params > 1e8


def test_dense_model_counted_by_hand(tmp_path: Path) -> None:
    model = KvModel.load(saved(tmp_path, DENSE))
    attention = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64  # q, k, v, o
    assert model.num_active_params == 3 * (attention + 3 * 64 * 100)
    assert model.bytes_per_token == 3 * 2 * 2 * 16 * 2
    assert model.attention_flops == 3 * 4 * 2 * 16
    ungated = KvModel.load(saved(tmp_path, {**DENSE, "model_type": "starcoder2"}))
    assert ungated.num_active_params == 3 * (attention + 2 * 64 * 100)
    assert KvModel.load(str(tmp_path / "config.json")).bytes_per_token == model.bytes_per_token


def test_mixture_counted_by_hand(tmp_path: Path) -> None:
    mixture = {**DENSE, "moe_intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 2}
    attention = 2 * 64 * 64 + 2 * 64 * 32
    sparse, dense = attention + 64 * 8 + 3 * 64 * 2 * 20, attention + 3 * 64 * 100
    counts: list[tuple[dict[str, Any], int]] = [
        ({}, 3 * sparse),
        ({"n_shared_experts": 1}, 3 * (sparse + 3 * 64 * 20)),
        ({"shared_expert_intermediate_size": 30}, 3 * (sparse + 3 * 64 * 30)),
        ({"first_k_dense_replace": 1}, dense + 2 * sparse),
        ({"mlp_only_layers": [0, 2]}, 2 * dense + sparse),
        ({"decoder_sparse_step": 2}, 2 * dense + sparse),
    ]
    for more, expected in counts:
        assert KvModel.load(saved(tmp_path, {**mixture, **more})).num_active_params == expected, more


def test_latent_model_counted_by_hand(tmp_path: Path) -> None:
    latent = {**DENSE, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    model = KvModel.load(saved(tmp_path, latent))
    attention = 64 * 4 * 24 + 64 * 32 + 24 * 4 * 28 + 4 * 12 * 64
    assert model.num_active_params == 3 * (attention + 3 * 64 * 100)
    assert model.bytes_per_token == 3 * 32 * 2
    assert model.attention_flops == 3 * 4 * (24 + 12)
    compressed = KvModel.load(saved(tmp_path, {**latent, "q_lora_rank": 10}))
    assert compressed.num_active_params - model.num_active_params == 3 * (10 * (64 + 4 * 24) - 64 * 4 * 24)


def test_the_text_part_of_a_config_counts(tmp_path: Path) -> None:
    whole = {"model_type": "many", "vision_config": {"hidden_size": 7}, "hidden_size": 9, "text_config": DENSE}
    assert KvModel.load(saved(tmp_path, whole)).num_active_params == 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100)


def test_attention_costs_as_much_as_the_weights_at_attention_tokens() -> None:
    model = KvModel.load("llama-3.1-8b")
    place = model.attention_tokens
    token = 32 * 32 * 4 * 128 * place  # queries with keys, shares with values, over all tokens before
    assert token == pytest.approx(2 * model.num_active_params)
    assert 2 * 32 * 32 * 128 * (2 * place) ** 2 == pytest.approx(2 * model.num_active_params * 2 * place)


def test_capacities_in_bytes() -> None:
    model = KvModel.load("llama-3.1-8b")
    assert model.block_bytes(512) == 64 * 2**20
    assert model.blocks("64GiB", 512) == 1024
    assert model.blocks("100MiB", 512) == 1
    with pytest.raises(PiKVError, match="holds no block"):
        model.blocks("63MiB", 512)
    with pytest.raises(PiKVError, match="expected bytes"):
        model.blocks("many", 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers: required, but not given"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number of at least 1, got 0"),
        ({"hidden_size": "64"}, "hidden_size: expected a whole number of at least 1, got '64'"),
        ({"intermediate_size": None}, "intermediate_size: required"),
        ({"kv_lora_rank": 8}, "qk_rope_head_dim: required"),
        ({"num_experts": 8}, "num_experts_per_tok or experts_per_token: required"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "cannot count layers of 'linear_attention'"),
        ({"interleave_moe_layer_step": 1}, "interleave_moe_layer_step"),
    ],
)
def test_a_config_that_cannot_be_counted_names_key_and_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PiKVError) as caught:
        KvModel.load(saved(tmp_path, {**DENSE, **change}))
    assert message in caught.value.message
    assert str(tmp_path / "config.json") in caught.value.message
    assert caught.value.hint


def test_unreadable_configs(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match=r"cannot read .*: no such file"):
        KvModel.load(str(tmp_path))
    for text, message in (("{", "not a JSON file"), ("[]", "expected a JSON object"), ('{"text_config": 1}', "text_")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PiKVError, match=message):
            KvModel.load(str(tmp_path))


def test_an_unknown_model_lists_those_known() -> None:
    with pytest.raises(PiKVError, match=r"did you mean 'llama-3\.1-8b'") as caught:
        KvModel.load("lama-3.1-8b")
    assert caught.value.hint and all(name in caught.value.hint for name in built_in())
    with pytest.raises(PiKVError, match="kv_dtype: unknown 'int4'"):
        KvModel.load("llama-3.1-8b", "int4")  # type: ignore[arg-type]
