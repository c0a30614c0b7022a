#!/usr/bin/env bash
# Shared by examples/pretrain_gpt.sh and its siblings: start one recipe with torchrun on this node.
#
#     bash examples/launch.sh RECIPE ARGUMENTS        RECIPE: a module of megatron_ltd, such as pretrain_gpt
#
# The environment is described in those scripts.
set -euo pipefail

recipe=${1:?"give the recipe, such as pretrain_gpt, and its arguments"}
shift
fail() { echo "examples/$recipe.sh: $*" >&2; exit 20; }

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_PORT=${MASTER_PORT:-29500}

is_count() { [[ $1 =~ ^[0-9]+$ ]]; }

check_inputs() {
    is_count "$NNODES" && ((NNODES > 0)) || fail "NNODES = $NNODES must be a positive number."
    is_count "$NODE_RANK" && ((NODE_RANK < NNODES)) ||
        fail "NODE_RANK = $NODE_RANK must be between 0 and NNODES - 1 = $((NNODES - 1))."
    is_count "$MASTER_PORT" && ((MASTER_PORT > 0 && MASTER_PORT < 65536)) ||
        fail "MASTER_PORT = $MASTER_PORT must be a port number, 1 to 65535."
    if ((NNODES > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
        fail "MASTER_ADDR is not set; NNODES = $NNODES needs the host name of the node with NODE_RANK 0, on every node."
    fi
    if [[ -n ${CONFIG:-} && ! -r $CONFIG ]]; then
        fail "CONFIG = $CONFIG cannot be read; the examples are in $repository/examples/configs."
    fi
    if [[ -z ${CONFIG:-} && $# -eq 0 ]]; then
        fail "nothing to train: set CONFIG to a file such as examples/configs/*.toml, or give flags; see --help."
    fi
    local gpus
    gpus=$("$PYTHON" -c 'import megatron_ltd, torch; print(torch.cuda.device_count())' 2>/dev/null) ||
        fail "PYTHON = $PYTHON cannot import torch and megatron_ltd; activate their environment or set PYTHON to its python."
    GPUS_PER_NODE=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    is_count "$GPUS_PER_NODE" && ((GPUS_PER_NODE > 0)) || fail "GPUS_PER_NODE = $GPUS_PER_NODE must be a positive number."
}

save_folder() {
    local previous=""
    for argument in "$@"; do
        [[ $argument == --save=* ]] && echo "${argument#--save=}"
        [[ $previous == --save ]] && echo "$argument"
        previous=$argument
    done
    return 0
}

check_inputs "$@"
launcher=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE")
if ((NNODES == 1)); then
    launcher+=(--standalone)
else
    launcher+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
settings=()
[[ -n ${CONFIG:-} ]] && settings=(--config "$CONFIG")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

version_of() { stat -c '%i %y' "$1" 2>/dev/null || true; }

save=$(save_folder "$@" | tail -n 1)
exit_file="${save:-.}/exit.json"
exit_file_before=$(version_of "$exit_file")

echo "$NNODES node(s) x $GPUS_PER_NODE process(es), node $NODE_RANK, ${CONFIG:-no configuration file}"
set -m  # a process group of its own, so that torchrun gets the terminal's signals once, from here
"${launcher[@]}" -m megatron_ltd."$recipe" "${settings[@]}" "$@" &
torchrun=$!
set +m
# A signal to this script is one to the run, which saves and stops. It also ends `wait`, so wait again.
signalled=0
for name in TERM INT HUP; do
    trap "signalled=1; kill -$name $torchrun 2>/dev/null || true" "$name"
done
code=0
wait "$torchrun" || code=$?
while ((signalled)); do
    signalled=0 code=0
    wait "$torchrun" || code=$?
done

# torchrun says 1 for every failure, so the run leaves its own code beside its checkpoints.
if ((code != 0)) && [[ -n $save && -f $exit_file && $(version_of "$exit_file") != "$exit_file_before" ]]; then
    reason=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"])' "$exit_file")
    ((reason == 0)) || code=$reason
fi
exit "$code"
