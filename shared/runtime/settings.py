"""The settings, read from environment variables with the prefix ``TRIPFOLD_``; secrets in files; TLS contexts.

The S3 client itself finds its credentials: the usual AWS variables, profiles and instance roles.
"""

from __future__ import annotations

import ipaddress
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
from shared.domain.volume import VolumeRules

PREFIX = "TRIPFOLD_"
SECRET_BYTES_MAX = 64 * 1024
ATTEMPT_LIMIT_TIMES = 24
"""An attempt at a city-day may last so many deadlines: a slow S3 costs time, and no attempt."""

_RULES = {
    "bool_parsing": "it must be true or false",
    "date_from_datetime_parsing": "it must be a date such as 2024-05-01",
    "float_parsing": "it must be a number",
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be {ge} or more",
    "int_parsing": "it must be a whole number",
    "less_than_equal": "it must be {le} or less",
    "literal_error": "it must be {expected}",
    "string_pattern_mismatch": "it must match the pattern {pattern}",
    "string_too_short": "it must have {min_length} characters or more",
}
"""The rules of settings in plain words, by pydantic's type of error."""

PORT_MAX = 65_535
Port = Annotated[int, Field(ge=0, le=PORT_MAX)]

_NAME_AND_PASSWORD = re.compile(r"(?<=://)[^/?#]*(?=@)|\A(?!\w+://).*(?=@)")
_NEITHER_QUERY_NOR_FRAGMENT = re.compile(r"[^\s?#]+")


class InvalidSettings(OperatorError):
    """A setting is invalid. The message names the variable, its value and the remedy."""


class Settings(BaseSettings):
    """All settings with their defaults. The unit is at the end of a name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    upstream_url: str = Field(default="http://127.0.0.1:8090", description="base URL of the trip files")
    upstream_username: str = Field(default="", pattern="^[^:]*$", description="name for HTTP Basic; empty: no login")
    upstream_password: SecretStr = Field(default=SecretStr(""), description="password for HTTP Basic")
    upstream_password_file: str = Field(default="", description="file that holds the password")
    upstream_attempts: int = Field(
        default=5, ge=1, le=100, description="attempts at a city's file before the city fails"
    )
    upstream_resumptions: int = Field(
        default=10, ge=0, le=1000, description="times that one attempt resumes a broken download"
    )
    upstream_outage_limit_s: float = Field(
        default=900, ge=0, description="wait for an unreachable upstream before its cities fail"
    )
    upstream_read_timeout_s: float = Field(default=30, gt=0, description="longest wait for one read")
    upstream_deadline_s: float = Field(
        default=3600, gt=0, description="longest time that one response is waited for, with its resumptions"
    )
    upstream_bytes_per_s_min: float = Field(
        default=1024, ge=0, description="slowest download that is not aborted; 0: no limit"
    )
    upstream_speed_window_s: float = Field(
        default=60, gt=0, description="time over which the speed of a download is measured"
    )
    upstream_concurrency_max: int = Field(default=8, ge=1, le=1000, description="concurrent requests of one process")
    upstream_requests_per_s: float = Field(default=20, gt=0, le=10_000, description="request rate of one process")
    upstream_redirect_hosts: str = Field(
        default="", pattern=r"^[A-Za-z0-9.:,_\[\]-]*$", description="other hosts that the upstream may redirect to"
    )
    upstream_file_bytes_max: int = Field(
        default=16 * 1024**3, ge=1, description="largest trip file, in bytes after content-encoding"
    )
    upstream_decompression_ratio_max: float = Field(
        default=200, ge=1, description="largest ratio of decompressed to compressed bytes"
    )
    upstream_allow_empty_city_list: bool = Field(
        default=False,
        description="accept a list of cities without a valid entry as an empty plan; otherwise its request fails",
    )
    upstream_ca_file: str = Field(
        default="", description="authorities (PEM) for an https upstream; empty: the system's"
    )

    kafka_bootstrap_servers: str = Field(default="127.0.0.1:9092", description="first brokers")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="Kafka's `security.protocol`"
    )
    kafka_ca_file: str = Field(default="", description="authorities (PEM) for the brokers; empty: the system's")
    kafka_certificate_file: str = Field(default="", description="client certificate (PEM); empty: none")
    kafka_certificate_key_file: str = Field(
        default="", description="its private key (PEM); empty: in the certificate's file"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="SCRAM-SHA-512", description="SASL mechanism"
    )
    kafka_username: str = Field(default="", description="SASL name")
    kafka_password: SecretStr = Field(default=SecretStr(""), description="SASL password")
    kafka_password_file: str = Field(default="", description="file that holds the SASL password")
    kafka_partitions: int = Field(
        default=12,
        ge=1,
        le=10_000,
        description="partitions of each topic that `tripfold topics apply` makes; unset: at least those of the others",
    )
    kafka_replication_factor: int | None = Field(
        default=None,
        ge=1,
        le=32_767,
        description="replicas of each topic that `tripfold topics apply` makes; unset: 3, or one on each broker if "
        "there are fewer, and at least those of the other topics",
    )
    topic_prefix: str = Field(
        default="", pattern=r"^[A-Za-z0-9._-]*$", description="prefix of every topic and consumer group"
    )
    kafka_group_instance_id: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Kafka's `group.instance.id`: static membership; empty: dynamic",
    )
    kafka_session_timeout_s: float = Field(
        default=30,
        ge=6,
        description="Kafka's `session.timeout.ms`: silence after which a consumer loses its partitions",
    )

    s3_endpoint_url: str | None = Field(default=None, description="S3 server; unset: AWS")
    s3_bucket: str = Field(default="tripfold", min_length=3, description="the bucket")
    s3_region: str = Field(default="us-east-1", description="region of the bucket")
    s3_addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="path", description="where URLs carry the bucket's name"
    )
    s3_checksums: Literal["when_required", "when_supported"] = Field(
        default="when_required", description="when the S3 client adds checksums to its writes; some stores refuse them"
    )
    s3_ca_file: str = Field(
        default="", description="authorities (PEM) for an https endpoint, in addition to the system's"
    )

    ingest_streams: int = Field(
        default=4, ge=1, le=64, description="city-days that one worker streams at the same time"
    )
    ingest_background_share: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="share of ingest_streams and upstream_concurrency_max that backfills may use; at least one of each",
    )
    ingest_deadline_s: float = Field(
        default=3600, gt=0, description="longest time that one attempt at a city-day waits for the upstream"
    )
    ingest_records: str = Field(default="array", description="where a file has its trips")
    ingest_bad_records_max: str = Field(default="0", description="bad records that a file may have; they are left out")
    ingest_suspicious_files: Literal["counted", "quarantined", "unchecked"] = Field(
        default="counted", description="how a file is treated whose volume is unusual for its city and weekday"
    )
    ingest_volume_ratio_min: float = Field(
        default=0.65, ge=0, lt=1, description="smallest volume that is not suspicious, in usual volumes"
    )
    ingest_volume_ratio_max: float = Field(
        default=3.0, gt=1, description="largest volume that is not suspicious, in usual volumes"
    )
    ingest_other_dates: Literal["counted", "bad"] = Field(
        default="counted", description="how a trip is treated that departs on another date than its file's"
    )
    jobs_interval_s: float = Field(
        default=2,
        ge=0.1,
        le=3600,
        description="time between two checks of the open backfills by a planner",
    )
    quarantine_days: int = Field(
        default=90, ge=1, le=36_600, description="age at which `tripfold gc` deletes a refused file and its report"
    )
    aggregate_cache_bytes: int = Field(default=64 * 1024**2, ge=0, description="memory for cached summaries")
    tables_interval_s: float = Field(
        default=240,
        ge=0,
        le=86_400,
        description="longest time between two checks whether the Parquet tables are current; 0: build none",
    )
    progress_interval_s: float = Field(
        default=1.0, ge=0, le=60, description="shortest time between two writes of a request's progress"
    )
    stalled_request_after_s: float = Field(
        default=600, ge=1, description="a request without progress for this long is published again under its id"
    )

    api_host: str = Field(default="127.0.0.1", description="listen address")
    api_port: Port = Field(default=8080, description="listen port")
    api_range_days_max: int = Field(default=366, ge=1, le=36_600, description="longest range of one query, in days")
    api_completeness_days: int = Field(
        default=30, ge=0, le=366, description="latest dates whose completeness the metrics show; 0: none"
    )
    api_cache_bytes: int = Field(
        default=64 * 1024**2, ge=0, description="memory for summary heads; listings may take a quarter more"
    )
    api_response_cache_bytes: int = Field(
        default=32 * 1024**2, ge=0, description="memory for long responses; their encoded months may take as much"
    )

    api_access: Literal["keys", "open-without-keys", "open"] = Field(
        default="keys",
        description="who may use the API: holders of a key; everyone while no key is set; everyone (refused if a key "
        "is set)",
    )
    api_keys: str = Field(
        default="",
        repr=False,
        description="API keys; scopes are `read`, `process` or `read+process`. `tripfold api-key` prints an entry",
    )
    api_keys_file: str = Field(
        default="", description="file of such entries, one a line, read again when it changes; empty: none"
    )
    api_requests_per_minute: int = Field(
        default=600,
        ge=1,
        le=1_000_000,
        description="rate limit of each key; without keys, of the process requests of each client address",
    )
    api_trusted_proxies: str = Field(
        default="",
        description="proxies whose `X-Forwarded-For` names the client; empty: the client is who opens the connection",
    )
    api_shutdown_delay_s: float = Field(
        default=5,
        ge=0,
        le=3600,
        description="time that an API still serves after SIGTERM, while its health says that it stops; 0: it ends at "
        "once",
    )
    api_cors_origins: str = Field(default="", description="other origins whose pages may use the API")
    api_hosts: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9.,_ -]*$",
        description="names by which clients reach an API without keys, beside `localhost` and addresses",
    )

    health_host: str = Field(
        default="127.0.0.1", description="listen address of health and metrics of ingest and aggregate"
    )
    health_port: Port = Field(default=8081, description="their port; 0: any free port")

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lowest level that is logged"
    )
    log_format: Literal["json", "text"] = Field(default="json", description="format of a log line")
    retry_wait_max_s: float = Field(
        default=30, gt=0, description="longest wait between two tries while S3 or Kafka is unavailable"
    )

    @field_validator("upstream_url", "s3_endpoint_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("it must be a URL that begins with http:// or https://")
        if _NAME_AND_PASSWORD.search(value):
            raise ValueError(
                "it must be a URL without a name and password, which would appear in logs and objects. Put those of "
                f"the upstream in {PREFIX}UPSTREAM_USERNAME and {PREFIX}UPSTREAM_PASSWORD_FILE, and those of S3 "
                "in the AWS variables"
            )
        if not _is_base_url(value):
            raise ValueError(
                "it must be a URL of a host, with an optional port and path, such as http://127.0.0.1:8090"
            )
        return value.rstrip("/")

    @field_validator("ingest_records")
    @classmethod
    def _records_form(cls, value: str) -> str:
        return str(RecordsForm.parse(value))

    @field_validator("ingest_bad_records_max")
    @classmethod
    def _bad_records_max(cls, value: str) -> str:
        return str(BadRecordsMax.parse(value))

    @field_validator("api_cors_origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        for origin in filter(None, (part.strip() for part in value.split(","))):
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError("each origin must be like https://dashboard.example.com, without a path, or *")
        return value

    @field_validator("api_trusted_proxies")
    @classmethod
    def _proxies(cls, value: str) -> str:
        proxies = [proxy for part in value.split(",") if (proxy := part.strip())]
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise ValueError(
                    f"{proxy!r} is not the address of a proxy, such as 10.0.0.7, or of a network of proxies, such as "
                    "10.0.0.0/24"
                ) from None
        return ",".join(proxies)

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _servers(cls, value: str) -> str:
        if "@" in value:
            raise ValueError(
                "each broker must be host:port without a name and password, which would appear in logs. Put them in "
                f"{PREFIX}KAFKA_USERNAME and {PREFIX}KAFKA_PASSWORD_FILE"
            )
        for server in value.split(","):
            host, _, port = server.strip().rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) <= PORT_MAX:
                raise ValueError(f"it must be host:port, or several separated by commas; a port is 1 to {PORT_MAX}")
        return value

    @model_validator(mode="after")
    def _require_complete_sasl(self) -> Self:
        if self.kafka_uses_sasl and not self.kafka_username:
            raise ValueError(
                f"{PREFIX}KAFKA_USERNAME is empty; {PREFIX}KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} "
                "needs a name"
            )
        if self.kafka_uses_sasl and bool(self.kafka_password.get_secret_value()) == bool(self.kafka_password_file):
            raise ValueError(
                f"{PREFIX}KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs either "
                f"{PREFIX}KAFKA_PASSWORD or {PREFIX}KAFKA_PASSWORD_FILE, not both"
            )
        return self

    @model_validator(mode="after")
    def _require_complete_upstream_login(self) -> Self:
        if self.upstream_password.get_secret_value() and self.upstream_password_file:
            raise ValueError(
                f"{PREFIX}UPSTREAM_PASSWORD and {PREFIX}UPSTREAM_PASSWORD_FILE are both set; set one, not both"
            )
        has_password = bool(self.upstream_password.get_secret_value() or self.upstream_password_file)
        if has_password and not self.upstream_username:
            raise ValueError(f"{PREFIX}UPSTREAM_USERNAME is empty; a password for the upstream needs a name")
        return self

    @property
    def file_rules(self) -> FileRules:
        """The rules for trip files that follow from the settings."""
        return FileRules(
            form=RecordsForm.parse(self.ingest_records),
            bad_records_max=BadRecordsMax.parse(self.ingest_bad_records_max),
            other_dates_are_bad=self.ingest_other_dates == "bad",
        )

    @property
    def volume_rules(self) -> VolumeRules | None:
        """The rules for the volume of files, or None if it is not checked."""
        if self.ingest_suspicious_files == "unchecked":
            return None
        return VolumeRules(
            ratio_min=self.ingest_volume_ratio_min,
            ratio_max=self.ingest_volume_ratio_max,
            quarantined=self.ingest_suspicious_files == "quarantined",
        )

    @property
    def attempt_limit_s(self) -> float:
        """The longest duration of an attempt at a city-day, with the time that S3 takes."""
        return ATTEMPT_LIMIT_TIMES * self.ingest_deadline_s

    @property
    def kafka_uses_tls(self) -> bool:
        """Whether Kafka is reached over TLS."""
        return self.kafka_security_protocol.endswith("SSL")

    @property
    def kafka_uses_sasl(self) -> bool:
        """Whether clients authenticate to Kafka with a name and a password."""
        return self.kafka_security_protocol.startswith("SASL")


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``environment``, by default that of the process.

    Raises InvalidSettings with a line for each invalid variable, with its name, its value and the allowed values.
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
    if not fault["loc"]:  # several variables together: the message names them, and the input would be all settings
        return fault["msg"].removeprefix("Value error, ")
    given = fault["input"]
    shown = _NAME_AND_PASSWORD.sub("…", given) if isinstance(given, str) else given
    return f"{PREFIX}{'_'.join(map(str, fault['loc'])).upper()}={shown!r}: {_rule_of(fault)}"


def _rule_of(fault: ErrorDetails) -> str:
    """Say which values a setting allows, in plain words where pydantic's name types."""
    rule = _RULES.get(fault["type"])
    return rule.format(**fault.get("ctx", {})) if rule else fault["msg"].removeprefix("Value error, ")


def _is_base_url(url: str) -> bool:
    """Return whether a URL names a host and ends where a path can be appended."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("idna")
        return bool(host) and parts.port != 0 and _NEITHER_QUERY_NOR_FRAGMENT.fullmatch(url) is not None
    except ValueError:  # an invalid port, IPv6 address or international name
        return False


def secret_value(given: SecretStr, path: str, variable: str) -> str:
    """Return the content of the file at ``path``, or ``given`` if the path is empty. Raises as `read_secret` does."""
    return read_secret(path, variable) if path else given.get_secret_value()


def read_secret(path: str, variable: str) -> str:
    """Return the content of a file without its last line break.

    pydantic-settings reads a folder of files named like the settings, but has no ``<NAME>_FILE``.
    Raises InvalidSettings if the file cannot be read, is empty, is not UTF-8 or is longer than SECRET_BYTES_MAX. The
    error names ``variable`` and never the content.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidSettings(f"{variable}={path!r}: the file cannot be read: {error.strerror}") from error
    if len(content) > SECRET_BYTES_MAX:
        raise InvalidSettings(f"{variable}={path!r}: the file is longer than {SECRET_BYTES_MAX} bytes")
    try:
        secret = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise InvalidSettings(f"{variable}={path!r}: the file is not UTF-8") from None
    if not secret:
        raise InvalidSettings(f"{variable}={path!r}: the file is empty")
    return secret


def tls_client_context(ca_file: str, *, certificate_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """Return a TLS context of a client (1.2 or later) that verifies the server's name and certificate.

    It trusts only the authorities in ``ca_file`` (PEM), or the system's if that is empty. It presents the certificate
    in ``certificate_file`` (PEM, with its chain), if given; ``key_file`` may be the same file.
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
