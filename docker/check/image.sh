#!/bin/bash
# Builds the Dockerfile without a container registry, and checks what docs/deploy.md states about the image.
#
# Replaced: the base image PYTHON_IMAGE by a Debian 12 with Python 3.11, made by debootstrap; Docker by podman. Real:
# the Dockerfile, the context and .dockerignore, the packages from pip's index, and the user, entry point, health check,
# stop signal and read-only root filesystem of the container.
#
#   docker/check/image.sh [option of `podman build` ...]     as root; needs podman, debootstrap and an OCI runtime
#
# If PyTorch's own index cannot be reached, pass another TORCH_INDEX, for example https://pypi.org/simple. If pip needs
# its configuration or certificates, mount them (--volume FILE:FILE:ro).
set -euo pipefail
cd "$(dirname "$0")/../.."
base=localhost/python-stand-in:bookworm
image=localhost/flow-generator-matching:cpu
name=fgm-check-$$
port=${PORT:-8123}
key=$(openssl rand -hex 16)

say() { printf '\n== %s\n' "$*"; }

if ! podman image exists $base; then
    say "base image"
    root=$(mktemp --directory)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=python3-venv,ca-certificates bookworm "$root" > /dev/null
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
    tar --create --directory "$root" . | \
        podman import --quiet --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - $base > /dev/null
fi

say "build"
began=$(date +%s)
podman build --quiet --network host --format docker --build-arg PYTHON_IMAGE=$base --tag $image "$@" .
echo "built in $(($(date +%s) - began)) s"
podman history --format '{{.Size}}\t{{.CreatedBy}}' $image | grep -v '^0 B' | cut -c 1-110
podman image inspect --format 'bytes in all: {{.Size}}' $image $base

say "run: read-only, without capabilities, with /data and /tmp writable"
trap 'podman logs $name | tail -20; podman rm --force --volumes $name > /dev/null' ERR
podman run --detach --name $name --network host --read-only --tmpfs /tmp --cap-drop all \
    --security-opt no-new-privileges --env SERVICE_HTTP__PORT="$port" --env SERVICE_HTTP__API_KEYS="[\"$key\"]" $image > /dev/null
python3 docker/check/smoke.py "http://127.0.0.1:$port" --key "$key"
podman healthcheck run $name && echo "health check: passes"
test "$(podman exec $name id -u)" = 10001 && echo "user: 10001"
podman exec $name sh -c '! touch /opt/venv/x 2> /dev/null' && echo "root filesystem: read-only"
podman exec $name touch /data/x && echo "/data: writable"

say "stop by SIGTERM"
began=$(date +%s)
podman stop --time 40 $name > /dev/null
status=$(podman inspect --format '{{.State.ExitCode}}' $name)
echo "ended with status $status after $(($(date +%s) - began)) s"
if podman logs $name 2>&1 | grep -i traceback; then exit 1; fi
podman rm --volumes $name > /dev/null
test "$status" = 0
