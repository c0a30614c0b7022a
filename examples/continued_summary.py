"""Open a continued model with `transformers`, and compare its scores with those from before.

    python examples/continued_summary.py --model run/hf --before run/before.json --after run/after.json \\
        --text run/text.heldout.jsonl
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def scores(path: Path) -> dict[str, float]:
    """Bits per byte of each text of an evaluation."""
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return {Path(task["file"]).name.partition(".")[0]: task["metrics"]["bits_per_byte"]["value"]
            for task in tasks.values()}


def table(before: dict[str, float], after: dict[str, float]) -> str:
    rows = [f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" for name in after]
    return "\n".join(["| held-out text, bits per byte | before | after |", "|---|--:|--:|", *rows])


@torch.no_grad()
def opened(folder: Path, text: str) -> str:
    """What `transformers` makes of the model: its loss on a text, and how it goes on."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :model.config.max_position_embeddings]
    loss = float(model(ids, labels=ids).loss)
    prompt = ids[:, :min(ids.shape[1], 16)]
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16,
                            pad_token_id=tokenizer.eos_token_id)
    return (f"transformers opens {folder}: loss {loss:.4f} on a held-out text; "
            f"{tokenizer.decode(prompt[0])!r} goes on {tokenizer.decode(answer[0, prompt.shape[1]:])!r}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "before", "after", "text"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(argv)
    first = json.loads(args.text.read_text(encoding="utf-8").partition("\n")[0])["text"]
    print(opened(args.model, first))
    print(table(scores(args.before), scores(args.after)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
