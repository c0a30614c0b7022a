#!/usr/bin/env bash
# A quarter of an hour on one GPU: measurements in the order of their worth, in two calls of 170 and 400 seconds.
#
#     bash benchmarks/gpu_quarter_hour.sh first OUT && bash benchmarks/gpu_quarter_hour.sh second OUT
#
# OUT       folder for results.jsonl (a line for each row, written at once), traces and tables of kernels
# SECONDS_LEFT  the time this call may take (default: 560)
# PYTHON    interpreter with PyTorch for this GPU (default: python3)
#
# What follows OUT is passed on: --tiny rehearses the call with small models, also without a GPU.
# Needs no network, and no package besides PyTorch, numpy, sentencepiece, tokenizers, safetensors and, for the tests
# among the steps, pytest. A step that fails or takes too long does not stop the next one; the call fails at the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -ge 2 && ($1 == first || $1 == second) ]] ||
    { echo "usage: bash benchmarks/gpu_quarter_hour.sh first|second OUT [--tiny]" >&2; exit 2; }
call=$1 out=$2 left=${SECONDS_LEFT:-560}
shift 2
mkdir -p "$out" || exit 2
export PYTHONPATH=$PWD PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
for _ in 1 2 3 4 5 6; do  # a process that the GPU has left is followed by another, which goes on with the next step
    "${PYTHON:-python3}" -m benchmarks.gpu.quarter_hour "$call" --out "$out" --seconds $((left - SECONDS)) "$@" \
        2> >(tee -a "$out/$call.err" >&2)
    code=$?
    [[ $code -eq 3 || $code -ge 128 ]] || break
done
[[ $code -eq 0 ]] || exit "$code"
if grep '"row": "ends"' "$out/results.jsonl" | grep -qv '"problem": null'; then
    echo "some steps failed:" && grep '"row": "ends"' "$out/results.jsonl" | grep -v '"problem": null' | cut -c1-300
    exit 1
fi
