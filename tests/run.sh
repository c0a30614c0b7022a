#!/usr/bin/env bash
# Lint, type check and tests, in an environment of their own. Needs Python 3.11 or later and a C++ compiler.
#
#     bash tests/run.sh                       everything
#     bash tests/run.sh tests/parallel -x     arguments go to pytest
#
# MEGATRON_LTD_VENV   where the environment lives (default: .venv-tests); kept until the requirements change
# MEGATRON_LTD_DATA   folder with the public test data; tests that need it skip themselves when it is not set
# PYTHON              interpreter to build the environment with (default: python3.11, else python3 if new enough)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=${MEGATRON_LTD_VENV:-$root/.venv-tests}

fail() { echo "tests/run.sh: $*" >&2; exit 2; }

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 or later with venv; point it to one."
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3.11 python3 python3.12 python3.13 python; do
        if usable "$name"; then echo "$name"; return; fi
    done
    fail "no Python of version 3.11 or later with venv found; install python3.11 (and python3.11-venv on Debian)," \
        "or set PYTHON to one."
}

prepare_environment() {
    local python stamp
    python=$(find_python)
    stamp=$(cat setup.py pyproject.toml requirements/constraints.txt megatron_ltd/data/index_helpers.cpp <("$python" -VV) <(echo "$root") |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [[ -x $venv/bin/python && $(cat "$venv/requirements.stamp" 2>/dev/null) == "$stamp" ]]; then
        echo "== environment: $venv (unchanged)"
        return
    fi
    if [[ -e $venv && ! -e $venv/pyvenv.cfg ]]; then
        fail "MEGATRON_LTD_VENV=$venv exists and is not a virtual environment; choose another folder."
    fi
    command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
        fail "no C++ compiler found (c++, g++ or clang++); install one."
    echo "== environment: $venv (building)"
    "$python" -m venv --clear "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt)
    # PyTorch first and by itself: a build without CUDA, where one is on offer, is then kept.
    "${pip[@]}" torch==2.13.0
    "${pip[@]}" -e '.[dev]'
    if [[ ! -e $("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]]; then
        echo "== Python's headers are not installed: the compiled index helpers are left out, and their tests skipped"
    elif ! "$venv/bin/python" -c 'import megatron_ltd.data.index_helpers'; then
        fail "the compiled index helpers could not be built; see: $venv/bin/pip install -v -e ."
    fi
    echo "$stamp" >"$venv/requirements.stamp"
}

prepare_environment
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" PYTHONPATH="$root" OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1

# Files in memory, where there is room for them: a disk that is flushed thousands of times makes the tests half as fast.
if [[ -z ${TMPDIR:-} && -w /dev/shm && $(df --output=avail -k /dev/shm | tail -1) -gt 4000000 ]]; then
    in_memory=$(mktemp -d /dev/shm/ltd.XXXXXX)
    export TMPDIR=$in_memory
fi

echo "== ruff"
ruff check .
echo "== mypy"
mypy
echo "== pytest (test data: ${MEGATRON_LTD_DATA:-none; set MEGATRON_LTD_DATA to run the tests that need it})"
if (($# == 0)); then  # whole files side by side, as many as there are cores
    cores=$(getconf _NPROCESSORS_ONLN)
    # In the order of tests/conftest.py: otherwise files with few tests, which are slow, come last and leave cores idle.
    set -- --numprocesses "$((cores < 8 ? cores : 8))" --dist loadfile --no-loadscope-reorder
fi
python -m pytest "$@"
[[ -z ${in_memory:-} ]] || rm -rf "$in_memory"  # files of tests that failed stay
