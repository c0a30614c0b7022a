"""Converts models between Hugging Face folders and our checkpoints: GPT-2, Llama, Mistral, Qwen2, Qwen3, OLMo 2,
SmolLM3, BLOOM, MegatronBert, ViT.

    python tools/convert_checkpoint.py --from-hf Llama-3.2-1B --dry-run
    python tools/convert_checkpoint.py --from-hf Llama-3.2-1B --output checkpoints/llama
    python tools/convert_checkpoint.py --load checkpoints/350m --output exported/350m --dtype bf16

--dry-run reads config.json alone and prints the model's settings, its size, or what is unsupported. An imported
checkpoint holds weights only; train it further with `--load DIR --finetune --use-checkpoint-args`, or score
it. An exported folder loads directly with `AutoModelForCausalLM.from_pretrained`. Only safetensors are read, code that
ships with a model is never run, and only one tensor is in memory at a time. Checkpoints of any parallel layout work.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from megatron_ltd.checkpoint.convert.huggingface.config import model_config, unread_entries
from megatron_ltd.checkpoint.convert.huggingface.exporting import SHARD_BYTES, Source, export_model
from megatron_ltd.checkpoint.convert.huggingface.folder import CONFIG_NAME, read_json
from megatron_ltd.checkpoint.convert.huggingface.importing import import_model
from megatron_ltd.checkpoint.layout import find_checkpoint
from megatron_ltd.checkpoint.manifest import read_manifest
from megatron_ltd.checkpoint.saved_settings import saved_config
from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.data.text.tokenizer import Tokenizer, tokenizer_of_model
from megatron_ltd.errors import CheckpointError, ConfigError, UserError, flag_name
from megatron_ltd.log import Console
from megatron_ltd.model.arithmetic.shapes import parameter_count
from megatron_ltd.train.state import TrainState
from tools.commands.command_line import add_output, exit_code_of, parser_of
from tools.commands.run_flags import flags_of

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TOKENIZER_SETTINGS = ("tokenizer_model", "vocab_file", "merge_file")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--from-hf", metavar="DIR", help="folder of a Hugging Face model to read")
    parser.add_argument("--dry-run", action="store_true",
                        help="with --from-hf: read config.json alone, and print settings and size")
    parser.add_argument("--seq-length", type=int, metavar="TOKENS",
                        help="with --from-hf: sequence length for training; default: all of the model's positions")
    parser.add_argument("--load", metavar="DIR", help="folder of checkpoints to export")
    parser.add_argument("--ckpt-step", type=int, metavar="STEP", help="this step rather than the newest")
    add_output(parser, metavar="DIR", help="new folder: with --from-hf for the checkpoint, with --load for the Hugging "
               "Face model")
    parser.add_argument("--save", metavar="DIR", help="another name of --output, with --from-hf")
    parser.add_argument("--to-hf", metavar="DIR", help="another name of --output, with --load")
    parser.add_argument("--dtype", choices=DTYPES, help="with --load: precision of the weights; default: fp32, "
                        "or the one an imported model came in")
    parser.add_argument("--max-shard-bytes", type=int, default=SHARD_BYTES, metavar="BYTES",
                        help="with --load: largest file (default 5 GiB)")
    for name in TOKENIZER_SETTINGS:
        parser.add_argument(flag_name(name), metavar="FILE",
                            help="with --load: use this instead of the recorded file, if it has moved")
    parser.add_argument("--no-tokenizer", action="store_true", help="with --load: write the model alone")
    args = parser.parse_args(argv)
    if args.output is not None:
        setattr(args, "save" if args.load is None else "to_hf", args.output)
    reads, writes = (args.from_hf, args.save or args.dry_run), (args.load, args.to_hf)
    if all(reads) and not any(writes) or all(writes) and not any(reads):
        return args
    raise ConfigError("Give --from-hf DIR --output DIR to read a Hugging Face model, --from-hf DIR --dry-run to see "
                      "whether it can be read, or --load DIR --output DIR to write one.")


def describe_model(folder: Path, console: Console) -> None:
    """What a config.json comes to here."""
    path = folder / CONFIG_NAME if folder.is_dir() else folder
    if not path.is_file():
        raise CheckpointError(f"--from-hf = {folder}: there is no file {path}. Name the folder of a Hugging Face "
                              "model, or its config.json.")
    described = read_json(path)
    model = model_config(described, path)
    tell_unread(described, path, console)
    console.line(f"{path}: model_type {described['model_type']}, {parameter_count(model):,} parameters")
    console.line(" ".join(flags_of(RunConfig(model=model), ("model",))))


def tell_unread(described: Mapping[str, Any], path: Path, console: Console) -> None:
    """Name the entries that cannot change what the model computes."""
    if unread := unread_entries(described, path):
        console.line(f"{path} has entries that no class of {described['model_type']} reads, so they change nothing: "
                     f"{', '.join(unread)}")


def read_model(args: argparse.Namespace, console: Console) -> None:
    path, config = import_model(Path(args.from_hf), Path(args.save), TrainState().counters(),
                                seq_length=args.seq_length)
    tell_unread(read_json(Path(args.from_hf) / CONFIG_NAME), Path(args.from_hf) / CONFIG_NAME, console)
    reads = "images" if config.model.family == "vit" else f"vocabulary {config.model.vocab_size}"
    if config.model.family == "vit":
        console.line(f"images of {config.model.img_h} x {config.model.img_w}, {config.model.num_classes} classes")
    elif config.data.tokenizer_type is None:
        console.warn(f"{args.from_hf} has no tokenizer that can be read; name one (--tokenizer-type and its files) "
                     "when you use the checkpoint")
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
    data = DataConfig() if args.no_tokenizer else dataclasses.replace(config.data, **given)
    config = dataclasses.replace(config, data=data)
    tokenizer = tokenizer_to_export(config.data, config.model.vocab_size, console)
    eod = None if tokenizer is None else (tokenizer.eod, tokenizer.decode([tokenizer.eod]))
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    carried = export_model(Source(path, config, dtype, eod, args.max_shard_bytes, tokenizer), Path(args.to_hf))
    files = ", ".join(carried) if carried else "none; from_pretrained opens the model without them"
    console.line(f"wrote {args.to_hf} from {path}; tokenizer files: {files}")


def tokenizer_to_export(settings: DataConfig, vocab_size: int | None, console: Console) -> Tokenizer | None:
    """The tokenizer of the checkpoint; None without one, or if it is not there."""
    if settings.tokenizer_type in (None, "NullTokenizer"):
        return None
    try:
        return tokenizer_of_model(settings, vocab_size)
    except UserError as error:
        console.warn(f"the model is written without a tokenizer: {error}")
        return None


def run(args: argparse.Namespace) -> None:
    console = Console()
    if args.from_hf is not None and args.dry_run:
        describe_model(Path(args.from_hf), console)
    elif args.from_hf is not None:
        read_model(args, console)
    else:
        write_model(args, console)


def main(argv: list[str]) -> int:
    return exit_code_of(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
