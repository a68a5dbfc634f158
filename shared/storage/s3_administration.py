"""Bucket administration with aioboto3: create the bucket, read the store's clock, list and abort uploads.

obstore cannot do this. Only operator commands need it, and only this module imports aioboto3, which takes 30 MB of
memory.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self

import aioboto3
import aiohttp
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from shared.runtime.settings import Settings
from shared.storage.object_store import StoreUnavailable, UnfinishedUpload

_FAULTS = (ClientError, BotoCoreError, OSError, aiohttp.ClientError)


class S3Administration:
    """Administers a bucket. Use it as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._bucket = settings.s3_bucket
        self._region = settings.s3_region
        self._connecting = aioboto3.Session().client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            verify=settings.s3_ca_file or None,
            config=Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": 3},
                request_checksum_calculation=settings.s3_checksums,
                response_checksum_validation=settings.s3_checksums,
                signature_version="s3v4",
                s3={"addressing_style": settings.s3_addressing_style},
            ),
        )
        self._client: Any = None

    async def __aenter__(self) -> Self:
        with _faults("client", self._bucket):
            self._client = await self._connecting.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connecting.__aexit__(kind, error, trace)

    async def create_bucket(self) -> bool:
        """Create the bucket if it does not exist. Return whether it was created."""
        with _faults("HeadBucket", self._bucket):
            try:
                await self._client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                if _status(error) != 404:
                    raise
            else:
                return False
        location = {"LocationConstraint": self._region}
        extra = {} if self._region == "us-east-1" else {"CreateBucketConfiguration": location}
        with _faults("CreateBucket", self._bucket):
            await self._client.create_bucket(Bucket=self._bucket, **extra)
        return True

    async def now(self) -> dt.datetime:
        """Return the time of the store's clock."""
        with _faults("HeadBucket", self._bucket):
            response = await self._client.head_bucket(Bucket=self._bucket)
        date = response["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise StoreUnavailable(
                "S3 HeadBucket: the response has no Date header, so the clock of the store is unknown"
            )
        return email.utils.parsedate_to_datetime(date)

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        """List the unfinished multipart uploads under ``prefix``."""
        with _faults("ListMultipartUploads", prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
            async for page in pages:
                for entry in page.get("Uploads", ()):
                    yield UnfinishedUpload(key=entry["Key"], upload_id=entry["UploadId"], begun_at=entry["Initiated"])

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        """Abort an upload of another process. Succeeds if it has ended since."""
        with _faults("AbortMultipartUpload", unfinished.key):
            try:
                await self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=unfinished.key, UploadId=unfinished.upload_id
                )
            except ClientError as error:
                if _status(error) != 404:
                    raise


@contextlib.contextmanager
def _faults(operation: str, name: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise StoreUnavailable(f"S3 {operation} of {name}: {error or type(error).__name__}") from error


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
