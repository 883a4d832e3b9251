"""Requests drawn from the server's own OpenAPI specification: none makes it fail."""

from collections import defaultdict
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

OPERATIONS = 8
SETTINGS = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@pytest.mark.long
def test_no_request_makes_it_fail(serve):
    """Also requests that break the specification. What takes longer than the server allows is a 504."""
    server = serve(timeout=0.5, max_n=4)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = defaultdict(set)

    def check(case):
        answer = case.call()
        statuses[case.operation.label].add(answer.status_code)
        assert answer.status_code in (200, 400, 404, 405, 504), (case.body, answer.text)
        if answer.status_code != 200 and case.method != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    for found in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # requests without parameters can't break the specification
                SETTINGS(given(case=found.ok().as_strategy(generation_mode=mode))(check))()
    assert len(statuses) == OPERATIONS and all(200 in seen for seen in statuses.values()), statuses
    assert 400 in statuses["POST /v1/chat/completions"] and server.idle()
