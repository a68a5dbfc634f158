"""A client of Tripfold: processes dates, and reads their statistics.

    from tripfold_client import Tripfold

    api = Tripfold("http://127.0.0.1:8080", api_key="…")
    api.process("2024-05-01", "2024-05-31").wait(progress=True)
    api.stats("2024-05-01", "2024-05-31", country="armenia").df()

AsyncTripfold has the same methods for asyncio.
"""

from importlib.metadata import version

from tripfold_client.aio import AsyncJob, AsyncTripfold, BackfillOptions
from tripfold_client.blocking import Job, Tripfold
from tripfold_client.errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    InvalidCall,
    InvalidParameter,
    InvalidUrl,
    MissingDependency,
    NotAuthorized,
    NotFound,
    ProcessingFailed,
    TripfoldError,
    Unavailable,
    UnexpectedResponse,
    WaitTimeout,
)
from tripfold_client.models import (
    Backfill,
    BackfillDate,
    BadRecord,
    CityCounts,
    CityFailure,
    DateCounts,
    LateDate,
    Preview,
    Quarantine,
    QuarantinedFile,
    QuarantineRetry,
    Request,
    RetriedFile,
    Run,
    Schedule,
    UnreadableObject,
    UnreadableWarning,
)
from tripfold_client.statistics import CountryDay, Statistics

__version__ = version("tripfold-client")

__all__ = [
    "ApiError",
    "AsyncJob",
    "AsyncTripfold",
    "Backfill",
    "BackfillDate",
    "BackfillOptions",
    "BadRecord",
    "CityCounts",
    "CityFailure",
    "Conflict",
    "ConnectionFailed",
    "CountryDay",
    "DateCounts",
    "InvalidCall",
    "InvalidParameter",
    "InvalidUrl",
    "Job",
    "LateDate",
    "MissingDependency",
    "NotAuthorized",
    "NotFound",
    "Preview",
    "ProcessingFailed",
    "Quarantine",
    "QuarantineRetry",
    "QuarantinedFile",
    "Request",
    "RetriedFile",
    "Run",
    "Schedule",
    "Statistics",
    "Tripfold",
    "TripfoldError",
    "Unavailable",
    "UnexpectedResponse",
    "UnreadableObject",
    "UnreadableWarning",
    "WaitTimeout",
]
