"""What the tools that run the model of a checkpoint share: flags, the tokenizer, and one message for all processes."""

import argparse
import dataclasses
from collections.abc import Callable

from megatron_ltd.checkpoint.saved_settings import TOKENIZER_SETTINGS
from megatron_ltd.config import DataConfig
from megatron_ltd.data.text.tokenizer import Tokenizer, tokenizer_of_model
from megatron_ltd.errors import ConfigError
from megatron_ltd.log import Console
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from tools.command_line import exit_code_of


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the checkpoint, its parallel layout and its tokenizer."""
    parser.add_argument("--load", required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--ckpt-step", type=int, metavar="STEP", help="this step rather than the newest")
    parser.add_argument("--bos-token-id", type=int, metavar="ID", help="token with which every text begins, for models "
                        "that were trained so (Llama, Mistral); default: none")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP",
                        help="processes that share each layer (default: 1)")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="PP",
                        help="processes that share the stack of layers (default: 1)")
    moved = parser.add_argument_group("tokenizer", "in place of what the manifest says, for files that have moved")
    for name in TOKENIZER_SETTINGS:
        moved.add_argument(f"--{name.replace('_', '-')}", help="in place of the recorded one")


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Check the flags of these names that are given.

    Raises:
        ConfigError: one of them is smaller.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} = {value} must be at least {least}.")


def checkpoint_tokenizer(recorded: DataConfig, vocab_size: int | None, args: argparse.Namespace) -> Tokenizer:
    """The checkpoint's tokenizer, from the files given as flags where there are any.

    Raises:
        ConfigError: --bos-token-id is not in the model's vocabulary.
        DataError: the tokenizer cannot be read, or is not the model's.
    """
    if args.bos_token_id is not None and vocab_size is not None and not 0 <= args.bos_token_id < vocab_size:
        raise ConfigError(f"--bos-token-id = {args.bos_token_id} must be from 0 to {vocab_size - 1}.")
    given = {name: getattr(args, name) for name in TOKENIZER_SETTINGS if getattr(args, name) is not None}
    return tokenizer_of_model(dataclasses.replace(recorded, **given), vocab_size)


def exit_code_of_all(run: Callable[[Console], None]) -> int:
    """`exit_code_of` for a program of several processes, of which the first prints."""
    speaker = Console()

    def run_here() -> None:
        speaker.speaks = Launch.from_environment().rank == 0
        run(speaker)

    try:
        return exit_code_of(run_here, speaker)
    finally:
        launch.stop()
