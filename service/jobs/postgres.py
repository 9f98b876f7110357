"""Connections to PostgreSQL with a deadline for every answer, for hosts that are lost and processes that are suspended.

TCP alone waits for minutes, or without end if the other side still acknowledges packets.
"""

from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, text

from service.errors import StartError

ANSWER_SECONDS = 15.0  # deadline of a statement
POOL_SECONDS = 10.0  # that a transaction waits for a connection while all are in use
READ_ONLY = "25006"  # state of a statement that writes to a read-only database
# Parameters of libpq, in its units; those of the URL win. Those of TCP are for DBOS, which sets no deadlines.
PARAMETERS = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "20000",  # milliseconds
}


class DeadlineConnection(psycopg.Connection[Any]):
    """A connection that waits at most `answer_seconds` for an answer; None sets no limit."""

    answer_seconds: float | None = ANSWER_SECONDS

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Send and receive, as psycopg does. Raises OperationalError if there is no answer in time."""
        try:
            return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.close()  # a late answer would be read as that of the next statement
            raise


def with_keepalives(url: URL) -> URL:
    """Return the URL with psycopg as the driver, and with parameters by which libpq detects a lost host."""
    return url.set(drivername="postgresql+psycopg").update_query_dict({**PARAMETERS, **url.query})


def engine(url: URL) -> Engine:
    """Return an engine for a URL of `with_keepalives`, with a deadline for every statement."""
    made = create_engine(url, hide_parameters=True, pool_pre_ping=True, pool_timeout=POOL_SECONDS)
    event.listen(
        made, "do_connect", lambda dialect, record, args, options: DeadlineConnection.connect(*args, **options)
    )
    return made


@event.listens_for(Engine, "handle_error")
def _leave_read_only(context: ExceptionContext) -> None:
    """Treat a read-only database as unavailable, also in the engine of DBOS, which retries lost connections.

    A failover leaves connections to a server that has become a replica. Their successors find the new primary.
    """
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True


def check_writable(connection: Connection) -> None:
    """Raise StartError for a database that refuses to write, such as a replica's."""
    if connection.scalar(text("SHOW transaction_read_only")) == "on":
        raise StartError(f"the database {connection.engine.url!r} is read-only; name the primary server")


def remove_deadline(connection: Connection) -> None:
    """Detach a connection from the pool, and let its statements take as long as they need."""
    connection.detach()
    driver: Any = connection.connection.dbapi_connection
    driver.answer_seconds = None
