"""students of jobs that were deleted"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """To this revision."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("deleted_at", sa.BigInteger(), nullable=True))
