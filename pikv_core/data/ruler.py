"""RULER's synthetic tasks (arXiv 2404.06654) as prompts of any length, for `pikv generate --prompts` and others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pikv_core.data import TASKS, corpus, tokenizer
from pikv_core.data.ruler_parts import Filler, Material
from pikv_core.data.ruler_tasks import DRAFTS, samples
from pikv_core.errors import PiKVError, UsageError, closest
from pikv_core.files import replacing, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pikv_core.runs import Reporter

FILE = "ruler.jsonl"
VOCAB_SIZE = 4096  # of the tokenizer that is trained where none is given


def _known(task: str) -> str:
    if task not in DRAFTS:
        text = f"unknown task of RULER '{task}'{closest(task, list(DRAFTS))}; a task is one of: {', '.join(DRAFTS)}"
        raise PydanticCustomError("component", "{text}", {"text": text})
    return task


@TASKS.register("ruler")
@dataclass(frozen=True)
class Ruler:
    """Options of the task: which of RULER's, their length in tokens, and whose tokens those are."""

    tasks: Annotated[list[Annotated[str, AfterValidator(_known)]], Field(min_length=1)] = field(
        default_factory=lambda: list(DRAFTS)
    )
    length: Annotated[int, Field(ge=64)] = 4096  # tokens of a prompt; the answer comes on top
    tokenizer: str | None = None  # a model folder or hub id; without it, one is trained on the text
    filler: Filler = "text"  # between needles: the text, or RULER's repeated noise sentences

    def write(
        self,
        folder: Path,
        num_samples: int,
        seed: int,
        text: list[str],
        column: str | None,
        reporter: Reporter,
    ) -> dict[str, int]:
        """Write `ruler.jsonl`, the tasks taking turns, and the tokenizer where it was trained here.

        A line has prompt, answers, task and length_tokens; question: how the prompt ends after its context;
        answer_tokens: what RULER lets a model write. Returns the number of samples by file.
        """
        tokens = open_tokenizer(self.tokenizer) if self.tokenizer is not None else None
        if (text or column) and tokens and self.filler == "noise" and "cwe" not in self.tasks:
            raise UsageError("text: these tasks among noise use no text", hint="choose filler 'text', or drop the text")
        documents = corpus.load(text, column, seed, reporter)
        every = documents.train + documents.test
        if tokens is None:
            reporter.status(f"training a tokenizer on {len(every)} documents")
            tokens = tokenizer.train_bpe(every, VOCAB_SIZE)
            tokenizer.save(tokens, folder / "tokenizer")

        def count(text: str) -> int:
            return len(tokens.encode(text, add_special_tokens=False).ids)

        drawn = samples(self.tasks, Material.of(every, self.filler, count), count, num_samples, self.length, seed)
        with replacing(folder / FILE) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for done, sample in enumerate(drawn):
                row = {
                    "task": sample.task,
                    "prompt": sample.prompt,
                    "question": sample.question + sample.opening,
                    "answers": sample.answers,
                    "length_tokens": count(sample.prompt),
                    "answer_tokens": sample.answer_tokens,
                }
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                reporter.progress(FILE, done, num_samples)
        write_json(folder / corpus.DESCRIPTION, documents.describe())
        return {FILE: num_samples}


def open_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a run folder, a model folder or a hub id; raise PiKVError where there is none."""
    from tokenizers import Tokenizer

    path = Path(name)
    if path.is_dir():
        folders = [folder for folder in (path / "model", path) if (folder / "tokenizer.json").is_file()]
        if not folders:
            raise UsageError(
                f"task.tokenizer: {name}: no tokenizer here: neither tokenizer.json nor model/tokenizer.json",
                hint="give a model folder, or a hub id of the form owner/name",
            )
        found = tokenizer.load(folders[0])
    else:
        try:
            found = Tokenizer.from_pretrained(name)
        except Exception as error:  # the library raises nothing narrower
            reason = str(error).strip().splitlines()[0]
            raise PiKVError(
                f"task.tokenizer: '{name}': no such folder, and the hub did not give it: {reason}",
                hint="check the name and the connection, or download it elsewhere and give the folder",
            ) from error
    found.no_truncation()
    found.no_padding()
    return found
