"""The ``tripfold`` command."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from shared.domain.errors import OperatorError
from shared.runtime.settings import Settings, load_settings
from tripfold.client.commands import client_commands
from tripfold.console import open_console
from tripfold.operate.commands import operate_commands
from tripfold.operate.iam_policies import BucketRole, policy_of

if TYPE_CHECKING:
    from shared.kafka.admin import TopicDifference

app = typer.Typer(
    help="Folds a transit authority's raw trip files into exact per-country, per-day statistics.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
serve_commands = typer.Typer(help="Run one service against the Kafka and S3 of the settings.", no_args_is_help=True)
topics_commands = typer.Typer(help="The topics on the Kafka of the settings.", no_args_is_help=True)
bucket_commands = typer.Typer(help="The bucket on the S3 of the settings.", no_args_is_help=True)
app.add_typer(serve_commands, name="serve")
app.add_typer(topics_commands, name="topics")
app.add_typer(bucket_commands, name="bucket")
app.add_typer(client_commands)
app.add_typer(operate_commands)

console = open_console()


class IngestRole(enum.Enum):
    """The part of the ingest service that a process runs."""

    ALL = "all"
    PLANNER = "planner"
    WORKER = "worker"


class DocumentFormat(enum.Enum):
    """How a document is written."""

    JSON = "json"
    YAML = "yaml"


_Result = TypeVar("_Result")


@serve_commands.command("api")
def serve_api() -> None:
    """Serve the REST API on TRIPFOLD_API_HOST and TRIPFOLD_API_PORT."""
    settings = _settings()
    from services.api.app import serve

    serve(settings)


@serve_commands.command("ingest")
def serve_ingest(
    role: Annotated[
        IngestRole, typer.Option(help="Run the planner, the worker, or both in one process.")
    ] = IngestRole.ALL,
) -> None:
    """Plan requests, and stream city-days into S3 while folding them."""
    settings = _settings()
    from services.ingest.app import create_app
    from shared.service import serve

    app = create_app(settings, planner=role is not IngestRole.WORKER, worker=role is not IngestRole.PLANNER)
    serve(app, settings)


@serve_commands.command("aggregate")
def serve_aggregate() -> None:
    """Fold city statistics into the summaries of country-days."""
    settings = _settings()
    from services.aggregate.app import create_app
    from shared.service import serve

    serve(create_app(settings), settings)


@topics_commands.command("apply")
def topics_apply() -> None:
    """Make the topics that are missing. Safe to run again: a topic that is there is left as it is.

    Exit 1, with the remedy, if one that is there is set otherwise than it should be: somebody else has made it.

    Example: TRIPFOLD_KAFKA_PARTITIONS=12 TRIPFOLD_KAFKA_REPLICATION_FACTOR=3 tripfold topics apply
    """
    from shared.kafka.admin import apply_topics, check_topics

    settings = _settings()
    made = _run(apply_topics(settings))
    console.print(f"made {', '.join(made)}" if made else "all topics are there", soft_wrap=True)
    # Another broker may not know yet what was made just now.
    _refuse(settings, [one for one in _run(check_topics(settings)) if one.topic not in made])


@topics_commands.command("check")
def topics_check() -> None:
    """Say where the topics on the cluster are not as they should be; exit 1 if any is not.

    Example: tripfold topics check
    """
    from shared.kafka.admin import check_topics

    settings = _settings()
    _refuse(settings, _run(check_topics(settings)))
    console.print("all topics are as they should be")


def _refuse(settings: Settings, differences: Sequence[TopicDifference]) -> None:
    """Show where topics are not as they should be, and what mends that, and exit 1; do nothing if all are."""
    if not differences:
        return
    from shared.kafka.admin import remedies

    table = Table("topic", "setting", "found", "expected")
    for one in differences:
        table.add_row(one.topic, one.what, one.found, one.expected)
    console.print(table)
    for line in remedies(settings, differences):
        console.print(line, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@bucket_commands.command("apply")
def bucket_apply() -> None:
    """Make the bucket and its first objects unless they are there. Safe to run again.

    Example: tripfold bucket apply
    """
    from shared.storage.generation_pointer import provision_pointer
    from shared.storage.s3 import S3Store

    settings = _settings()

    async def make() -> None:
        async with S3Store(settings) as store:
            await store.create_bucket()
            await provision_pointer(store)

    _run(make())
    console.print(f"bucket {settings.s3_bucket} is there")


@bucket_commands.command("policy")
def bucket_policy(
    role: Annotated[BucketRole, typer.Argument(help="Who is to use the bucket.")],
) -> None:
    """Print the least that a service may do in the bucket, as an IAM policy document.

    Example: tripfold bucket policy worker > worker.json
    """
    console.print_json(data=policy_of(role, _settings().s3_bucket))


@app.command("asyncapi")
def asyncapi(
    style: Annotated[DocumentFormat, typer.Option("--format", help="How to write it.")] = DocumentFormat.JSON,
    topic_prefix: Annotated[str, typer.Option(help="Put before the names of the topics.")] = "",
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write JSON there, unless that breaks the contract that FILE holds."),
    ] = None,
) -> None:
    """Print the contract of the topics and events: an AsyncAPI 3.0 document, made from the types.

    Example: tripfold asyncapi --format yaml
    """
    from services.api.documentation.asyncapi import asyncapi_document, encode_document
    from services.api.documentation.compatibility import write_contract

    if write is not None:
        write_contract(write)
        return
    document = asyncapi_document(topic_prefix=topic_prefix)
    if style is DocumentFormat.YAML:
        import yaml

        typer.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), nl=False)
    else:
        typer.echo(encode_document(document), nl=False)


@app.command("upstream")
def upstream(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65535)] = 8090,
    seed: Annotated[int, typer.Option(help="The same seed and date give the same bytes.")] = 1,
    cities: Annotated[int, typer.Option(help="How many cities there are.", min=0)] = 30,
    countries: Annotated[int, typer.Option(help="How many countries they lie in.", min=1)] = 5,
    trips_per_city: Annotated[
        int | None, typer.Option(help="Trips in each file. Unset: files of 1 to 20 MB, and one of over 100 MB.", min=0)
    ] = None,
    missing_days: Annotated[int, typer.Option(help="Of 100 days of a city, how many answer 404.", min=0, max=100)] = 0,
    etag: Annotated[bool, typer.Option(help="Send an ETag and honour If-None-Match.")] = True,
    ranges: Annotated[bool, typer.Option(help="Honour Range and If-Range.")] = True,
) -> None:
    """Serve made-up cities and trip files of any size, as a transit authority's server does.

    Example: tripfold upstream --cities 3 --trips-per-city 10000
    """
    from tripfold.local.trip_files import UpstreamOptions
    from tripfold.local.upstream import serve

    options = UpstreamOptions(
        seed=seed,
        cities=cities,
        countries=countries,
        trips_per_city=trips_per_city,
        missing_days=missing_days,
        etag=etag,
        ranges=ranges,
    )
    console.print(f"upstream at http://{host}:{port}/cities; Ctrl-C stops it")
    serve(options, host, port)


@app.command("api-key")
def api_key(
    name: Annotated[str, typer.Argument(help="Who it is for: letters, digits, dots, dashes and underscores.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, process, or both by giving it twice.")] = None,
) -> None:
    """Make a key for the API: print it, and the line that the settings need.

    Example: tripfold api-key nightly --scope read --scope process
    """
    from services.api.auth import digest_of, mint_key, parse_keys

    key = mint_key()
    line = f"{name}:{'+'.join(sorted(set(scope or ['read']), reverse=True))}:{digest_of(key)}"
    parse_keys([line])
    console.print(f"the key, which is shown this once: {key}", soft_wrap=True, highlight=False)
    console.print(f"for TRIPFOLD_API_KEYS or its file: {line}", soft_wrap=True, highlight=False)


@app.command("up")
def up(
    upstream_url: Annotated[
        str | None, typer.Option("--upstream", help="Where the trip files come from. Unset: the reference upstream.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Where everything is kept; made if need be.")] = Path(".data/up"),
    host: Annotated[str, typer.Option(help="The address that the API listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port that the API listens on.", min=1, max=65535)] = 8080,
) -> None:
    """Run all of Tripfold on this machine until Ctrl-C: S3, Kafka, planner, worker, aggregate and API.

    Started again on the same data directory it goes on where it stopped.

    Example: tripfold up --upstream http://transit.example.com:5000
    """
    from tripfold.local.stack import StackOptions
    from tripfold.local.terminal import run_up

    options = StackOptions(data_dir=data_dir, host=host, port=port, upstream_url=_upstream_url(upstream_url))
    _run(run_up(options, console))


@app.command("demo")
def demo(
    leave: Annotated[bool, typer.Option("--exit", help="Check every number, then stop by itself.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Where everything is kept; made if need be.")] = Path(".data/demo"),
    port: Annotated[int, typer.Option(help="The port that the API listens on.", min=1, max=65535)] = 8080,
) -> None:
    """Run all of Tripfold, process three dates of thirty cities, and print the country statistics.

    With --exit every number is compared with an independent recomputation from the raw files; the exit code is 0 only
    if all are equal.
    """
    from tripfold.local.stack import StackOptions
    from tripfold.local.terminal import run_demo

    _run(run_demo(StackOptions(data_dir=data_dir, port=port), console, leave=leave))


def _upstream_url(value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"{value!r}: expected a URL that begins with http:// or https://", param_hint="--upstream"
        )
    return None if value is None else value.rstrip("/")


def _settings() -> Settings:
    settings = load_settings()
    from shared.runtime.logging import configure_logging

    configure_logging(settings)
    return settings


def _run(work: Coroutine[Any, Any, _Result]) -> _Result:
    return asyncio.run(work)


def main() -> None:
    """Run the command; say in one sentence what went wrong, if something did."""
    try:
        app()
    except OperatorError as error:
        Console(stderr=True).print("[red]tripfold:[/red]", str(error), highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
