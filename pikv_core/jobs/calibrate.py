"""Fit codecs to a model on text, and write what they learned into a folder that `--calibration` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_core.components import Component, build
from pikv_core.compression import CODECS
from pikv_core.errors import PiKVError, UsageError
from pikv_core.runs import Run, find_model, plain
from pikv_core.schema import CompressRecipe, MethodRecipe

if TYPE_CHECKING:
    from pikv_core.compression.base import Codec, Fitted, LayerSamples


@dataclass(frozen=True)
class CalibrateResult:
    """Codecs that were fitted, and on what.

    results: of each codec, measured on the calibration text: the share of the full cache's bytes, and the relative
    error of attention's output, mean over the layers; the same and the errors of keys and values by layer.
    """

    model: str
    saved: str
    corpus: str
    num_tokens: int
    results: list[dict[str, Any]]


def run(recipe: CompressRecipe, run: Run) -> CalibrateResult:
    """Fit every codec that the methods name."""
    components = _codecs(recipe.methods)
    assert recipe.save is not None
    folder = Path(recipe.save)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise PiKVError(f"{folder}: there is something already", hint="give --save a new folder")
    find_model(recipe.model)

    from pikv_core.cache import calibration
    from pikv_core.evaluation import samples
    from pikv_core.model.loading import load_model

    loaded = load_model(recipe.model, recipe)
    length = recipe.context_tokens
    loaded.check_length(length, run.reporter)
    num_windows = min(recipe.num_texts, samples.most_windows(loaded, length))
    if num_windows < recipe.num_texts:
        run.reporter.status(f"memory for samples holds {num_windows} of {recipe.num_texts} windows")
    windows = samples.calibration_windows(
        loaded, recipe.text, recipe.column, num_windows, length, recipe.seed, run.reporter
    )
    run.reporter.status(f"reading {windows.ids.numel()} tokens of {windows.source}")
    layers = samples.collect(loaded.model, windows.ids, recipe.batch_size)
    members, results = [], []
    for index, component in enumerate(components):
        run.reporter.progress(f"fitting {component.name}", index, len(components))
        codec = build(CODECS, component)
        fitted = codec.fit(layers)
        found = _measure(codec, fitted, layers)
        results.append({"codec": component.name, **found})
        for layer, error in enumerate(found["output_error_by_layer"]):
            run.telemetry.scalar(f"{component.name}/output_error", error, layer)
            run.telemetry.scalar(f"{component.name}/bytes_share", found["bytes_share_by_layer"][layer], layer)
        notes = {**fitted.notes, "measured": found}
        members.append(calibration.Member(component.name, "codec", _options(codec), fitted.tensors, notes))
        run.reporter.status(
            f"{component.name}: {found['bytes_share']:.3f} of the bytes, attention error {found['output_error']:.4f}"
        )
    corpus = calibration.Corpus(
        source=windows.source, sha256=samples.fingerprint(windows.ids), num_tokens=windows.ids.numel()
    )
    calibration.save(folder, loaded.source, loaded.model, corpus, members)
    result = CalibrateResult(loaded.source, str(folder), windows.source, windows.ids.numel(), results)
    run.finish(result, {"attention": loaded.backend})
    return result


def _codecs(methods: Iterable[MethodRecipe]) -> list[Component]:
    """Return the codecs to fit; raise UsageError for one that needs no fitting, or is asked for in two ways."""
    found: dict[str, Component] = {}
    for method in methods:
        codec = method.codec
        if not CODECS[codec.name].calibrated:
            named = (
                f"codec '{codec.name}'" if codec.name != "none" else f"policy '{method.policy.name}' without a codec"
            )
            fitted = [name for name in CODECS.names() if CODECS[name].calibrated]
            raise UsageError(f"{named} has nothing to calibrate", hint=f"codecs that have: --method {','.join(fitted)}")
        if found.setdefault(codec.name, codec) != codec:
            raise UsageError(
                f"codec '{codec.name}' is asked for with two sets of options",
                hint="a folder holds one calibration of each codec: calibrate twice, into two folders",
            )
    return list(found.values())


def _options(codec: Codec) -> dict[str, Any]:
    """Return the options that the fit depends on."""
    assert dataclasses.is_dataclass(codec)
    options = plain(codec)
    return {name: value for name, value in options.items() if name not in getattr(codec, "unfitted", ())}


def _measure(codec: Codec, fitted: Fitted, layers: list[LayerSamples]) -> dict[str, Any]:
    """Return bytes and errors of the fitted codec: means over the layers, and layer by layer."""
    from pikv_core.compression.measured import measure

    by_layer = [
        measure(codec.for_layer(index, fitted.tensors, sample.rotary), sample) for index, sample in enumerate(layers)
    ]
    found: dict[str, Any] = {
        "bytes_share": sum(x.num_bytes for x in by_layer) / sum(x.full_bytes for x in by_layer),
        "output_error": sum(x.output_error for x in by_layer) / len(by_layer),
    }
    for name in ("bytes_share", "key_error", "value_error", "output_error"):
        found[f"{name}_by_layer"] = [getattr(x, name) for x in by_layer]
    return found
