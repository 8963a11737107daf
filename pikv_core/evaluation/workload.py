"""What every cell of a sweep is measured on: drawn once, the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pikv_core.evaluation.prompts import RecallPrompts, TextWindows, read_text, recall_prompts, text_windows
from pikv_core.evaluation.speed import NUM_STEPS
from pikv_core.model.loading import LoadedModel
from pikv_core.schema import CompressRecipe

if TYPE_CHECKING:
    from pikv_core.evaluation.ruler import RulerSamples
    from pikv_core.runs import Reporter


@dataclass(frozen=True)
class Workload:
    """Prompts, texts and samples; None where nobody asks for them.

    windows: contexts of `context_tokens` and what goes on after them. answers_alone: whether the perplexity is that of
    the recall answers, because no text speaks to the model.
    """

    tasks: frozenset[str]
    windows: TextWindows
    context_tokens: int
    answers_alone: bool
    prompts: list[RecallPrompts] | None
    ruler: RulerSamples | None
    question: Literal["inside", "after"]
    batch_size: int

    @classmethod
    def of(cls, recipe: CompressRecipe, loaded: LoadedModel, reporter: Reporter) -> Workload:
        """Draw what the recipe's tasks need, as its seed says."""
        longest = recipe.context_tokens + max(recipe.continuation_tokens + 1, 2 * NUM_STEPS)
        loaded.check_length(longest, reporter)
        text = read_text(loaded, recipe.text, recipe.column, recipe.seed, reporter)
        prompts = None
        if "recall" in recipe.tasks or text is None:
            stream = None if text is None else text[0]
            prompts = recall_prompts(loaded, stream, recipe.num_queries, recipe.context_tokens, recipe.seed)
        if text is not None:
            length = recipe.context_tokens + recipe.continuation_tokens + 1
            windows = text_windows(loaded, *text, recipe.num_texts, length, recipe.seed)
            context_tokens = recipe.context_tokens
        else:
            assert prompts is not None
            windows = TextWindows(prompts[0].joined(recipe.num_texts), prompts[0].source)
            context_tokens = prompts[0].context.shape[1]
        return cls(
            frozenset(recipe.tasks),
            windows,
            context_tokens,
            text is None,
            prompts,
            _ruler(recipe, loaded, reporter) if "ruler" in recipe.tasks else None,
            recipe.question,
            recipe.batch_size,
        )

    @property
    def num_queries(self) -> int:
        """Count the recall questions."""
        return sum(group.depth.numel() for group in self.prompts or [])

    @property
    def perplexity_of(self) -> str:
        """Say which tokens the perplexity is of."""
        return "the answers to the recall questions" if self.answers_alone else self.windows.source


def _ruler(recipe: CompressRecipe, loaded: LoadedModel, reporter: Reporter) -> RulerSamples:
    from pikv_core.data.ruler_tasks import DRAFTS
    from pikv_core.evaluation.ruler import ruler_samples

    tasks = recipe.ruler_tasks or list(DRAFTS)
    samples = ruler_samples(loaded.tokenizer, tasks, recipe.ruler_samples, recipe.context_tokens, recipe.seed)
    loaded.check_length(samples.num_tokens, reporter)
    return samples
