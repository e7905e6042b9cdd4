"""evaluate.py classify: probabilities of labels against transformers, metrics against their definitions."""

import csv
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics
from support.helpers import chat_base, command, sentence

import evaluate
import train
from checkpoint import load_model
from common.errors import run
from evals import classification
from evals.arguments import evaluation_arguments
from evals.choices import log_likelihoods
from evals.classification import classification_scores, expected_calibration_error, label_probs
from evals.targets import Opened
from tokenizer import load_tokenizer

LABELS = ["blue", "green fox", "red", "河"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


def write_csv(path: Path, labels: list[str], columns: tuple[str, str] = ("text", "category")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i, label in enumerate(labels):
            writer.writerow([sentence(i, 3 + i % 5), label])
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write_csv(tmp_path / "test.csv", [LABELS[i % 4] for i in range(18)])


def task_of(*words) -> classification.ChoiceTask:
    args = evaluation_arguments(["classify", "--dtype", "fp32", "--device", "cpu", *map(str, words)])
    return classification.read_classes(args, Opened(args))


# ---- probabilities ----


def test_label_probabilities_equal_transformers_with_the_end_token(base, file):
    model, tokenizer = load_model(base), load_tokenizer(base)
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    task = task_of("--data", file, "--model", base, "--calibrate")
    ours = log_likelihoods(model, task.encode(tokenizer, 512), 64)
    questions = [question.context for question in task.questions] + ["N/A", "[MASK]", ""]
    assert len(ours) == len(questions) == 18 + 3
    for text, values in zip(questions, ours, strict=True):
        ask = [{"role": "user", "content": text}]
        prompt = their_tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=True)["input_ids"]
        for label, value in zip(LABELS, values, strict=True):
            answered = [*ask, {"role": "assistant", "content": label}]
            ids = their_tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
            # Behind <|im_end|>: the line end after it isn't trained.
            end = len(ids) - ids[::-1].index(their_tokenizer.eos_token_id)
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(prompt), end))
            assert value == pytest.approx(wanted, abs=1e-4)


def test_calibration_divides_by_the_mean_of_texts_that_say_nothing():
    rng = np.random.default_rng(0)
    likelihoods = rng.normal(-9, 3, (5 + 3, 4)).tolist()
    probs = label_probs(likelihoods, 5)
    prior = [0.0] * 4
    for row in likelihoods[5:]:
        total = sum(math.exp(value) for value in row)
        prior = [p + math.exp(value) / total / 3 for p, value in zip(prior, row, strict=True)]
    for row, mine in zip(likelihoods[:5], probs, strict=True):
        scaled = [math.exp(value) / p for value, p in zip(row, prior, strict=True)]
        assert mine.tolist() == pytest.approx([value / sum(scaled) for value in scaled])
    uncalibrated = label_probs(likelihoods[:5], 5)
    assert not np.allclose(probs, uncalibrated) and np.allclose(uncalibrated.sum(1), 1)


def test_a_label_as_likely_as_after_nothing_has_no_advantage():
    liked = [[-1.0, -5.0]] * 3
    probs = label_probs([[-1.0, -5.0], [-1.0, -4.0], *liked], 2)
    assert probs[0].tolist() == pytest.approx([0.5, 0.5])
    assert probs[1].argmax() == 1


def test_a_label_beyond_what_a_float_holds_is_a_number_still():
    probs = label_probs([[-1.0, -2000.0], [-2.0, -1.0], *[[-1.0, -1500.0]] * 3], 2)
    assert np.isfinite(probs).all() and probs.round(9).tolist() == [[1, 0], [0, 1]]


# ---- metrics ----


def test_labels_that_begin_alike_have_rows_of_their_own():
    long = "The customer asks about the delivery of a card to"
    labels = [f"{long} an address", f"{long} a shop", "other", "a\nb", "x" * 41, "x" * 42]
    gold = np.arange(6)
    rows = classification_scores(gold, np.eye(6), labels, 6).parts
    assert [*rows] == [labels[0], labels[1], "other", "a\\nb", "x" * 41, "x" * 42]
    assert all(row["n"] == 1 for row in rows.values())


def area_by_counting(is_class: list[bool], scores: list[float]) -> float:
    """The share of pairs of a record of the class and another one in which the first has the higher score."""
    inside = [score for score, mine in zip(scores, is_class, strict=True) if mine]
    outside = [score for score, mine in zip(scores, is_class, strict=True) if not mine]
    wins = sum((a > b) + (a == b) / 2 for a in inside for b in outside)
    return wins / len(inside) / len(outside)


def f1_by_counting(gold: list[int], chosen: list[int], label: int) -> tuple[float, float, float]:
    both = sum(a == b == label for a, b in zip(gold, chosen, strict=True))
    precision = both / chosen.count(label) if label in chosen else 0.0
    recall = both / gold.count(label) if label in gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return precision, recall, f1


def calibration_by_counting(confidence: list[float], hits: list[bool]) -> float:
    error = 0.0
    for low in range(15):
        mine = [i for i, value in enumerate(confidence) if low / 15 < value <= (low + 1) / 15]
        if mine:
            error += abs(sum(hits[i] for i in mine) - sum(confidence[i] for i in mine))
    return error / len(hits)


@pytest.mark.parametrize("number", range(200))
def test_metrics_equal_their_definitions(number):
    rng = np.random.default_rng(number)
    num_labels = int(rng.integers(2, 7))
    num_records = int(rng.integers(1, 40))
    probs = rng.dirichlet([0.5] * num_labels, num_records)
    if number % 4 == 0:  # ties
        probs = np.round(probs, 1) + 0.05
        probs /= probs.sum(1, keepdims=True)
    gold = rng.integers(0, num_labels, num_records)
    if number % 10 == 0:  # one class
        gold[:] = 1
    labels = [f"label {i}" for i in range(num_labels)]
    scores = classification_scores(gold, probs, labels, 5)
    truth, chosen = gold.tolist(), probs.argmax(1).tolist()
    hits = [a == b for a, b in zip(truth, chosen, strict=True)]
    occur = sorted({*truth, *chosen})
    each = [f1_by_counting(truth, chosen, label) for label in occur]
    precision, recall, f1 = np.mean(each, 0)
    wanted = {
        "records": num_records,
        "accuracy %": 100 * np.mean(hits),
        "precision %": 100 * precision,
        "recall %": 100 * recall,
        "macro F1 %": 100 * f1,
        "micro F1 %": 100 * np.mean(hits),
        "ECE %": 100 * calibration_by_counting(probs.max(1).tolist(), hits),
    }
    for name, value in wanted.items():
        assert scores.columns[name] == pytest.approx(value, abs=1e-9), name
    areas = []
    for label in range(num_labels):
        if 0 < truth.count(label) < num_records:
            areas.append(area_by_counting([each == label for each in truth], probs[:, label].tolist()))
    if areas:
        assert scores.columns["ROC-AUC"] == pytest.approx(np.mean(areas))
    else:
        assert math.isnan(scores.columns["ROC-AUC"])
    for label, (p, r, f) in zip(occur, each, strict=True):
        row = scores.parts[labels[label]]
        assert [row["precision %"], row["recall %"], row["F1 %"]] == pytest.approx([100 * p, 100 * r, 100 * f])
        assert row["n"] == truth.count(label)
    assert scores.items["accuracy"] == hits and scores.chosen == chosen
    assert scores.items["p(right)"] == [probs[i, label] for i, label in enumerate(truth)]


UNICODE = ["河", "über", "Σ σ", "a\u0301", "naïve café", "🦊", "red"]
EDGES = ("random", "ties", "one class", "a label once", "one record", "never chosen")


@pytest.mark.parametrize("number", range(210))
def test_metrics_equal_scikit_learn_s(number):
    """By the names of the labels, which scikit-learn sorts and counts itself."""
    edge = EDGES[number % len(EDGES)]
    rng = np.random.default_rng(1000 + number)
    names = UNICODE[: int(rng.integers(2, 8))]
    num_records = 1 if edge == "one record" else int(rng.integers(len(names) + 1, 60))
    probs = rng.dirichlet([0.7] * len(names), num_records)
    gold = rng.integers(0, len(names), num_records)
    if edge == "ties":
        probs = np.full_like(probs, 1 / len(names))
    if edge == "one class":
        gold[:] = 1
    if edge == "a label once":
        gold = np.where(gold == 0, 1, gold)
        gold[0] = 0
    if edge == "never chosen":
        probs[:, 0] = 0
        probs /= probs.sum(1, keepdims=True)
    scores = classification_scores(gold, probs, names, 5)
    right = [names[i] for i in gold]
    # The first of equally probable ones.
    chosen = [names[max(range(len(names)), key=lambda i: (row[i], -i))] for row in probs]
    report = metrics.classification_report(right, chosen, output_dict=True, zero_division=0)
    assert scores.columns["accuracy %"] == pytest.approx(100 * metrics.accuracy_score(right, chosen))
    for column, key in (("precision %", "precision"), ("recall %", "recall"), ("macro F1 %", "f1-score")):
        assert scores.columns[column] == pytest.approx(100 * report["macro avg"][key])
    micro = metrics.f1_score(right, chosen, average="micro")
    assert scores.columns["micro F1 %"] == pytest.approx(100 * micro)
    assert {*scores.parts} == {*right, *chosen}
    for name, row in scores.parts.items():
        wanted = report[name]
        assert row["n"] == wanted["support"]
        found = [row["precision %"], row["recall %"], row["F1 %"]]
        assert found == pytest.approx([100 * wanted[key] for key in ("precision", "recall", "f1-score")])
    occur = sorted({*gold.tolist()})
    if len(occur) == 1:
        assert math.isnan(scores.columns["ROC-AUC"])
    elif len(names) == 2:
        assert scores.columns["ROC-AUC"] == pytest.approx(metrics.roc_auc_score(gold == 1, probs[:, 1]))
    elif len(occur) == len(names):
        area = metrics.roc_auc_score(gold, probs, multi_class="ovr")
        assert scores.columns["ROC-AUC"] == pytest.approx(area)


def test_a_confidence_on_the_edge_belongs_to_the_lower_bin():
    hits = np.array([True, False, True])
    assert expected_calibration_error(np.array([1.0, 1.0, 1.0]), hits) == pytest.approx(1 / 3)
    assert expected_calibration_error(np.array([0.0, 0.01]), np.array([False, False])) == pytest.approx(0.005)


# ---- the command ----


def test_a_csv_with_a_label_column_is_trained_and_classified_with_no_flag_more(base, tmp_path, monkeypatch, capsys):
    train_file = write_csv(tmp_path / "train.csv", ["red", "blue"] * 12)
    test_file = write_csv(tmp_path / "test.csv", ["red", "blue"] * 12)
    words = ["--model", base, "--data", train_file, "--out", tmp_path / "run", "--steps", "40", "--lr", "1e-2"]
    words += ["--device", "cpu", "--dtype", "fp32", "--compile", "off", "--eval-every", "0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    run(train.main)
    capsys.readouterr()
    words = ["classify", "--data", test_file, "--adapter", tmp_path / "run" / "final", "--versus", "base"]
    picture = tmp_path / "matrix.png"
    words += ["--dtype", "fp32", "--device", "cpu", "--picture", picture, "--show", "1"]
    out, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0, err
    lines = out.splitlines()
    assert "          2 labels: blue, red" in lines
    heading = next(line for line in lines if "macro F1 %" in line).split("  ")
    assert [cell.strip() for cell in heading if cell.strip()] == [
        *("records", "accuracy %", "±", "precision %", "recall %", "macro F1 %", "micro F1 %", "ROC-AUC", "ECE %")
    ]
    rows = [line.split() for line in lines if line.split()[1:2] == ["24"]]
    assert [row[0] for row in rows[:2]] == ["base", "adapter"]
    before, after = rows[:2]
    # The texts of the test file are those that it was trained on.
    assert float(after[2]) > 90 > float(before[2])
    assert f"adapter: confusion matrix: {picture}" in lines
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The base has one of its own.
    other = tmp_path / "matrix.base.png"
    assert f"base: confusion matrix: {other}" in lines and other.read_bytes() != picture.read_bytes()
    assert "right \\ chosen  blue  red" in out


def test_many_classes_are_shortened_and_named(monkeypatch):
    labels = [f"class {i}" for i in range(20)]
    gold = np.arange(60) % 20
    probs = np.full((60, 20), 0.01)
    probs[np.arange(60), gold] = 0.81
    probs[gold == 3] = np.roll(probs[gold == 3], 2, axis=1)  # all of class 3 are taken for class 5
    scores = classification_scores(gold, probs, labels, 2)
    assert scores.notes == [
        "3 of 3 'class 3' taken for 'class 5'",
        "WARNING: 1 of the 20 labels that occur are never predicted: class 3",
        "the 2 of 20 classes with the lowest F1 (--show 20: all)",
    ]
    assert list(scores.parts) == ["class 3", "class 5"]
    assert len(classification_scores(gold, probs, labels, 20).parts) == 20


def test_labels_that_look_alike_are_warned_of(capsys):
    classification.warn_of_like_labels(["neg", "pos", "pos ", "Neg"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(", which")[0] for line in said] == [
        "WARNING: 'pos' and 'pos ' are two labels",
        "WARNING: 'neg' and 'Neg' are two labels",
    ]
    classification.warn_of_like_labels(["a b", "ab"])
    assert capsys.readouterr().out == ""


def test_labels_that_occur_once_are_warned_of(base, tmp_path, monkeypatch, capsys):
    file = write_csv(tmp_path / "test.csv", ["red"] * 4 + ["blue", "green"])
    out, _, code = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base)
    assert code == 0
    assert "WARNING: 2 labels occur once, so their own scores mean little: blue, green" in out
    file = write_csv(tmp_path / "one.csv", ["red"] * 4 + ["blue"])
    out, _, _ = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base)
    assert "WARNING: 1 label occurs once, so its own scores mean little: blue" in out


def test_an_empty_text_is_classified_and_columns_of_other_names_are_refused(base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "test.csv"
    file.write_text("text,label\nred fox,a\n,b\nblue,a\n河,b\n", encoding="utf-8")
    out, err, code = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base)
    assert code == 0, err
    assert ["model", "4"] in [line.split()[:2] for line in out.splitlines()]
    file.write_text("sentence,klass\nred fox,a\nblue,b\n", encoding="utf-8")
    _, err, code = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base)
    assert code == 2 and f"{file} row 1: keys 'sentence', 'klass': no known format" in err
    assert len(err.strip().splitlines()) == 1


def test_labels_of_a_file_are_scored_as_well(base, file, tmp_path, monkeypatch, capsys):
    names = tmp_path / "labels.txt"
    names.write_text("\n".join([*LABELS, "never"]) + "\n", encoding="utf-8")
    out, _, code = command(
        evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base, "--labels", names
    )
    assert code == 0 and "5 labels: blue, green fox, red, 河, never" in out


ERRORS = [  # labels of the file, further words, message
    (
        ["red"] * 5,
        [],
        "{file}: every record has the label 'red'; name the other labels by `evaluate.py classify --labels",
    ),
    (
        [f"answer {i}" for i in range(20)],
        [],
        "{file}: 20 different answers in 20 records are no classes; use `exact`, or name the labels by `evaluate",
    ),
    (["red", "blue"], ["--labels", "{labels}"], "{file} row 2: its label 'blue' is not in --labels {labels}"),
    (["red", "blue"], ["--picture", "a.jpg"], "--picture a.jpg: a PNG is drawn; name it FILE.png"),
    (["red", "blue"], ["--picture", "none/a.png"], "--picture none/a.png: there is no folder none"),
    (["red", "blue"], ["--shots", "2"], "--shots: is for `choices`; `classify` does not use it"),
    (["red", "blue"], ["--max-new-tokens", "2"], "--max-new-tokens: is for answers; `classify` does not use it"),
]


@pytest.mark.parametrize("labels, words, message", ERRORS)
def test_a_mistake_ends_with_one_line(labels, words, message, base, tmp_path, monkeypatch, capsys):
    names = tmp_path / "labels.txt"
    names.write_text("red\ngreen\n")
    file = write_csv(tmp_path / "test.csv", labels)
    words = [word.format(labels=names) for word in words]
    _, err, code = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base, *words)
    assert code == 2
    assert err.strip().removeprefix("error: ").startswith(message.format(file=file, labels=names))


def test_a_text_that_is_too_long_is_named(base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "test.csv"
    file.write_text(f"text,label\nred fox,a\n{sentence(1, 900)},b\nblue,a\n", encoding="utf-8")
    _, err, code = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base)
    assert code == 2 and f"{file} row 2: " in err and "tokens before the label" in err and "takes 512" in err


def test_plain_text_has_no_label(base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps({"text": sentence(i, 5)}) for i in range(4)))
    _, err, code = command(evaluate, monkeypatch, capsys, "classify", "--data", file, "--model", base)
    assert code == 2 and "plain text has no reference answer to compare with" in err


def test_the_limit_draws_the_same_records_and_keeps_all_labels(base, tmp_path, capsys):
    labels = [random.Random(i).choice(LABELS) for i in range(40)]
    file = write_csv(tmp_path / "test.csv", labels)
    first = task_of("--data", file, "--model", base, "--limit", 6)
    again = task_of("--data", file, "--model", base, "--limit", 6)
    assert first.questions == again.questions and len(first.questions) == 6
    assert first.questions[0].choices == sorted(LABELS)
    for question in first.questions:
        row = int(question.where.split()[-1]) - 1
        assert question.choices[question.gold[0]] == labels[row]
