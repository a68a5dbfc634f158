"""The HTTP operation on access: what a client may do."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import msgspec
from litestar import Request, get

from services.api.auth import API_KEY, READ_OR_PROCESS, SCOPE, ApiKey, Scope
from services.api.http.problems import responses


class AccessDetail(msgspec.Struct, frozen=True, kw_only=True):
    """The key of a client, and what it may do."""

    key: Annotated[
        str | None, msgspec.Meta(description="The name of the key; null: no key is needed.", examples=["reader"])
    ]
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(description="The permissions: to read, and to process dates.")]
    expires_at: Annotated[dt.datetime | None, msgspec.Meta(description="When the key expires; null: never.")]


@get(
    "/access",
    opt={SCOPE: READ_OR_PROCESS},
    summary="Get what the client may do",
    operation_id="getAccess",
    tags=["health"],
    response_description="The name and the scopes of the client's key.",
    responses=responses(),
)
async def access_of_client(request: Request[Any, Any, Any]) -> AccessDetail:
    """Return the name, the scopes and the expiry of the client's key."""
    key: ApiKey | None = request.state.get(API_KEY)
    scopes = key.scopes if key else READ_OR_PROCESS
    return AccessDetail(
        key=key.name if key else None,
        scopes=tuple(scope for scope in Scope if scope in scopes),
        expires_at=key.expires_at if key else None,
    )


HANDLERS = [access_of_client]
