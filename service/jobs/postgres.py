"""Connections to PostgreSQL that give up on a server that is silent: a host that is lost, a process that is stopped.

TCP alone waits for minutes, and for ever where the other side still acknowledges.
"""

from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Connection, Engine, create_engine, event

ANSWER_SECONDS = 15.0  # that a statement gets
POOL_SECONDS = 10.0  # that a connection is waited for while all are in use
# Of libpq, in its units; what the URL itself says wins. TCP's are for DBOS, whose statements have no deadline.
PARAMETERS = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "20000",  # milliseconds
}


class DeadlineConnection(psycopg.Connection[Any]):
    """A connection on which nothing waits for an answer longer than `answer_seconds`; None is as long as it takes."""

    answer_seconds: float | None = ANSWER_SECONDS

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """What psycopg sends and receives by. Raises OperationalError for an answer that does not come."""
        try:
            return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.close()  # the answer may come after all, and would be taken for the next statement's
            raise


def watched(url: URL) -> URL:
    """The URL with psycopg as the driver, and with what makes libpq notice that a host is lost."""
    return url.set(drivername="postgresql+psycopg").update_query_dict({**PARAMETERS, **url.query})


def engine(url: URL) -> Engine:
    """Over a URL that is watched, with a deadline for every statement."""
    made = create_engine(url, pool_pre_ping=True, pool_timeout=POOL_SECONDS)
    event.listen(
        made, "do_connect", lambda dialect, record, args, options: DeadlineConnection.connect(*args, **options)
    )
    return made


def remove_deadline(connection: Connection) -> None:
    """Take a connection from the pool for good, for statements that may take as long as they need."""
    connection.detach()
    driver: Any = connection.connection.dbapi_connection
    driver.answer_seconds = None
