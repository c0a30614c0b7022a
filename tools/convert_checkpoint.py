"""Converts models between Hugging Face folders and our checkpoints: GPT-2, Llama, Mistral, Qwen2, MegatronBert, ViT.

    python tools/convert_checkpoint.py --from-hf Llama-3.2-1B --save checkpoints/llama
    python tools/convert_checkpoint.py --load checkpoints/350m --to-hf exported/350m --dtype bf16

An imported checkpoint holds weights only; train it further with `--load DIR --finetune --use-checkpoint-args`, or score
it. An exported folder loads directly with `AutoModelForCausalLM.from_pretrained`. Only safetensors are read, code that
ships with a model is never run, and only one tensor is in memory at a time. Checkpoints of any parallel layout work.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.checkpoint.convert.huggingface.exporting import SHARD_BYTES, Source, export_model
from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.config import DataConfig, RunConfig
from megatron_ltd.data.text.tokenizer import tokenizer_of_model
from megatron_ltd.errors import ConfigError, UserError
from megatron_ltd.log import Console
from megatron_ltd.train.state import TrainState
from tools.command_line import exit_code_of, parser_of

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TOKENIZER_SETTINGS = ("tokenizer_model", "vocab_file", "merge_file")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--from-hf", metavar="DIR", help="folder of a Hugging Face model, with --save")
    parser.add_argument("--save", metavar="DIR", help="new folder for the checkpoint")
    parser.add_argument("--seq-length", type=int, metavar="TOKENS",
                        help="with --from-hf: sequence length for training; default: all of the model's positions")
    parser.add_argument("--load", metavar="DIR", help="folder of checkpoints, with --to-hf")
    parser.add_argument("--ckpt-step", type=int, metavar="STEP", help="this step rather than the newest")
    parser.add_argument("--to-hf", metavar="DIR", help="new folder for the Hugging Face model")
    parser.add_argument("--dtype", choices=DTYPES, help="with --to-hf: precision of the weights; default: fp32, "
                        "or the one an imported model came in")
    parser.add_argument("--max-shard-bytes", type=int, default=SHARD_BYTES, metavar="BYTES",
                        help="with --to-hf: largest file (default 5 GiB)")
    for name in TOKENIZER_SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="FILE",
                            help="with --to-hf: use this instead of the recorded file, if it has moved")
    args = parser.parse_args(argv)
    reads, writes = (args.from_hf, args.save), (args.load, args.to_hf)
    if all(reads) and not any(writes) or all(writes) and not any(reads):
        return args
    raise ConfigError("Give --from-hf DIR --save DIR to read a Hugging Face model, or --load DIR --to-hf DIR to write "
                      "one.")


def read_model(args: argparse.Namespace, console: Console) -> None:
    path, config = import_model(Path(args.from_hf), Path(args.save), TrainState().counters(),
                                seq_length=args.seq_length)
    reads = "images" if config.model.family == "vit" else f"vocabulary {config.model.vocab_size}"
    if config.model.family == "vit":
        console.line(f"images of {config.model.img_h} x {config.model.img_w}, {config.model.num_classes} classes")
    elif config.data.tokenizer_type is None:
        console.warn(f"{args.from_hf} has no tokenizer files; name the tokenizer (--tokenizer-type and its files) when "
                     "you use the checkpoint")
    else:
        tell_tokenizer(config, console)
    console.line(f"wrote {path}: {config.model.num_layers} layers x {config.model.hidden_size}, {reads}; "
                 f"train on it with --load {args.save} --finetune --use-checkpoint-args")


def tell_tokenizer(config: RunConfig, console: Console) -> None:
    """Report the tokenizer that came with the model; the weights are imported even if it cannot be used here."""
    try:
        tokenizer = tokenizer_of_model(config.data, config.model.vocab_size)
    except UserError as error:
        console.warn(f"the model's tokenizer cannot be used here; name another when you use the checkpoint: {error}")
        return
    console.line(f"tokenizer: {config.data.tokenizer_type}, {tokenizer.vocab_size} ids")


def write_model(args: argparse.Namespace, console: Console) -> None:
    if args.max_shard_bytes < 1:
        raise ConfigError(f"--max-shard-bytes = {args.max_shard_bytes} must be at least 1.")
    path = find_checkpoint(Path(args.load), args.ckpt_step, console)
    config = saved_config(read_manifest(path), path)
    given = {name: getattr(args, name) for name in TOKENIZER_SETTINGS if getattr(args, name) is not None}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **given))
    eod = end_of_document(config.data, config.model.vocab_size, console)
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    carried = export_model(Source(path, config, dtype, eod, args.max_shard_bytes), Path(args.to_hf))
    files = ", ".join(carried) if carried else "none; from_pretrained opens the model without them"
    console.line(f"wrote {args.to_hf} from {path}; tokenizer files: {files}")


def end_of_document(settings: DataConfig, vocab_size: int | None, console: Console) -> tuple[int, str] | None:
    """Id and text of the end-of-document token, for the generation settings; None without a tokenizer."""
    if settings.tokenizer_type in (None, "NullTokenizer"):
        return None
    try:
        tokenizer = tokenizer_of_model(settings, vocab_size)
    except UserError as error:
        console.warn(f"the model is written without a tokenizer: {error}")
        return None
    return tokenizer.eod, tokenizer.decode([tokenizer.eod])


def run(args: argparse.Namespace) -> None:
    console = Console()
    if args.from_hf is not None:
        read_model(args, console)
    else:
        write_model(args, console)


def main(argv: list[str]) -> int:
    return exit_code_of(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
