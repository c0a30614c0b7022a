#!/usr/bin/env bash
# From a BERT checkpoint to a GLUE score: export it to Hugging Face's format and finetune it on RTE in `transformers`.
#
#     LOAD=checkpoints/bert_large RTE=data/rte bash examples/finetune_glue.sh [--epochs 3 --lr 2e-5 ...]
#
#   LOAD      folder of checkpoints of megatron_ltd.pretrain_bert
#   RTE       folder with train.jsonl(.gz) and val.jsonl(.gz), in SuperGLUE's layout
#   EXPORT    folder for the exported model (default: LOAD-hf); written if it does not exist
#   PYTHON    interpreter with megatron_ltd and transformers (default: python)
#
# Hardware: any; a BERT-base takes minutes on a GPU. Published for BERT-large: 70.4% (arXiv 1810.04805, test set).
set -euo pipefail

fail() { echo "examples/finetune_glue.sh: $*" >&2; exit 20; }

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
[[ -n ${LOAD:-} && -d $LOAD ]] || fail "LOAD = ${LOAD:-} is no folder of checkpoints."
[[ -n ${RTE:-} && -d $RTE ]] || fail "RTE = ${RTE:-} is no folder with train.jsonl and val.jsonl."
EXPORT=${EXPORT:-${LOAD%/}-hf}

one_of() {
    local name
    for name in "$@"; do [[ -f $name ]] && { echo "$name"; return; }; done
    fail "none of $* exists."
}

train=$(one_of "$RTE"/train.jsonl{,.gz})
valid=$(one_of "$RTE"/val.jsonl{,.gz})
"$PYTHON" -c 'import transformers' 2>/dev/null || fail "PYTHON = $PYTHON has no transformers; pip install transformers."
[[ -d $EXPORT ]] || "$PYTHON" "$repository/tools/convert_checkpoint.py" --load "$LOAD" --to-hf "$EXPORT"
"$PYTHON" "$repository/examples/finetune_glue.py" --model "$EXPORT" --train "$train" --valid "$valid" "$@"
