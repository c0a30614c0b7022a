"""Finetune an exported BERT on a pair task of GLUE or SuperGLUE in `transformers`, in plain PyTorch.

    python examples/finetune_glue.py --model exported/bert --train rte/train.jsonl --valid rte/val.jsonl

Lines have `premise` (or `sentence1`), `hypothesis` (or `sentence2`) and `label`. `--from-scratch` starts from random
weights of the same shape, as a baseline for the pretrained ones. Needs transformers.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizerFast, MegatronBertConfig, MegatronBertForSequenceClassification


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what tools/convert_checkpoint.py wrote")
    parser.add_argument("--from-scratch", action="store_true", help="random weights in the shape of --model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only the first so many pairs of each file, for a trial")
    parser.add_argument("--cased", action="store_true", help="the vocabulary has upper case (BertWordPieceCase)")
    for name, kind, default in (("epochs", int, 3), ("batch-size", int, 16), ("lr", float, 5e-5), ("seed", int, 1234),
                                ("max-length", int, 128)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def pair(item: dict[str, Any]) -> tuple[str, str]:
    return item.get("premise", item.get("sentence1")), item.get("hypothesis", item.get("sentence2"))


def batches(items: list[dict[str, Any]], size: int, tokenizer: Any, labels: dict[str, int], length: int) -> Any:
    for start in range(0, len(items), size):
        chosen = items[start:start + size]
        first, second = zip(*map(pair, chosen), strict=True)
        encoded = tokenizer(list(first), list(second), truncation=True, max_length=length, padding=True,
                            return_tensors="pt")
        yield encoded, torch.tensor([labels[str(item["label"])] for item in chosen])


@torch.no_grad()
def accuracy(model: Any, data: Any) -> float:
    model.eval()
    hits = [(model(**encoded).logits.argmax(-1) == label).float() for encoded, label in data]
    return float(torch.cat(hits).mean())


def main() -> int:
    args = parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    train, valid = read(args.train)[:args.limit], read(args.valid)[:args.limit]
    labels = {name: number for number, name in enumerate(sorted({str(item["label"]) for item in train}))}
    tokenizer = BertTokenizerFast(vocab_file=str(args.model / "vocab.txt"), do_lower_case=not args.cased)
    config = MegatronBertConfig.from_pretrained(args.model, num_labels=len(labels))
    length = min(args.max_length, config.max_position_embeddings)
    model = MegatronBertForSequenceClassification(config) if args.from_scratch else \
        MegatronBertForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    steps = args.epochs * -(-len(train) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)) * max(0.0, 1.0 - step / steps))
    for epoch in range(args.epochs):
        random.shuffle(train)
        model.train()
        total = 0.0
        for encoded, label in batches(train, args.batch_size, tokenizer, labels, length):
            loss = model(**encoded, labels=label).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(label)
        found = accuracy(model, batches(valid, args.batch_size, tokenizer, labels, length))
        print(f"epoch {epoch + 1}/{args.epochs}: training loss {total / len(train):.4f}, validation accuracy "
              f"{found:.4f} on {len(valid)} pairs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
