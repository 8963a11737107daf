"""The `pikv` command: one Typer app, and the one place where an error becomes `error:` and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from pikv_cli import compress, gen_data, generate, simulate_cache, train
from pikv_core import __version__
from pikv_core.errors import PiKVError

app = typer.Typer(
    name="pikv",
    help="Measure what a KV-cache policy, codec and budget cost and gain, on your model and your traces.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("gen-data")(gen_data.gen_data)
app.command("train")(train.train)
app.command("compress")(compress.compress)
app.command("simulate-cache")(simulate_cache.simulate_cache)
app.command("generate")(generate.generate)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"pikv {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True)) -> None:
    """Measure what a KV-cache policy, codec and budget cost and gain, on your model and your traces."""


# Typer exports the usage error it raises, and that error's base stands for all of its family.
_ParserError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main() -> None:
    """Run the command line; exit with 2 for usage and recipes, 1 for every other error."""
    # A thread that waits spins briefly, then sleeps: spinning on, it starves its partners on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # What data parallelism warns of, once for each process, is not for those who started them.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = app(standalone_mode=False)
    except PiKVError as error:
        code = error.exit_code
        if code == 1 or _is_first():  # a mistake in the call is every rank's, and is told once
            _fail(error.message, error.hint, code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", None, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except _ParserError as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "pikv")
        message = error.format_message()  # type: ignore[attr-defined]
        code = 0 if not message else _fail(message[0].lower() + message[1:].rstrip("."), f"see `{command} --help`", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _is_first() -> bool:
    from pikv_core.runs import rank

    return rank() == 0


def _fail(message: str, hint: str | None, code: int) -> int:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)
    return code
