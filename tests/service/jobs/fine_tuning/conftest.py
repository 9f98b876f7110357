"""Jobs whose workflows do not run."""

from collections.abc import Iterator

import pytest

from service.jobs.jobs import Jobs
from service.settings import Settings


@pytest.fixture
def jobs(tmp_path) -> Iterator[Jobs]:
    """Jobs whose workflows do not run, so that tests call them."""
    jobs = Jobs(tmp_path, Settings(jobs={"max_served_students": 2}))
    jobs.database.migrate()
    yield jobs
    jobs.database.close()
