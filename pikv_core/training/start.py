"""The model that training starts with: built from a recipe, or taken over from a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.loading import load_pretrained
from pikv_core.moe.lora import LoRAExperts
from pikv_core.schema import TrainRecipe
from pikv_core.training.architectures import HEADS, WITHOUT_TOKENS, build_model
from pikv_core.training.lessons.base import Lesson
from pikv_core.training.upcycling import upcycle


def start_model(recipe: TrainRecipe, lesson: Lesson) -> Any:
    """Return the model of a run before its first step, float32 on the CPU.

    Raises PiKVError where train.init_from names no model, or one that does not fit the task or the recipe.
    """
    name = recipe.train.init_from
    if name is None:
        return build_model(recipe.model, lesson.head, **lesson.model_options)
    model = load_trained(name, lesson.head, lesson.model_options)
    if recipe.builds:
        model = upcycle(model, recipe.model, lesson.head)
    _check_lengths(model, recipe, lesson)
    return model


def load_trained(name: str, head: str, options: dict[str, Any]) -> Any:
    """Return the model that `find_model` finds with a head of HEADS, in float32.

    options: what the task tells its model; the sizes stay those of the checkpoint. A head that it lacks, or has for
    other labels, is drawn from torch's generator.
    """
    config = load_pretrained(name, "AutoConfig")
    _check_kind(name, config, head, options)
    for option, value in options.items():  # num_labels before the labels' names, which it draws up anew
        if option != "vocab_size" and value is not None:
            setattr(config, option, value)
    with _without_reports():
        model, told = load_pretrained(
            name, HEADS[head], "float32", config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
        prefix = f"{model.base_model_prefix}."
        if any(key.startswith(prefix) for key in told["missing_keys"]):  # there the decoder bears another name
            decoder, told = load_pretrained(name, "AutoModel", "float32", output_loading_info=True)
            model.base_model.load_state_dict(decoder.state_dict())
            prefix = ""
    other = {key for key, *_ in told["mismatched_keys"]}  # of other sizes
    lacking = sorted(key for key in {*told["missing_keys"], *other} if key.startswith(prefix))
    if lacking:
        raise PiKVError(
            f"{name}: the model has no weights that fit {len(lacking)} parts of its decoder, {lacking[0]} among them",
            hint="give a folder that `pikv train` or save_pretrained wrote",
        )
    for module in model.modules():  # all weights of which from_pretrained declares as learning
        if isinstance(module, LoRAExperts) and not config.train_base:
            for weight in (module.gate_up_proj, module.down_proj):
                weight.requires_grad_(False)
    return model


def checkpoint_tokenizer(name: str) -> Any:
    """Return the fast tokenizer of transformers beside the model that `find_model` finds."""
    tokenizer = load_pretrained(name, "AutoTokenizer")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise PiKVError(
            f"{name}: its tokenizer has no fast form", hint="save one with a tokenizer.json beside the model"
        )
    return tokenizer


def check_tokens(name: str, tokenizer: Any, source: Any) -> None:
    """Raise PiKVError where a task's tokens are not those of the trained model."""
    ours, theirs = source.tokenizer.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        same = sum(theirs.get(word) == number for word, number in ours.items())
        raise PiKVError(
            f"data: the task's {len(ours)} tokens are not those of train.init_from '{name}': {same} agree with its "
            f"{len(theirs)}",
            hint="give data.path, the data that it was trained on, or the same task, text and seed",
        )


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from listing the weights that one head has and another has not, as is meant here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_kind(name: str, config: Any, head: str, options: dict[str, Any]) -> None:
    """Raise where a model of this kind cannot have the head, or has fewer words than the task."""
    if head in WITHOUT_TOKENS and config.model_type != "pikv":
        raise UsageError(
            f"train.init_from: '{name}' is a '{config.model_type}', which reads tokens, and the task has none",
            hint="start from a model trained with model.arch: pikv on such a task",
        )
    has, wants = config.get_text_config(decoder=True).vocab_size, options.get("vocab_size", 0)
    if wants > has:
        raise PiKVError(
            f"train.init_from: '{name}' knows {has} tokens, the task has {wants}",
            hint="give data.path, the data that it was trained on, or the same task, text and seed",
        )


def _check_lengths(model: Any, recipe: TrainRecipe, lesson: Lesson) -> None:
    settings = recipe.train
    lengths = [*settings.curriculum, *(settings.eval_lengths if lesson.head == "causal-lm" else [])]
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        raise UsageError(
            f"train.curriculum: {max(lengths)} tokens are asked for, train.init_from knows {most} positions",
            hint="lower the lengths of curriculum and eval_lengths",
        )
