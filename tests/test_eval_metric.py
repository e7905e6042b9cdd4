"""--eval-metric: the answers of a run's model, their score, what it chooses, and that nothing else changes."""

import functools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import chat_base, command, output_of, refusal_of, sentence
from support.runs import lines, torchrun

import data
import evaluate
import train
from common.errors import UserError
from dataset.example_records import is_whole_conversation, records_of_examples
from dataset.records import Record
from evals.answers import Answers
from evals.table import EVALUATIONS, GENERATE
from flags import Flags
from tokenizer import load_tokenizer
from training import answer_score, checkpointer, defaults
from training.best import best_or_final
from training.state import TrainState

GENERATED = [name for name, row in EVALUATIONS.items() if row.kind == GENERATE]


def write_answers(path: Path, count: int, seed: int) -> Path:
    """Questions of random words, of which seven of ten are answered with "blue", the others with "dog"."""
    texts = []
    for i in range(count):
        answer = "dog" if i % 10 > 6 else "blue"
        texts.append({"prompt": sentence(seed + i, 2 + i % 5), "completion": answer})
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """words(more): the flags of a job that learns to say "blue", so that seven of ten answers are right."""
    folder = tmp_path_factory.mktemp("task")
    base = chat_base(folder / "base", num_key_value_heads=2)
    trained_on = write_answers(folder / "data.jsonl", 60, 0)
    val = write_answers(folder / "val.jsonl", 20, 900)

    def words(*more) -> list[str]:
        common = ["--model", base, "--data", trained_on, "--val", val, "--steps", 24, "--eval-every", 8]
        common += ["--rank", 4, "--lr", 0.02, "--dtype", "fp32", "--compile", "off"]
        if "--eval-metric" in more:
            common += ["--eval-metric-limit", 0]
        return list(map(str, [*common, *more]))

    words.base, words.val, words.data = base, val, trained_on
    return words


ran = functools.partial(output_of, train)
refused = functools.partial(refusal_of, train)


def scores_of(run: Path, metric: str = "exact") -> dict[int, float]:
    return {line["step"]: line[f"val_{metric}"] for line in lines(run) if f"val_{metric}" in line}


def printed_score(monkeypatch, capsys, metric: str, *words) -> str:
    """The score that `evaluate.py METRIC` prints of the last model of its table."""
    words = [metric, "--dtype", "fp32", "--show", 0, *words]
    out, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0, err
    heading, _, row = [
        re.split(r"  +", line.strip()) for line in out.partition("\n\n")[2].splitlines() if line.strip()
    ][:3]
    place = heading.index(EVALUATIONS[metric].score) + 1
    return row[place]


# ---- the score ----


@pytest.mark.parametrize("metric", ["exact", "rouge"])
def test_the_score_is_that_of_evaluate_py(task, tmp_path, monkeypatch, capsys, metric):
    """At every validation: of the base before the training, of best/ and of final/."""
    run = tmp_path / "run"
    said = ran(monkeypatch, capsys, *task("--eval-metric", metric, "--out", run))
    scores = scores_of(run, metric)
    assert [*scores] == [0, 8, 16, 24]
    assert scores[0] == 0 and max(scores.values()) >= 70
    best = max(scores, key=scores.get)
    model = ["--data", task.val, "--model", task.base]
    for score, adapter in (
        (scores[0], []),
        (scores[best], ["--adapter", run / "best"]),
        (scores[24], ["--adapter", run / "final"]),
    ):
        spec = ".1f" if metric == "exact" else ".2f"
        assert printed_score(monkeypatch, capsys, metric, *model, *adapter) == format(score, spec)
    name = {"exact": f"exact {scores[8]:.1f} %", "rouge": f"ROUGE-1 {scores[8]:.2f}"}[metric]
    assert re.search(rf"^step     8: validation loss \d\.\d+, {re.escape(name)}, KL to the base", said, re.MULTILINE)
    assert "each validation answers all 20 validation prompts; best/ is that of the highest" in said
    assert "answering took" in said


def test_only_some_prompts_are_answered_and_they_are_the_ones_with_the_smallest_hash(
    task, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    said = ran(monkeypatch, capsys, *task("--eval-metric", "exact", "--eval-metric-limit", 5, "--out", run))
    assert "5 of 20 validation prompts, chosen by their hash, as asked for with --eval-metric-limit" in said
    val = data.load([task.val], load_tokenizer(task.base), 512)
    first = np.sort(np.argsort(val.prompts, kind="stable")[:5])
    some = tmp_path / "some.jsonl"
    every = task.val.read_text().splitlines(keepends=True)
    some.write_text("".join(every[i] for i in first))
    words = ["--data", some, "--model", task.base, "--adapter", run / "final"]
    assert printed_score(monkeypatch, capsys, "exact", *words) == f"{scores_of(run)[24]:.1f}"


@pytest.mark.parametrize("name", GENERATED)
def test_each_evaluation_has_its_one_number_and_higher_is_better(name):
    """Of references as answers it is 100, of empty answers 0."""
    texts = {
        "numeric": "#### 1,234",
        "json": '{"a": [1, 2], "b": "x"}',
        "code-similarity": "def f(a):\n    b = a + 1\n    return b",
        "tools": '[{"name": "f", "arguments": {"x": 1}}]',
    }
    text = texts.get(name, "one two three four five six seven")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    records = [Record(messages, None, "here")] * 2
    row = EVALUATIONS[name]
    numbers = []
    for answer in (text, ""):
        scores = row.load()(Answers(records, [[text]] * 2, [answer] * 2, 1.0))
        assert row.score in scores.formats
        numbers.append(scores.columns[row.score])
    # METEOR takes a penalty for its one chunk.
    assert numbers[0] == pytest.approx(100, abs=0.2) and numbers[1] == 0


# ---- the training is not touched ----


@pytest.mark.parametrize("how", ["--dropout 0.3", "--dropout 0.3 --dtype bf16", "--method full"])
def test_answering_changes_no_bit_of_the_training(task, tmp_path, monkeypatch, capsys, how):
    words = task()
    if "full" in how:
        place = words.index("--rank")
        del words[place : place + 2]
    words += how.split()
    states = []
    for name, metric in (("with", ["--eval-metric", "f1"]), ("without", [])):
        ran(monkeypatch, capsys, *words, *metric, "--out", tmp_path / name)
        keys = ("step", "loss", "val_loss", "kl_base", "grad_norm", "lr")
        numbers = [[line.get(key) for key in keys] for line in lines(tmp_path / name)]
        [weights] = (tmp_path / name / "final").glob("*model.safetensors")
        state = json.loads((tmp_path / name / "checkpoints/step-24/state.json").read_text())
        states.append((numbers, weights.read_bytes(), state["random"], state["position"]))
    assert states[0] == states[1] and len(states[0][0]) == 28


# ---- what it chooses ----


@pytest.fixture
def scripted(monkeypatch):
    """scripted(scores): the scores of a run's validations, in place of those of its answers."""

    def script(*scores: float) -> None:
        each = iter(scores)
        monkeypatch.setattr(answer_score.AnswerScorer, "measure", lambda *_: next(each))

    return script


def test_best_is_the_highest_score_and_of_equal_ones_the_lowest_loss(task, tmp_path, monkeypatch, capsys, scripted):
    run = tmp_path / "run"
    words = task("--eval-metric", "exact", "--save-every", 4, "--eval-every", 4, "--keep", 1, "--out", run)
    scripted(0.0, 40.0, 60.0, 60.0, 50.0, 50.0, 50.0)
    said = ran(monkeypatch, capsys, *words)
    losses = {line["step"]: line["val_loss"] for line in lines(run) if "val_loss" in line}
    best = min((8, 12), key=losses.get)
    assert losses[12] != losses[8] and losses[24] < max(losses[8], losses[12])
    assert f"best/ has exact % 60.00 (loss {losses[best]:.4f}), final/ exact % 50.00 (loss {losses[24]:.4f})" in said
    assert said.rstrip().endswith(f"--adapter {run / 'best'}")
    # The checkpoint that stays besides the newest is the best by the score.
    assert [folder.name for folder in checkpointer.list_checkpoints(run / "checkpoints")] == [f"step-{best}", "step-24"]
    card = (run / "best/README.md").read_text()
    assert "exact %, at the highest score" in card and "not how often answers are right" not in card


def test_patience_counts_by_the_score_whatever_the_loss_does(task, tmp_path, monkeypatch, capsys, scripted):
    run = tmp_path / "run"
    words = task("--eval-metric", "exact", "--eval-every", 1, "--patience", 3, "--warmup", 0, "--out", run)
    scripted(0.0, 0.0, 30.0, 30.0, 30.0, 20.0)
    said = ran(monkeypatch, capsys, *words)
    assert [*scores_of(run)] == [0, 1, 2, 3, 4, 5]
    assert "stopped   3 validations without a higher exact % (--patience)" in said


def test_a_limit_of_forgetting_holds_for_the_score_too(task, tmp_path, monkeypatch, capsys, scripted):
    run = tmp_path / "run"
    scripted(0.0, 10.0, 20.0, 30.0)
    said = ran(monkeypatch, capsys, *task("--eval-metric", "exact", "--forget-limit", 1e-9, "--out", run))
    assert "no validation was under --forget-limit 1e-09, so there is no best/" in said
    assert not (run / "best").exists()


def test_a_resumed_run_remembers_the_best_score(task, tmp_path, monkeypatch, capsys, scripted):
    run = tmp_path / "run"
    words = task("--eval-metric", "exact", "--save-every", 8, "--keep", 9, "--out", run)
    scripted(0.0, 60.0, 50.0, 40.0)
    ran(monkeypatch, capsys, *words)
    weights = (run / "best/adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints/step-24")
    scripted(59.0)
    said = ran(monkeypatch, capsys, "--out", run, "--resume")
    assert scores_of(run) == {0: 0.0, 8: 60.0, 16: 50.0, 24: 59.0}
    assert (run / "best/adapter_model.safetensors").read_bytes() == weights
    assert "best/ has exact % 60.00" in said and "(exact 0.0 % before the training)" in said
    err = refused(monkeypatch, capsys, "--out", run, "--resume", "--steps", 30, "--eval-metric", "f1")
    assert "--resume:" in err and "--eval-metric f1 (it was exact)" in err


def test_a_state_keeps_the_scores():
    state = TrainState(step=4, validated_at=4, val_loss=2.0, score=50.0, best_score=60.0, first_score=0.0)
    stored = json.loads(json.dumps(state.as_dict()))
    assert stored["val_score"] == 50.0
    again = TrainState.from_dict(stored)
    assert (again.score, again.best_score, again.first_score) == (50.0, 60.0, 0.0)
    assert "val_score" not in TrainState(step=5, validated_at=4, score=50.0).as_dict()


def test_a_score_that_never_rises_is_a_warning(capsys):
    state = TrainState(step=4, val_loss=3.0, best_val_loss=2.0, first_val_loss=2.0)
    state.first_score, state.best_score, state.score = 40.0, 40.0, 30.0
    assert best_or_final(Flags(), state, "exact %") == "final"
    said = capsys.readouterr().out
    assert "no validation was better than the exact % 40.00 (loss 2.0000) before training" in said


# ---- signals and ranks ----


def test_a_signal_ends_the_answering_and_the_resumed_run_equals_a_whole_one(task, tmp_path, monkeypatch, capsys):
    words = task("--eval-metric", "exact", "--dropout", 0.2)
    monkeypatch.setitem(answer_score.BATCH_SIZE, GENERATE, 4)
    ran(monkeypatch, capsys, *words, "--out", tmp_path / "whole")
    asked = []
    plain = answer_score.generate_batches

    def with_a_signal(*arguments, **named):
        for each in plain(*arguments, **named):
            asked.append(each)
            # The second of the five batches after step 8.
            if len(asked) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
            yield each

    monkeypatch.setattr(answer_score, "generate_batches", with_a_signal)
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["train.py", *words, "--out", str(tmp_path / "cut")])
        train.main()
    assert len(asked) == 7 and "stopped   after step 8; " in capsys.readouterr().out
    monkeypatch.setattr(answer_score, "generate_batches", plain)
    ran(monkeypatch, capsys, "--out", tmp_path / "cut", "--resume")
    assert scores_of(tmp_path / "cut") == scores_of(tmp_path / "whole")
    whole, cut = (tmp_path / name / "final/adapter_model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_two_ranks_share_the_prompts_and_get_the_same_score(task, tmp_path, monkeypatch, capsys):
    words = task("--eval-metric", "exact", "--steps", 12, "--eval-every", 6)
    ran(monkeypatch, capsys, *words, "--out", tmp_path / "one")
    words = task("--eval-metric", "exact", "--steps", 12, "--eval-every", 6, "--batch-size", 4, "--shard", "none")
    torchrun(2, "train.py", *words, "--device", "cpu", "--out", tmp_path / "two", OMP_NUM_THREADS="1")
    assert scores_of(tmp_path / "two") == scores_of(tmp_path / "one") and len(scores_of(tmp_path / "two")) == 3


# ---- which prompts, and how many ----


@pytest.mark.parametrize("truncate", ["drop", "prompt"])
def test_the_records_of_examples_are_those_that_they_were_made_of(tmp_path, truncate):
    """Of several files, one nested, one gone through a function; whole conversations only."""
    tokenizer = load_tokenizer(chat_base(tmp_path / "base"))
    talks = []
    for i in range(12):
        messages = [{"role": "user", "content": sentence(i, 5)}, {"role": "assistant", "content": sentence(i + 50, 3)}]
        if i % 3 == 0:
            messages += [{"role": "user", "content": "more"}, {"role": "assistant", "content": sentence(i, 60)}]
        talks.append({"messages": messages})
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in talks))
    questions = []
    for i in range(4):
        answers = [{"text": "blue", "answer_start": 6}]
        questions.append({"id": str(i), "question": f"What, {i}?", "answers": answers})
    paragraphs = [{"context": "It is blue.", "qas": questions}]
    squad = {"data": [{"title": "t", "paragraphs": paragraphs}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    files = [tmp_path / "talks.jsonl", tmp_path / "squad.json"]
    dataset = data.load(files, tokenizer, 110, truncate=truncate)
    whole = dataset.take(is_whole_conversation(dataset))
    assert len(dataset) == 16 and len(whole) == 12
    chosen = whole.take(np.array([9, 2, 7, 10]))
    found = records_of_examples(chosen)
    for example, record in zip(chosen.examples, found, strict=True):
        assert record.where == example.source
        ids, _ = tokenizer.render(record.messages)
        assert ids[: len(example.ids)] == example.ids.tolist()
    texts = {record.messages[-1]["content"] for record in found}
    assert "blue" in texts and len(texts) > 1


def test_a_record_that_changed_is_refused(tmp_path):
    tokenizer = load_tokenizer(chat_base(tmp_path / "base"))
    file = write_answers(tmp_path / "a.jsonl", 3, 0)
    dataset = data.load([file], tokenizer, 256)
    file.write_text(file.read_text().replace("blue", "green"))
    with pytest.raises(UserError, match="a.jsonl line 1: is another record when it is read once more"):
        records_of_examples(dataset)


class Ordered:
    """Stands for a sampler, of whose epoch only the number of tokens counts."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def epoch_tokens(self) -> int:
        return self.tokens


def test_the_number_of_prompts_takes_a_tenth_of_the_training(tmp_path):
    tokenizer = load_tokenizer(chat_base(tmp_path / "base"))
    val = data.load([write_answers(tmp_path / "val.jsonl", 400, 0)], tokenizer, 512)
    answer = float(val.num_trained.mean())
    cost = (val.tokens / 400 - answer) / 2 + answer

    def choose(tokens: int, device: str = "cpu", **more) -> tuple[int, str, float]:
        flags = Flags(steps=10, eval_every=5, eval_metric="exact", shard="none", given=frozenset(more), **more)
        parts = data.TrainingData(val, val, None, Ordered(tokens), 512, None, False)
        flags, why, takes = defaults.choose_prompts(flags, parts, 10, torch.device(device))
        return flags.eval_metric_limit, why, takes

    # Validations before step 1, after 5 and after 10.
    limit, why, takes = choose(round(3 * 100.5 * cost / 0.1))
    assert limit == 100 and why.startswith("100 of 400 validation prompts, chosen by their hash, for about a tenth of")
    assert takes == pytest.approx(3 * 100 * cost)
    assert choose(10)[0] == 16 and "as fewer would say little" in choose(10)[1]
    assert choose(10**9)[:2] == (0, "all 400 validation prompts")
    assert choose(10, eval_metric_limit=50)[0] == 50 and choose(10, eval_metric_limit=0)[0] == 0
    # A generated token takes longer on a GPU, so there are fewer prompts.
    assert choose(round(3 * 100.5 * cost / 0.1), "meta")[0] < 50


# ---- refusals ----


@pytest.mark.parametrize(
    ("metric", "record", "problem"),
    [
        ("numeric", {"prompt": "a", "completion": "no"}, "its reference has no number; `numeric` compares numbers"),
        ("json", {"prompt": "a", "completion": "no"}, "its reference is no JSON object or list"),
        ("tools", {"prompt": "a", "completion": "no"}, "no record has tools or a tool call"),
        ("exact", {"text": "only words " * 9}, "the validation data are plain text, which has no reference answers"),
    ],
)
def test_references_that_a_metric_cannot_use_are_refused(task, tmp_path, monkeypatch, capsys, metric, record, problem):
    val = tmp_path / "val.jsonl"
    val.write_text((json.dumps(record) + "\n") * 3)
    words = task("--eval-metric", metric, "--out", tmp_path / "run")
    words[words.index("--val") + 1] = str(val)
    err = refused(monkeypatch, capsys, *words)
    assert f"--eval-metric {metric}: " in err and problem in err
    assert not (tmp_path / "run").exists()


def test_where_nothing_validates_or_the_model_is_in_parts_it_is_refused(task, tmp_path, monkeypatch, capsys):
    words = ["--model", task.base, "--data", task.data, "--out", tmp_path / "run"]
    none = [*words, "--eval-metric", "exact", "--val-fraction", 0]
    assert "--eval-metric: is measured at validations, and --val-fraction 0 has none" in refused(
        monkeypatch, capsys, *none
    )
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "the fox", "completion": "runs"}\n' * 3)
    alone = ["--model", task.base, "--data", one, "--eval-metric", "exact", "--out", tmp_path / "run"]
    assert "--eval-metric: is measured at validations, and nothing validates; give --val" in refused(
        monkeypatch, capsys, *alone
    )
    assert "--eval-metric-limit: is for the prompts" in refused(monkeypatch, capsys, *words, "--eval-metric-limit", 4)
    sharded = [*words, "--eval-metric", "exact", "--shard", "full"]
    assert "--eval-metric exact: to be answered, a prompt needs a whole model on each process; --shard none" in refused(
        monkeypatch, capsys, *sharded
    )
    assert "invalid choice: 'rogue'" in refused(monkeypatch, capsys, *words, "--eval-metric", "rogue")
    assert not (tmp_path / "run").exists()
