"""Generate text through a compressed cache, and measure its bytes and its speed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from pikv_core.cache import PiKVCache
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.loading import LoadedModel, load_model
from pikv_core.recipes import GenerateRecipe
from pikv_core.runs import Run


@dataclass(frozen=True)
class Completion:
    """What one prompt got; `text` is the completion alone."""

    prompt: str
    text: str
    token_ids: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class GenerateResult:
    """A run of `generate`; bytes are of the largest batch, times of all together.

    With many prompts `text` and `token_ids` are None and `completions` holds each.
    """

    text: str | None
    token_ids: list[int] | None
    num_prompt_tokens: int
    policy: str
    codec: str
    allocation: str
    budget: float | int | str
    resident_bytes: int
    peak_bytes: int
    full_bytes: int
    tokens_per_s: float
    time_to_first_token_s: float
    backend: str
    model: str
    completions: list[Completion] | None


def run(recipe: GenerateRecipe, run: Run) -> GenerateResult:
    """Generate for every prompt of the recipe, in batches."""
    prompts = read_prompts(recipe)
    loaded = load_model(recipe.model, recipe)
    if recipe.chat:
        prompts = [_chat(loaded.tokenizer, prompt) for prompt in prompts]
    single = recipe.prompts is None
    batches = [_Batch(loaded, recipe, part) for part in _batched(prompts, recipe.batch_size)]
    folder = run.folder
    completions: list[Completion] = []
    for batch in batches:
        completions += batch.generate(run if single else None)
        if not single:
            for completion in completions[-len(batch.prompts) :]:
                line = {"prompt": completion.prompt, "text": completion.text}
                run.reporter.text(json.dumps(line, ensure_ascii=False) + "\n")
            run.reporter.progress("generate", len(completions), len(prompts))
    if single:
        run.reporter.text("\n")
    largest = max(batches, key=lambda batch: batch.cache.full_bytes)
    num_later_tokens = sum(batch.num_later_tokens for batch in batches)
    result = GenerateResult(
        text=completions[0].text if single else None,
        token_ids=completions[0].token_ids if single else None,
        num_prompt_tokens=sum(completion.num_prompt_tokens for completion in completions),
        policy=recipe.cache.policy.name,
        codec=recipe.cache.codec.name,
        allocation=recipe.cache.allocation.name,
        budget=recipe.cache.budget,
        resident_bytes=largest.cache.resident_bytes,
        peak_bytes=largest.cache.peak_bytes,
        full_bytes=largest.cache.full_bytes,
        tokens_per_s=num_later_tokens / max(sum(batch.decode_s for batch in batches), 1e-9),
        time_to_first_token_s=batches[0].first_token_s,
        backend=loaded.backend,
        model=loaded.source,
        completions=None if single else completions,
    )
    for name in ("resident_bytes", "peak_bytes", "full_bytes", "tokens_per_s", "time_to_first_token_s"):
        run.telemetry.scalar(f"generate/{name}", getattr(result, name))
    run.finish(result, {"attention": loaded.backend})
    assert folder == run.folder
    return result


def read_prompts(recipe: GenerateRecipe) -> list[str]:
    """Return the prompts of the one source given: the argument, a file, a jsonl file, or stdin."""
    given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(recipe, name) is not None]
    if len(given) > 1:
        flags = " and ".join(f"--{name}".replace("_", "-").replace("--prompt ", "PROMPT ") for name in given)
        raise UsageError(f"more than one source of prompts: {flags}", hint="give one of them")
    if recipe.prompts is not None:
        return _read_jsonl(Path(recipe.prompts))
    if recipe.prompt_file is not None:
        prompt, where = _read(Path(recipe.prompt_file)), recipe.prompt_file
    elif recipe.prompt in (None, "-"):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt given", hint="give it as an argument, by --prompt-file, --prompts or on stdin")
        prompt, where = sys.stdin.read().rstrip("\n"), "stdin"
    else:
        prompt, where = recipe.prompt or "", "the argument"
    if not prompt.strip():
        raise UsageError(f"the prompt is empty ({where})", hint="give at least one word to go on from")
    return [prompt]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PiKVError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise PiKVError(f"{path}: not UTF-8 text") from error


def _read_jsonl(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            reason = "not a JSON object" if not isinstance(error, KeyError) else "no key 'prompt'"
            raise PiKVError(f"{path}:{number}: {reason}", hint='each line is {"prompt": "..."}') from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise PiKVError(f"{path}:{number}: the prompt is empty", hint='each line is {"prompt": "..."}')
        prompts.append(prompt)
    if not prompts:
        raise PiKVError(f"{path}: no prompts in the file", hint='each line is {"prompt": "..."}')
    return prompts


def _chat(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise UsageError("--chat: this model's tokenizer has no chat template", hint="leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _batched(prompts: list[str], batch_size: int) -> Iterator[list[str]]:
    for start in range(0, len(prompts), batch_size):
        yield prompts[start : start + batch_size]


class _Batch:
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

    def generate(self, stream_to: Run | None) -> list[Completion]:
        """Generate, stream to the run's reporter if given, and keep the times."""
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
            streamer=_Stream(tokenizer, stream_to) if stream_to is not None else None,
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
    """Hand each finished piece of text to the reporter."""

    def __init__(self, tokenizer: Any, run: Run):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._run = run

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._run.reporter.text(text)
