"""What Alembic runs: on the connection that `Database.migrate` hands over, or for one named on its command line."""

from alembic import context
from sqlalchemy import Connection, create_engine

from service.jobs.tables import Table


def upgrade(connection: Connection) -> None:
    """The wanted migrations, in the connection's transaction."""
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    upgrade(given)
else:
    with create_engine(context.get_x_argument(as_dictionary=True)["database"]).begin() as own:
        upgrade(own)
