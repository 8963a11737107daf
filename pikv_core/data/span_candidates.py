"""Spans that may answer a question, with sparse features of each: what a linear model chooses among.

What a question asks about are those of its words that few questions have; the others are its pattern. A feature is a
text that a candidate has or has not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

COMMON_SHARE = 0.08  # a word that more of the questions have is of their pattern
MOST = 4  # from where ranks and numbers are told no further
WORD = re.compile(r"\w+")
SEPARATOR = re.compile(r"(?: *:| +--?) +(?=\S)")  # between what is described and its description
SENTENCE_END = re.compile(r"[.;](?=\s|$)")


@dataclass(frozen=True)
class Candidate:
    """A span of the context: characters `start` to `end`."""

    start: int
    end: int
    features: list[str]


Extract = Callable[[str, str], list[Candidate]]  # of a context and a question


def common_words(questions: Iterable[str]) -> set[str]:
    """Return the words of the questions' patterns."""
    every = [set(WORD.findall(question)) for question in questions]
    counts = Counter(word for some in every for word in some)
    return {word for word, number in counts.items() if number > COMMON_SHARE * len(every)}


def words(answers: set[str], common: set[str]) -> Extract:
    """Return what finds every word that is among `answers`, told by its neighbours and what is asked near it."""

    def extract(context: str, question: str) -> list[Candidate]:
        pattern, asked = _part(question, common)
        found: list[Candidate] = []
        num_asked = num_sentences = 0
        later: set[str] = set()
        for sentence in reversed(list(re.finditer(r"[^.]+", context))):
            inside = list(WORD.finditer(sentence[0]))
            texts = [word[0] for word in inside]
            places = [place for place, word in enumerate(texts) if word in asked]
            num_asked, num_sentences = num_asked + bool(places), num_sentences + 1
            for place, word in enumerate(inside):
                if word[0] in answers:
                    start = sentence.start() + word.start()
                    told = [
                        *_of_word(texts, place, places, num_asked),
                        f"word {word[0]}",
                        f"asked itself {word[0] in asked}",
                        f"from the end {min(num_sentences, 2 * MOST)}",
                        f"told later {word[0] in later}",
                    ]
                    found.append(Candidate(start, start + len(word[0]), [f"{pattern}: {one}" for one in told]))
            later.update(texts)
        return found

    return extract


def phrases(common: set[str]) -> Extract:
    """Return what finds lines, or what follows a separator in them, up to a sentence's, a line's or a block's end."""

    def extract(context: str, question: str) -> list[Candidate]:
        pattern, asked = _part(question, common)
        lines = list(re.finditer(r"[^\n]*\S[^\n]*", context))
        return [
            Candidate(start, end, [f"{pattern}: {one}" for one in _of_phrase(context, line, start, end, kinds, asked)])
            for number, line in enumerate(lines)
            for start, begun in _starts(line)
            for end, ended in _ends(context, lines, number, start)
            for kinds in [f"{begun}, {ended}"]
        ]

    return extract


def _part(question: str, common: set[str]) -> tuple[str, list[str]]:
    """Return a question's pattern, and the words that it asks about."""
    every = WORD.findall(question)
    return " ".join(word for word in every if word in common), [word for word in every if word not in common]


def _of_word(texts: list[str], place: int, asked_places: list[int], rank: int) -> Iterator[str]:
    """Yield what is told of a word by the others of its sentence, the `rank`-th from the end that has what is asked."""
    padded = ["", "", *texts, ""]
    before = f"{padded[place]} {padded[place + 1]}"
    yield f"after {before}"
    yield f"before {padded[place + 3]}"
    yield f"asked here {bool(asked_places)}"
    if asked_places:
        nearest = min((place - one for one in asked_places), key=abs)
        yield f"asked at {nearest}"
        yield f"asked at {nearest}, after {before}"
        yield f"asked rank {min(rank, MOST)}"
        yield f"asked rank {min(rank, MOST)}, after {padded[place + 1]}"


def _starts(line: re.Match[str]) -> Iterator[tuple[int, str]]:
    """Yield where a phrase may begin in a line, and after what."""
    yield line.end() - len(line[0].lstrip()), "line"
    separator = SEPARATOR.search(line[0])
    if separator is not None:
        yield line.start() + separator.end(), separator[0].strip()


def _ends(context: str, lines: list[re.Match[str]], number: int, start: int) -> Iterator[tuple[int, str]]:
    """Yield where a phrase may end that begins in a line, and at what."""
    line = lines[number]
    indent = len(line[0]) - len(line[0].lstrip())
    last = line
    for other in lines[number + 1 :]:
        adjacent = context[last.end() : other.start()].count("\n") == 1
        if not adjacent or len(other[0]) - len(other[0].lstrip()) <= indent:
            break
        last = other
    yield line.start() + len(line[0].rstrip()), "line" if last is line else "line of more"
    if last is not line:
        yield last.start() + len(last[0].rstrip()), "block"
    stop = SENTENCE_END.search(context, start, last.end())
    if stop is not None:
        yield stop.end(), "sentence"


def _of_phrase(context: str, line: re.Match[str], start: int, end: int, kinds: str, asked: list[str]) -> Iterator[str]:
    """Yield what is told of a phrase; kinds: where it begins and ends."""
    before, phrase = WORD.findall(context[line.start() : start]), WORD.findall(context[start:end])
    first = WORD.search(line[0])
    yield kinds
    yield f"words {min(len(phrase), 2 * MOST)}"
    yield f"first {phrase[0].lower() if phrase else ''}"
    yield f"last {context[end - 1 : end]}"
    yield f"words before {min(len(before), MOST)}"
    for number, word in enumerate(asked[:2]):
        opens = first is not None and first[0] == word
        yield f"asked {number} opens {opens}, {kinds}"
        yield f"asked {number} before {before[-1:] == [word]}"
        yield f"asked {number} before anywhere {word in before}, {min(len(before), MOST)}"
        yield f"asked {number} inside {word in phrase}"
