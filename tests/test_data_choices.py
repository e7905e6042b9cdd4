"""What train.py is asked to do with data: --limit draws examples, --truncate cuts prompts, --system stands before."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.helpers import chat_base, command, sentence

import data
import evaluate
import generate
import train
from common.errors import UserError
from dataset.examples import draw_examples, shares_of
from dataset.formats import open_source
from dataset.prompt_cut import TurnShape, cut_prompt
from dataset.records import ReadStats
from interop.resolve import pick_tokenizer, trained_system
from tokenizer import load_tokenizer

QUICK = ("--dtype", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"), hidden_size=64)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def written(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def chat(*contents: str) -> dict:
    """A conversation; the first content is a system message's if it begins with "S:"."""
    roles = ["user", "assistant"] * len(contents)
    if contents[0].startswith("S:"):
        roles.insert(0, "system")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def questions(first: int, last: int) -> list[dict]:
    return [{"prompt": f"question {n}", "completion": sentence(n, 4)} for n in range(first, last)]


# ---- --limit ----


def uniform(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 63, count).astype(np.uint64)


def draw(prompts: np.ndarray, count: int, seed: int, sources: np.ndarray | None = None) -> set[int]:
    """The prompts that are drawn."""
    zeros = np.zeros(len(prompts), np.int64)
    chosen = draw_examples(prompts, zeros, prompts, zeros if sources is None else sources, count, seed)
    assert np.array_equal(chosen, np.unique(chosen)) and len(chosen) == count
    return set(prompts[chosen].tolist())


def test_a_sample_depends_on_what_is_said_and_the_seed_alone():
    prompts = uniform(1000)
    shuffled = np.random.default_rng(1).permutation(prompts)
    assert draw(prompts, 100, 7) == draw(shuffled, 100, 7) != draw(prompts, 100, 8)
    assert draw(prompts, 100, 7) < draw(prompts, 250, 7)  # more adds to fewer


def test_each_example_is_drawn_equally_often_also_copies():
    prompts = np.concatenate([np.repeat(uniform(1), 50), uniform(150, 2)])
    counts = np.zeros(200)
    zeros = np.zeros(200, np.int64)
    for seed in range(400):
        counts[draw_examples(prompts, zeros, np.arange(200, dtype=np.uint64), zeros, 40, seed)] += 1
    # Of 400 draws of a fifth: 80, with a standard deviation of 8.
    assert abs(counts[:50].mean() - 80) < 4 and abs(counts[50:].mean() - 80) < 2
    assert counts.min() > 40 and counts.max() < 120


@pytest.mark.parametrize("sizes, count, wanted", [
    ([100, 100], 10, [5, 5]), ([999, 1], 10, [9, 1]), ([10, 20, 30], 6, [1, 2, 3]), ([5, 5, 5], 4, [2, 1, 1]),
    ([1000, 1, 1], 3, [1, 1, 1]), ([3, 0], 2, [2, 0]),
])  # fmt: skip
def test_each_file_gives_its_share(sizes, count, wanted):
    assert shares_of(np.array(sizes), count) == wanted


def examples_of(out: str) -> str:
    return next(line for line in out.splitlines() if "examples to train on" in line).split()[0]


def test_a_run_of_a_sample_is_the_same_again_and_resumed(tmp_path, base, monkeypatch, capsys):
    file = written(tmp_path / "a.jsonl", questions(0, 60))
    other = written(tmp_path / "b.jsonl", questions(100, 120))
    words = ["--model", base, "--data", file, other, "--limit", 16, "--steps", 2, "--compile", "off", *QUICK]
    out, error, code = command(train, monkeypatch, capsys, *words, "--out", tmp_path / "run", "--save-every", 1)
    assert code == 0, error
    assert "          --limit: 16 of " in out and "drawn by --seed 0" in out and examples_of(out) == "16"
    # What validates does not depend on it.
    whole, _, _ = command(train, monkeypatch, capsys, *words[:5], "--plan", *QUICK)
    held_out = lambda out: next(line for line in out.splitlines() if " to validate" in line).split(" trained; ")[1]
    assert held_out(out) == held_out(whole)

    swapped = [*words[:3], other, file, *words[5:], "--out", tmp_path / "swapped", "--seed", 0]
    assert command(train, monkeypatch, capsys, *swapped)[2] == 0
    ids = lambda run: json.loads((tmp_path / run / "config.json").read_text())
    assert ids("run")["limit"] == ids("swapped")["limit"] == 16
    (tmp_path / "run" / "final").rename(tmp_path / "gone")
    _, error, code = command(train, monkeypatch, capsys, "--out", tmp_path / "run", "--resume", "--limit", 17)
    assert code == 2 and "--limit" in error
    _, error, code = command(train, monkeypatch, capsys, "--out", tmp_path / "run", "--resume")
    assert code == 0, error


def test_of_plain_text_pieces_are_drawn(tmp_path, base, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(" ".join(sentence(n, 20) for n in range(60)))
    words = ["--model", base, "--data", tmp_path / "a.txt", "--seq-len", 32, "--plan", *QUICK]
    out, error, code = command(train, monkeypatch, capsys, *words, "--limit", 7)
    assert code == 0 and " pieces of text, drawn by --seed 0" in out and examples_of(out) == "7", error
    out, _, code = command(train, monkeypatch, capsys, *words, "--limit", 100_000)
    assert "--limit 100,000: there are " in out and code == 0
    file = written(tmp_path / "b.jsonl", questions(0, 9))
    _, error, code = command(train, monkeypatch, capsys, *words[:3], file, tmp_path / "a.txt", *words[4:], "--limit", 1)
    assert code == 2 and error == "error: --limit 1: there are 2 files, of which each gives some\n"


def test_evaluate_draws_the_same_records_for_loss_and_answers(tmp_path, base, monkeypatch, capsys):
    file = written(tmp_path / "a.jsonl", questions(0, 40))
    asked, measured = [], []
    monkeypatch.setattr(evaluate, "answer_records", lambda m, t, records, *rest: asked.append(records) or 1 / 0)
    monkeypatch.setattr("evals.loss.example_losses", lambda m, dataset, size: measured.append(dataset) or 1 / 0)
    words = ["--data", file, "--model", base, "--limit", 5, *QUICK]
    for what, seed in (("loss", 0), ("exact", 0), ("exact", 1)):
        with pytest.raises(ZeroDivisionError):
            command(evaluate, monkeypatch, capsys, what, *words, "--seed", seed)
    places = [[record.where for record in records] for records in asked]
    assert [example.source for example in measured[0].examples] == places[0] != places[1]
    assert len(places[0]) == 5 and places[0] != [f"{file} line {n}" for n in range(1, 6)]


# ---- --truncate ----

LONG = " ".join(map(str, range(100, 140)))


def decoded(tokenizer, example) -> tuple[str, str]:
    """An example's text, and what of it is trained."""
    weights = np.asarray(example.loss_weights)
    return tokenizer.decode(example.ids.tolist()), tokenizer.decode(example.ids[weights > 0].tolist())


def test_prompts_are_cut_from_the_left_and_answers_stay_whole(tmp_path, tokenizer):
    records = [
        chat("S:be red", f"first {LONG}", "one", "second", "two"),
        chat("S:be red", f"only {LONG} the end", "the fox"),
        chat("short", "red"),
    ]
    said = []
    file = written(tmp_path / "a.jsonl", records)
    load = lambda seq_len, truncate: data.load([file], tokenizer, seq_len, print_fn=said.append, truncate=truncate)
    cut = load(64, "prompt")
    texts = [decoded(tokenizer, example) for example in cut.examples]
    system = "<|im_start|>system\nS:be red<|im_end|>\n<|im_start|>user\n"
    # A whole turn is left out, the oldest.
    assert texts[0] == (system + "second<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>", "two<|im_end|>")
    # Where the last one is too long by itself, it loses its beginning, and no token more than it must.
    text, trained = texts[1]
    assert text.startswith(system) and trained == "the fox<|im_end|>" and len(cut.examples[1].ids) == 64
    kept = text.removeprefix(system).removesuffix(" the end<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>")
    assert f"only {LONG}".endswith(kept) and kept
    assert texts[2][1] == "red<|im_end|>" and cut.examples[2].ids[:1] == tokenizer.encode("<|im_start|>", special=True)
    assert cut.dropped == {"cut from the left of the prompt to fit into --seq-len 64": 2}
    assert "          shortened: 2 records cut from the left of the prompt to fit into --seq-len 64" in said
    assert said[-1] == "          WARNING: 66.7 % of the records are longer than --seq-len; raise --seq-len"
    assert cut.lengths.tolist() == [len(example.ids) for example in cut.examples]
    assert cut.num_trained.tolist() == [int((example.loss_weights > 0).sum()) for example in cut.examples]
    # The default leaves them out, and says what would keep them.
    assert [example.source for example in load(64, "drop").examples] == [f"{file} line 3"]
    too_long = "66.7 % of the records are longer than --seq-len; raise --seq-len"
    assert said[-1].endswith(f"{too_long}, or keep their answers with --truncate prompt")


def test_what_fits_is_the_same_either_way(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", [chat("a", "b", "c", "d"), chat("S:x", f"q {LONG}", "red")])
    drop, prompt = (data.load([file], tokenizer, 400, truncate=truncate) for truncate in ("drop", "prompt"))
    for one, other in zip(drop.examples, prompt.examples, strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.loss_weights, other.loss_weights)


def test_several_answers_behind_the_cut_are_trained(tmp_path, tokenizer):
    record = chat(f"first {LONG}", "one", "second", "two", "third", "three")
    file = written(tmp_path / "a.jsonl", [record])
    (example,) = data.load([file], tokenizer, 60, truncate="prompt").examples
    text, trained = decoded(tokenizer, example)
    assert trained == "two<|im_end|>three<|im_end|>" and text.startswith("<|im_start|>user\nsecond<|im_end|>")
    (example,) = data.load([file], tokenizer, 60, "last-answer", truncate="prompt").examples
    assert decoded(tokenizer, example) == (text, "three<|im_end|>")
    # What is kept is what a conversation without the first turn is.
    rest = written(tmp_path / "b.jsonl", [chat("second", "two", "third", "three")])
    assert np.array_equal(example.ids, data.load([rest], tokenizer, 60).examples[0].ids)


def test_an_answer_too_long_by_itself_is_treated_as_without(tmp_path, tokenizer):
    file = written(tmp_path / "a.jsonl", [chat("q", "one", "r", LONG), chat("q", LONG), chat("q", "x")])
    said = []
    dataset = data.load([file], tokenizer, 48, print_fn=said.append, truncate="prompt")
    assert [decoded(tokenizer, example)[1] for example in dataset.examples] == ["one<|im_end|>", "x<|im_end|>"]
    assert dataset.dropped == {
        "whose answer does not fit into --seq-len 48": 1,
        "cut to the messages that fit into --seq-len 48": 1,
    }


def test_a_cut_never_goes_into_what_stands_between_question_and_answer():
    ids, shape = [*range(100)], TurnShape((), 5)
    assert cut_prompt(ids, [(90, 100)], (90, 100), 10, shape, 100) == 10
    assert cut_prompt(ids, [(90, 100)], (90, 100), 10, shape, 60) == 50
    assert cut_prompt(ids, [(90, 100)], (90, 100), 10, shape, 26) == 84  # one token of the question is left
    assert cut_prompt(ids, [(90, 100)], (90, 100), 10, shape, 25) is None


def test_a_run_trains_on_cut_prompts(tmp_path, base, monkeypatch, capsys):
    records = [chat(f"{sentence(n, 60)} {n}", sentence(n, 3)) for n in range(40)]
    file = written(tmp_path / "a.jsonl", records)
    words = ["--model", base, "--data", file, "--seq-len", 64, "--steps", 2, "--compile", "off", *QUICK]
    _, error, code = command(train, monkeypatch, capsys, *words, "--out", tmp_path / "drop")
    assert code == 2 and "no record can be trained on (40 whose answer does not fit into --seq-len 64)" in error
    words += ["--truncate", "prompt", "--pack", "--replay", f"{file}=0.2"]
    out, error, code = command(train, monkeypatch, capsys, *words, "--out", tmp_path / "run")
    assert code == 0 and "shortened: 40 records cut from the left" in out, error
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert np.isfinite(line["loss"])


# ---- --system ----


def test_a_system_message_goes_before_conversations_without_one(tmp_path, tokenizer):
    records = [chat("q", "a"), chat("S:mine", "q", "a"), {"prompt": "q", "completion": "a", "weight": 0.5}]
    source, stats = open_source(written(tmp_path / "a.jsonl", records[:2])), ReadStats()
    source.system = "be red"
    first, second = source.records(stats)
    assert first.messages[0] == {"role": "system", "content": "be red"} and second.messages[0]["content"] == "S:mine"
    assert stats.altered == {"with a system message of their own, which stays": 1}
    source = open_source(written(tmp_path / "b.jsonl", records[2:]))
    source.system = "be red"
    (record,) = source.read_all()
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant"] and record.weights == [1.0, 0.5, 0.5]
    preference = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    source = open_source(written(tmp_path / "c.jsonl", [preference]))
    source.system = "be red"
    (record,) = source.read_all()
    assert record.asked == 2 and record.messages[record.asked]["content"] == "good"


def test_a_run_keeps_its_system_message(tmp_path, base, monkeypatch, capsys):
    file = written(tmp_path / "a.jsonl", questions(0, 40))
    words = ["--model", base, "--data", file, "--steps", 2, "--compile", "off", *QUICK]
    out, error, code = command(train, monkeypatch, capsys, *words, "--system", "be red", "--out", tmp_path / "run")
    assert code == 0 and 'system message "be red" before conversations that have none' in out, error
    final = tmp_path / "run" / "final"
    assert trained_system(final) == "be red" == json.loads((final / "plaintune.json").read_text())["system"]

    prompts = []
    monkeypatch.setattr(
        "tokenizer.Tokenizer.render", lambda self, messages, *rest, **more: prompts.append(messages) or 1 / 0
    )
    asking = ["--model", base, "--adapter", final, "--prompt", "hello", *QUICK]
    for extra in ((), ("--system", "be blue"), ("--system", "")):
        with pytest.raises(ZeroDivisionError):
            command(generate, monkeypatch, capsys, *asking, *extra)
    systems = [[m["content"] for m in messages if m["role"] == "system"] for messages in prompts]
    assert systems == [["be red"], ["be blue"], []]
    monkeypatch.undo()
    _, error, _ = command(generate, monkeypatch, capsys, *asking, "--max-new-tokens", 1)
    assert 'system message "be red", as in training' in error
    measured = ["loss", "--data", file, "--model", base, "--adapter", final, *QUICK]
    tokens = lambda *extra: command(evaluate, monkeypatch, capsys, *measured, *extra)[0]
    assert 'system message "be red", as in training' in tokens() and "be red" not in tokens("--system", "")

    # A run that goes on with the adapter goes on with it, unless it is told otherwise.
    more = ["--model", base, "--data", file, "--adapter", final, "--plan", *QUICK]
    assert 'system message "be red"' in command(train, monkeypatch, capsys, *more)[0]
    assert "be red" not in command(train, monkeypatch, capsys, *more, "--system", "")[0]


def test_a_system_message_that_nobody_would_see_is_refused(tmp_path, base, monkeypatch, capsys):
    drops = "{% for m in messages if m.role != 'system' %}{{ m.content }}"
    drops += "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + drops
    for template, why in ((drops, "it leaves system messages out"), (refuses, "no system role")):
        (base / "chat_template.jinja").write_text(template)
        tokenizer = pick_tokenizer(base, None, None, system="be red")
        with pytest.raises(UserError, match=f"--system: can't be shown to the model .*{why}.*--system '' for none"):
            data.check_system(tokenizer)
    (base / "chat_template.jinja").unlink()
    data.check_system(pick_tokenizer(base, None, None, system="be red"))
    (tmp_path / "a.txt").write_text(sentence(1, 200))
    words = ["--model", base, "--data", tmp_path / "a.txt", "--system", "be red", "--plan", *QUICK]
    _, error, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and error == "error: --system: plain text has no system message\n"
