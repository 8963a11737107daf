"""Fresh memory shows what nobody wrote, and that something was written beside it."""

import pytest
import torch
from guarded_memory import guarded_memory

MAKERS = {
    "empty": lambda dtype: torch.empty(2, 3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(2, 3, dtype=dtype)),
    "new_empty": lambda dtype: torch.zeros(1).new_empty(2, 3, dtype=dtype),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_what_is_written_inside_alone_passes(dtype, maker):
    with guarded_memory():
        made = MAKERS[maker](dtype)
        assert made.shape == (2, 3) and made.is_contiguous() and made.dtype == dtype
        assert made.isnan().all() if dtype.is_floating_point else (made == 0xA5).all()
        made.zero_()
    assert torch.empty(1)._base is None


@pytest.mark.parametrize("offset", [-1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_what_is_written_beside_is_told(dtype, offset):
    with pytest.raises(AssertionError, match="1 numbers were written beside fresh memory of 6"), guarded_memory():
        made = torch.empty(2, 3, dtype=dtype)
        made.as_strided((1,), (1,), made.storage_offset() + offset).zero_()
