"""What holds of presses where kvpress is not installed, and of our cache beside libraries that wrap attention."""

import subprocess
import sys

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_core import presses
from pikv_core.cache import PiKVCache
from pikv_core.cache.attention import ENTRY
from pikv_core.errors import PiKVError


def test_without_kvpress_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    for ask in (lambda: presses.SnapKVPress, lambda: presses.press_for("snapkv")):
        with pytest.raises(PiKVError, match="presses need kvpress, which is not installed") as error:
            ask()
        assert error.value.hint == "pip install 'pikv[kvpress]'"


def test_presses_are_known_before_anything_heavy_is_imported():
    code = (
        "import sys; from pikv_core import presses; assert 'SnapKVPress' in dir(presses) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cache_works_after_a_library_has_wrapped_all_attention(small_model, monkeypatch):
    """As kvpress does on its import, by functions that ask keys for their shape."""
    model, ids = small_model("llama"), torch.arange(1, 30)[None]

    def wrapper(module, query, key, *args, **kwargs):
        raise AssertionError(f"a layer of our cache has no {key.shape}")

    cache = PiKVCache.for_model(model, {})
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ENTRY, wrapper)
    cache = PiKVCache.for_model(model, {})
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
