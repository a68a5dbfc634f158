"""The parameters of a query: none may be missing, unknown or given twice, and a wrong one is told by its name.

What an operation takes is declared once, in the signature of its route; this reads it from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from litestar import Request
from litestar.enums import ParamType
from litestar.params import ParameterKwarg
from litestar.typing import FieldDefinition

from services.api.http.errors import InvalidParameter, InvalidRequest, shown

QUERY_PARAMETERS_MAX = 50


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter as a route declares it. ``argument`` is its name in the signature of the handler."""

    argument: str
    name: str
    required: bool
    example: str


async def refuse_undeclared(request: Request[Any, Any, Any]) -> None:
    """Refuse a query that does not fit the declaration of its route, before anything is read from it.

    Raises InvalidRequest, naming each parameter that is missing, unknown or given more than once.
    """
    pairs = query_pairs(request.scope["query_string"])
    faults = faults_of([name for name, _ in pairs], declared_of(request))
    if faults:
        raise InvalidRequest(*faults)


def query_pairs(query: bytes) -> list[tuple[str, str]]:
    """Split a query string into names and values. Raises InvalidRequest if there are too many."""
    try:
        return parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=QUERY_PARAMETERS_MAX)
    except ValueError as error:
        reason = f"the query has more than {QUERY_PARAMETERS_MAX} parameters"
        raise InvalidRequest(InvalidParameter(name="query", reason=reason)) from error


def faults_of(given: Sequence[str], declared: Collection[Declared]) -> list[InvalidParameter]:
    """Compare the names that a query gives with those that are declared."""
    counts = Counter(given)
    names = {parameter.name for parameter in declared}
    known = ", ".join(sorted(names)) or "none"
    unknown = [
        InvalidParameter(name=shown(name)[1:-1], reason=f"it is not a parameter of this operation, which takes {known}")
        for name in counts
        if name not in names
    ]
    repeated = [
        InvalidParameter(name=name, reason=f"it is given {count} times: give it once")
        for name, count in counts.items()
        if name in names and count > 1
    ]
    missing = [
        InvalidParameter(
            name=parameter.name,
            reason=f"it is required, and is missing; for example: {parameter.name}={parameter.example}",
        )
        for parameter in declared
        if parameter.required and parameter.name not in counts
    ]
    return unknown + repeated + missing


def unusable(parameter: Declared, value: str, reason: str) -> InvalidParameter:
    """Say that a value is not of its parameter's type, and what one looks like."""
    return InvalidParameter(
        name=parameter.name,
        reason=f"{shown(value)} cannot be used ({reason}); for example: {parameter.name}={parameter.example}",
    )


def declared_of(request: Request[Any, Any, Any]) -> list[Declared]:
    """Return the query parameters that the route of a request declares."""
    return declared_in(request.route_handler.parsed_fn_signature.parameters)


def declared_in(signature: Mapping[str, FieldDefinition]) -> list[Declared]:
    """Return the query parameters among the arguments of a handler."""
    declared = []
    for argument, field in signature.items():
        definition = field.kwarg_definition
        if field.is_di_field or not isinstance(definition, ParameterKwarg):
            continue
        if definition.param_type is ParamType.QUERY:
            example = definition.examples[0].value if definition.examples else ""
            declared.append(
                Declared(
                    argument=argument,
                    name=definition.name or argument,
                    required=field.is_required,
                    example=str(example),
                )
            )
    return declared
