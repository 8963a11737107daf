"""The commands that README.md and the documents show are ones that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pikv_cli.app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "data/README.md",
    "docs/methods.md",
    "docs/prefix-store.md",
    "docs/ranks.md",
    "docs/simulation.md",
    "docs/state.md",
    "docs/tiers.md",
    "docs/training.md",
]


def commands(document):
    """Return the arguments of each `pikv` in a document's blocks, without comments."""
    found = []
    text = (ROOT / document).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in [] if language else block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = words[words.index("pikv_cli") :]
            if words[:1] in (["pikv"], ["pikv_cli"]) and "--resume" not in words:  # there is no run to go on with
                found.append(words[1:])
    return found


@pytest.mark.parametrize(("document", "words"), [(name, words) for name in DOCUMENTS for words in commands(name)])
def test_a_shown_command_is_taken(document, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, [*words, "--check"])
    assert result.exit_code == 0, result.exception or result.output
    assert f"verb: {words[0]}" in result.output


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "docs/log.md", "docs/presses.md"])
def test_what_is_linked_is_there(document):
    file = ROOT / document
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target
