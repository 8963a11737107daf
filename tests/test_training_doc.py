"""docs/training.md has a row for every router, and its example runs."""

import ast
import re
from pathlib import Path

from pikv_core.moe.routers import ROUTERS

TEXT = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_router_has_a_row():
    rows = re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == [name for name in ROUTERS.names() if ROUTERS[name].__module__.startswith("pikv_core.")]


def test_the_examples_run(capsys):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/training.md", "exec"), names)
    plain, distributed = capsys.readouterr().out.splitlines()
    adapter_bytes, shape = plain.split(maxsplit=1)
    assert int(adapter_bytes) > 0 and shape.startswith("torch.Size([8, ")
    assert sum(ast.literal_eval(distributed)[0]) == 2 * 2 * 16
