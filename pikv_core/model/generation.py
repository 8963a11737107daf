"""Generate for a batch of prompts through a PiKVCache, with the times of every token."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from pikv_core.cache import PiKVCache
from pikv_core.errors import UsageError
from pikv_core.model.loading import LoadedModel
from pikv_core.model.replayed_step import replaying
from pikv_core.model.steps import prefill
from pikv_core.runs import Reporter
from pikv_core.schema import GenerateRecipe


@dataclass(frozen=True)
class Completion:
    """What one prompt got; `text` is the completion alone."""

    prompt: str
    text: str
    token_ids: list[int]
    num_prompt_tokens: int


def as_chat(tokenizer: Any, prompt: str) -> str:
    """Wrap a prompt in the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise UsageError("--chat: this model's tokenizer has no chat template", hint="leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class BatchCost:
    """Bytes at the end and at the peak, and times; `num_later_tokens` came in `decode_s`, after the first of each."""

    resident_bytes: int
    peak_bytes: int
    full_bytes: int
    first_token_s: float
    decode_s: float
    num_later_tokens: int


def generate_batch(
    loaded: LoadedModel,
    recipe: GenerateRecipe,
    prompts: list[str],
    cache: PiKVCache,
    reporter: Reporter,
    stream: bool,
) -> tuple[list[Completion], BatchCost]:
    """Generate for prompts padded on the left to one length, through a cache that is empty.

    stream: hand pieces of the (one) completion to the reporter as they are finished.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not recipe.chat).to(model.device)
    length = inputs["input_ids"].shape[1]
    loaded.check_length(length + recipe.max_new_tokens - 1, reporter)
    clock = _Clock()
    if cache.looks is not None:
        if length < 2:
            raise UsageError(
                f"policy '{cache.recipe.policy.name}' scores a prompt before its last token, and this one has no other",
                hint="give a longer prompt, or choose another policy",
            )
        prefill(model, cache, inputs["input_ids"][:, :-1], is_token=inputs["attention_mask"][:, :-1].bool())
    sampled = recipe.temperature > 0
    with replaying(model, cache) if recipe.graph else nullcontext() as decode:
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            max_new_tokens=recipe.max_new_tokens,
            do_sample=sampled,
            temperature=recipe.temperature if sampled else None,
            top_k=recipe.top_k if sampled else None,
            top_p=recipe.top_p if sampled else None,
            repetition_penalty=recipe.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([clock]),
            streamer=_Stream(tokenizer, reporter) if stream else None,
        )
    if decode is not None and not decode.num_replayed:
        reporter.status(f"graph: no step was replayed, since {cache.get_seq_length()} tokens did not fill the budget")
    completions = []
    for prompt, mask, row in zip(prompts, inputs["attention_mask"], output[:, length:].tolist()):
        ids = _until_stop(row, model.generation_config.eos_token_id)
        completions.append(Completion(prompt, tokenizer.decode(ids, skip_special_tokens=True), ids, int(mask.sum())))
    cost = BatchCost(
        resident_bytes=cache.resident_bytes,
        peak_bytes=cache.peak_bytes,
        full_bytes=cache.full_bytes,
        first_token_s=clock.times[0] - clock.start,
        decode_s=clock.times[-1] - clock.times[0],
        num_later_tokens=sum(max(0, len(completion.token_ids) - 1) for completion in completions),
    )
    return completions, cost


def _until_stop(ids: list[int], stop: int | list[int] | None) -> list[int]:
    """Cut the padding that a finished row of a batch was given, and its stop token."""
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    for index, token in enumerate(ids):
        if token in stops:
            return ids[:index]
    return ids


class _Clock(StoppingCriteria):
    """Note when each token came; never stops."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Stream(TextStreamer):
    """Hand each finished piece of text to the reporter."""

    def __init__(self, tokenizer: Any, reporter: Reporter):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._reporter = reporter

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._reporter.text(text)
