"""Continue prompts with a checkpoint: enough to look at a model. To serve one, export it (tools/convert_checkpoint.py).

    python tools/generate.py --load checkpoints/350m --prompt "Once upon a time" --max-new-tokens 100
    torchrun --nproc-per-node 4 tools/generate.py --load checkpoints/350m --prompt "The cat" "The dog" \\
        --temperature 0.8 --top-p 0.95 --seed 7 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

Without --temperature each token is the most probable one. Several prompts are continued together. The output does not
depend on the layout, beyond rounding.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.errors import ConfigError
from megatron_ltd.lm_eval.decode import Sampling
from megatron_ltd.lm_eval.rows import RowEncoder
from megatron_ltd.lm_eval.scorer import build_scorer
from megatron_ltd.log import Console
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.process.exits import leave
from tools.commands.checkpoint_model import (
    add_checkpoint_flags,
    check_at_least,
    check_bos,
    checkpoint_tokenizer,
    exit_code_of_all,
    first_token,
)
from tools.commands.command_line import parser_of


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                        help="new tokens per prompt, unless the document ends earlier (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="default 0: the most probable token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the most probable tokens that together have probability P")
    parser.add_argument("--seed", type=int, default=1234, help="seed for sampling (default 1234)")
    args = parser.parse_args(argv)
    check_bos(args)
    check_at_least(args, 1, "max_new_tokens", "tensor_model_parallel_size", "pipeline_model_parallel_size")
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
    tokenizer = checkpoint_tokenizer(scorer.tokenizer_config, scorer.config.model.vocab_size, args)
    bos = first_token(scorer, tokenizer, args, console)
    if tokenizer.remark is not None:
        console.line(tokenizer.remark)
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    texts = [RowEncoder(tokenizer, scorer.max_length, bos).prompt(prompt) for prompt in args.prompt]
    answers = scorer.decoder.generate(texts, args.max_new_tokens, sampling, eod=tokenizer.eod)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        console.line(("\n" if number else "") + tokenizer.decode(prompt + answer))


def main(argv: list[str]) -> int:
    return exit_code_of_all(lambda console: run(parse_args(argv), console))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
