"""RULER's synthetic tasks (arXiv 2404.06654), in its words and with its numbers, at any length.

Needles in a haystack, variable tracking, common words and frequent words. As in RULER, tracking and common words
open with a solved example, here from WITH_EXAMPLE tokens up; shorter prompts have no room for it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pikv_core.data.ruler_parts import NOISE, Count, Draft, Material, Sample, fit
from pikv_core.errors import PiKVError

WITH_EXAMPLE = 1024
LONG_LIST = 4096  # length from which words of a list are repeated 30 and 3 times, not 6 and 1
NUM_COMMON = 10
NUM_HOPS = 4
LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
LIST_OPENING = " Answer: The top 10 words that appear most often in the list are:"
ZIPF = 2.0  # exponent of the coded words' frequencies


def samples(
    tasks: Sequence[str], material: Material, count: Count, num_samples: int, length: int, seed: int
) -> Iterator[Sample]:
    """Yield samples whose prompts have `length` tokens, at most 1 % or one sentence less, the tasks taking turns.

    A sample depends on its task, number and seed alone. Raises PiKVError where a task does not fit the length.
    """
    for number in range(num_samples):
        task = tasks[number % len(tasks)]
        rng = np.random.default_rng([seed, list(DRAFTS).index(task), number // len(tasks)])
        yield fit(DRAFTS[task](rng, material, length), task, count, length)


def _needles(
    rng: np.random.Generator, material: Material, length: int, num_keys: int, num_values: int, num_asked: int
) -> Draft:
    """Hide a sentence for each of `num_keys` x `num_values` needles, and ask for the values of `num_asked` keys."""
    keys = [material.keys[i] for i in rng.choice(len(material.keys), num_keys, replace=False)]
    numbers = [str(10**6 + i) for i in rng.choice(9 * 10**6, num_keys * num_values, replace=False)]
    needles = [
        f"One of the special magic numbers for {keys[i % num_keys]} is: {number}." for i, number in enumerate(numbers)
    ]
    order = rng.permutation(len(needles))
    asked = keys[:num_asked]
    query = asked[0] if num_asked == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    answers = [number for i, number in enumerate(numbers) if i % num_keys < num_asked]
    if len(answers) == 1:
        head, what, are = "A special magic number is", "is the special magic number", "is"
    else:
        head, what, are = "Some special magic numbers are", "are all the special magic numbers", "are"
    noun = what.split()[-1]
    intro = (
        f"{head} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {noun} afterwards.\n"
    )
    haystack = _Haystack(material.sentences, material.joint, int(rng.integers(len(material.sentences))))
    depths = np.sort(rng.random(len(needles)))
    return Draft(
        body=lambda n: intro + haystack.with_needles(n, [needles[i] for i in order], depths),
        more=haystack.more,
        least=0,
        question=f"\nWhat {what} for {query} mentioned in the provided text?",
        opening=f" The special magic {noun} for {query} mentioned in the provided text {are}",
        answers=answers,
        answer_tokens=128,
    )


def _tracking(rng: np.random.Generator, material: Material, length: int) -> Draft:
    """Hide a chain of assignments among noise, and ask for every variable that has the first one's value."""
    draft = _chain(rng, num_letters=5)
    if length < WITH_EXAMPLE:
        return draft
    return _after_example(_chain(rng, num_letters=3), 5, " ".join, draft)


def _chain(rng: np.random.Generator, num_letters: int) -> Draft:
    names = _codes(rng, string.ascii_uppercase, num_letters, NUM_HOPS + 1)
    value = int(rng.integers(10**4, 10**5))
    lines = [f"VAR {name} = {of}" for name, of in zip(names, [value, *(f"VAR {name}" for name in names)])]
    depths = np.sort(rng.random(len(lines)))
    haystack = _Haystack([NOISE], "\n", 0)
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return Draft(
        body=lambda n: intro + haystack.with_needles(n, lines, depths),
        more=haystack.more,
        least=0,
        question=f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        opening=(
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:"
        ),
        answers=names,
        answer_tokens=30,
    )


def _common_words(rng: np.random.Generator, material: Material, length: int) -> Draft:
    """List words of which ten are repeated more often than the others, and ask for the ten."""
    long = length >= LONG_LIST
    repeats, example_repeats, num_others = ((30, 3), (10, 3), 30) if long else ((6, 1), (3, 1), 10)
    words = [material.words[i] for i in rng.permutation(len(material.words))]
    words = [word for word in words if word not in LIST_QUESTION + LIST_OPENING]
    num_example = 2 * (NUM_COMMON + num_others)
    if len(words) < 2 * num_example:
        raise PiKVError(
            f"the text has {len(words)} different words, the task 'cwe' needs {2 * num_example}",
            hint="give more text, or leave the task out",
        )
    draft = _word_list(rng, words[num_example:], repeats)
    if length < WITH_EXAMPLE:
        return draft
    return _after_example(_word_list(rng, words[:num_example], example_repeats), num_others, _numbered, draft)


def _word_list(rng: np.random.Generator, words: Sequence[str], repeats: tuple[int, int]) -> Draft:
    """Draft a list; where it outgrows the words, all of them are repeated more often, in proportion."""
    common: list[str] = []
    for word in words:
        if len(common) < NUM_COMMON and not any(word in other or other in word for other in common):
            common.append(word)
    others = [word for word in words if not any(one in word for one in common)]
    order = int(rng.integers(2**32))

    def listed(n: int) -> list[str]:
        times = max(1, -(-n // len(others)))
        words = [*common * repeats[0], *others[: n // times] * repeats[1]] * times
        return [words[i] for i in np.random.default_rng(order).permutation(len(words))]

    return Draft(
        body=lambda n: (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{_numbered(listed(n))}"
        ),
        more=lambda n: " " + _numbered(others[: 8 + n // 25], len(listed(n))),
        least=min(NUM_COMMON, len(others)),
        question=LIST_QUESTION,
        opening=LIST_OPENING,
        answers=common,
        answer_tokens=120,
    )


def _frequent_words(rng: np.random.Generator, material: Material, length: int) -> Draft:
    """Shuffle coded words of Zipf's frequencies, dots the most frequent, and ask for the next three."""
    codes = _codes(rng, string.ascii_lowercase, 6, max(16, length // 50))
    shares = np.arange(1, len(codes) + 2) ** -ZIPF / (math.pi**2 / 6)
    order = int(rng.integers(2**32))

    def text(n: int) -> str:
        words = np.repeat(["...", *codes], (n * shares).astype(int))
        return " ".join(np.random.default_rng(order).permutation(words))

    return Draft(
        body=lambda n: (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {text(n)}"
        ),
        more=lambda n: " ..." * (40 + n // 20),
        least=math.ceil(1 / (shares[3] - shares[4])),  # the third and the fourth word differ from here on
        question=(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
        ),
        opening=" Answer: According to the coded text above, the three most frequently appeared words are:",
        answers=codes[:3],
        answer_tokens=50,
    )


class _Haystack:
    """Sentences in their order from `start` on, round and round."""

    def __init__(self, sentences: Sequence[str], joint: str, start: int):
        self.sentences, self.joint, self.start = sentences, joint, start

    def with_needles(self, n: int, needles: Sequence[str], depths: np.ndarray) -> str:
        """Return n sentences with the needles put between them at ascending depths in [0, 1]."""
        hay = self._slice(0, n)
        for needle, depth in zip(reversed(needles), reversed(depths)):
            hay.insert(round(depth * n), needle)
        return self.joint.join(hay)

    def more(self, n: int) -> str:
        return self.joint + self.joint.join(self._slice(n, n + 8 + n // 50))

    def _slice(self, start: int, end: int) -> list[str]:
        return [self.sentences[(self.start + i) % len(self.sentences)] for i in range(start, end)]


def _after_example(example: Draft, units: int, write: Callable[[Sequence[str]], str], draft: Draft) -> Draft:
    """Put a solved example before the context."""
    solved = f"{example.body(units)}{example.question}{example.opening} {write(example.answers)}\n\n"
    return replace(draft, body=lambda n: solved + draft.body(n))


def _numbered(words: Sequence[str], before: int = 0) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=before + 1))


def _codes(rng: np.random.Generator, alphabet: str, num_letters: int, num_codes: int) -> list[str]:
    """Return different words of random letters."""
    codes: dict[str, None] = {}
    while len(codes) < num_codes:
        codes["".join(alphabet[i] for i in rng.integers(len(alphabet), size=num_letters))] = None
    return list(codes)


DRAFTS: dict[str, Callable[[np.random.Generator, Material, int], Draft]] = {
    "niah-single": partial(_needles, num_keys=1, num_values=1, num_asked=1),
    "niah-multikey": partial(_needles, num_keys=4, num_values=1, num_asked=1),
    "niah-multivalue": partial(_needles, num_keys=1, num_values=4, num_asked=1),
    "niah-multiquery": partial(_needles, num_keys=4, num_values=1, num_asked=4),
    "vt": _tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
