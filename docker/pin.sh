#!/bin/sh
# Writes docker/constraints.txt: every package of the image, at the version that this environment has where it has it,
# which is the one that the suite was run with. Needs uv. What torch brings for CUDA is left out: torch itself pins it.
set -eu
python=${1:-.venv/bin/python}
cd "$(dirname "$0")/.."
pins=$(mktemp)
trap 'rm "$pins"' EXIT
"$python" -m pip freeze --exclude-editable | sed 's/+[a-z0-9]*$//' > "$pins"
# uv takes what its output file holds already as its first choice.
uv pip compile pyproject.toml --extra gpu --extra s3 --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-header --no-annotate --quiet --output-file "$pins" > /dev/null
{
    echo "# Made by docker/pin.sh: the versions that the suite was run with."
    grep -Ev '^(nvidia-|cuda-|triton)' "$pins"
} > docker/constraints.txt
