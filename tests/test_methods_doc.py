"""docs/methods.md tells every method with its options and defaults, its source, its bytes, and nothing else."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from compression.calibrated import ready

from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.scheduling.base import Evictor

TEXT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
REGISTRIES = {"Policies": POLICIES, "Allocations": ALLOCATIONS, "Codecs": CODECS}


def table(section):
    """Return {name: {column: cell}} of a section's table."""
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*", body, re.M))
    assert all(len(row) == len(head) for row in rows)
    return {row[0].strip("`"): dict(zip(head, row)) for row in rows}


def plain(default):
    if default is None:
        return "unset"
    if isinstance(default, tuple):
        return "+".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def ours(registry):
    """Return the names whose members are this project's own."""
    return [name for name in registry.names() if registry[name].__module__.startswith("pikv_core.")]


MEMBERS = [(section, name) for section, registry in REGISTRIES.items() for name in ours(registry)]


@pytest.mark.parametrize("section", REGISTRIES)
def test_every_method_is_told_and_no_other(section):
    assert sorted(table(section)) == ours(REGISTRIES[section])


@pytest.mark.parametrize(("section", "name"), MEMBERS)
def test_options_and_sources_are_those_of_the_code(section, name):
    row, member = table(section)[name], REGISTRIES[section][name]
    told = dict(re.findall(r"`(\w+)` ([^,]+)", row["options"]))
    assert told == {field.name: plain(field.default) for field in dataclasses.fields(member)}
    sources = re.findall(r"arXiv [\d.]*\d", sys.modules[member.__module__].__doc__)
    assert all(source in row["source"] for source in sources)
    assert row["rule, and what it costs"]


@pytest.mark.parametrize("name", ours(POLICIES))
def test_bytes_beside_keys_and_values_are_those_that_stay(name):
    policy = build(POLICIES, Component(name))
    num_columns = 0
    if isinstance(policy, Evictor):
        num_columns = 1 if policy.decides_once else len(policy.columns)
    row = table("Policies")[name]
    assert row["bytes"] == str(4 * (1 + num_columns))
    assert ("decided once" in row["rule, and what it costs"]) == getattr(policy, "decides_once", False)


@pytest.mark.parametrize("name", [name for name in ours(CODECS) if name not in ("auto", "none", "svd")])
def test_bits_and_units_are_what_is_stored(name):
    head_dim = 128
    codec = ready(name, head_dim)
    N = 2 * codec.unit_tokens
    x = torch.randn(1, 2, N, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    encoded = codec.encode(x, x, torch.arange(N).expand(1, 2, N))
    bits = 8 * sum(part.numel() * part.element_size() for part in encoded.values()) / (2 * x.numel())
    row = table("Codecs")[name]
    assert abs(float(row["bits"]) - bits) <= 0.1 and int(row["tokens a unit"]) == codec.unit_tokens


def test_what_is_calibrated_is_said_to_be():
    needed = [name for name in ours(CODECS) if CODECS[name].calibrated]
    sentence = re.search(r"^(`[^\n]*) are fitted to a model", TEXT, re.MULTILINE)[1]
    assert sorted(re.findall(r"`([\w-]+)`", sentence)) == needed
    assert [name for name in ours(POLICIES) if POLICIES[name].calibrated] == [
        "duo-attention",
        "learned-scorer",
        "moe-router",
    ]
    levels = ", ".join(map(str, build(CODECS, Component("levels")).bits[:-1]))
    assert f"defaults are {levels} and {build(CODECS, Component('levels')).bits[-1]} bits" in TEXT
