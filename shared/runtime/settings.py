"""The settings: one typed class, read from the environment, with the prefix ``TRIPFOLD_``.

The credentials for S3 are the usual AWS variables (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, profiles,
instance roles): the S3 client finds them by itself.
"""

from __future__ import annotations

import datetime as dt
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.domain.errors import OperatorError
from shared.domain.file_rules import BadRecordsMax, FileRules, RecordsForm

PREFIX = "TRIPFOLD_"
SECRET_BYTES_MAX = 64 * 1024

Port = Annotated[int, Field(ge=0, le=65535)]


_NAME_AND_PASSWORD = re.compile(r"(?<=://)[^/?#]*(?=@)|\A(?!\w+://).*(?=@)")
_NEITHER_QUERY_NOR_FRAGMENT = re.compile(r"[^\s?#]+")


class InvalidSettings(OperatorError):
    """A variable of the environment has a value that cannot be used. The message names both, and the remedy."""


class Settings(BaseSettings):
    """Everything that can be set, with its default. Units stand at the end of a name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    upstream_url: str = Field(default="http://127.0.0.1:8090", description="where the trip files come from")
    upstream_username: str = Field(
        default="", pattern="^[^:]*$", description="the name shown to the upstream (HTTP Basic); empty: none"
    )
    upstream_password: SecretStr = Field(default=SecretStr(""), description="the password shown to the upstream")
    upstream_password_file: str = Field(default="", description="a file that holds the password instead")
    upstream_attempts: int = Field(
        default=5, ge=1, le=100, description="how often a city's file is tried before it fails"
    )
    upstream_resumptions: int = Field(
        default=10, ge=0, le=1000, description="how often in one attempt a broken download goes on where it broke"
    )
    upstream_outage_limit_s: float = Field(
        default=900, ge=0, description="how long an upstream that is down is waited for before its cities fail"
    )
    upstream_retry_after_max_s: float = Field(
        default=300, ge=0, description="the longest wait that the upstream may ask for (`Retry-After`)"
    )
    upstream_read_timeout_s: float = Field(default=30, gt=0, description="how long one read from the upstream may take")
    upstream_deadline_s: float = Field(
        default=3600, gt=0, description="how long one answer of the upstream may take, resumptions included"
    )
    upstream_bytes_per_s_min: float = Field(
        default=1024, ge=0, description="a download slower than this is broken off; 0: none is"
    )
    upstream_speed_window_s: float = Field(
        default=60, gt=0, description="the time over which a download's speed is measured"
    )
    upstream_concurrency_max: int = Field(
        default=8, ge=1, le=1000, description="requests to the upstream that one process makes side by side"
    )
    upstream_requests_per_s: float = Field(
        default=20, gt=0, le=10_000, description="requests to the upstream that one process makes in a second"
    )
    upstream_redirect_hosts: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9.:,_\[\]-]*$",
        description="other hosts, or `host:port`, that the upstream may redirect to, separated by commas",
    )
    upstream_file_bytes_max: int = Field(
        default=16 * 1024**3, ge=1, description="the largest trip file that is taken, in bytes after content-encoding"
    )
    upstream_ratio_max: float = Field(
        default=200, ge=1, description="how many times larger than it came a compressed body may become"
    )

    upstream_allow_no_cities: bool = Field(
        default=False,
        description="whether a list of cities without a good entry is a plan of no cities; otherwise its request fails",
    )
    upstream_ca_file: str = Field(
        default="", description="certificates (PEM) that an https upstream's is checked by; empty: the system's"
    )

    kafka_bootstrap_servers: str = Field(
        default="127.0.0.1:9092", description="brokers to begin with, separated by commas"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="whether Kafka is reached over TLS, and with a name and password"
    )
    kafka_ca_file: str = Field(
        default="", description="certificates (PEM) that the brokers' are checked by; empty: the system's"
    )
    kafka_certificate_file: str = Field(default="", description="the certificate (PEM) shown to Kafka; empty: none")
    kafka_certificate_key_file: str = Field(
        default="", description="its private key (PEM); empty: in the certificate's file"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="SCRAM-SHA-512", description="how the name and password are shown to Kafka"
    )
    kafka_username: str = Field(default="", description="the name shown to Kafka")
    kafka_password: SecretStr = Field(default=SecretStr(""), description="the password shown to Kafka")
    kafka_password_file: str = Field(default="", description="a file that holds the password instead")
    kafka_partitions: int = Field(default=12, ge=1, le=10_000, description="partitions of a topic that is provisioned")
    kafka_replication: int = Field(default=1, ge=1, le=32_767, description="replicas of a topic that is provisioned")
    topic_prefix: str = Field(
        default="", pattern=r"^[A-Za-z0-9._-]*$", description="put before the name of every topic"
    )
    kafka_group_instance_id: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._-]*$",
        description="this process's name in its consumer groups; empty: no static one",
    )
    session_timeout_s: float = Field(default=30, ge=6, description="after this silence a consumer is taken for dead")

    s3_endpoint_url: str | None = Field(default=None, description="the S3 server; unset: AWS")
    s3_bucket: str = Field(default="tripfold", min_length=3, description="the bucket that holds everything")
    s3_region: str = Field(default="us-east-1", description="the bucket's region")
    s3_addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="path", description="how a bucket is named in URLs"
    )
    s3_checksums: Literal["when_required", "when_supported"] = Field(
        default="when_required",
        description="when the S3 client adds checksums to what it writes: some stores refuse them",
    )
    s3_ca_file: str = Field(
        default="",
        description="certificates (PEM) of authorities that may vouch for an https S3 server, beside the system's",
    )
    s3_pool_size: int = Field(default=32, ge=1, le=1000, description="connections to S3 of one process")

    ingest_streams: int = Field(default=4, ge=1, le=64, description="city-days that one worker streams side by side")
    ingest_batch: int = Field(default=16, ge=1, le=1000, description="tasks that one worker takes at a time")
    ingest_deadline_s: float = Field(default=3600, ge=1, description="the longest that one city-day may take")
    ingest_records: str = Field(
        default="array",
        description="where a file's trips are: an `array`, one in each of its `lines`, or an array under a path, "
        "as a JSON Pointer like `/data/trips`",
    )
    ingest_max_bad_records: str = Field(
        default="0",
        description="how many bad records a file may have, which are left out: a number, or a percentage like `0.5%`",
    )
    ingest_other_dates: Literal["counted", "bad"] = Field(
        default="counted", description="what a trip that departs on another date than its file's is"
    )
    raw_retention_days: int | None = Field(
        default=None,
        ge=1,
        le=36_600,
        description="raw objects older than so many days may be gone on purpose, as by a lifecycle rule on `raw/`; "
        "unset: all are kept, and one that is missing is lost",
    )
    quarantine_days: int = Field(
        default=90, ge=1, le=36_600, description="for how many days `tripfold gc` leaves a file in quarantine alone"
    )
    aggregate_batch: int = Field(default=2_000, ge=1, le=100_000, description="events that are folded at a time")
    aggregate_linger_ms: int = Field(
        default=100, ge=1, le=60_000, description="how long events are gathered for one fold"
    )
    aggregate_cache_bytes: int = Field(
        default=64 * 1024**2, ge=0, description="memory for the summaries that the aggregate keeps"
    )
    progress_interval_s: float = Field(
        default=1.0, ge=0, le=60, description="the shortest time between two writes of a request's progress"
    )
    stalled_request_after_s: float = Field(
        default=600, ge=1, description="a request without progress for so long is published again, with the same id"
    )

    api_host: str = Field(default="127.0.0.1", description="the address that the API listens on")
    api_port: Port = Field(default=8080, description="the port that the API listens on")
    api_range_days_max: int = Field(default=366, ge=1, le=36_600, description="the longest range of one query, in days")
    api_request_days_max: int = Field(
        default=31, ge=1, le=366, description="the most dates that one request may ask for"
    )
    api_date_first: dt.date = Field(default=dt.date(2000, 1, 1), description="the earliest date that may be processed")
    api_days_ahead_max: int = Field(
        default=366, ge=0, le=36_600, description="the latest date that may be processed, in days after today (UTC)"
    )
    api_cache_bytes: int = Field(default=64 * 1024**2, ge=0, description="summary heads that the API keeps in memory")
    api_response_cache_bytes: int = Field(
        default=32 * 1024**2, ge=0, description="long answers that the API keeps in memory"
    )

    api_access: Literal["keys", "open-without-keys", "open"] = Field(
        default="keys",
        description="who may use the API: those with a key (`keys`); everybody, if no key is named "
        "(`open-without-keys`); everybody (`open`, which is refused if a key is named)",
    )
    api_keys: str = Field(
        default="",
        repr=False,
        description="keys as name:scopes:sha256, separated by commas; scopes are read, process or read+process",
    )
    api_keys_file: str = Field(default="", description="a file of such keys, one a line; empty: none")
    api_requests_per_minute: int = Field(
        default=600,
        ge=1,
        le=1_000_000,
        description="how often one key may ask in a minute; without keys, how often one client may process",
    )
    api_cors_origins: str = Field(
        default="",
        description="origins whose pages may use the API, separated by commas; `*`: any; empty: none but its own",
    )

    health_host: str = Field(default="127.0.0.1", description="where ingest and aggregate answer health and metrics")
    health_port: Port = Field(default=8081, description="their port; 0: any free one")

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least that is logged"
    )
    log_format: Literal["json", "text"] = Field(default="json", description="how a log line is written")
    retry_wait_max_s: float = Field(
        default=30, gt=0, description="the longest wait between two tries when S3 or Kafka is down"
    )

    @field_validator("upstream_url", "s3_endpoint_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL that begins with http:// or https://")
        if _NAME_AND_PASSWORD.search(value):
            raise ValueError(
                "expected a URL without a name and password, which would stand in logs and objects: the upstream's go "
                f"into {PREFIX}UPSTREAM_USERNAME and {PREFIX}UPSTREAM_PASSWORD_FILE, those of S3 into the AWS variables"
            )
        if not _is_up_to_a_path(value):
            raise ValueError("expected a URL of a host, and perhaps a port and a path, such as http://127.0.0.1:8090")
        return value.rstrip("/")

    @property
    def raw_retention(self) -> dt.timedelta | None:
        """How long raw objects are kept at least; None: for ever."""
        return None if self.raw_retention_days is None else dt.timedelta(days=self.raw_retention_days)

    @property
    def file_rules(self) -> FileRules:
        """The rules of trip files that the settings make."""
        return FileRules(
            form=RecordsForm.parse(self.ingest_records),
            bad_records_max=BadRecordsMax.parse(self.ingest_max_bad_records),
            other_dates_are_bad=self.ingest_other_dates == "bad",
        )

    @field_validator("ingest_records")
    @classmethod
    def _records_form(cls, value: str) -> str:
        return str(RecordsForm.parse(value))

    @field_validator("ingest_max_bad_records")
    @classmethod
    def _bad_records_max(cls, value: str) -> str:
        return str(BadRecordsMax.parse(value))

    @field_validator("api_cors_origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        for origin in filter(None, (part.strip() for part in value.split(","))):
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError("expected origins like https://dashboard.example.com, without a path, or *")
        return value

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _servers(cls, value: str) -> str:
        if "@" in value:
            raise ValueError(
                "expected host:port without a name and password, which would stand in logs: they go into "
                f"{PREFIX}KAFKA_USERNAME and {PREFIX}KAFKA_PASSWORD_FILE"
            )
        for server in value.split(","):
            host, _, port = server.strip().rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError("expected host:port, or several separated by commas")
        return value

    @model_validator(mode="after")
    def _sasl_is_whole(self) -> Self:
        if self.kafka_uses_sasl and not self.kafka_username:
            raise ValueError(
                f"{PREFIX}KAFKA_USERNAME is empty: {PREFIX}KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} "
                "needs a name"
            )
        if self.kafka_uses_sasl and bool(self.kafka_password.get_secret_value()) == bool(self.kafka_password_file):
            raise ValueError(
                f"{PREFIX}KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs either "
                f"{PREFIX}KAFKA_PASSWORD or {PREFIX}KAFKA_PASSWORD_FILE, not both"
            )
        return self

    @model_validator(mode="after")
    def _upstream_login_is_whole(self) -> Self:
        if self.upstream_password.get_secret_value() and self.upstream_password_file:
            raise ValueError(f"{PREFIX}UPSTREAM_PASSWORD and {PREFIX}UPSTREAM_PASSWORD_FILE: set one, not both")
        has_password = bool(self.upstream_password.get_secret_value() or self.upstream_password_file)
        if has_password and not self.upstream_username:
            raise ValueError(f"{PREFIX}UPSTREAM_USERNAME is empty: a password for the upstream needs a name")
        return self

    @property
    def kafka_uses_tls(self) -> bool:
        """Whether Kafka is reached over TLS."""
        return self.kafka_security_protocol.endswith("SSL")

    @property
    def kafka_uses_sasl(self) -> bool:
        """Whether Kafka is shown a name and a password."""
        return self.kafka_security_protocol.startswith("SASL")


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from the environment of the process, or from the one given.

    Raises InvalidSettings with a line for each wrong variable: its name, its value and what was expected.
    """
    try:
        if environment is None:
            return Settings()
        given = {name.upper(): value for name, value in environment.items()}
        return Settings.model_validate(
            {field: given[name] for field in Settings.model_fields if (name := f"{PREFIX}{field}".upper()) in given}
        )
    except ValidationError as error:
        raise InvalidSettings("\n".join(map(_line, error.errors()))) from None


def _line(fault: ErrorDetails) -> str:
    reason = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:  # of several variables together, which the reason names; the input would be all of them
        return reason
    given = fault["input"]
    shown = _NAME_AND_PASSWORD.sub("…", given) if isinstance(given, str) else given
    return f"{PREFIX}{'_'.join(map(str, fault['loc'])).upper()}={shown!r}: {reason}"


def _is_up_to_a_path(url: str) -> bool:
    """Tell whether a URL names a host and ends where a path can be put after it."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and _NEITHER_QUERY_NOR_FRAGMENT.fullmatch(url) is not None
    except ValueError:  # a port beyond any, or half an IPv6 address
        return False


def secret_value(given: SecretStr, path: str, variable: str) -> str:
    """Return what stands in the file, if there is one, or else the secret that was given by itself.

    Raises InvalidSettings as `read_secret` does.
    """
    return read_secret(path, variable) if path else given.get_secret_value()


def read_secret(path: str, variable: str) -> str:
    """Return what stands in a file, without the line break at its end.

    Raises InvalidSettings, which names ``variable`` and never the content, if the file cannot be read, is empty,
    is no UTF-8 or is longer than a secret is.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidSettings(f"{variable}={path!r}: the file cannot be read: {error.strerror}") from error
    if len(content) > SECRET_BYTES_MAX:
        raise InvalidSettings(f"{variable}={path!r}: the file is longer than a secret is")
    try:
        secret = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise InvalidSettings(f"{variable}={path!r}: the file holds no UTF-8 text") from None
    if not secret:
        raise InvalidSettings(f"{variable}={path!r}: the file is empty")
    return secret


def tls_client_context(ca_file: str, *, certificate_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """Return a context that verifies the server's name and certificate: TLS 1.2 or later.

    It trusts the authorities in ``ca_file`` (PEM) alone, or the system's if that is empty, and shows the
    certificate in ``certificate_file`` (PEM, with its chain) if there is one; ``key_file`` may be the same file.
    Raises InvalidSettings if a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings(f"the certificates in {ca_file} cannot be used: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate_file:
        try:
            context.load_cert_chain(certificate_file, key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSettings(f"the certificate in {certificate_file} cannot be used: {error}") from error
    return context
