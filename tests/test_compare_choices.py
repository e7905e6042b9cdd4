"""evaluate.py compare --benchmark choices=FILE and classify=FILE: what evaluate.py prints of each model, the paired
intervals of the changes, and the answers that flipped."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from support.helpers import chat_base, command, sentence

import evaluate
from checkpoint import load_model
from evals.arguments import evaluation_arguments
from evals.bootstrap import paired_interval
from evals.choices import log_likelihoods
from evals.table import EVALUATIONS
from evals.targets import Opened
from tokenizer import load_tokenizer

ON_CPU = ["--device", "cpu", "--dtype", "fp32"]
LABELS = ("red", "dog", "fox")  # one token each: of several lengths a random model would always choose the shortest


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two random models with one tokenizer."""
    return [chat_base(tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (0, 1)]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    questions = []
    for i in range(40):
        endings = [sentence(1000 * i + n, 3) for n in range(4)]
        story = {"activity_label": "Fox", "ctx_a": sentence(i, 8), "ctx_b": "", "endings": endings, "label": i % 4}
        questions.append(json.dumps(story))
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(questions), encoding="utf-8")
    with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([sentence(i, 6), LABELS[i % 3]] for i in range(36))
    return {"choices": tmp_path / "hellaswag.jsonl", "classify": tmp_path / "labels.csv"}


def scores_of(name: str, model: Path, file: Path):
    args = evaluation_arguments([name, "--data", str(file), "--model", str(model), *ON_CPU])
    task = EVALUATIONS[name].load()(args, Opened(args))
    pairs = task.encode(load_tokenizer(model), 512)
    return task, task.score(log_likelihoods(load_model(model), pairs, 64))


def rows_of(out: str) -> dict[str, list[str]]:
    body = out.partition("verdict\n")[2].partition("\nIntervals")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in body]
    return {row[0]: row[1:] for row in cells}


def test_both_kinds_give_the_changes_of_each_models_own_scores(models, files, monkeypatch, capsys):
    words = [f"{name}={file}" for name, file in files.items()]
    words = ["compare", *models, "--benchmark", *words, "--show", "1", *ON_CPU]
    out, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0, err
    rows = rows_of(out)
    wanted = {}
    for name, file in files.items():
        task, base = scores_of(name, models[0], file)
        _, tuned = scores_of(name, models[1], file)
        for item, before in base.items.items():
            low, high = paired_interval(100 * np.array(before), 100 * np.array(tuned.items[item]))
            means = [100 * float(np.mean(each)) for each in (before, tuned.items[item])]
            cells = [str(len(before)), *(f"{mean:.1f}" for mean in means), f"{means[1] - means[0]:+.1f}"]
            wanted[f"benchmark {file.name}, {item} %"] = [*cells, f"{low:+.1f} to {high:+.1f}"]
        better = [i for i, hits in enumerate(zip(base.hits, tuned.hits, strict=True)) if hits == (False, True)]
        worse = [i for i, hits in enumerate(zip(base.hits, tuned.hits, strict=True)) if hits == (True, False)]
        # Random models change both ways; else the counts would show nothing.
        assert better and worse
        metric = next(iter(base.items))
        flipped = f"flipped   of {len(base.hits)} questions of {file.name} by {metric}: "
        assert f"{flipped}{len(better)} wrong to right, {len(worse)} right to wrong" in out.splitlines()
        first = task.questions[worse[0]]
        said = out.partition(flipped)[2].partition("right to wrong (")[2].splitlines()
        assert said[0] == f"1 of {len(worse)})" and said[1] == f"    question   {first.context}"
        names = [first.choices[first.gold[0]], *(first.choices[each.chosen[worse[0]]] for each in (base, tuned))]
        assert [line.split(maxsplit=1)[1] for line in said[2:5]] == names and names[0] == names[1] != names[2]
    assert {name: cells[:-1] for name, cells in rows.items()} == wanted
    assert [*wanted] == [
        *(f"benchmark hellaswag.jsonl, {each} %" for each in ("acc", "acc_norm", "acc_bytes")),
        *(f"benchmark labels.csv, {each} %" for each in ("accuracy", "p(right)")),
    ]


def test_a_model_beside_itself_flips_nothing_and_a_limit_holds(models, files, monkeypatch, capsys):
    words = ["compare", models[0], models[0], "--benchmark", f"choices:hellaswag={files['choices']}", "--limit", "9"]
    out, err, code = command(evaluate, monkeypatch, capsys, *words, *ON_CPU)
    assert code == 0, err
    row = rows_of(out)["benchmark hellaswag.jsonl, acc %"]
    assert row[0] == "9" and row[3:] == ["+0.0", "+0.0 to +0.0", "no change"]
    assert "by acc: 0 wrong to right, 0 right to wrong" in out
    assert "task hellaswag (as --task says)" in out and "--limit: 9 of 40, drawn by --seed 0" in out


@pytest.mark.parametrize(
    "word, problem",
    [
        ("loss={choices}", "--benchmark loss={choices}: NAME=FILE is wanted, where NAME is one of exact, f1, "),
        ("classify:arc={classify}", "--benchmark classify:arc={classify}: NAME=FILE is wanted"),
        ("choices:siqa={choices}", "--task siqa: not one of mmlu, hellaswag, "),
        ("choices={classify}", "{classify} row 1: its keys (label, text) are those of no task (mmlu: question, "),
        ("choices=none.jsonl", "none.jsonl: no such file"),
    ],
)
def test_a_wrong_benchmark_is_one_line(models, files, monkeypatch, capsys, word, problem):
    words = ["compare", *models, "--benchmark", word.format(**files), *ON_CPU]
    _, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 2
    assert err.strip().removeprefix("error: ").startswith(problem.format(**files))
    assert len(err.strip().splitlines()) == 1
