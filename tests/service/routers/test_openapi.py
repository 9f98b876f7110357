"""The OpenAPI description: generated requests, valid and invalid, get no 5xx and no undocumented response."""

import pytest
from running import serving
from worker_threads import worker_threads

from service.app import create_app
from service.engine.simulator import Simulator
from service.settings import Settings

KEY = "sk-a-key-for-tests"


# The threads of the server, which is in this process, draw from `random` meanwhile; its requests are not drawn from it.
# Hypothesis looks for who holds `random`, which the collector no longer knows; see conftest.py.
@pytest.mark.filterwarnings(
    "ignore:It looks like `register_random`",
    "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning",
)
def test_responses_match_the_openapi_description(tmp_path):
    import schemathesis  # here, for each process of the suite would take seconds to import it
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    quick = settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    app = create_app(
        Settings(data=tmp_path, http={"api_keys": [KEY]}), worker_threads(Simulator(call_seconds=0, image_seconds=0))
    )
    with serving(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=60)
        operations = [result.ok() for result in schema.get_all_operations()]
        assert {operation.path for operation in operations} >= {
            "/v1/images/generations",
            "/v1/files",
            "/v1/batches",
            "/v1/models",
            "/readyz",
        }
        for operation in operations:

            @quick
            @given(case=operation.as_strategy())
            def conforms(case):
                if isinstance(case.body, dict) and isinstance(case.body.get("timeout"), float):
                    case.body["timeout"] += 30  # less than it takes is 504, as it should be
                # What a model can do is not in the schema: sizes, and fields that only go together.
                beyond = [positive_data_acceptance]
                case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, timeout=30, excluded_checks=beyond)

            conforms()
