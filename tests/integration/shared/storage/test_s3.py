"""The contract of the object store, for the fake, moto's server and SeaweedFS.

A test over the fake also holds for a real store, as far as it depends on this contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from moto.server import ThreadedMotoServer

from shared.domain.ids import utc_now
from shared.runtime.concurrency import bounded_map
from shared.runtime.settings import Settings, load_settings
from shared.storage import s3
from shared.storage.bucket_check import BucketCheck
from shared.storage.object_store import (
    UPLOAD_PART_BYTES,
    AdminObjectStore,
    CasConflict,
    ObjectNotFound,
    ObjectStore,
    StoredObject,
    StoreUnavailable,
    UnfinishedUpload,
)
from shared.storage.s3 import S3Store
from tests.chaos.s3_proxy import Fault, FaultyS3
from tests.fakes.store import MemoryStore
from tests.integration.running import eventually
from tripfold.local.embedded import EmbeddedServices

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOTO_BEGUN_AT = dt.datetime(2010, 11, 10, 20, 48, 33, tzinfo=dt.UTC)
"""When every upload was begun that moto lists."""


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    """Run moto's S3 on a free port."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def settings_of(url: str) -> Settings:
    """Return settings for a bucket of its own at ``url``."""
    return load_settings({"TRIPFOLD_S3_ENDPOINT_URL": url, "TRIPFOLD_S3_BUCKET": f"b{uuid.uuid4().hex}"})


@contextlib.asynccontextmanager
async def bucket_at(url: str) -> AsyncIterator[S3Store]:
    """Open a new bucket."""
    async with S3Store(settings_of(url)) as store:
        await store.create_bucket()
        yield store


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stores(embedded: EmbeddedServices, moto_url: str) -> AsyncIterator[dict[str, AdminObjectStore]]:
    """Make a bucket of each kind of store."""
    async with bucket_at(moto_url) as moto, bucket_at(embedded.s3_endpoint_url) as seaweedfs:
        yield {"memory": MemoryStore(utc_now), "moto": moto, "seaweedfs": seaweedfs}


@pytest_asyncio.fixture(loop_scope="module", params=["memory", "moto", "seaweedfs"])
async def store(request: pytest.FixtureRequest, stores: dict[str, AdminObjectStore]) -> AsyncIterator[AdminObjectStore]:
    """Return a bucket of each kind of store, and empty it afterwards."""
    store = stores[request.param]
    yield store
    async for unfinished in store.unfinished_uploads(""):
        await store.abort_upload(unfinished)
    await bounded_map(store.delete, await keys_of(store), limit=16)


without_moto = pytest.mark.parametrize("store", ["memory", "seaweedfs"], indirect=True)
"""For tests of racing writers, several of which moto lets win, and of many objects, which moto writes slowly."""


async def keys_of(store: ObjectStore) -> list[str]:
    """List every key of a bucket, sorted."""
    return sorted([one.key async for one in store.list("")])


async def test_a_missing_object_is_none(store: ObjectStore) -> None:
    """A key that was never written reads as None."""
    assert await store.get("state/nothing.json") is None


async def test_only_the_first_creation_wins(store: ObjectStore) -> None:
    """An object that has to be new is written once; the second write loses and changes nothing."""
    await store.compare_and_swap("a.json", b"1", etag=None)
    with pytest.raises(CasConflict):
        await store.compare_and_swap("a.json", b"2", etag=None)
    found = await store.get("a.json")
    assert found is not None
    assert found.body == b"1"


async def test_compare_and_swap_needs_the_current_etag(store: ObjectStore) -> None:
    """A swap that names the ETag last read wins; one that names an older ETag, or a missing object, loses."""
    first = await store.compare_and_swap("a.json", b"1", etag=None)
    second = await store.compare_and_swap("a.json", b"2", etag=first)
    for key, etag in (("a.json", first), ("missing.json", second)):
        with pytest.raises(CasConflict):
            await store.compare_and_swap(key, b"3", etag=etag)
    found = await store.get("a.json")
    assert found is not None
    assert (found.body, found.etag) == (b"2", second)


@without_moto
async def test_one_of_racing_swaps_wins(store: ObjectStore) -> None:
    """Exactly one of several writers that read the same object replaces it."""
    etag = await store.compare_and_swap("a.json", b"start", etag=None)

    async def write(number: int) -> int | None:
        try:
            await store.compare_and_swap("a.json", f"{number}".encode(), etag=etag)
        except CasConflict:
            return None
        return number

    winners = [one for one in await asyncio.gather(*map(write, range(4))) if one is not None]
    found = await store.get("a.json")
    assert found is not None
    assert [found.body] == [f"{winner}".encode() for winner in winners]


@without_moto
async def test_one_of_racing_creations_wins(store: ObjectStore) -> None:
    """Exactly one of several writers that found no object creates it; the others get a conflict."""

    async def create(number: int) -> int | None:
        try:
            await store.compare_and_swap("a.json", f"{number}".encode(), etag=None)
        except CasConflict:
            return None
        return number

    winners = [one for one in await asyncio.gather(*map(create, range(4))) if one is not None]
    found = await store.get("a.json")
    assert found is not None
    assert [found.body] == [f"{winner}".encode() for winner in winners]


async def test_a_repeated_compare_and_swap_conflicts_with_itself(store: ObjectStore) -> None:
    """A swap that happened, and is sent again with the same ETag, finds its own bytes there and loses."""
    etag = await store.compare_and_swap("a.json", b"1", etag=None)
    swapped = await store.compare_and_swap("a.json", b"2", etag=etag)
    with pytest.raises(CasConflict):
        await store.compare_and_swap("a.json", b"2", etag=etag)
    found = await store.get("a.json")
    assert found is not None
    assert (found.body, found.etag) == (b"2", swapped)


async def test_equal_bytes_have_equal_etags(store: ObjectStore) -> None:
    """The ETag of a small object depends on its bytes alone, not on their writer."""
    first = await store.compare_and_swap("a.json", b"1", etag=None)
    second = await store.compare_and_swap("b.json", b"1", etag=None)
    third = await store.compare_and_swap("b.json", b"2", etag=second)
    assert (first == second, second == third) == (True, False)


async def test_a_write_over_a_deleted_object_conflicts(store: AdminObjectStore) -> None:
    """An object that was deleted meanwhile is no longer the one that was read, and may be created again."""
    etag = await store.compare_and_swap("a.json", b"1", etag=None)
    await store.delete("a.json")
    await store.delete("a.json")
    assert await store.get("a.json") is None
    with pytest.raises(CasConflict):
        await store.compare_and_swap("a.json", b"2", etag=etag)
    await store.compare_and_swap("a.json", b"3", etag=None)
    assert await keys_of(store) == ["a.json"]


async def test_a_read_can_be_limited_to_the_first_bytes(store: ObjectStore) -> None:
    """A read of the first bytes returns at most the requested number, and all of a shorter object."""
    await store.put("a.json", b"0123456789")
    for first_bytes, body in ((4, b"0123"), (100, b"0123456789")):
        found = await store.get("a.json", first_bytes=first_bytes)
        assert found is not None
        assert found.body == body


async def test_the_etag_of_an_object_is_read_without_its_bytes(store: ObjectStore) -> None:
    """A read of no bytes returns the ETag of the write, and None where there is no object."""
    written = await store.compare_and_swap("a.json", b"0123456789", etag=None)
    assert await store.get("a.json", first_bytes=0) == StoredObject(body=b"", etag=written)
    assert await store.get("b.json", first_bytes=0) is None


async def test_a_listing_has_only_the_objects_under_its_prefix(store: ObjectStore) -> None:
    """A listing names every object under its prefix, with its size and the ETag that reading gives."""
    for key in ("raw/date=1/city=~S%C3%A3o/1.json", "raw/date=1/city=2/1.json", "raw/date=2/city=2/1.json"):
        await store.put(key, b"12345")
    listed = [one async for one in store.list("raw/date=1/")]
    assert sorted(one.key for one in listed) == ["raw/date=1/city=2/1.json", "raw/date=1/city=~S%C3%A3o/1.json"]
    for one in listed:
        found = await store.get(one.key)
        assert found is not None
        assert (one.size_bytes, one.etag) == (5, found.etag)


ODD_KEYS = ["a b", "a%20b", "a+b", "a&b", "a'b(c)*!", "é/ü", "city=~%C3%A9.json", "z"]


async def test_any_key_is_read_as_it_was_written(store: ObjectStore) -> None:
    """Keys of any characters are listed, and give their bytes and the ETag of the listing."""
    for key in ODD_KEYS:
        await store.compare_and_swap(f"odd/{key}", key.encode() * 10, etag=None)
    listed = [one async for one in store.list("odd/")]
    assert sorted(one.key for one in listed) == sorted(f"odd/{key}" for key in ODD_KEYS)
    read = [await store.get(one.key, first_bytes=7) for one in listed]
    assert [found.etag for found in read if found] == [one.etag for one in listed]
    assert [found.body for found in read if found] == [(one.key[4:].encode() * 10)[:7] for one in listed]
    past = [one.key async for one in store.list("odd/", after="odd/a+b")]
    assert sorted(past) == sorted(one.key for one in listed if one.key > "odd/a+b")


@without_moto
async def test_a_listing_is_complete_and_sorted(store: ObjectStore) -> None:
    """However many pages it takes, the keys of one folder come all, once and sorted; also after a certain key."""
    expected = [f"requests/{number:04x}.json" for number in range(1_011)]
    await bounded_map(lambda key: store.put(key, b"1"), expected[::-1], limit=16)
    await store.put("requests-of-others/1.json", b"1")
    assert [one.key async for one in store.list("requests/")] == expected
    for past in (0, 2, 998, 999, 1_010):
        assert [one.key async for one in store.list("requests/", after=expected[past])] == expected[past + 1 :]


async def test_a_prefix_may_end_inside_a_name(store: ObjectStore) -> None:
    """A month is listed by the beginning of its dates; a whole key is a prefix too."""
    dates = ["2024-04-30", "2024-05-01", "2024-05-31", "2024-06-01"]
    expected = [f"summaries/generation=1/date={date}/country=peru.json" for date in dates]
    for key in expected:
        await store.put(key, b"1")
    for prefix, keys in (("2024-05-", expected[1:3]), ("2024-06-", expected[3:]), ("2024-03-", []), ("2025-01-", [])):
        assert [one.key async for one in store.list(f"summaries/generation=1/date={prefix}")] == keys
    assert [one.key async for one in store.list(expected[1])] == expected[1:2]


async def test_a_listing_keeps_a_folder_together(store: ObjectStore) -> None:
    """Stores differ in the order of folders and of what begins like one, but give a folder's keys one after another."""
    for key in ("raw/city=1/a", "raw/city=1-2/a", "raw/city=1/b", "raw/city=10/a", "raw/city=1-2/b"):
        await store.put(key, b"1")
    folders = [one.key.rpartition("/")[0] async for one in store.list("raw/")]
    assert len(folders) == 5
    changes = [folder for before, folder in zip(["", *folders], folders, strict=False) if folder != before]
    assert sorted(changes) == sorted(set(folders))


async def test_a_stream_returns_the_whole_object(store: AdminObjectStore) -> None:
    """An object of any size is read chunk by chunk; one that is not there is missing, not a fault."""
    body = bytes(number % 251 for number in range(1000)) * 2_100
    await store.put("raw/one.json", body)
    chunks = [chunk async for chunk in store.stream("raw/one.json")]
    assert (b"".join(chunks), len(chunks) > 1) == (body, True)
    with pytest.raises(ObjectNotFound):
        await anext(aiter(store.stream("raw/two.json")))


async def test_ages_are_measured_by_the_clock_of_the_store(store: AdminObjectStore) -> None:
    """An object written just now is no older than a moment, by the store's own clock."""
    before = await store.now()
    await store.put("a.json", b"1")
    (listed,) = [one async for one in store.list("a")]
    slack = dt.timedelta(seconds=2)  # both are whole seconds
    assert before - slack <= listed.last_modified <= await store.now() + slack


@pytest.mark.parametrize("size_bytes", [0, 10, UPLOAD_PART_BYTES, UPLOAD_PART_BYTES + 1, 2 * UPLOAD_PART_BYTES + 7])
async def test_an_upload_is_visible_once_complete(store: ObjectStore, size_bytes: int) -> None:
    """An upload of any size, written in chunks, appears whole at its completion and not before."""
    body = bytes(number % 251 for number in range(1000)) * (size_bytes // 1000 + 1)
    body = body[:size_bytes]
    upload = store.upload("raw/one.json")
    for start in range(0, size_bytes, 700_001):
        await upload.write(body[start : start + 700_001])
    assert await store.get("raw/one.json") is None
    await upload.complete()
    await upload.abort()
    found = await store.get("raw/one.json")
    assert found is not None
    assert found.body == body


async def test_an_aborted_upload_leaves_nothing(store: ObjectStore) -> None:
    """An upload that is given up leaves no object, whatever was written of it."""
    upload = store.upload("raw/one.json")
    await upload.write(bytes(UPLOAD_PART_BYTES))
    await upload.write(bytes(UPLOAD_PART_BYTES))
    await upload.abort()
    await upload.abort()
    assert await keys_of(store) == []


async def unfinished_of(store: AdminObjectStore, prefix: str) -> list[UnfinishedUpload]:
    """List the unfinished uploads under a prefix."""
    return [one async for one in store.unfinished_uploads(prefix)]


async def test_an_upload_without_an_end_is_listed_until_it_ends(store: AdminObjectStore) -> None:
    """An upload of several parts is unfinished from its second part on, and no object; completed it is neither."""
    upload = store.upload("raw/city=1/one.json")
    await upload.write(bytes(UPLOAD_PART_BYTES))
    await upload.write(b"1")
    (unfinished,) = await unfinished_of(store, "raw/")
    assert unfinished.key == "raw/city=1/one.json"
    if unfinished.begun_at != MOTO_BEGUN_AT:
        assert abs(unfinished.begun_at - await store.now()) < dt.timedelta(minutes=5)
    assert await unfinished_of(store, "quarantine/") == []
    assert await keys_of(store) == []
    await upload.complete()
    assert await unfinished_of(store, "raw/") == []
    assert await keys_of(store) == ["raw/city=1/one.json"]


async def test_an_aborted_upload_cannot_be_completed(store: AdminObjectStore) -> None:
    """An upload that gc aborts is gone for its writer too, which gets an error; aborting it again does nothing."""
    upload = store.upload("raw/city=1/one.json")
    await upload.write(bytes(UPLOAD_PART_BYTES))
    await upload.write(b"1")
    (unfinished,) = await unfinished_of(store, "raw/")
    await store.abort_upload(unfinished)
    assert await unfinished_of(store, "raw/") == []
    with pytest.raises(StoreUnavailable):
        await upload.complete()
    await upload.abort()
    assert await keys_of(store) == []


async def test_an_object_is_deleted_and_deleting_it_again_is_no_error(store: ObjectStore) -> None:
    """Only the named object is deleted; deleting a missing object succeeds."""
    deleted, kept = "raw/date=1/city=~S%C3%A3o/one.json", "quarantine/date=1/city=~S%C3%A3o/one.json"
    await store.put(deleted, b"{}")
    await store.put(kept, b"{}")
    await store.delete(deleted)
    await store.delete(deleted)
    assert await keys_of(store) == [kept]


async def test_wrong_credentials_and_a_missing_bucket_are_dependency_outages(
    embedded: EmbeddedServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither looks like a missing object: what cannot be read now is not taken for nothing."""
    async with S3Store(settings_of(embedded.s3_endpoint_url)) as missing:
        with pytest.raises(StoreUnavailable):
            await missing.get("a.json")
        with pytest.raises(StoreUnavailable):
            await BucketCheck(missing, timeout_s=30)()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    settings = settings_of(embedded.s3_endpoint_url).model_copy(update={"s3_bucket": embedded.bucket})
    async with S3Store(settings) as refused:
        with pytest.raises(StoreUnavailable):
            await refused.get("a.json")
        with pytest.raises(StoreUnavailable):
            await refused.compare_and_swap("a.json", b"1", etag=None)


async def test_corrected_credentials_are_used_without_a_restart(
    embedded: EmbeddedServices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A store refused for its credentials works once their file has been corrected, without a new process."""
    monkeypatch.setattr(s3, "CREDENTIALS_INTERVAL_S", 0.1)
    file = tmp_path / "credentials"
    lines = f"[default]\naws_access_key_id = {embedded.access_key}\naws_secret_access_key = "
    file.write_text(f"{lines}wrong\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    settings = settings_of(embedded.s3_endpoint_url).model_copy(update={"s3_bucket": embedded.bucket})
    async with S3Store(settings) as store:
        with pytest.raises(StoreUnavailable):
            await store.check()
        file.write_text(f"{lines}{embedded.secret_key}\n")

        async def accepted() -> bool | None:
            with contextlib.suppress(StoreUnavailable):
                await store.check()
                return True
            return None

        await eventually(accepted, "the corrected credentials to be used")
        await store.compare_and_swap(f"{uuid.uuid4().hex}.json", b"1", etag=None)


async def test_a_response_that_breaks_off_is_a_dependency_outage(embedded: EmbeddedServices) -> None:
    """An object whose body is cut off on the way, whole or in chunks, is unavailable: never short, never missing."""
    settings = settings_of(embedded.s3_endpoint_url)
    async with S3Store(settings) as direct:
        await direct.create_bucket()
        await direct.put("a.json", bytes(100_000))
    async with FaultyS3(int(embedded.s3_endpoint_url.rpartition(":")[2])) as proxy:
        behind = settings.model_copy(update={"s3_endpoint_url": proxy.url})
        # A read resumes where the response broke off, so one truncated response is not enough.
        proxy.script = [("GET", "a.json", Fault.RESPONSE_TRUNCATED) for _ in range(20)]
        async with S3Store(behind) as store:
            with pytest.raises(StoreUnavailable):
                await store.get("a.json")
            with pytest.raises(StoreUnavailable):
                _ = [chunk async for chunk in store.stream("a.json")]
            proxy.script = []
            found = await store.get("a.json")
    assert found is not None
    assert found.body == bytes(100_000)


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER_APPLYING, Fault.ERROR_500_AFTER_APPLYING])
async def test_a_lost_response_never_causes_a_second_write(embedded: EmbeddedServices, fault: Fault) -> None:
    """A swap that was applied and not answered is a fault, is not sent again, and the object is its own."""
    settings = settings_of(embedded.s3_endpoint_url)
    async with S3Store(settings) as direct:
        await direct.create_bucket()
    async with FaultyS3(int(embedded.s3_endpoint_url.rpartition(":")[2])) as proxy:
        proxy.script = [("PUT", "a.json", fault)]
        async with S3Store(settings.model_copy(update={"s3_endpoint_url": proxy.url})) as store:
            with pytest.raises(StoreUnavailable):
                await store.compare_and_swap("a.json", b"mine", etag=None)
            with pytest.raises(CasConflict):
                await store.compare_and_swap("a.json", b"other", etag=None)
            found = await store.get("a.json")
        assert proxy.injected[fault] == 1
    assert found is not None
    assert found.body == b"mine"


async def test_a_conflict_with_a_write_under_way_is_retried(embedded: EmbeddedServices) -> None:
    """A swap that conflicts with another write under way is tried again, and wins if there is no other after all."""
    settings = settings_of(embedded.s3_endpoint_url)
    async with S3Store(settings) as direct:
        await direct.create_bucket()
    async with FaultyS3(int(embedded.s3_endpoint_url.rpartition(":")[2])) as proxy:
        proxy.script = [("PUT", "a.json", Fault.CONFLICT_409) for _ in range(2)]
        async with S3Store(settings.model_copy(update={"s3_endpoint_url": proxy.url})) as store:
            await store.compare_and_swap("a.json", b"mine", etag=None)
        assert proxy.script == []


async def test_an_unreachable_store_is_a_dependency_outage() -> None:
    """A store that nobody listens for is unavailable, in every method."""
    async with S3Store(settings_of("http://127.0.0.1:1")) as away:
        for attempt in (
            away.get("a"),
            away.compare_and_swap("a", b"", etag=None),
            away.put("a", b""),
            away.upload("a").complete(),
            keys_of(away),
        ):
            with pytest.raises(StoreUnavailable):
                await attempt
