"""Needles in a model's own tokens: whole, of the right length, and in text that nothing is scored on."""

import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pikv_core.data import corpus, tokenizer, tokens
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.errors import PiKVError
from pikv_core.model.loading import LoadedModel
from pikv_core.runs import Reporter
from pikv_core.training.needles import SentenceNeedles, open_needles

DOCUMENTS = [
    "".join(f"Sentence {n} of story {story} speaks of nothing but itself. " for n in range(60)) for story in range(40)
]


def fast(tokens, **marks):
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="<eos>", **marks)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(DOCUMENTS, 400)


@pytest.fixture
def stories(tmp_path):
    folder = tmp_path / "stories"
    folder.mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_text(document)
    return folder


def test_the_answers_are_the_numbers_of_the_asked_keys(bpe):
    words = fast(bpe)
    needles = SentenceNeedles.of(words, {"train": DOCUMENTS, "test": DOCUMENTS[:2]})
    batch = needles.batch(np.random.default_rng(0), 3, 900)
    assert batch.ids.shape == batch.answer_mask.shape == (3, 900)
    for ids, mask in zip(batch.ids, batch.answer_mask, strict=True):
        [places] = np.nonzero(mask)
        assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
        context = words.decode(ids[: places[0] + 1])
        hidden = dict(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", context))
        asked = re.findall(r"numbers for ([^?]+) mentioned in the provided text are$", context)[0]
        expected = [hidden[key] for key in re.split(r", and |, ", asked)]
        assert words.decode(ids[places + 1]) == " " + ", ".join(expected)
        assert len(expected) == 4
        assert 900 - places[-1] < 60, "no more filler than the answer might have taken"


def test_a_text_opens_as_the_tokenizer_opens_it(bpe):
    marked = fast(bpe, bos_token="<pad>")
    marked._tokenizer.post_processor = None
    needles = SentenceNeedles.of(marked, {"train": DOCUMENTS})
    unmarked = needles.batch(np.random.default_rng(1), 1, 700)
    assert unmarked.ids[0, 0] != marked.bos_token_id

    from tokenizers.processors import TemplateProcessing

    marked._tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    batch = needles.batch(np.random.default_rng(1), 1, 700)
    assert batch.ids[0, 0] == marked.bos_token_id
    assert (batch.ids == marked.bos_token_id).sum() == 1


def test_samples_depend_on_the_generator_alone(bpe):
    needles = SentenceNeedles.of(fast(bpe), {"train": DOCUMENTS})
    one, same, other = (needles.batch(np.random.default_rng(seed), 2, 700).ids for seed in (4, 4, 5))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_tokenizer_of_drawn_words_is_refused():
    words = fast(tokenizer.build_word_level([f"w{n}" for n in range(50)]))
    needles = SentenceNeedles.of(words, {"train": DOCUMENTS})
    with pytest.raises(PiKVError, match="knows no sentences or numbers"):
        needles.batch(np.random.default_rng(0), 1, 900)


def test_a_short_sample_is_refused(bpe):
    needles = SentenceNeedles.of(fast(bpe), {"train": DOCUMENTS})
    with pytest.raises(PiKVError, match="too short for the task 'niah-multiquery'"):
        needles.batch(np.random.default_rng(0), 1, 120)


def test_a_recall_model_gets_its_own_needles_in_text_that_it_does_not_hold_out(tmp_path, stories):
    task = Recall(filler="text", num_keys=16, num_values=8, vocab_size=400)
    source = task.open(None, 7, [str(stories)], None, Reporter())
    folder = tmp_path / "model"
    source.save(folder)
    loaded = LoadedModel(None, None, str(folder))
    needles, name = open_needles(loaded, [str(stories)], None, 0, Reporter())
    assert name == f"recall in {stories}"
    held_out = source.tokenizer.decode(corpus.held_out(folder).tolist())
    left = [document.strip("\n") for document in DOCUMENTS if document.strip("\n") not in held_out]
    trained_on = {bytes(tokens.encode(source.tokenizer, [document])) for document in left}
    stream = needles.streams["train"]
    ends = np.flatnonzero(stream == source.tokenizer.token_to_id("<eos>"))
    parts = {bytes(part) for part in np.split(stream, ends + 1) if len(part)}
    assert parts <= trained_on
    assert 0 < len(parts) < len(left) + 1
    assert np.array_equal(needles.streams["test"], corpus.held_out(folder))
    assert needles.batch(np.random.default_rng(0), 2, 128).answer_mask.any()


def test_a_model_whose_text_is_all_held_out_is_told(tmp_path, stories):
    task = Recall(filler="text", num_keys=16, num_values=8, vocab_size=400)
    source = task.open(None, 7, [str(stories)], None, Reporter())
    everything = {"test": tokens.encode(source.tokenizer, DOCUMENTS)}
    folder = tmp_path / "model"
    RecallSource(task, source.tokenizer, everything).save(folder)
    with pytest.raises(PiKVError, match="holds all of it out"):
        open_needles(LoadedModel(None, None, str(folder)), [str(stories)], None, 0, Reporter())


def test_any_other_model_gets_sentences(bpe, tmp_path, stories):
    needles, name = open_needles(LoadedModel(None, fast(bpe), str(tmp_path)), [str(stories)], None, 0, Reporter())
    assert name == f"sentences with numbers in {stories}"
    for split in ("train", "test"):
        assert needles.batch(np.random.default_rng(0), 1, 700, split).answer_mask.any()
    assert set(needles.material["train"].sentences).isdisjoint(needles.material["test"].sentences)
