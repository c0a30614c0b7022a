import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_ltd.config.files import DataConfig
from megatron_ltd.config.model import ModelConfig
from megatron_ltd.config.run import RunConfig
from megatron_ltd.config.training import TrainingConfig
from megatron_ltd.data.blend import BlendedDataset
from megatron_ltd.data.build import Datasets, build_datasets, datasets_digest
from megatron_ltd.data.gpt.dataset import GPTDataset
from megatron_ltd.data.held_out import NamedSets, in_whole_batches, named_sets
from megatron_ltd.data.sample import Dataset
from megatron_ltd.data.text.tokenizer import NullTokenizer
from megatron_ltd.errors import ConfigError, DataError
from tests.data.corpora import random_documents, write_corpus

SEQ_LENGTH = 16
TOKENIZER = NullTokenizer(999)


def config(seed: int = 1234, **data: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(seq_length=SEQ_LENGTH), training=TrainingConfig(seed=seed),
                     data=DataConfig(**data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a (80 documents), b (50), c (30), of ids below 1,000."""
    path = tmp_path_factory.mktemp("corpora")
    for seed, (name, documents) in enumerate([("a", 80), ("b", 50), ("c", 30)]):
        write_corpus(path / name, random_documents(seed, documents, 60, 1000), 1000)
    return path


def paths(folder: Path, *values: str) -> tuple[str, ...]:
    """Values with names of corpora turned into prefixes."""
    return tuple(str(folder / value) if value in ("a", "b", "c") else value for value in values)


CASES: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"data_path": ("a",)}, (300, 20, 5)),
    ({"data_path": ("a",), "split": "100,0,0"}, (30, 0, 0)),
    ({"data_path": ("0.3", "a", "0.7", "b"), "split": "80,10,10"}, (300, 20, 5)),
    ({"data_path": ("1", "a"), "split": "80,10,10"}, (300, 20, 5)),
    ({"data_path": ("5", "a", "3", "b", "2", "c"), "split": "7,3"}, (400, 40, 0)),
    ({"data_path": ("a", "b", "c"), "split": "70,20,10"}, (150, 20, 7)),
    ({"data_path": ("a", "b"), "split": "70,20,10"}, (100, 9, 7)),
    ({"train_data_path": ("a",), "valid_data_path": ("b",)}, (300, 60, 0)),
    ({"train_data_path": ("2", "a"), "valid_data_path": ("b",), "test_data_path": ("c", "b", "a")}, (90, 9, 8)),
    ({"train_data_path": ("2", "a", "1", "c"), "test_data_path": ("c",)}, (500, 0, 20)),
]


@pytest.mark.parametrize(("settings", "samples"), CASES)
@pytest.mark.parametrize("seed", [1234, 7])
def test_sets_equal_megatron_cores(oracle: ModuleType, folder: Path, settings: dict[str, Any],
                                   samples: tuple[int, int, int], seed: int) -> None:
    settings = {name: paths(folder, *value) if name.endswith("path") else value for name, value in settings.items()}
    if "data_path" in settings:
        source = {"blend": oracle.blend(settings["data_path"]), "split": settings.get("split", "969,30,1")}
        if source["split"] == "969,30,1":  # megatron-core never returns from an empty test set
            source["split"] = settings["split"] = "90,5,5"
    else:
        blends = [oracle.blend(settings.get(f"{name}_data_path")) for name in ("train", "valid", "test")]
        source = {"blend": None, "blend_per_split": blends, "split": None}
    reference = oracle.build(list(samples), oracle.gpt_config(seed, SEQ_LENGTH, None, **source))
    ours = build_datasets(config(seed, **settings), TOKENIZER, *samples)
    compared = 0
    for mine, theirs, asked in zip(ours, reference, samples, strict=True):
        if not asked:
            assert mine is None
            continue
        assert mine is not None and theirs is not None
        assert len(mine) == len(theirs) >= asked
        for i in range(len(mine)):
            assert mine.sample(i)["tokens"].tolist() == theirs[i]["tokens"].tolist()
        compared += len(mine)
    assert compared >= sum(samples)


def test_whole_sets_with_a_loss_each_equal_megatron_cores(oracle: ModuleType, folder: Path) -> None:
    several = paths(folder, "b", "c")
    blends = [oracle.blend(paths(folder, "a")), oracle.blend(several), None]
    reference = oracle.build([30, None, 0], oracle.gpt_config(
        7, SEQ_LENGTH, None, blend=None, split=None, blend_per_split=blends, multiple_validation_sets=True,
        full_validation=True))
    named = config(7, train_data_path=paths(folder, "a"),
                   valid_data_path=tuple(f"{name}={path}" for name, path in zip("xy", several, strict=True)))
    listed = config(7, train_data_path=paths(folder, "a"), valid_data_path=several, multiple_validation_sets=True)
    for settings, names in ((named, ["x", "y"]), (listed, ["0", "1"])):
        ours = build_datasets(settings, TOKENIZER, 30, None, 0)
        assert isinstance(ours.valid, NamedSets) and list(ours.valid.sets) == names
        for mine, theirs in zip(ours.valid.sets.values(), reference[1], strict=True):
            assert [sample for i in range(len(mine)) for sample in mine.sample(i)["tokens"].tolist()] \
                == [token for i in range(len(theirs)) for token in theirs[i]["tokens"].tolist()]
        batched = in_whole_batches(ours.valid, 7)
        assert [len(part) % 7 for part in named_sets(batched).values()] == [0, 0]
        first, second = (len(part) for part in ours.valid.sets.values())
        assert len(ours.valid) == first + second
        assert ours.valid.sample(first)["tokens"].tolist() == reference[1][1][0]["tokens"].tolist()


def labels(dataset: Dataset) -> list[list[int]]:
    return [dataset.sample(i)["labels"].tolist() for i in range(len(dataset))]


def test_a_blend_of_uneven_weights_never_runs_out_of_samples(folder: Path) -> None:
    values = ["0.9", "a"] + ["0.001", "c"] * 100  # megatron-core stops with an IndexError here
    share = build_datasets(config(data_path=paths(folder, "a"), split="1"), TOKENIZER, 136, 0, 0).train
    ours = build_datasets(config(data_path=paths(folder, *values), split="1"), TOKENIZER, 150, 0, 0)
    assert isinstance(ours.train, BlendedDataset)
    assert ours.train.index.drawn[0] > len(share), "the blend draws more than a dataset built for its share holds"
    assert all(len(ours.train.sample(i)["tokens"]) == SEQ_LENGTH for i in range(len(ours.train)))


def test_samples_and_their_number_do_not_depend_on_the_cache(folder: Path, tmp_path: Path) -> None:
    settings = {"data_path": paths(folder, "1", "a", "2", "b"), "split": "80,20"}
    plain = build_datasets(config(**settings), TOKENIZER, 200, 10, 0)
    for _ in range(2):
        cached = build_datasets(config(**settings, data_cache_path=str(tmp_path / "cache")), TOKENIZER, 200, 10, 0)
        for mine, reference in zip(cached[:2], plain[:2], strict=True):
            assert mine is not None and reference is not None
            assert labels(mine) == labels(reference)


def test_options_of_the_sample_form_reach_the_samples(folder: Path) -> None:
    settings = config(data_path=paths(folder, "a"), split="1", reset_position_ids=True, reset_attention_mask=True)
    sample = build_datasets(settings, TOKENIZER, 10, 0, 0).train.sample(0)
    assert sample.keys() == {"tokens", "labels", "loss_mask", "position_ids", "document_ids"}


def test_mock_data_needs_no_corpus() -> None:
    ours = build_datasets(config(mock_data=True), TOKENIZER, 50, 5, 0)
    assert (len(ours.train), ours.test) == (50, None)
    assert ours.valid is not None and len(ours.valid) == 5
    assert labels(ours.valid)[0] != labels(ours.train)[0]
    assert max(labels(ours.train)[0]) < TOKENIZER.vocab_size


def test_sets_that_are_not_asked_for_are_not_built(folder: Path) -> None:
    ours = build_datasets(config(data_path=paths(folder, "c"), split="1000,1,1"), TOKENIZER, 10, 0, 0)
    assert isinstance(ours.train, GPTDataset)
    assert ours.valid is None and ours.test is None


@pytest.mark.parametrize(("settings", "samples", "kind", "words"), [
    ({}, (10, 0, 0), ConfigError, ["No data", "--data-path", "--mock-data"]),
    ({"data_path": ("a",)}, (0, 0, 0), ConfigError, ["0 training samples", "--train-iters"]),
    ({"data_path": ("a",), "train_data_path": ("b",)}, (10, 0, 0), ConfigError, ["--data-path and --train-data-path"]),
    ({"data_path": ("a",), "split": "0,1,0"}, (10, 5, 0), ConfigError, ["No training data", "--split"]),
    ({"valid_data_path": ("a",)}, (10, 5, 0), ConfigError, ["No training data", "--train-data-path"]),
    ({"data_path": ("1", "a", "nan", "b")}, (10, 0, 0), ConfigError, ["--data-path = ", "weight = nan"]),
    ({"data_path": ("0", "a", "0", "b")}, (10, 0, 0), ConfigError, ["weight = 0.0 must be a number above 0"]),
    ({"data_path": ("a",), "split": "0,0,0"}, (10, 0, 0), ConfigError, ["--split = 0,0,0"]),
    ({"data_path": ("nowhere",)}, (10, 0, 0), DataError, ["no file nowhere.idx"]),
    ({"data_path": ("c",), "split": "969,30,1"}, (10, 5, 5), DataError,
     ["The test set is empty", "--split = 969,30,1", "[30, 30) of the 30"]),
    ({"data_path": ("a",), "split": "1000,1,0"}, (10, 5, 0), DataError,
     ["The valid set is empty", "[80, 80) of the 80"]),
    ({"data_path": ("a", "c"), "split": "1"}, (10000, 0, 0), DataError,
     ["train: the run reads 10000 samples", "holds ", "Give weights"]),
])
def test_data_that_cannot_serve_the_run_is_refused(
        folder: Path, settings: dict[str, Any], samples: tuple[int, int, int], kind: type[Exception],
        words: list[str]) -> None:
    settings = {name: paths(folder, *value) if name.endswith("path") else value for name, value in settings.items()}
    with pytest.raises(kind) as caught:
        build_datasets(config(**settings), TOKENIZER, *samples)
    for word in words:
        assert word in str(caught.value)


def test_a_corpus_of_another_vocabulary_is_refused_before_training(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a holds token id = 99\d, .* ids in \[0, 901\).*Use the tokenizer"):
        build_datasets(config(data_path=paths(folder, "a")), NullTokenizer(900), 10, 0, 0)


def test_a_truncated_corpus_is_refused_before_training(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", random_documents(0, 80, 60, 1000), 1000)
    data = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match=rf"a\.bin, byte {len(data) // 2}: expected a file of {len(data)} bytes"):
        build_datasets(config(data_path=(str(tmp_path / "a"),)), TOKENIZER, 10, 0, 0)


def test_a_split_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [[1] * 10] * 20, 1000)
    with pytest.raises(DataError, match=r"sequences \[19, 20\) of 20 hold 10 tokens, and one sample takes 17"):
        build_datasets(config(data_path=(str(tmp_path / "a"),), split="95,5,0"), TOKENIZER, 10, 5, 0)


def test_the_digest_is_equal_exactly_where_the_samples_are(folder: Path, tmp_path: Path) -> None:
    def digest(tokenizer: NullTokenizer = TOKENIZER, seed: int = 1, samples: tuple[int, int, int] = (50, 5, 0),
               **settings: Any) -> str:
        run = config(seed, **{"data_path": paths(folder, "1", "a", "2", "b"), "split": "80,20", **settings})
        return datasets_digest(tokenizer, build_datasets(run, tokenizer, *samples))

    for suffix in ("bin", "idx"):
        (tmp_path / f"a.{suffix}").write_bytes((folder / f"a.{suffix}").read_bytes())
    copied = ("1", str(tmp_path / "a"), "2", str(folder / "b"))
    assert digest() == digest() == digest(data_path=copied) == digest(data_cache_path=str(tmp_path / "cache"))
    others = [digest(seed=2), digest(samples=(60, 5, 0)), digest(samples=(50, 0, 0)), digest(split="70,30"),
              digest(tokenizer=NullTokenizer(1000)), digest(data_path=paths(folder, "2", "a", "1", "b")),
              digest(data_path=paths(folder, "1", "a", "2", "c")), digest(eod_mask_loss=True), digest(mock_data=True)]
    assert len({digest(), *others}) == 1 + len(others)


def test_every_process_builds_the_same_sets(folder: Path) -> None:
    run = config(data_path=paths(folder, "1", "a", "2", "b"), split="80,20")
    first, second = (build_datasets(run, TOKENIZER, 60, 6, 0) for _ in range(2))
    assert isinstance(first, Datasets)
    assert labels(first.train) == labels(second.train)
    other = dataclasses.replace(run, training=TrainingConfig(seed=99))
    assert labels(build_datasets(other, TOKENIZER, 60, 6, 0).train) != labels(first.train)


def test_parts_of_a_corpus_are_those_that_a_split_gives(folder: Path) -> None:
    a, b = paths(folder, "a", "b")
    split = build_datasets(config(data_path=("0.3", a, "0.7", b), split="60,40,0"), TOKENIZER, 90, 20, 0)
    parts = build_datasets(config(train_data_path=("0.3", f"{a}@0:0.6", "0.7", f"{b}@0:0.6"),
                                  valid_data_path=("0.3", f"{a}@0.6:1", "0.7", f"{b}@0.6:1")), TOKENIZER, 90, 20, 0)
    assert parts.valid is not None and split.valid is not None
    assert (parts.train.digest, parts.valid.digest) == (split.train.digest, split.valid.digest)


@pytest.mark.parametrize(("flag", "corpus", "given"), [
    ("train", "c@0.5:0.51", r"c@0\.5:0\.51 gives it sequences \[15, 15\) of the 30"),
    ("valid", "c@0:0.001", r"c@0\.0:0\.001 gives it sequences \[0, 0\) of the 30"),
    ("train", "none", r"none gives it sequences \[0, 0\) of the 0"),
])
def test_an_empty_set_is_told_by_the_flag_that_names_it(folder: Path, flag: str, corpus: str, given: str) -> None:
    write_corpus(folder / "none", [], 1000)
    sets = {"train_data_path": paths(folder, "a"), f"{flag}_data_path": (str(folder / corpus),)}
    told = rf"The {flag} set is empty: --{flag}-data-path = .*{given}.* a larger part"
    with pytest.raises(DataError, match=told) as refusal:
        build_datasets(config(**sets), TOKENIZER, 9, 9, 0)
    assert "--split" not in str(refusal.value)


@pytest.mark.parametrize("part", ["0.5:0.2", "0:1.5", "x:1"])
def test_a_part_outside_a_corpus_is_refused(folder: Path, part: str) -> None:
    with pytest.raises(ConfigError, match="0 <= BEGIN < END <= 1"):
        build_datasets(config(train_data_path=(f"{paths(folder, 'a')[0]}@{part}",)), TOKENIZER, 9, 0, 0)


def test_a_part_of_a_corpus_that_split_divides_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--data-path: .* is a part, and --split divides it"):
        build_datasets(config(data_path=(f"{paths(folder, 'a')[0]}@0:0.5",)), TOKENIZER, 9, 0, 0)
