"""The recall task: what a sample must hold, found again by a plain reading of its words."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from pikv_core.data import corpus
from pikv_core.data.recall import Recall, RecallBatch, RecallSource, has_recall
from pikv_core.data.words import KEYS, VALUES
from pikv_core.errors import PiKVError
from pikv_core.runs import Reporter


@pytest.fixture(params=["synthetic", "text"])
def source(request: pytest.FixtureRequest, text_folder: Path) -> RecallSource:
    text = [str(text_folder)] if request.param == "text" else []
    return Recall(filler=request.param, vocab_size=700).open(None, 3, text, None, Reporter())


def pieces(source: RecallSource, batch: RecallBatch, row: int) -> list[str]:
    return [source.tokenizer.decode([token], skip_special_tokens=False) for token in batch.ids[row].tolist()]


@pytest.mark.parametrize("length", [16, 17, 31, 64, 65, 100, 255, 256, 333, 512])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_has_exactly_one_needle(source: RecallSource, length: int, split: str) -> None:
    batch = source.batch(np.random.default_rng(length), 7, length, split)
    assert batch.ids.shape == batch.answer_mask.shape == batch.text_mask.shape == (7, length)
    assert batch.ids.min() >= 0
    assert batch.ids.max() < source.vocab_size
    stride, marked = batch.question_tokens + 1, batch.question_tokens == 2
    starts = range(batch.context_length, length, stride)
    assert (length - batch.context_length) % stride == 0
    for row in range(7):
        words = pieces(source, batch, row)
        context = words[: batch.context_length]
        asked = [words[start + stride - 2] for start in starts]
        assert len(set(asked)) == len(asked) == batch.depth.shape[1]
        for question, (start, key) in enumerate(zip(starts, asked, strict=True)):
            assert context.count(key) == 1
            at = context.index(key)
            assert context[at + 1] == words[start + stride - 1]
            if marked:
                assert context[at - 1] == "<note>"
                assert words[start] == "<ask>"
            needle_start, last_start = at - marked, batch.context_length - stride
            assert batch.depth[row, question] == pytest.approx(needle_start / max(1, last_start))
        answered = [start + stride - 2 for start in starts]
        assert np.flatnonzero(batch.answer_mask[row]).tolist() == answered


def test_depth_covers_the_whole_context(source: RecallSource) -> None:
    depth = source.batch(np.random.default_rng(0), 200, 256).depth
    assert depth.min() < 0.02
    assert depth.max() > 0.98
    assert depth.mean() == pytest.approx(0.5, abs=0.03)


def test_the_same_generator_gives_the_same_batch(source: RecallSource) -> None:
    first, again, other = (source.batch(np.random.default_rng(seed), 4, 128) for seed in (1, 1, 2))
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.depth, again.depth)
    assert not np.array_equal(first.ids, other.ids)


def test_a_sample_reads_back_from_its_text(source: RecallSource) -> None:
    for row in source.batch(np.random.default_rng(9), 20, 200).ids.tolist():
        text = source.tokenizer.decode(row, skip_special_tokens=False)
        again = source.tokenizer.encode(text).ids
        assert source.tokenizer.decode(again, skip_special_tokens=False) == text
        ours = {source.tokenizer.token_to_id(word) for word in source.task.words()}
        assert [token for token in again if token in ours] == [token for token in row if token in ours]


def test_synthetic_text_is_read_word_by_word() -> None:
    source = Recall().open(None, 0, [], None, Reporter())
    encoding = source.tokenizer.encode("f1 k3 v7 f9 k3")
    assert encoding.tokens == ["f1", "k3", "v7", "f9", "k3"]
    assert source.vocab_size == 3 + 128 + 64 + 256
    assert not source.batch(np.random.default_rng(0), 2, 64).text_mask.any()


def real_text(text_folder: Path) -> RecallSource:
    return Recall(filler="text", vocab_size=700).open(None, 3, [str(text_folder)], None, Reporter())


def contains(stream: np.ndarray, part: np.ndarray) -> bool:
    places = np.flatnonzero(stream[: len(stream) - len(part) + 1] == part[0])
    return any(np.array_equal(stream[place : place + len(part)], part) for place in places)


@pytest.mark.parametrize("split", ["train", "test"])
def test_filler_is_a_slice_of_its_own_split(text_folder: Path, split: str) -> None:
    source = real_text(text_folder)
    batch = source.batch(np.random.default_rng(4), 10, 300, split)
    marker = source.tokenizer.token_to_id("<note>")
    other = "test" if split == "train" else "train"
    for ids, text_mask in zip(batch.ids[:, : batch.context_length], batch.text_mask, strict=True):
        filler = np.ones(len(ids), bool)
        for start in np.flatnonzero(ids == marker):
            filler[start : start + 3] = False
        assert contains(source.streams[split], ids[filler])
        assert not contains(source.streams[other], ids[filler])
        expected = [bool(filler[at] and filler[at + 1]) for at in range(len(ids) - 1)]
        assert text_mask[: len(ids) - 1].tolist() == expected
        assert not text_mask[len(ids) - 1 :].any()


def test_no_filler_token_is_a_needle_word(tmp_path: Path) -> None:
    for number in range(20):
        text = f"{number}: the heron and the badger saw copper <note> amber; one <ask>s a zebra " * 9
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    source = Recall(filler="text", vocab_size=500).open(None, 0, [str(tmp_path)], None, Reporter())
    ours = [source.tokenizer.token_to_id(word) for word in source.task.words()]
    assert ours == list(range(source.vocab_size - len(ours), source.vocab_size))
    for stream in source.streams.values():
        assert not np.isin(stream, ours).any()


def test_needle_words_are_distinct_and_none_begins_another() -> None:
    words = sorted([*KEYS, *VALUES])
    assert all(not later.startswith(word) for word, later in pairwise(words))


def test_a_model_folder_gives_the_held_out_samples_again(source: RecallSource, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert not has_recall(folder)
    source.save(folder)
    assert has_recall(folder)
    again = RecallSource.load(folder)
    first, second = (one.batch(np.random.default_rng(6), 5, 200, "test") for one in (source, again))
    assert np.array_equal(first.ids, second.ids)
    assert again.vocab_size == source.vocab_size
    held_out = corpus.held_out(folder)
    assert (held_out is None) == (source.task.filler == "synthetic")
    if held_out is not None:
        assert np.array_equal(held_out, source.streams["test"])
        with pytest.raises(PiKVError, match="split 'train' is at hand; there is: test"):
            again.batch(np.random.default_rng(6), 5, 200, "train")


def test_a_folder_without_recall_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match="not trained on recall"):
        RecallSource.load(tmp_path)


def test_limits_hold() -> None:
    source = Recall(max_pairs=6, max_questions=2).open(None, 0, [], None, Reporter())
    batch = source.batch(np.random.default_rng(0), 3, 400)
    words = source.tokenizer.decode(batch.ids[0].tolist()).split()
    assert sum(word.startswith("k") for word in words[: batch.context_length]) == 6
    assert batch.depth.shape == (3, 2)


def test_too_short_a_length_is_refused(source: RecallSource) -> None:
    with pytest.raises(PiKVError, match="length 5 is too short"):
        source.batch(np.random.default_rng(0), 1, 5)


def test_too_short_a_text_is_refused(text_folder: Path) -> None:
    with pytest.raises(PiKVError, match="too few for a slice of"):
        real_text(text_folder).batch(np.random.default_rng(0), 1, 60_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 129}, "num_keys is at most 128 with filler 'text'"),
        ({"num_values": 65}, "num_values is at most 64 with filler 'text'"),
        ({"vocab_size": 452}, "vocab_size is at least 453"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Recall).validate_python({"filler": "text", **options})


def test_text_for_a_synthetic_filler_is_refused(text_folder: Path) -> None:
    with pytest.raises(PiKVError, match="synthetic filler uses no text"):
        Recall().open(None, 0, [str(text_folder)], None, Reporter())
