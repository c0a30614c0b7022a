#!/usr/bin/env python3
"""Write docs/flags.md from the settings and the tables of foreign flags.

    python tools/generate_flag_docs.py            writes the page
    python tools/generate_flag_docs.py --check    exits with 1 if the page is not up to date
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ltd.settings.flag_reference import Flag, all_flags, section_classes  # noqa: E402
from megatron_ltd.settings.foreign.flags_without_effect import NO_EFFECT  # noqa: E402
from megatron_ltd.settings.foreign.translated_flags import TRANSLATED  # noqa: E402
from megatron_ltd.settings.foreign.unsupported_flags import FAMILIES, SATISFIED, UNSUPPORTED  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"

OPENING = """# Flags

Generated from `megatron_ltd/config.py` by `tools/generate_flag_docs.py`; edit the texts there.

Every setting is a flag of `python -m megatron_ltd.pretrain_gpt`, and a key of the TOML file given by `--config`, flat
or under the name of its section, with underscores in place of dashes:

    seq_length = 2048

    [parallel]
    tensor_model_parallel_size = 4
    sequence_parallel = true

Flags override the file, and the file overrides the defaults. `--deepspeed-config FILE.json` (also `--deepspeed_config`)
takes the block `random_ltd` of a DeepSpeed file, below both; nothing else of it is read. A switch that the file turns
on is turned off by `--no-<name>`. Of a flag that is given twice the last counts. Flags are written out in full. All
problems with the settings are reported at once, before any process group exists; the exit code is then 20.
"""

FOREIGN = """
## Megatron flags that are not supported

Megatron-LM's and Megatron-DeepSpeed's scripts may pass these; the answer says what to do instead. Values in brackets
ask for what happens here anyway, and are accepted.

| flag | instead |
|---|---|
"""

AS_OTHERS = """
## Megatron flags that are taken as another

| flag | taken as |
|---|---|
"""

WITHOUT_EFFECT = """
## Megatron flags that are accepted and have no effect

They are named once at the start of a run, with the reason.

| flags | reason |
|---|---|
"""


def flags_page() -> str:
    """The whole page."""
    parts = [OPENING]
    for section, kind in section_classes().items():
        parts.append(f"\n## [{section}]\n\n{' '.join((kind.__doc__ or '').split())}\n\n"
                     "| flag | default | meaning |\n|---|---|---|\n")
        parts += [_row(f"`{flag.usage}`", _default(flag), flag.text) for flag in all_flags() if flag.section == section]
    parts.append(FOREIGN)
    for name, advice in UNSUPPORTED.items():
        satisfied = f" [{', '.join(SATISFIED[name])}]" if name in SATISFIED else ""
        parts.append(_row(f"`{name}`{satisfied}", advice))
    parts += [_row(f"`{beginning}*`", advice) for beginning, advice in FAMILIES.items()]
    parts.append(AS_OTHERS)
    parts += [_row(f"`{' '.join(foreign)}`", f"`{' '.join(ours)}`") for foreign, ours in TRANSLATED.items()]
    parts.append(WITHOUT_EFFECT)
    parts += [_row(" ".join(f"`{name}`" for name in names), reason) for reason, names in _by_reason(NO_EFFECT).items()]
    return "".join(parts)


def _default(flag: Flag) -> str:
    return flag.default_text if flag.default_text in ("", "required") else f"`{flag.default_text}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _by_reason(table: Mapping[str, str]) -> dict[str, list[str]]:
    names = defaultdict(list)
    for name, reason in table.items():
        names[reason].append(name)
    return dict(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    page = flags_page()
    if parser.parse_args().check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else None
        if current != page:
            print(f"{PAGE.relative_to(ROOT)} is out of date; run python tools/generate_flag_docs.py", file=sys.stderr)
            return 1
        return 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
