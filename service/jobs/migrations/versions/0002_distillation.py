"""progress of jobs, and URLs of webhooks"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("starts", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("images_seen", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("images_total", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("webhook_deliveries") as deliveries:
        deliveries.add_column(sa.Column("url", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    """Back from it."""
    with op.batch_alter_table("webhook_deliveries") as deliveries:
        deliveries.drop_column("url")
    with op.batch_alter_table("jobs") as jobs:
        for name in ("images_total", "images_seen", "starts"):
            jobs.drop_column(name)
