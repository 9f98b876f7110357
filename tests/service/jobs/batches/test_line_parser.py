"""Lines of a batch that are refused before a model is looked up."""

import json

import pytest

from service.errors import InvalidRequest
from service.jobs.batches.line_parser import parse
from service.jobs.tables import BatchRow
from service.settings import Settings

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a"}}


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("3", "invalid_request", None),
        (LINE | {"method": "GET"}, "invalid_method", "method"),
        (LINE | {"url": "/v1/images/edits"}, "invalid_url", "url"),
        (LINE | {"custom_id": ""}, "invalid_request", "custom_id"),
        (LINE | {"body": {"prompt": ""}}, "invalid_request", "body.prompt"),
        (LINE | {"body": {"prompt": " \n"}}, "invalid_request", "body.prompt"),
        (LINE | {"body": {"prompt": "a", "stream": True}}, "invalid_value", "body.stream"),
        (LINE | {"body": {"prompt": "a", "timeout": 9.0}}, "invalid_value", "body.timeout"),
        (LINE | {"body": {"prompt": "a", "response_format": "b64_json"}}, "invalid_value", "body.response_format"),
        (LINE | {"body": {"prompt": "a" * 999}}, "line_too_long", None),
    ],
)
def test_an_invalid_line_is_refused_as_a_request_is(line, code, param):
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(InvalidRequest) as refused:
        parse(None, Settings(http={"max_body_bytes": 500}), BatchRow(id="batch_1", owner="ann"), 1, text.encode())
    assert (refused.value.code, refused.value.param) == (code, param)
