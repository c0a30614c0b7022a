#!/usr/bin/env bash
# Continue a published model on your own text: Hugging Face folder in, Hugging Face folder out.
#
#     MODEL=SmolLM2-135M TEXT=my_texts RUN=continued bash examples/continue_pretraining.sh \
#         --train-tokens 100000000 --lr 3e-4 --global-batch-size 64 --bf16
#
#   MODEL           folder of a Hugging Face model (safetensors), with its tokenizer
#   TEXT            folder of text: .txt, .jsonl (also .gz, .zst), .parquet
#   RUN             folder for everything that is written (default: continued_run); rerun the command to resume
#   REPLAY          folder of text like that on which the model was trained, mixed in against forgetting
#   REPLAY_WEIGHT   share of the samples that come from REPLAY (default: 0.05)
#   SEQ_LENGTH      tokens in a sample (default: 2048, or the model's positions if it has fewer)
#   GPUS_PER_NODE   processes (default: 1)
#   WORKERS         processes that tokenize (default: 1)
#   DTYPE           precision of the exported weights: fp32, bf16 or fp16 (default: fp32)
#   PYTHON          interpreter with megatron_ltd and transformers (default: python)
#
# The arguments go to megatron_ltd.pretrain_gpt and override the defaults below; give the length (--train-tokens,
# --train-samples or --train-iters). The learning rate is warmed up again and decays again, and some of the old text is
# replayed, as in https://arxiv.org/abs/2403.08763. To compute less, add for example
#     --random-ltd --random-ltd-start-length 512 --random-ltd-steps 2000
#
# One document in twenty is held out; the model is scored on the held-out part of both texts before and after.
set -euo pipefail

fail() { echo "examples/continue_pretraining.sh: $*" >&2; exit 20; }
title() { printf '\n== %s\n' "$*"; }

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
PYTHON=${PYTHON:-python}
RUN=${RUN:-continued_run}
REPLAY=${REPLAY:-}
REPLAY_WEIGHT=${REPLAY_WEIGHT:-0.05}
processes=${GPUS_PER_NODE:-1}
[[ -f ${MODEL:-}/config.json ]] || fail "MODEL = ${MODEL:-} is no folder of a Hugging Face model."
[[ -d ${TEXT:-} ]] || fail "TEXT = ${TEXT:-} is no folder of text."
[[ -z $REPLAY || -d $REPLAY ]] || fail "REPLAY = $REPLAY is no folder of text."
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE = $processes must be a positive number."
[[ $REPLAY_WEIGHT =~ ^0?\.[0-9]*[1-9][0-9]*$ ]] || fail "REPLAY_WEIGHT = $REPLAY_WEIGHT must be between 0 and 1."
[[ " $*" == *" --train-"* ]] || fail "give the length of the run, such as --train-tokens 100000000."
case " $* " in *" --ngram-rows"* | *" --qkv-conv-kernel"* | *" --recipe"[=\ ]muon-*)
    fail "a table of n-grams and convolutions are in no model of transformers, so the result could not be" \
        "written for it; leave them out (--recipe muon has neither), or train by hand as docs/token_dropping.md says." ;;
esac
there='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ["torch", "transformers"])))'
"$PYTHON" -c "$there" 2>/dev/null ||
    fail "PYTHON = $PYTHON cannot import torch and transformers; activate their environment, or set PYTHON."

# launch ARGUMENTS: start one Python program on all processes.
launch() {
    if ((processes == 1)); then
        "$PYTHON" "$@"
    else
        "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$@"
    fi
}

if [[ -z ${SEQ_LENGTH:-} ]]; then
    SEQ_LENGTH=$("$PYTHON" -c 'import json, sys
found = json.load(open(sys.argv[1]))
print(min(2048, found.get("max_position_embeddings") or found.get("n_positions") or 2048))' "$MODEL/config.json")
fi
mkdir -p "$RUN"
inputs="MODEL = $(realpath "$MODEL")
TEXT = $(realpath "$TEXT")
REPLAY = ${REPLAY:+$(realpath "$REPLAY")}
SEQ_LENGTH = $SEQ_LENGTH"
if [[ -f $RUN/inputs.txt && $inputs != "$(<"$RUN/inputs.txt")" ]]; then
    fail "RUN = $RUN was begun with other inputs, and what it holds of them would be used:" \
        $'\n'"$(diff "$RUN/inputs.txt" - <<<"$inputs" | grep '^[<>]' | sed 's/^</begun with/; s/^>/now       /')" \
        $'\n'"Choose another RUN. If a folder has only moved, correct $RUN/inputs.txt."
fi
echo "$inputs" >"$RUN/inputs.txt"

title "1/7 Weights and tokenizer of $MODEL"
[[ -d $RUN/imported ]] || "$PYTHON" "$repository/tools/convert_checkpoint.py" --from-hf "$MODEL" \
    --output "$RUN/imported" --seq-length "$SEQ_LENGTH"
files=$RUN/imported/tokenizer
if [[ -f $files/tokenizer.json ]]; then
    tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$files/tokenizer.json")
elif [[ -f $files/vocab.json ]]; then
    tokenizer=(--tokenizer-type GPT2BPETokenizer --vocab-file "$files/vocab.json" --merge-file "$files/merges.txt")
elif [[ -f $files/tokenizer.model ]]; then
    tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$files/tokenizer.model")
else
    fail "MODEL = $MODEL has no tokenizer.json, vocab.json or tokenizer.model."
fi
tokenizer+=(--bos-token auto)

names=(text)
data=("$RUN/text_text_document")
if [[ -n $REPLAY ]]; then
    names+=(replay)
    data=("$(awk "BEGIN { print 1 - $REPLAY_WEIGHT }")" "$RUN/text_text_document"
        "$REPLAY_WEIGHT" "$RUN/replay_text_document")
fi

title "2/7 Held-out text, and the corpus in the model's tokens"
for name in "${names[@]}"; do
    if [[ $name == text ]]; then source=$TEXT; else source=$REPLAY; fi
    [[ -f $RUN/$name.train.jsonl ]] || "$PYTHON" "$repository/examples/hold_out.py" --input "$source" \
        --output-prefix "$RUN/$name"
    [[ -f $RUN/${name}_text_document.idx ]] || "$PYTHON" "$repository/tools/preprocess_data.py" \
        --input "$RUN/$name.train.jsonl" --output-prefix "$RUN/$name" "${tokenizer[@]}" --append-eod \
        --workers "${WORKERS:-1}"
done

# evaluate CHECKPOINTS FILE: perplexity and bits per byte on the held-out texts.
evaluate() {
    local tasks
    tasks=$(printf ",perplexity=$RUN/%s.heldout.jsonl" "${names[@]}")
    launch "$repository/tools/evaluate_zeroshot.py" --load "$1" --tasks "${tasks:1}" --output "$2"
}

title "3/7 Scores before"
[[ -f $RUN/before.json ]] || evaluate "$RUN/imported" "$RUN/before.json"

title "4/7 Training"
start=(--load "$RUN/checkpoints")
[[ -f $RUN/checkpoints/latest_checkpointed_iteration.txt ]] || start=(--load "$RUN/imported" --finetune)
launch -m megatron_ltd.pretrain_gpt "${start[@]}" --use-checkpoint-args --save "$RUN/checkpoints" \
    --train-data-path "${data[@]}" --eval-iters 0 "${tokenizer[@]}" \
    --micro-batch-size 1 --global-batch-size $((16 * processes)) \
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 \
    --weight-decay 0.1 --adam-beta2 0.95 --metrics-file "$RUN/metrics.jsonl" "$@"

title "5/7 Scores after"
evaluate "$RUN/checkpoints" "$RUN/after.json"

title "6/7 A Hugging Face folder"
rm -rf "$RUN/hf"
"$PYTHON" "$repository/tools/convert_checkpoint.py" --load "$RUN/checkpoints" --output "$RUN/hf" \
    --dtype "${DTYPE:-fp32}"

title "7/7 transformers"
"$PYTHON" "$repository/examples/continued_summary.py" --model "$RUN/hf" --before "$RUN/before.json" \
    --after "$RUN/after.json" --text "$RUN/text.heldout.jsonl"
