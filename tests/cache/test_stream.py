"""A state that was saved goes on as if nothing had happened, and one that was damaged is refused by name."""

import errno
import json
import re

import pytest
import torch
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

from pikv_core.cache import PiKVCache, stream
from pikv_core.cache.changes import Changes, Replay
from pikv_core.cache.snapshot import restore, take
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model.steps import prefill, step

RECIPES = [
    {},
    {"codec": "int4"},
    {"codec": "levels"},
    {"policy": "h2o", "budget": 0.3},
    {"policy": "h2o", "budget": 0.3, "codec": "int4"},
    {"policy": "random", "budget": 40},
    {"policy": "streaming-llm", "budget": 40, "rerotate": True},
    {"policy": "snapkv", "budget": 0.4, "allocation": "ada-kv", "codec": {"name": "int8", "group": 32}},
    {"policy": "quest", "budget": 48},
    {"policy": {"name": "quest", "dense_layers": 0}, "budget": 64, "codec": "int4"},
    {"policy": {"name": "expert-shards", "top_shards": 2, "newest": 24}},
    {"policy": "switch:h2o+tova", "budget": 0.3},
    {"policy": "expected-attention", "budget": 0.4},
    {"policy": "fastv", "budget": 0.7},
    {"policy": "h2o", "allocation": "entropy", "budget": 0.3},
]
H2O_INT4 = {"policy": "h2o", "budget": 0.3, "codec": "int4"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()


def filled(model, recipe, rows=2, length=150):
    cache = PiKVCache.for_model(model, recipe)
    ids = torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))
    return cache, ids, prefill(model, cache, ids)


def decode(model, cache, logits, count):
    """Return greedy tokens [B,count] and the logits after the last."""
    tokens = []
    for _ in range(count):
        tokens.append(logits.argmax(-1))
        logits = step(model, cache, tokens[-1])
    return torch.stack(tokens, 1), logits


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_cache_goes_on_from_changes_to_the_bit(model, recipe):
    cache, _, logits = filled(model, recipe)
    changes, replay = Changes(), Replay()
    for _ in range(6):
        change = changes.since(take(cache))
        replay.apply(json.loads(json.dumps(change.facts)), change.tensors)
        _, logits = decode(model, cache, logits, 13)
    change = changes.since(take(cache))
    replay.apply(json.loads(json.dumps(change.facts)), change.tensors)
    other = PiKVCache.for_model(model, recipe)
    restore(other, replay.snapshot(), torch.device("cpu"))
    assert [x.tolist() for x in other.positions] == [x.tolist() for x in cache.positions]
    ours, theirs = decode(model, cache, logits, 40), decode(model, other, logits, 40)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0], theirs[0])
    assert other.events == cache.events


def test_a_change_holds_the_new_tokens_alone(model):
    cache, _, logits = filled(model, {})
    changes = Changes()
    changes.since(take(cache))
    decode(model, cache, logits, 5)
    change = changes.since(take(cache))
    codes = [x for name, x in change.tensors.items() if "/codes/" in name]
    assert change.only_adds
    assert sum(x.nbytes for x in codes) == 3 * 2 * (
        2 * 2 * 5 * 16 * 4
    )  # layers, keys and values, rows × heads × tokens


@pytest.mark.parametrize("url", ["folder", "memory://states/of-a-test"])
@pytest.mark.parametrize("recipe", [{}, H2O_INT4], ids=str)
def test_a_log_holds_the_last_state(model, recipe, url, tmp_path):
    url = str(tmp_path / url) if url == "folder" else f"{url}/{tmp_path.name}"
    cache, ids, logits = filled(model, recipe, rows=1)
    about = {"prompt": "naïve ⊂ set"}
    with stream.Writer(url, about) as writer:
        for _ in range(12):
            writer.save(cache, ids, {"num_tokens": ids.shape[1]}, {"random": torch.get_rng_state()})
            new, logits = decode(model, cache, logits, 16)
            ids = torch.cat([ids, new], 1)
        writer.save(cache, ids, {"num_tokens": ids.shape[1]}, {"random": torch.get_rng_state()})
    saved = stream.read(url)
    assert (saved.about, saved.values) == (about, {"num_tokens": ids.shape[1]})
    assert torch.equal(saved.tokens, ids)
    assert torch.equal(saved.tensors["random"], torch.get_rng_state())
    other = PiKVCache.for_model(model, recipe)
    restore(other, saved.cache, torch.device("cpu"))
    assert torch.equal(decode(model, cache, logits, 20)[0], decode(model, other, logits, 20)[0])


def test_a_log_is_gone_on_with_and_stays_small(model, tmp_path):
    cache, ids, logits = filled(model, {"policy": "h2o", "budget": 40}, rows=1)
    url, sizes, saved = str(tmp_path / "state"), [], None
    for _ in range(4):
        with stream.Writer(url, {}, saved) as writer:
            for _ in range(25):
                new, logits = decode(model, cache, logits, 4)
                ids = torch.cat([ids, new], 1)
                writer.save(cache, ids, {}, {})
        sizes.append(sum(file.stat().st_size for file in (tmp_path / "state").iterdir()))
        saved = stream.read(url)
        assert torch.equal(saved.tokens, ids)
    assert sizes[-1] < 2 * sizes[0]


@pytest.fixture(scope="module")
def log(model, tmp_path_factory):
    url = tmp_path_factory.mktemp("states") / "state"
    cache, ids, logits = filled(model, {"codec": "int4"}, rows=1, length=70)
    with stream.Writer(str(url), {"recipe": {"model": "there"}}) as writer:
        for _ in range(4):
            writer.save(cache, ids, {"num_tokens": ids.shape[1]}, {"random": torch.get_rng_state()})
            new, logits = decode(model, cache, logits, 3)
            ids = torch.cat([ids, new], 1)
    return url


def test_no_flipped_bit_goes_unnoticed(log):
    files = sorted(file for file in log.iterdir() if file.name != stream.LOCK)
    assert len(files) == 5
    draw = torch.Generator().manual_seed(0)
    for file in files:
        whole = file.read_bytes()
        for _ in range(200):
            bit = int(torch.randint(8 * len(whole), (), generator=draw))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(PiKVError, match=re.escape(file.name)):
                stream.read(str(log))
        file.write_bytes(whole)
    stream.read(str(log))


def test_a_missing_segment_and_a_cut_one_are_named(log):
    for file in log.glob("*.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(PiKVError, match=f"{file.name}: damaged"):
            stream.read(str(log))
        file.unlink()
        with pytest.raises(PiKVError, match=f"{file.name}: missing"):
            stream.read(str(log))
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "00000000-0000000g.safetensors", 3, None])
def test_a_manifest_leads_nowhere_else(log, name):
    whole = (log / stream.MANIFEST).read_bytes()
    manifest = json.loads(whole.partition(b"\n")[2])
    manifest["last"]["file"] = name
    data = json.dumps(manifest).encode()
    (log / stream.MANIFEST).write_bytes(stream._checksum(data) + b"\n" + data)
    with pytest.raises(PiKVError, match="names no segment"):
        stream.read(str(log))
    (log / stream.MANIFEST).write_bytes(whole)


def test_one_writer_at_a_time(model, tmp_path):
    url = str(tmp_path / "state")
    cache, ids, _ = filled(model, {}, rows=1, length=20)
    with stream.Writer(url, {}) as writer:
        with pytest.raises(UsageError, match="another run writes"):
            stream.Writer(url, {})
        writer.save(cache, ids, {}, {})
    with pytest.raises(UsageError, match="holds a state already"):
        stream.Writer(url, {})


def test_writers_at_a_url_never_interleave(model):
    url = "memory://states/of-two"
    cache, ids, _ = filled(model, {}, rows=1, length=20)
    with stream.Writer(url, {}) as first:
        second = stream.Writer(url, {})
        first.save(cache, ids, {}, {})
        first.close()
        second.save(cache, ids, {}, {})
        with pytest.raises(PiKVError, match="another run writes"):
            second.close()
    assert torch.equal(stream.read(url).tokens, ids)


def test_a_full_disk_ends_in_one_error_and_leaves_the_state_before(model, tmp_path, monkeypatch):
    url = str(tmp_path / "state")
    cache, ids, logits = filled(model, {}, rows=1, length=20)
    writer = stream.Writer(url, {})
    writer.save(cache, ids, {}, {})
    writer.close()
    saved = stream.read(url)

    class Full:
        def __init__(self, *how, **options):
            self.file = open(*how, **options)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "open", Full, raising=False)
    writer = stream.Writer(url, {}, saved)
    new, _ = decode(model, cache, logits, 2)
    writer.save(cache, torch.cat([ids, new], 1), {}, {})
    with pytest.raises(PiKVError, match="No space left"):
        writer.close()
    monkeypatch.undo()
    assert torch.equal(stream.read(url).tokens, ids)
    assert not [file for file in (tmp_path / "state").iterdir() if file.name.startswith(".0")]


def test_a_cache_that_is_held_has_no_state(model):
    cache = PiKVCache.for_model(model, {})
    cache.hold()
    with pytest.raises(PiKVError, match="held"):
        take(cache)


def test_no_state_is_told(tmp_path):
    with pytest.raises(UsageError, match="no state here"):
        stream.read(str(tmp_path))
