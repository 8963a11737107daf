"""Tokenizers of our own: byte-level BPE trained on a corpus, or one word a token; none adds a BOS.

Their folders load by `transformers.AutoTokenizer.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pikv_core.errors import PiKVError
from pikv_core.files import make_folder, write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
SPECIAL = (PAD, UNK, EOS)
MIN_BPE_TOKENS = len(SPECIAL) + 256


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE, lossless for every text; a small corpus gives fewer tokens than asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    assert vocab_size >= MIN_BPE_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def build_word_level(words: Sequence[str]) -> Tokenizer:
    """Make one token of each word, after the special ones; words stand apart by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    assert len(vocabulary) == len(SPECIAL) + len(words)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def add_words(tokenizer: Tokenizer, words: Sequence[str]) -> None:
    """Append words as whole tokens, ids in order; a word takes its leading space with it."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    make_folder(folder)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "unk_token": UNK,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def load(folder: Path) -> Tokenizer:
    """Read a folder that `save` wrote."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise PiKVError(f"{file}: no such tokenizer file")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise PiKVError(f"{file}: not a readable tokenizer file: {error}") from error
