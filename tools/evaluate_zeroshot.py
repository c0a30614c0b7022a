"""Score a checkpoint on zero-shot tasks from local files.

    torchrun --nproc-per-node 4 tools/evaluate_zeroshot.py --load checkpoints --tasks lambada,wikitext \\
        --task-data tasks --output results.json \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

The model and the tokenizer come from the checkpoint's manifest. Any parallel layout works, whatever that of the
training run; processes beyond tensor x pipeline parallelism are data-parallel. Results do not depend on layout or batch
size.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.data.text.tokenizer import Tokenizer
from megatron_ltd.errors import ConfigError, DataError, UserError
from megatron_ltd.lm_eval.listed import plan_listed
from megatron_ltd.lm_eval.report import (
    check_format,
    check_writable,
    finished_before,
    markdown_table,
    model_record,
    model_sha256,
    result_of,
    software_versions,
    task_record,
    write_results,
)
from megatron_ltd.lm_eval.results import OVERLONG, EvalOptions, TaskResult
from megatron_ltd.lm_eval.scorer import CheckpointScorer, build_scorer
from megatron_ltd.lm_eval.tasks.names import TASKS, TaskRun
from megatron_ltd.log import Console
from megatron_ltd.parallel.agreement import disagreements, gather_json
from megatron_ltd.train.process.exits import leave
from tools.commands.checkpoint_model import (
    add_checkpoint_flags,
    check_at_least,
    check_bos,
    checkpoint_tokenizer,
    exit_code_of_all,
    first_token,
)
from tools.commands.command_line import add_output, parser_of


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--tasks", required=True, action="append", metavar="TASK[=FILE],...",
        help=f"from {', '.join(TASKS)}, separated by commas; by default a task's file is under --task-data; any other "
        "name is a task of lm-evaluation-harness (needs the extra `eval`), whose files are TASK_DATA/TASK/SPLIT.jsonl",
    )
    parser.add_argument("--task-data", metavar="DIR",
                        help="folder of task files, such as DIR/lambada/lambada_test.jsonl.gz")
    add_output(parser, nargs="+", metavar="FILE",
               help="write results after each task: .json, .md (the table) or .csv, or several of them")
    parser.add_argument("--num-fewshot", type=int, metavar="K", help="solved examples before each question, from the "
                        "task's training file beside its own, or else from the other questions (default 0; the "
                        "harness's tasks have their own)")
    parser.add_argument("--harness", action="store_true", help="lm-evaluation-harness also scores the tasks "
                        "that are built in here")
    parser.add_argument("--overlong", choices=OVERLONG, default="truncate", help="an example that is longer than the "
                        "model: score its last tokens and count it (default), leave it out and count it, or let its "
                        "task fail")
    parser.add_argument("--log-samples", action="store_true", help="write what each example adds to each metric, too, "
                        "for tools/compare_results.py (.json only)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N passages, articles or documents")
    parser.add_argument("--micro-batch-size", type=int, default=8, metavar="ROWS", help="rows per batch (default 8)")
    parser.add_argument(
        "--overlapping-eval", type=int, metavar="STRIDE",
        help="perplexities with overlapping windows that predict STRIDE tokens each; wikitext then reads its file as "
        "one stream, as Megatron-LM does. Default: windows without overlapping predictions, document by document",
    )
    args = parser.parse_args(argv)
    args.tasks = ",".join(args.tasks)
    check_at_least(args, 1, "limit", "micro_batch_size", "overlapping_eval", "tensor_model_parallel_size",
                   "pipeline_model_parallel_size")
    check_at_least(args, 0, "num_fewshot")
    check_bos(args)
    return args


def check_options(args: argparse.Namespace, plan: list[TaskRun]) -> None:
    """Check that options have an effect on the tasks.

    Raises:
        ConfigError: one has none on tasks of the harness.
    """
    theirs = ", ".join(run.name for run in plan if run.of_harness)
    if theirs and args.overlapping_eval is not None:
        raise ConfigError(f"--overlapping-eval has no effect with --harness, nor on {theirs}: tasks of the harness "
                          "split texts in their own way.")
    if theirs and args.overlong == "skip":
        raise ConfigError(f"--overlong = skip has no effect with --harness, nor on {theirs}: the harness scores every "
                          "example of a task; use truncate or error.")


def agree_on_inputs(problem: str | None, digests: dict[str, str]) -> None:
    """Check that all processes have read the same files, since rows are split over them.

    Args:
        problem: why this process could not read its files; None if it could.
        digests: those of the files it has read.

    Raises:
        DataError: on every process.
    """
    answers = gather_json({"problem": problem, "digests": digests})
    problems = {answer["problem"] for answer in answers} - {None}
    if problems:
        raise DataError("\n".join(sorted(problems)))
    differing = disagreements([answer["digests"] for answer in answers])
    if differing:
        raise DataError("The processes read different files under the same names; copy the same ones to every machine:"
                        "\n  " + "\n  ".join(differing))


def run(args: argparse.Namespace, console: Console) -> None:
    """Find the files, load the model, check that all processes read the same files, and score."""
    outputs = [Path(name) for name in args.output or ()]
    plan: list[TaskRun] = []
    tokenizer: Tokenizer | None = None
    problem = None
    try:
        folder = None if args.task_data is None else Path(args.task_data)
        plan = plan_listed(args.tasks, folder, args.num_fewshot, flag="--tasks", all_of_harness=args.harness)
        check_options(args, plan)
        for output in outputs if console.speaks else ():
            check_format(output)
            check_writable(output)
        problems = [item.problem for item in plan if item.problem is not None]
        if len(problems) == len(plan):
            raise problems[0]
    except UserError as error:
        if console.speaks:
            raise  # before a model is loaded, when the other processes cannot yet report to rank 0
        problem = str(error)
    scorer = build_scorer(
        args.load,
        step=args.ckpt_step,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        micro_batch_size=args.micro_batch_size,
    )
    try:
        tokenizer = checkpoint_tokenizer(scorer.tokenizer_config, scorer.manifest.config["model"]["vocab_size"], args)
    except UserError as error:
        problem = problem or str(error)
    digests = {item.name: item.sha256 for item in plan}
    agree_on_inputs(problem, digests | ({} if tokenizer is None else {"tokenizer": tokenizer.digest}))
    assert tokenizer is not None
    bos = first_token(scorer, tokenizer, args, console)
    options = EvalOptions(args.limit, args.overlapping_eval, console.speaks, args.num_fewshot or 0, bos, args.overlong,
                          args.log_samples)
    score(args.load, plan, scorer, tokenizer, options, outputs, console)


def score(
    load: str, plan: list[TaskRun], scorer: CheckpointScorer, tokenizer: Tokenizer, options: EvalOptions,
    outputs: list[Path], console: Console,
) -> None:
    """Score the tasks in turn, and write the results after each; one that fails leaves the others alone.

    Raises:
        UserError: the first task's that failed, at the end.
    """
    record: dict[str, Any] = {
        "model": model_record(load, scorer.manifest),
        "model_sha256": model_sha256(scorer.manifest),
        "tokenizer_digest": tokenizer.digest,
        "options": {"limit": options.limit, "overlapping_eval": options.stride, "num_fewshot": options.num_fewshot,
                    "bos_token_id": options.bos, "overlong": options.overlong, "log_samples": options.log_samples},
        "versions": software_versions(),
        "tasks": {},
        "failed": {},
    }
    # The first process reads what is done, for all.
    [done, *_] = gather_json({name: entry for output in outputs if console.speaks
                              for name, entry in finished_before(output, record).items()})
    results: dict[str, TaskResult] = {}
    failed: dict[str, UserError] = {}
    for item in plan:
        entries = {name: entry for name, entry in done.items()
                   if (entry["listed_as"], entry["file"], entry["sha256"]) == (item.name, str(item.path), item.sha256)}
        try:
            if item.problem is not None:
                raise item.problem
            found = ({name: result_of(entry) for name, entry in entries.items()}
                     or item.evaluate(scorer, tokenizer, options))
        except UserError as error:
            failed[item.name] = error
            record["failed"][item.name] = str(error)
            console.error(f"{item.name} failed: {type(error).__name__}: {error}")
            found = {}
        if entries:
            console.line(f"{item.name}: taken from {', '.join(map(str, outputs))}, where the same command wrote it")
        results |= found
        record["tasks"] |= {
            name: task_record(item.name, item.path, item.sha256, result, with_samples=options.log_samples)
            for name, result in found.items()}
        for output in outputs if console.speaks else ():
            write_results(output, record, results, failed)
    model = record["model"]
    console.line(
        f"\n{model['load']}, step {model['step']:,}: trained on {model['consumed_tokens']:,} tokens, "
        f"{model['consumed_layer_tokens']:,} layer tokens\n\n{markdown_table(results, failed)}"
    )
    if outputs:
        console.line(f"\nwritten to {', '.join(map(str, outputs))}")
    if failed:
        kind = type(next(iter(failed.values())))
        raise kind(f"{len(failed)} of {len(plan)} tasks failed: {', '.join(failed)}. Repair what is said above; with "
                   "--output FILE.json the same command then runs only these.")


def main(argv: list[str]) -> int:
    return exit_code_of_all(lambda console: run(parse_args(argv), console))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
