"""the action that a client has requested for a running job, under its new name"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("wish", new_column_name="requested_action")


def downgrade() -> None:
    """Back from it."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("requested_action", new_column_name="wish")
