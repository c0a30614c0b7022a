#!/usr/bin/env bash
# Shared by examples/pretrain_gpt.sh and its siblings: start one recipe with the right Python.
#
#     bash examples/launch.sh RECIPE ARGUMENTS        RECIPE: a module of megatron_ltd, such as pretrain_gpt
#
# The environment is described in those scripts.
set -euo pipefail

recipe=${1:?"give the recipe, such as pretrain_gpt, and its arguments"}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python}
there='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ["torch", "megatron_ltd"])))'
"$PYTHON" -c "$there" 2>/dev/null || {
    echo "examples/$recipe.sh: PYTHON = $PYTHON cannot import torch and megatron_ltd; activate their environment or set" \
        "PYTHON to its python." >&2
    exit 20
}
exec "$PYTHON" "$repository/examples/launch.py" "$@"
