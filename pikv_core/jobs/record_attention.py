"""Record the attention of a run of `generate`: from the cache that it goes through into a trace file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pikv_core.cache import PiKVCache
from pikv_core.cache.recording import Recorder
from pikv_core.observation import ALL
from pikv_core.schema.generate import RecordSettings
from pikv_core.simulation.attention.trace import Header
from pikv_core.simulation.attention.writer import AttentionWriter

if TYPE_CHECKING:
    from pikv_core.model.loading import LoadedModel


class Recording:
    """Record all that a cache, still empty, is fed, for a trace at `path`."""

    def __init__(self, path: str, settings: RecordSettings, cache: PiKVCache):
        self._path, self._settings, self._cache = path, settings, cache
        self._writer = AttentionWriter(settings.top_p, settings.dtype)
        self._recorder = Recorder(self._writer, settings.prompt_queries or ALL, settings.vectors)
        cache.record(self._recorder)

    def write(self, num_prompt_tokens: int, loaded: LoadedModel) -> None:
        """Write the trace; num_prompt_tokens: those that were fed at once."""
        layers = self._cache.own_layers
        _, num_kv_heads, head_dim = layers[0].dimensions
        num_rows = min(self._settings.prompt_queries or num_prompt_tokens, num_prompt_tokens)
        header = Header(
            model=loaded.source,
            dtype=str(loaded.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            num_layers=len(layers),
            num_heads=loaded.model.config.get_text_config(decoder=True).num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            windows=tuple(layer.window for layer in layers),
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=self._recorder.num_tokens,
            first_query=num_prompt_tokens - num_rows,
            top_p=self._settings.top_p,
        )
        self._writer.write(self._path, header)
