"""Generate for a batch of prompts through a PiKVCache, with the times of every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from pikv_core.cache import PiKVCache
from pikv_core.errors import UsageError
from pikv_core.model.loading import LoadedModel
from pikv_core.recipes import GenerateRecipe


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


class Batch:
    """Some prompts, left-padded to one length, and the cache they share."""

    def __init__(self, loaded: LoadedModel, recipe: GenerateRecipe, prompts: list[str]):
        self.loaded, self.recipe, self.prompts = loaded, recipe, prompts
        self.cache = PiKVCache.from_recipe(loaded.model.config, recipe)
        tokenizer = loaded.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self.inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not recipe.chat).to(
            loaded.model.device
        )
        self.inputs.pop("token_type_ids", None)
        self.num_later_tokens, self.decode_s, self.first_token_s = 0, 0.0, 0.0

    def generate(self, on_text: Callable[[str], None] | None) -> list[Completion]:
        """Generate, hand finished pieces of text to `on_text`, and keep the times."""
        model, tokenizer, recipe = self.loaded.model, self.loaded.tokenizer, self.recipe
        clock = _Clock()
        output = model.generate(
            **self.inputs,
            past_key_values=self.cache,
            max_new_tokens=recipe.max_new_tokens,
            do_sample=recipe.temperature > 0,
            temperature=recipe.temperature or None,
            top_k=recipe.top_k if recipe.temperature > 0 else None,
            top_p=recipe.top_p if recipe.temperature > 0 else None,
            repetition_penalty=recipe.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([clock]),
            streamer=_Stream(tokenizer, on_text) if on_text is not None else None,
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        length = self.inputs["input_ids"].shape[1]
        self.first_token_s = clock.times[0] - clock.start
        self.decode_s = clock.times[-1] - clock.times[0]
        self.num_later_tokens = (output.shape[1] - length - 1) * len(self.prompts)
        completions = []
        for prompt, mask, ids in zip(self.prompts, self.inputs["attention_mask"], output[:, length:].tolist()):
            ids = _until_stop(ids, model.generation_config.eos_token_id)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            completions.append(Completion(prompt, text, ids, int(mask.sum())))
        return completions


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
    """Hand each finished piece of text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
