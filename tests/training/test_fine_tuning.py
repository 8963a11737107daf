"""Going on from a trained model: what it was before, its tokens, a head that it had not, and an exact resume."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import CONFIGS, SMALL
from small_training import InterruptedAt, train_small
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pikv_core.data import tokenizer
from pikv_core.data.recall import Recall
from pikv_core.data.tokens import encode
from pikv_core.errors import PiKVError, RecipeError, UsageError
from pikv_core.model import PiKVConfig
from pikv_core.runs import Reporter
from pikv_core.training.architectures import HEADS
from pikv_core.training.loop import Loop
from pikv_core.training.start import load_trained

LABELS = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def go_on(folder, base, *overrides, **options):
    return train_small(folder, f"train.init_from={base}", *overrides, sizes=False, **options)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/tokens_per_s"} for line in lines]


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_run_that_goes_on_tells_what_the_model_was_and_resumes_exactly(tmp_path):
    before = train_small(tmp_path / "base", "model.arch=pikv", "model.router=pikv", "train.max_steps=6")
    go_on(tmp_path / "whole", tmp_path / "base")
    start = logged(tmp_path / "whole")[0]
    assert start == {"step": 0, **{f"start/{name}": value for name, value in before.metrics.items()}}
    for step in (3, 6):
        cut = tmp_path / f"cut-{step}"
        with pytest.raises(PiKVError, match=f"interrupted at step {step}"):
            go_on(cut, tmp_path / "base", reporter=InterruptedAt(step))
        torch.manual_seed(99)
        go_on(cut, tmp_path / "base", resume=True)
        assert_same_weights(weights_of(tmp_path / "whole"), weights_of(cut))
        assert logged(tmp_path / "whole") == logged(cut)


def test_measuring_first_leaves_no_trace(tmp_path, monkeypatch):
    train_small(tmp_path / "base", "model.arch=pikv", "model.router=mixture", "train.max_steps=4")
    go_on(tmp_path / "measured", tmp_path / "base")
    monkeypatch.setattr(Loop, "log_start", lambda self: None)
    go_on(tmp_path / "not", tmp_path / "base")
    assert_same_weights(weights_of(tmp_path / "measured"), weights_of(tmp_path / "not"))
    assert logged(tmp_path / "measured")[1:] == logged(tmp_path / "not")


def test_a_model_of_tied_weights_goes_on_resumes_and_keeps_its_tokenizer(tmp_path):
    source = Recall(num_keys=16, num_values=8, num_filler=16).open(None, 0, [], None, Reporter())
    config = CONFIGS["qwen2"]()
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    source.save(tmp_path / "base")
    go_on(tmp_path / "whole", tmp_path / "base")
    with pytest.raises(PiKVError, match="interrupted at step 6"):
        go_on(tmp_path / "cut", tmp_path / "base", reporter=InterruptedAt(6))
    result = go_on(tmp_path / "cut", tmp_path / "base", resume=True)
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(result.model).get_vocab() == source.tokenizer.get_vocab()


def test_text_is_read_with_the_tokens_of_the_model(tmp_path):
    for name, words in (("one", "the cat {} sat on the mat"), ("other", "a dog {} dug in the garden")):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.txt").write_text(f"{words.format(number)} and slept\n" * 20)
    task = "data.task={name: text, vocab_size: 300}"
    train_small(tmp_path / "base", task, f"data.text=[{tmp_path / 'one'}]")
    result = go_on(tmp_path / "run", tmp_path / "base", task, f"data.text=[{tmp_path / 'other'}]")
    vocabularies = [AutoTokenizer.from_pretrained(tmp_path / run / "model").get_vocab() for run in ("base", "run")]
    assert vocabularies[0] == vocabularies[1]
    assert result.metrics["perplexity"] < 300


@pytest.mark.parametrize("arch", ["llama", "pikv"])
def test_a_language_model_learns_classes_by_low_rank_weights(tmp_path, arch):
    rows = [
        {"text": f"one {label} of {number} in a row", "label": label}
        for number in range(40)
        for label in ("cat", "dog")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = [f"data.text=[{tmp_path / 'rows.jsonl'}]", "data.column=text"]
    train_small(tmp_path / "base", f"model.arch={arch}", "data.task={name: text, vocab_size: 300}", *text)
    lora = ["train.lora={rank: 2}", "train.lr=0.01"]
    result = go_on(tmp_path / "run", tmp_path / "base", "data.task={name: classification}", *text, *lora)
    assert set(load_file(f"{result.adapter}/adapter_model.safetensors")) >= {"base_model.model.score.weight"}
    merged = AutoModelForSequenceClassification.from_pretrained(result.model).eval()
    assert sorted(merged.config.id2label.values()) == ["cat", "dog"]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base" / "model", config=merged.config)
    adapted = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>", None])
def test_a_text_ends_as_the_tokenizer_has_it(end):
    ours = tokenizer.build_word_level(["a", "b"]).get_vocab()
    other = tokenizer.build_word_level(["a", "b"])
    other.model = type(other.model)(
        {(end or "x") if word == "<eos>" else word: number for word, number in ours.items()}, unk_token="<unk>"
    )
    other = type(other).from_str(other.to_str().replace('"<eos>"', f'"{end or "x"}"'))
    expected = [3, *([2] if end else []), 4, *([2] if end else [])]
    assert encode(other, ["a", "b"]).tolist() == expected


def test_other_tokens_are_refused_with_a_way_out(tmp_path):
    train_small(tmp_path / "base", "train.max_steps=4")
    fewer = "data.task={name: recall, num_keys: 16, num_values: 6, num_filler: 16}"
    with pytest.raises(PiKVError, match=r"the task's 41 tokens are not those of .*: 25 agree with its 43") as caught:
        go_on(tmp_path / "run", tmp_path / "base", fewer)
    assert "data.path" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_told_before_anything_is_written(tmp_path):
    train_small(tmp_path / "base", "model.max_positions=64", "train.max_steps=4")
    with pytest.raises(UsageError, match=r"128 tokens are asked for, train\.init_from knows 64 positions"):
        go_on(tmp_path / "run", tmp_path / "base", "train.curriculum=[128]")
    with pytest.raises(PiKVError, match="no such model folder"):
        go_on(tmp_path / "run", tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="max_positions"):
        train_small(tmp_path / "run", "model.max_positions=16")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "qwen3_moe", "pikv", "gpt2"])
@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification", "question-answering"])
def test_a_head_that_the_checkpoint_lacks_is_drawn_and_the_decoder_is_its_own(tmp_path, kind, head):
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    base = AutoModelForCausalLM.from_config(gpt2 if kind == "gpt2" else CONFIGS[kind]()).eval()
    base.save_pretrained(tmp_path)
    options = {"vocab_size": 90, "pad_token_id": 0, **(LABELS if head == "sequence-classification" else {})}
    torch.manual_seed(1)
    model = load_trained(str(tmp_path), head, options)
    torch.manual_seed(1)
    again = load_trained(str(tmp_path), head, options)
    assert_same_weights(model.state_dict(), again.state_dict())
    assert_same_weights(base.base_model.state_dict(), model.base_model.state_dict())
    assert type(model) in getattr(transformers, HEADS[head])._model_mapping.values()
    assert model.config.vocab_size == 97
    if head == "sequence-classification":
        assert model.config.id2label == LABELS["id2label"]
        assert model.score.weight.shape == (3, 64)


def test_a_head_for_other_labels_is_drawn_anew(tmp_path):
    config = transformers.LlamaConfig(num_labels=5, **SMALL)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert load_trained(str(tmp_path), "sequence-classification", LABELS).score.weight.shape == (3, 64)


def test_the_frozen_base_of_low_rank_experts_stays_frozen(tmp_path):
    config = PiKVConfig(num_experts=4, expert_rank=2, train_base=False, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_trained(str(tmp_path), "causal-lm", {})
    frozen = {name.rpartition(".")[2] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(("size", "value", "parts"), [("num_hidden_layers", 4, 9), ("intermediate_size", 80, 9)])
def test_a_decoder_whose_weights_are_not_all_there_is_refused(tmp_path, size, value, parts):
    config = CONFIGS["llama"]()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    setattr(config, size, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(PiKVError, match=f"no weights that fit {parts} parts of its decoder"):
        load_trained(str(tmp_path), "causal-lm", {})
