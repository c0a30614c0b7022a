#!/usr/bin/env bash
# Tests and measurements on one GPU, in less than ten minutes on a big one.
#
#     bash benchmarks/gpu_suite.sh OUT [NANOGPT]
#
# OUT       folder for a log, and a table (.md) and all numbers (.json) of each measurement
# NANOGPT   a checkout of nanoGPT, to time beside ours
# PYTHON    interpreter with PyTorch for this GPU and pytest (default: python3)
#
# What comes first is worth most: tests, 125M and 350M at sequence 1,024 as they are and compiled, then sequence 2,048.
# A measurement that fails is reported at the end and does not stop the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -ge 1 ]] || { echo "usage: bash benchmarks/gpu_suite.sh OUT [NANOGPT]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
peer=()
[[ $# -ge 2 ]] && peer=(--nanogpt "$2")
failed=()
export PYTHONPATH=$PWD

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' ||
    { echo "gpu_suite.sh: no PyTorch with a GPU in $python; set PYTHON" >&2; exit 2; }

step() {  # name, command...
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    "$@" 2>"$out/$name.err" | tee "$out/$name.md"
    if [[ ${PIPESTATUS[0]} -ne 0 ]]; then
        failed+=("$name")
        tail -n 20 "$out/$name.err"
    fi
    echo "== $name: $((SECONDS - started)) s"
}

measure() {  # name, arguments...
    local name=$1
    shift
    step "$name" "$python" tools/benchmark.py --device cuda --precision bf16 --rounds 10 --output "$out/$name.json" "$@"
}

ours=(--rows "dense,kept 1/2,kept 1/4")
step tests timeout 240 "$python" -m pytest tests/gpu -q
measure 125m_1024 --shape 125m --memory "${peer[@]}"
measure 350m_1024 --shape 350m --memory "${peer[@]}"
measure 125m_1024_compiled --shape 125m --compile "${ours[@]}"
measure 350m_1024_compiled --shape 350m --compile "${ours[@]}"
measure 125m_2048 --shape 125m --sequence 2048 --samples 8 "${peer[@]}"
measure 350m_2048 --shape 350m --sequence 2048 --samples 8 "${peer[@]}"
measure 350m_2048_compiled --shape 350m --sequence 2048 --samples 8 --compile "${ours[@]}"

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all done in $SECONDS s"
