"""Settings from the environment, and the messages for invalid ones."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shared.domain.file_rules import BadRecordsMax, FileRules, RecordsForm
from shared.runtime.settings import PREFIX, InvalidSettings, Settings, load_settings
from tests import ROOT

TABLE = ROOT / "docs" / "reference" / "settings.md"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("API_PORT", "http", "whole number"),
        ("API_PORT", "70000", "65535 or less"),
        ("UPSTREAM_URL", "ftp://files.example.com", "http://"),
        ("UPSTREAM_URL", "http://", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://transit.example.com:99999", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://transit.example.com:x", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://transit example.com", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://[::1", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://transit.example.com/?key=1", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://transit.example.com/#a", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://transit.example.com:0", "such as http://127.0.0.1:8090"),
        ("UPSTREAM_URL", "http://xn--a", "such as http://127.0.0.1:8090"),
        ("KAFKA_BOOTSTRAP_SERVERS", "broker", "host:port"),
        ("KAFKA_BOOTSTRAP_SERVERS", "broker:0", "host:port"),
        ("TOPIC_PREFIX", "a b", "pattern"),
        ("API_CORS_ORIGINS", "https://a.example.com, example.com", "https://dashboard.example.com"),
        ("S3_BUCKET", "", "3 characters"),
        ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("INGEST_STREAMS", "0", "1 or more"),
        ("INGEST_BAD_RECORDS_MAX", "-1", "such as 100, or a percentage of them such as 0.5%"),
        ("INGEST_BAD_RECORDS_MAX", "101%", "such as 100, or a percentage of them such as 0.5%"),
        ("INGEST_BAD_RECORDS_MAX", "1e3", "such as 100, or a percentage of them such as 0.5%"),
        ("INGEST_RECORDS", "data.trips", "JSON Pointer such as /data/trips"),
        ("INGEST_RECORDS", "/a~2b", "~0 for a tilde"),
        ("INGEST_RECORDS", "", "array, lines"),
        ("INGEST_RECORDS", "/a" * 17, "at most 16 keys"),
        ("INGEST_OTHER_DATES", "yes", "'counted' or 'bad'"),
    ],
)
def test_an_invalid_value_is_refused_with_the_rule(variable: str, value: str, expected: str) -> None:
    """The message names the variable, its value and the allowed values."""
    with pytest.raises(InvalidSettings) as refused:
        load_settings({f"{PREFIX}{variable}": value})
    message = str(refused.value)
    assert message.startswith(f"{PREFIX}{variable}={value!r}: ")
    assert expected in message


@pytest.mark.parametrize("variable", ["UPSTREAM_URL", "S3_ENDPOINT_URL"])
def test_a_password_in_a_url_is_refused_and_not_shown(variable: str) -> None:
    """URLs appear in manifests, failure reasons and logs, so a password has its own variable."""
    with pytest.raises(InvalidSettings) as refused:
        load_settings({f"{PREFIX}{variable}": "https://me:se@cret@transit.example.com"})
    assert str(refused.value).startswith(f"{PREFIX}{variable}='https://…@transit.example.com': ")
    assert f"{PREFIX}UPSTREAM_PASSWORD_FILE" in str(refused.value)


@pytest.mark.parametrize(
    "written", ["me:sesame@broker:9092", "a:1,me:ses/ame@broker:9092", "kafka://me:sesame@broker:9092"]
)
def test_a_password_among_the_brokers_is_refused_and_not_shown(written: str) -> None:
    """The addresses of the brokers appear in logs."""
    with pytest.raises(InvalidSettings) as refused:
        load_settings({f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": written})
    assert "@broker:9092': each broker must be host:port without a name and password" in str(refused.value)
    assert "ame" not in str(refused.value).partition("each broker")[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"PASSWORD": "sesame"}, "UPSTREAM_USERNAME is empty"),
        ({"PASSWORD_FILE": "password"}, "UPSTREAM_USERNAME is empty"),
        ({"USERNAME": "me", "PASSWORD": "sesame", "PASSWORD_FILE": "password"}, "not both"),
        ({"USERNAME": "me:too"}, "pattern"),
    ],
)
def test_an_incomplete_upstream_login_is_refused(given: dict[str, str], expected: str) -> None:
    """A password needs a name and exactly one source; a name has no colon (RFC 7617)."""
    with pytest.raises(InvalidSettings, match=expected) as refused:
        load_settings({f"{PREFIX}UPSTREAM_{name}": value for name, value in given.items()})
    assert "sesame" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8090", "https://[::1]:1/api/v1", "http://transit"])
def test_slashes_at_the_end_of_a_url_are_removed(url: str) -> None:
    """A URL of a host, with or without a port and a path, is otherwise unchanged."""
    assert load_settings({f"{PREFIX}UPSTREAM_URL": f"{url}/"}).upstream_url == url


def test_file_rules_follow_the_settings() -> None:
    """Form, limit and other dates of the environment make one object; by default no record may be bad."""
    assert load_settings({}).file_rules == FileRules()
    given = {"INGEST_RECORDS": "/data/trips", "INGEST_BAD_RECORDS_MAX": "0.5%", "INGEST_OTHER_DATES": "bad"}
    assert load_settings({PREFIX + name: value for name, value in given.items()}).file_rules == FileRules(
        form=RecordsForm(path=("data", "trips")),
        bad_records_max=BadRecordsMax.parse("0.5%"),
        other_dates_are_bad=True,
    )


def test_all_invalid_values_are_reported_at_once() -> None:
    """Two invalid values make two lines."""
    with pytest.raises(InvalidSettings) as refused:
        load_settings({"TRIPFOLD_API_PORT": "x", "TRIPFOLD_LOG_LEVEL": "x"})
    assert len(str(refused.value).splitlines()) == 2


def test_a_process_with_an_invalid_setting_does_not_start() -> None:
    """A service exits with code 1 and one clear line, without a traceback."""
    environment = {**os.environ, "TRIPFOLD_API_PORT": "eighty"}
    ended = subprocess.run(
        [sys.executable, "-m", "tripfold", "serve", "api"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "TRIPFOLD_API_PORT='eighty'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_reference_lists_every_setting_with_its_default() -> None:
    """The table in docs/reference/settings.md has a row for each setting, and none for another."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip().strip("`") for cell in line.split("|")] for line in lines if line.startswith(f"| `{PREFIX}")]
    rows = {variable: default for _, variable, default, *_ in cells}
    defaults = {
        f"{PREFIX}{name}".upper(): "" if field.default is None else str(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert rows == defaults
