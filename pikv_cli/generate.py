"""`pikv generate`: text from a model through a compressed cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import options


@options.verb
def generate(
    shared: options.Shared,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads stdin.")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="Model or run folder, or a hub id.")] = None,
    policy: Annotated[str | None, typer.Option(metavar="h2o|switch:h2o+tova", help="Which tokens stay.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="0.5|512|64MiB", help="Share, tokens or bytes.")] = None,
    allocation: Annotated[str | None, typer.Option(help="How the budget spreads over layers and heads.")] = None,
    codec: Annotated[str | None, typer.Option(help="How a stored token is represented.")] = None,
    calibration: Annotated[
        list[str], typer.Option(metavar="DIR", help="What was fitted to the model; repeatable.")
    ] = (),  # type: ignore[assignment]
    tiers: Annotated[
        str | None, typer.Option(metavar="device=64MiB,disk=DIR", help="Where pages go that the device cannot hold.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Of policy expert-shards: shards of older tokens.")] = None,
    top_shards: Annotated[int | None, typer.Option(help="Most of these shards that a query reads.")] = None,
    backend: options.Backend = None,
    graph: Annotated[bool | None, typer.Option("--graph", help="Replay steps at full budget as a CUDA graph.")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="heads|tokens|shards", help="How the ranks that torchrun starts share the cache."),
    ] = None,
    rerotate: Annotated[
        bool | None, typer.Option("--rerotate", help="Read kept keys at positions 0, 1, 2, ...")
    ] = None,
    prompt_file: Annotated[str | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="JSONL", help="Many prompts: key `prompt`.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat", help="Wrap the prompt in the chat template.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample within this probability mass.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    save_state: Annotated[
        str | None, typer.Option(metavar="DIR", help="Log the state here, a folder or URL, for --resume.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Tokens between two states of the log.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Go on, exactly, from what --save-state wrote, or with more prompt."),
    ] = None,
    prefix_cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="Keep blocks of prompts here, for prompts that begin alike.")
    ] = None,
    prefix_bytes: Annotated[str | None, typer.Option(metavar="64MiB", help="Bytes of all blocks kept.")] = None,
    prefix_policy: Annotated[
        str | None, typer.Option(metavar="lru|s3fifo", help="Which blocks stay, as in simulate-cache.")
    ] = None,
    record_attention: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the attention for simulate-cache.")
    ] = None,
) -> None:
    """Generate text: the completion streams on stdout, the report of bytes and speed goes to stderr."""
    flags = {
        "prompt": prompt,
        "model": model,
        "cache.policy": policy,
        "cache.budget": options.listed(budget)[0] if budget else None,
        "cache.allocation": allocation,
        "cache.codec": codec,
        "cache.calibration": list(calibration),
        "cache.rerotate": rerotate,
        **_tiers(tiers),
        "cache.policy.shards": shards,
        "cache.policy.top_shards": top_shards,
        "backend": backend,
        "graph": graph,
        "split": split,
        "prompt_file": prompt_file,
        "prompts": prompts,
        "batch_size": batch_size,
        "chat": chat,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "save_state": save_state,
        "save_every": save_every,
        "resume": resume,
        "prefix_cache": prefix_cache,
        "prefix.bytes": prefix_bytes,
        "prefix.policy": prefix_policy,
        "record_attention": record_attention,
    }
    if resume is not None:
        _go_on_from(resume, shared, flags)
    shared.run("generate", flags, _show)


def _go_on_from(resume: str, shared: options.Shared, flags: dict[str, Any]) -> None:
    """Take the recipe from the state; raise UsageError for flags that would change what it goes on with."""
    from pikv_core.cache import stream
    from pikv_core.errors import UsageError

    own = {"resume", "save_state", "save_every", "prompt", "max_new_tokens", "backend", "split"}
    given = [_option(name) for name, value in flags.items() if value not in (None, []) and name not in own]
    given += [name for name in ("recipe", "set", "seed", "dtype") if getattr(shared, name)]
    if given:
        raise UsageError(
            f"--resume takes the recipe of its state, not --{given[0]}",
            hint="beside it go a prompt that comes behind, --max-new-tokens, --save-state, --device and the like",
        )
    shared.recipe = stream.about(resume)["recipe"]


def _option(key: str) -> str:
    """Return the name of the option that sets a recipe's key."""
    key = key.removeprefix("cache.").removeprefix("policy.")
    return "tiers" if key.startswith("tiers.") else key.replace(".", "-").replace("_", "-")


def _tiers(given: str | None) -> dict[str, Any]:
    """Return the settings of `device=64MiB,disk=DIR` by their keys; raise UsageError for other text."""
    from pikv_core.errors import UsageError

    flags: dict[str, Any] = {}
    for part in given.split(",") if given is not None else []:
        key, separator, value = (word.strip() for word in part.partition("="))
        if not separator or not value:
            raise UsageError(
                f"--tiers: expected key=value, got '{part}'", hint="for example --tiers device=64MiB,disk=/scratch"
            )
        flags[f"cache.tiers.{key}"] = value if key == "disk" else options.listed(value)[0]
    return flags


def _show(result: Any, folder: Path) -> None:
    ratio = result.resident_bytes / result.full_bytes
    events = f", {len(result.events)} events" if result.events else ""
    first = "" if result.time_to_first_token_s is None else f"first token after {result.time_to_first_token_s:.3f} s "
    speed = "" if result.tokens_per_s is None else f"{result.tokens_per_s:.1f} tokens/s, "
    typer.echo(
        f"{result.policy}, {result.codec}, budget {result.budget}: {result.resident_bytes:,} bytes resident "
        f"({ratio:.3f} of {result.full_bytes:,}), peak {result.peak_bytes:,}{events}; "
        f"{speed}{first}"
        f"({result.backend}); details: {folder}",
        err=True,
    )
    if result.ranks > 1:
        each = ", ".join(f"{num_bytes:,}" for num_bytes in result.resident_bytes_by_rank)
        sent = result.communicated_bytes_per_token
        told = "" if sent is None else f"; {sent:,.0f} bytes a token come to each from the others"
        typer.echo(f"{result.ranks} ranks, split by {result.split}: {each} bytes{told}", err=True)
    if result.tiers is not None:
        held = ", ".join(f"{name} {count:,} bytes" for name, count in result.tiers["bytes"].items())
        hidden = result.tiers["share_hidden"]
        behind = "" if hidden is None else f", {hidden:.0%} of {result.tiers['transfer_s']:.3f} s hidden"
        named = [f"{name} is simulated" for name in result.tiers["simulated"]]
        typer.echo(
            f"tiers: {held}; {result.tiers['bytes_moved']:,} bytes moved{behind}{''.join(f'; {x}' for x in named)}",
            err=True,
        )
    if result.state is not None:
        typer.echo(f"state: {result.state}, {result.state_bytes:,} bytes written", err=True)
    if (prefix := result.prefix) is not None:
        typer.echo(
            f"prefix store: {prefix.block_hits:,} of {prefix.block_accesses:,} blocks hit "
            f"({prefix.policy} at {prefix.capacity_blocks:,}), {prefix.reused_tokens:,} tokens not computed; "
            f"{prefix.resident_blocks:,} blocks, {prefix.resident_bytes:,} bytes in {prefix.store}",
            err=True,
        )
    if result.attention_trace is not None:
        typer.echo(f"attention: {result.attention_trace}", err=True)
