"""Signatures, beside those of botocore."""

from __future__ import annotations

import datetime as dt
from unittest import mock
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from shared.signature import Signer

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
keys = st.lists(printable, min_size=1, max_size=4).map("/".join)
queries = st.dictionaries(st.sampled_from(["prefix", "list-type", "max-keys", "start-after"]), printable)
moments = st.datetimes(
    dt.datetime(2000, 1, 1),  # noqa: DTZ001 - Hypothesis wants bounds without a zone
    dt.datetime(2199, 1, 1),  # noqa: DTZ001 - as above
    timezones=st.just(dt.UTC),
)
moment_pairs = st.lists(moments, min_size=1, max_size=3)


@given(
    method=st.sampled_from(["GET", "PUT"]),
    key=keys,
    query=queries,
    headers=st.dictionaries(st.sampled_from(["if-match", "if-none-match", "range", "content-type"]), printable),
    body=st.binary(max_size=50),
    secrets=st.lists(st.tuples(printable, printable, st.none() | printable), min_size=1, max_size=2),
    moments=moment_pairs,
)
def test_a_request_is_signed_as_botocore_signs_it(
    method: str,
    key: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    secrets: list[tuple[str, str, str | None]],
    moments: list[dt.datetime],
) -> None:
    """Every header of the signature is botocore's, also when the day or the credentials change on the way."""
    signer = Signer("eu-north-1")
    path = "/bucket/" + quote(key, safe="/-_.~")
    told = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
    for now in moments:
        for secret in secrets:
            credentials = Credentials(*secret)
            request = AWSRequest(
                method=method, url=f"https://s3.example:8443{path}?{told}", headers=dict(headers), data=body
            )
            with mock.patch("botocore.auth.get_current_datetime", return_value=now.replace(tzinfo=None)):
                S3SigV4Auth(credentials, "s3", "eu-north-1").add_auth(request)
            signed = signer.signed(
                credentials,
                now,
                method,
                path,
                query=told,
                headers={"host": "s3.example:8443", **headers},
                body=body,
            )
            expected = {name.lower(): value for name, value in request.headers.items()}
            assert {name: value for name, value in signed.items() if name != "host"} == expected
