"""A small corpus of drawn sentences, as documents and as a folder of text files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def documents() -> list[str]:
    """Return distinct documents of drawn words, about 600 characters each."""
    rng = np.random.default_rng(5)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(300)]
    return [f"Document {number}: " + " ".join(rng.choice(words, size=100)) + "." for number in range(60)]


@pytest.fixture
def text_folder(tmp_path: Path, documents: list[str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:02}.txt").write_text(document, encoding="utf-8")
    return folder
