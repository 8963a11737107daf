"""A trace's file: rows come back as they were, top-p keeps the least that is enough, damage is told in one line."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pikv_core.errors import PiKVError
from pikv_core.simulation.attention.trace import Header, load
from pikv_core.simulation.attention.writer import AttentionWriter

H, G, D, PROMPT, TOKENS, FIRST = 4, 2, 3, 6, 9, 2
HEADER = Header("small", "float32", 2, H, G, D, (None, 4), PROMPT, TOKENS, FIRST, 1.0)


def causal(random, layer=0):
    """Return softmax rows [H,N,S] of the queries from FIRST on."""
    logits = 3 * random.standard_normal((H, TOKENS, TOKENS))
    logits[:, ~np.tri(TOKENS, dtype=bool)] = -np.inf
    weights = np.exp(logits)
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)[:, FIRST:]


def write(path, rows, top_p=1.0, dtype="float32", vectors=True, seed=0):
    writer, random = AttentionWriter(top_p, dtype), np.random.default_rng(seed)
    for layer in range(HEADER.num_layers):
        for start, end in ((0, 3), (3, 4), (4, TOKENS - FIRST)):
            writer.add_rows(layer, rows[:, start:end, : FIRST + end])
        if vectors:
            writer.add_vectors(layer, "keys", random.standard_normal((G, TOKENS, D)).astype(np.float32))
            writer.add_vectors(layer, "queries", random.standard_normal((H, TOKENS, D)).astype(np.float32))
    writer.write(path, dataclasses.replace(HEADER, top_p=top_p))
    return load(path)


@pytest.mark.parametrize(("first", "end"), [(FIRST, TOKENS), (3, 7), (TOKENS - 1, TOKENS)])
def test_rows_come_back_as_they_were(first, end, tmp_path):
    rows = causal(np.random.default_rng(1))
    trace = write(tmp_path / "a.safetensors", rows)
    for layer in range(2):
        np.testing.assert_array_equal(trace.rows(layer, first, end), rows[:, first - FIRST : end - FIRST, :end])
        assert not trace.sinks(layer, first, end).any()
    assert trace.header == HEADER
    assert trace.recorded_mass() == pytest.approx(1, abs=1e-6)
    assert trace.vectors(1, "keys").shape == (G, TOKENS, D)


def test_what_no_token_got_is_kept_as_the_sinks(tmp_path):
    rows = causal(np.random.default_rng(1)) * np.float32(0.75)
    trace = write(tmp_path / "a.safetensors", rows, vectors=False)
    np.testing.assert_allclose(trace.sinks(0, 3, 8), 0.25, atol=1e-6)
    assert trace.recorded_mass() == pytest.approx(1, abs=1e-6)
    assert trace.holds == {"attention"}
    assert trace.vectors(0, "queries") is None


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.9, 0.999]))
def test_top_p_keeps_the_least_entries_that_are_enough(tmp_path_factory, seed, top_p):
    rows = causal(np.random.default_rng(seed))
    trace = write(tmp_path_factory.mktemp("trace") / "a.safetensors", rows, top_p)
    for query in range(FIRST, TOKENS):
        for whole, kept in zip(rows[:, query - FIRST].tolist(), trace.rows(0, query, query + 1)[:, 0].tolist()):
            falling = sorted(whole, reverse=True)
            needed = next(count for count in range(1, 99) if sum(falling[:count]) >= top_p * sum(whole) - 1e-12)
            assert sorted(kept, reverse=True)[:needed] == falling[:needed]
            assert sum(x > 0 for x in kept) == needed
    assert trace.recorded_mass() >= top_p


def test_float16_rounds_to_eleven_bits(tmp_path):
    rows = causal(np.random.default_rng(1))
    trace = write(tmp_path / "a.safetensors", rows, dtype="float16")
    np.testing.assert_allclose(trace.rows(0, FIRST, TOKENS), rows, rtol=2**-11, atol=3e-8)
    with pytest.raises(PiKVError, match="too large for a trace in float16"):
        AttentionWriter(1.0, "float16").add_vectors(0, "keys", np.full((1, 1, 1), 1e5, np.float32))


def damaged(path, change):
    """Rewrite the file with `change` made to its tensors and its metadata, of which the one entry is not yet JSON."""
    tensors = load_file(path)
    told = {"version": "1", **dataclasses.asdict(HEADER)}
    metadata = {"pikv-attention": told}
    change(tensors, metadata)
    save_file(tensors, path, {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items()})


def set_entry(tensors, name, index, value):
    tensors[name][index] = value


def retype(tensors, name, dtype):
    tensors[name] = tensors[name].astype(dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, told: told.clear(), "is not a trace of attention"),
        (lambda tensors, told: told["pikv-attention"].update(version="9"), "of version '9'"),
        (lambda tensors, told: told.update({"pikv-attention": "{"}), "damaged"),
        (lambda tensors, told: told.update({"pikv-attention": []}), "damaged"),
        (lambda tensors, told: told["pikv-attention"].pop("model"), "damaged"),
        (lambda tensors, told: told["pikv-attention"].update(num_layers="many"), "damaged"),
        (lambda tensors, told: told["pikv-attention"].update(top_p=1.5), "top_p 1.5 is no share"),
        (lambda tensors, told: told["pikv-attention"].update(top_p=float("nan")), "top_p nan is no share"),
        (lambda tensors, told: told["pikv-attention"].update(windows=[0, None]), "windows of"),
        (lambda tensors, told: told["pikv-attention"].update(windows=[4, 5]), "windows of"),
        (lambda tensors, told: told["pikv-attention"].update(head_dim=0), "a head of 0 channels"),
        (lambda tensors, told: tensors.pop("layers.1.values"), "damaged"),
        (lambda tensors, told: retype(tensors, "layers.1.indices", np.float32), "are int64, float32 and"),
        (lambda tensors, told: retype(tensors, "layers.1.values", np.int8), "uint16 and int8"),
        (lambda tensors, told: retype(tensors, "layers.1.row_starts", np.float64), "are float64"),
        (lambda tensors, told: retype(tensors, "layers.0.keys", np.int8), "layers.0.keys is int8"),
        (lambda tensors, told: set_entry(tensors, "layers.1.keys", 0, np.inf), "layers.1.keys is not finite"),
        (lambda tensors, told: tensors.update({"layers.1.values": np.ones(3, np.float32)}), "do not fit its entries"),
        (lambda tensors, told: set_entry(tensors, "layers.0.indices", 0, TOKENS), "tokens after it"),
        (lambda tensors, told: set_entry(tensors, "layers.0.values", 0, np.nan), "not finite"),
        (lambda tensors, told: set_entry(tensors, "layers.0.row_starts", -1, 1), "do not fit its entries"),
        (lambda tensors, told: tensors.update({"layers.1.keys": np.ones((1, 2, 3), np.float32)}), "layers.1.keys"),
        (lambda tensors, told: tensors.pop("layers.1.queries"), "only some layers have queries"),
    ],
)
def test_a_damaged_trace_is_refused_in_one_line(change, message, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, causal(np.random.default_rng(1)))
    damaged(path, lambda tensors, told: None)
    load(path)
    damaged(path, change)
    with pytest.raises(PiKVError, match=message) as caught:
        load(path)
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_what_is_no_trace_is_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PiKVError) as caught:
        load(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(("name", "kind"), [("-", "stdin"), (".", "a folder")])
def test_stdin_and_folders_are_refused(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PiKVError, match=f"read from a file, and this is {kind}"):
        load(name)


def test_the_file_may_be_read_by_whom_other_files_may_be(tmp_path):
    write(tmp_path / "a.safetensors", causal(np.random.default_rng(1)))
    (tmp_path / "other").write_text("")
    modes = [path.stat().st_mode for path in (tmp_path / "a.safetensors", tmp_path / "other")]
    assert modes[0] == modes[1]


def test_what_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    def fail(*_):
        raise SafetensorError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(PiKVError, match="cannot be written: no space left"):
        write(tmp_path / "a.safetensors", causal(np.random.default_rng(1)))
    assert not list(tmp_path.iterdir())


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, causal(np.random.default_rng(1)))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(PiKVError, match="damaged"):
        load(path)
