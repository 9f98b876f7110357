"""Alembic's script: migrates the connection that `Database.migrate` passes, or the database of `-x database=URL`."""

from alembic import context
from sqlalchemy import Connection, NullPool, create_engine

from service.jobs.tables import Table


def upgrade(connection: Connection) -> None:
    """Run the requested migrations in the connection's transaction."""
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    upgrade(given)
else:
    url = context.get_x_argument(as_dictionary=True)["database"]
    with create_engine(url, poolclass=NullPool).begin() as own:
        upgrade(own)
