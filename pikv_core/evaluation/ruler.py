"""RULER's tasks (arXiv 2404.06654) asked over a compressed context; the answers are written, not picked.

An answer's score is the share of the expected strings that it holds, whatever their case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pikv_core.cache import PiKVCache
from pikv_core.data import stdlib_text
from pikv_core.data.ruler_parts import Material
from pikv_core.data.ruler_tasks import samples
from pikv_core.errors import PiKVError
from pikv_core.evaluation.recall import half_interval
from pikv_core.model.steps import prefill, step

SEAMS = 8  # tokens that a question may gain by standing between the marks of a chat


@dataclass(frozen=True)
class Prompt:
    """One sample in a model's tokens; the question ends with how the answer begins.

    expected: the answers as tokens, for policies that are shown what is yet to come.
    """

    task: str
    context: list[int]
    question: list[int]
    answers: Sequence[str]
    expected: list[int]
    answer_tokens: int


@dataclass(frozen=True)
class RulerSamples:
    """Prompts of one length, context and question together."""

    prompts: list[Prompt]

    @property
    def num_tokens(self) -> int:
        """The most tokens that a prompt and its answer take."""
        return max(len(one.context) + len(one.question) + one.answer_tokens for one in self.prompts)

    def batches(self, batch_size: int) -> Iterator[list[Prompt]]:
        """Yield prompts of one task whose questions, and so their contexts, are equally long."""
        alike: dict[tuple[str, int], list[Prompt]] = {}
        for one in self.prompts:
            alike.setdefault((one.task, len(one.question)), []).append(one)
        for group in alike.values():
            for start in range(0, len(group), batch_size):
                yield group[start : start + batch_size]


@dataclass(frozen=True)
class Ruler:
    """Mean scores in [0, 1] by task, and their mean; an interval is half the 95 % confidence interval (Wilson).

    A score between 0 and 1 is counted as so many right ones, which no interval of theirs exceeds.
    """

    score: float
    interval: float
    by_task: dict[str, float]
    interval_by_task: dict[str, float]
    num_samples: int


def ruler_samples(tokenizer: Any, tasks: Sequence[str], num_samples: int, length: int, seed: int) -> RulerSamples:
    """Draw `num_samples` prompts of each task, `length` tokens each, among sentences of the embedded text.

    With a tokenizer that has a chat template, context and question are a user's turn. Raises PiKVError where a task
    does not fit the length, or the tokenizer does not know the words.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    before, after = _turn(tokenizer, encode)
    material = Material.of(stdlib_text.read(), "text", lambda text: len(encode(text)))
    room = length - len(before) - (len(encode(after)) + SEAMS if after else 0)
    prompts = []
    for sample in samples(tasks, material, lambda text: len(encode(text)), num_samples * len(tasks), room, seed):
        question = encode(sample.question + after + (sample.opening.lstrip() if after else sample.opening))
        expected = encode(" " + ", ".join(sample.answers))
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in {*question, *expected}:
            raise PiKVError(
                f"the model's tokenizer does not know the words of RULER's task '{sample.task}'",
                hint="measure a model with a tokenizer of text, or leave ruler out of the tasks",
            )
        context = before + encode(sample.context)
        spare, missing = encode(sample.more), length - len(question) - len(context)
        assert missing >= 0
        context += (spare * (missing // len(spare) + 1))[:missing]
        prompts.append(Prompt(sample.task, context, question, sample.answers, expected, sample.answer_tokens))
    return RulerSamples(prompts)


def measure_ruler(
    model: Any,
    tokenizer: Any,
    new_cache: Callable[[], PiKVCache],
    samples: RulerSamples,
    batch_size: int,
    question: Literal["inside", "after"] = "after",
) -> Ruler:
    """Let the model write its answers greedily, one token per step, over the compressed context.

    question "after": the policy compresses the context alone, then the question is fed one token per step. "inside":
    it compresses the whole prompt.
    """
    scores: dict[str, list[float]] = {}
    for batch in samples.batches(batch_size):
        context = torch.tensor([one.context for one in batch])
        asked = torch.tensor([one.question for one in batch])
        answered = _rectangle([one.expected for one in batch])
        cache = new_cache()
        if question == "inside":
            logits = prefill(model, cache, torch.cat([context, asked], dim=1), answered)
        else:
            logits = prefill(model, cache, context, torch.cat([asked, answered], dim=1))
            for token in asked.unbind(1):
                logits = step(model, cache, token)
        written = _write(model, tokenizer, cache, logits, batch)
        scores.setdefault(batch[0].task, []).extend(map(score, written, (one.answers for one in batch)))
    by_task = {task: sum(found) / len(found) for task, found in scores.items()}
    mean = sum(by_task.values()) / len(by_task)
    return Ruler(
        mean,
        half_interval(mean, len(samples.prompts)),
        by_task,
        {task: half_interval(by_task[task], len(found)) for task, found in scores.items()},
        len(samples.prompts),
    )


def score(text: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the text holds, whatever their case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _write(model: Any, tokenizer: Any, cache: PiKVCache, logits: torch.Tensor, batch: Sequence[Prompt]) -> list[str]:
    """Return each row's text, up to its end; stop where every row has ended or holds all answers already."""
    ends = _ends(model, tokenizer)
    written: list[list[int]] = [[] for _ in batch]
    ended = [False] * len(batch)
    while True:
        chosen = logits.argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            ended[row] = ended[row] or token in ends or len(written[row]) == batch[row].answer_tokens
            if not ended[row]:
                written[row].append(token)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        done = [over or score(text, one.answers) == 1 for over, text, one in zip(ended, texts, batch)]
        if all(done):
            return texts
        logits = step(model, cache, chosen)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer, as the model's own generation ends."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def _turn(tokenizer: Any, encode: Callable[[str], list[int]]) -> tuple[list[int], str]:
    """Return what the tokenizer puts before a text, and the marks between a user's turn and its answer, if any."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [one for one in tokenizer("")["input_ids"] if one == tokenizer.bos_token_id], ""
    mark = "<<RULER>>"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    before, after = turn.split(mark)
    return encode(before), after


def _rectangle(rows: Sequence[list[int]]) -> torch.Tensor:
    """Return the rows cut to the shortest one [B,F]."""
    return torch.tensor([row[: min(map(len, rows))] for row in rows])
