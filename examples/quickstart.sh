#!/usr/bin/env bash
# From nothing to a zero-shot score: a small GPT with random-LTD on four CPU processes.
#
#     bash examples/quickstart.sh
#
# Hardware: 2 CPU cores, 4 GB of memory, no GPU; network for the package installation only.
# Time: about 10 minutes of processor time, so 5 to 6 on two idle cores.
# Result: validation perplexity 123 (vocabulary of 4,096, trained on 0.7 million tokens), and 1.7% of held-out last
# words.
#
# Everything is written to quickstart_run/. Run the script again to resume; delete that folder to start from scratch.
# The environment is .venv-quickstart, or MEGATRON_LTD_VENV if that is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${MEGATRON_LTD_VENV:-$PWD/.venv-quickstart}
run=quickstart_run
checkpoints=$run/checkpoints
metrics=$run/metrics.jsonl
log=$run/train.log

vocab_size=4096
train_iters=700
stop_at=350
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD"

started_at=$SECONDS
title() { printf '\n== %s  (%d min %02d s)\n' "$1" $(((SECONDS - started_at) / 60)) $(((SECONDS - started_at) % 60)); }
skip() { echo "already done: $1"; }
fail() { printf 'examples/quickstart.sh: %s\n' "$*" >&2; exit 1; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    fail "no Python of version 3.11 or later with venv found; install python3.11 (and python3.11-venv on Debian)," \
        "or set PYTHON to one."
}

install() {
    local base stamp
    stamp=$(cat setup.py requirements/constraints.txt megatron_ltd/data/index_helpers.cpp | cksum)
    if [[ $(cat "$venv/quickstart.stamp" 2>/dev/null) == "$stamp" ]]; then
        skip "$venv"
        return
    fi
    if [[ -e $venv && ! -e $venv/pyvenv.cfg ]]; then
        fail "MEGATRON_LTD_VENV=$venv exists and is not a virtual environment; choose another folder."
    fi
    base=$(find_python)
    [[ -x $venv/bin/python ]] || "$base" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check -q
        -c requirements/constraints.txt)
    echo "installing PyTorch, about a minute ..."
    "${pip[@]}" torch==2.13.0
    echo "installing megatron_ltd ..."
    "${pip[@]}" -e '.[plot]'
    echo "$stamp" >"$venv/quickstart.stamp"
}

latest_step() { cat "$checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# train STEP FLAGS...: train until a checkpoint of STEP exists. The run continues from its newest checkpoint.
train() {
    local target=$1 code
    shift
    if (($(latest_step) >= target)); then
        skip "checkpoint of step $(latest_step)"
        return
    fi
    rm -f "$checkpoints/exit.json"
    local command=("$venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 4
        -m megatron_ltd.pretrain_gpt
        --num-layers 6 --hidden-size 128 --num-attention-heads 4 --seq-length 256
        --position-embedding-type rope --untie-embeddings-and-output-weights --init-method-std 0.05
        --hidden-dropout 0 --attention-dropout 0
        --random-ltd --random-ltd-start-length 64 --random-ltd-steps 490 --random-ltd-length-step 16
        --global-batch-size 4 --train-iters "$train_iters" --seed 1234
        --lr 3e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 40 --weight-decay 0.1 --adam-beta2 0.98
        --train-data-path "$run/train_text_document" --valid-data-path "$run/heldout_text_document"
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer/tokenizer.json"
        --save "$checkpoints" --load "$checkpoints" --save-interval 175
        --log-interval 10 --eval-interval 175 --eval-iters 16 --metrics-file "$metrics"
        "$@")
    echo "torchrun ${command[*]:3}"
    "${command[@]}" 2>&1 | tee -i -a "$log" | "$venv/bin/python" examples/progress.py || true
    # torchrun says 1 for every stop before the end; the run's own code lies beside its checkpoints.
    [[ -f $checkpoints/exit.json ]] || fail "training ended without a word; its last lines are above and in $log."
    code=$("$venv/bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"])' "$checkpoints/exit.json")
    [[ $code != 10 ]] || fail "stopped by a signal after saving step $(latest_step); run this again to go on."
    [[ $code == 0 || $code == 11 ]] || fail "training stopped with exit code $code; see above and $log."
    (($(latest_step) >= target)) || fail "training stopped at step $(latest_step) before step $target; see $log."
}

mkdir -p "$run"
version=$(cksum <"examples/quickstart.sh")
if [[ $(cat "$run/version" 2>/dev/null || echo "$version") != "$version" ]]; then
    fail "$run was made by another version of this script; delete or rename it and start again."
fi
echo "$version" >"$run/version"

title "1/8 Environment: $venv"
install
python=$venv/bin/python

title "2/8 Corpus: the prose in the documentation of Python, PyTorch, NumPy, SymPy and NetworkX"
if [[ -f $run/train.jsonl ]]; then
    skip "$run/train.jsonl"
else
    "$python" -W ignore examples/make_corpus.py --output "$run/corpus.partial"
    mv "$run"/corpus.partial/heldout.jsonl "$run"/corpus.partial/train.jsonl "$run"
    rmdir "$run/corpus.partial"
fi

title "3/8 Tokenizer: byte-level BPE of $vocab_size tokens"
if [[ -f $run/tokenizer/tokenizer.json ]]; then
    skip "$run/tokenizer"
else
    "$python" tools/train_tokenizer.py --input "$run/train.jsonl" --output "$run/tokenizer" --type bpe \
        --vocab-size "$vocab_size"
fi

title "4/8 Tokens: Megatron's .bin and .idx"
for part in heldout train; do
    if [[ -f $run/${part}_text_document.idx ]]; then
        skip "$run/${part}_text_document.idx"
    else
        "$python" tools/preprocess_data.py --input "$run/$part.jsonl" --output-prefix "$run/$part" \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$run/tokenizer/tokenizer.json" \
            --append-eod --workers 2
    fi
done

title "5/8 Pretraining, steps 1 to $stop_at: tensor parallel 2 x pipeline parallel 2"
train "$stop_at" --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2 \
    --exit-interval "$stop_at"

title "6/8 Resumed on another layout, to step $train_iters: tensor parallel 2 x data parallel 2"
train "$train_iters" --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --micro-batch-size 2

title "7/8 Zero-shot: last word of held-out passages, and held-out perplexity"
"$python" tools/make_lastword_set.py --input "$run/heldout.jsonl" --output "$run/lastword.jsonl"
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 tools/evaluate_zeroshot.py \
    --load "$checkpoints" --tasks "lambada=$run/lastword.jsonl,perplexity=$run/heldout.jsonl" \
    --output "$run/zero_shot.json"

title "8/8 Summary"
"$python" tools/plot_run.py --metrics "$metrics" --output "$run/run.png"
"$python" examples/quickstart_summary.py --metrics "$metrics" --results "$run/zero_shot.json" --output "$run/summary.md"
cat <<END

Loss and kept length against layer tokens: $run/run.png
The table above:                           $run/summary.md
Zero-shot results in full:                 $run/zero_shot.json
Log, metrics (one JSON object a line):     $log, $metrics
Checkpoints, loadable on any layout:       $checkpoints
END
title "Done"
