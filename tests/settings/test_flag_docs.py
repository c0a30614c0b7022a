"""The page of flags is generated, and is up to date."""

from megatron_ltd.settings.flag_reference import all_flags
from megatron_ltd.settings.foreign_flags import NO_EFFECT, UNSUPPORTED
from tools.generate_flag_docs import PAGE, flags_page


def test_the_page_of_flags_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run python tools/generate_flag_docs.py"


def test_the_page_has_a_row_for_every_flag_that_is_answered() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for flag in all_flags():
        assert sum(row.startswith(f"| `{flag.usage}` |") and flag.text in row.replace("\\|", "|") for row in rows) == 1
    for name in [*UNSUPPORTED, *NO_EFFECT]:
        assert any(f"`{name}`" in row for row in rows), name
    assert {row.count("|") - row.count("\\|") for row in rows} == {3, 4}
