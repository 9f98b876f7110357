#!/bin/sh
# Writes docker/constraints.txt: every package of the image, in the version of this environment if it is installed
# there, because the test suite was run with it. Needs uv. CUDA packages are left out, because torch pins them itself.
set -eu
python=${1:-.venv/bin/python}
cd "$(dirname "$0")/.."
pins=$(mktemp)
trap 'rm "$pins"' EXIT
"$python" -m pip freeze --exclude-editable | sed 's/+[a-z0-9]*$//' > "$pins"
# uv prefers the versions that its output file already has.
uv pip compile pyproject.toml --extra gpu --extra s3 --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-header --no-annotate --quiet --output-file "$pins" > /dev/null
{
    echo "# Written by docker/pin.sh: the versions that the test suite was run with."
    grep -Ev '^(nvidia-|cuda-|triton)' "$pins"
} > docker/constraints.txt
