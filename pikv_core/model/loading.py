"""Load a causal language model and its tokenizer from a run folder, a model folder or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pikv_core.cache import PiKVCache
from pikv_core.cache.attention import chosen_kernels
from pikv_core.errors import PiKVError
from pikv_core.runs import Reporter, find_model
from pikv_core.schema import Recipe
from pikv_kernels.backends import newest_forced

REPEAT = "\n\nRepeat the previous context exactly.\n\n"  # asks a model for what KVzip (2505.23416) scores by


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the folder or hub id it came from."""

    model: Any
    tokenizer: Any
    source: str

    @property
    def folder(self) -> Path | None:
        return Path(self.source) if Path(self.source).is_dir() else None

    def check_length(self, num_tokens: int, reporter: Reporter) -> None:
        """Raise where a model with learned positions has none for so many tokens; tell where rotary ones go beyond."""
        config = self.model.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None)
        if most is None or num_tokens <= most:
            return
        text = f"{num_tokens} tokens are needed, the model knows {most} positions"
        if getattr(config, "rope_parameters", None) is None:
            raise PiKVError(f"{self.source}: {text}", hint="shorten the prompt or the continuation")
        reporter.status(f"beyond what the model was made for: {text}")

    def new_cache(self, recipe: Any) -> PiKVCache:
        """Return a cache for this model from whatever `PiKVCache.from_recipe` takes, with words for policies that look.

        A tokenizer that does not know them gives none: then the context itself is all that is shown.
        """
        cache = PiKVCache.for_model(self.model, recipe)
        if cache.looks == "repeat":
            ids = self.tokenizer(REPEAT, add_special_tokens=False, return_tensors="pt")["input_ids"]
            known = self.tokenizer.unk_token_id is None or not bool((ids == self.tokenizer.unk_token_id).any())
            cache.repeat_words = ids if known else None
        if newest_forced() is not None:
            cache.check_backend(self.model)
        return cache

    @property
    def backend(self) -> str:
        """Name what computes attention, where, and in which precision."""
        return f"torch on {self.model.device.type}, {str(self.model.dtype).removeprefix('torch.')}"

    @property
    def backends(self) -> dict[str, str]:
        """Name what computes attention, and which implementation of each operation has run so far, and why."""
        return {"attention": self.backend, **chosen_kernels()}


def prepare(recipe: Recipe) -> torch.device:
    """Set threads and seed as the recipe says, and return its device."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    return device_of(recipe)


def device_of(recipe: Recipe) -> torch.device:
    """Return the device that a recipe asks for."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise PiKVError("device 'cuda' is asked for, but torch sees no CUDA device", hint="use --device cpu or auto")
    wanted = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def load_model(name: str, recipe: Recipe) -> LoadedModel:
    """Load what `find_model` finds, in the recipe's dtype on its device."""
    device = prepare(recipe)
    model = load_pretrained(name, "AutoModelForCausalLM", "auto" if recipe.dtype == "auto" else recipe.dtype)
    return LoadedModel(model.to(device).eval(), load_pretrained(name, "AutoTokenizer"), find_model(name))


def load_pretrained(name: str, auto_class: str, dtype: str | None = None, **options: Any) -> Any:
    """Load a run folder, model folder or hub id by one of transformers' Auto classes, or a class of our models.

    dtype: of the weights, or "auto" for the stored one. options: what else from_pretrained is told. Raises PiKVError
    where there is no such model.
    """
    import huggingface_hub
    import transformers
    from transformers.utils.logging import disable_progress_bar

    import pikv_core.model  # registers our own architecture

    disable_progress_bar()  # ours goes to stderr, and only on a terminal
    huggingface_hub.logging.set_verbosity_error()  # every retry would be a line; the error is ours to tell
    source = find_model(name)
    family = getattr(transformers, auto_class, None) or getattr(pikv_core.model, auto_class)
    try:
        return family.from_pretrained(source, **({"dtype": dtype} if dtype else {}), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(source).is_dir():
            raise PiKVError(f"{source}: cannot load the model: {reason}") from error
        raise PiKVError(
            f"model '{name}': no such folder, and the hub did not give it: {reason}",
            hint="check the name and the connection, or download it elsewhere and give the folder",
        ) from error
