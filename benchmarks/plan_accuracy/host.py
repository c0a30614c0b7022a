"""The host's work on a layer and a microbatch: a step of models in which next to nothing is computed."""

from benchmarks.plan_accuracy.cases import GPT, LLAMA, Case
from benchmarks.plan_accuracy.critical_path import communication_seconds, critical_seconds
from benchmarks.plan_accuracy.processes import measure

TINY = ("--hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 128 --micro-batch-size 1 --lr 1e-3 "
        "--train-iters 100 --mock-data")
DEPTHS, MICROBATCHES, STEPS = (4, 16), 4, 6
TENSOR = "--tensor-model-parallel-size 2"
KINDS = {"GPT": "", "Llama": LLAMA.removeprefix(GPT), "selective recomputation": "--recompute-granularity selective",
         "full recomputation": "--recompute-granularity full", "dp 2": "",
         "dp 2, ZeRO-2": "--use-distributed-optimizer",
         "dp 2, ZeRO-3": "--data-parallel-sharding-strategy optim_grads_params",
         "tp 2": TENSOR, "tp 2, sequence parallel": f"{TENSOR} --sequence-parallel"}


def host_table() -> str:
    """Milliseconds by kind, from the fastest steps of a shallow and a deep model."""
    lines = ["| layers of | host, ms | of which waiting for gloo, ms |", "|---|--:|--:|"]
    for name, flags in KINDS.items():
        replicas = 2 if name.startswith("dp") else 1
        processes = 2 if TENSOR in flags else replicas
        steps, waits = [], []
        for depth in DEPTHS:
            case = Case(name, f"--num-layers {depth} {TINY} --global-batch-size {MICROBATCHES * replicas} {flags}",
                        processes)
            found = measure(case, STEPS + 1, memory=False)
            notes = [[process.notes[step] for process in found] for step in range(1, STEPS + 1)]
            steps.append(min(map(critical_seconds, notes)))
            waits.append(min(max(map(communication_seconds, of_step)) for of_step in notes))
        each, waiting = (1e3 * (deep - shallow) / (DEPTHS[1] - DEPTHS[0]) / MICROBATCHES
                         for shallow, deep in (steps, waits))
        lines.append(f"| {name} | {each:.2f} | {waiting:.2f} |")
    return "\n".join(lines)
