"""docs/training.md has a row for every router, and its examples run."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pikv_cli.app import app
from pikv_core.moe.routers import ROUTERS

TEXT = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
OURS, (STRANGERS,) = (
    [block for block in BLOCKS if ("import transformers" in block) == other] for other in (False, True)
)
FEW_STEPS = ["max_steps=6", "curriculum=[16]", "eval_lengths=[32]", "eval_samples=4", "decay_steps=2"]


def test_every_router_has_a_row():
    rows = re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == [name for name in ROUTERS.names() if ROUTERS[name].__module__.startswith("pikv_core.")]


def test_the_examples_run(capsys):
    names = {}
    for block in OURS:
        exec(compile(block, "docs/training.md", "exec"), names)
    plain, distributed = capsys.readouterr().out.splitlines()
    adapter_bytes, shape = plain.split(maxsplit=1)
    assert int(adapter_bytes) > 0 and shape.startswith("torch.Size([8, ")
    assert sum(ast.literal_eval(distributed)[0]) == 2 * 2 * 16


@pytest.mark.slow
def test_the_exported_example_is_loaded_without_us(tmp_path, monkeypatch):
    recipes = Path(__file__).parent.parent / "recipes"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(recipes)
    section = TEXT.partition("## Take it elsewhere")[2]
    commands = [
        shlex.split(line)[1:] for line in re.findall(r"^pikv .*$", section.partition("```python")[0], re.MULTILINE)
    ]
    assert [words[-1] for words in commands] == ["TRAINED", "TOLD"]
    commands[0] += [word for setting in FEW_STEPS for word in ("--set", f"train.{setting}")]
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.exception or result.output
    told = "\nimport sys\nassert not any(name.startswith('pikv') for name in sys.modules)\nprint(type(model).__name__)"
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and "pikv" not in place]
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGERS + told],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert stranger.returncode == 0, stranger.stderr
    assert stranger.stdout.split() == ["MixtralForCausalLM"]
