"""The objective, the optimizers' groups, the gates of transformers models, and checkpoints on disk."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pikv_core.data.source import Batch
from pikv_core.errors import PiKVError, UsageError
from pikv_core.schema import ModelRecipe, TrainSettings
from pikv_core.training import hardware
from pikv_core.training.architectures import build_model
from pikv_core.training.checkpoint import (
    Checkpoint,
    drop_metrics_after,
    load_checkpoint,
    save_checkpoint,
)
from pikv_core.training.gates import gates_of, load_statistics
from pikv_core.training.objective import score
from pikv_core.training.optimizers import Optimizers

SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 48}
MOE = {"num_experts": 4, "expert_size": 24, "balance_loss": 0.5, "z_loss": 0.25}


def model_of(arch, **more):
    torch.manual_seed(0)
    recipe = ModelRecipe(arch=arch, **{**SIZES, **MOE, **more})
    return build_model(recipe, vocab_size=50), recipe


def batch(num_answers=3, num_text=7):
    rng = np.random.default_rng(0)
    ids = rng.integers(50, size=(4, 12))
    places = rng.permutation(4 * 11)
    masks = np.zeros((2, 4 * 11), bool)
    masks[0, places[:num_answers]] = True
    masks[1, places[num_answers : num_answers + num_text]] = True
    masks = np.pad(masks.reshape(2, 4, 11), ((0, 0), (0, 0), (0, 1)))
    return Batch(ids, masks[0], masks[1])


@pytest.mark.parametrize("arch", ["llama", "mixtral", "qwen3_moe", "pikv"])
def test_scores_equal_cross_entropy_over_all_logits(arch):
    model, _ = model_of(arch)
    one = batch()
    scores, _ = score(model, one, with_text=True)
    ids = torch.from_numpy(one.ids)
    losses = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    answers = losses[torch.from_numpy(one.answer_mask[:, :-1])]
    text = losses[torch.from_numpy(one.text_mask[:, :-1])]
    torch.testing.assert_close(scores.answer_loss, answers.sum())
    torch.testing.assert_close(scores.text_loss, text.sum())
    losses = scores.losses(0.3)
    torch.testing.assert_close(losses["answers"], answers.mean())
    torch.testing.assert_close(losses["text"], 0.3 * text.mean())
    right = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert int(scores.num_correct) == int(right[torch.from_numpy(one.answer_mask[:, :-1])].sum())


def test_a_batch_without_answers_is_scored_as_text():
    model, _ = model_of("llama")
    scores, _ = score(model, batch(num_answers=0), with_text=True)
    torch.testing.assert_close(scores.losses(0.0), {"text": scores.text_loss / 7})


def test_muon_takes_the_matrices_inside_the_blocks_and_nothing_else():
    model, _ = model_of("mixtral")
    optimizers = Optimizers(model, TrainSettings())
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {}
    for optimizer in optimizers._all:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                assert names[id(weight)] not in found
                found[names[id(weight)]] = (type(optimizer).__name__, group["weight_decay"] > 0)
    assert set(found) == set(names.values())
    for name, (kind, decayed) in found.items():
        assert (kind == "Muon") == name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
        assert decayed == ("norm" not in name and "embed" not in name and "lm_head" not in name)


def test_adamw_alone_takes_everything():
    model, _ = model_of("llama")
    optimizers = Optimizers(model, TrainSettings(optimizer="adamw"))
    assert [type(optimizer) for optimizer in optimizers._all] == [torch.optim.AdamW]


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_gates_of_transformers_models_have_our_decoders_losses_and_load(arch):
    model, recipe = model_of(arch, attention_bias=False)
    gates = gates_of(model, recipe.balance_loss, recipe.z_loss)
    one = batch()
    _, outputs = score(model, one, with_text=True)
    losses = gates.losses(outputs)
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    score(model, one, with_text=True)
    gates.losses(None)
    balance, z, counts, entropy = [], [], [], []
    for layer, x in zip(model.model.layers, inputs, strict=True):
        logits = x.reshape(-1, 32).double() @ layer.mlp.gate.weight.detach().double().T
        chosen = torch.bincount(logits.topk(2).indices.reshape(-1), minlength=4)
        balance.append(0.5 * 4 * (chosen / chosen.sum() * logits.softmax(-1).mean(0)).sum())
        z.append(0.25 * logits.logsumexp(-1).square().mean())
        entropy.append(torch.distributions.Categorical(logits=logits).entropy().mean())
        counts.append(chosen)
    torch.testing.assert_close(losses["balance"].double(), torch.stack(balance).mean())
    torch.testing.assert_close(losses["z"].double(), torch.stack(z).mean())
    assert [layer["expert_tokens"] for layer in gates.statistics()] == (2 * torch.stack(counts)).tolist()
    assert [layer["router_entropy"] for layer in gates.statistics()] == pytest.approx([float(one) for one in entropy])
    loads = torch.stack(counts).double().numpy()
    statistics = load_statistics(gates.statistics())
    assert statistics["load_max_over_mean"] == pytest.approx((loads.max(1) / loads.mean(1)).max())
    assert statistics["load_cv"] == pytest.approx((loads.std(1) / loads.mean(1)).max())


def a_checkpoint(step):
    weights = {"a": torch.full((3,), float(step))}
    return Checkpoint(
        step, weights, {"a": {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, {"stage": 1}, torch.get_rng_state()
    )


def test_the_newest_checkpoint_is_loaded_and_the_only_one_kept(tmp_path):
    for step in (8, 16, 112):
        save_checkpoint(tmp_path, a_checkpoint(step))
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 112
    assert torch.equal(loaded.weights["a"], torch.full((3,), 112.0))
    assert loaded.curriculum == {"stage": 1}
    assert torch.equal(loaded.random_state, a_checkpoint(112).random_state)
    for key, value in a_checkpoint(112).optimizers["a"].items():
        assert torch.equal(loaded.optimizers["a"][key], value)
    assert [entry.name for entry in (tmp_path / "checkpoint").iterdir()] == ["112"]


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    save_checkpoint(tmp_path, a_checkpoint(8))
    unfinished = tmp_path / "checkpoint" / ".16.abc" / "16"
    unfinished.mkdir(parents=True)
    assert load_checkpoint(tmp_path).step == 8


def test_a_damaged_checkpoint_is_told_by_its_path(tmp_path):
    save_checkpoint(tmp_path, a_checkpoint(8))
    for file in ("__0_0.distcp", ".metadata", "progress.json"):
        (tmp_path / "checkpoint" / "8" / file).write_bytes(b"nothing")
        with pytest.raises(PiKVError, match="checkpoint/8: the checkpoint cannot be read"):
            load_checkpoint(tmp_path)
        shutil.rmtree(tmp_path / "checkpoint")
        save_checkpoint(tmp_path, a_checkpoint(8))


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": 1.5}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "x')
    drop_metrics_after(tmp_path, 6)
    assert path.read_text().splitlines() == lines
    drop_metrics_after(tmp_path, 5)
    assert path.read_text().splitlines() == lines[:2]


def test_float16_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="would need loss scaling"):
        hardware.choose("cpu", "float16")
