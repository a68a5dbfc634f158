"""Listings taken apart by their few elements, and what is left to botocore."""

from __future__ import annotations

import datetime as dt

import pytest

from shared.kept_connections import Declined
from shared.quick_requests import Entry, Page, bucket_url_of, parse_page, proxy_of

WHEN = dt.datetime(2024, 5, 2, 1, 2, 3, tzinfo=dt.UTC)
ENTRY = (
    "<Contents><Key>raw/{key}</Key><LastModified>2024-05-02T01:02:03.000Z</LastModified><ETag>&quot;e&quot;</ETag>"
    "<Size>7</Size><Owner><ID>x</ID></Owner><StorageClass>STANDARD</StorageClass></Contents>"
)


def listing(*keys: str, rest: str = "<IsTruncated>false</IsTruncated>", count: int | None = None) -> bytes:
    """Return a listing as a store writes it."""
    entries = "".join(ENTRY.format(key=key) for key in keys)
    told = f"<KeyCount>{len(keys) if count is None else count}</KeyCount>"
    return f'<?xml version="1.0"?><ListBucketResult xmlns="x">{rest}{told}{entries}</ListBucketResult>'.encode()


def entry(key: str) -> Entry:
    """Return the entry that `ENTRY` stands for."""
    return Entry(key=f"raw/{key}", etag='"e"', size_bytes=7, last_modified=WHEN)


def test_a_last_page() -> None:
    """A page that is not truncated is the last; entities are resolved, and so are percent signs where it says so."""
    assert parse_page(listing()) == Page([], None)
    assert parse_page(listing("a&amp;b", "a%20b")) == Page([entry("a&b"), entry("a%20b")], None)
    url = "<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
    assert parse_page(listing("a%20b%2Bc", "d+e", rest=url)) == Page([entry("a b+c"), entry("d+e")], None)


def test_a_page_before_others() -> None:
    """A truncated page has the token of the next one."""
    rest = "<IsTruncated>true</IsTruncated><NextContinuationToken>a&amp;b=</NextContinuationToken>"
    assert parse_page(listing("a", rest=rest)) == Page([entry("a")], "a&b=")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<Error><Code>SlowDown</Code></Error>",
        listing("a", count=2),
        listing("a", rest=""),
        listing("a", rest="<IsTruncated>true</IsTruncated>"),
        listing("a").replace(b"<Size>7</Size>", b""),
        listing("a").replace(b"7", b"many"),
        listing("a").replace(b"2024-05-02T01", b"yesterday"),
        listing("a")[:-60],
        listing("a").replace(b"raw/a", b"\xff"),
    ],
)
def test_what_is_left_to_botocore(body: bytes) -> None:
    """A listing that is cut, or says less than it should, is not believed."""
    with pytest.raises(Declined):
        parse_page(body)


@pytest.mark.parametrize(
    ("endpoint_url", "style", "url"),
    [
        ("http://127.0.0.1:9000", "path", "http://127.0.0.1:9000/tripfold"),
        ("https://s3.eu-north-1.amazonaws.com", "virtual", "https://tripfold.s3.eu-north-1.amazonaws.com"),
        ("https://gateway.example/s3/", "path", "https://gateway.example/s3/tripfold"),
        ("https://gateway.example/s3", "virtual", None),
        ("https://s3.amazonaws.com", "auto", None),
    ],
)
def test_url_of_a_bucket(endpoint_url: str, style: str, url: str | None) -> None:
    """A bucket is in the path or in the host's name, as the settings say; where that is not clear, botocore decides."""
    assert bucket_url_of(endpoint_url, "tripfold", style) == url


def test_proxy_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is that of the URL's scheme, unless the host is to be reached without one."""
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    assert proxy_of("http://s3.example/tripfold") == "http://proxy.example:3128"
    assert proxy_of("https://s3.example/tripfold") is None
    assert proxy_of("http://127.0.0.1:9000/tripfold") is None
