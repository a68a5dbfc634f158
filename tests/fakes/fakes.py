"""Fakes of everything that stands around the services, in memory and in one process.

`MemoryStore`, `MemoryLog` with `MemoryPublisher`, `MemoryUpstream` and `Clock` do what the real ones do, at once.
`Crossings` breaks calls across these ports: it counts them, and a schedule says which one fails and how. `Oracle` says
what the summaries must be, from what the upstream holds and what was requested, by arithmetic of its own.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import datetime as dt
import enum
import functools
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Self, TypeVar

import msgspec

from services.aggregate.replay.topic_reader import Pair
from services.ingest.upstream.client import (
    Download,
    PermanentUpstreamError,
    TransientUpstreamError,
    Upstream,
    UpstreamDown,
    Validators,
)
from shared.domain import events
from shared.domain.ids import RequestId
from shared.domain.topics import Topic, partition_of
from shared.kafka.producer import ConsumedRecord, LogUnavailable, OutgoingEvent, Publisher, as_dead_letter
from shared.storage.object_store import (
    UPLOAD_PART_BYTES,
    AdminObjectStore,
    CasConflict,
    ObjectInfo,
    ObjectMissing,
    ObjectStore,
    StoredObject,
    StoreUnavailable,
    UnfinishedUpload,
    Upload,
)

PARTITIONS = 3
STREAM_CHUNK_BYTES = 7  # so that a record is cut anywhere

_Result = TypeVar("_Result")


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: dt.datetime) -> None:
        self.now = now

    def __call__(self) -> dt.datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += dt.timedelta(seconds=seconds)


class BucketObject(msgspec.Struct, frozen=True):
    """An object as `MemoryStore` holds it."""

    body: bytes
    etag: str
    last_modified: dt.datetime


class MemoryStore:
    """An AdminObjectStore whose ETags are MD5 sums, as S3's are, so that equal bytes have equal ETags.

    An upload of more than ``part_bytes`` is one of several parts: until it ends it is among ``unfinished``.
    """

    def __init__(self, clock: Callable[[], dt.datetime], *, part_bytes: int = UPLOAD_PART_BYTES) -> None:
        self._clock = clock
        self._part_bytes = part_bytes
        self._uploads = 0
        self.objects: dict[str, BucketObject] = {}
        self.unfinished: list[UnfinishedUpload] = []

    def bodies(self, prefix: str) -> dict[str, bytes]:
        """Return what lies under ``prefix``, by key."""
        return {key: self.objects[key].body for key in sorted(self.objects) if key.startswith(prefix)}

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        await asyncio.sleep(0)
        stored = self.objects.get(key)
        return None if stored is None else StoredObject(body=stored.body[:first_bytes], etag=stored.etag)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        await asyncio.sleep(0)
        stored = self.objects.get(key)
        if (stored.etag if stored else None) != etag:
            raise CasConflict(key)
        return self.write(key, body)

    async def put(self, key: str, body: bytes) -> None:
        await asyncio.sleep(0)
        self.write(key, body)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await asyncio.sleep(0)
        for key in sorted(self.objects):
            stored = self.objects.get(key)
            if stored is not None and key.startswith(prefix) and key > after:
                yield ObjectInfo(
                    key=key, etag=stored.etag, size_bytes=len(stored.body), last_modified=stored.last_modified
                )

    def upload(self, key: str) -> Upload:
        return _MemoryUpload(self, key, self._part_bytes)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        if key not in self.objects:
            raise ObjectMissing(key)
        body = self.objects[key].body
        for begin in range(0, len(body), STREAM_CHUNK_BYTES):
            yield body[begin : begin + STREAM_CHUNK_BYTES]

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        self.objects.pop(key, None)

    async def copy(self, source: str, target: str, *, size_bytes: int) -> None:
        await asyncio.sleep(0)
        body = self.objects[source].body
        assert len(body) == size_bytes, f"{source} has {len(body)} bytes, not {size_bytes}"
        self.write(target, body)

    async def now(self) -> dt.datetime:
        await asyncio.sleep(0)
        return self._clock()

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        await asyncio.sleep(0)
        for upload in list(self.unfinished):
            if upload.key.startswith(prefix):
                yield upload

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await asyncio.sleep(0)
        self.unfinished = [upload for upload in self.unfinished if upload != unfinished]

    def write(self, key: str, body: bytes) -> str:
        """Write an object whatever was there, and return its ETag."""
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        self.objects[key] = BucketObject(body, etag, self._clock())
        return etag

    def begin_upload(self, key: str) -> UnfinishedUpload:
        """Begin an upload of several parts."""
        self._uploads += 1
        begun = UnfinishedUpload(key=key, upload_id=f"upload-{self._uploads}", begun_at=self._clock())
        self.unfinished.append(begun)
        return begun


class _MemoryUpload:
    def __init__(self, store: MemoryStore, key: str, part_bytes: int) -> None:
        self._store = store
        self._key = key
        self._part_bytes = part_bytes
        self._body = bytearray()
        self._begun: UnfinishedUpload | None = None

    async def write(self, chunk: bytes) -> None:
        await asyncio.sleep(0)
        if self._begun is None and len(self._body) >= self._part_bytes:
            self._begun = self._store.begin_upload(self._key)
        self._body += chunk

    async def complete(self) -> None:
        await asyncio.sleep(0)
        if self._begun is not None:
            if self._begun not in self._store.unfinished:
                raise StoreUnavailable(f"the upload of {self._key} was refused: it has ended")
            self._store.unfinished.remove(self._begun)
        self._store.write(self._key, bytes(self._body))

    async def abort(self) -> None:
        await asyncio.sleep(0)
        self._body.clear()
        if self._begun in self._store.unfinished:
            self._store.unfinished.remove(self._begun)


class MemoryLog:
    """Topics of `PARTITIONS` partitions each, and the offsets that consumer groups have committed.

    Of the records appended since it was made, it acknowledges and loses those whose number is in ``losing``.
    """

    def __init__(self, losing: Collection[int] = ()) -> None:
        self.appended: list[ConsumedRecord] = []
        self._losing = frozenset(losing)
        self._records: dict[tuple[Topic, int], list[ConsumedRecord]] = {}
        self._ends: dict[tuple[Topic, int], int] = {}
        self._committed: dict[tuple[str, Topic, int], int] = {}
        self._members: dict[str, MemoryMember] = {}

    def copy(self, losing: Collection[int] = ()) -> MemoryLog:
        """Return a log of its own with the same records and offsets, and no members."""
        copied = MemoryLog(losing)
        copied._records = {place: list(records) for place, records in self._records.items()}
        copied._ends = dict(self._ends)
        copied._committed = dict(self._committed)
        return copied

    def append(
        self,
        topic: Topic,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> ConsumedRecord:
        """Append a record to the partition of its key and return it."""
        partition = partition_of(key, range(PARTITIONS), range(PARTITIONS))
        place = (topic, partition)
        offset = self._ends.get(place, 0)
        record = ConsumedRecord(
            topic=topic, partition=partition, offset=offset, key=key, value=value, headers=tuple(headers)
        )
        self._ends[place] = offset + 1
        if len(self.appended) not in self._losing:
            self._records.setdefault(place, []).append(record)
        self.appended.append(record)
        return record

    def join(self, group: str, topic: Topic) -> MemoryMember:
        """Become the one member of a group: the member before takes and commits nothing any more."""
        return MemoryMember(self, group, topic)

    def take(
        self, group: str, topic: Topic, records_max: int, *, partitions: Sequence[int] = range(PARTITIONS)
    ) -> list[ConsumedRecord]:
        """Return the next records after those committed, the same again until they are, in the order given."""
        taken: list[ConsumedRecord] = []
        for partition in partitions:
            begin = self._committed.get((group, topic, partition), 0)
            taken += self._since(topic, partition, begin)[: records_max - len(taken)]
        return taken

    def commit(self, group: str, batch: Iterable[ConsumedRecord]) -> None:
        """Commit a batch for a group."""
        for record in batch:
            place = (group, record.topic, record.partition)
            self._committed[place] = max(self._committed.get(place, 0), record.offset + 1)

    def rewind(self, group: str, topic: Topic, partition: int, records: int) -> None:
        """Forget that a group has committed the last so many records of a partition: they come again."""
        place = (group, topic, partition)
        self._committed[place] = max(0, self._committed.get(place, 0) - records)

    def compact(self, topic: Topic) -> None:
        """Keep of each key the last record alone, where it stands."""
        for partition in range(PARTITIONS):
            records = self._records.get((topic, partition), [])
            last = {record.key: record.offset for record in records}
            self._records[topic, partition] = [record for record in records if last[record.key] == record.offset]

    def ends(self, topic: Topic) -> dict[int, int]:
        """Return the offset after the last record of each partition."""
        return {partition: self._ends.get((topic, partition), 0) for partition in range(PARTITIONS)}

    def records(self, topic: Topic) -> list[ConsumedRecord]:
        """Return all records of a topic, partition by partition."""
        return [record for partition in range(PARTITIONS) for record in self._since(topic, partition, 0)]

    def _since(self, topic: Topic, partition: int, offset: int) -> list[ConsumedRecord]:
        records = self._records.get((topic, partition), [])
        return records[bisect.bisect_left(records, offset, key=lambda record: record.offset) :]


class MemoryMember:
    """The one member of a consumer group, until the next one joins."""

    def __init__(self, log: MemoryLog, group: str, topic: Topic) -> None:
        self._log = log
        self._group = group
        self._topic = topic
        self.rejoin()

    def rejoin(self) -> None:
        """Become the group's member again."""
        self._log._members[self._group] = self

    async def take(self, records_max: int, *, partitions: Sequence[int] = range(PARTITIONS)) -> list[ConsumedRecord]:
        """Return the next records after those committed, the same again until they are."""
        await asyncio.sleep(0)
        return self._log.take(self._group, self._topic, records_max, partitions=partitions)

    async def commit(self, batch: Sequence[ConsumedRecord]) -> None:
        """Commit a batch. Raises LogUnavailable if the group has another member since."""
        await asyncio.sleep(0)
        if self._log._members.get(self._group) is not self:
            raise LogUnavailable("the group has gone on without this member")
        self._log.commit(self._group, batch)


class MemoryReplay:
    """A Rereadable and a PairReplay of what ``records`` returns, in its order and in batches of a few records."""

    def __init__(self, records: Callable[[], Sequence[ConsumedRecord]], *, batch_records_max: int = 4) -> None:
        self._records = records
        self._batch_records_max = batch_records_max
        self._read: set[tuple[int, int]] = set()
        self._due: set[tuple[int, int]] = set()

    @classmethod
    def of(cls, log: MemoryLog, topic: Topic, *, batch_records_max: int = 4) -> Self:
        """Return the replay of a topic."""
        return cls(lambda: log.records(topic), batch_records_max=batch_records_max)

    async def take_end(self) -> int:
        await asyncio.sleep(0)
        self._due = {(record.partition, record.offset) for record in self._records()} - self._read
        return len(self._taken())

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        records = self._taken()
        for begin in range(0, len(records), self._batch_records_max):
            await asyncio.sleep(0)
            yield records[begin : begin + self._batch_records_max]
        self._read |= self._due
        self._due = set()

    async def rewind(self) -> None:
        await asyncio.sleep(0)
        self._due |= self._read
        self._read = set()

    async def read_pairs(self) -> AsyncIterator[Sequence[Pair]]:
        async for batch in self.read():
            yield [(record.key, record.value) for record in batch]

    def _taken(self) -> list[ConsumedRecord]:
        return [record for record in self._records() if (record.partition, record.offset) in self._due]


class BrokenContract(BaseException):  # nothing that waits out faults may catch it
    """An event was published that its own contract refuses."""


class MemoryPublisher:
    """A Publisher into a `MemoryLog`. Every event it takes is read back, as a consumer would."""

    def __init__(self, log: MemoryLog, *, source: str = "test") -> None:
        self._log = log
        self._source = source

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        for item in list(outgoing):
            await asyncio.sleep(0)
            value = events.encode(item.event)
            try:
                read_back = events.decode(item.topic or item.event.topic, value)
            except (events.PoisonRecord, events.NewerContract) as error:
                raise BrokenContract(f"{item.event} was published, but {error}") from error
            if read_back != item.event:
                raise BrokenContract(f"{item.event} was published, but {read_back} is read")
            headers = events.headers_of(item.event, source=self._source, cause=item.cause)
            self._log.append(item.topic or item.event.topic, item.event.key.encode(), value, headers)

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        await asyncio.sleep(0)
        self._log.append(Topic.DEAD_LETTERS, *as_dead_letter(record, error))

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        await asyncio.sleep(0)
        self._log.append(topic, key, value, list(headers))


class MemoryUpstream:
    """An Upstream whose list and files are set by the test; a fault in place of bytes is raised when asked for.

    ``cuts`` holds, for a city, after how many bytes each of its next downloads breaks off.
    """

    def __init__(self, *, chunk_bytes: int = 64 * 1024, etags: bool = True) -> None:
        self.city_list: bytes | Exception = b"[]"
        self.files: dict[str, bytes | Exception] = {}
        self.cuts: dict[str, list[int]] = {}
        self.downloads: list[str] = []
        self._chunk_bytes = chunk_bytes
        self._etags = etags

    async def cities(self) -> bytes:
        await asyncio.sleep(0)
        if isinstance(self.city_list, Exception):
            raise self.city_list
        return self.city_list

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return f"http://upstream.test/cities/{upstream_id}/stats?date={date}"

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        await asyncio.sleep(0)
        url = self.city_url(upstream_id, date)
        file = self.files.get(upstream_id, PermanentUpstreamError(f"{url} answered 404"))
        if isinstance(file, Exception):
            raise file
        etag = f'"{hashlib.sha256(file).hexdigest()}"' if self._etags else None
        if etag is not None and known is not None and known.etag == etag:
            yield Download(url=url, chunks=None)
            return
        self.downloads.append(upstream_id)
        cuts = self.cuts.get(upstream_id)
        cut = cuts.pop(0) if cuts else None
        chunks = self._chunks(url, file, cut)
        yield Download(url=url, chunks=chunks, validators=Validators(etag=etag), bytes_total=len(file))

    async def _chunks(self, url: str, file: bytes, cut: int | None) -> AsyncIterator[bytes]:
        sent = file[:cut]
        for begin in range(0, len(sent), self._chunk_bytes):
            await asyncio.sleep(0)
            yield sent[begin : begin + self._chunk_bytes]
        if cut is not None:
            raise TransientUpstreamError(f"{url} broke off after {cut} bytes")


class Crash(BaseException):  # nothing that waits out faults may catch it
    """The process died at this call."""


class Break(enum.Enum):
    """How a call across a port breaks."""

    DIE_BEFORE = "the process dies before the call happens"
    DIE_AFTER = "the call happens, and the process dies before it knows"
    LOST_ANSWER = "the call happens, its answer is lost, and the process sees a fault"
    REFUSED = "the call does not happen, and the process sees a fault"
    SENT_TWICE = "the call happens, its answer is lost, and the client sends it again by itself"
    UNDECIDED = "the call does not happen, and a swap is told that it lost, as when a conflict never ends"
    PAUSE = "the process stands still before the call happens, until everybody takes it for dead"


class Crossing(msgspec.Struct, frozen=True):
    """A call across a port: who made it, what it was, and whether it had an effect outside its process."""

    life: str
    what: str
    effect: bool


class Crossings:
    """Counts all calls across ports, and breaks those that the schedule names by their number."""

    def __init__(self, schedule: Mapping[int, Break] | None = None) -> None:
        self.made: list[Crossing] = []
        self._schedule = dict(schedule or {})

    def heal(self) -> None:
        """Break nothing from here on."""
        self._schedule = {}

    def break_after(self, calls: int, how: Break) -> None:
        """Break the call that comes after so many others from here on."""
        self._schedule[len(self.made) + calls] = how

    def next_break(self, crossing: Crossing) -> Break | None:
        """Count a call and say how it breaks, if it does."""
        self.made.append(crossing)
        return self._schedule.get(len(self.made) - 1)


class Life:
    """One life of a process: a dead process makes no more calls, whatever tasks of it still run.

    ``calls_left`` is after how many calls more it stands still; None: after no number of them.
    """

    def __init__(self, name: str, crossings: Crossings) -> None:
        self.name = name
        self.crossings = crossings
        self.dead = False
        self.paused = asyncio.Event()
        self.resumed = asyncio.Event()
        self.calls_left: int | None = None

    async def cross(
        self,
        what: str,
        call: Callable[[], Awaitable[_Result]],
        fault: Callable[[str], Exception],
        *,
        effect: bool,
        refusal: Callable[[str], Exception] | None = None,
        loss: Callable[[str], Exception] | None = None,
    ) -> _Result:
        """Make a call across a port, or break it as scheduled: with ``fault``, or ``refusal`` if it never happened.

        What can lose a race raises ``loss`` then.
        """
        await self._go_on()
        broken = self.crossings.next_break(Crossing(self.name, what, effect))
        match broken:
            case Break.DIE_BEFORE:
                self.dead = True
                raise Crash(what)
            case Break.REFUSED:
                raise (refusal or fault)(f"{what} was refused")
            case Break.UNDECIDED if loss is not None:
                raise loss(what)
            case Break.PAUSE:
                self.stand_still()
                await self.resumed.wait()
        result = await call()
        if broken is Break.SENT_TWICE and effect:
            result = await call()
        if broken is Break.DIE_AFTER:
            self.dead = True
            raise Crash(what)
        if broken is Break.LOST_ANSWER:
            raise fault(f"the answer to {what} was lost")
        return result

    async def _go_on(self) -> None:
        if self.calls_left == 0:
            self.stand_still()
        if self.paused.is_set():
            await self.resumed.wait()
        if self.dead:
            raise Crash(f"{self.name} is dead")
        if self.calls_left is not None:
            self.calls_left -= 1

    def stand_still(self) -> None:
        """Make no call until resumed."""
        self.calls_left = None
        self.resumed.clear()
        self.paused.set()


class BreakableStore:
    """An ObjectStore whose calls cross through a `Life`."""

    def __init__(self, store: ObjectStore, life: Life) -> None:
        self._store = store
        self._life = life

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        return await self._life.cross(
            f"get {key}", lambda: self._store.get(key, first_bytes=first_bytes), StoreUnavailable, effect=False
        )

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        return await self._life.cross(
            f"swap {key}",
            lambda: self._store.compare_and_swap(key, body, etag=etag),
            StoreUnavailable,
            effect=True,
            loss=CasConflict,
        )

    async def put(self, key: str, body: bytes) -> None:
        await self._life.cross(f"put {key}", lambda: self._store.put(key, body), StoreUnavailable, effect=True)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        async for listed in self._store.list(prefix, after=after):
            await self._life.cross(f"list {prefix}", _nothing, StoreUnavailable, effect=False)
            yield listed

    def upload(self, key: str) -> Upload:
        return _BreakableUpload(self._store.upload(key), key, self._life)

    async def copy(self, source: str, target: str, *, size_bytes: int) -> None:
        await self._life.cross(
            f"copy {source} {target}",
            lambda: self._store.copy(source, target, size_bytes=size_bytes),
            StoreUnavailable,
            effect=True,
        )

    async def delete(self, key: str) -> None:
        await self._life.cross(f"delete {key}", lambda: self._store.delete(key), StoreUnavailable, effect=True)


class BreakableOperatedStore(BreakableStore):
    """An AdminObjectStore whose calls cross through a `Life`."""

    def __init__(self, store: AdminObjectStore, life: Life) -> None:
        super().__init__(store, life)
        self._operated = store
        self._operator = life

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        async for chunk in self._operated.stream(key):
            await self._operator.cross(f"stream {key}", _nothing, StoreUnavailable, effect=False)
            yield chunk

    async def now(self) -> dt.datetime:
        return await self._operator.cross("now", self._operated.now, StoreUnavailable, effect=False)

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        async for upload in self._operated.unfinished_uploads(prefix):
            await self._operator.cross(f"list uploads {prefix}", _nothing, StoreUnavailable, effect=False)
            yield upload

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await self._operator.cross(
            f"abort upload {unfinished.key}",
            lambda: self._operated.abort_upload(unfinished),
            StoreUnavailable,
            effect=True,
        )


class _BreakableUpload:
    def __init__(self, upload: Upload, key: str, life: Life) -> None:
        self._upload = upload
        self._key = key
        self._life = life

    async def write(self, chunk: bytes) -> None:
        await self._life.cross(f"write {self._key}", lambda: self._upload.write(chunk), StoreUnavailable, effect=False)

    async def complete(self) -> None:
        await self._life.cross(f"complete {self._key}", self._upload.complete, StoreUnavailable, effect=True)

    async def abort(self) -> None:
        with contextlib.suppress(StoreUnavailable):  # the port says that giving up never fails
            await self._life.cross(f"abort {self._key}", self._upload.abort, StoreUnavailable, effect=False)


class _EventRefused(LogUnavailable):
    pass


class BreakablePublisher:
    """A Publisher whose every event crosses through a `Life`, so that a batch can break in its middle.

    After a lost answer the events that follow are not published; a refused event alone is missing.
    """

    def __init__(self, publisher: Publisher, life: Life) -> None:
        self._publisher = publisher
        self._life = life

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        refused: _EventRefused | None = None
        for item in list(outgoing):
            try:
                await self._life.cross(
                    f"publish {type(item.event).__name__} {item.event.key}",
                    functools.partial(self._publisher.publish, [item]),
                    LogUnavailable,
                    effect=True,
                    refusal=_EventRefused,
                )
            except _EventRefused as error:
                refused = error
        if refused is not None:
            raise refused

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        await self._life.cross(
            "bury", lambda: self._publisher.send_to_dead_letters(record, error), LogUnavailable, effect=True
        )


class BreakableOperatedPublisher(BreakablePublisher):
    """A Publisher and RecordPublisher whose every record crosses through a `Life`."""

    def __init__(self, publisher: MemoryPublisher, life: Life) -> None:
        super().__init__(publisher, life)
        self._records = publisher
        self._operator = life

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        await self._operator.cross(
            f"publish a record to {topic.value}",
            lambda: self._records.publish_record(topic, key=key, value=value, headers=headers),
            LogUnavailable,
            effect=True,
        )


class BreakableReplay:
    """A Rereadable and a PairReplay whose calls cross through a `Life`."""

    def __init__(self, replay: MemoryReplay, life: Life) -> None:
        self._replay = replay
        self._life = life

    async def take_end(self) -> int:
        return await self._life.cross("take the end", self._replay.take_end, LogUnavailable, effect=False)

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        async for batch in self._replay.read():
            await self._life.cross("read the topic", _nothing, LogUnavailable, effect=False)
            yield batch

    async def read_pairs(self) -> AsyncIterator[Sequence[Pair]]:
        async for batch in self._replay.read_pairs():
            await self._life.cross("read the topic", _nothing, LogUnavailable, effect=False)
            yield batch

    async def rewind(self) -> None:
        await self._life.cross("rewind", self._replay.rewind, LogUnavailable, effect=False)


class BreakableUpstream:
    """An Upstream whose calls and chunks cross through a `Life`."""

    def __init__(self, upstream: Upstream, life: Life) -> None:
        self._upstream = upstream
        self._life = life

    async def cities(self) -> bytes:
        return await self._life.cross("GET /cities", self._upstream.cities, UpstreamDown, effect=False)

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return self._upstream.city_url(upstream_id, date)

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        await self._life.cross(f"GET file {upstream_id}", _nothing, UpstreamDown, effect=False)
        async with self._upstream.download(upstream_id, date, known) as download:
            if download.chunks is not None:
                download.chunks = self._chunks(download.chunks, upstream_id)
            yield download

    async def _chunks(self, chunks: AsyncIterator[bytes], upstream_id: str) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            await self._life.cross(f"read file {upstream_id}", _nothing, TransientUpstreamError, effect=False)
            yield chunk


async def _nothing() -> None:
    return


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """A trip as the upstream has it; ``delay_ms`` is whole and written as an ISO 8601 duration."""

    passengers: int
    delay_ms: int
    accident: bool = False


def trip_file(trips: Iterable[Trip], date: dt.date) -> bytes:
    """Write a trip file of one date."""
    records = [
        {
            "departure-time": f"{date}T{minute // 60:02}:{minute % 60:02}:00",
            "bus-type": f"BUS-{minute}",
            "passengers": trip.passengers,
            "delay": f"PT{trip.delay_ms // 1000}.{trip.delay_ms % 1000:03}S",
            "accident": trip.accident,
        }
        for minute, trip in enumerate(trips)
    ]
    return json.dumps(records, separators=(",", ":")).encode()


class City(msgspec.Struct, frozen=True):
    """A city as the upstream lists it. Its country's name is one lower-case word with a capital: the slug is plain."""

    id: int
    country: str
    name: str = "Port Tina"


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """What the upstream holds of a date. A city without a file answers 404; a file of bytes is not a valid one.

    ``cities`` is None when the list cannot be had.
    """

    cities: tuple[City, ...] | None
    files: Mapping[int, tuple[Trip, ...] | bytes]

    def write_into(self, upstream: MemoryUpstream, date: dt.date) -> None:
        """Make the upstream answer with this."""
        if self.cities is None:
            upstream.city_list = PermanentUpstreamError("http://upstream.test/cities answered 403")
        else:
            upstream.city_list = json.dumps([msgspec.to_builtins(city) for city in self.cities]).encode()
        upstream.files = {
            str(city_id): file if isinstance(file, bytes) else trip_file(file, date)
            for city_id, file in self.files.items()
        }


class ExpectedDay(msgspec.Struct, frozen=True, kw_only=True):
    """What the summary of a country-day must say."""

    trips: int = 0
    passengers: int = 0
    accidents: int = 0
    delay_total_ms: int = 0
    has_data: bool = False
    cities_reported: int = 0
    cities_expected: int = 0
    complete: bool = False


class Oracle:
    """Knows what one date's summaries and its requests' ends must be, once all is at rest."""

    def __init__(self) -> None:
        self.statuses: dict[RequestId, str] = {}
        self._cities: tuple[City, ...] | None = None
        self._placed: dict[int, tuple[str, tuple[Trip, ...]]] = {}
        self._countries: set[str] = set()

    def copy(self) -> Oracle:
        """Return an oracle of its own that knows the same."""
        copied = Oracle()
        copied.statuses = dict(self.statuses)
        copied._cities = self._cities
        copied._placed = dict(self._placed)
        copied._countries = set(self._countries)
        return copied

    def requested(self, request_id: RequestId, truth: Truth) -> None:
        """Take note of a request that is served while the upstream holds ``truth``."""
        if truth.cities is None:
            self.statuses[request_id] = "failed"
            return
        self._cities = truth.cities
        failed = False
        for city in truth.cities:
            self._countries.add(city.country)
            file = truth.files.get(city.id)
            if isinstance(file, tuple):
                self._placed[city.id] = (city.country, file)
            else:
                failed = True
        self.statuses[request_id] = "completed with failures" if failed else "completed"

    def days(self) -> dict[str, ExpectedDay]:
        """Return what each country's summary must say, by slug."""
        return {country.lower(): self._day(country) for country in sorted(self._countries)}

    def _day(self, country: str) -> ExpectedDay:
        here = {city_id: trips for city_id, (where, trips) in self._placed.items() if where == country}
        trips = [trip for file in here.values() for trip in file]
        expected = {city.id for city in self._cities or () if city.country == country}
        return ExpectedDay(
            trips=len(trips),
            passengers=sum(trip.passengers for trip in trips),
            accidents=sum(trip.accident for trip in trips),
            delay_total_ms=sum(trip.delay_ms for trip in trips),
            has_data=bool(here),
            cities_reported=len(expected & set(here)),
            cities_expected=len(expected),
            complete=expected <= set(here),
        )
