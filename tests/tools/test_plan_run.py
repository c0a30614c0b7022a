"""The planner as a person uses it."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ltd.log import Console
from megatron_ltd.plan.layouts.layout import Layout
from megatron_ltd.plan.layouts.memory import Memory
from megatron_ltd.plan.layouts.search import Candidate, given_settings, settings_of
from megatron_ltd.settings.checks.all import violations
from megatron_ltd.settings.cli import parse_run_config
from tools.commands.run_flags import flags_of
from tools.plan_run import main
from tools.planning.answers import changes, command, search_of, with_layout
from tools.planning.inputs import RECIPES, read_plan

MODEL = ("--num-layers 8 --hidden-size 2048 --num-attention-heads 16 --seq-length 1024 --vocab-size 50304 --bf16 "
         "--train-tokens 1000000000 --global-batch-size 64 ")
SMALL = ("--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 64 --train-iters 8 "
         "--micro-batch-size 1 --lr 1e-3 ")


def test_a_layout_is_described_in_tables_json_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = f"--json {tmp_path / 'plan.json'} --page {tmp_path / 'plan.html'}"
    drop = "--random-ltd --random-ltd-start-length 128 --random-ltd-steps 1000 --pipeline-model-parallel-size 2"
    assert main(f"--gpus 8 --gpu a100 {files} {MODEL} {drop}".split()) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["parameters"] == 507_990_016
    assert len(found["memory_bytes"]) == 2 and set(found["runs"]) == {"as planned", "every token in every layer"}
    for memory in found["memory_bytes"]:
        assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    runs = found["runs"]
    assert runs["as planned"]["gpu_hours"] == pytest.approx(8 * runs["as planned"]["seconds"] / 3600)
    assert runs["as planned"]["days"] < runs["every token in every layer"]["days"]
    page = (tmp_path / "plan.html").read_text()
    assert "507,990,016" in said and "507,990,016" in page and not re.search(r"https?:|<script", page)


def test_a_checkpoint_in_a_store_is_not_copied_to_plan_the_run_that_starts_from_it(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    flags = f"--gpu a100 {SMALL} --load {store} --upload {store} --save {tmp_path / 'run'}"
    assert main(flags.split()) == 0 and list(tmp_path.iterdir()) == []
    assert main([*flags.split(), "--use-checkpoint-args"]) == 22


@pytest.mark.parametrize("flags", [
    f"--gpus 8 --gpu a100-40 {MODEL} --micro-batch-size 8 --hidden-size 8192",
    f"--gpus 8 --gpu v100 {MODEL} --hidden-size 5120 --pipeline-model-parallel-size 4 --pipeline-split 4,2,1,1",
    f"--gpu v100 {MODEL} --hidden-size 8192 --micro-batch-size 16 --tensor-model-parallel-size 2 "
    "--pipeline-model-parallel-size 4",
    f"--gpus 2 --gpu v100 {MODEL} --hidden-size 4096 --recompute-activations"])
def test_what_does_not_fit_is_told_settings_that_do(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 20
    said = capsys.readouterr().err
    advice = said.split("the nearest settings that fit: ")[1].rsplit(" (", 1)[0]
    assert main([*flags.split(), *advice.split()]) == 0


def test_the_command_of_the_first_layout_is_a_plan_that_fits(tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "search.json"
    assert main(f"--gpus 8 --gpu a100-40 --search --json {path} {MODEL} --hidden-size 4096".split()) == 0
    said = capsys.readouterr().out
    found = json.loads(path.read_text())
    best, cost = found["best"][0], found["run_of_the_first"]
    assert best["memory_bytes"]["total"] <= found["cluster"]["usable_bytes"]
    for number in (f"{best['step_seconds']:.3g}", f"{best['bubble']:.1%}", f"{best['tokens_per_second']:,.0f}",
                   f"{best['mfu']:.1%}", f"{cost['gpu_hours']:,.0f}", f"{found['layouts_that_fit']:,}"):
        assert number in said
    launched = shlex.split(said[said.index("torchrun"):].replace("\\\n", " "))
    flags = launched[launched.index("megatron_ltd.pretrain_gpt") + 1:]
    assert "--lr" not in flags
    assert main(["--gpus", "8", "--gpu", "a100-40", *flags]) == 0


def test_a_remedy_takes_back_what_the_flags_stand_for() -> None:
    config = parse_run_config((f"{SMALL} --recompute-activations --use-distributed-optimizer --sequence-parallel "
                               "--num-layers-per-virtual-pipeline-stage 1 --mock-data").split())[0]
    plain = Candidate(Layout.of(parse_run_config(SMALL.split())[0], 1), Memory(0, 0, 0, 0, 0, 0, 0), None)
    remedy = changes(config, plain).split()
    assert set(remedy) >= {"--no-recompute-activations", "--no-use-distributed-optimizer", "--no-sequence-parallel",
                           "--no-num-layers-per-virtual-pipeline-stage"}
    again = parse_run_config([*shlex.split(" ".join(flags_of(config, ("model", "parallel", "training")))), *remedy])[0]
    assert given_settings(again) == settings_of(plain.layout)


@pytest.mark.parametrize(("program", "flags"), [
    ("pretrain_bert", f"{SMALL} --mask-prob 0.2 --mask-max-ngram 2 --data-path a b --split 90,10,0 --seed 7 "
                      "--save here --log-interval 3 --distributed-timeout-minutes 20 --vocab-file vocab.txt"),
    ("finetune_gpt", f"{SMALL.replace('--train-iters 8', '--train-epochs 2')} --train-jsonl lines.jsonl "
                     "--pretrained-checkpoint there --prompt-key asked"),
    ("finetune_vit", "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --patch-dim 4 --img-h 16 --img-w 16 "
                     "--num-classes 10 --train-data-path images --train-epochs 3 --lr 1e-3 "
                     "--image-augmentation crop"),
    ("pretrain_gpt", f"{SMALL} --data-path text --tokenizer-type GPT2BPETokenizer --vocab-file v --merge-file m "
                     "--reset-position-ids --optimizer muon --muon-momentum 0.9 --no-position-embedding "
                     "--position-embedding-type rope --eval-interval 5 --lr-warmup-iters 2 --fp16")])
def test_the_command_of_a_search_has_all_settings_that_were_given(program: str, flags: str) -> None:
    recipe = RECIPES[program]
    flags += " --global-batch-size 8 --use-distributed-optimizer --micro-batch-size 2 --recompute-activations"
    planned = read_plan(flags.split(), recipe=program, gpus=4, gpu="h100", cluster_file=None, hf_config=None,
                        epoch_samples=None, searches=True, console=Console(False))
    layout = next(iter(search_of(planned).layouts()))
    words = shlex.split(command(planned, layout).replace("\\\n", " "))
    again = parse_run_config(words[words.index(f"megatron_ltd.{program}") + 1:], recipe.family,
                             finetuning=recipe.finetuning)[0]
    assert given_settings(again) == settings_of(layout)
    before = parse_run_config(flags.split(), recipe.family, finetuning=recipe.finetuning)[0]
    for section in ("model", "data", "checkpoint", "logging", "optimizer"):
        assert getattr(again, section) == getattr(before, section), section
    assert again.training == replace(before.training, micro_batch_size=layout.micro_samples)
    assert again.parallel.distributed_timeout_minutes == before.parallel.distributed_timeout_minutes


def test_a_layout_given_beside_a_search_is_said_to_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"--gpus 2 --search {SMALL} --global-batch-size 4 --tensor-model-parallel-size 2".split()) == 0
    said = capsys.readouterr().out
    assert "--search chooses the layout" in said and "--tensor-model-parallel-size = 2" in said
    assert "fp32 do not reach" in said


def test_parameters_are_those_of_the_log_and_those_that_are_held(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    flags = SMALL.replace("--vocab-size 64", "--vocab-size 50").replace("--train-iters 8", "")
    assert main(f"{flags} --random-ltd --random-ltd-start-length 8 --random-ltd-steps 4 --json {path}".split()) == 0
    found, said = json.loads(path.read_text()), capsys.readouterr().out
    assert found["padded_parameters"] - found["parameters"] == 78 * 32
    assert f"{found['parameters']:,} ({found['padded_parameters']:,} with rows" in said
    assert "first step (8 of 16 kept)" in said and "longest step (all of 16)" in said


def test_a_cluster_that_cannot_hold_the_model_is_told_which_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"--gpus 2 --gpu a100-40 --search {MODEL} --hidden-size 16384".split()) == 20
    said = capsys.readouterr().err
    assert "the least that a process needs" in said and re.search(r"the least of this kind that can hold it: \d+", said)


def test_a_model_that_no_number_of_accelerators_can_hold_is_told_the_memory_that_could(
        capsys: pytest.CaptureFixture[str]) -> None:
    flags = MODEL.replace("--global-batch-size 64", "--global-batch-size 8").replace("--num-layers 8", "--num-layers 1")
    assert main(f"--gpus 2 --gpu v100 --search {flags} --hidden-size 65536".split()) == 20
    said = capsys.readouterr().err
    found = re.search(r"No number of this kind .* on ([\d,]+) .* a memory of ([\d.]+) GB", said)
    assert found is not None and float(found.group(2)) > 32 and "--global-batch-size" in said


def test_a_hugging_face_model_is_planned_from_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 160,
              "max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
              "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--hf-config", str(tmp_path), "--seq-length", "64", "--train-iters", "1", "--json", str(tmp_path / "p")]
    assert main(words) == 0
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160 + 2 * 64
    assert json.loads((tmp_path / "p").read_text())["parameters"] == 2 * 256 * 64 + 2 * layer + 64
    (tmp_path / "config.json").write_text("[]")
    assert main(words) == 20 and "no JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "says"), [
    ("--gpu h1000", "not in the table"), ("--gpus 0", "must be from 1"), ("--gpus 3 --micro-batch-size 2", "divisible"),
    ("--search", "--global-batch-size"), ("--json nowhere/plan.json", "its folder does not exist"),
    ("--cluster nowhere.toml", "cannot be read"), ("--dry-run --gpus 8 --rank 8", "choose 0 to 7"),
    ("--rank 0", "add --dry-run"), ("--search --dry-run", "search first"), ("--gpu a100 --cluster x", "leave one out"),
    ("--bert --program finetune_gpt", "leave one out"), ("--gpu=", "'': not in the table; use v100"),
    ("--json same --page ./same", "too, and would overwrite it"), ("--json=", "names no file"),
    ("--json .", "a folder"),
    ("--gpus 0 --script train.sh", "cannot be read")])
def test_what_cannot_be_planned_is_refused_in_one_message(flags: str, says: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    batch = "" if "--search" in flags else " --global-batch-size 8"
    assert main(f"{SMALL}{batch} {flags}".split()) == 20
    assert says in capsys.readouterr().err


def test_a_dry_run_moves_the_bytes_that_the_layout_means(tmp_path: Path) -> None:
    path = tmp_path / "dry.json"
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer"
    assert main(f"--dry-run --gpus 8 --json {path} {SMALL} --global-batch-size 4 {layout}".split()) == 0
    first, last = json.loads(path.read_text())["processes"]
    assert (first["rank"], last["rank"], first["problem"], last["problem"]) == (0, 4, None, None)
    moved = {(entry["operation"], entry["axis"]): entry for entry in first["collectives"]}
    stream = 4 * 16 * 32
    # Two layers, two all-reduces each way, and the embedding's, of two microbatches.
    assert moved["allreduce", "tensor"]["calls"] == 2 * (2 * 4 + 1)
    assert moved["allreduce", "tensor"]["bytes"] == 2 * (2 * 4 + 1) * stream
    assert moved["allreduce", "all"]["calls"] == 3  # counts, losses, the norm of the gradients
    # The gradients of two microbatches, and what the last stage has of the tied embedding's, tensor rank and data rank.
    assert moved["recv", "pipeline"]["bytes"] == 2 * stream + 4 * 128 * 32 // 2 // 2
    layer = 12 * 32 * 32 // 2 + 7 * 32 // 2 + 6 * 32
    assert first["parameters"] == (128 * 32 // 2 + 16 * 32 + 2 * layer) // 2


def test_of_stages_that_are_alike_the_one_that_needs_most_is_gone_through(tmp_path: Path) -> None:
    path = tmp_path / "dry.json"
    layout = "--num-layers 9 --pipeline-model-parallel-size 9 --global-batch-size 24 --optimizer muon"
    assert main(f"--dry-run --gpus 9 --json {path} {SMALL} {layout}".split()) == 0
    processes = json.loads(path.read_text())["processes"]
    assert [(process["stage"], process["alike"], process["problem"]) for process in processes] == [
        (0, [], None), (1, [2, 3, 4, 5, 6, 7], None), (8, [], None)]
    for process in processes[:2]:  # with moments, though there is one step, and what Muon gathers
        assert process["peak_live_bytes"] == pytest.approx(process["predicted_bytes"], rel=0.1)


@pytest.mark.parametrize(("recipe", "flags", "least"), [
    ("pretrain_bert", f"{SMALL} --tensor-model-parallel-size 2", 128 * 32),
    ("finetune_gpt", f"{SMALL.replace('--train-iters 8', '--train-epochs 2')} --train-jsonl lines.jsonl --random-ltd "
                     "--global-batch-size 2 --pipeline-model-parallel-size 2", 128 * 32),
    ("finetune_vit", "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --patch-dim 4 --img-h 16 --img-w 16 "
                     "--num-classes 10 --train-data-path images --train-epochs 3 --micro-batch-size 2 --lr 1e-3",
     17 * 32),
])
def test_every_recipe_can_be_dry_run(recipe: str, flags: str, least: int, tmp_path: Path) -> None:
    path = tmp_path / "dry.json"
    assert main(f"--dry-run --program {recipe} --gpus 2 --json {path} {flags}".split()) == 0
    processes = json.loads(path.read_text())["processes"]
    assert all(process["problem"] is None and process["collectives"] for process in processes)
    assert processes[0]["parameters"] >= 2 * 12 * 32 * 32 // 2 + least // 2


def test_a_finetuning_run_costs_its_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (f"--program finetune_gpt --gpus 1 --json {tmp_path / 'p'} {SMALL.replace('--train-iters 8', '')} "
             "--train-epochs 3 --global-batch-size 4 --train-jsonl lines.jsonl")
    assert main([*flags.split(), "--epoch-samples", "10"]) == 0
    assert json.loads((tmp_path / "p").read_text())["runs"]["as planned"]["steps"] == 8  # 30 samples, 4 a step
    assert main(flags.split()) == 0
    assert "give --epoch-samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "p").read_text())["runs"] == {}
    assert main([*flags.split(), "--epoch-samples", "0"]) == 20


def test_a_launch_script_is_planned_as_it_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.sh"
    script.write_text(f"torchrun --nproc_per_node 2 pretrain_bert.py {SMALL} --no-such-flag $1 2>&1 | tee log")
    assert main(["--script", str(script)]) == 20 and "--no-such-flag" in capsys.readouterr().err
    script.write_text(script.read_text().replace("--no-such-flag $1", "--data-path $1"))
    assert main(["--script", str(script), "--hidden-size", "64", "--json", str(tmp_path / "p")]) == 0
    found = json.loads((tmp_path / "p").read_text())
    assert found["cluster"]["gpus"] == 2 and found["parameters"] > 4 * 12 * 64 * 64
    script.write_text(script.read_text().replace("pretrain_bert", "pretrain_t5"))
    assert main(["--script", str(script)]) == 20 and "pretrain_t5" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    f"--gpus 16 {MODEL} --rampup-batch-size 16 16 1000",
    f"--gpus 8 {MODEL} --group-query-attention --num-query-groups 1 --kv-channels 5",
    f"--gpus 8 {MODEL} --seq-length-curriculum-start-length 100 --seq-length-curriculum-steps 8 "
    "--seq-length-curriculum-length-step 4",
    "--gpus 8 --program finetune_vit --num-layers 8 --hidden-size 64 --num-attention-heads 4 --img-h 32 --img-w 32 "
    "--patch-dim 4 --num-classes 10 --global-batch-size 64 --train-iters 4"])
def test_a_search_proposes_only_what_the_checks_of_the_settings_accept(flags: str) -> None:
    words = flags.split()
    program = words[words.index("--program") + 1] if "--program" in words else "pretrain_gpt"
    start = next(place for place, word in enumerate(words) if word.startswith("--num-layers"))
    planned = read_plan(words[start:], recipe=program, gpus=int(words[1]), gpu="h100", cluster_file=None,
                        hf_config=None, epoch_samples=None, searches=True, console=Console())
    layouts = list(search_of(planned).layouts())
    assert layouts
    for layout in layouts[::9]:
        assert not violations(with_layout(planned.config, layout), layout.world_size)


def test_a_window_of_a_hugging_face_model_is_two_numbers(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 160,
              "max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "sliding_window": 32,
              "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["--hf-config", str(tmp_path), "--train-iters", "1"]) == 0


def test_the_command_starts_as_many_processes_as_there_are_accelerators(capsys: pytest.CaptureFixture[str]) -> None:
    for gpus in (4, 12, 16, 20):
        assert main(f"--gpus {gpus} --search {MODEL} --global-batch-size 240".split()) == 0
        words = capsys.readouterr().out.split()
        each = int(words[words.index("--nproc-per-node") + 1])
        assert each <= 8 and int(words[words.index("--nnodes") + 1]) * each == gpus


def test_a_search_without_a_length_has_room_for_the_largest_step(tmp_path: Path) -> None:
    flags = MODEL.replace("--train-tokens 1000000000 ", "") + "--hidden-size 4096 "
    drop = "--random-ltd --random-ltd-start-length 128 --random-ltd-steps 1000"
    path = tmp_path / "search.json"
    assert main(f"--gpus 8 --gpu a100-40 --search --json {path} {flags} {drop}".split()) == 0
    found = json.loads(path.read_text())
    chosen = [word for word in shlex.split(found["command"].replace("\\\n", " "))]
    chosen = chosen[chosen.index("megatron_ltd.pretrain_gpt") + 1:]
    assert main(["--gpus", "8", "--gpu", "a100-40", "--json", str(path), *chosen]) == 0
    assert json.loads(path.read_text())["peak_bytes"] == found["best"][0]["memory_bytes"]["total"]


def test_a_cluster_may_hide_nothing_and_an_unknown_kind_is_named(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('gpu = "h100"\ngpus = 8\noverlap = 0\n')
    assert main(f"--cluster {path} --json {tmp_path / 'plan'} {MODEL}".split()) == 0
    assert all(step["waiting"] >= 0 for step in json.loads((tmp_path / "plan").read_text())["steps"])
    path.write_text('gpu = "h10O"\ngpus = 8\n')
    assert main(f"--cluster {path} {MODEL}".split()) == 20
    assert "gpu = h10O is not in the table" in capsys.readouterr().err
