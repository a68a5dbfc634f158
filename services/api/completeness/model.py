"""The responses of the operations on completeness."""

from __future__ import annotations

import datetime as dt
import enum
from typing import Annotated

import msgspec

from services.api.http.unreadable import UnreadableObject
from shared.domain.requests import Status


class DayState(enum.Enum):
    """How complete a country-day or a date is.

    Complete: every expected city is counted. Provisional: cities are missing, and no request explains it. Running: a
    request or a backfill processes the date. Late: incomplete after the deadline of a schedule. Refused: files of
    missing cities break a rule. Failed: missing cities could not be fetched. Cancelled: the request was cancelled
    before it fetched the missing cities. Unreadable: the stored day cannot be read. Not expected: the date has no city
    of this country.
    """

    COMPLETE = "complete"
    PROVISIONAL = "provisional"
    RUNNING = "running"
    LATE = "late"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNREADABLE = "unreadable"
    NOT_REQUESTED = "not requested"
    NOT_EXPECTED = "not expected"


class Action(enum.Enum):
    """The action that completes a day: process its date, retry its request, wait, or let an operator repair it."""

    PROCESS = "process"
    RETRY = "retry"
    WAIT = "wait"
    REPAIR = "repair"


_Reason = Annotated[
    str | None,
    msgspec.Meta(
        description="Why the day is in this state; null: it is complete or not expected.",
        examples=["1 city failed. Port Tina: the upstream answered 404"],
    ),
]
_Action = Annotated[Action | None, msgspec.Meta(description="What completes the day; null: nothing is to be done.")]
_Reported = Annotated[int, msgspec.Meta(ge=0, description="Expected cities that are counted.", examples=[11])]
_Expected = Annotated[int, msgspec.Meta(ge=0, description="Cities that the date's plan expects.", examples=[12])]
_LastIngested = Annotated[
    dt.datetime | None, msgspec.Meta(description="When the newest counted file was ingested; null: none is counted.")
]


class CountryDayState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """How complete a country-day is, why, and what to do."""

    date: dt.date
    state: DayState
    cities_reported: _Reported = 0
    cities_expected: _Expected = 0
    last_ingested_at: _LastIngested = None
    reason: _Reason = None
    action: _Action = None


class DateState(CountryDayState, frozen=True, kw_only=True):
    """How complete a date is in all its countries: the most urgent state among them, with its request.

    The counts are sums over its countries.
    """

    request_id: Annotated[
        str | None,
        msgspec.Meta(
            description="The latest request of the date; null: there is none, or the date is complete.",
            examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"],
        ),
    ] = None
    request_status: Annotated[Status | None, msgspec.Meta(description="The status of this request.")] = None
    backfill_id: Annotated[
        str | None, msgspec.Meta(description="The open backfill that is going to process the date; null: none.")
    ] = None
    deadline: Annotated[
        dt.datetime | None,
        msgspec.Meta(description="The deadline of a schedule that the date has missed; null: it has missed none."),
    ] = None


class CountryStates(msgspec.Struct, frozen=True, kw_only=True):
    """A country, and the state of each day of the range, in order."""

    country: Annotated[str, msgspec.Meta(examples=["armenia"])]
    name: Annotated[str, msgspec.Meta(examples=["Armenia"])]
    days: tuple[CountryDayState, ...]


class CompletenessGrid(msgspec.Struct, frozen=True, kw_only=True):
    """How complete a range of dates is, by date, and by country and date."""

    last_ingested_at: _LastIngested
    dates: Annotated[tuple[DateState, ...], msgspec.Meta(description="Each day of the range, in order.")]
    countries: Annotated[
        tuple[CountryStates, ...],
        msgspec.Meta(description="The countries with a planned day in the range, sorted; without any, all countries."),
    ]
    unreadable: Annotated[
        tuple[UnreadableObject, ...], msgspec.Meta(description="Stored objects that cannot be read.")
    ] = ()


class CityState(enum.Enum):
    """Why a city of a country-day is not counted."""

    RUNNING = "running"
    WAITING = "waiting"
    REFUSED = "refused"
    FAILED = "failed"
    SKIPPED = "skipped"
    MISSING = "missing"


class MissingCity(msgspec.Struct, frozen=True, kw_only=True):
    """A city that is expected and not counted.

    Running: its file is being fetched. Waiting: its request has not come to it. Refused: its file breaks a rule.
    Failed: it could not be fetched. Skipped: its request was cancelled. Missing: no request explains it.
    """

    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]
    state: CityState
    reason: Annotated[
        str | None,
        msgspec.Meta(description="Why it failed or was refused.", examples=["the upstream answered 404"]),
    ] = None
    quarantine_key: Annotated[
        str | None, msgspec.Meta(description="The object of the bucket that holds a refused file.")
    ] = None
    usual_at: Annotated[
        dt.datetime | None,
        msgspec.Meta(
            description="When its file is usually ingested: the median of the latest days. null: too few are known."
        ),
    ] = None


class CountryDayCities(msgspec.Struct, frozen=True, kw_only=True):
    """The cities that a country-day lacks."""

    country: Annotated[str, msgspec.Meta(examples=["armenia"])]
    date: dt.date
    missing_total: Annotated[int, msgspec.Meta(ge=0, description="The number of missing cities.", examples=[1])]
    missing: Annotated[tuple[MissingCity, ...], msgspec.Meta(description="The first 100 of them, by city id.")]
