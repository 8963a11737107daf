"""Methods as text, the cells of a sweep, and targets."""

import pytest

from pikv_core.components import Component
from pikv_core.errors import RecipeError
from pikv_core.evaluation.cells import expand
from pikv_core.evaluation.methods import label, parse
from pikv_core.evaluation.pareto import frontier
from pikv_core.evaluation.target import Target
from pikv_core.recipes import load
from pikv_core.schema import MethodRecipe
from pikv_core.strict_yaml import parse_yaml

TEXTS = {
    "h2o": ("h2o", {}, "none", None),
    "int8": ("full", {}, "int8", None),
    "int8+h2o": ("h2o", {}, "int8", None),
    "snapkv+int4@ada-kv": ("snapkv", {}, "int4", "ada-kv"),
    "switch:h2o+snapkv": ("switch", {"policies": ["h2o", "snapkv"]}, "none", None),
    "switch:h2o+snapkv+int8@pyramid": ("switch", {"policies": ["h2o", "snapkv"]}, "int8", "pyramid"),
}


def recipe(**keys):
    return load("compress", None, (), {"model": "m", **keys})


@pytest.mark.parametrize("text", TEXTS)
def test_text_means_a_method_and_its_label_means_the_same(text):
    policy, options, codec, allocation = TEXTS[text]
    method = MethodRecipe.model_validate(parse(text))
    assert method.policy == Component(policy, options) and method.codec == Component(codec)
    assert method.allocation == (None if allocation is None else Component(allocation))
    named = label(method.policy, method.codec, method.allocation or Component("uniform"))
    assert MethodRecipe.model_validate(parse(named)) == method


@pytest.mark.parametrize(
    "text, message",
    [
        ("h3o", "'h3o' is neither a policy nor a codec; did you mean 'h2o'?; policies: "),
        ("h2o+quest", "at most one policy and one codec"),
        ("int8+int8+h2o", "at most one policy and one codec"),
        ("", "'' is neither"),
        ("h2o:int8", "policy 'h2o' takes nothing after ':'"),
        ("switch:h2o", "needs two different policies or more, got 'h2o'"),
        ("switch:h2o+int8", "needs two different policies or more, got 'h2o'"),
        ("switch:h2o+quest", "policy 'quest' drops no tokens, which a switch cannot use"),
        ("swich:h2o+snapkv", "unknown policy 'swich'; did you mean 'switch'?"),
        ("h2o@pyramide", "unknown allocation 'pyramide'; did you mean 'pyramid'?"),
        ({"policy": "h2o", "bugdet": 1}, "unknown key; allowed: policy, codec, allocation, rerotate"),
        ({"policy": {"name": "h2o", "heavy": 1}}, "has no option 'heavy'"),
    ],
)
def test_a_wrong_method_is_told_with_its_place(text, message):
    with pytest.raises(RecipeError, match=r"methods\.1") as error:
        recipe(methods=["h2o", text])
    assert message in error.value.message


def test_methods_expand_to_cells():
    cells = expand(recipe(methods=["h2o", "int8", "h2o+int8", "full"], budgets=[0.5, 64]))
    assert [(cell.cache.policy.name, cell.cache.codec.name, cell.cache.budget) for cell in cells] == [
        ("full", "none", 1.0),
        ("h2o", "none", 0.5),
        ("h2o", "none", 64),
        ("full", "int8", 1.0),
        ("h2o", "int8", 0.5),
        ("h2o", "int8", 64),
    ]
    assert [cell.is_full for cell in cells] == [True] + [False] * 5


def test_a_method_has_the_sweeps_allocations_or_its_own_and_keeps_its_options():
    methods = ["h2o", "snapkv@pyramid", "int8", {"policy": {"name": "h2o", "heavy_share": 0.3}, "rerotate": True}]
    cells = expand(recipe(methods=methods, budgets=[0.5], allocations=["uniform", "ada-kv"], calibration=["c"]))
    assert [cell.label for cell in cells] == [
        "full",
        "h2o",
        "h2o@ada-kv",
        "snapkv@pyramid",
        "int8",
        "h2o(heavy_share=0.3, rerotate)",
        "h2o(heavy_share=0.3, rerotate)@ada-kv",
    ]
    assert all(cell.cache.calibration == ["c"] for cell in cells)
    assert [cell.cache.rerotate for cell in cells] == [False] * 5 + [True] * 2


def test_a_key_names_the_measurement_and_nothing_beside_it():
    def keys(**changed):
        return [cell.key for cell in expand(recipe(**{"methods": ["h2o", "tova"], "budgets": [0.5, 0.25], **changed}))]

    first = keys()
    assert len(set(first)) == 5
    assert keys(out="elsewhere", name="other", threads=3, target="recall=0.9") == first
    assert keys(methods=["tova", "h2o", "tova"], budgets=[0.25])[1:] == [first[4], first[2]]
    for changed in ({"seed": 1}, {"num_queries": 7}, {"question": "inside"}, {"dtype": "float32"}, {"model": "n"}):
        assert not set(keys(**changed)) & set(first)


def test_the_dump_of_methods_is_a_recipe_of_the_same():
    found = recipe(methods=[*TEXTS, {"policy": {"name": "h2o", "heavy_share": 0.3}, "rerotate": True}])
    again = recipe(methods=parse_yaml(str(found.model_dump()["methods"]).replace("'", '"'), "dump"))
    assert again == found


def test_targets():
    rows = [
        {"method": "a", "resident_bytes": 30, "recall": 0.99, "perplexity": 12.0, "ruler": None},
        {"method": "b", "resident_bytes": 20, "recall": 0.98, "perplexity": 10.0, "ruler": None},
        {"method": "c", "resident_bytes": 10, "recall": 0.5, "perplexity": 13.0, "ruler": None},
    ]

    def cheapest(text):
        found = Target.parse(text).cheapest(rows)
        return None if found is None else found["method"]

    assert cheapest("recall=0.98") == "b" and cheapest("recall=.985") == "a" and cheapest("recall=0.1") == "c"
    assert cheapest("recall=1") is None and cheapest("ruler=0") is None
    assert cheapest("perplexity=12.5") == "b" and cheapest("perplexity=9") is None
    for wrong in ("recall", "recall=high", "speed=3", "recall>=0.9"):
        with pytest.raises(RecipeError, match="expected one of recall, perplexity, agreement, ruler and a number"):
            recipe(target=wrong)
    with pytest.raises(RecipeError, match="is not measured"):
        recipe(target="ruler=0.5")
    assert recipe(target="ruler=0.5", tasks=["ruler"]).target == "ruler=0.5"


def test_frontier_keeps_what_nothing_betters():
    points = [(3, 5.0), (1, 1.0), (2, 3.5), (2, 4.0), (2.5, 3.0), (4, 5.0)]
    assert frontier(points, lambda new, old: new > old) == [1, 3, 0]
