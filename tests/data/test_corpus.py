"""The corpus: the embedded one, files of users and what is wrong with them, and the split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pikv_core.data import corpus, stdlib_text, text_files
from pikv_core.data.text import Text, TextSource
from pikv_core.errors import PiKVError
from pikv_core.runs import Reporter

DOCUMENTS = ["first text", "второй текст\nв две строки", "third 文"]


def test_the_embedded_corpus_is_large_and_apart() -> None:
    found = corpus.load([], None, 0, Reporter())
    assert len(found.train) > 9 * len(found.test) - 9
    assert not set(found.train) & set(found.test)
    assert len(set(found.train)) == len(found.train)
    assert sum(map(len, found.train)) > 1_500_000
    # The interpreter's own view of the same docstring, which the reader took from the source text.
    assert json.JSONDecoder.raw_decode.__doc__ is not None
    start = json.JSONDecoder.raw_decode.__doc__.split("\n")[0]
    assert any(document.startswith(start) for document in found.train + found.test)


def test_docstrings_are_read_in_order_without_an_import(tmp_path: Path) -> None:
    long = "word " * 20
    (tmp_path / "b.py").write_text(
        f'"""Module. {long}"""\nraise SystemExit\ndef f():\n    """F. {long}"""\n    def g():\n'
        f'        """G. {long}"""\nclass C:\n    """Short."""\n    def m(self):\n        """M. {long}"""\n'
    )
    (tmp_path / "a.py").write_text(f'"""A. {long}"""\n')
    (tmp_path / "broken.py").write_text('"""not Python""" (\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text(f'"""T. {long}"""\n')
    found = [
        (module, text.split(".")[0])
        for module, tree in stdlib_text.trees(tmp_path)
        for node in stdlib_text.definitions(tree)
        if (text := stdlib_text.docstring(node))
    ]
    assert found == [("a", "A"), ("b", "Module"), ("b", "F"), ("b", "G"), ("b", "M")]


def write_all(folder: Path) -> None:
    (folder / "a.txt").write_text(DOCUMENTS[0], encoding="utf-8")
    (folder / "b.md").write_text(DOCUMENTS[1], encoding="utf-8-sig")
    rows = [{"text": text, "number": 1} for text in DOCUMENTS]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "e.bin").write_bytes(b"\xff")


def test_every_format_gives_its_documents(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert text_files.read([str(tmp_path)]) == [DOCUMENTS[0], DOCUMENTS[1], *DOCUMENTS, *DOCUMENTS]
    for name in ("c.jsonl", "d.parquet"):
        assert text_files.read([str(tmp_path / name)]) == DOCUMENTS


def test_a_column_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "hello", "text": 3}\n{"body": null}\n')
    assert text_files.read([str(tmp_path)], "body") == ["hello", ""]


def test_a_long_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "w" * (number % 700) for number in range(300)]
    (tmp_path / "x.txt").write_text("\n\n".join(paragraphs))
    parts = text_files.read([str(tmp_path)])
    assert len(parts) > 10
    assert "\n\n".join(parts).split("\n\n") == paragraphs
    assert max(map(len, parts)) < text_files.PART_CHARACTERS + 710


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', None, "x.jsonl:3: not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n["a"]\n', None, "x.jsonl:2: expected an object with the key 'text'"),
        ("x.jsonl", b'{"body": "a", "n": 1}\n', None, "x.jsonl:1: no column 'text'; present: 'body', 'n'"),
        ("x.jsonl", b'{"text": 5}\n', None, "x.jsonl:1: text: expected text, got int"),
        ("x.txt", b"fine\nfine\nb\xe9d", None, "x.txt:3: byte 0xe9 is not UTF-8"),
        ("x.txt", b"text", "body", "column: 'body' names a column of jsonl and parquet"),
        ("x.txt", b"  \n", None, "x.txt: no text found"),
        ("x.parquet", b"no parquet", None, "x.parquet: not a readable parquet file"),
        ("x.csv", b"a,b", None, "x.csv: unknown kind of text file '.csv'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, column: str | None, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(PiKVError) as caught:
        text_files.read([str(file)], column)
    assert message in caught.value.message


def test_a_missing_parquet_column_names_those_present(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(PiKVError, match=r"d\.parquet: no column 'body'; present: 'text', 'number'"):
        text_files.read([str(tmp_path / "d.parquet")], "body")


def test_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(PiKVError, match="nowhere: no such file or folder"):
        text_files.read([str(tmp_path / "nowhere")])
    with pytest.raises(PiKVError, match="no text found in the folder"):
        text_files.read([str(tmp_path)])


def test_splits_are_seeded_and_apart_and_hold_every_document_once(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(50)]
    rows = [{"text": text} for text in [*documents, *documents[:20], ""]]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, again, other = (corpus.load([str(tmp_path)], None, seed, Reporter()) for seed in (0, 0, 1))
    assert first == again
    assert first.test != other.test
    assert sorted(first.train + first.test) == sorted(documents)
    assert len(first.test) == 5
    assert len(corpus.load([str(tmp_path)], None, 0, Reporter(), max_documents=20).train) == 18


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("alone")
    with pytest.raises(PiKVError, match="1 document"):
        corpus.load([str(tmp_path)], None, 0, Reporter())


def test_text_batches_are_windows_of_their_split(text_folder: Path, tmp_path: Path) -> None:
    source = Text(vocab_size=500).open(None, 0, [str(text_folder)], None, Reporter())
    batch = source.batch(np.random.default_rng(0), 6, 50, "test")
    held_out = source.streams["test"].tolist()
    for row in batch.ids.tolist():
        assert any(held_out[at : at + 50] == row for at in range(len(held_out)))
    assert not batch.answer_mask.any()
    assert batch.text_mask[:, :-1].all()
    assert not batch.text_mask[:, -1].any()
    source.save(tmp_path / "model")
    again = TextSource.load(tmp_path / "model").batch(np.random.default_rng(0), 6, 50, "test")
    assert np.array_equal(again.ids, batch.ids)
