#!/bin/bash
# Starts the profiles `cpu` and `full` of docker-compose.yml without a registry, and sends requests of all kinds.
#
# Replaced: Docker by podman and podman-compose; the images of PostgreSQL, Prometheus and the object store by those of
# docker/check/Containerfile. There is no Grafana. Real: the compose file with its networks, volumes, ports, users and
# settings, and the image, which docker/check/image.sh builds first. Ports 8000 and 9090 must be free.
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
mkdir -p students # mounted by the compose file
service=flow-generator-matching_service-full_1

say() { printf '\n== %s\n' "$*"; }

say "replacements of images"
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

say "a batch while one of the two servers is killed and restarted"
(sleep 5; podman kill $service > /dev/null; sleep 5; podman start $service > /dev/null) &
killer=$!
python3 docker/check/smoke.py http://127.0.0.1:8000 --batch 400
wait $killer

say "queries of the dashboard on Prometheus"
python3 docker/check/dashboard.py http://127.0.0.1:9090
