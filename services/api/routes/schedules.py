"""HTTP operations for schedules. Each parses its input, calls a service, and responds."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.openapi.spec import Example
from litestar.params import PathParameter, QueryParameter, SkipValidation

from services.api.auth import PROCESS, SCOPE, caller_of
from services.api.http.problems import UNREADABLE, responses
from services.api.http.unreadable import unreadable_header
from services.api.schedules.service import ScheduleDetail, ScheduleList, Schedules, WantedSchedule
from shared.domain.backfills import MAX_PARALLEL_DEFAULT, MAX_PARALLEL_MAX
from shared.domain.objects import DATE_OFFSET_MAX
from shared.domain.schedules import RECHECK_MAX, SCHEDULES_MAX

CRON_LENGTH_MAX = 200
TIMEZONE_LENGTH_MAX = 100

SchedulesPort = NamedDependency[SkipValidation[Schedules]]
Name = Annotated[
    str,
    PathParameter(description="The name: lower-case letters, digits and dashes.", examples=[Example(value="daily")]),
]

_NO_SUCH = "There is no such schedule."


@put(
    "/schedules/{name:str}",
    opt={SCOPE: PROCESS},
    summary="Make or change a schedule",
    operation_id="putSchedule",
    tags=["schedules"],
    response_description="The schedule.",
    responses=responses(conflict=f"There are {SCHEDULES_MAX} other schedules.", internal_server_error=UNREADABLE),
)
async def put_schedule(
    *,
    request: Request[Any, Any, Any],
    schedules: SchedulesPort,
    name: Name,
    cron: Annotated[
        str,
        QueryParameter(
            description="When it runs: minute, hour, day, month and weekday, as in cron.",
            max_length=CRON_LENGTH_MAX,
            examples=[Example(value="0 6 * * *")],
        ),
    ],
    timezone: Annotated[
        str,
        QueryParameter(
            description="The time zone of `cron` and `complete_by`, by its name in the IANA database.",
            max_length=TIMEZONE_LENGTH_MAX,
            examples=[Example(value="Europe/Prague")],
        ),
    ] = "UTC",
    date: Annotated[
        int,
        QueryParameter(
            description="The date that a run processes, in days from the day of the run.",
            ge=-DATE_OFFSET_MAX,
            le=DATE_OFFSET_MAX,
            examples=[Example(value=-1)],
        ),
    ] = -1,
    recheck: Annotated[
        int,
        QueryParameter(
            description="The number of days before that date to check again. Unchanged files are not fetched.",
            ge=0,
            le=RECHECK_MAX,
            examples=[Example(value=7)],
        ),
    ] = 0,
    max_parallel: Annotated[
        int,
        QueryParameter(
            description="The most dates that a run processes at once.",
            ge=1,
            le=MAX_PARALLEL_MAX,
            examples=[Example(value=2)],
        ),
    ] = MAX_PARALLEL_DEFAULT,
    complete_by: Annotated[
        str | None,
        QueryParameter(
            description="The time of day after the run by which its date is complete; otherwise the date is late.",
            max_length=5,
            examples=[Example(value="09:00")],
        ),
    ] = None,
) -> ScheduleDetail:
    """Make a schedule, or replace the options of one. Its runs so far stay.

    A change of `cron` or `timezone` takes effect from now on. While a run has not ended, the next one waits. Missed
    runs are caught up by one run.
    """
    wanted = WantedSchedule(
        cron=cron,
        timezone=timezone,
        date=date,
        recheck=recheck,
        max_parallel=max_parallel,
        complete_by=complete_by,
    )
    return await schedules.put(name, wanted, by=caller_of(request))


@get(
    "/schedules",
    summary="List the schedules",
    operation_id="listSchedules",
    tags=["schedules"],
    response_description="All schedules, by name.",
    responses=responses(),
)
async def all_schedules(schedules: SchedulesPort) -> Response[ScheduleList]:
    """Return every schedule with its next and last run, and its late dates."""
    listed = await schedules.all()
    return Response(listed, headers=unreadable_header(listed.unreadable))


@get(
    "/schedules/{name:str}",
    summary="Get a schedule",
    operation_id="getSchedule",
    tags=["schedules"],
    response_description="The schedule.",
    responses=responses(not_found=_NO_SUCH, internal_server_error=UNREADABLE),
)
async def one_schedule(schedules: SchedulesPort, name: Name) -> ScheduleDetail:
    """Return a schedule with its next and last run, and its late dates."""
    return await schedules.read(name)


@post(
    "/schedules/{name:str}/pause",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.OK,
    summary="Pause a schedule",
    operation_id="pauseSchedule",
    tags=["schedules"],
    response_description="The schedule.",
    responses=responses(not_found=_NO_SUCH, internal_server_error=UNREADABLE),
)
async def pause_schedule(request: Request[Any, Any, Any], schedules: SchedulesPort, name: Name) -> ScheduleDetail:
    """Let no further run begin. A run that has begun goes on."""
    return await schedules.change(name, "pause", by=caller_of(request))


@post(
    "/schedules/{name:str}/resume",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.OK,
    summary="Resume a schedule",
    operation_id="resumeSchedule",
    tags=["schedules"],
    response_description="The schedule.",
    responses=responses(not_found=_NO_SUCH, internal_server_error=UNREADABLE),
)
async def resume_schedule(request: Request[Any, Any, Any], schedules: SchedulesPort, name: Name) -> ScheduleDetail:
    """Run the schedule again from now on. Runs that were due during the pause are not caught up."""
    return await schedules.change(name, "resume", by=caller_of(request))


@post(
    "/schedules/{name:str}/run",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Run a schedule now",
    operation_id="runSchedule",
    tags=["schedules"],
    response_description="The schedule; `last_run` is the new run.",
    responses=responses(
        not_found=_NO_SUCH,
        conflict="The last run has not ended, or too many backfills are open.",
        internal_server_error=UNREADABLE,
    ),
)
async def run_schedule(request: Request[Any, Any, Any], schedules: SchedulesPort, name: Name) -> ScheduleDetail:
    """Start a run in addition to those of the schedule. It may be paused."""
    return await schedules.run(name, by=caller_of(request))


@delete(
    "/schedules/{name:str}",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.NO_CONTENT,
    summary="Delete a schedule",
    operation_id="deleteSchedule",
    tags=["schedules"],
    response_description="The schedule is deleted.",
    responses=responses(not_found=_NO_SUCH),
)
async def delete_schedule(schedules: SchedulesPort, name: Name) -> None:
    """Delete a schedule. Its runs go on, and stay in the list of backfills."""
    await schedules.delete(name)


HANDLERS = [
    put_schedule,
    all_schedules,
    one_schedule,
    pause_schedule,
    resume_schedule,
    run_schedule,
    delete_schedule,
]
