"""What the tools that run the model of a checkpoint share: flags, the tokenizer, and one message for all processes."""

import argparse
import dataclasses
from collections.abc import Callable

from megatron_ltd.checkpoint.saved_settings import TOKENIZER_SETTINGS
from megatron_ltd.config.files import DataConfig
from megatron_ltd.data.text.other_tokens import other_tokens
from megatron_ltd.data.text.tokenizer import Tokenizer, tokenizer_of_model
from megatron_ltd.errors import ConfigError, flag_name
from megatron_ltd.lm_eval.bos import choose_bos
from megatron_ltd.lm_eval.scorer import CheckpointScorer
from megatron_ltd.log import Console
from megatron_ltd.train.process import launch
from megatron_ltd.train.process.environment import Launch
from megatron_ltd.train.state import TrainState
from tools.commands.command_line import exit_code_of


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the checkpoint, its parallel layout and its tokenizer."""
    parser.add_argument("--load", required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--ckpt-step", type=int, metavar="STEP", help="this step rather than the newest")
    parser.add_argument("--bos-token-id", type=int, metavar="ID", help="token with which every text begins; default: "
                        "that of the training run, or what the tokenizer's files say of an imported model")
    parser.add_argument("--no-bos", action="store_true", help="no token at the beginning of texts, though the model's "
                        "tokenizer files say to add one")
    parser.add_argument("--tokenizer-control-symbols", action="store_true", help="read the names of a SentencePiece "
                        "model's control symbols in texts, such as <s>, as these symbols")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP",
                        help="processes that share each layer (default: 1)")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="PP",
                        help="processes that share the stack of layers (default: 1)")
    moved = parser.add_argument_group("tokenizer", "in place of what the manifest says, for files that have moved")
    for name in TOKENIZER_SETTINGS:
        moved.add_argument(flag_name(name), help="in place of the recorded one")


def check_bos(args: argparse.Namespace) -> None:
    """Raises:
        ConfigError: the flags say two things of the beginning of texts.
    """
    check_at_least(args, 0, "bos_token_id")
    if args.no_bos and args.bos_token_id is not None:
        raise ConfigError(f"--no-bos contradicts --bos-token-id = {args.bos_token_id}; leave one out.")


def first_token(scorer: CheckpointScorer, tokenizer: Tokenizer, args: argparse.Namespace,
                console: Console) -> int | None:
    """The token that every text begins with, which is told; so are tokens that are not the model's."""
    trained_here = TrainState.from_counters(scorer.manifest.counters).consumed.tokens > 0
    bos, told = choose_bos(tokenizer, args.bos_token_id, args.no_bos, trained_here, scorer.tokenizer_config.bos_token)
    if told is not None:
        console.line(told)
    named = any(getattr(args, name) is not None for name in TOKENIZER_SETTINGS)
    other = other_tokens(tokenizer, scorer.tokenizer_config) if named else None
    if other is not None:
        console.warn(other)
    return bos


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Check the flags of these names that are given.

    Raises:
        ConfigError: one of them is smaller.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{flag_name(name)} = {value} must be at least {least}.")


def checkpoint_tokenizer(recorded: DataConfig, vocab_size: int | None, args: argparse.Namespace) -> Tokenizer:
    """The checkpoint's tokenizer, from the files given as flags where there are any.

    Raises:
        ConfigError: --bos-token-id is not in the model's vocabulary.
        DataError: the tokenizer cannot be read, or is not the model's.
    """
    if args.bos_token_id is not None and vocab_size is not None and not 0 <= args.bos_token_id < vocab_size:
        raise ConfigError(f"--bos-token-id = {args.bos_token_id} must be from 0 to {vocab_size - 1}.")
    given = {name: getattr(args, name) for name in TOKENIZER_SETTINGS if getattr(args, name) is not None}
    symbols = recorded.tokenizer_control_symbols or args.tokenizer_control_symbols
    return tokenizer_of_model(dataclasses.replace(recorded, **given, tokenizer_control_symbols=symbols), vocab_size)


def exit_code_of_all(run: Callable[[Console], None]) -> int:
    """`exit_code_of` for a program of several processes, of which the first prints."""
    speaker = Console()

    def run_here() -> None:
        speaker.speaks = Launch.from_environment().rank == 0
        run(speaker)

    failed = True
    try:
        code = exit_code_of(run_here, speaker)
        failed = code != 0
        return code
    finally:
        launch.stop(failed=failed)
