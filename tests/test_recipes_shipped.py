"""Every shipped recipe loads, and opens with the command that runs it."""

from pathlib import Path

import pytest

from pikv_core.recipes import dump, load
from pikv_core.schema import RECIPES
from pikv_core.strict_yaml import parse_yaml

ROOT = Path(__file__).parent.parent
FILES = sorted(file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name != "tiers")
VERBS = {"simulate": "simulate-cache"}
GIVEN_AS_FLAGS = ("model", "trace")


def verb_of(file):
    return VERBS.get(file.parent.name, file.parent.name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_shipped_recipe_loads_and_its_dump_says_the_same(file, tmp_path):
    verb = verb_of(file)
    missing = {
        name: "given-by-flag"
        for name in GIVEN_AS_FLAGS
        if name in RECIPES[verb].model_fields
        and RECIPES[verb].model_fields[name].is_required()
        and name not in parse_yaml(file.read_text(encoding="utf-8"), str(file))
    }
    recipe = load(verb, file, (), missing)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump(recipe), encoding="utf-8")
    assert load(verb, copy) == recipe


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_shipped_recipe_opens_with_its_command(file):
    opening = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        opening.append(line)
    assert f"pikv {verb_of(file)} " in "\n".join(opening)
    assert f"--recipe {file.relative_to(ROOT).as_posix()}" in "\n".join(opening)


@pytest.mark.parametrize("file", [file for file in FILES if verb_of(file) == "train"], ids=lambda file: file.stem)
def test_two_processes_share_every_step_of_a_shipped_recipe(file):
    settings = load("train", file).train
    for length in getattr(settings, "curriculum", ()):
        assert settings.batch_tokens // length % 2 == 0, length


def test_there_are_recipes_to_train():
    assert (ROOT / "recipes" / "train" / "recall-tiny.yaml") in FILES
