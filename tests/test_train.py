"""The loop against transformers and peft, step by step; what a step is; schedule, stopping, flags, and whole runs."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.helpers import SHARED, chat_base, command, llama, needs_shared
from support.training_runs import CPU, oracle_losses, rows, run_loop, settings

import lora
import train
from checkpoint import load_model, read_config
from common.console import table
from common.errors import UserError
from common.folder_lock import FolderLock
from data import load
from dataset.sampler import Sampler
from evals.report import read_facts
from flags import Flags
from methods import load_trainable
from optimizers import make_optimizers
from tokenizer import load_tokenizer
from train import lr_at
from training import evaluator, plots, run_folder
from training.defaults import choose_compile, choose_optimization, choose_steps

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 2, "attention_bias": True}])
def test_full_fine_tuning_equals_transformers(tmp_path, shape):
    theirs = llama(tmp_path / "base", std=0.1, **shape).train()
    flags, data = settings(method="full", lr=3e-3), rows()
    ours = run_loop(load_model(tmp_path / "base"), data, flags, tmp_path)
    assert ours == pytest.approx(oracle_losses(theirs, data, flags), rel=0, abs=1e-4)
    assert ours[-1] < ours[0]


def test_weight_decay_equals_transformers_and_spares_norms(tmp_path):
    theirs = llama(tmp_path / "base", std=0.1).train()
    flags, data = settings(method="full", lr=3e-3, weight_decay=0.5), rows()
    model = load_model(tmp_path / "base")
    groups = make_optimizers(model, "adamw", 3e-3, 0.5)[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0] and all(p.dim() == 1 for p in groups[1]["params"])
    assert run_loop(model, data, flags, tmp_path) == pytest.approx(
        oracle_losses(theirs, data, flags, 0.5), rel=0, abs=1e-4
    )


def test_lora_equals_transformers_with_peft(tmp_path):
    theirs = llama(tmp_path / "base", std=0.1)
    model = load_model(tmp_path / "base")
    torch.manual_seed(1)
    lora.add_lora(model, 4, 8.0, targets="all")
    lora.save_adapter(model, tmp_path / "start")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True).train()
    flags, data = settings(), rows()
    ours = run_loop(model, data, flags, tmp_path)
    assert ours == pytest.approx(oracle_losses(wrapped, data, flags), rel=0, abs=1e-4)
    assert ours[-1] < ours[0] - 0.05


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, method):
    llama(tmp_path / "base", std=0.1)
    found = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4), (1, 8)):
        model = load_model(tmp_path / "base")
        if method == "lora":
            torch.manual_seed(0)
            lora.add_lora(model, 4, 8.0)
        flags = settings(method=method, lr=3e-3, batch_size=batch_size, accumulate=accumulate)
        found.append(run_loop(model, rows(), flags, tmp_path))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=0, abs=2e-5)


def test_every_trainable_parameter_moves_in_the_first_steps(tmp_path):
    llama(tmp_path / "base", std=0.1)
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run_loop(model, rows(), settings(steps=2), tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


def test_bf16_full_fine_tuning_keeps_fp32_masters(tmp_path):
    """A rate at which a bf16 weight would not move at all still learns."""
    llama(tmp_path / "base", std=0.1)
    model = load_trainable(settings(method="full", dtype="bf16", shard="none"), tmp_path / "base", CPU)
    assert model.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in model.parameters())
    before = model.norm.weight.detach().clone()  # about 1, where bf16's steps are 2 ** -8
    run_loop(model, rows(), settings(method="full", steps=4, lr=1e-5), tmp_path)
    moved = (model.norm.weight - before).abs()
    assert 0 < float(moved.max()) < 2**-10


def test_train_regex_trains_only_what_it_names(tmp_path):
    llama(tmp_path / "base")
    flags = settings(method="full", train=r"layers\.1\.mlp", dtype="fp32", shard="none")
    model = load_trainable(flags, tmp_path / "base", CPU)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"blocks.1.mlp.{part}.weight" for part in ("gate", "up", "down")
    }
    with pytest.raises(UserError, match="matches no parameter"):
        load_trainable(replace(flags, train="nothing"), tmp_path / "base", CPU)


def test_dropout_is_on_in_training_and_off_in_validation(tmp_path):
    llama(tmp_path / "base", std=0.1)
    found, checks = [], []
    for seed in (0, 1):
        model = load_model(tmp_path / "base")
        torch.manual_seed(0)
        lora.add_lora(model, 4, 8.0, dropout=0.5)
        torch.nn.init.normal_(next(iter(lora.lora_layers(model).values())).lora_B)
        model.train()
        checks.append([evaluator.validation_loss(model, rows(), CPU) for _ in range(2)])
        assert model.training  # as it was
        torch.manual_seed(seed)
        found.append(run_loop(model, rows(), settings(steps=1), tmp_path)[0])
    assert found[0] != found[1]
    assert len({value for pair in checks for value in pair}) == 1


def test_schedule_and_warm_up():
    flags = settings(steps=10, lr=1.0, warmup=4)
    assert [lr_at(step, flags) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    cosine = [lr_at(step, flags) for step in range(4, 10)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert lr_at(7, settings(steps=10, lr=1.0, warmup=4, schedule="linear")) == pytest.approx(0.5)
    assert lr_at(9, settings(steps=10, lr=1.0, warmup=4, schedule="constant")) == 1.0
    assert lr_at(0, settings(steps=10, lr=1.0, warmup=0)) == 1.0


# ---- whole runs ----

NUMBERS = [{"instruction": f"Say {n}", "output": f"It is {n}, as you said."} for n in range(40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def numbers(tmp_path) -> Path:
    (tmp_path / "numbers.json").write_text(json.dumps(NUMBERS))
    return tmp_path / "numbers.json"


def whole_run(monkeypatch, capsys, *words) -> str:
    out, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    return out


def test_what_a_run_says_and_writes(base, numbers, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    said = whole_run(
        monkeypatch, capsys, *["--model", base, "--data", numbers, "--out", out, "--steps", 5, "--lr", 1e-2]
    )
    for words in (
        "numbers.json: Alpaca",
        "40 records",
        "tokenizer_config.json",
        "rank 8, alpha 16 on all",
        "parameters trained",
    ):
        assert words in said, words
    assert said.strip().splitlines()[-1] == f"next      python generate.py --model {base} --adapter {out / 'final'}"
    assert {"config.json", "metrics.jsonl", "loss.png", "best", "final"} <= {path.name for path in out.iterdir()}
    lines = plots.read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    wanted = "step loss lr grad_norm tokens trained_tokens tokens_per_s mfu seconds memory_mb".split()
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5] and all(list(line) == wanted for line in steps)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 1, 2, 3, 4, 5]
    settings = json.loads((out / "config.json").read_text())
    assert settings["lr"] == 1e-2 and settings["epochs"] is None and settings["seq_len"] == 512
    assert json.loads((out / "final" / "plaintune.json").read_text())["base"] == str(base.resolve())


def test_an_adapter_goes_on_where_it_stopped(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--steps", 3, "--lr", 1e-2, "--schedule", "constant"]
    whole_run(monkeypatch, capsys, *words, "--out", tmp_path / "first")
    whole_run(monkeypatch, capsys, *words, "--out", tmp_path / "second", "--adapter", tmp_path / "first" / "final")
    first, second = (
        [x for x in plots.read_metrics(tmp_path / n / "metrics.jsonl") if "val_loss" in x] for n in ("first", "second")
    )
    assert second[-1]["val_loss"] < second[0]["val_loss"] == first[-1]["val_loss"] < first[0]["val_loss"]


def test_patience_stops_a_run_that_gets_worse_and_best_is_kept(base, numbers, tmp_path, monkeypatch, capsys):
    """Other answers validate than are trained: better while the run learns to answer, worse when it knows its own."""
    others = [{"instruction": f"Say {n}", "output": "No, never: the dog runs."} for n in range(8)]
    (tmp_path / "others.json").write_text(json.dumps(others))
    words = ["--model", base, "--data", numbers, "--val", tmp_path / "others.json", "--method", "full", "--lr", 3e-3]
    words += ["--steps", 40, "--eval-every", 1, "--dtype", "fp32", "--warmup", 0, "--patience", 3]
    said = whole_run(monkeypatch, capsys, *words, "--out", tmp_path / "run")
    losses = [x["val_loss"] for x in plots.read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in x]
    assert 5 < len(losses) < 40 and losses.index(min(losses)) == len(losses) - 4
    assert "3 validations without a new best" in said and said.rstrip().endswith(f"--model {tmp_path / 'run' / 'best'}")
    sources = [load([file], load_tokenizer(base), 512) for file in (tmp_path / "others.json",)]
    model = load_model(tmp_path / "run" / "best")
    assert evaluator.validation_loss(model, sources[0], CPU) == pytest.approx(min(losses), abs=1e-4)


def test_a_run_that_only_gets_worse_says_so(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--method", "full", "--lr", 1.0, "--steps", 9, "--warmup", 0]
    said = whole_run(monkeypatch, capsys, *words, "--eval-every", 1, "--patience", 2, "--out", tmp_path / "run")
    assert "WARNING   no validation was better" in said and not (tmp_path / "run" / "best").exists()
    assert "2 validations without a new best" in said and "best/" not in said


def test_a_model_that_broke_is_not_saved(base, numbers, tmp_path, monkeypatch, capsys):
    """The last update is seen by no loss: validation and the weights themselves tell."""
    words = ["--model", base, "--data", numbers, "--steps", 1, "--lr", 1e8, "--alpha", 1e8, "--warmup", 0]
    monkeypatch.setattr(train, "make_optimizers", lambda model, *_: [Poison(model)])
    for more, what in (([], "the validation loss is nan"), (["--val-fraction", 0], "weights are no numbers")):
        out = tmp_path / what[-3:]
        _, err, code = command(train, monkeypatch, capsys, *words, *more, "--out", out)
        assert code == 2 and what in err and not (out / "final").exists() and not (out / "best").exists()


class Poison(torch.optim.SGD):
    """One step that leaves NaN behind."""

    def __init__(self, model):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=1.0)

    @torch.no_grad()
    def step(self, found_inf):
        self.param_groups[0]["params"][0].fill_(math.nan)


def test_frozen_weights_of_a_full_run_are_not_even_rounded(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--method", "full", "--train", r"layers\.1\.mlp", "--steps", 2]
    said = whole_run(monkeypatch, capsys, *words, "--dtype", "bf16", "--lr", 1e-3, "--out", tmp_path / "run")
    assert "bfloat16" in said
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "run" / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_an_adapter_brings_its_base_and_its_shape(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--data", numbers, "--steps", 2, "--lr", 1e-2]
    monkeypatch.chdir(base.parent)
    shape = ["--rank", 4, "--alpha", 6, "--targets", "q_proj,down_proj"]
    whole_run(monkeypatch, capsys, *words, *shape, "--model", base.name, "--out", tmp_path / "first")
    adapter = tmp_path / "first" / "final"
    monkeypatch.chdir(tmp_path)  # where the relative path of the base means nothing
    said = whole_run(monkeypatch, capsys, *words, "--adapter", adapter, "--out", tmp_path / "second")
    assert str(base) in said and "WARNING" not in said
    settings = json.loads((tmp_path / "second" / "config.json").read_text())
    assert [settings[name] for name in ("rank", "alpha", "dropout", "targets")] == [4, 6, 0, "down_proj,q_proj"]
    other = chat_base(tmp_path / "other", seed=7)
    words += ["--model", other, "--adapter", adapter, "--out", tmp_path / "third"]
    assert "WARNING" in whole_run(monkeypatch, capsys, *words)


def test_overwrite_replaces_what_the_run_wrote_and_nothing_else(base, numbers, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ["--model", base, "--data", numbers, "--out", out, "--steps"]
    whole_run(monkeypatch, capsys, *words, 3, "--rank", 4)
    (out / "notes.txt").write_text("mine")
    assert (out / "best").exists()
    whole_run(monkeypatch, capsys, *words, 1, "--val-fraction", 0, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and not (out / "best").exists()
    assert len(plots.read_metrics(out / "metrics.jsonl")) == 1
    _, err, code = command(train, monkeypatch, capsys, *words, 1, "--adapter", out / "final", "--overwrite")
    assert code == 2 and "would be gone" in err and (out / "final" / "adapter_config.json").exists()


def test_the_final_folder_holds_all_that_a_server_needs(base, numbers, tmp_path, monkeypatch, capsys):
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "plaintune.json", "README.md"}
    made = {"lora": {"adapter_config.json", "adapter_model.safetensors"}, "full": {"config.json", "model.safetensors"}}
    for method, files in made.items():
        out = tmp_path / method
        whole_run(
            monkeypatch, capsys, "--model", base, "--data", numbers, "--steps", 1, "--method", method, "--out", out
        )
        assert files | tokenizer <= {path.name for path in (out / "final").iterdir()}
        assert {path.name for path in (out / "final").iterdir()} - {"generation_config.json"} == files | tokenizer


def test_a_bf16_base_stays_bf16_on_disk(numbers, tmp_path, monkeypatch, capsys):
    folder = chat_base(tmp_path / "base", dtype=torch.bfloat16)
    words = ["--model", folder, "--data", numbers, "--steps", 1, "--method", "full", "--out", tmp_path / "run"]
    whole_run(monkeypatch, capsys, *words)
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_seed_and_eval_every_and_repeated_data_are_heard(base, numbers, tmp_path, monkeypatch, capsys):
    (tmp_path / "more.json").write_text(json.dumps([{"instruction": "More", "output": "Yes."}] * 8))
    words = ["--model", base, "--data", numbers, "--data", tmp_path / "more.json", "--steps", 4, "--eval-every", 3]
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        said = whole_run(monkeypatch, capsys, *words, "--seed", seed, "--out", out)
        assert "numbers.json" in said and "more.json" in said
        lines = plots.read_metrics(out / "metrics.jsonl")
        assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 4]
        found.append([line["loss"] for line in lines if "loss" in line])
    assert found[0] == found[1] != found[2]


def test_defaults_follow_method_data_and_width(tmp_path):
    llama(tmp_path / "base")
    config = read_config(tmp_path / "base")  # hidden size 64

    def chosen(examples: int, **typed) -> tuple[Flags, int]:
        flags, steps_per_epoch = choose_steps(Flags(**typed), Sampler([], [examples], [examples], 0))
        flags, _ = choose_optimization(flags, config)
        return flags, steps_per_epoch

    for examples, epochs in ((100, 3.0), (600, 2.0), (1600, 1.0)):
        flags, steps_per_epoch = chosen(examples)
        assert steps_per_epoch == math.ceil(examples / 8)
        assert flags.epochs == epochs and flags.steps == round(epochs * math.ceil(examples / 8))
        assert flags.warmup == round(0.05 * flags.steps) and flags.eval_every == math.ceil(flags.steps / 5)
    assert flags.weight_decay == 0 and flags.lr == pytest.approx(5e-4 * (2000 / 64) ** 0.78, rel=0.05)
    full, _ = chosen(100, method="full", steps=7)
    assert full.steps == 7 and full.weight_decay == 0.01 and full.lr == pytest.approx(flags.lr / 10, rel=0.05)
    with pytest.raises(UserError, match="--warmup 9"):
        chosen(100, steps=9, warmup=9)


@pytest.mark.parametrize(
    ("typed", "factor"),
    [({}, 2), ({"method": "qlora"}, 2), ({"data": ("a.json",)}, 1), ({"model": "folder"}, 1), ({"shard": "full"}, 1)],
)
def test_the_short_bundled_task_has_a_higher_rate_and_says_so(tmp_path, typed, factor):
    llama(tmp_path / "base")
    config = read_config(tmp_path / "base")
    flags, remark = choose_optimization(Flags(steps=20, **({"shard": "none"} | typed)), config)
    usual, _ = choose_optimization(Flags(steps=20, **(typed | {"data": ("a.json",)})), config)
    assert flags.lr == pytest.approx(factor * usual.lr, rel=0.05)
    assert remark == (" (2 times the default, since it is short)" if factor == 2 else "")
    given, remark = choose_optimization(Flags(steps=20, shard="none", lr=1e-4), config)
    assert given.lr == 1e-4 and remark == ""


def test_a_mixed_packed_run_with_replay(base, numbers, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": f"{i} {i}"}) for i in range(30)))
    (tmp_path / "general.txt").write_text(" ".join(str(i * i) for i in range(900)))
    words = ["--model", base, "--data", f"{numbers}=3", f"{other}=1", "--replay", f"{tmp_path / 'general.txt'}=0.25"]
    words += ["--pack", "--seq-len", 128, "--batch-size", 2, "--steps", 6, "--eval-every", 3, "--out", tmp_path / "run"]
    said = whole_run(monkeypatch, capsys, *words, "--log-every", 1)
    assert re.search(r"of 6: loss \d+\.\d{4} \(of the replay \d+\.\d{4}\), ", said)
    draws = dict(re.findall(r"draws an epoch ([\d,]+) of \S*?(\w+\.\w+):", said))
    draws = {name: int(count) for count, name in draws.items()}
    total = sum(draws.values())
    assert draws["general.txt"] == pytest.approx(0.25 * total, abs=1)
    assert draws["numbers.json"] == pytest.approx(3 * draws["other.jsonl"], abs=3)
    assert re.search(r"packed +[\d,]+ examples in [\d,]+ rows of 128 tokens, \d\d\.\d% full", said)
    assert "6 steps of 2 x 1 rows" in said and ", replay loss " in said
    lines = plots.read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps, validations = [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
    assert all(128 < x["tokens"] <= 256 for x in steps) and all("replay_val_loss" in x for x in validations)
    replayed = [x["replay_loss"] for x in steps if "replay_loss" in x]
    assert replayed and all(0 < loss < 20 for loss in replayed)


def test_packing_trains_the_same_tokens(base, numbers, tmp_path, monkeypatch, capsys):
    totals = []
    for pack in ("--pack", "--no-pack"):
        words = ["--model", base, "--data", numbers, pack, "--seq-len", 256, "--epochs", 1, "--val-fraction", 0]
        whole_run(monkeypatch, capsys, *words, "--out", tmp_path / pack)
        lines = plots.read_metrics(tmp_path / pack / "metrics.jsonl")
        totals.append((sum(x["tokens"] for x in lines), sum(x["trained_tokens"] for x in lines), len(lines)))
    assert totals[0][:2] == totals[1][:2] and totals[0][2] < totals[1][2]


def test_a_plain_text_is_gone_on_with_and_validated(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(" ".join(str(i * i) for i in range(900)))
    words = ["--model", base, "--data", tmp_path / "text.txt", "--seq-len", 64, "--steps", 2, "--out", tmp_path / "run"]
    said = whole_run(monkeypatch, capsys, *words)
    assert "template" not in said and "validation loss" in said and said.rstrip().endswith(" --complete")


def test_an_end_of_turn_that_no_config_lists_is_said(numbers, tmp_path, monkeypatch, capsys):
    """A server reads eos_token_id, and would run on after the answers' end."""
    folder = chat_base(tmp_path / "base")
    words = ["--model", folder, "--data", numbers, "--steps", 1, "--out"]
    assert "NOTE: answers end with" not in whole_run(monkeypatch, capsys, *words, tmp_path / "1")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    for name in ("config.json", "generation_config.json"):
        listed = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(listed | {"eos_token_id": 0}))
    said = whole_run(monkeypatch, capsys, *words, tmp_path / "2")
    assert "NOTE: answers end with '<|im_end|>', id 2" in said


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20260101-000000-lora")
    assert len({run_folder.make_run_folder(Flags(), FolderLock()) for _ in range(3)}) == 3


def test_profile_prints_a_table_and_writes_a_trace(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--out", tmp_path / "run", "--steps", 9, "--profile", 2]
    said = whole_run(monkeypatch, capsys, *words)
    assert "Self CPU" in said and "aten::mm" in said
    assert json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert len(plots.read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--steps", 4, "--lr", 1e-2, "--dtype", "fp32", "--compile"]
    if not shutil.which("g++"):
        _, err, code = command(train, monkeypatch, capsys, *words, "on", "--out", tmp_path / "on")
        assert code == 2 and "needs g++" in err
        return
    found = []
    for state in ("off", "on"):
        said = whole_run(monkeypatch, capsys, *words, state, "--out", tmp_path / state)
        assert f"compiled blocks {state}" in said
        found.append(
            [line.get("loss", line.get("val_loss")) for line in plots.read_metrics(tmp_path / state / "metrics.jsonl")]
        )
    assert found[1] == pytest.approx(found[0], rel=0, abs=1e-4)
    assert found[1] != found[0], "nothing was compiled"
    first, second = (load_file(tmp_path / state / "final" / "adapter_model.safetensors") for state in ("off", "on"))
    assert first.keys() == second.keys()


def test_auto_compiles_where_it_pays(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)

    def choice(seconds: float, compiler: str) -> str:
        monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
        return choose_compile(Flags(), CPU, seconds)[0]

    monkeypatch.setattr(sys, "platform", "linux")
    assert choice(7200, "g++") == "on" and choice(120, "g++") == "off" and choice(7200, "gcc") == "off"


def test_wandb_logs_the_steps_offline(base, numbers, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["--model", base, "--data", numbers, "--out", tmp_path / "run", "--steps", 2, "--wandb", "plaintune-test"]
    whole_run(monkeypatch, capsys, *words)
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"tokens_per_s" in content and b"val_loss" in content and b"plaintune-test" in content


def test_without_flags_the_bundled_task_is_run_and_compared(tmp_path, monkeypatch, capsys):
    """The whole path on the real base, with few steps and items."""
    monkeypatch.setattr(train.Demo, "ITEMS", 4)
    monkeypatch.setattr(train.Demo, "FEW_SHOT_ITEMS", 2)
    said = whole_run(monkeypatch, capsys, "--steps", 2, "--out", tmp_path / "run")
    for words in (
        "Q4_1",
        "exact answers",
        "of 4",
        "of 2",
        "loss on general text",
        "trained parameters",
        "peak memory",
    ):
        assert words in said, words
    assert said.count("  base:  ") == said.count("  tuned: ") == 3
    # The report has the table and the answers.
    facts = read_facts(tmp_path / "run/report.html")
    assert table(facts["comparison"]) in said and [len(rows) for rows in facts["answers"]] == [4, 4, 3]
    assert [rows[0][1] for rows in facts["answers"]] == re.findall("^> (.*)$", said, re.MULTILINE)
    assert said.strip().splitlines()[-1] == f"next      python generate.py --adapter {tmp_path / 'run' / 'final'}"


@pytest.mark.slow
def test_the_bundled_task_is_learned_and_little_is_forgotten(tmp_path, monkeypatch, capsys):
    said = whole_run(monkeypatch, capsys, "--out", tmp_path / "run")
    exact = re.search(r"exact answers +([\d.]+) % of 200 +([\d.]+) % of 50 +([\d.]+) % of 200", said)
    assert float(exact[1]) < 5 and float(exact[3]) >= 90, said
    assert float(re.search(r"loss on general text.*\(([+-][\d.]+)\)", said)[1]) <= 0.15
    assert "Paris" in said.rpartition("tuned:")[2]


@needs_shared
@pytest.mark.slow
def test_alpaca_validation_loss_falls_on_the_default_base(tmp_path, monkeypatch, capsys):
    words = ["--data", SHARED / "alpaca_en_1k.json", "--val-fraction", 0.03, "--seq-len", 256, "--steps", 12]
    whole_run(monkeypatch, capsys, *words, "--eval-every", 12, "--out", tmp_path / "run")
    losses = [line["val_loss"] for line in plots.read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.01


BAD_FLAGS = {
    "--rank 0": "--rank 0: must be above 0",
    "--lr -1": "--lr -1: must be above 0",
    "--steps 0": "--steps 0: must be above 0",
    "--method lorra": "invalid choice: 'lorra'",
    "--bach-size 4": "--batch-size",
    "--val-fraction 1": "--val-fraction",
    "--dropout -0.5": "--dropout -0.5: must be 0 or more",
    "--method full --rank 4": "--rank: is for --method lora",
    "--adapter x --targets q_proj": "--targets: the adapter",
    "--val-fraction 0.1": "--val-fraction parts the files of --data",
    "--patience 2 --eval-every 0": "--patience",
    "--epochs 1e308": "--epochs 1e+308",
    "--seed 100000000000000": "--seed",
    "--model nowhere": "nowhere",
    "--method full --adapter x": "--adapter",
    "--method full --train (": "--train",
    "--steps 3 --epochs 2": "--steps and --epochs",
    "--lr nan": "--lr nan",
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags_end_in_one_line(tmp_path, words):
    command = [sys.executable, str(ROOT / "train.py"), *words.split(), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert BAD_FLAGS[words] in line and not (tmp_path / "run").exists()
