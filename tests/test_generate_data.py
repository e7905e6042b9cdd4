"""`generate.py --data`: answers against transformers, what a file asks, runs that were stopped, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.helpers import SHARED, chat_base, command, needs_shared, sentence

import generate
from checkpoint import load_model
from common.errors import UserError
from common.folder_lock import open_locked
from dataset.formats import open_source
from dataset.prompts import open_prompts, read_prompts
from evals import answer_file, batch_answers
from evals.batch_answers import encode_prompts, hidden_tools, unanswered
from lora import add_lora, lora_layers, save_adapter
from model import Transformer
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [sentence(i, 2 + 7 * i % 11) for i in range(1, 12)]
RANDOM = ["--temperature", 1, "--seed", 3]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def file(tmp_path) -> Path:
    return jsonl(tmp_path / "data" / "prompts.jsonl", [{"id": f"q{i}", "prompt": q} for i, q in enumerate(QUESTIONS)])


def jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def ask(base, file, tmp_path, monkeypatch, capsys):
    """A function that runs the command in this process: returns stderr, the exit code, and the file of answers."""
    number = iter(range(100))

    def ask(*words, data=file, out=None, tokens=8):
        out = out or tmp_path / f"answers{next(number)}.jsonl"
        general = ["--model", base, "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", tokens]
        _, err, code = command(generate, monkeypatch, capsys, *general, "--data", data, "--out", out, *words)
        return err, code, out

    return ask


# ---- the answers ----


def test_each_answer_is_that_of_transformers(base, ask, tmp_path):
    """Also behind earlier messages and a system message, whatever the batches; with what stood in the record."""
    talk = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "fox"},
        {"role": "user", "content": "12"},
    ]
    system = {"role": "system", "content": "über"}
    records = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "x"}]} for q in QUESTIONS]
    records += [{"messages": talk}, {"messages": [system, *talk, {"role": "assistant", "content": " ref"}]}]
    err, code, out = ask("--batch-size", 4, data=jsonl(tmp_path / "m.jsonl", records), tokens=12)
    assert code == 0, err
    assert "          13 prompts, 12 with a reference answer\n" in err
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    answers = lines_of(out)
    assert [each["record"] for each in answers] == [*range(1, 14)]
    ends = set()
    for record, answer in zip(records, answers, strict=True):
        asked = record["messages"]
        reference = asked.pop()["content"] if asked[-1]["role"] == "assistant" else None
        assert answer.get("reference") == reference and answer["messages"][:-1] == asked
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            whole = theirs.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        new = whole[0, ids["input_ids"].shape[1] :]
        wanted = tokenizer.decode(new, skip_special_tokens=True)
        assert answer["messages"][-1] == {"role": "assistant", "content": wanted}
        assert (answer["prompt_tokens"], answer["answer_tokens"]) == (ids["input_ids"].shape[1], len(new))
        assert answer["finish"] == ("stop" if new[-1] == 2 else "length")
        ends.add(answer["finish"])
        assert answer["source"] == f"m.jsonl line {answer['record']}"
    cut = sum(answer["finish"] == "length" for answer in answers)
    assert f"{out}: 13 answers; " in err and f"NOTE: {cut} of 13 answers were cut off at --max-new-tokens 12" in err


def test_an_answer_ends_before_its_stop_token(base, ask, monkeypatch):
    _, _, out = ask(tokens=20)
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompt, _ = tokenizer.render([{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True)
    ids = model.generate([prompt], 20)[0]
    stop = next(i for i in range(1, 20) if ids[i] not in ids[:i])
    pick = generate.resolve.pick_tokenizer
    monkeypatch.setattr(
        generate.resolve, "pick_tokenizer", lambda *a, **k: replace(pick(*a, **k), stop_ids={ids[stop]})
    )
    err, code, out = ask(tokens=20)
    first = lines_of(out)[0]
    assert code == 0 and first["finish"] == "stop" and first["answer_tokens"] == stop + 1, err
    assert first["messages"][-1]["content"] == tokenizer.decode(ids[:stop], skip_special=True)


def test_texts_are_continued_as_complete_does(base, ask, file, monkeypatch, capsys):
    err, code, out = ask("--complete")
    assert code == 0 and "11 texts to continue" in err and "no chat template" in err
    words = ["--model", base, "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", 8, "--complete"]
    for answer in lines_of(out)[:3]:
        alone, _, _ = command(generate, monkeypatch, capsys, *words, "--prompt", answer["prompt"])
        printed = "".join(c for c in answer["completion"] if generate.is_printed(c))
        assert printed + "\n" == alone
    (first, *_) = open_source(out).read_all()
    assert [message["content"] for message in first.messages] == [QUESTIONS[0], lines_of(out)[0]["completion"]]


def test_the_answers_are_a_file_of_examples(ask, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "maximum": 1e400}}}]
    tools[0]["function"]["parameters"]["maximum"] = 5
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    data = jsonl(tmp_path / "tools.jsonl", [{"messages": messages, "tools": tools, "task_id": "t/1"}])
    err, code, out = ask(data=data)
    (answer,) = lines_of(out)
    assert code == 0 and answer["reference"] == "" and answer["reference_tool_calls"] == [call]
    assert answer["tools"] == tools and answer["id"] == "t/1"
    (record,) = open_source(out).read_all()
    assert record.messages == answer["messages"] and record.tools == tools
    # The template of this base has no place for tools.
    assert "NOTE: 1 of 1 prompts have tools, and chat template tokenizer_config.json does not show them" in err


def test_tools_reach_a_template_that_shows_them(base, tmp_path):
    data = jsonl(tmp_path / "t.jsonl", [{"prompt": "red", "tools": [{"name": "seek", "parameters": {}}]}])
    prompts = read_prompts(open_prompts(data), print_fn=lambda line: None)
    model, tokenizer = load_model(base), load_tokenizer(base)
    template = (
        "{{ tools | map(attribute='function') | map(attribute='name') | join if tools }}{{ messages[0].content }}"
    )
    tokenizer = replace(tokenizer, templates={"default": template + "{% if add_generation_prompt %}:{% endif %}"})
    (ids,) = encode_prompts(model, tokenizer, prompts)
    assert tokenizer.decode(ids.tolist()) == "seekred:" and hidden_tools(tokenizer, prompts) == 0


def test_an_adapter_answers_and_another_one_is_other_settings(base, ask, tmp_path):
    folders = []
    for seed in (1, 2):
        model = load_model(base)
        torch.manual_seed(seed)
        add_lora(model, rank=4, alpha=8)
        for layer in lora_layers(model).values():
            layer.lora_B.data.normal_(0, 0.3)
        folders.append(tmp_path / f"adapter{seed}")
        save_adapter(model, folders[-1])
    _, _, plain = ask()
    err, code, tuned = ask("--adapter", folders[0])
    assert code == 0 and str(folders[0]) in err
    assert [a["messages"][:-1] for a in lines_of(plain)] == [a["messages"][:-1] for a in lines_of(tuned)]
    assert lines_of(plain) != lines_of(tuned)
    out = stopped_after(1, ask, "--adapter", folders[0])
    err, code, _ = ask("--adapter", folders[1], out=out)
    assert code == 2 and "with other settings: the adapter (--adapter). Give" in err


# ---- sampling ----


def test_samples_differ_and_depend_on_nothing_but_seed_record_and_number(ask):
    err, code, out = ask("--samples", 3, *RANDOM)
    assert code == 0 and "33 answers" in err
    answers = lines_of(out)
    assert [(a["record"], a["sample"]) for a in answers] == [(r, s) for r in range(1, 12) for s in (1, 2, 3)]
    text = lambda answer: answer["messages"][-1]["content"]
    assert len({text(answer) for answer in answers}) == 33
    # Fewer samples, other batches, fewer records: the same texts.
    for words, same in (
        (["--samples", 3, "--batch-size", 5], answers),
        (["--samples", 1], answers[::3]),
        (["--samples", 2, "--limit", 2], [answers[i] for i in (0, 1, 3, 4)]),
    ):
        assert [text(a) for a in lines_of(ask(*words, *RANDOM)[2])] == [text(a) for a in same]
    assert text(lines_of(ask("--temperature", 1, "--seed", 4)[2])[0]) != text(answers[0])


def test_a_seed_that_was_drawn_is_said_and_repeats(ask):
    err, _, out = ask("--temperature", 1)
    seed = err.partition("--seed ")[2].split()[0]
    assert ask("--temperature", 1, "--seed", seed)[2].read_bytes() == out.read_bytes()
    _, _, other = ask("--temperature", 1)
    assert other.read_bytes() != out.read_bytes()


def test_samples_of_a_prompt_share_its_tokens(base, ask, monkeypatch):
    """Each prompt's tokens go through the layers once for all its samples."""
    sizes = []
    hidden = Transformer.hidden

    def count(self, tokens, *rest):
        sizes.append(len(tokens))
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Transformer, "hidden", count)
    _, _, out = ask("--samples", 4, "--limit", 1, *RANDOM, tokens=3)
    prompt_tokens = lines_of(out)[0]["prompt_tokens"]
    assert sizes[0] == prompt_tokens and sizes[1] == 4


# ---- runs that were stopped ----


def stopped_after(batches: int, ask, *words, error=KeyboardInterrupt, **more) -> Path:
    """A file of answers of which so many batches were written when the run was stopped."""
    with pytest.MonkeyPatch.context() as patch:
        real, calls = Transformer.generate, iter(range(100))

        def generate_or_stop(*a, **k):
            if next(calls) >= batches:
                raise error
            return real(*a, **k)

        patch.setattr(Transformer, "generate", generate_or_stop)
        err, code, out = ask("--batch-size", 4, *words, **more)
    assert code == (130 if error is KeyboardInterrupt else 2) and not out.exists(), err
    partial = out.with_name(out.name + ".partial")
    num_answers = len(partial.read_text().splitlines()) - 1
    assert f"{num_answers} of " in err and f" answers are in {partial}; the same command" in err
    return out


def prompts_generated(monkeypatch) -> list[int]:
    """The number of prompts of each batch that is generated from now on."""
    sizes, real = [], Transformer.generate
    monkeypatch.setattr(
        Transformer, "generate", lambda self, rows, *a, **k: sizes.append(len(rows)) or real(self, rows, *a, **k)
    )
    return sizes


@pytest.mark.parametrize("words", [[], ["--samples", 2, *RANDOM], ["--temperature", 1]])
@pytest.mark.parametrize("damage", ["none", "half a line", "batch torn"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(ask, monkeypatch, words, damage):
    out = stopped_after(2, ask, *words)
    partial = out.with_name(out.name + ".partial")
    if "--temperature" in words and "--seed" not in words:
        seed = json.loads(partial.read_text().splitlines()[0])["settings"]["seed"]
        whole = ask("--batch-size", 4, *words, "--seed", seed)[2]
    else:
        whole = ask("--batch-size", 4, *words)[2]
    if damage == "half a line":
        with open(partial, "ab") as stream:
            stream.write(b'{"record": 1, "messages": [{"ro')
    elif damage == "batch torn":
        lines = partial.read_bytes().splitlines(keepends=True)
        partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    sizes = prompts_generated(monkeypatch)
    err, code, _ = ask("--batch-size", 4, *words, out=out)
    assert code == 0 and out.read_bytes() == whole.read_bytes() and not partial.exists()
    total = 22 if "--samples" in words else 11
    kept, again = {"none": (8, 0), "half a line": (8, 0), "batch torn": (7, 4)}[damage]
    assert f"resume    {kept} of {total} answers are in {partial}" in err
    assert sum(sizes) == total - 8 + again


def test_a_run_out_of_memory_goes_on_with_a_smaller_batch(ask, monkeypatch):
    out = stopped_after(1, ask, error=torch.OutOfMemoryError("CUDA out of memory"))
    sizes = prompts_generated(monkeypatch)
    _, code, _ = ask("--batch-size", 2, out=out)
    assert code == 0 and sum(sizes) == 7 and max(sizes) == 2, sizes
    assert lines_of(out) == lines_of(ask("--batch-size", 4)[2])


def test_only_what_is_missing_is_asked_again():
    batches = [[3, 1], [0, 2], [4]]
    assert unanswered(batches, {3, 1, 0}, True) == [[0, 2], [4]]
    assert unanswered(batches, {3, 1, 0}, False) == [[2], [4]]
    assert unanswered(batches, {0, 1, 2, 3, 4}, True) == []


def test_other_settings_are_refused_by_name_and_overwrite_begins_anew(ask, file, tmp_path):
    out = stopped_after(1, ask, *RANDOM)
    partial = out.with_name(out.name + ".partial")
    before = partial.read_bytes()
    cases = {
        ("--temperature", 0.5, "--seed", 3): "other settings: --temperature 1.0, now 0.5. Give the same ones",
        ("--temperature", 1, "--seed", 4): "other settings: --seed 3, now 4. ",
        (*RANDOM, "--top-k", 5, "--max-new-tokens", 9): "--max-new-tokens 8, now 9; --top-k 0, now 5. ",
        (*RANDOM, "--min-p", 0.2): "--min-p 0.0, now 0.2",
        (*RANDOM, "--system", "be red"): "the prompts (--data, --map, --limit, --system, --complete,",
        (*RANDOM, "--limit", 3): "the prompts (--data",
    }
    for words, said in cases.items():
        err, code, _ = ask(*words, out=out)
        assert code == 2 and said in err and err.count("error: ") == 1 and partial.read_bytes() == before
    err, code, _ = ask(*RANDOM, "--limit", 3, "--overwrite", out=out)
    assert code == 0 and "resume" not in err and len(lines_of(out)) == 3
    # A run that replaces a file is resumed by the same command, and leaves the file until its end.
    old = out.read_bytes()
    err, code, _ = ask(*RANDOM, out=out)
    assert code == 2 and err == f"error: --out {out}: is there already; --overwrite replaces it\n"
    shutil.copy(partial_of_two(ask), partial)
    assert out.read_bytes() == old
    err, code, _ = ask("--overwrite", "--batch-size", 4, out=out)
    assert code == 0 and "resume    8 of 11" in err and len(lines_of(out)) == 11


def partial_of_two(ask) -> Path:
    out = stopped_after(2, ask)
    return out.with_name(out.name + ".partial")


def test_a_changed_file_or_model_is_noticed(base, ask, file, tmp_path, monkeypatch, capsys):
    out = stopped_after(1, ask)
    file.write_text(file.read_text().replace('"id": "q3"', '"id": "q99"'))
    err, code, _ = ask(out=out)
    assert code == 2 and "with other settings: the prompts (--data" in err
    file.write_text(file.read_text().replace('"id": "q99"', '"id": "q3"'))
    other = chat_base(tmp_path / "other", seed=1)
    err, code, _ = ask("--model", other, out=out)
    assert code == 2 and "with other settings: the weights of the model (--model). " in err


def test_a_partial_file_that_is_damaged_or_foreign_is_left_alone(ask):
    out = stopped_after(2, ask)
    partial = out.with_name(out.name + ".partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    for content, said in (
        (b"".join([*lines[:3], b"{broken\n", *lines[3:]]), "line 4 is damaged; delete the file to begin anew"),
        (b'{"messages": []}\n', "is in the way, and holds no answers of generate.py"),
        (b"notes of mine, on one line", "is in the way, and holds no answers of generate.py"),
    ):
        partial.write_bytes(content)
        err, code, _ = ask(out=out)
        assert code == 2 and said in err and partial.read_bytes() == content
    # A first line that was cut off has no answers behind it.
    partial.write_bytes(lines[0][:30])
    assert ask(out=out)[1] == 0 and len(lines_of(out)) == 11


def test_two_processes_do_not_write_one_file(ask, tmp_path):
    out = tmp_path / "a.jsonl"
    descriptor = open_locked(tmp_path / "a.jsonl.partial")
    err, code, _ = ask(out=out)
    assert descriptor is not None and code == 2 and "a.jsonl.partial: another process is writing it" in err


@pytest.mark.slow
def test_killed_and_started_again_equals_a_run_that_was_not(base, file, tmp_path):
    words = [sys.executable, str(ROOT / "generate.py"), "--model", str(base), "--dtype", "fp32", "--device", "cpu"]
    words += ["--data", str(file), "--max-new-tokens", "60", "--batch-size", "1", "--samples", "4"]
    words += ["--temperature", "1", "--seed", "5", "--out"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    subprocess.run([*words, str(whole)], check=True)
    partial = tmp_path / "killed.jsonl.partial"
    for lines in (5, 20):
        process = subprocess.Popen([*words, str(killed)])
        while not partial.exists() or partial.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not killed.exists()
    subprocess.run([*words, str(killed)], check=True)
    assert killed.read_bytes() == whole.read_bytes() and not partial.exists()


# ---- what a file asks ----


def read(path: Path, **settings) -> tuple[list, list[str]]:
    said = []
    return read_prompts(open_prompts(path), print_fn=said.append, **settings), said


USER = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("record", "asked", "reference"),
    [
        ({"prompt": "q"}, USER, None),
        ({"prompt": USER, "id": 7}, USER, None),
        ({"question": "q", "context": "c"}, [{"role": "user", "content": "c\n\nq"}], None),
        ({"instruction": "i", "input": "q"}, [{"role": "user", "content": "i\n\nq"}], None),
        ({"instruction": "q", "input": ""}, USER, None),
        ({"prompt": "q", "system": "s"}, [{"role": "system", "content": "s"}, *USER], None),
        ({"prompt": "q", "text": "q and more"}, USER, None),
        ({"prompt": "q", "label": "safe"}, USER, None),
        ({"prompt": "q", "completion": "a"}, USER, "a"),
        ({"prompt": "q", "completion": ""}, USER, None),
        ({"text": "q", "label": 3}, USER, "3"),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}, *USER]}, None, None),
        ({"messages": [*USER, {"role": "assistant", "content": " "}]}, USER, None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, USER, "a"),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, USER, "good"),
        ({"prompt": "q", "completion": "bad", "label": False}, USER, None),
        ({"prompt": "q", "completion": "good", "label": True}, USER, "good"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_record_asks(tmp_path, record, asked, reference):
    (prompt,), _ = read(jsonl(tmp_path / "a.jsonl", [record]))
    assert prompt.messages == (asked or record["messages"])
    assert (prompt.reference and prompt.reference["content"]) == reference
    assert prompt.record.id == record.get("id")


def test_lines_and_columns(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffred fox\r\n\r\n  über 河 \n".encode())
    prompts, said = read(text)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["red fox", "  über 河 "]
    assert [prompt.place for prompt in prompts] == ["a.txt line 1", "a.txt line 3"]
    assert said[0] == f"data      {text}: a prompt a line (TXT, 2 records)"
    table = tmp_path / "a.csv"
    table.write_text('id,question,topic\nx1,"red, or not?",a\nx2,why,b\n')
    prompts, said = read(table)
    assert [(each.record.id, each.messages[0]["content"]) for each in prompts] == [
        ("x1", "red, or not?"),
        ("x2", "why"),
    ]
    assert said == [
        f"data      {table}: question alone (CSV, 2 records), ignored keys 'topic'",
        "          2 prompts, 0 with a reference answer",
    ]


def test_a_folder_is_asked_for_its_test_part_and_system_stands_where_none_is(tmp_path):
    jsonl(tmp_path / "d" / "train.jsonl", [{"prompt": "no", "completion": "a"}])
    own = [{"role": "system", "content": "own"}, *USER]
    jsonl(tmp_path / "d" / "test.jsonl", [{"messages": own}, {"messages": USER}, {"messages": USER}])
    prompts, said = read(tmp_path / "d", system="be red", limit=2)
    assert prompts[0].messages == own and prompts[1].messages == [{"role": "system", "content": "be red"}, *USER]
    assert [each.place for each in prompts] == ["test.jsonl line 1", "test.jsonl line 2"]
    assert "not read here: train.jsonl (train)" in said[0]
    assert said[1].endswith(
        "2 prompts, 0 with a reference answer, 1 that have a system message of their own, and not --system"
    )


def test_map_makes_prompts(ask, tmp_path):
    (tmp_path / "my.py").write_text("def f(r):\n    return {'prompt': r['turns'][0]} if r['turns'] else None\n")
    data = jsonl(tmp_path / "mt.jsonl", [{"turns": ["red", "fox"]}, {"turns": []}, {"turns": ["blue"]}])
    err, code, out = ask("--map", f"{tmp_path / 'my.py'}:f", data=data)
    assert code == 0 and "dropped 1 (left out by --map)" in err
    assert [a["messages"][0]["content"] for a in lines_of(out)] == ["red", "blue"]


@needs_shared
def test_real_files_of_prompts():
    prompts, said = read(SHARED / "HumanEval.jsonl.gz", is_complete=True)
    assert (len(prompts), prompts[0].record.id) == (164, "HumanEval/0") and prompts[0].text.startswith("from typing")
    assert len(read(SHARED / "xstest_prompts.csv")[0]) == 450
    prompts, said = read(SHARED / "kto_en_demo.json")
    assert said[1].endswith("300 prompts, 150 with a reference answer, 150 whose answer is labelled as a bad one")


# ---- bad input ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "p.txt"], "--data: needs --out FILE.jsonl"),
        (["--out", "a.jsonl", "--prompt", "x"], "--out: is for a file of prompts; add --data FILE"),
        (["--samples", "2"], "--samples: is for a file of prompts"),
        (["--overwrite"], "--overwrite: is for a file of prompts"),
        (["--data", "p.txt", "--prompt", "x", "--out", "a.jsonl"], "--prompt: the prompts are those of --data"),
        (
            ["--data", "p.txt", "--out", "a.csv"],
            "--out a.csv: is written as JSON lines; give a name that ends in .jsonl",
        ),
        (["--data", "p.txt", "--out", "a.jsonl", "--samples", "4"], "--samples 4: at --temperature 0 all samples"),
        (["--data", "p.txt", "--out", "a.jsonl", "--samples", "0"], "--samples 0: must be 1 or more"),
        (["--data", "p.txt", "--out", "a.jsonl", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--data", "p.txt", "--out", "a.jsonl", "--lookup", "4"], "--lookup: is for one prompt at a time"),
        (["--data", "p.txt", "--out", "a.jsonl", "--adapter", "a", "b"], "--adapter: --data takes one"),
        (["--data", "p.txt", "--out", "a.jsonl", "--min-p", "0.1"], "--min-p: is for sampling"),
        (
            ["--data", "p.txt", "--out", "a.jsonl", "--min-p", "2", "--temperature", "1"],
            "--min-p 2.0: must be 0 (all) to 1",
        ),
        (["--data", "none.txt", "--out", "a.jsonl"], "none.txt: no such file"),
        (["--data", "same.jsonl", "--out", "same.jsonl"], "--out same.jsonl: is the file of --data"),
        (["--data", "folder", "--out", "folder/a.jsonl"], "--out folder/a.jsonl: would be in the folder of --data"),
        (["--data", "p.txt", "--out", "folder.jsonl"], "--out folder.jsonl: is a folder"),
        (["--data", "p.txt", "--out", "p.txt/a.jsonl"], "p.txt"),
        (["--data", "empty.txt", "--out", "a.jsonl"], "empty.txt: is empty"),
        (["--data", "empty.json", "--out", "a.jsonl"], "empty.json: is an empty list; nothing to answer"),
        (["--data", "notes.md", "--out", "a.jsonl"], "notes.md: Markdown is one text; pipe it into generate.py"),
        (
            ["--data", "text.jsonl", "--out", "a.jsonl"],
            "text.jsonl line 1: is plain text, which asks nothing; add --complete",
        ),
        (["--data", "odd.jsonl", "--out", "a.jsonl"], "odd.jsonl line 1: keys 'turns': no known format"),
        (["--data", "void.jsonl", "--out", "a.jsonl"], "void.jsonl line 1: no user message that says something"),
        (["--data", "mute.jsonl", "--out", "a.jsonl"], "mute.jsonl line 2: no user message that says something"),
        (
            ["--data", "long.jsonl", "--out", "a.jsonl"],
            "long.jsonl line 2: 618 tokens before the answer; the model takes 512",
        ),
        (
            ["--data", "talk.jsonl", "--out", "a.jsonl", "--complete"],
            "talk.jsonl line 1: has 3 messages before its answer",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_no_file(base, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("red fox")
    Path("empty.txt").write_text("")
    Path("empty.json").write_text("[]")
    Path("notes.md").write_text("# Notes\n\nred")
    for folder in ("folder", "folder.jsonl"):
        Path(folder).mkdir()
    jsonl(Path("folder/x.jsonl"), [{"prompt": "red"}])
    jsonl(Path("same.jsonl"), [{"prompt": "red"}])
    jsonl(Path("text.jsonl"), [{"text": "red"}])
    jsonl(Path("odd.jsonl"), [{"turns": ["red"]}])
    jsonl(Path("void.jsonl"), [{"messages": []}])
    jsonl(Path("mute.jsonl"), [{"prompt": "red"}, {"prompt": " "}])
    jsonl(Path("long.jsonl"), [{"prompt": "red"}, {"prompt": "1 " * 300}])
    jsonl(Path("talk.jsonl"), [{"messages": [*USER, {"role": "assistant", "content": "a"}, *USER]}])
    before = sorted(tmp_path.rglob("*"))
    general = ["--model", base, "--dtype", "fp32", "--device", "cpu"]
    _, err, code = command(generate, monkeypatch, capsys, *general, *words)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and said in last and err.count("error: ") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_ends_in_one_line_and_what_was_written_stays(ask, monkeypatch):
    """After two batches, with a part of the third one on the disk."""
    calls, fsync = iter(range(9)), os.fsync

    def fsync_or_fail(descriptor):
        if next(calls) == 3:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 50)
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(answer_file.os, "fsync", fsync_or_fail)
        err, code, out = ask("--batch-size", 4)
    assert code == 2 and err.endswith(f"error: {out}.partial: No space left on device\n") and not out.exists()
    err, code, _ = ask("--batch-size", 4, out=out)
    assert code == 0 and "resume    10 of 11" in err
    assert out.read_bytes() == ask("--batch-size", 4)[2].read_bytes()


def test_a_template_that_refuses_names_the_record(base, tmp_path):
    prompts, _ = read(jsonl(tmp_path / "a.jsonl", [{"prompt": "red"}]))
    tokenizer = replace(load_tokenizer(base), templates={"default": "{{ raise_exception('no such turn') }}"})
    with pytest.raises(UserError, match=r"a.jsonl line 1: .*no such turn"):
        encode_prompts(load_model(base), tokenizer, prompts)


def test_seeds_of_answers_are_apart():
    seeds = {batch_answers.seed_of(s, r, k) for s in range(9) for r in range(9) for k in range(9)}
    assert len(seeds) == 729 and max(seeds) < 1 << 63 and np.std([*seeds]) > 1 << 60
