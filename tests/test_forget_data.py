"""--forget-data: the loss on a general file at each validation, its rise, and --forget-limit as a limit of it."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from support.helpers import chat_base, command, output_of, refusal_of, sentence
from support.runs import lines, records

import data
import evaluate
import train
from checkpoint import load_model
from evals.loss import loss
from flags import Flags
from lora import load_adapter
from tokenizer import load_tokenizer
from training import checkpointer, defaults
from training.best import best_or_final
from training.state import TrainState


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """words(more): the flags of a job of 12 steps that validates every 4 and unlearns a general text."""
    folder = tmp_path_factory.mktemp("task")
    base = chat_base(folder / "base", num_key_value_heads=2)
    answers = [{"prompt": sentence(i, 4), "completion": "blue dog"} for i in range(48)]
    files = {"data": folder / "data.jsonl", "val": folder / "val.jsonl", "general": folder / "general.txt"}
    for name, part in (("data", answers[:40]), ("val", answers[40:])):
        files[name].write_text("".join(json.dumps(each) + "\n" for each in part))
    files["general"].write_text("\n\n".join(sentence(900 + i, 120) for i in range(6)))

    def words(*more) -> list[str]:
        common = ["--model", base, "--data", files["data"], "--val", files["val"], "--forget-data", files["general"]]
        common += [
            "--steps",
            12,
            "--eval-every",
            4,
            "--rank",
            4,
            "--lr",
            0.01,
            "--schedule",
            "constant",
            "--seq-len",
            128,
        ]
        return list(map(str, [*common, "--dtype", "fp32", "--compile", "off", *more]))

    words.base, words.files = base, files
    return words


ran = functools.partial(output_of, train)
refused = functools.partial(refusal_of, train)


def rises_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["general_loss_rise"] for line in lines(run) if "general_loss_rise" in line}


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["general_loss"] for line in lines(run) if "general_loss" in line}


def test_the_rise_is_the_loss_of_the_result_minus_that_of_the_base(task, tmp_path, monkeypatch, capsys):
    """By evaluate.py's function, on the whole file."""
    run = tmp_path / "run"
    said = ran(monkeypatch, capsys, *task("--out", run))
    rises, losses = rises_of(run), losses_of(run)
    assert [*rises] == [0, 4, 8, 12] and rises[0] == 0
    general = data.load([task.files["general"]], load_tokenizer(task.base), 128)
    model = load_model(task.base)
    before = loss(model, general)["loss"]
    load_adapter(model, run / "final")
    after = loss(model, general)["loss"]
    assert losses[0] == pytest.approx(before, abs=1e-5) and losses[12] == pytest.approx(after, abs=1e-5)
    assert rises[12] == pytest.approx(after - before, abs=1e-5) and rises[12] > 0.01
    file = task.files["general"]
    everything = f"{len(general)} examples, which is all: {losses[0]:.4f} before the training"
    assert f"general   loss on {file} at each validation, {everything}\n" in said
    assert f", general loss {losses[8]:.4f} ({rises[8]:+.4f}), KL to the base " in said
    assert f"loss on general data, newest | {losses[12]:.4f} ({rises[12]:+.4f})" in " ".join(
        (run / "final/README.md").read_text().split()
    )
    words = ["loss", "--data", file, "--model", task.base, "--adapter", run / "final", "--versus", "base"]
    out, _, code = command(evaluate, monkeypatch, capsys, *words, "--seq-len", 128, "--dtype", "fp32")
    assert code == 0 and f"{losses[12]:.4f}" in out and f"{losses[0]:.4f}" in out


def test_best_is_the_best_whose_rise_is_under_the_limit(task, tmp_path, monkeypatch, capsys):
    words = task("--save-every", 4, "--keep", 1)
    ran(monkeypatch, capsys, *words, "--out", tmp_path / "free")
    rises = rises_of(tmp_path / "free")
    losses = {line["step"]: line["val_loss"] for line in lines(tmp_path / "free") if "val_loss" in line}
    assert losses[12] < losses[8] < losses[4] < losses[0] and 0 < rises[4] < rises[8] < rises[12]
    limit = (rises[4] + rises[8]) / 2

    run = tmp_path / "run"
    said = ran(monkeypatch, capsys, *words, "--forget-limit", limit, "--out", run)
    assert rises_of(run) == rises
    assert f"--forget-limit {limit:g} is a limit of its rise, not of the distance" in said
    assert f"({rises[8]:+.4f}, not under --forget-limit {limit:g}), KL to the base" in said
    assert (
        f"best/ is the best under --forget-limit {limit:g}: validation loss {losses[4]:.4f}, rise of the general loss"
        f" {rises[4]:+.4f} nats a token; final/ {losses[12]:.4f} and {rises[12]:+.4f}"
    ) in said
    assert said.rstrip().endswith(f"--adapter {run / 'best'}")
    assert [each.name for each in checkpointer.list_checkpoints(run / "checkpoints")] == ["step-4", "step-12"]

    said = ran(monkeypatch, capsys, *words, "--forget-limit", rises[4] / 2, "--out", tmp_path / "none")
    assert f"no validation was under --forget-limit {rises[4] / 2:g}, so there is no best/: the lowest rise" in said
    assert f"of the general loss was {rises[4]:.4f} nats a token" in said
    assert not (tmp_path / "none/best").exists()


def test_a_resumed_run_measures_against_the_same_base_on_the_same_examples(task, tmp_path, monkeypatch, capsys):
    """Also where it validated never before, and with more steps; another file is refused."""
    run = tmp_path / "run"
    words = task("--save-every", 4, "--keep", 9, "--out", run)
    ran(monkeypatch, capsys, *words)
    losses, rises = losses_of(run), rises_of(run)
    weights = (run / "final/adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-12")
    said = ran(monkeypatch, capsys, "--out", run, "--resume")
    assert (losses_of(run), rises_of(run)) == (losses, rises)
    assert f"{losses[0]:.4f} before the training" in said
    assert (run / "final/adapter_model.safetensors").read_bytes() == weights
    ran(monkeypatch, capsys, "--out", run, "--resume", "--steps", 16)
    assert [*rises_of(run)] == [0, 4, 8, 12, 16] and rises_of(run)[12] == rises[12]
    other = records(tmp_path / "other.jsonl", 9, 4)
    err = refused(monkeypatch, capsys, "--out", run, "--resume", "--steps", 20, "--forget-data", other)
    assert f"--forget-data {other}: holds other text than when the run was begun" in err


def test_a_run_that_was_begun_without_it_cannot_know_the_rise(task, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = task("--save-every", 4, "--out", run)
    place = words.index("--forget-data")
    file = words[place + 1]
    del words[place : place + 2]
    said = ran(monkeypatch, capsys, *words)
    assert rises_of(run) == {} and "general   " not in said
    err = refused(monkeypatch, capsys, "--out", run, "--resume", "--steps", 16, "--forget-data", file)
    assert "the run was begun without it, so the loss before the training is not known" in err


def test_with_one_validation_at_the_end_the_base_is_measured_all_the_same(task, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    ran(monkeypatch, capsys, *task("--eval-every", 0, "--out", run))
    [rise] = rises_of(run).values()
    assert rise > 0.01


def test_where_nothing_validates_it_is_refused(task, tmp_path, monkeypatch, capsys):
    words = ["--model", task.base, "--data", task.files["data"], "--forget-data", task.files["general"]]
    err = refused(monkeypatch, capsys, *words, "--val-fraction", 0, "--out", tmp_path / "run")
    assert "--forget-data: is measured at validations, and --val-fraction 0 has none" in err
    missing = ["--model", task.base, "--data", task.files["data"], "--forget-data", tmp_path / "no.txt"]
    assert "no.txt: no such file" in refused(monkeypatch, capsys, *missing, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_changes_no_bit_of_the_training(task, tmp_path, monkeypatch, capsys):
    ran(monkeypatch, capsys, *task("--dropout", 0.3, "--out", tmp_path / "with"))
    words = task("--dropout", 0.3, "--out", tmp_path / "without")
    place = words.index("--forget-data")
    del words[place : place + 2]
    ran(monkeypatch, capsys, *words)
    files = [(tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]


class Ordered:
    """Stands for a sampler, of whose epoch only the number of tokens counts."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def epoch_tokens(self) -> int:
        return self.tokens


def test_the_number_of_examples_takes_a_twentieth_of_the_training(task):
    general = data.load([task.files["data"]], load_tokenizer(task.base), 128)

    def choose(tokens: int) -> tuple[int, str]:
        parts = data.TrainingData(general, general, None, Ordered(tokens), 128, None, False, general)
        return defaults.choose_general_examples(Flags(steps=10, eval_every=5), parts, 10)

    mean = general.tokens / len(general)
    # Before step 1, after 5 and after 10; a token that has no backward takes half as long.
    assert choose(round(3 * 20.5 * mean / 2 / 0.05)) == (20, "20 of 40 examples, chosen by their hash")
    assert choose(10)[0] == 16
    assert choose(10**9) == (40, "40 examples, which is all")


def test_a_state_keeps_the_general_losses(capsys):
    state = TrainState(step=4, validated_at=4, val_loss=2.0, general_examples=7, general_digest="ab")
    state.first_general_loss, state.general_loss, state.lowest_general_loss = 3.0, 3.5, 3.25
    again = TrainState.from_dict(json.loads(json.dumps(state.as_dict())))
    assert (again.first_general_loss, again.general_loss, again.lowest_general_loss) == (3.0, 3.5, 3.25)
    assert (again.general_examples, again.general_digest) == (7, "ab")
    best_or_final(Flags(forget_limit=0.5, forget_data="a.txt"), again)
    assert "no validation under --forget-limit 0.5 was better than the" in capsys.readouterr().out
