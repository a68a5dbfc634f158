"""Validation of query parameters: each must be declared, given once, and valid; errors name the parameter.

The signature of a handler declares its parameters; this module reads them from there. Litestar itself ignores unknown
and repeated parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from litestar import Request
from litestar.enums import ParamType
from litestar.openapi.spec import Example
from litestar.params import ParameterKwarg, QueryParameter
from litestar.typing import FieldDefinition

from services.api.http.errors import InvalidParameter, InvalidRequest, quoted

QUERY_PARAMETERS_MAX = 50

_REASONS = (
    (re.compile(r"Expected `int` >= (-?\d+)"), "it must be {} or more"),
    (re.compile(r"Expected `int` <= (-?\d+)"), "it must be {} or less"),
    (re.compile(r"Expected `int`"), "it must be a whole number"),
    (re.compile(r"Expected `date`|Invalid RFC3339 encoded date"), "it must be a date, as YYYY-MM-DD"),
    (re.compile(r"Expected `str` of length >= (\d+)"), "it must have at least {} characters"),
    (re.compile(r"Expected `str` of length <= (\d+)"), "it must have at most {} characters"),
)


class DeclaredParameter(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter that a handler declares. ``argument`` is its name in the handler's signature."""

    argument: str
    name: str
    required: bool
    example: str


async def check_query(request: Request[Any, Any, Any]) -> None:
    """Check a query against the declaration of its handler, before any value is read.

    Raises InvalidRequest, which names each parameter that is missing, unknown or repeated.
    """
    pairs = query_pairs(request.scope["query_string"])
    errors = parameter_errors([name for name, _ in pairs], declared_of(request))
    if errors:
        raise InvalidRequest(*errors)


def query_pairs(query: bytes) -> list[tuple[str, str]]:
    """Split a query string into names and values. Raises InvalidRequest if there are too many."""
    try:
        return parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=QUERY_PARAMETERS_MAX)
    except ValueError as error:
        reason = f"the query has more than {QUERY_PARAMETERS_MAX} parameters"
        raise InvalidRequest(InvalidParameter(name="query", reason=reason)) from error


def parameter_errors(given: Sequence[str], declared: Collection[DeclaredParameter]) -> list[InvalidParameter]:
    """Return an error for each name that is unknown, repeated or missing."""
    counts = Counter(given)
    names = {parameter.name for parameter in declared}
    known = ", ".join(sorted(names)) or "none"
    unknown = [
        InvalidParameter(
            name=quoted(name)[1:-1], reason=f"it is not a parameter of this operation. Its parameters are: {known}"
        )
        for name in counts
        if name not in names
    ]
    repeated = [
        InvalidParameter(name=name, reason=f"it is given {count} times. Give it once")
        for name, count in counts.items()
        if name in names and count > 1
    ]
    missing = [
        InvalidParameter(
            name=parameter.name,
            reason=f"it is missing. For example: {parameter.name}={parameter.example}",
        )
        for parameter in declared
        if parameter.required and parameter.name not in counts
    ]
    return unknown + repeated + missing


def invalid_value(parameter: DeclaredParameter, value: str, reason: str) -> InvalidParameter:
    """Return the error for an invalid value, with an example of a valid one. ``reason`` is msgspec's message."""
    example = f"{parameter.name}={parameter.example}"
    return InvalidParameter(
        name=parameter.name, reason=f"{quoted(value)} cannot be used: {_plain_reason(reason)}. For example: {example}"
    )


def declared_of(request: Request[Any, Any, Any]) -> list[DeclaredParameter]:
    """Return the query parameters that the handler of a request declares."""
    return declared_in(request.route_handler.parsed_fn_signature.parameters)


def declared_in(signature: Mapping[str, FieldDefinition]) -> list[DeclaredParameter]:
    """Return the query parameters in the signature of a handler."""
    declared = []
    for argument, field in signature.items():
        definition = field.kwarg_definition
        if field.is_di_field or not isinstance(definition, ParameterKwarg):
            continue
        if definition.param_type is ParamType.QUERY:
            example = definition.examples[0].value if definition.examples else ""
            declared.append(
                DeclaredParameter(
                    argument=argument,
                    name=definition.name or argument,
                    required=field.is_required,
                    example=str(example).lower() if isinstance(example, bool) else str(example),
                )
            )
    return declared


def date_parameter(name: str, description: str, example: str | None) -> QueryParameter:
    """Return the declaration of a query parameter that is a date."""
    examples = None if example is None else [Example(value=example)]
    return QueryParameter(name=name, description=description, examples=examples)


def _plain_reason(message: str) -> str:
    """Translate a message of msgspec into one without the type names of Python."""
    for pattern, reason in _REASONS:
        if match := pattern.match(message):
            return reason.format(*match.groups())
    return "it does not have the expected form"
