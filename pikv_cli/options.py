"""The options that all verbs share, and the course of every verb: load the recipe, check, run, print."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_cli import output

Backend = Annotated[
    str | None, typer.Option(metavar="torch|numba|triton", help="What computes the attention of new tokens.")
]
TextPaths = Annotated[list[str], typer.Option("--text", metavar="PATH", help="Text files or folders of yours.")]


@dataclass
class Shared:
    """The options of every verb; each field is one flag."""

    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe; flags and --set win over it.")] = None
    set: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Override a recipe key, dotted.")] = ()  # type: ignore[assignment]
    out: Annotated[str | None, typer.Option(help="Run folder (default: the next free one under runs/).")] = None
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to run.")] = None
    dtype: Annotated[str | None, typer.Option(metavar="auto|float32|bfloat16|float16", help="Precision.")] = None
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None
    plugin: Annotated[list[str], typer.Option(metavar="FILE", help="A Python file with members of its own.")] = ()  # type: ignore[assignment]
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")] = False
    check: Annotated[bool, typer.Option("--check", help="Print the resolved recipe, run nothing.")] = False

    def run(
        self,
        verb: str,
        flags: dict[str, Any],
        show: Callable[[Any, Path], None],
        resume: Path | None = None,
    ) -> None:
        """Load the verb's recipe under `flags`, run its job, and print.

        show: given result and run folder. resume: a run folder to go on with, under its own recipe.
        """
        from pikv_core import recipes
        from pikv_core.errors import UsageError

        if resume is not None:
            if self.recipe or self.set or self.out:
                raise UsageError("--resume takes the run's own recipe", hint="drop --recipe, --set and --out")
            self.recipe = resume / "recipe.yaml"
        own = {name: getattr(self, name) for name in ("out", "device", "dtype", "threads", "seed")}
        recipe = recipes.load(verb, self.recipe, self.set, {**flags, **own, "plugins": list(self.plugin)})
        if self.check:
            typer.echo(recipes.dump(recipe), nl=False)
            return
        from pikv_core.runs import Reporter, Run, rank

        job = importlib.import_module(f"pikv_core.jobs.{recipe.job}")
        if rank() > 0:
            job.run(recipe, Run(recipe, Reporter(), resume))
            return
        with output.Progress(quiet=self.json) as progress:
            run = Run(recipe, progress, resume)
            result = job.run(recipe, run)
        if self.json:
            output.print_json(result)
        else:
            show(result, run.folder)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the shared options: its parameter `shared` becomes one flag per field of Shared."""
    own = [item for item in inspect.signature(function, eval_str=True).parameters.values() if item.name != "shared"]
    shared = [
        item.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for item in inspect.signature(Shared, eval_str=True).parameters.values()
    ]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        function(shared=Shared(**{item.name: values.pop(item.name) for item in shared}), **values)

    del command.__wrapped__
    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in [*own, *shared]}
    return command


def listed(text: str | None) -> list[Any]:
    """Return the values of a comma-separated flag, numbers as numbers; raise UsageError where it names none."""
    from pikv_core.errors import UsageError
    from pikv_core.strict_yaml import parse_yaml

    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not parts:
        raise UsageError(f"expected a list with commas, got '{text}'", hint="leave the flag out for what is usual")
    return [parse_yaml(part, "the list") for part in parts]
