"""The change of the validation loss over its examples: the numbers of `evaluate.py loss`, in one order however many
ranks there are."""

import json

import numpy as np
import pytest
import torch
from support.helpers import chat_base, output_of
from support.runs import ROOT, records, torchrun

import distributed
import train
from checkpoint import load_model
from data import load
from evals.bootstrap import paired_interval
from evals.loss import example_losses
from lora import load_adapter
from tokenizer import load_tokenizer
from training.validation import validation_loss
from training.validation_change import ValidationChange


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("change")
    base = chat_base(folder / "base")
    train_file, val_file = records(folder / "train.json", 12, 0), records(folder / "val.json", 11, 500)
    words = ["--model", base, "--data", train_file, "--val", val_file, "--steps", 6, "--lr", "5e-3", "--batch-size", 2]
    words += ["--device", "cpu", "--dtype", "fp32", "--compile", "off", "--eval-every", 3, "--val-limit", 0]
    return base, val_file, words


def test_the_change_is_that_of_evaluate_s_losses(job, tmp_path, monkeypatch, capsys):
    base, val_file, words = job
    out = tmp_path / "run"
    output_of(train, monkeypatch, capsys, *words, "--out", out)
    page = (out / "report.html").read_text()
    facts = json.loads(page.partition('id="facts">')[2].partition("</script>")[0])
    (_, row) = facts["changes"]

    tokenizer = load_tokenizer(base)
    dataset = load([val_file], tokenizer, 512)
    model = load_model(base)
    before = example_losses(model, dataset)
    load_adapter(model, out / "final")
    after = example_losses(model, dataset)
    means = [each.columns()["loss"] for each in (before, after)]
    interval = paired_interval(before.weighted_nats, after.weighted_nats, before.weights, after.weights)
    assert row[1] == str(len(dataset)) == "11" and [float(cell) for cell in row[2:4]] == pytest.approx(means, abs=6e-5)
    low, high = (float(each) for each in row[5].split(" to "))
    # The bootstrap draws the same numbers of items, which stand in another order.
    assert (low, high) == pytest.approx(interval, abs=0.2 * (interval[1] - interval[0]))
    assert row[6] == ("better" if interval[1] < 0 else "unsure")


def sums_of(model, dataset, size: int, rank: int) -> list[torch.Tensor]:
    """What a rank's validation gives."""
    sums: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "dp_size", lambda: size)
        patch.setattr(distributed, "dp_rank", lambda: rank)
        patch.setattr("training.validation.VALIDATION_BATCH", 2)
        validation_loss(model, dataset, torch.device("cpu"), sums=sums)
    return sums


def test_the_examples_stand_in_one_order_for_any_number_of_ranks(job, tmp_path, monkeypatch):
    base, val_file, _ = job
    model, dataset = load_model(base), load([val_file], load_tokenizer(base), 512)
    kept = []
    for size in (1, 2, 3):
        of_ranks = [sums_of(model, dataset, size, rank) for rank in range(size)]
        monkeypatch.setattr(distributed, "all_gather_object", lambda _, of_ranks=of_ranks: of_ranks)
        change = ValidationChange(tmp_path)
        change.take(3, of_ranks[0])
        kept.append(change.newest)
    assert kept[0].shape == (2, 11)
    for each in kept[1:]:
        torch.testing.assert_close(each, kept[0])
    losses = example_losses(model, dataset)
    assert np.sort(kept[0][0].numpy()) == pytest.approx(np.sort(losses.weighted_nats), abs=1e-4)


def test_a_resumed_run_reads_what_stood_before_it_and_another_set_of_examples_is_no_pair(tmp_path):
    first, newest = torch.tensor([[4.0, 2.0], [2.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    ValidationChange(tmp_path).take(0, [first])
    resumed = ValidationChange(tmp_path)
    assert resumed.change() is None
    resumed.take(8, [newest])
    found = resumed.change()
    assert (found.items, found.base, found.tuned) == (2, 2.0, 1.0) and found.interval == (-1.0, -1.0)
    resumed.take(9, [torch.cat([newest, newest], 1)])
    assert resumed.change() is None
    (tmp_path / "validation.safetensors").write_bytes(b"no")
    damaged = ValidationChange(tmp_path)
    damaged.take(8, [newest])
    assert damaged.change() is None
    # Ranks that share a batch have no losses of examples.
    shared = ValidationChange(tmp_path)
    shared.take(0, [])
    assert shared.first is None


@pytest.mark.slow
def test_two_processes_find_the_change_of_one(job, tmp_path, monkeypatch, capsys):
    _, _, words = job
    output_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "one")
    torchrun(2, ROOT / "train.py", *words, "--out", tmp_path / "two", "--batch-size", 1)
    rows = []
    for name in ("one", "two"):
        page = (tmp_path / name / "report.html").read_text()
        rows.append(json.loads(page.partition('id="facts">')[2].partition("</script>")[0])["changes"][1])
    assert rows[0][1] == rows[1][1]
    numbers = [[float(cell) for cell in (*row[2:5], *row[5].split(" to "))] for row in rows]
    assert numbers[1] == pytest.approx(numbers[0], abs=5e-4)
