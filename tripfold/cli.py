"""The ``tripfold`` command: its groups of commands, and the commands that run services.

The commands of operators are loaded when they are called: see ``lazy_commands``.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.console import Console
from typer.main import get_command

from shared.domain.errors import OperatorError
from tripfold.console import open_console, printable
from tripfold.lazy_commands import HELP_OPTION_NAMES, LazyCommand, LazyGroup

if TYPE_CHECKING:
    from shared.runtime.settings import Settings

USE = "Use"
RUN = "Run"
SET_UP = "Set up"
REPAIR = "Check and repair"
INSPECT = "Inspect"

_OPERATE = "tripfold.operate"
_CLIENT = "tripfold.client"


class Commands(LazyGroup):
    """The commands of ``tripfold``."""

    panels: ClassVar = (USE, RUN, SET_UP, REPAIR, INSPECT)
    lazy_commands: ClassVar = {
        name: LazyCommand(target=f"{_OPERATE}.{target}", help=line, panel=panel)
        for name, target, line, panel in (
            ("topics", "topics:topics_commands", "Make or check the topics.", SET_UP),
            ("bucket", "bucket:bucket_commands", "Make the bucket; print IAM policies.", SET_UP),
            (
                "upgrade",
                "upgrade:upgrade_commands",
                "Let all processes write the new schema version.",
                SET_UP,
            ),
            ("doctor", "doctor:doctor_command", "Check S3, Kafka, topics, upstream and revisions.", REPAIR),
            ("verify", "verify:verify_command", "Compare summaries, topics or tables with the bucket.", REPAIR),
            ("repair", "repair:repair_command", "Replace wrong live summaries.", REPAIR),
            ("republish", "republish:republish_command", "Publish the bucket to the compacted topics again.", REPAIR),
            ("rebuild", "rebuild:rebuild_command", "Build a new generation of all summaries and make it live.", REPAIR),
            ("generations", "rebuild:generations_commands", "List, drop or activate generations of summaries.", REPAIR),
            ("restore", "restore:restore_command", "Raise the revisions of a restored bucket.", REPAIR),
            ("expire", "expire:expire_commands", "Delete stored files by their age.", REPAIR),
            ("lake", "lake:lake_commands", "Build the Parquet tables.", REPAIR),
            ("gc", "gc:gc_command", "Delete objects that nothing needs.", REPAIR),
            ("skip", "skip:skip_command", "Move a record of a later schema version to the dead letters.", REPAIR),
            ("requests", "requests:requests_commands", "List or show requests.", INSPECT),
            (
                "dead-letters",
                "dead_letters:dead_letters_commands",
                "List, show or retry records that could not be processed.",
                INSPECT,
            ),
        )
    } | {
        name: LazyCommand(target=f"{_CLIENT}.{target}", help=line, panel=USE)
        for name, target, line in (
            ("request", "commands:request_command", "Process a date, and watch until it is served."),
            ("watch", "commands:watch_command", "Watch a request or a backfill; list the latest requests."),
            ("retry", "commands:retry_command", "Retry the failed cities of a request or backfill."),
            ("cancel", "commands:cancel_command", "Cancel a request or a backfill."),
            ("stats", "commands:stats_command", "Print the statistics of a range."),
            ("quarantine", "quarantine:quarantine_commands", "List, show or retry refused files."),
            ("backfill", "backfills:backfill_command", "Process many dates, a few at a time."),
            ("schedule", "schedules:schedule_commands", "Process dates at given times."),
            ("backfills", "backfills:backfills_commands", "List, show, pause or resume backfills."),
        )
    }


app = typer.Typer(
    cls=Commands,
    help="Folds a transit authority's raw trip files into exact per-country, per-day statistics.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_OPTION_NAMES},  # every command below inherits it
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tripfold {version('tripfold')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    pass


serve_commands = typer.Typer(help="Run one service against the Kafka and S3 of the settings.", no_args_is_help=True)
app.add_typer(serve_commands, name="serve", rich_help_panel=RUN)

console = open_console()


class IngestRole(enum.Enum):
    """The part of the ingest service that a process runs."""

    ALL = "all"
    PLANNER = "planner"
    WORKER = "worker"


class DocumentFormat(enum.Enum):
    """The format of a printed document."""

    JSON = "json"
    YAML = "yaml"


def loaded_commands() -> Any:
    """Return the command with all its commands loaded, for a program that inspects them."""
    command = get_command(app)
    assert isinstance(command, Commands)
    command.load_all()
    return command


@serve_commands.command("api")
def serve_api() -> None:
    """Serve the REST API on TRIPFOLD_API_HOST and TRIPFOLD_API_PORT."""
    settings = _service_settings("api")
    from services.api.app import serve

    serve(settings)


@serve_commands.command("ingest")
def serve_ingest(
    role: Annotated[
        IngestRole, typer.Option(help="Run the planner, the worker, or both in one process.")
    ] = IngestRole.ALL,
) -> None:
    """Plan requests, and stream city-days into S3."""
    settings = _service_settings("ingest" if role is IngestRole.ALL else role.value)
    from services.ingest.app import create_app
    from shared.service import serve

    app = create_app(settings, planner=role is not IngestRole.WORKER, worker=role is not IngestRole.PLANNER)
    serve(app, settings)


@serve_commands.command("aggregate")
def serve_aggregate() -> None:
    """Fold city statistics into the summaries of country-days."""
    settings = _service_settings("aggregate")
    from services.aggregate.app import create_app
    from shared.service import serve

    serve(create_app(settings), settings)


@app.command("asyncapi", rich_help_panel=INSPECT)
def asyncapi(
    style: Annotated[
        DocumentFormat, typer.Option("--format", help="The format of the document.")
    ] = DocumentFormat.JSON,
    topic_prefix: Annotated[str, typer.Option(metavar="PREFIX", help="The prefix of the topics' names.")] = "",
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write JSON to FILE, unless that breaks the contract in it."),
    ] = None,
) -> None:
    """Print the contract of the topics and events, as an AsyncAPI 3.0 document.

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


@app.command("openapi", rich_help_panel=INSPECT)
def openapi() -> None:
    """Print the OpenAPI 3.1 document of the REST API, for generators of clients. A running API serves the same one.

    Example: tripfold openapi > openapi.json
    """
    from services.api.app import create_app
    from services.api.documentation.openapi import openapi_document
    from shared.runtime.settings import PREFIX, load_settings

    document = openapi_document(create_app(load_settings({f"{PREFIX}API_ACCESS": "open"})))
    typer.echo(json.dumps(document, indent=2))


@app.command("upstream", rich_help_panel=RUN)
def upstream(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="The port to listen on.", min=0, max=65535)] = 8090,
    seed: Annotated[
        int, typer.Option(metavar="N", help="The seed of the files: the same seed and date give the same bytes.")
    ] = 1,
    cities: Annotated[int, typer.Option(metavar="N", help="The number of cities.", min=0)] = 30,
    countries: Annotated[int, typer.Option(metavar="N", help="The number of their countries.", min=1)] = 5,
    trips_per_city: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The trips of each file. Default: files of 1 to 20 MB, and one of over 100 MB.", min=0
        ),
    ] = None,
    missing_days: Annotated[
        int,
        typer.Option(metavar="N", help="The days without a file (404), of every 100 days of a city.", min=0, max=100),
    ] = 0,
    etag: Annotated[bool, typer.Option(help="Send an ETag and honour If-None-Match.")] = True,
    ranges: Annotated[bool, typer.Option(help="Honour Range and If-Range.")] = True,
) -> None:
    """Serve generated cities and trip files, as a transit authority's server does.

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
    console.print(f"Upstream: http://{host}:{port}/cities. Stop it with Ctrl-C.")
    serve(options, host, port)


@app.command("api-key", rich_help_panel=SET_UP)
def api_key(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The client's name: letters, digits, dots, dashes and underscores.")
    ],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="SCOPE", help="read or process. Repeat it for both. Default: read.")
    ] = None,
    expires: Annotated[
        dt.datetime | None,
        typer.Option(
            metavar="DATE|TIME",
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%MZ"],
            help="When the key expires, in UTC: 2027-01-31 or 2027-01-31T18:00Z. Default: never.",
        ),
    ] = None,
) -> None:
    """Make an API key: print it once, and the entry for the settings.

    Example: tripfold api-key nightly --scope read --scope process --expires 2027-01-31
    """
    from services.api.auth import digest_of, mint_key, parse_keys

    key = mint_key()
    line = f"{name}:{'+'.join(sorted(set(scope or ['read']), reverse=True))}:{digest_of(key)}"
    line += f":{expires:%Y-%m-%dT%H:%MZ}" if expires else ""
    parse_keys([line])
    console.print(f"API key (not shown again): {key}", soft_wrap=True, highlight=False)
    console.print(f"Entry for TRIPFOLD_API_KEYS or its file: {line}", soft_wrap=True, highlight=False)


@app.command("up", rich_help_panel=RUN)
def up(
    upstream_url: Annotated[
        str | None,
        typer.Option(
            "--upstream", metavar="URL", help="The source of the trip files. Default: the reference upstream."
        ),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory of all data. It is made if it does not exist.")
    ] = Path(".data/up"),
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address that the API listens on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", help="The port that the API listens on.", min=1, max=65535)
    ] = 8080,
) -> None:
    """Run all of Tripfold on this machine until Ctrl-C: S3, Kafka, planner, worker, aggregate and API.

    Started again on the same data directory, it continues where it stopped.

    Example: tripfold up --upstream http://transit.example.com:5000
    """
    from tripfold.local.stack import StackOptions
    from tripfold.local.up import run_up

    options = StackOptions(data_dir=data_dir, host=host, port=port, upstream_url=_upstream_url(upstream_url))
    asyncio.run(run_up(options, console))


@app.command("demo", rich_help_panel=RUN)
def demo(
    leave: Annotated[bool, typer.Option("--exit", help="Compare every number with the raw files, then stop.")] = False,
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory of all data. It is made if it does not exist.")
    ] = Path(".data/demo"),
    port: Annotated[
        int, typer.Option(metavar="PORT", help="The port that the API listens on.", min=1, max=65535)
    ] = 8080,
) -> None:
    """Run all of Tripfold, process three dates of thirty cities, and print the country statistics.

    --exit compares every number with an independent recomputation from the raw files. It exits with 1 if one differs.
    """
    from tripfold.local.demo import run_demo
    from tripfold.local.stack import StackOptions

    asyncio.run(run_demo(StackOptions(data_dir=data_dir, port=port), console, leave=leave))


def _upstream_url(value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"the URL is {value!r}; it must begin with http:// or https://", param_hint="--upstream"
        )
    return None if value is None else value.rstrip("/")


def _service_settings(service: str) -> Settings:
    from shared.runtime.logging import configure_logging
    from shared.runtime.settings import load_settings
    from shared.runtime.tracing import configure_tracing

    settings = load_settings()
    configure_logging(settings)
    configure_tracing(f"tripfold-{service}")
    return settings


def main() -> None:
    """Run the command. Print an error of the operator as one sentence, and exit with 1."""
    try:
        app()
    except OperatorError as error:
        Console(stderr=True).print("[red]tripfold:[/red]", printable(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
