"""Tokenizers: lossless on any text, the same bytes every time, and loaded by transformers as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pikv_core.data import tokenizer

TEXT = 'def f(x):\n\t"""Größe  of 東京 🙂"""\r\n    return x ** 2   # <eos>?  '


def read_sources() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(Path(tokenizer.__file__).parent.glob("*.py"))]


@pytest.mark.parametrize("text", [TEXT, " ", "\n\n", "a b", "".join(map(chr, range(0x20, 0x250)))])
def test_bpe_is_lossless(text: str) -> None:
    trained = tokenizer.train_bpe(read_sources(), 600)
    tokenizer.add_words(trained, ["<note>", " heron", " amber"])
    for one in [text, *read_sources(), "x<note> heron amber" + text]:
        assert trained.decode(trained.encode(one).ids, skip_special_tokens=False) == one


def test_bpe_has_exactly_the_size_asked_and_the_same_bytes_twice() -> None:
    first, again = (tokenizer.train_bpe(read_sources(), 700) for _ in range(2))
    assert first.get_vocab_size() == 700
    assert first.to_str() == again.to_str()


def test_added_words_are_one_token_wherever_they_stand() -> None:
    trained = tokenizer.train_bpe(read_sources(), 600)
    tokenizer.add_words(trained, ["<note>", " heron"])
    assert [trained.token_to_id(word) for word in ("<note>", " heron")] == [600, 601]
    for text in ("a<note> heronb", "<note> heron", "\n<note> heron."):
        assert [token for token in trained.encode(text).ids if token >= 600] == [600, 601]


@pytest.mark.parametrize("model_type", [None, "llama", "mixtral", "qwen3_moe"])
def test_transformers_reads_the_folder(tmp_path: Path, model_type: str | None) -> None:
    from transformers import AutoConfig, AutoTokenizer

    if model_type is not None:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    words = tokenizer.build_word_level(["k1", "v1", "f1"])
    bpe = tokenizer.train_bpe(read_sources(), 500)
    tokenizer.add_words(bpe, ["<note>", " heron"])
    for ours, text in [(words, "f1 k1 v1 <eos> k1"), (bpe, f"{TEXT} <note> heron")]:
        tokenizer.save(ours, tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert len(theirs) == ours.get_vocab_size()
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text
        assert (theirs.pad_token, theirs.unk_token, theirs.eos_token) == ("<pad>", "<unk>", "<eos>")
        assert theirs.bos_token is None
