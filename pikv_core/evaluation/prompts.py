"""What a cache is measured on: prompts whose answers only the context gives, and real text to go on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pikv_core.data import corpus, text_files
from pikv_core.data.recall import RecallBatch, RecallSource, has_recall
from pikv_core.data.words import KEYS
from pikv_core.errors import PiKVError
from pikv_core.model.loading import LoadedModel

if TYPE_CHECKING:
    from pikv_core.runs import Reporter

MOST_UNKNOWN = 0.05  # share of unknown tokens above which a tokenizer does not speak the text
NUM_NATURAL_QUESTIONS = 8
PROMPTS_AT_A_TIME = 4


@dataclass(frozen=True)
class RecallPrompts:
    """Token ids on the CPU: context [N,C], questions [N,Q,A], answers [N,Q,L]; depth [N,Q] of each asked needle.

    num_needles: in each context, asked for or not.
    """

    context: torch.Tensor
    questions: torch.Tensor
    answers: torch.Tensor
    depth: torch.Tensor
    num_needles: int
    source: str

    def asked(self) -> torch.Tensor:
        """Return what follows each context [N,F]: question and answer in turn."""
        return torch.cat([self.questions, self.answers], dim=-1).flatten(1)

    def joined(self, num_samples: int) -> torch.Tensor:
        """Return the first samples as they were trained on [N,T]: context, then question and answer in turn."""
        return torch.cat([self.context, self.asked()], dim=1)[:num_samples]


@dataclass(frozen=True)
class TextWindows:
    """Windows [N,T] of held-out text, and where it comes from."""

    ids: torch.Tensor
    source: str


def read_text(
    loaded: LoadedModel, paths: list[str], column: str | None, seed: int, reporter: Reporter
) -> tuple[np.ndarray, str] | None:
    """Return text as one stream of the model's tokens, and its source.

    The user's files, all of them; else what the model's folder holds out; else the embedded corpus's held-out part.
    None where that is foreign to the model (one of drawn words); files of the user's that are raise PiKVError.
    """
    folder = loaded.folder
    if not paths and folder is not None and (held := corpus.held_out(folder)) is not None:
        return held.astype(np.int64), "the model's held-out text"
    if not paths and folder is not None and has_recall(folder):
        return None  # trained on drawn words: it holds no text out
    if paths:
        documents, source = text_files.read(paths, column), ", ".join(paths)
    else:
        embedded = corpus.load(paths, column, seed, reporter)
        documents, source = embedded.test, embedded.source
    tokenizer = loaded.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.asarray(ids + end, dtype=np.int64) for ids in encoded])
    unknown = tokenizer.unk_token_id
    share = float((stream == unknown).mean()) if unknown is not None else 0.0
    if share <= MOST_UNKNOWN:
        return stream, source
    if paths:
        raise PiKVError(
            f"{', '.join(paths)}: the model's tokenizer does not know {share:.0%} of the words",
            hint="give text that the model was trained for, or none: then its own held-out data are used",
        )
    return None


def text_windows(
    loaded: LoadedModel, stream: np.ndarray, source: str, num_texts: int, length: int, seed: int
) -> TextWindows:
    """Return `num_texts` windows of `length` tokens, spread evenly over the stream from a seeded start.

    Each opens with the token that the model's tokenizer puts before a text, if it does.
    """
    opening = np.asarray(_opening(loaded.tokenizer), dtype=np.int64)
    length -= len(opening)
    room = len(stream) - length
    if room < 0:
        raise PiKVError(
            f"the text holds {len(stream)} tokens, a window takes {length}",
            hint="give more text, or lower context_tokens and continuation_tokens",
        )
    first = np.random.default_rng(seed).integers(0, max(1, room // num_texts))
    starts = np.linspace(first, room, num_texts).astype(np.int64)
    windows = np.stack([np.concatenate([opening, stream[s : s + length]]) for s in starts])
    return TextWindows(torch.from_numpy(windows), source)


def _opening(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before every text: the bos token, or nothing."""
    return [ids for ids in tokenizer("")["input_ids"] if ids == tokenizer.bos_token_id]


def recall_prompts(
    loaded: LoadedModel, stream: np.ndarray | None, num_queries: int, length: int, seed: int
) -> list[RecallPrompts]:
    """Return prompts of `length` tokens in all with at least `num_queries` questions together, by number of needles.

    A model that was trained on the recall task is asked in its own words; any other one gets sentences with
    numbers, scattered through `stream`.
    """
    rng = np.random.default_rng([seed, 1])
    folder = loaded.folder
    if folder is not None and has_recall(folder):
        return _task_prompts(RecallSource.load(folder), rng, num_queries, length)
    if stream is None:
        raise PiKVError(
            f"{loaded.source}: the tokenizer does not know the embedded text, and the folder holds no recall task",
            hint="give text that the model was trained for with --text",
        )
    return [_sentence_prompts(loaded.tokenizer, stream, rng, num_queries, length)]


def _task_prompts(source: RecallSource, rng: np.random.Generator, num_queries: int, length: int) -> list[RecallPrompts]:
    """Draw prompts of the task; one layout for each number of needles, which in real text varies."""
    drawn: dict[int, list[RecallBatch]] = {}
    asked = 0
    while asked < num_queries:
        batch = source.batch(rng, PROMPTS_AT_A_TIME, length, split="test")
        drawn.setdefault(_num_needles(source, batch), []).append(batch)
        asked += batch.depth.size
    return [_joined(batches, num_needles, source) for num_needles, batches in sorted(drawn.items())]


def _num_needles(source: RecallSource, batch: RecallBatch) -> int:
    """Count the needles of a context, each of which has a key of its own."""
    first = 2 if source.task.filler == "text" else 0  # the markers come before the keys
    ids = source.tokenizer.get_vocab()
    keys = [ids[word] for word in source.task.words()[first : first + source.task.num_keys]]
    return int(np.isin(batch.ids[0, : batch.context_length], keys).sum())


def _joined(batches: list[RecallBatch], num_needles: int, source: RecallSource) -> RecallPrompts:
    first = batches[0]
    ids = torch.from_numpy(np.concatenate([batch.ids for batch in batches]))
    depth = torch.from_numpy(np.concatenate([batch.depth for batch in batches]))
    asking = ids[:, first.context_length :].unflatten(1, (depth.shape[1], first.question_tokens + 1))
    return RecallPrompts(
        ids[:, : first.context_length],
        asking[..., : first.question_tokens],
        asking[..., first.question_tokens :],
        depth,
        num_needles,
        source=f"recall, {source.task.filler} filler",
    )


def _sentence_prompts(
    tokenizer: Any, stream: np.ndarray, rng: np.random.Generator, num_queries: int, length: int
) -> RecallPrompts:
    """Build prompts of needles such as ` The number of amber is 4821.` whose parts all take equally many tokens."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def same_length(texts: list[str]) -> list[list[int]]:
        encoded = [encode(text) for text in texts]
        sizes = [len(ids) for ids in encoded]
        usual = max(set(sizes), key=sizes.count)
        return [ids for ids in encoded if len(ids) == usual]

    asks = same_length([f" The number of {word.strip()} is" for word in KEYS])
    numbers = same_length([f" {number}" for number in range(1000, 10000, 37)])
    stop = encode(".")
    Q = min(NUM_NATURAL_QUESTIONS, len(asks))
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in {*asks[0], *numbers[0], *stop}:
        raise PiKVError(
            "the model's tokenizer knows no numbers or sentences to ask for",
            hint="measure a model that was trained on the recall task, or one with a tokenizer of text",
        )
    opening = _opening(tokenizer)
    needle = len(asks[0]) + len(numbers[0]) + len(stop)
    C = length - Q * (needle - len(stop))
    filler = C - Q * needle - len(opening)
    if filler < Q:
        raise PiKVError(
            f"context_tokens {length} has no room for {Q} needles of {needle} tokens and as many questions",
            hint=f"raise context_tokens to {2 * Q * needle + Q} or more",
        )
    contexts, questions, answers, depths = [], [], [], []
    for _ in range(-(-num_queries // Q)):
        chosen = rng.permutation(len(asks))[:Q]
        values = rng.integers(0, len(numbers), Q)
        start = rng.integers(0, len(stream) - filler + 1)
        cuts = np.sort(rng.integers(0, filler + 1, Q))
        context = list(opening)
        places = []
        for index, piece in enumerate(np.split(stream[start : start + filler], cuts)):
            context += piece.tolist()
            if index < Q:
                places.append(len(context) / C)
                context += asks[chosen[index]] + numbers[values[index]] + stop
        order = rng.permutation(Q)
        contexts.append(context)
        questions.append([asks[chosen[i]] for i in order])
        answers.append([numbers[values[i]] for i in order])
        depths.append([places[i] for i in order])
    return RecallPrompts(
        torch.tensor(contexts),
        torch.tensor(questions),
        torch.tensor(answers),
        torch.tensor(depths),
        num_needles=Q,
        source="sentences with numbers in text",
    )
