#!/usr/bin/env bash
#SBATCH --job-name=megatron_ltd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# The run of examples/pretrain_gpt.sh under Slurm: one task per node, which starts the processes of its node.
#
#     sbatch --export=ALL,CONFIG=examples/configs/gpt_1.3b.toml examples/slurm_pretrain_gpt.sh \
#         --data-path data/pile_text_document --vocab-file vocab.json --merge-file merges.txt \
#         --save checkpoints/gpt_1.3b --load checkpoints/gpt_1.3b
#
# Three minutes before the time limit, and on preemption, the run saves and the job requeues itself.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?this script is for sbatch; without Slurm use examples/pretrain_gpt.sh}"
# Since Slurm 22.05 srun does not take the number of processors from the job, and would give each node's task only one.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash examples/pretrain_gpt.sh "$@" &
step=$!
signalled=0
trap 'signalled=1; scancel --signal=TERM "$SLURM_JOB_ID".0' TERM
code=0
wait "$step" || code=$?
while ((signalled)); do
    signalled=0 code=0
    wait "$step" || code=$?
done
if ((code == 10 || code == 11)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
