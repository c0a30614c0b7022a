"""Write a real English corpus that needs no download: the prose in the documentation of installed Python code.

Sources are the language reference that ships with Python (`pydoc_data.topics`) and the docstrings of the standard
library, PyTorch, NumPy, SymPy and NetworkX (PyTorch installs the last two). A document is one topic or one
module; code, tables, signatures and repeated paragraphs are left out. The same packages give the same files, byte
for byte.

    python examples/make_corpus.py --output corpus          # corpus/train.jsonl, corpus/heldout.jsonl
"""

import argparse
import ast
import hashlib
import inspect
import json
import multiprocessing
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

PACKAGES = ("torch", "numpy", "sympy", "networkx")
HELD_OUT_PERCENT = 5
SMALLEST_DOCUMENT_WORDS = 60
SMALLEST_PARAGRAPH_WORDS = 10

ROLE = re.compile(r":[a-z:+-]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`")
"""A reStructuredText role such as :class:`~torch.Tensor`; a reader sees only its target."""
HEADING = re.compile(r"^([A-Z][A-Za-z ]+)\n[-=~]{3,}\n?")
NOT_PROSE = {"Parameters", "Other Parameters", "Returns", "Yields", "Raises", "Attributes", "See Also", "References"}
SENTENCE = re.compile(r"[A-Z\"'(*].*[.!?:]\)?$", re.DOTALL)
ORDINARY = re.compile(r"[A-Za-z ,.;:'\"()\-]")


@dataclass(frozen=True)
class Document:
    """One topic or one module."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the name alone, so that a document never moves between the two files."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def prose(text: str, seen: set[str]) -> str:
    """The paragraphs of `text` that read as English sentences and have not occurred before, one per line."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        heading = HEADING.match(block)
        if heading and heading[1] in NOT_PROSE:
            continue
        block = HEADING.sub("", block)
        if ">>>" in block or "::" in block.rstrip()[:-2] or block.startswith(("    ", "\t")):
            continue
        paragraph = re.sub(r"[`*]+", "", ROLE.sub(r"\1", " ".join(block.split())))
        if paragraph.endswith("::"):
            paragraph = paragraph[:-1]
        words = paragraph.split()
        if len(words) < SMALLEST_PARAGRAPH_WORDS or not SENTENCE.match(paragraph) or paragraph in seen:
            continue
        if len(ORDINARY.findall(paragraph)) < 0.95 * len(paragraph):
            continue
        seen.add(paragraph)
        kept.append(paragraph)
    return "\n\n".join(kept)


def docstrings(path: Path) -> str:
    """All docstrings of a module in source order; none if the file is not a module."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""  # a template, or a test of other encodings
    nodes = [node for node in ast.walk(tree)
             if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def sources() -> Iterator[tuple[str, Path]]:
    """(name, file) of every module whose docstrings go into the corpus, in a fixed order."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    installed = Path(sysconfig.get_path("purelib"))
    for top, folders in ((standard_library, [standard_library]), (installed, [installed / p for p in PACKAGES])):
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                name = path.relative_to(top)
                if not {"site-packages", "dist-packages", "test", "tests"} & set(name.parts):
                    yield name.as_posix(), path


def documents() -> Iterator[Document]:
    """Every document of the corpus."""
    seen: set[str] = set()
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topics/{topic}", prose(inspect.cleandoc(text), seen))
    names, paths = zip(*sources(), strict=True)
    with multiprocessing.Pool() as pool:
        found = pool.imap(docstrings, paths, chunksize=16)
        for name, text in tqdm(zip(names, found, strict=True), total=len(names), unit="module", disable=None):
            yield Document(name, prose(text, seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "--output-dir", type=Path, required=True,
                        help="folder for train.jsonl and heldout.jsonl")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "heldout": []}
    words = dict.fromkeys(lines, 0)
    for document in documents():
        count = len(document.text.split())
        if count >= SMALLEST_DOCUMENT_WORDS:
            part = "heldout" if document.held_out else "train"
            lines[part].append(json.dumps({"id": document.name, "text": document.text}))
            words[part] += count
    for part, rows in lines.items():
        rows.sort(key=lambda row: hashlib.sha256(row.encode()).hexdigest())  # topics and packages mixed
        path = folder / f"{part}.jsonl"
        path.write_text("\n".join(rows) + "\n")
        print(f"{path}: {len(rows):,} documents, {words[part]:,} words, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
