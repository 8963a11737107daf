"""A folder of prompt blocks, of which a policy of the request-level simulation says which stay within a byte budget.

Which blocks the folder holds follows from its log of requests, replayed under its policy: blocks are written before the
request that brought them is, and those that had to leave are removed after it. Whenever a process ends, what the log
says is held lies there as a whole; what it does not know is removed when the store is opened. One process at a time
has a store.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pikv_core.cache.prefix.blocks import Block, Damaged, chain, pack, unpack
from pikv_core.cache.prefix.folder import check_same, locked, read_manifest, remove, write, write_manifest
from pikv_core.cache.prefix.identity import check_block_policy
from pikv_core.cache.prefix.log import RequestLog
from pikv_core.components import build
from pikv_core.errors import PiKVError
from pikv_core.files import make_folder
from pikv_core.schema import PrefixSettings, parse_bytes
from pikv_core.simulation.online import OnlineReplay, Request
from pikv_core.simulation.policies import REQUEST_POLICIES

MANIFEST, BLOCKS = "manifest.json", "blocks"
BLOCK = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class Measured:
    """What a live block tells: bytes of its file, heads and channels [G,D] of each layer, tokens coded at once."""

    block_bytes: int
    sizes: list[list[int]]
    unit_tokens: int


@dataclass(frozen=True)
class PrefixReport:
    """What a run had from a store; hits, accesses and ratios in the words of `simulate-cache`, of this run's requests.

    lost_blocks: those that would have been hits, had the file of the first of them not been missing or damaged; in a
    replay of the log they are. reused_tokens: those that were not computed; a prompt's last ones always are. evictions,
    expirations, resident and log bytes: of the store, as it is now.
    """

    store: str
    policy: str
    touch: str
    capacity_blocks: int
    block_tokens: int
    block_bytes: int
    block_hits: int
    block_accesses: int
    block_hit_ratio: float
    token_hit_ratio: float
    lost_blocks: int
    reused_tokens: int
    evictions: int
    expirations: int
    resident_blocks: int
    resident_bytes: int
    log_bytes: int
    load_s: float
    save_s: float


@dataclass
class Arrival:
    """A request that is being served: the hashes of its blocks, how many leading ones can be had, and when it came."""

    keys: list[str]
    hits: int
    request: Request
    staying: set[int] = field(default_factory=set)


class PrefixStore:
    """Serve prompts one after the other: `arrive`, `load`, `keep`, `finish`; `close` at the end.

    identity: what blocks belong to; a store of another is refused. measure: makes a block and tells of it. say: is told
    of what is lost. clock: seconds.
    """

    def __init__(
        self,
        folder: str,
        settings: PrefixSettings,
        identity: dict[str, Any],
        measure: Callable[[], Measured],
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ):
        self.path, self._say, self._clock = Path(folder), say, clock
        try:
            self._blocks = make_folder(self.path / BLOCKS)
        except PiKVError as error:
            raise PiKVError(error.message, hint="give another folder with --prefix-cache") from error
        self._lock = locked(self.path)
        try:
            self._open(settings, identity, measure)
        except BaseException:
            if not (self.path / MANIFEST).exists():  # what the folder holds is somebody else's
                with suppress(OSError):
                    self._blocks.rmdir()
            os.close(self._lock)
            raise

    def _open(self, settings: PrefixSettings, identity: dict[str, Any], measure: Callable[[], Measured]) -> None:
        file = self.path / MANIFEST
        if file.exists():
            about = read_manifest(file)
            check_same(self.path, about, settings, identity)
        elif any(self.path.glob("*.jsonl")) or any(self._blocks.iterdir()):
            raise PiKVError(f"{file}: missing, and the folder is not empty", hint="give an empty folder or a new one")
        else:
            kept = settings.model_dump(mode="json")
            about = {"identity": identity, "settings": kept, "measured": vars(measure())}
        self.measured = Measured(**about["measured"])
        self.settings = PrefixSettings.model_validate(about["settings"])
        self.policy = build(REQUEST_POLICIES, self.settings.policy)
        check_block_policy(self.policy)
        self._capacity = _capacity(self.settings, self.measured)
        self._root = json.dumps(identity, sort_keys=True)
        if not file.exists():
            write_manifest(file, about)
        self._log = RequestLog(self.path, self.settings.block_tokens)
        self._replay = self._replayed()
        self._first = self._replay.num_requests
        self._lost = self._hits = self._hit_tokens = self._reused = 0
        self._load_s = self._save_s = 0.0
        names = os.listdir(self._blocks)
        self._on_disk = {_id(name[:64]): name[:64] for name in names if BLOCK.fullmatch(name)}
        self._remove_others()
        for name in {*names} - {self._file(key).name for key in self._on_disk.values()}:
            remove(self._blocks / name)
        if missing := len(self._replay.residents() - self._on_disk.keys()):
            self._say(f"prefix store: {missing} of the blocks that {self.path} should hold are missing")

    def _replayed(self) -> OnlineReplay:
        """Return the policy's state after the log."""
        tokens, touch = self.settings.block_tokens, self.settings.touch
        return OnlineReplay(self.policy, self._capacity, tokens, touch, self._log.requests)

    def arrive(self, tokens: list[int]) -> Arrival:
        """Let the policy take note of a prompt; what it decides is carried out by `keep` and `finish`."""
        if self._replay.num_requests > len(self._log.requests):  # the prompt before was not finished
            self._replay = self._replayed()
        keys = chain(tokens, self.settings.block_tokens, self._root)
        now_ms = max(self._log.requests[-1].timestamp_ms if self._log.requests else 0, round(1000 * self._clock()))
        arrival = Arrival(keys, 0, Request([_id(key) for key in keys], now_ms, len(tokens)))
        arrival.hits = self._replay.serve(arrival.request)
        arrival.staying = self._replay.residents()
        return arrival

    def load(self, arrival: Arrival, num_blocks: int) -> list[Block]:
        """Return the first blocks of a prompt, up to one that is missing or damaged; that is told, and no hit."""
        started = time.perf_counter()
        blocks: list[Block] = []
        for place, key in enumerate(arrival.keys[: arrival.hits]):
            if place >= num_blocks and _id(key) in self._on_disk:
                continue
            try:
                block = unpack(self._file(key).read_bytes(), key)
            except (Damaged, OSError) as error:
                self._on_disk.pop(_id(key), None)
                self._lost += arrival.hits - place
                reason = error.strerror if isinstance(error, OSError) else error
                self._say(f"prefix store: {self._file(key)} counts as missing: {reason}")
                arrival.hits = place
                break
            blocks.append(block)
        self._load_s += time.perf_counter() - started
        return blocks

    def keep(self, arrival: Arrival, computed: int, take: Callable[[int], Block]) -> None:
        """Write those blocks of a prompt that stay and are not there.

        computed: place of the first block that `take` can give.
        """
        started = time.perf_counter()
        for place, key in enumerate(arrival.keys[computed:], computed):
            if _id(key) in arrival.staying and _id(key) not in self._on_disk:
                data = pack(take(place), key)
                assert len(data) == self.measured.block_bytes
                write(self._file(key), data)
                self._on_disk[_id(key)] = key
        self._save_s += time.perf_counter() - started

    def finish(self, arrival: Arrival, reused_tokens: int, output_tokens: int) -> None:
        """Log a request, and remove what had to leave."""
        started = time.perf_counter()
        request = Request(
            arrival.request.ids, arrival.request.timestamp_ms, arrival.request.input_tokens, output_tokens
        )
        self._log.append(request)
        self._remove_others()
        self._hits += arrival.hits
        self._hit_tokens += arrival.hits * self.settings.block_tokens
        self._reused += reused_tokens
        self._save_s += time.perf_counter() - started

    def report(self) -> PrefixReport:
        """Tell what the requests since the store was opened had from it."""
        row = self._replay.row(self._first)
        sizes = [self._file(key).stat().st_size for key in self._on_disk.values()]
        return PrefixReport(
            store=str(self.path),
            policy=self.settings.policy.label(),
            touch=row.touch,
            capacity_blocks=row.capacity_blocks,
            block_tokens=self.settings.block_tokens,
            block_bytes=self.measured.block_bytes,
            block_hits=self._hits,
            block_accesses=row.block_accesses,
            block_hit_ratio=self._hits / max(1, row.block_accesses),
            token_hit_ratio=self._hit_tokens / max(1, sum(x.input_tokens for x in self._log.requests[self._first :])),
            lost_blocks=self._lost,
            reused_tokens=self._reused,
            evictions=row.evictions,
            expirations=row.expirations,
            resident_blocks=len(sizes),
            resident_bytes=sum(sizes),
            log_bytes=self._log.num_bytes,
            load_s=self._load_s,
            save_s=self._save_s,
        )

    def close(self) -> None:
        """Let another process have the store."""
        self._log.close()
        os.close(self._lock)

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _file(self, key: str) -> Path:
        return self._blocks / f"{key}.safetensors"

    def _remove_others(self) -> None:
        """Remove what the policy does not hold."""
        for block in self._on_disk.keys() - self._replay.residents():
            remove(self._file(self._on_disk.pop(block)))


def _capacity(settings: PrefixSettings, measured: Measured) -> int:
    """Return how many blocks the budget is for; raise PiKVError where it is for none."""
    budget = parse_bytes(settings.bytes)
    assert budget is not None
    if budget < measured.block_bytes:
        raise PiKVError(
            f"a prefix store of {settings.bytes} holds no block: one is {measured.block_bytes:,} bytes",
            hint="raise --prefix-bytes, or lower prefix.block_tokens",
        )
    return budget // measured.block_bytes


def _id(key: str) -> int:
    """Return what the log calls a block: 63 bits of its hash."""
    return int(key[:16], 16) >> 1
