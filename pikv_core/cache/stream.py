"""A log of a generation's states in a folder or at any fsspec URL: written beside the run, read back bit for bit.

A segment is a safetensors file with what changed since the segment before, whose name and SHA-256 it holds; the
manifest holds those of the last one, under a checksum of its own. Every file is written under a temporary name, flushed
and renamed, the manifest last: what it leads to is whole, whenever the writing stops. A segment that holds a state
as a whole is begun anew once the changes have outgrown it, and frees what lies before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import queue
import re
import secrets
import threading
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from pikv_core.cache.cache import PiKVCache
from pikv_core.cache.changes import Change, Changes
from pikv_core.cache.ranks.log import RankReplay
from pikv_core.cache.snapshot import Snapshot, take
from pikv_core.errors import PiKVError, UsageError

FORMAT = "pikv-state-1"
MANIFEST, LOCK = "manifest.json", ".lock"
SEGMENT = re.compile(r"\d{8}-[0-9a-f]{8}\.safetensors")
ELSEWHERE = "give another folder with --save-state"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
MOST_WAITING = 2  # segments; a run that is faster than its disk waits


@dataclass(frozen=True)
class Link:
    """A segment's name in the folder, and the SHA-256 of its bytes."""

    file: str
    sha256: str

    @classmethod
    def read(cls, value: Any, where: str) -> Link:
        """Return the link in a manifest or segment; raise PiKVError where it could leave the folder."""
        file, sha256 = (value.get(name) for name in ("file", "sha256")) if isinstance(value, dict) else (None, None)
        if not (isinstance(file, str) and SEGMENT.fullmatch(file) and isinstance(sha256, str)):
            raise PiKVError(f"{where}: damaged: it names no segment", hint="this state cannot be gone on with")
        return cls(file, sha256)


@dataclass(frozen=True)
class Saved:
    """A state that was read: what the run is (`about`), its tokens [B,T], its cache, and what else was saved with it.

    link: where the log goes on.
    """

    about: dict[str, Any]
    tokens: torch.Tensor
    cache: Snapshot
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    link: Link


class Folder:
    """The files of a log, local or at an fsspec URL; each is whole or absent."""

    def __init__(self, url: str):
        self.url = url
        try:
            self._files, self.path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{url}: {error}", hint="give a folder, or a URL that fsspec can open") from error
        self.is_local = "file" in self._files.protocol if isinstance(self._files.protocol, tuple) else False

    def place(self, name: str) -> str:
        """Return the path of a file."""
        return f"{self.path}/{name}"

    def make(self) -> None:
        """Make the folder."""
        with self._told("cannot be made", hint=ELSEWHERE):
            self._files.makedirs(self.path, exist_ok=True)

    def exists(self, name: str) -> bool:
        with self._told("cannot be read"):
            return self._files.exists(self.place(name))

    def names(self) -> list[str]:
        """Return the names of all files."""
        with self._told("cannot be read"):
            return [path.rsplit("/", 1)[-1] for path in self._files.ls(self.path, detail=False)]

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raise PiKVError where there is none."""
        try:
            return self._files.cat_file(self.place(name))
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            what = "missing" if missing else f"cannot be read: {error.strerror or error}"
            raise PiKVError(f"{self.url}/{name}: {what}", hint="this state cannot be gone on with") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name, flush it to the disk and rename it."""
        temporary = self.place(f".{name}.{secrets.token_hex(4)}")
        with self._told(f"{name} cannot be written"):
            try:
                if self.is_local:  # without fsspec, whose Python would hold up the run's
                    with open(temporary, "wb", buffering=0) as file:
                        _write_all(file, data)
                        os.fsync(file.fileno())
                    os.replace(temporary, self.place(name))
                else:
                    self._files.pipe_file(temporary, data)
                    self._files.mv(temporary, self.place(name))
            except BaseException:
                with contextlib.suppress(OSError):
                    self._files.rm_file(temporary)
                raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._files.rm_file(self.place(name))

    @contextlib.contextmanager
    def _told(self, what: str, hint: str = "the state before it, if any, is intact") -> Any:
        try:
            yield
        except OSError as error:
            raise PiKVError(f"{self.url}: {what}: {error.strerror or error}", hint=hint) from error


def read(url: str) -> Saved:
    """Return the last state of a log; raise PiKVError, which names the file, where anything of it is not as written."""
    folder = Folder(url)
    manifest = _manifest(folder)
    chain = [Link.read(manifest.get("last"), f"{url}/{MANIFEST}")]
    while True:
        facts, _ = _opened(folder, chain[-1], with_tensors=False)
        if facts["before"] is None:
            break
        chain.append(Link.read(facts["before"], f"{url}/{chain[-1].file}"))
    replay, values = RankReplay(), {}
    tensors: dict[str, torch.Tensor] = {}
    for link in reversed(chain):
        facts, tensors = _opened(folder, link, with_tensors=True)
        replay.apply(facts["change"], tensors)
        values = facts["values"]
    beside = {name.removeprefix("beside/"): x for name, x in tensors.items() if name.startswith("beside/")}
    now = replay.snapshot()
    tokens = now.growing.pop("tokens")[..., 0]
    return Saved(manifest["about"], tokens, now, values, beside, chain[0])


def is_same_place(url: str, other: str) -> bool:
    """Return whether two URLs are of one folder."""
    first, second = Folder(url), Folder(other)
    if first.is_local and second.is_local:
        return os.path.realpath(first.path) == os.path.realpath(second.path)
    return url.rstrip("/") == other.rstrip("/")


def about(url: str) -> dict[str, Any]:
    """Return what the writer of a log said of its run."""
    return _manifest(Folder(url))["about"]


def _manifest(folder: Folder) -> dict[str, Any]:
    where = f"{folder.url}/{MANIFEST}"
    if not folder.exists(MANIFEST):
        raise UsageError(f"{folder.url}: no state here: it has no {MANIFEST}", hint="`--save-state DIR` writes one")
    check, _, data = folder.read(MANIFEST).partition(b"\n")
    if check != _checksum(data):
        raise PiKVError(f"{where}: damaged: its checksum differs", hint="this state cannot be gone on with")
    manifest = json.loads(data)
    if manifest.get("format") != FORMAT:
        raise PiKVError(
            f"{where}: format '{manifest.get('format')}' is unknown, known: {FORMAT}", hint="save the state anew"
        )
    return manifest


def _write_all(file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _serialized(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> bytes:
    """Return a safetensors file of dense tensors on the CPU.

    The library's own writer takes 40 µs of Python a tensor, for which the run would have to wait.
    """
    header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(facts)}}
    parts: list[Any] = [b"", b""]
    end = 0
    for name, x in sorted(tensors.items(), key=lambda named: -named[1].itemsize):  # so that all are aligned
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        parts.append(x.reshape(-1).view(torch.uint8).numpy())
        end += x.nbytes
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    parts[:2] = [len(told).to_bytes(8, "little"), told]
    return b"".join(parts)


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _opened(folder: Folder, link: Link, with_tensors: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a segment's facts and tensors, after its checksum."""
    data = folder.read(link.file)
    if hashlib.sha256(data).hexdigest() != link.sha256:
        raise PiKVError(
            f"{folder.url}/{link.file}: damaged: its checksum differs", hint="this state cannot be gone on with"
        )
    try:
        size = int.from_bytes(data[:8], "little")
        facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["facts"])
        return facts, safetensors.load(data) if with_tensors else {}
    except (ValueError, KeyError, SafetensorError) as error:
        raise PiKVError(f"{folder.url}/{link.file}: is no segment of a state: {error}") from error


class Writer:
    """Write a run's states, one after the other, on a thread of its own.

    about: what the run is, for whoever goes on with it. after: the state that the log goes on from. changes: who tells
    what has changed, where the cache is split over ranks. Raises UsageError where the folder holds a state already, and
    none is gone on from, or where another writer has it.
    """

    def __init__(self, url: str, about: dict[str, Any], after: Saved | None = None, changes: Changes | None = None):
        self._folder, self._about = Folder(url), about
        self._folder.make()
        self._lock = self._locked()
        if after is None and self._folder.exists(MANIFEST):
            self._unlock()
            raise UsageError(f"{url}: holds a state already", hint="go on with it by --resume, or give another folder")
        self._changes = Changes() if changes is None else changes
        self._last = None if after is None else after.link
        self._number = 0 if after is None else int(after.link.file[:8]) + 1
        self._written_bytes = self._whole_bytes = 0
        self.bytes_written = 0
        self.num_segments = 0
        self._waiting: queue.Queue[tuple[Change, dict[str, Any], dict[str, torch.Tensor]] | None] = queue.Queue(
            MOST_WAITING
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="state-writer", daemon=True)
        self._thread.start()

    def save(
        self, cache: PiKVCache, tokens: torch.Tensor, values: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Take the state now and write it soon; waits where the disk is behind. Raises what writing ran into.

        tokens: int64 [B,T], all there are so far. values: JSON values; tensors: small ones, such as random states.
        """
        self._raise()
        anew = self._written_bytes > 2 * self._whole_bytes
        now = take(cache)
        now.growing["tokens"] = tokens[..., None]
        change = self._changes.since(now, anew)
        self._written_bytes *= not anew
        num_bytes = sum(x.nbytes for x in change.tensors.values())
        if change.whole:
            self._whole_bytes = num_bytes
        elif not change.only_adds:
            self._written_bytes += num_bytes
        self._waiting.put((change, values, {name: x.clone() for name, x in tensors.items()}))

    def close(self) -> None:
        """Write what is still waiting; raises what that ran into."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._unlock()
        self._raise()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.close()
        else:
            with contextlib.suppress(PiKVError):
                self.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._write(*item)
                except BaseException as error:  # told by the next `save`, on the run's own thread
                    self._error = error

    def _write(self, change: Change, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        before = None if change.whole or self._last is None else vars(self._last)
        facts = {"change": change.facts, "values": values, "before": before}
        named = change.tensors | {f"beside/{name}": x for name, x in tensors.items()}
        data = _serialized(named, facts)
        if self._lock is None:
            self._refuse_another()
        link = Link(f"{self._number:08d}-{secrets.token_hex(4)}.safetensors", hashlib.sha256(data).hexdigest())
        self._folder.write(link.file, data)
        manifest = json.dumps({"format": FORMAT, "about": self._about, "last": vars(link)}).encode()
        self._folder.write(MANIFEST, _checksum(manifest) + b"\n" + manifest)
        self._last, self._number = link, self._number + 1
        self.bytes_written += len(data)
        self.num_segments += 1
        if change.whole:
            for name in self._folder.names():
                if SEGMENT.fullmatch(name) and name != link.file:
                    self._folder.remove(name)

    def _refuse_another(self) -> None:
        """Raise PiKVError where the manifest is not the one that was written last: another writer is at work."""
        held = None
        if self._folder.exists(MANIFEST):
            held = Link.read(_manifest(self._folder).get("last"), f"{self._folder.url}/{MANIFEST}")
        if held != self._last:
            raise PiKVError(f"{self._folder.url}: another run writes its state here", hint="give each its own folder")

    def _locked(self) -> int | None:
        """Hold the folder's lock, which a process leaves when it ends, however it ends; a URL has none."""
        if not self._folder.is_local:
            return None
        try:
            lock = os.open(self._folder.place(LOCK), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UsageError(
                f"{self._folder.url}: another run writes its state here", hint="give each its own folder"
            ) from error
        except OSError as error:
            raise PiKVError(
                f"{self._folder.url}: cannot be written: {error.strerror or error}", hint=ELSEWHERE
            ) from error
        return lock

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
