"""What the sweep measures, against the same quantity computed without a cache."""

import json
import math

import numpy as np
import pytest
import torch
from small_models import CONFIGS

from pikv_core.cache import PiKVCache
from pikv_core.components import Component
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.errors import PiKVError, UsageError
from pikv_core.evaluation.attention_error import AttentionError
from pikv_core.evaluation.methods import expand
from pikv_core.evaluation.pareto import frontier
from pikv_core.evaluation.perplexity import measure_perplexity
from pikv_core.evaluation.prompts import TextWindows, read_text, recall_prompts, text_windows
from pikv_core.evaluation.recall import measure_recall
from pikv_core.jobs import compress
from pikv_core.model.loading import LoadedModel, load_model
from pikv_core.runs import Reporter, Run
from pikv_core.schema import CompressRecipe


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random llama with the vocabulary of the recall task, saved as training saves it."""
    import transformers

    folder = tmp_path_factory.mktemp("run") / "model"
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    source.save(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(str(model_folder), CompressRecipe(model="given"))


def full(loaded):
    return lambda: PiKVCache(loaded.model.config)


def test_prompts_ask_what_the_task_asks(loaded, model_folder):
    prompts = recall_prompts(loaded, None, 100, 128, seed=0)
    assert prompts.depth.numel() >= 100
    tokenizer = RecallSource.load(model_folder).tokenizer
    for context, questions, answers in zip(prompts.context, prompts.questions, prompts.answers):
        for question, answer in zip(questions, answers):
            (at,) = torch.where(context == question[-1])[0].tolist()
            assert context[at + 1] == answer[0]
            assert tokenizer.id_to_token(int(question[-1])).startswith("k")


@pytest.mark.parametrize("question", ["after", "inside"])
def test_recall_of_the_full_cache_is_the_models_own(loaded, question):
    prompts = recall_prompts(loaded, None, 64, 96, seed=1)
    found = measure_recall(loaded.model, full(loaded), prompts, question, batch_size=3)
    ids = prompts.joined(len(prompts.context))
    loaded.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = loaded.model(ids).logits
    C = prompts.context.shape[1]
    at = torch.arange(prompts.questions.shape[1]) * 2 + C
    right = (logits[:, at].argmax(-1) == ids[:, at + 1]).float()
    loss = torch.nn.functional.cross_entropy(logits[:, at].flatten(0, 1), ids[:, at + 1].flatten())
    assert found.share == pytest.approx(right.mean().item())
    assert found.answer_perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.num_queries == right.numel()
    fifths = (prompts.depth * 5).long().clamp(max=4)
    for index, share in enumerate(found.by_depth):
        if share is not None:
            assert share == pytest.approx(right[fifths == index].mean().item())


def test_seeing_the_question_changes_what_h2o_keeps_and_nothing_else(loaded):
    prompts = recall_prompts(loaded, None, 64, 96, seed=2)
    caches = []

    def new_cache():
        caches.append(PiKVCache.from_recipe(loaded.model.config, {"policy": "h2o", "budget": 0.25}))
        return caches[-1]

    for question in ("after", "inside"):
        measure_recall(loaded.model, new_cache, prompts, question, batch_size=100)
    after, inside = caches
    assert after.get_seq_length() == inside.get_seq_length() == 96
    assert after.num_stored == inside.num_stored
    assert not torch.equal(after.retrieve(0)[2], inside.retrieve(0)[2])


def test_perplexity_of_the_full_cache_is_the_models_own(loaded):
    ids = torch.randint(3, 400, (5, 60), generator=torch.Generator().manual_seed(0))
    found = measure_perplexity(loaded.model, full(loaded), TextWindows(ids, "drawn"), 40, batch_size=2)
    loaded.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = loaded.model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, 40:-1].flatten(0, 1), ids[:, 41:].flatten())
    assert found == pytest.approx(loss.exp().item(), rel=1e-4)


def test_attention_error_is_zero_for_a_full_cache_and_grows_as_the_budget_shrinks(loaded):
    ids = torch.randint(3, 400, (2, 80), generator=torch.Generator().manual_seed(0))
    errors = []
    for share in (1.0, 0.5, 0.1):
        cache = PiKVCache.from_recipe(loaded.model.config, {"policy": "streaming-llm", "budget": share})
        probe = AttentionError(cache, loaded.model.config)
        with torch.no_grad():
            loaded.model(ids[:, :60], past_key_values=cache)
            for token in ids[:, 60:].unbind(1):
                loaded.model(token[:, None], past_key_values=cache)
        errors.append(probe.value)
    assert errors[0] == 0 and errors[0] < errors[1] < errors[2] < 2


def test_sentences_with_numbers_for_a_model_without_the_task(tmp_path):
    """Any tokenizer is served: here one of bytes, whose words have many lengths."""

    class Bytes:
        bos_token_id, unk_token_id = 2, None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [2] * add_special_tokens + list(text.encode())}

    stream = np.random.default_rng(0).integers(97, 122, 5000)
    loaded = LoadedModel(None, Bytes(), "owner/name")
    prompts = recall_prompts(loaded, stream, 40, 900, seed=0)
    joined = prompts.joined(5)
    assert (joined[:, 0] == 2).all()
    assert joined.shape == (5, 900)
    for context, questions, answers in zip(prompts.context, prompts.questions, prompts.answers):
        text = bytes(context.tolist())
        for question, answer in zip(questions, answers):
            assert text.count(bytes([*question.tolist(), *answer.tolist()]) + b".") == 1
    with pytest.raises(PiKVError, match="no room"):
        recall_prompts(loaded, stream, 40, 300, seed=0)


def test_windows_are_spread_and_long_enough():
    stream = np.arange(1000)

    class NoOpening:
        bos_token_id = None

        def __call__(self, text):
            return {"input_ids": []}

    loaded = LoadedModel(None, NoOpening(), "owner/name")
    windows = text_windows(loaded, stream, "numbers", 4, 100, seed=0).ids
    assert windows.shape == (4, 100) and (windows.diff(dim=1) == 1).all()
    assert windows[-1, -1] == 999
    with pytest.raises(PiKVError, match="window takes 2000"):
        text_windows(loaded, stream, "numbers", 4, 2000, seed=0)


def test_the_users_text_is_read_whole_and_refused_where_the_model_cannot(tmp_path, loaded):
    file = tmp_path / "words.txt"
    file.write_text("f1 f2 k3 v4 " * 50)
    stream, source = read_text(loaded, [str(file)], None, 0, Reporter())
    assert len(stream) == 201 and source == str(file)
    file.write_text("of all these words it knows not one")
    with pytest.raises(PiKVError, match="does not know"):
        read_text(loaded, [str(file)], None, 0, Reporter())
    assert read_text(loaded, [], None, 0, Reporter()) is None


def test_methods_expand_to_rows():
    rows = expand(["h2o", "int8", "h2o+int8", "full"], [0.5, 64], Component("uniform"))
    found = [(row.cache.policy.name, row.cache.codec.name, row.cache.budget) for row in rows]
    assert found == [
        ("full", "none", 1.0),
        ("h2o", "none", 0.5),
        ("h2o", "none", 64),
        ("full", "int8", 1.0),
        ("h2o", "int8", 0.5),
        ("h2o", "int8", 64),
    ]
    for bad in ("h3o", "h2o+quest", "int8+int8+h2o", ""):
        with pytest.raises(UsageError):
            expand([bad], [0.5], Component("uniform"))


def test_frontier_keeps_what_nothing_betters():
    points = [(3, 5.0), (1, 1.0), (2, 3.5), (2, 4.0), (2.5, 3.0), (4, 5.0)]
    assert frontier(points, lambda new, old: new > old) == [1, 3, 0]


def test_the_job_writes_rows_and_picture(model_folder, tmp_path):
    recipe = CompressRecipe(
        model=str(model_folder.parent),
        methods=["h2o", "h2o+int8", "quest"],
        budgets=[0.25],
        context_tokens=128,
        num_queries=32,
        out=str(tmp_path / "out"),
    )
    result = compress.run(recipe, Run(recipe))
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert rows == result.results and len(rows) == 4
    assert [row["policy"] for row in rows] == ["full", "h2o", "h2o", "quest"]
    for row in rows:
        assert row["resident_bytes"] > 0 and row["full_bytes"] == rows[0]["full_bytes"]
        assert all(math.isfinite(row[name]) for name in ("perplexity", "recall", "attention_error", "ms_per_token"))
    assert rows[0]["attention_error"] == 0
    assert rows[2]["resident_bytes"] <= rows[1]["resident_bytes"] < 0.35 * rows[0]["full_bytes"]
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "result.json").read_text())["versions"]["torch"]
    assert list((tmp_path / "out" / "tb").iterdir())
