"""RULER through a cache: what is fed, what is written, how it is scored; against transformers' own generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from small_models import CONFIGS, use_stock_attention

from pikv_core.cache import PiKVCache
from pikv_core.data import stdlib_text, tokenizer
from pikv_core.data.ruler_tasks import DRAFTS
from pikv_core.errors import PiKVError
from pikv_core.evaluation import ruler
from pikv_core.evaluation.recall import half_interval
from pikv_core.evaluation.ruler import measure_ruler, ruler_samples, score

TASKS = list(DRAFTS)
CHAT = (
    "{{ bos_token }}{% for message in messages %}<user>{{ message.content }}</user>\n{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


@pytest.fixture(scope="module")
def english():
    return stdlib_text.read()[:1500]


@pytest.fixture(autouse=True)
def _short_text(english, monkeypatch):
    monkeypatch.setattr(stdlib_text, "read", lambda: english)


@pytest.fixture(scope="module")
def bpe(english):
    trained = tokenizer.train_bpe(english, 2000)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<eos>", unk_token="<unk>")


class Reader:
    """A model that knows the prompts by heart and writes `says(prompt)` after each, then its end."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=[2])

    def __init__(self, samples, vocab_size, says):
        self.says = {tuple(one.context + one.question): says(one) for one in samples.prompts}
        self.vocab_size = vocab_size
        self.num_fed: list[int] = []

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        past_key_values.fed = torch.cat([past_key_values.fed, input_ids], dim=1)
        self.num_fed.append(input_ids.shape[1])
        logits = torch.zeros(len(input_ids), 1, self.vocab_size)
        for row, ids in enumerate(past_key_values.fed.tolist()):
            for prompt, said in self.says.items():
                if tuple(ids[: len(prompt)]) == prompt:
                    logits[row, 0, dict(enumerate(said, start=len(prompt))).get(len(ids), 2)] = 1
        return SimpleNamespace(logits=logits)


def paper(num_rows):
    """Return a cache that only remembers what it was fed."""
    return lambda: SimpleNamespace(
        get_seq_length=lambda: 0, looks=None, fed=torch.empty(num_rows, 0, dtype=torch.int64)
    )


@pytest.mark.parametrize("question", ["after", "inside"])
def test_a_perfect_reader_scores_one_and_a_silent_one_nothing(bpe, question):
    samples = ruler_samples(bpe, TASKS, 2, 700, seed=0)
    for says, expected in [(lambda one: one.expected, 1.0), (lambda one: [], 0.0)]:
        model = Reader(samples, len(bpe), says)
        found = measure_ruler(model, bpe, paper(1), samples, batch_size=1, question=question)
        assert found.score == expected
        assert found.by_task == dict.fromkeys(TASKS, expected)
        assert found.num_samples == 14
        assert found.interval == half_interval(expected, 14) > 0
        assert found.interval_by_task == dict.fromkeys(TASKS, half_interval(expected, 2))
        widths = {700} if question == "inside" else {len(one.context) for one in samples.prompts}
        assert set(model.num_fed) - {1} == widths


def test_half_the_answers_are_half_the_score(bpe):
    samples = ruler_samples(bpe, ["niah-multivalue", "cwe"], 2, 700, seed=0)

    def half(one):
        return bpe(" and ".join(one.answers[: len(one.answers) // 2]).upper())["input_ids"]

    found = measure_ruler(Reader(samples, len(bpe), half), bpe, paper(1), samples, batch_size=1)
    assert found.by_task == {"niah-multivalue": 0.5, "cwe": 0.5}


def test_what_comes_after_the_end_or_the_limit_does_not_count(bpe):
    samples = ruler_samples(bpe, ["niah-single"], 1, 400, seed=0)
    (one,) = samples.prompts
    for said in ([2, *one.expected], [*[one.context[0]] * (one.answer_tokens - 1), *one.expected]):
        model = Reader(samples, len(bpe), lambda _, said=said: said)
        assert measure_ruler(model, bpe, paper(1), samples, batch_size=1).score == 0


def test_writing_stops_once_all_answers_are_there(bpe):
    samples = ruler_samples(bpe, ["niah-single"], 1, 400, seed=0)
    (one,) = samples.prompts
    model = Reader(samples, len(bpe), lambda one: [*one.expected, *[one.context[0]] * 100])
    assert measure_ruler(model, bpe, paper(1), samples, batch_size=1, question="inside").score == 1
    assert len(model.num_fed) == len(one.expected)


def test_every_prompt_has_the_same_length_and_the_tokens_of_its_text(bpe):
    samples = ruler_samples(bpe, TASKS, 3, 900, seed=1)
    assert samples == ruler_samples(bpe, TASKS, 3, 900, seed=1)
    assert samples != ruler_samples(bpe, TASKS, 3, 900, seed=2)
    assert [one.task for one in samples.prompts] == TASKS * 3
    for one in samples.prompts:
        assert len(one.context) + len(one.question) == 900
        context, question = bpe.decode(one.context), bpe.decode(one.question)
        for answer in one.answers:
            assert answer in context
            assert answer not in question
            assert answer in bpe.decode(one.expected)
    assert samples.num_tokens == 900 + max(one.answer_tokens for one in samples.prompts) == 1028
    batches = list(samples.batches(2))
    assert sorted(id(one) for batch in batches for one in batch) == sorted(map(id, samples.prompts))
    for batch in batches:
        assert len(batch) <= 2
        assert len({(one.task, len(one.context), len(one.question)) for one in batch}) == 1


def test_the_tokenizers_bos_opens_every_prompt(bpe):
    from tokenizers import processors

    opening = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, bos_token="<pad>")
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    for one in ruler_samples(opening, ["fwe"], 2, 600, seed=0).prompts:
        assert one.context[0] == 0
        assert 0 not in one.context[1:] + one.question
        assert len(one.context) + len(one.question) == 600


def test_a_chat_model_is_asked_in_its_own_turns(bpe, english):
    chat = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.train_bpe(english[:200], 600), eos_token="<eos>", bos_token="<pad>"
    )
    chat.chat_template = CHAT
    for one in ruler_samples(chat, ["niah-single", "vt"], 2, 1000, seed=0).prompts:
        text = chat.decode(one.context + one.question)
        assert text.startswith("<pad><user>")
        assert text.count("<user>") == text.count("</user>") == 1
        turn, answer = text.split("</user>\n<model>")
        assert turn.rstrip().endswith(("?", "above."))
        assert answer.startswith(("The special magic number", "Answer: According"))
        assert len(one.context) + len(one.question) == 1000


def test_answers_through_the_full_cache_are_transformers_own(bpe, monkeypatch):
    config = CONFIGS["llama"]()
    config.vocab_size = len(bpe)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    samples = ruler_samples(bpe, ["vt", "fwe"], 3, 420, seed=0)
    written = []

    def spy(*arguments):
        written.append(write(*arguments))
        return written[-1]

    write = ruler._write
    monkeypatch.setattr(ruler, "_write", spy)
    for question in ("after", "inside"):
        found = measure_ruler(model, bpe, lambda: PiKVCache(config), samples, 2, question)
        assert 0 <= found.score < 0.5
    use_stock_attention(model)
    for batch, after, inside in zip(samples.batches(2), written[: len(written) // 2], written[len(written) // 2 :]):
        ids = torch.tensor([one.context + one.question for one in batch])
        settings = {"max_new_tokens": batch[0].answer_tokens, "eos_token_id": 2, "pad_token_id": 2}
        with torch.no_grad():
            expected = model.generate(ids, do_sample=False, **settings)[:, ids.shape[1] :]
        assert after == inside == bpe.batch_decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("policy", ["h2o", "kvzip", "oracle"])
def test_a_budget_is_kept_while_the_answer_is_written(bpe, policy):
    config = CONFIGS["llama"]()
    config.vocab_size = len(bpe)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    caches = []

    def new_cache():
        caches.append(PiKVCache.from_recipe(config, {"policy": policy, "budget": 64}))
        return caches[-1]

    samples = ruler_samples(bpe, ["fwe"], 2, 400, seed=0)
    measure_ruler(model, bpe, new_cache, samples, 2, "after")
    assert caches
    for cache in caches:
        assert cache.get_seq_length() > 400
        assert max(cache.num_stored) <= 64


def test_a_tokenizer_of_other_words_is_refused():
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.build_word_level([f"w{i}" for i in range(200)]), unk_token="<unk>", eos_token="<eos>"
    )
    with pytest.raises(PiKVError, match="does not know the words of RULER's task 'niah-single'"):
        ruler_samples(words, TASKS, 2, 500, seed=0)


def test_too_short_a_length_is_refused(bpe):
    with pytest.raises(PiKVError, match="length 128 is too short for the task 'cwe'"):
        ruler_samples(bpe, ["cwe"], 2, 128, seed=0)


@pytest.mark.parametrize(
    ("text", "answers", "share"),
    [("it is 12 and ABC", ["12", "abc"], 1.0), ("12", ["12", "13", "14", "15"], 0.25), ("", ["x"], 0.0)],
)
def test_the_score_is_the_share_of_strings_held(text, answers, share):
    assert score(text, answers) == share
