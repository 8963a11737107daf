"""`pikv train --export-only`: write a trained model in an architecture of transformers, and measure it there.

What lies beside the model (tokenizer, files of its task, licence) goes along; weights, configuration and code do not.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pikv_core.errors import PiKVError, UsageError
from pikv_core.files import make_folder, replacing
from pikv_core.runs import RUNS, Run, find_model
from pikv_core.schema import TrainRecipe

MOST_DIFFERENCE = 1e-4
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
OF_THE_MODEL = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class ExportResult:
    """model: the folder. weights_bytes: of its files of weights.

    max_logit_difference: between the model and the folder as transformers loads it, both in float32.
    """

    model: str
    architecture: str
    num_weights: int
    dtype: str
    weights_bytes: int
    max_logit_difference: float


def run(recipe: TrainRecipe, run: Run) -> ExportResult:
    """Convert, save, load what was saved, compare; a folder is left where the logits agree, and none otherwise."""
    assert recipe.start is not None and recipe.export is not None
    if run.resumed:
        raise UsageError(
            f"{run.folder}: an export has no checkpoints to go on from",
            hint=f"start again with `pikv train --recipe {run.folder / 'recipe.yaml'}`",
        )
    source = find_model(recipe.start)

    import torch

    from pikv_core.model.loading import load_pretrained, prepare
    from pikv_core.training.architectures import HEADS
    from pikv_core.training.export import export, head_of

    prepare(recipe)
    family = HEADS[head_of(_class_of(load_pretrained(source, "AutoConfig"), source))]
    model = load_pretrained(source, family, "auto").eval()
    told = export(model, recipe.export.to)
    run.reporter.status(f"{source}: a '{model.config.model_type}' told as '{recipe.export.to}'")
    ids = torch.randint(model.config.vocab_size, (1, min(256, model.config.max_position_embeddings)))
    with tempfile.TemporaryDirectory(prefix=".export.", dir=make_folder(_standing(recipe.out))) as temporary:
        folder = Path(temporary) / "model"
        told.save_pretrained(folder)
        weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        num_weights, dtype = sum(weight.numel() for weight in told.parameters()), told.dtype
        del told
        expected = _logits(model.float(), ids)
        del model
        found = _logits(load_pretrained(str(folder), family, "float32").eval(), ids)
        difference = float((found - expected).abs().max())
        if not difference <= MOST_DIFFERENCE:
            raise PiKVError(
                f"export.to: '{recipe.export.to}' gives logits other than {source}, by {difference:.2g}",
                hint=f"nothing is written; up to {MOST_DIFFERENCE} is rounding, more is a mistake of ours",
            )
        _copy_beside(source, folder)
        with replacing(run.folder / "model") as place:
            shutil.move(folder, place)
    result = ExportResult(
        model=str(run.folder / "model"),
        architecture=recipe.export.to,
        num_weights=num_weights,
        dtype=str(dtype).removeprefix("torch."),
        weights_bytes=weights_bytes,
        max_logit_difference=difference,
    )
    run.finish(result, {"compared": "torch on cpu, float32"})
    return result


def _class_of(config: Any, source: str) -> str:
    if not config.architectures:
        raise PiKVError(
            f"{source}: its config.json does not say which class the model is of",
            hint="give a folder that `pikv train` or save_pretrained wrote",
        )
    return config.architectures[0]


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        output = model(ids)
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


def _copy_beside(source: str, folder: Path) -> None:
    """Copy the files of a model's folder that no export writes; of a model from the hub, save the tokenizer."""
    if not Path(source).is_dir():
        from pikv_core.model.loading import load_pretrained

        load_pretrained(source, "AutoTokenizer").save_pretrained(folder)
        return
    for file in Path(source).iterdir():
        own = file.name in OF_THE_MODEL or file.name.endswith((*WEIGHTS, ".index.json", ".py"))
        if file.is_file() and not own and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def _standing(out: str | None) -> Path:
    """Return the nearest folder that there is above a run's: on its disk, as a rule."""
    path = (RUNS if out is None else Path(out).parent).absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
