"""Makes the missing topics, and compares the existing ones with their definition."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from shared.domain.topics import min_insync_replicas
from shared.kafka.admin import TopicDifference, apply_topics, check_topics, remedies
from shared.runtime.settings import Settings
from tripfold.console import Records, print_remark
from tripfold.operate.command_line import command_settings, console, print_line, run_command

topics_commands = typer.Typer(
    help="The topics on the Kafka of the settings.", no_args_is_help=True, add_completion=False
)


@topics_commands.command("apply")
def apply_command() -> None:
    """Make the missing topics, with min.insync.replicas to suit. Safe to run again: it changes no existing topic.

    Exit 1, with the remedy, if an existing topic has other settings.

    Example: TRIPFOLD_KAFKA_PARTITIONS=12 TRIPFOLD_KAFKA_REPLICATION_FACTOR=3 tripfold topics apply
    """
    settings = command_settings()
    made = run_command(apply_topics(settings))
    for size in dict.fromkeys(made.values()):
        print_line(
            f"Made {', '.join(made)}: partitions {size.partitions}, replicas {size.replicas}, "
            f"min.insync.replicas {min_insync_replicas(size.replicas)}."
        )
    if not made:
        print_line("All topics exist.")
    # Another broker may not know yet about the topics that were just made.
    _refuse(settings, [one for one in run_command(check_topics(settings)) if one.topic not in made])


@topics_commands.command("check")
def check_command() -> None:
    """Compare the topics with their definition; exit 1 if any differs.

    Example: tripfold topics check
    """
    settings = command_settings()
    _refuse(settings, run_command(check_topics(settings)))
    print_remark("All topics have the expected settings.")


def _refuse(settings: Settings, differences: Sequence[TopicDifference]) -> None:
    """Print the differences with their remedies and exit with 1, if there are any."""
    if not differences:
        return
    records = Records("topic", "setting", "found", "expected")
    for one in differences:
        records.add(one.topic, one.what, one.found, one.expected)
    records.print(console)
    for line in remedies(settings, differences):
        print_remark(line)
    raise typer.Exit(1)
