"""Labels of classes and judgments: their order, what is none, and KTO where there is one answer alone."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.helpers import chat_base, refusal_of
from support.runs import ROOT

import data
import train
from checkpoint import load_model
from dataset.encoding import AS_CLASSES, AS_JUDGED
from dataset.whole_examples import labels_of_rows, with_partners
from objectives import make_objective, text_logps
from tokenizer import load_tokenizer


def rows_of(*labels: str) -> list:
    """As tokenised rows, of which only the labels are asked for."""
    return [SimpleNamespace(kind=AS_CLASSES, label_names=list(labels))]


def test_the_order_of_classes_follows_from_their_names_alone():
    program = "from types import SimpleNamespace as S; from dataset.whole_examples import labels_of_rows as f;"
    program += f"print(f([S(kind={AS_CLASSES!r}, label_names=['1', '00', '10', '0', '01', '2'])]))"
    found = set()
    for seed in ("1", "2", "3"):
        line = [sys.executable, "-c", program]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        found.add(subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)
    assert found == {"('0', '00', '01', '1', '2', '10')\n"}
    assert labels_of_rows(rows_of("9" * 5000, "10", "9")) == ("10", "9", "9" * 5000)
    assert labels_of_rows(rows_of("red", "10", "9")) == ("10", "9", "red")


@pytest.mark.parametrize("name", ["pairs", "judged"])
def test_a_judgment_is_no_class(tmp_path, monkeypatch, capsys, name):
    pair = {"prompt": "Is it so?", "chosen": "yes", "rejected": "no"}
    judged = {"prompt": "Is it so?", "completion": "yes", "label": False}
    file = tmp_path / "data.json"
    file.write_text(json.dumps([pair if name == "pairs" else judged] * 20))
    base = chat_base(tmp_path / "base")
    words = ["--model", base, "--data", file, "--objective", "classify", "--out", tmp_path / "run"]
    error = refusal_of(train, monkeypatch, capsys, *words)
    assert "--objective classify wants texts with a class" in error and not (tmp_path / "run").exists()


def test_a_single_judged_answer_has_no_divergence(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps([{"prompt": "Is it so?", "completion": "yes", "label": True}]))
    base = chat_base(tmp_path / "base")
    dataset = with_partners(data.load([file], load_tokenizer(base), 128, kind=AS_JUDGED))
    assert dataset.examples[0].mismatched is None
    settings = SimpleNamespace(objective="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    model = load_model(base).train()
    objective = make_objective(settings, lambda batch: text_logps(model, batch).detach() - 3.0)
    batch = data.collate([dataset.examples[0]], whole=True)
    _, totals = objective.begin_step(model, [batch], 0, 0)
    assert float(totals.kl) == 0.0
    measured = objective.validate(model, [batch], lambda sums: None)
    assert measured["kl"] == 0.0 and measured["loss"] == pytest.approx(1 / (1 + math.exp(0.3)), rel=1e-4)
