"""Let a checkpoint go on with a text: enough to look at a model. To serve one, export it (tools/convert_checkpoint.py).

    python tools/generate.py --load checkpoints/350m --prompt "Once upon a time" --max-new-tokens 100
    torchrun --nproc-per-node 4 tools/generate.py --load checkpoints/350m --prompt "The cat" "The dog" \\
        --temperature 0.8 --top-p 0.95 --seed 7 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Without --temperature each token is the most probable one. Several prompts are continued together. What is generated
does not depend on the layout, beyond rounding.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.data.text.tokenizer import tokenizer_of_model
from megatron_ltd.errors import ConfigError, UserError
from megatron_ltd.eval.decode import Sampling
from megatron_ltd.eval.scorer import build_scorer
from megatron_ltd.log import Console
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.launch import Launch
from tools.command_line import parser_of

TOKENIZER_SETTINGS = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--load", required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--ckpt-step", type=int, metavar="STEP", help="this step rather than the newest")
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="texts to go on with")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                        help="tokens for each, unless its document ends before (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="default 0: the most probable token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the most probable tokens that together have probability P")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (default 1234)")
    parser.add_argument("--bos-token-id", type=int, metavar="ID", help="token with which every text begins, for models "
                        "that were trained so (Llama, Mistral); default: none")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="PP")
    moved = parser.add_argument_group("tokenizer", "in place of what the manifest says, for files that have moved")
    for name in TOKENIZER_SETTINGS:
        moved.add_argument(f"--{name.replace('_', '-')}")
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} = {getattr(args, name)} must be at least 1.")
    return args


def run(args: argparse.Namespace, console: Console) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    world_size = Launch.from_environment().world_size
    if world_size != tp * pp:
        raise ConfigError(f"{world_size} processes for --tensor-model-parallel-size = {tp} x "
                          f"--pipeline-model-parallel-size = {pp}; start exactly {tp * pp}.")
    scorer = build_scorer(args.load, step=args.ckpt_step, tensor_parallel=tp, pipeline_parallel=pp,
                          micro_batch_size=len(args.prompt))
    given = {name: getattr(args, name) for name in TOKENIZER_SETTINGS if getattr(args, name) is not None}
    vocab_size = scorer.config.model.vocab_size
    tokenizer = tokenizer_of_model(dataclasses.replace(scorer.tokenizer_config, **given), vocab_size)
    first = [] if args.bos_token_id is None else [args.bos_token_id]
    if vocab_size is not None and first and not 0 <= first[0] < vocab_size:
        raise ConfigError(f"--bos-token-id = {first[0]} must be from 0 to {vocab_size - 1}.")
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    texts = [first + prompt for prompt in prompts]
    answers = scorer.decoder.generate(texts, args.max_new_tokens, sampling, eod=tokenizer.eod)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        console.line(("\n" if number else "") + tokenizer.decode(prompt + answer))


def main(argv: list[str]) -> int:
    console = Console()
    try:
        console = Console(Launch.from_environment().rank == 0)
        run(parse_args(argv), console)
    except UserError as error:
        console.error(f"{type(error).__name__}: {error}")
        return error.exit_code
    finally:
        launch.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
