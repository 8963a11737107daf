"""Prompts to generate from: the argument, a file, a jsonl file, or stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pikv_core.errors import PiKVError, UsageError
from pikv_core.schema import GenerateRecipe


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
