"""Makes the bucket, and prints the IAM policies of its users."""

from __future__ import annotations

from typing import Annotated

import typer

from shared.storage.generation_pointer import provision_pointer
from shared.storage.s3 import S3Store
from shared.storage.schema_switch import provision_schema_switch
from tripfold.operate.command_line import command_settings, console, run_command
from tripfold.operate.iam_policies import BucketRole, policy_of

bucket_commands = typer.Typer(help="The bucket on the S3 of the settings.", no_args_is_help=True, add_completion=False)


@bucket_commands.command("apply")
def apply_command() -> None:
    """Make the bucket and its first objects, unless they exist. Safe to run again.

    Example: tripfold bucket apply
    """
    settings = command_settings()

    async def make() -> bool:
        async with S3Store(settings) as store:
            created = await store.create_bucket()
            await provision_schema_switch(store)
            await provision_pointer(store)
            return created

    is_new = run_command(make())
    console.print(f"Created the bucket {settings.s3_bucket}." if is_new else f"The bucket {settings.s3_bucket} exists.")


@bucket_commands.command("policy")
def policy_command(
    role: Annotated[BucketRole, typer.Argument(metavar="ROLE", help="The service, or operator, that uses the bucket.")],
) -> None:
    """Print the minimal IAM policy of a service, or of an operator.

    Example: tripfold bucket policy worker > worker.json
    """
    console.print_json(data=policy_of(role, command_settings().s3_bucket))
