"""progress of jobs, and URLs of webhooks"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """To this revision."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("starts", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("images_seen", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("images_total", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("webhook_deliveries") as deliveries:
        deliveries.add_column(sa.Column("url", sa.Text(), nullable=False, server_default=""))
