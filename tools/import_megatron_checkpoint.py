"""Imports the weights of a classic Megatron-LM checkpoint, mp_rank_XX[_YYY]/model_optim_rng.pt.

    python tools/import_megatron_checkpoint.py --from-megatron old/iter_0001000 --output imported --vocab-size 50257

TRUST: these files are Python pickles. They are opened with torch's restricted unpickler (weights_only), which builds
tensors, plain containers and the settings' argparse.Namespace, and rejects everything else: no code in the file is run,
as far as the unpickler can be trusted. Import only files whose origin you know. This is the only command of the project
that opens pickles; its output is safetensors.

Supported are GPT and BERT of Megatron-LM before megatron.core, any tensor- and pipeline-parallel size, and the three
orders of query/key/value rows. Optimizer state is not read. Train the checkpoint further with --load DIR --finetune
--use-checkpoint-args and a tokenizer.
"""

import argparse
import pickle
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

import torch

from megatron_ltd.checkpoint.convert.megatron.importing import import_model
from megatron_ltd.errors import CheckpointError, ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train.state import TrainState
from tools.command_line import add_output, exit_code_of, parser_of


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--from-megatron", required=True, metavar="DIR", help="folder of one iteration")
    add_output(parser, "--save", required=True, metavar="DIR", help="new folder for the checkpoint")
    parser.add_argument("--vocab-size", type=int, metavar="N",
                        help="size of the tokenizer, if the files hold only the padded size")
    args = parser.parse_args(argv)
    if args.vocab_size is not None and args.vocab_size < 1:
        raise ConfigError(f"--vocab-size = {args.vocab_size} must be at least 1.")
    return args


def read(path: Path) -> Any:
    """Open one file with the restricted unpickler; tensors are memory-mapped rather than read.

    Raises:
        CheckpointError: the file is damaged, or holds objects that the unpickler rejects.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be opened without trusting it: {str(error).splitlines()[0]}. Only tensors, containers and "
            "an argparse.Namespace of plain values are read; save the file again without other objects in its args.",
        ) from error
    if not isinstance(state, dict) or not {"args", "model"} & state.keys():
        raise CheckpointError(f"{path} is no checkpoint of Megatron-LM: it has no args and no model.")
    return state


def run(args: argparse.Namespace) -> None:
    path, config = import_model(Path(args.from_megatron), read, Path(args.output), TrainState().counters(),
                                vocab_size=args.vocab_size)
    model = config.model
    Console().line(f"wrote {path}: {model.family}, {model.num_layers} layers x {model.hidden_size}, vocabulary "
                   f"{model.vocab_size}; train on it with --load {args.output} --finetune --use-checkpoint-args")


def main(argv: list[str]) -> int:
    return exit_code_of(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
