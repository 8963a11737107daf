"""Generate text through a compressed cache, and measure its bytes and its speed."""

from __future__ import annotations

import json
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_core.data.prompt_files import read_prompts
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import make_folder
from pikv_core.runs import Run, find_model, rank
from pikv_core.schema import GenerateRecipe

if TYPE_CHECKING:
    from pikv_core.cache.prefix.store import PrefixReport
    from pikv_core.model.generation import BatchCost, Completion
    from pikv_core.model.ranks import Ranks


@dataclass(frozen=True)
class GenerateResult:
    """A run of `generate`; bytes are of the largest batch, times of all together.

    With many prompts `text` and `token_ids` are None and `completions` holds each. events: what the policy tells of the
    run, such as a switch: its layer, its step in tokens seen, and why; with many prompts, the number of the batch too.
    ranks: processes that hold the cache, as `split` says. communicated_bytes_per_token: what came to each from the
    others in a step after the prompt, None where there was none, and where one process holds all. tiers: of the largest
    batch, bytes by tier and what was moved (docs/tiers.md); None where there are none.
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
    tokens_per_s: float | None  # of the tokens after each prompt's first
    time_to_first_token_s: float | None
    backend: str
    model: str
    completions: list[Completion] | None
    events: list[dict[str, Any]]
    attention_trace: str | None
    state: str | None
    state_bytes: int | None  # written by this run
    prefix: PrefixReport | None  # what a prefix store was worth
    ranks: int
    split: str | None
    resident_bytes_by_rank: list[int] | None
    communicated_bytes_per_token: float | None
    tiers: dict[str, Any] | None


def run(recipe: GenerateRecipe, run: Run) -> GenerateResult | None:
    """Generate for every prompt of the recipe, in batches; of the ranks that torchrun starts, the first returns it."""
    goes_on_alone = recipe.resume is not None and recipe.prompt is None
    prompts = [""] if goes_on_alone or rank() else read_prompts(recipe)  # stdin is the first one's
    if not rank():
        find_model(recipe.model)
    if recipe.record_attention is not None:
        _check_place(recipe.record_attention, recipe.prompt_file)

    from pikv_core.cache.backend import attending_by
    from pikv_core.model.loading import device_of
    from pikv_core.model.ranks import Ranks

    device = device_of(recipe)
    if recipe.graph and device.type != "cuda":
        raise UsageError(f"--graph needs a GPU, and this run is on '{device.type}'", hint="leave out --graph")
    state = recipe.save_state or recipe.resume
    hint = "with --save-state it could go on" if state is None else f"go on with `pikv generate --resume {state}`"
    joined = Ranks.of_torchrun(recipe.split, device, f"{hint}, on any number of ranks")
    with joined as ranks, attending_by(recipe.backend, device), ExitStack() as closing:
        if recipe.split is not None and ranks.wire.count == 1:
            run.reporter.status(f"one process: nothing is split by {recipe.split}; torchrun starts more")
        return _generate(recipe, run, ranks.tell(prompts), ranks, closing)


def _generate(
    recipe: GenerateRecipe, run: Run, prompts: list[str], ranks: Ranks, closing: ExitStack
) -> GenerateResult | None:
    from pikv_core.cache import stream
    from pikv_core.cache.prefix.identity import check_block_policy
    from pikv_core.components import build
    from pikv_core.jobs.record_attention import Recording
    from pikv_core.model.generation import as_chat, generate_batch
    from pikv_core.model.loading import load_model
    from pikv_core.model.prefix_reuse import open_store
    from pikv_core.model.saving import about_run
    from pikv_core.simulation.policies import REQUEST_POLICIES

    if recipe.prefix_cache is not None:
        check_block_policy(build(REQUEST_POLICIES, recipe.prefix.policy))
    loaded = load_model(recipe.model, recipe)
    if recipe.graph:
        loaded.new_cache(recipe).check_static()
    if recipe.chat and recipe.resume is None:
        prompts = [as_chat(loaded.tokenizer, prompt) for prompt in prompts]
    if recipe.record_attention is not None:
        _make_folder_of(recipe.record_attention, run)
    saved = (
        None
        if recipe.resume is None
        else ranks.read(recipe.resume, ranks.share(loaded.new_cache(recipe), loaded.model))
    )
    writer = None
    if recipe.save_state is not None:
        same = recipe.resume is not None and stream.is_same_place(recipe.save_state, recipe.resume)
        writer = ranks.writer(recipe.save_state, about_run(recipe, loaded), saved if same else None)
    store = None
    if recipe.prefix_cache is not None:
        store = closing.enter_context(open_store(recipe, loaded, run.reporter))
    single = recipe.prompts is None
    completions: list[Completion] = []
    costs: list[BatchCost] = []
    events: list[dict[str, Any]] = []
    for start in range(0, len(prompts), recipe.batch_size):
        part = prompts[start : start + recipe.batch_size]
        cache = ranks.share(loaded.new_cache(recipe), loaded.model)
        path = recipe.record_attention
        recording = None if path is None else Recording(path, recipe.record, cache)
        with writer or nullcontext():
            found, cost = generate_batch(loaded, recipe, part, cache, run.reporter, single, saved, writer, store, ranks)
        if recording is not None:
            recording.write(found[0].num_prompt_tokens, loaded)
        completions += found
        events += cache.events if single else [{"batch": len(costs), **event} for event in cache.events]
        costs.append(cost)
        for completion in [] if single else found:
            line = {"prompt": completion.prompt, "text": completion.text}
            run.reporter.text(json.dumps(line, ensure_ascii=False) + "\n")
        run.reporter.progress("generate", len(completions), len(prompts))
    if not ranks.leads:
        return None
    if single:
        run.reporter.text("\n")
    num_later = sum(cost.num_later_tokens for cost in costs)
    num_steps = sum(cost.num_steps for cost in costs)
    largest = max(costs, key=lambda cost: cost.full_bytes)
    is_split = ranks.wire.count > 1
    result = GenerateResult(
        text=completions[0].text if single else None,
        token_ids=completions[0].token_ids if single else None,
        num_prompt_tokens=sum(completion.num_prompt_tokens for completion in completions),
        policy=recipe.cache.policy.name,
        codec=recipe.cache.codec.name,
        allocation=recipe.cache.allocation.name,
        budget=recipe.cache.budget,
        resident_bytes=largest.resident_bytes,
        peak_bytes=largest.peak_bytes,
        full_bytes=largest.full_bytes,
        tokens_per_s=num_later / sum(cost.decode_s for cost in costs) if num_later else None,
        time_to_first_token_s=costs[0].first_token_s,
        backend=loaded.backend,
        model=loaded.source,
        completions=None if single else completions,
        events=events,
        attention_trace=recipe.record_attention,
        state=recipe.save_state,
        state_bytes=None if writer is None else writer.bytes_written,
        prefix=None if store is None else store.report(),
        ranks=ranks.wire.count,
        split=recipe.split if is_split else None,
        resident_bytes_by_rank=largest.resident_bytes_by_rank if is_split else None,
        communicated_bytes_per_token=(
            sum(cost.received_bytes for cost in costs) / num_steps if is_split and num_steps else None
        ),
        tiers=largest.tiers,
    )
    for name in ("resident_bytes", "peak_bytes", "full_bytes", "time_to_first_token_s", "tokens_per_s"):
        if getattr(result, name) is not None:
            run.telemetry.scalar(f"generate/{name}", getattr(result, name))
    for name in ("bytes_moved", "transfer_s", "waited_s", "share_hidden"):
        if result.tiers is not None and result.tiers[name] is not None:
            run.telemetry.scalar(f"generate/tiers/{name}", result.tiers[name])
    _log_switches(events, run)
    run.finish(result, loaded.backends)
    return result


def _check_place(path: str, prompt_file: str | None) -> None:
    """Raise UsageError where a file written there would take the place of a folder or of the prompt."""
    if Path(path).is_dir():
        raise UsageError(
            f"the attention is written to a file, and '{path}' is a folder", hint="give --record-attention a file"
        )
    if prompt_file is not None and Path(path).resolve() == Path(prompt_file).resolve():
        raise UsageError(f"the attention would replace the prompt in '{path}'", hint="give another name")


def _make_folder_of(path: str, run: Run) -> None:
    """Make the folder that a file will be written into, or say before the work that it cannot be."""
    own, folder = run.recipe.out, Path(path).resolve().parent
    if own is not None and folder.is_relative_to(Path(own).resolve()):
        make_folder(run.folder)  # it has to be empty before
    try:
        make_folder(folder)
    except PiKVError as error:
        raise PiKVError(error.message, hint="choose another place with --record-attention") from error


def _log_switches(events: list[dict[str, Any]], run: Run) -> None:
    """Log the recall that each candidate had when a layer switched, at that step."""
    run.telemetry.scalar("generate/events", len(events))
    for event in events:
        if event.get("event") != "switch":
            continue
        place = f"generate/switch/layer{event['layer']}"
        for name, recall in event["recall"].items():
            run.telemetry.scalar(f"{place}/recall/{name}", recall, event["step"])
