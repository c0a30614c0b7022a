#!/usr/bin/env bash
# Pretrain a GPT on one or more nodes, on GPUs or, without GPUs, on CPU processes.
#
#     CONFIG=examples/configs/gpt_125m.toml bash examples/pretrain_gpt.sh \
#         --data-path data/corpus_text_document --vocab-file vocab.json --merge-file merges.txt \
#         --save checkpoints/gpt_125m --load checkpoints/gpt_125m
#
# All arguments go to megatron_ltd.pretrain_gpt, where they override CONFIG. Environment:
#
#   CONFIG          TOML file with the run's settings (optional if the arguments contain all of them)
#   GPUS_PER_NODE   processes on this node (default: its GPUs; 1 without any)
#   NNODES          nodes (default 1), or MIN:MAX for nodes that come and go (RDZV_HOSTS: hosts to meet at, separated by
#                     commas; see docs/multi_node.md); on several, run this script on each of them with
#   NODE_RANK         0 to NNODES - 1
#   MASTER_ADDR       host name or address of the node with rank 0
#   MASTER_PORT       a free port on that node (default 29500)
#   PYTHON          interpreter of the environment with megatron_ltd (default: python)
#
# The last lines say how the run ended, where its newest checkpoint is, and how it goes on. Exit codes: 0 trained to the
# end, 10 stopped by a signal after saving, 11 stopped by --exit-interval or --exit-duration-in-mins after saving (10 and
# 11: rerun the same command to resume), 20 settings, 21 data, 22 checkpoint, 30 diverged, 40 a process was lost (rerun),
# 50 a machine computes wrong numbers, 70 or 1 crashed. Settings are checked before any process is started.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" pretrain_gpt "$@"
