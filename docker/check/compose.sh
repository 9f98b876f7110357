#!/bin/bash
# Brings the profiles `cpu` and `full` of docker-compose.yml up and asks them everything, where no registry is reached.
#
# Stand-ins: podman and podman-compose for Docker; docker/check/Containerfile for the images of PostgreSQL, Prometheus
# and the object store; no Grafana. Real: the compose file with its networks, volumes, ports, users and settings, and
# the image, which docker/check/image.sh has built before. Ports 8000 and 9090 must be free.
#
#   docker/check/compose.sh [option of `podman build` ...]     as root; needs podman, podman-compose and catatonit
set -euo pipefail
cd "$(dirname "$0")/../.."
secrets=$(mktemp)
whole=(podman-compose --env-file "$secrets" --profile full --file docker-compose.yml --file docker/check/stand-ins.yml)
trap '"${whole[@]}" down --volumes > /dev/null 2>&1; rm -f "$secrets"' EXIT
for name in POSTGRES_PASSWORD OBJECTS_SECRET ARTIFACT_SECRET GRAFANA_PASSWORD; do
    echo "$name=$(openssl rand -hex 24)"
done > "$secrets"
mkdir -p students # that compose mounts
service=flow-generator-matching_service-full_1

say() { printf '\n== %s\n' "$*"; }

say "stand-ins"
for target in database objects prometheus; do
    podman build --quiet --network host "$@" --target $target --tag localhost/stand-in:$target \
        --file docker/check/Containerfile docker/check
done

say "profile cpu"
podman-compose --profile cpu up --no-build --detach
python3 docker/check/smoke.py http://127.0.0.1:8000 --batch 50
podman-compose --profile cpu down --volumes

say "profile full, without Grafana"
"${whole[@]}" up --no-build --detach service-full jobs database objects prometheus
python3 docker/check/smoke.py http://127.0.0.1:8000 --batch 50

say "a batch while one of the two servers is killed, and started again"
(sleep 5; podman kill $service > /dev/null; sleep 5; podman start $service > /dev/null) &
killer=$!
python3 docker/check/smoke.py http://127.0.0.1:8000 --batch 400
wait $killer

say "what Prometheus has seen of both"
python3 docker/check/dashboard.py http://127.0.0.1:9090
