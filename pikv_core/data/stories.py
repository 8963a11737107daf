"""Stories of people who move, take, drop and give, each with a question whose answer is a span, after bAbI.

The tasks with one to three supporting facts of bAbI (arXiv 1502.05698), with sentences among the facts that mention
the same people, places and things and change nothing. An answer's span is where the fact that holds is told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

PEOPLE = ["Mary", "John", "Sandra", "Daniel", "Julie", "Fred", "Emma", "Oliver", "Nora", "Hugo", "Clara", "Victor"]
PLACES = [
    "kitchen",
    "garden",
    "hallway",
    "bathroom",
    "bedroom",
    "office",
    "cellar",
    "attic",
    "library",
    "garage",
    "balcony",
    "stable",
]
THINGS = [
    "football",
    "apple",
    "milk",
    "lantern",
    "hammer",
    "blanket",
    "violin",
    "compass",
    "kettle",
    "umbrella",
    "notebook",
    "basket",
]
LEAST = 2
MOST = len(PEOPLE)
assert len(PLACES) == len(THINGS) == MOST

EVENTS = {"move": 5, "take": 3, "drop": 1, "give": 2}  # weights among those that can happen
MOVES = ["{} went to the {}.", "{} moved to the {}.", "{} walked to the {}.", "{} ran to the {}."]
TAKES = ["{} took the {}.", "{} picked up the {}.", "{} grabbed the {}."]
DROPS = ["{} dropped the {}.", "{} put down the {}.", "{} left the {} there."]
GIVES = ["{} gave the {} to {}.", "{} handed the {} to {}.", "{} passed the {} to {}."]
ASIDES = [  # a place, a person, a thing
    ("The {} is quiet today.", "l"),
    ("The {} is next to the {}.", "ll"),
    ("{} likes the {}.", "pl"),
    ("{} dreams of the {}.", "pt"),
    ("Nobody ever cleans the {}.", "l"),
    ("{} is a friend of {}.", "pp"),
]


@dataclass(frozen=True)
class Mention:
    """A word, and the character of the story at which it stands."""

    word: str
    start: int


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: Mention


@dataclass
class Story:
    """A world as told so far."""

    rng: np.random.Generator
    people: list[str]
    places: list[str]
    things: list[str]
    sentences: list[str] = field(default_factory=list)
    length: int = 0  # characters, with the space before the next sentence
    trail: dict[str, list[Mention]] = field(default_factory=dict)  # the places of each person, in order
    held: dict[str, tuple[Mention, Mention]] = field(default_factory=dict)  # of each thing: its holder, and itself
    lies: dict[str, Mention] = field(default_factory=dict)  # the place of each thing that was dropped

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    def tell(self) -> None:
        """Let one thing happen; it is possible, and changes where something or someone is, or who has it."""
        events: dict[str, list[tuple[str, ...]]] = {
            "move": [(person,) for person in self.people],
            "take": [
                (person, thing)
                for person in self.trail
                for thing in self.things
                if thing not in self.held and (thing not in self.lies or self.lies[thing].word == self._place(person))
            ],
            "drop": [(holder.word, thing) for thing, (holder, _) in self.held.items()],
            "give": [
                (holder.word, thing, person)
                for thing, (holder, _) in self.held.items()
                for person in self.trail
                if person != holder.word and self._place(person) == self._place(holder.word)
            ],
        }
        weights = np.array([weight if events[name] else 0 for name, weight in EVENTS.items()], np.float64)
        name = list(EVENTS)[self.rng.choice(len(EVENTS), p=weights / weights.sum())]
        chosen = events[name][self.rng.integers(len(events[name]))]
        getattr(self, f"_{name}")(*chosen)

    def digress(self) -> None:
        """Say something that changes nothing."""
        pattern, kinds = ASIDES[self.rng.integers(len(ASIDES))]
        lists = {"l": self.places, "p": self.people, "t": self.things}
        words = [self.rng.permutation(lists[kind])[: kinds.count(kind)].tolist() for kind in sorted(set(kinds))]
        by_kind = dict(zip(sorted(set(kinds)), words, strict=True))
        self._say([pattern], *(by_kind[kind].pop() for kind in kinds))

    def questions(self) -> list[Question]:
        """Return all that can be asked; the answer of each stands in the story."""
        asked = []
        for person, trail in self.trail.items():
            asked.append(Question("person", f"Where is {person}?", trail[-1]))
            if len(trail) > 1:
                asked.append(Question("before", f"Where was {person} before {person}'s last move?", trail[-2]))
            carried = [thing for holder, thing in self.held.values() if holder.word == person]
            if len(carried) == 1:
                asked.append(Question("carrying", f"What is {person} carrying?", carried[0]))
        for thing, (holder, _) in self.held.items():
            asked.append(Question("holder", f"Who has the {thing}?", holder))
            asked.append(Question("thing", f"Where is the {thing}?", self.trail[holder.word][-1]))
        asked += [Question("thing", f"Where is the {thing}?", place) for thing, place in self.lies.items()]
        return asked

    def _place(self, person: str) -> str:
        return self.trail[person][-1].word

    def _move(self, person: str) -> None:
        here = self._place(person) if person in self.trail else None
        there = self.rng.choice([place for place in self.places if place != here])
        self.trail.setdefault(person, []).append(self._say(MOVES, person, str(there))[1])

    def _take(self, person: str, thing: str) -> None:
        holder, taken = self._say(TAKES, person, thing)
        self.held[thing] = (holder, taken)
        self.lies.pop(thing, None)

    def _drop(self, person: str, thing: str) -> None:
        self._say(DROPS, person, thing)
        self.lies[thing] = self.trail[person][-1]
        del self.held[thing]

    def _give(self, giver: str, thing: str, receiver: str) -> None:
        _, given, holder = self._say(GIVES, giver, thing, receiver)
        self.held[thing] = (holder, given)

    def _say(self, patterns: list[str], *words: str) -> list[Mention]:
        """Add a sentence; return where each of its words stands in the story."""
        parts = patterns[self.rng.integers(len(patterns))].split("{}")
        sentence, mentions = parts[0], []
        for word, part in zip(words, parts[1:], strict=True):
            mentions.append(Mention(word, self.length + len(sentence)))
            sentence += word + part
        self.sentences.append(sentence)
        self.length += len(sentence) + 1
        return mentions


def draw(
    rng: np.random.Generator, num_facts: int, num_distractors: int, num_people: int, num_places: int, num_things: int
) -> tuple[str, Question]:
    """Return a story of so many facts and distractors in a drawn order, and a question of a drawn kind."""
    cast = [
        rng.permutation(all_of)[:number].tolist()
        for all_of, number in ((PEOPLE, num_people), (PLACES, num_places), (THINGS, num_things))
    ]
    story = Story(rng, *cast)
    for is_fact in rng.permutation(num_facts + num_distractors) < num_facts:
        if is_fact:
            story.tell()
        else:
            story.digress()
    asked = story.questions()
    kinds = sorted({question.kind for question in asked})
    kind = kinds[rng.integers(len(kinds))]
    of_kind = [question for question in asked if question.kind == kind]
    return story.text, of_kind[rng.integers(len(of_kind))]


def last_place(context: str) -> str:
    """Return the place that a story mentions last, or nothing."""
    found = re.findall(rf"\b(?:{'|'.join(PLACES)})\b", context)
    return found[-1] if found else ""
