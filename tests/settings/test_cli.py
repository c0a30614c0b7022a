"""The command line: flags, the TOML file, precedence, and what is answered to words that mean nothing here."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ltd.config.run import RunConfig
from megatron_ltd.errors import ConfigError
from megatron_ltd.settings.checks.all import violations
from megatron_ltd.settings.cli import FILE_FLAGS, parse_run_config
from megatron_ltd.settings.flag_reference import Flag, all_flags
from megatron_ltd.settings.foreign_flags import TRANSLATED
from megatron_ltd.settings.recipe import FOLDER, recipe_names

ROOT = Path(__file__).resolve().parents[2]


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_run_config(list(argv))
    return str(error.value)


def write(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def words_of(flag: Flag, value: Any) -> list[str]:
    """The command line that sets a flag, written independently of the parser."""
    if isinstance(value, bool):
        return [flag.name] if value else ["--no-" + flag.name.removeprefix("--")]
    return [flag.name, *(str(item) for item in (value if isinstance(value, tuple) else (value,)))]


def values_of(flag: Flag) -> st.SearchStrategy[Any]:
    texts = st.text(min_size=1).filter(lambda text: bool(text.strip()) and not text.startswith("--"))
    plain: dict[type, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.just(True) if flag.off_name is None else st.booleans(),
        str: st.sampled_from(flag.choices) if flag.choices else texts}
    one = plain[flag.kind]
    if flag.count is None:
        return st.lists(one, min_size=1, max_size=4).map(tuple)
    return one if flag.count in (0, 1) else st.tuples(*[one] * flag.count)


@st.composite
def settings(draw: st.DrawFn) -> dict[Flag, Any]:
    flags = draw(st.lists(st.sampled_from(all_flags()), unique=True, max_size=12))
    return {flag: draw(values_of(flag)) for flag in flags}


def test_no_words_give_the_defaults_of_the_dataclasses() -> None:
    assert parse_run_config([]) == (RunConfig(), [])


def test_every_field_of_every_section_is_a_flag_with_documentation() -> None:
    set_by_the_program = ("family", "epoch_samples")
    fields = [(section, field.name) for section, kind in typing.get_type_hints(RunConfig).items()
              for field in dataclasses.fields(kind) if field.name not in set_by_the_program]
    assert [(flag.section, flag.field) for flag in all_flags()] == fields
    assert all(flag.text.endswith(".") for flag in all_flags())
    assert len({flag.name for flag in all_flags()}) == len(fields)


@given(settings())
def test_what_is_written_on_the_command_line_is_what_the_configuration_holds(given_settings: dict[Flag, Any]) -> None:
    words = [words_of(flag, value) for flag, value in given_settings.items()]
    assume(not any(" ".join(flag) in TRANSLATED or flag[1:] == ["none"] for flag in words))  # these say something else
    assume(not {"vocab_file", "merge_file"} <= {flag.field for flag in given_settings})  # they name a tokenizer
    assume(not any(word[:1] in ("'", '"') for flag in words for word in flag))  # and these lose their quotes
    config, _ = parse_run_config([word for flag in words for word in flag])
    expected = RunConfig()
    for flag, value in given_settings.items():
        section = dataclasses.replace(getattr(expected, flag.section), **{flag.field: value})
        expected = dataclasses.replace(expected, **{flag.section: section})
    assert config == expected


@pytest.mark.parametrize(("words", "section", "field", "value"), [
    (["--lr", "1e-4"], "optimizer", "lr", 1e-4),
    (["--lr=3"], "optimizer", "lr", 3.0),
    (["--seed", "-5"], "training", "seed", -5),
    (["--bf16"], "training", "bf16", True),
    (["--no-exit-signal-handler"], "training", "exit_signal_handler", False),
    (["--exit-signal-handler"], "training", "exit_signal_handler", True),
    (["--data-path", "0.3", "a", "0.7", "b"], "data", "data_path", ("0.3", "a", "0.7", "b")),
    (["--rampup-batch-size", "16", "8", "1000"], "training", "rampup_batch_size", (16, 8, 1000)),
    (["--normalization", "RMSNorm"], "model", "normalization", "RMSNorm"),
    (["--no-load-optim"], "checkpoint", "no_load_optim", True),
    (["--split=98,2,0"], "data", "split", "98,2,0"),
    (["--window-attn-skip-freq", "([1]*3+[0])*2"], "model", "window_attn_skip_freq", (1, 1, 1, 0) * 2),
    (["--no-rope-freq", "[0,1]*2"], "model", "no_rope_freq", (0, 1, 0, 1)),
])
def test_values_are_read_as_the_type_of_their_field(words: list[str], section: str, field: str, value: Any) -> None:
    config, _ = parse_run_config(words)
    found = getattr(getattr(config, section), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("words", "fragments"), [
    (["--num-layers", "1.5"], ["--num-layers = 1.5", "not a whole number"]),
    (["--num-layers", "1e3"], ["--num-layers = 1e3", "not a whole number"]),
    (["--num-layers", "9" * 30], ["--num-layers", "64 bits"]),
    (["--num-layers"], ["--num-layers", "nothing follows", "--num-layers N"]),
    (["--num-layers", "4", "5"], ["--num-layers", "'4 5'"]),
    (["--lr", "fast"], ["--lr = fast", "not a number"]),
    (["--lr", "nan"], ["--lr = nan", "not a number"]),
    (["--lr", "inf"], ["--lr = inf", "not a number"]),
    (["--bf16", "true"], ["--bf16", "takes no value", "'true'"]),
    (["--rampup-batch-size", "1", "2"], ["--rampup-batch-size", "3 values", "'1 2'"]),
    (["--data-path"], ["--data-path", "one or more values"]),
    (["--normalization", "BatchNorm"], ["--normalization = BatchNorm", "LayerNorm, RMSNorm"]),
    (["--save", ""], ["--save", "empty"]),
    (["--save="], ["--save", "empty"]),
    (["gpt"], ["'gpt'", "without a flag"]),
    (["--num-layer", "4"], ["--num-layer:", "nearest: --num-layers"]),
    (["--hiden-size", "4"], ["nearest: --hidden-size"]),
    (["--micro_batch_sise", "4"], ["nearest: --micro-batch-size"]),
    (["--confg", "x.toml"], ["nearest: --config"]),
    (["--no-rope-freq", "[1]*9999999999"], ["--no-rope-freq = [1]*9999999999: no list of whole numbers", "([1]*3"]),
    (["--no-rope-freq", "[exit()]*2"], ["--no-rope-freq = [exit()]*2: no list of whole numbers"]),
])
def test_what_cannot_be_read_is_answered_with_value_and_remedy(words: list[str], fragments: list[str]) -> None:
    message = refused(*words)
    assert all(fragment in message for fragment in fragments), message


def test_the_beginning_of_a_flag_is_no_flag() -> None:
    assert "no such flag" in refused("--tensor-model-parallel", "2")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "[model]\nhidden_sise = 4\n[optimizer]\nlr = 'fast'\n")
    message = refused("--num-layer", "4", "--seed", "x", "--num-experts", "8", "--config", path, "--bf16", "1")
    assert message.startswith("6 problems")
    for fragment in ("--num-layer:", "--seed = x", "--num-experts 8", "hidden_sise", "lr: must be", "--bf16"):
        assert fragment in message


def test_of_a_flag_given_twice_the_last_counts_and_the_user_is_told() -> None:
    config, notes = parse_run_config(["--lr", "1", "--bf16", "--lr", "2", "--bf16"])
    assert config.optimizer.lr == 2.0
    assert len(notes) == 1 and "--lr" in notes[0] and "2.0" in notes[0]


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, """
seq_length = 64
[model]
num_layers = 4
[training]
bf16 = true
exit_signal_handler = false
rampup_batch_size = [2, 2, 100]
[optimizer]
lr = 1
[data]
data_path = ["a", "b"]
""")
    config, _ = parse_run_config(["--no-bf16", "--config", path, "--num-layers", "8"])
    assert (config.model.seq_length, config.model.num_layers, config.training.bf16) == (64, 8, False)
    assert (config.optimizer.lr, config.data.data_path) == (1.0, ("a", "b"))
    assert config.training.rampup_batch_size == (2, 2, 100)
    assert config.training.exit_signal_handler is False
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.clip_grad == RunConfig().optimizer.clip_grad


@pytest.mark.parametrize(("text", "fragments"), [
    ("[model]\nnum_layer = 4", ["[model] num_layer", "nearest: num_layers"]),
    ("num-layers = 4", ["num-layers", "nearest: num_layers"]),
    ("[modle]\nnum_layers = 4", ["[modle]", "nearest: model"]),
    ("[training]\nnum_layers = 4", ["[training] num_layers", "belongs under [model]"]),
    ("num_layers = 4\n[model]\nnum_layers = 5", ["num_layers", "twice"]),
    ("[model]\nnum_layers = 4\nnum_layers = 5", ["not valid TOML"]),
    ("[model]\nnum_layers = 4.0", ["num_layers", "whole number", "4.0"]),
    ("[model]\nnum_layers = true", ["num_layers", "whole number", "True"]),
    ("[model]\nnum_layers = '4'", ["num_layers", "whole number", "'4'"]),
    ("[optimizer]\nlr = '1e-4'", ["lr", "a number", "'1e-4'"]),
    ("[optimizer]\nlr = nan", ["lr", "finite"]),
    ("[training]\nbf16 = 1", ["bf16", "true or false"]),
    ("[training]\nseed = 99999999999999999999999", ["seed", "64 bits"]),
    ("[data]\ndata_path = 'a'", ["data_path", "list"]),
    ("[data]\ndata_path = []", ["data_path", "list"]),
    ("[data]\ndata_path = [1]", ["data_path", "text"]),
    ("[checkpoint]\nsave = ' '", ["save", "empty"]),
    ("[training]\nrampup_batch_size = [1, 2]", ["rampup_batch_size", "list of 3"]),
    ("[model]\nnormalization = 'x'", ["normalization", "LayerNorm, RMSNorm"]),
    ("[parallel]\ncontext_parallel_size = 2", ["--context-parallel-size", "not supported"]),
    ("this is no toml", ["not valid TOML"]),
    ("[optimizer]\nlr = 1" + "0" * 400, ["lr", "finite"]),
    ("seed = " + "9" * 5000, ["not valid TOML"]),
    ("seed = " + "[" * 5000, ["not valid TOML"]),
])
def test_a_file_that_is_wrong_is_refused_with_the_place_and_the_remedy(
        tmp_path: Path, text: str, fragments: list[str]) -> None:
    message = refused("--config", write(tmp_path, text))
    assert "run.toml" in message
    assert all(fragment in message for fragment in fragments), message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused("--config", str(tmp_path / "none.toml"))
    assert "cannot be read" in refused("--config", str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML: 'utf-8'" in refused("--config", str(tmp_path / "binary.toml"))
    assert "needs one path" in refused("--config")
    path = write(tmp_path, "")
    assert "more than once" in refused("--config", path, "--config", path)


@given(st.lists(st.text(max_size=12) | st.sampled_from([flag.name for flag in all_flags()]), max_size=8))
def test_any_words_give_a_configuration_or_one_error(argv: list[str]) -> None:
    if {"-h", "--help", *FILE_FLAGS} & {word.partition("=")[0] for word in argv}:
        return
    try:
        config, notes = parse_run_config(argv)
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(config, RunConfig) and all(isinstance(note, str) for note in notes)


@given(st.text(max_size=200) | st.sampled_from(["[model]\n", "[training]\nbf16 = true\n", "seed = 3\n"]))
def test_any_file_gives_a_configuration_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "run.toml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        parse_run_config(["--config", str(path)])
    except ConfigError as error:
        assert "run.toml" in str(error)


def test_parsing_and_checking_import_neither_torch_nor_numpy() -> None:
    program = ("import sys; from megatron_ltd.settings.cli import parse_run_config;"
               "from megatron_ltd.settings.checks.all import violations;"
               "violations(parse_run_config(['--num-layers', '4'])[0], 8);"
               "print(sorted({'torch', 'numpy', 'argparse'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_words_files_and_contradictions_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("min_lr = 'x'\nno_such = 1\n", encoding="utf-8")
    words = ["--num-experts", "8", "--lr", "abc", "--num-layers", "2", "--num-attention-heads", "4",
             "--hidden-size", "65", "--seq-length", "64", "--mock-data", "--vocab-size", "9", "--config", str(file)]
    with pytest.raises(ConfigError) as error:
        parse_run_config(words, also=lambda config: violations(config, 1))
    said = [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]
    assert [line.split(":")[0].split(" = ")[0] for line in said] == [
        "--num-experts 8", "--lr", str(file), str(file), "no training budget is given", "--hidden-size"]


@pytest.mark.parametrize("words", [
    "--eval-iters 1000000000", "--hidden-size 1000000000", "--global-batch-size 1000000000000000",
    "--vocab-size 1099511627776", "--distributed-timeout-minutes 1e18", "--num-layers 10000000"])
def test_a_number_that_would_fill_the_memory_or_last_for_ever_gets_a_sentence(words: str) -> None:
    name, value = words.split()
    found = [text for text in violations(parse_run_config([name, value])[0], 1) if text.startswith(f"{name} = ")]
    assert len(found) == 1 and " and at most " in found[0]


@pytest.mark.parametrize("flag", ["--config", "--deepspeed-config"])
def test_a_file_without_an_end_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} = /dev/zero: longer than "):
        parse_run_config([flag, "/dev/zero"])


def test_a_recipe_is_printed_in_full_and_files_and_flags_override_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("weight_decay = 0.2\n")
    config, notes = parse_run_config(["--recipe", "muon", "--config", str(tmp_path / "run.toml"),
                                      "--adam-beta2", "0.9", "--lr-warmup-iters", "3"])
    optimizer = config.optimizer
    assert (optimizer.optimizer, optimizer.weight_decay, optimizer.adam_beta2) == ("muon", 0.2, 0.9)
    assert (optimizer.lr_warmup_iters, optimizer.lr_warmup_fraction) == (3, None)
    (note,) = [note for note in notes if note.startswith("--recipe muon")]
    assert "--optimizer muon" in note and "--lr-decay-style cosine" in note and "beta2" not in note
    spelled, _ = parse_run_config([*note.partition("taken as ")[2].split(), "--weight-decay", "0.2",
                                   "--adam-beta2", "0.9", "--lr-warmup-iters", "3"])
    assert spelled == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read_and_opens_with_what_it_saves(name: str) -> None:
    parse_run_config(["--recipe", name])
    assert "docs/results.md" in (FOLDER / f"{name}.toml").read_text().partition("[")[0]


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    assert "--recipe = fast: no such recipe; there is muon" in refused("--recipe", "fast")
    assert "--recipe needs one name" in refused("--recipe")
