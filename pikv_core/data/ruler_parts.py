"""What RULER's samples are made of: the text they lie in, a sample of open length, and its fitting to a length."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pikv_core.data.words import KEYS, VALUES
from pikv_core.errors import PiKVError

Count = Callable[[str], int]  # tokens of a text
Filler = Literal["text", "noise"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE_WORDS = (3, 40)  # of fewer words one is dropped, of more it is cut
SLACK = 0.01  # of the length, that a sample may fall short of it


@dataclass(frozen=True)
class Material:
    """Sentences to hide needles in and what joins them, needle keys of equally many tokens, and plain words."""

    sentences: Sequence[str]
    joint: str
    keys: Sequence[str]
    words: Sequence[str]

    @classmethod
    def of(cls, documents: Sequence[str], filler: Filler, count: Count) -> Material:
        """Cut documents into sentences and words; with filler "noise" only their words are used."""
        sentences, joint = ([NOISE], "\n") if filler == "noise" else (_sentences(documents), " ")
        if not sentences:
            raise PiKVError("the text has no sentence of 3 words or more", hint="give more text, or the filler 'noise'")
        pairs = [f"{colour}-{animal}" for colour in VALUES for animal in KEYS][::7]
        return cls(sentences, joint, _same_length(pairs, count), _words(documents))


@dataclass(frozen=True)
class Draft:
    """A sample of open length.

    body: its context with n units of filler (sentences, words). more: text that may follow that context and be cut
    anywhere, as much as 1 % of it. least: the fewest units. question: what is asked, opening: how the answer begins.
    answer_tokens: what RULER lets a model write.
    """

    body: Callable[[int], str]
    more: Callable[[int], str]
    least: int
    question: str
    opening: str
    answers: Sequence[str]
    answer_tokens: int


@dataclass(frozen=True)
class Sample:
    """A prompt, its context + question + opening, and the strings that the answer must hold.

    more: text that lengthens the context by 1 % or more, for contexts of an exact number of tokens.
    """

    task: str
    context: str
    more: str
    question: str
    opening: str
    answers: Sequence[str]
    answer_tokens: int

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.opening


def fit(draft: Draft, task: str, count: Count, length: int) -> Sample:
    """Return the sample with the most filler whose prompt has at most `length` tokens, at most 1 % less.

    Where one unit of filler is more than 1 %, it is the unit that is missing. Raises PiKVError where the task itself
    takes more tokens.
    """
    room = length - count(draft.question + draft.opening)
    n, tokens = draft.least, count(draft.body(draft.least))
    if tokens > room:
        raise PiKVError(
            f"length {length} is too short for the task '{task}': it takes {length - room + tokens} tokens",
            hint="raise the length, or leave the task out",
        )
    too_many: int | None = None
    probe = n + 16
    while room - tokens > SLACK * length:
        if too_many is not None:
            probe = min(probe, too_many - 1)
        if probe == n:
            break
        found = count(draft.body(probe))
        unit_tokens = max(1.0, (found - tokens) / (probe - n))
        if found <= room:
            n, tokens = probe, found
        else:
            too_many = probe
        probe = n + max(1, int((room - tokens) / unit_tokens))
    return Sample(
        task,
        draft.body(n),
        draft.more(n),
        draft.question,
        draft.opening,
        draft.answers,
        max(draft.answer_tokens, count(" " + ", ".join(draft.answers))),
    )


def _sentences(documents: Sequence[str]) -> list[str]:
    """Return sentences in order, without those of fewer words than three quarters: tables and code."""
    least, most = SENTENCE_WORDS
    sentences = []
    for document in documents:
        for sentence in re.split(r"(?<=[.!?])\s+", document):
            words = sentence.split()
            sentences += [" ".join(words[start : start + most]) for start in range(0, len(words), most)]
    return [sentence for sentence in sentences if _num_words(sentence) >= max(least, 0.75 * len(sentence.split()))]


def _num_words(sentence: str) -> int:
    return sum(word.strip(".,;:!?()'\"").isalpha() for word in sentence.split())


def _words(documents: Sequence[str]) -> list[str]:
    """Return the words of 4 to 12 small letters that stand twice or more in the documents, sorted."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(re.findall(r"(?<![\w.])[a-z]{4,12}(?![\w(])", document))
    return sorted(word for word, number in counts.items() if number >= 2)


def _same_length(texts: Sequence[str], count: Count) -> list[str]:
    """Return the texts of the most frequent number of tokens: their questions can be asked in one batch."""
    sizes = {text: count(f" {text}") for text in texts}
    usual = Counter(sizes.values()).most_common(1)[0][0]
    return [text for text, size in sizes.items() if size == usual]
