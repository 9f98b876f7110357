"""Rows of owners: each owner sees its own rows, in pages."""

import pytest

from service.errors import NotFound, Overloaded
from service.jobs.database import Database
from service.jobs.rows import check_unfinished, file_row, index, new_id, owned
from service.jobs.tables import FileRow, JobRow


@pytest.fixture
def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    database.migrate()
    with database.begin() as session:
        session.add_all(file_row(f"file-{number}", "ann", "batch", "a", 1, number // 2) for number in range(5))
    yield database
    database.close()


def test_pages_follow_each_other_in_both_orders(database):
    def ids(order):
        after, more, found = None, True, []
        while more:
            rows, more = index(session, FileRow, "ann", after, 2, order=order)
            found += [row.id for row in rows]
            after = found[-1]
        return found

    with database.read() as session:
        assert ids("asc") == [f"file-{number}" for number in range(5)]
        assert ids("desc") == [f"file-{number}" for number in reversed(range(5))]
        assert index(session, FileRow, "bob", None, 2) == ([], False)


@pytest.mark.parametrize(("owner", "name"), [("bob", "file-1"), ("ann", "file-9"), ("ann", "file-1\0"), ("ann", "ä")])
def test_a_row_that_does_not_exist_or_has_another_owner_is_not_found(database, owner, name):
    with database.read() as session:
        assert owned(session, FileRow, "ann", "file-1").id == "file-1"
        with pytest.raises(NotFound, match=r"there is no file .* GET /v1/files lists yours") as refused:
            owned(session, FileRow, owner, name, "input_file_id")
        assert (refused.value.param, refused.value.code) == ("input_file_id", "file_not_found")


def test_ids_sort_by_time_and_unfinished_jobs_are_limited(database):
    assert new_id("a") < new_id("a")
    with database.read() as session, pytest.raises(Overloaded, match="0 of your jobs are unfinished") as refused:
        check_unfinished(session, JobRow, "ann", 0, 60, "too_many")
    assert (refused.value.code, refused.value.retry_after) == ("too_many", 60)
