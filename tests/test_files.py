"""Files are written whole or not at all, and never over a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pikv_core.errors import PiKVError
from pikv_core.files import replacing, write_text


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "before")
    with pytest.raises(ValueError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert (tmp_path / "file").read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_by_a_folder_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "folder" / "old", "kept")
    with pytest.raises(PiKVError, match="is a folder"):
        write_text(tmp_path / "folder", "a file")
    assert (tmp_path / "folder" / "old").read_text() == "kept"
    with replacing(tmp_path / "folder") as temporary:
        write_text(temporary / "new", "whole")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["new"]
