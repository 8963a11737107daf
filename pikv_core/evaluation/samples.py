"""What codecs are calibrated on: the queries, keys and values of every layer while the model reads text.

None of the text is what a sweep scores: it is the user's, or the training part of the embedded corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pikv_core.cache import PiKVCache
from pikv_core.cache.layer import CacheLayer
from pikv_core.compression.base import LayerSamples
from pikv_core.data import corpus, text_files
from pikv_core.data.recall import RecallSource, has_recall
from pikv_core.errors import PiKVError
from pikv_core.evaluation.prompts import MOST_UNKNOWN, TextWindows, text_windows
from pikv_core.model.loading import LoadedModel
from pikv_core.model.steps import feed

if TYPE_CHECKING:
    from pikv_core.runs import Reporter

MOST_BYTES = 2**31  # of the samples of all layers together
SPARE_TEXT = 4  # times the tokens of all windows, of which the windows are spread over


def calibration_windows(
    loaded: LoadedModel,
    paths: list[str],
    column: str | None,
    num_windows: int,
    length: int,
    seed: int,
    reporter: Reporter,
) -> TextWindows:
    """Return `num_windows` windows of `length` tokens.

    Of the user's files where there are any; of a model that was trained on recall, samples of that task in training
    text; else training text. Raises PiKVError where the tokenizer does not know the text.
    """
    source = RecallSource.load(loaded.folder) if loaded.folder is not None and has_recall(loaded.folder) else None
    if paths:
        documents, name = text_files.read(paths, column), ", ".join(paths)
    elif source is not None and source.task.filler == "synthetic":
        return _task_windows(source, num_windows, length, seed, f"recall, {source.task.filler} filler")
    else:
        documents, name = _training_documents(loaded, column, seed, reporter)
    stream = _encode(loaded.tokenizer, documents, SPARE_TEXT * num_windows * length, name)
    if paths or source is None:
        return text_windows(loaded, stream, name, num_windows, length, seed)
    source = dataclasses.replace(source, streams={**source.streams, "train": stream})
    return _task_windows(source, num_windows, length, seed, f"recall in {name}")


def most_windows(loaded: LoadedModel, length: int) -> int:
    """Return how many windows of `length` tokens the memory for samples holds; at least 1."""
    text = loaded.model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    per_token = text.num_hidden_layers * (heads + 2 * kv_heads) * head_dim * loaded.model.dtype.itemsize
    return max(1, MOST_BYTES // (per_token * length))


def collect(model: Any, ids: torch.Tensor, batch_size: int) -> list[LayerSamples]:
    """Return what each layer computes while the model reads ids [N,T], in the model's dtype and on its device.

    Raises PiKVError where a number is not finite.
    """
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    scales: dict[int, float] = {}
    for batch in ids.split(batch_size):
        cache = PiKVCache(model.config).attach(model)
        for layer in cache.own_layers:
            layer.attend = _recording(layer, seen.setdefault(layer.index, []), scales)  # type: ignore[method-assign]
        feed(model, cache, batch)
    rotary = cache.own_layers[0].run.rotary
    position = torch.arange(ids.shape[1], device=model.device)
    samples = []
    for index, parts in sorted(seen.items()):
        queries, keys, values = (torch.cat(tensors) for tensors in zip(*parts))
        parts.clear()
        if not all(bool(x.isfinite().all()) for x in (queries, keys, values)):
            raise PiKVError(
                f"layer {index}: the model's numbers are not finite ({str(model.dtype).removeprefix('torch.')})",
                hint="calibrate in --dtype float32",
            )
        samples.append(LayerSamples(queries, keys, values, position, scales[index], rotary))
    return samples


def fingerprint(ids: torch.Tensor) -> str:
    """Return the SHA-256 of token ids, as int64 in the order they are read."""
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _recording(layer: CacheLayer, seen: list[tuple[torch.Tensor, ...]], scales: dict[int, float]) -> Any:
    attend = layer.attend

    def attend_and_record(query: torch.Tensor, scale: float, *args: Any) -> torch.Tensor:
        seen.append((query, *layer.arrived))
        scales[layer.index] = scale
        return attend(query, scale, *args)

    return attend_and_record


def _training_documents(
    loaded: LoadedModel, column: str | None, seed: int, reporter: Reporter
) -> tuple[list[str], str]:
    """Return the embedded corpus's training part without what the model's folder holds out, in a drawn order."""
    embedded = corpus.load([], column, seed, reporter)
    held_out = corpus.held_out(loaded.folder) if loaded.folder is not None else None
    kept_apart = "" if held_out is None else loaded.tokenizer.decode(held_out.astype(np.int64))
    documents = [document for document in embedded.train if document not in kept_apart]
    order = np.random.default_rng(seed).permutation(len(documents))
    return [documents[number] for number in order], f"{embedded.source}, training part"


def _encode(tokenizer: Any, documents: list[str], enough: int, source: str) -> np.ndarray:
    """Return documents as one stream of tokens, until there are `enough`."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False)["input_ids"] + end
        if len(stream) >= enough:
            break
    unknown = stream.count(tokenizer.unk_token_id) / max(1, len(stream)) if tokenizer.unk_token_id is not None else 0.0
    if unknown > MOST_UNKNOWN:
        raise PiKVError(
            f"{source}: the model's tokenizer does not know {unknown:.0%} of the words",
            hint="give text that the model was trained for with --text",
        )
    return np.asarray(stream, dtype=np.int64)


def _task_windows(source: RecallSource, num_windows: int, length: int, seed: int, name: str) -> TextWindows:
    rng = np.random.default_rng([seed, 2])
    drawn = [source.batch(rng, 1, length, split="train").ids for _ in range(num_windows)]
    return TextWindows(torch.from_numpy(np.concatenate(drawn)), name)
