"""Flags that hold lists."""

from __future__ import annotations

import pytest

from pikv_cli.options import listed
from pikv_core.errors import UsageError


def test_a_list_has_numbers_as_numbers() -> None:
    assert listed("lru, 3,0.5,64GiB,") == ["lru", 3, 0.5, "64GiB"]
    assert listed(None) == []


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_a_list_that_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a list with commas"):
        listed(text)
