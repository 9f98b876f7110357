# A minimal form of the entry point of PostgreSQL's own image: creates a user with a password, and a database.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --username "$POSTGRES_USER" --auth scram-sha-256 --locale C.UTF-8 \
        --pwfile <(echo "${POSTGRES_PASSWORD:?is empty}")
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_USER" | postgres --single -j postgres
fi
exec postgres -c listen_addresses='*'
