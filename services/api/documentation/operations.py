"""What the documentation says of an operation beyond what its signature does."""

from __future__ import annotations

from dataclasses import dataclass

from litestar.openapi.spec import Example, OpenAPIMediaType, OpenAPIResponse, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIType

from services.api.statistics import formats

_CSV_EXAMPLE = """\
country,date,bus_count,passenger_count,exist_accident,average_delay_s\r
armenia,2024-05-01,1250,48211,true,61.304\r
"""
_NDJSON_EXAMPLE = (
    '{"country":"armenia","date":"2024-05-01","bus_count":1250,"passenger_count":48211,"exist_accident":true,'
    '"average_delay_s":61.304}\n'
)


@dataclass
class StatisticsOperation(Operation):
    """An operation that answers in each of the forms of the statistics."""

    def __post_init__(self) -> None:
        answer = (self.responses or {})["200"]
        assert isinstance(answer, OpenAPIResponse)
        assert answer.content is not None
        for media_type, example in ((formats.NDJSON, _NDJSON_EXAMPLE), (formats.CSV, _CSV_EXAMPLE)):
            answer.content[media_type] = OpenAPIMediaType(
                schema=Schema(type=OpenAPIType.STRING), examples={"as it is": Example(value=example)}
            )
