"""Calibrations on disk: what codecs and policies have learned from one model, checked before it is used.

A folder holds manifest.json and one safetensors file for each member.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from pikv_core.cache.fingerprint import fingerprint, is_same
from pikv_core.cache.support import windows
from pikv_core.components import Component
from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import replacing, sha256, write_json
from pikv_core.runs import plain
from pikv_core.scheduling import POLICIES

MANIFEST = "manifest.json"
CODEC_COMMAND = "pikv compress --calibrate --method {name} --model DIR --save DIR2"
POLICY_COMMAND = "pikv train --recipe recipes/train/{recipe}.yaml --start DIR"
Kind = Literal["codec", "policy"]


@dataclass(frozen=True)
class Member:
    """What one codec or policy has learned; options: those that the tensors depend on."""

    name: str
    kind: Kind
    options: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    notes: Mapping[str, Any] = field(default_factory=dict)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Corpus(_Part):
    """The text that it was learned from: tokens, and the SHA-256 of their numbers."""

    source: str
    sha256: str
    num_tokens: int


class LayerShape(_Part):
    num_kv_heads: int
    head_dim: int


class _Model(_Part):
    source: str
    model_type: str
    fingerprint: list[list[float]]


class _Entry(_Part):
    kind: Kind
    options: dict[str, Any]
    file: str
    sha256: str
    notes: dict[str, Any]


class Manifest(_Part):
    """What manifest.json says."""

    format: Literal[1]
    model: _Model
    layers: list[LayerShape]
    corpus: Corpus
    members: dict[str, _Entry]


def save(folder: str | Path, source: str, model: nn.Module, corpus: Corpus, members: Sequence[Member]) -> None:
    """Write a calibration of `model`, which was loaded from `source`, as a whole or not at all."""
    from safetensors import torch as safetensors

    config: Any = model.config
    with replacing(folder) as temporary:
        temporary.mkdir()
        entries = {}
        for member in members:
            file = temporary / f"{member.name}.safetensors"
            tensors = {name: x.detach().cpu().contiguous() for name, x in member.tensors.items()}
            file.write_bytes(safetensors.save(tensors))
            options, notes = plain(dict(member.options)), plain(dict(member.notes))
            entries[member.name] = _Entry(
                kind=member.kind, options=options, file=file.name, sha256=sha256(file), notes=notes
            )
        manifest = Manifest(
            format=1,
            model=_Model(source=source, model_type=config.model_type, fingerprint=fingerprint(model)),
            layers=layer_shapes(config),
            corpus=corpus,
            members=entries,
        )
        write_json(temporary / MANIFEST, manifest.model_dump())


def read(folder: str | Path) -> Manifest:
    """Return the manifest of a calibration, or of the run that made it.

    Raises UsageError where there is none, PiKVError where it is damaged.
    """
    file = _folder(folder) / MANIFEST
    if not file.is_file():
        raise UsageError(
            f"{folder}: no calibration here: no {MANIFEST}", hint=f"make one: {CODEC_COMMAND.format(name='NAME')}"
        )
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PiKVError(
            f"{file}: not a calibration that this version reads: {where + ': ' if where else ''}{first['msg']}",
            hint="calibrate again",
        ) from error
    except OSError as error:
        raise PiKVError(f"{file}: cannot be read: {error.strerror or error}") from error


def fitted(
    folders: Sequence[str], kind: Kind, component: Component, config: Any
) -> tuple[Component, dict[str, torch.Tensor]]:
    """Return the component with the options it was fitted with, and what one of the folders holds of it.

    Raises UsageError where none or several hold it, where the layers are not those of `config`, or where an option of
    the component is not the one that was fitted; PiKVError where a file is damaged.
    """
    name = component.name
    manifests = {folder: read(folder) for folder in folders}
    holders = [folder for folder, x in manifests.items() if name in x.members and x.members[name].kind == kind]
    hint = f"make one: {_command(kind, name)}"
    if not folders:
        raise UsageError(f"{kind} '{name}' runs only with a calibration of the model, and none is given", hint=hint)
    if not holders:
        there = "; ".join(f"{folder} holds {', '.join(x.members) or 'nothing'}" for folder, x in manifests.items())
        raise UsageError(f"no calibration of {kind} '{name}': {there}", hint=hint)
    if len(holders) > 1:
        raise UsageError(f"{kind} '{name}' is calibrated in {' and in '.join(holders)}", hint="give one of them")
    folder = holders[0]
    manifest, entry = manifests[folder], manifests[folder].members[name]
    ours = layer_shapes(config)
    if manifest.layers != ours:
        raise UsageError(
            f"{folder}: a calibration of {manifest.model.source} with {_described(manifest.layers)}; "
            f"this model has {_described(ours)}",
            hint=hint,
        )
    for option, asked in component.options.items():
        if option in entry.options and plain(asked) != entry.options[option]:
            raise UsageError(
                f"{folder}: {kind} '{name}' was fitted with {option} {entry.options[option]}, not {asked}",
                hint=f"drop {option}, or calibrate with it",
            )
    tensors = _tensors(_folder(folder) / entry.file, entry.sha256)
    return Component(name, {**entry.options, **component.options}), tensors


def check_model(folders: Sequence[str], model: nn.Module) -> None:
    """Raise UsageError where a calibration is of another model, of the same architecture even."""
    found = fingerprint(model)
    for folder in folders:
        manifest = read(folder)
        if not is_same(found, manifest.model.fingerprint):
            commands = [_command(member.kind, name) for name, member in manifest.members.items()]
            raise UsageError(
                f"{folder}: a calibration of {manifest.model.source} ({manifest.model.model_type}); "
                "this model has other weights",
                hint=f"make one of this model: {'; '.join(commands)}",
            )


def layer_shapes(config: Any) -> list[LayerShape]:
    """Return the key/value heads of each layer and their channels."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return [LayerShape(num_kv_heads=num_kv_heads, head_dim=head_dim) for _ in windows(config)]


def _command(kind: Kind, name: str) -> str:
    """Return what makes a calibration of a codec or policy."""
    if kind == "codec":
        return CODEC_COMMAND.format(name=name)
    fitted_by = POLICIES[name].fitted_by if name in POLICIES.names() else ""
    return POLICY_COMMAND.format(recipe=fitted_by or "NAME")


def _described(layers: Sequence[LayerShape]) -> str:
    kinds = sorted({(x.num_kv_heads, x.head_dim) for x in layers})
    return f"{len(layers)} layers of " + " or ".join(
        f"{heads} heads of {channels} channels" for heads, channels in kinds
    )


def _folder(folder: str | Path) -> Path:
    """Return the folder itself, or the calibration inside a run's folder."""
    inside = Path(folder) / "calibration"
    return inside if (inside / MANIFEST).is_file() else Path(folder)


def _tensors(file: Path, expected: str) -> dict[str, torch.Tensor]:
    try:
        status = file.stat()
        return _load(file, status.st_mtime_ns, status.st_size, expected)
    except (OSError, _WrongHash) as error:
        raise PiKVError(
            f"{file}: damaged or gone: its contents are not what {MANIFEST} says", hint="calibrate again"
        ) from error


class _WrongHash(Exception):
    pass


@functools.lru_cache(maxsize=4)
def _load(file: Path, modified_ns: int, num_bytes: int, expected: str) -> dict[str, torch.Tensor]:
    """Read a file once for all caches of a sweep; the time and size of the file tell when it is another one."""
    from safetensors.torch import load_file

    if sha256(file) != expected:
        raise _WrongHash
    return load_file(file)
