"""What a cache is asked: prompts of the task or of sentences with numbers, and windows of real text."""

import numpy as np
import pytest
import torch

from pikv_core.data.recall import Recall, RecallSource
from pikv_core.errors import PiKVError
from pikv_core.evaluation.prompts import read_text, recall_prompts, text_windows
from pikv_core.model.loading import LoadedModel
from pikv_core.runs import Reporter


def test_prompts_ask_what_the_task_asks(loaded, recall_model_folder):
    (prompts,) = recall_prompts(loaded, None, 100, 128, seed=0)
    assert prompts.depth.numel() >= 100
    tokenizer = RecallSource.load(recall_model_folder).tokenizer
    for context, questions, answers in zip(prompts.context, prompts.questions, prompts.answers):
        words = [tokenizer.id_to_token(int(token)) for token in context]
        assert sum(word.startswith("k") for word in words) == prompts.num_needles
        for question, answer in zip(questions, answers):
            (at,) = torch.where(context == question[-1])[0].tolist()
            assert context[at + 1] == answer[0]
            assert tokenizer.id_to_token(int(question[-1])).startswith("k")


def test_prompts_in_text_vary_the_number_of_needles(tmp_path):
    words = np.random.default_rng(0).choice([f"{a}{b}" for a in "bcdfgh" for b in "aeiou"], size=(60, 120))
    for number, row in enumerate(words):
        (tmp_path / f"{number}.txt").write_text(" ".join(row))
    source = Recall(filler="text", vocab_size=700).open(None, 3, [str(tmp_path)], None, Reporter())
    source.save(tmp_path / "model")
    loaded = LoadedModel(None, None, str(tmp_path / "model"))
    groups = recall_prompts(loaded, None, 400, 300, seed=0)
    assert len(groups) > 3
    assert sum(group.depth.numel() for group in groups) >= 400
    marker = source.tokenizer.token_to_id("<note>")
    for group in groups:
        assert group.joined(1000).shape == (len(group.context), 300)
        assert ((group.context == marker).sum(1) == group.num_needles).all()
        for context, questions, answers in zip(group.context, group.questions, group.answers):
            for question, answer in zip(questions, answers):
                (at,) = torch.where(context == question[-1])[0].tolist()
                assert context[at + 1] == answer[0]


def test_sentences_with_numbers_for_a_model_without_the_task():
    """Any tokenizer is served: here one of bytes, whose words have many lengths."""

    class Bytes:
        bos_token_id, unk_token_id = 2, None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [2] * add_special_tokens + list(text.encode())}

    stream = np.random.default_rng(0).integers(97, 122, 5000)
    loaded = LoadedModel(None, Bytes(), "owner/name")
    (prompts,) = recall_prompts(loaded, stream, 40, 900, seed=0)
    joined = prompts.joined(5)
    assert (joined[:, 0] == 2).all()
    assert joined.shape == (5, 900)
    for context, questions, answers in zip(prompts.context, prompts.questions, prompts.answers):
        text = bytes(context.tolist())
        assert text.count(b" The number of") == prompts.num_needles
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
