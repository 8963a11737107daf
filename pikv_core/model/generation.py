"""Generate for a batch of prompts through a PiKVCache, with the times of every token."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from pikv_core.cache import PiKVCache, stream
from pikv_core.cache.prefix.store import PrefixStore
from pikv_core.cache.ranks.log import Follower
from pikv_core.errors import UsageError
from pikv_core.model.loading import LoadedModel
from pikv_core.model.prefix_reuse import PrefixReuse
from pikv_core.model.ranks import Agreement, Ranks
from pikv_core.model.replayed_step import replaying
from pikv_core.model.saving import Saver, go_on
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
    block_hits: int | None = None  # leading blocks of the prompt that a prefix store held


def as_chat(tokenizer: Any, prompt: str) -> str:
    """Wrap a prompt in the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise UsageError("--chat: this model's tokenizer has no chat template", hint="leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True)
class BatchCost:
    """Bytes at the end and at the peak, and times; `num_later_tokens` came in `decode_s`, after the first of each.

    first_token_s: None where a run was gone on with that had nothing left to do. resident_bytes_by_rank: of each that
    holds a part. received_bytes: what rank 0 was sent in `num_steps` steps, those after each prompt. tiers: see
    `Tiers.report`.
    """

    resident_bytes: int
    peak_bytes: int
    full_bytes: int
    first_token_s: float | None
    decode_s: float
    num_later_tokens: int
    resident_bytes_by_rank: list[int]
    received_bytes: int
    num_steps: int
    tiers: dict[str, Any] | None


def generate_batch(
    loaded: LoadedModel,
    recipe: GenerateRecipe,
    prompts: list[str],
    cache: PiKVCache,
    reporter: Reporter,
    streams: bool,
    saved: stream.Saved | None = None,
    writer: stream.Writer | Follower | None = None,
    store: PrefixStore | None = None,
    ranks: Ranks | None = None,
) -> tuple[list[Completion], BatchCost]:
    """Generate for prompts padded on the left to one length, through a cache that is empty.

    streams: hand pieces of the (one) completion to the reporter as they are finished. saved: what to go on from; the
    (one) prompt is what comes behind it, if anything. writer: where to save the (one) run. store: what holds beginnings
    of the (one) prompt. ranks: those that the cache is split over.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if saved is None:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not recipe.chat)
        ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
        length = ids.shape[1]
    else:
        ids, length = go_on(saved, loaded, cache, prompts[0])
        mask = torch.ones_like(ids)
    num_before = ids.shape[1] - length
    num_left = recipe.max_new_tokens - num_before
    loaded.check_length(length + recipe.max_new_tokens - 1, reporter)
    clock, ranks = _Clock(), ranks or Ranks()
    agreement = Agreement(ranks.wire)
    streamer = _Stream(tokenizer, reporter) if streams else None
    if streamer is not None:
        streamer.repeat(ids[0, length:])
    reuse = None if store is None else PrefixReuse(store, model, cache, ids)
    if cache.looks is not None and saved is None:
        if length < 2:
            raise UsageError(
                f"policy '{cache.recipe.policy.name}' scores a prompt before its last token, and this one has no other",
                hint="give a longer prompt, or choose another policy",
            )
        prefill(model, cache, ids[:, :-1], is_token=mask[:, :-1].bool())
    saver = None if writer is None else Saver(writer, cache, length, recipe.save_every)
    stops = _stops(model.generation_config.eos_token_id)
    if num_left > 0 and not (num_before and int(ids[0, -1]) in stops):
        sampled = recipe.temperature > 0
        with replaying(model, cache) if recipe.graph else nullcontext() as decode:
            ids = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=num_left,
                do_sample=sampled,
                temperature=recipe.temperature if sampled else None,
                top_k=recipe.top_k if sampled else None,
                top_p=recipe.top_p if sampled else None,
                repetition_penalty=recipe.repetition_penalty,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList(
                    [clock, agreement, *(x for x in (reuse, saver) if x is not None)]
                ),
                streamer=streamer,
            )
        if decode is not None and not decode.num_replayed:
            num_tokens = cache.get_seq_length()
            reporter.status(f"graph: no step was replayed, since {num_tokens} tokens did not fill the budget")
    elif streamer is not None:
        streamer.end()
    if saver is not None:
        saver.save(ids)
    completions = []
    for prompt, is_token, row in zip(prompts, mask[:, :length], ids[:, length:].tolist()):
        new = _until_stop(row, stops)
        completions.append(
            Completion(
                prompt,
                tokenizer.decode(new, skip_special_tokens=True),
                new,
                int(is_token.sum()),
                None if reuse is None else reuse.block_hits,
            )
        )
    if reuse is not None:
        reuse.finish(len(completions[0].token_ids))
    held, received = ranks.held(cache), agreement.received_bytes
    cost = BatchCost(
        resident_bytes=sum(each.resident_bytes for each in held),
        peak_bytes=sum(each.peak_bytes for each in held),
        full_bytes=cache.full_bytes,
        first_token_s=clock.times[0] - clock.start if clock.times else None,
        decode_s=clock.times[-1] - clock.times[0] - (0.0 if reuse is None else reuse.store_s) if clock.times else 0.0,
        num_later_tokens=sum(max(0, len(completion.token_ids) - num_before - 1) for completion in completions),
        resident_bytes_by_rank=[each.resident_bytes for each in held],
        received_bytes=received[-1] - received[0] if received else 0,
        num_steps=max(0, len(received) - 1),
        tiers=None if cache.tiers is None else cache.tiers.report(),
    )
    return completions, cost


def _stops(stop: int | list[int] | None) -> set[int]:
    return {stop} if isinstance(stop, int) else set(stop or ())


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Cut the padding that a finished row of a batch was given, and its stop token."""
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

    def repeat(self, ids: torch.Tensor) -> None:
        """Pass on tokens [T] that were generated before."""
        self.next_tokens_are_prompt = False
        for token in ids:
            self.put(token[None])
        self.next_tokens_are_prompt = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._reporter.text(text)
