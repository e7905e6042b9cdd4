"""evaluate.py, generate.py and what both load: the numbers against transformers, the words on bad input."""

import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support.helpers import chat_base, command, sentence

import data
import evaluate
import generate
from checkpoint import fingerprint, load_model
from common.errors import UserError
from dataset.formats import open_source
from dataset.records import Record
from evals import targets
from evals.answers import Answers
from evals.exact_match import exact
from evals.loss import example_losses, loss, trained_bytes
from evals.scores import ItemScores
from interop import resolve
from lora import add_lora, lora_layers, save_adapter
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": sentence(i, 2 + i)},
            {"role": "assistant", "content": sentence(-i, 1 + i % 5)},
        ]
    }
    for i in range(1, 12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "one")


def make_adapter(base: Path, folder: Path) -> Path:
    model = load_model(base)
    torch.manual_seed(1)
    add_lora(model, rank=4, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.3)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    return path


def read(path: Path) -> list[Record]:
    return open_source(path).read_all()


# ---- loss ----


def test_loss_equals_transformers_mean_over_the_answer_tokens(base, file):
    ours, tokenizer = load_model(base), load_tokenizer(base)
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    dataset = data.load([file], tokenizer, 512)
    total = count = 0
    for example in dataset.examples:
        ids, trained = (torch.tensor([[*each]]) for each in (example.ids.tolist(), example.loss_weights > 0))
        with torch.no_grad():
            mean = theirs(input_ids=ids, labels=ids.masked_fill(~trained, -100)).loss
        total, count = total + float(mean) * int(trained.sum()), count + int(trained.sum())
    result = loss(ours, dataset)
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4)


def test_loss_does_not_depend_on_the_batch_size_and_repeats_with_dropout_configured(base, file):
    model = load_model(base)
    add_lora(model, rank=4, alpha=8, dropout=0.5)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.3)
    model.train()
    dataset = data.load([file], load_tokenizer(base), 512)
    once, again = loss(model, dataset, 8), loss(model, dataset, 8)
    assert once == again
    assert model.training  # training goes on as it was
    for size in (1, 3):
        assert loss(model, dataset, size)["loss"] == pytest.approx(once["loss"], rel=1e-5)


def test_bits_per_byte_are_the_nats_of_transformers_over_the_bytes_of_the_answers(base, tmp_path):
    answers = ["red 河 fox", "été", "a", "naïve 🦊 " * 3]
    path = tmp_path / "a.jsonl"
    turns = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": text}] for text in answers]
    path.write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    tokenizer = load_tokenizer(base)
    dataset = data.load([path], tokenizer, 512)
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    nats = 0.0
    for example in dataset.examples:
        ids, trained = (torch.tensor([[*each]]) for each in (example.ids.tolist(), example.loss_weights > 0))
        with torch.no_grad():
            mean = theirs(input_ids=ids, labels=ids.masked_fill(~trained, -100)).loss
        nats += float(mean) * int(trained.sum())
    num_bytes = trained_bytes(dataset, tokenizer)
    # The template writes a line end after the end of the last answer, which is not trained.
    assert sorted(num_bytes) == sorted(len(text.encode()) for text in answers)
    measured = example_losses(load_model(base), dataset)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in answers)
    assert measured.bits_per_byte(num_bytes) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(measured.bits_per_byte(0 * num_bytes))


def test_the_loss_by_a_key_is_that_of_each_part_alone(base, tmp_path, monkeypatch, capsys):
    kinds = ["short", "long", None]
    parts: dict[str, list[dict]] = {"short": [], "long": [], "(without it)": []}
    records = []
    for number, record in enumerate(RECORDS):
        kind = kinds[number % 3]
        extra = {} if kind is None else {"meta": {"kind": kind}}
        records.append(record | extra)
        parts[kind or "(without it)"].append(record)
    whole = tmp_path / "whole.jsonl"
    whole.write_text("\n".join(json.dumps(record) for record in records))
    words = ["loss", "--model", base, "--dtype", "fp32"]
    out, _, code = command(evaluate, monkeypatch, capsys, *words, "--data", whole, "--by", "meta.kind")
    assert code == 0
    rows = {line.split("  ")[0]: line.split()[-3:] for line in out.split("\n\n")[-1].splitlines()[2:]}
    assert {*rows} == {*parts}
    for name, own in parts.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(record) for record in own))
        alone, _, _ = command(evaluate, monkeypatch, capsys, *words, "--data", file)
        loss_alone, _, _, tokens = alone.splitlines()[-1].split()[1:]
        assert rows[name] == [str(len(own)), tokens, loss_alone]


def test_models_that_keep_other_records_are_grouped_each_by_its_own(base, tmp_path, monkeypatch, capsys):
    short = chat_base(tmp_path / "short", max_position_embeddings=64)
    file = tmp_path / "kinds.jsonl"
    records = [{"prompt": sentence(i, 3), "completion": sentence(i + 9, 3), "kind": "AB"[i % 2]} for i in range(8)]
    records[0]["prompt"] = records[4]["prompt"] = sentence(1, 40)
    file.write_text("\n".join(map(json.dumps, records)))
    words = ["--data", file, "--dtype", "fp32"]
    for first, second in ((short, base), (base, short)):
        by_kind = ["loss", "--model", second, "--versus", first, "--by", "kind", *words]
        out, err, code = command(evaluate, monkeypatch, capsys, *by_kind)
        assert code == 0, err
        assert "WARNING: the two models read different records" in out
        rows = {line.split()[0]: line.split()[1:] for line in out.split("\n\n")[-1].splitlines()[2:]}
        # The weights are the same, and so are the records of B.
        assert rows["B"][0] == "4" and rows["B"][2] == rows["B"][3] and float(rows["B"][4]) == 0
        assert rows["A"][0] == ("4" if second == base else "2") and float(rows["A"][4]) != 0
        comparison = ["compare", first, second, "--target", file, "--metric", "none", "--dtype", "fp32", "--limit", 5]
        _, err, code = command(evaluate, monkeypatch, capsys, *comparison)
        assert code == 2 and "5 and 5 examples that are not the same, which can't be paired" in err


def test_the_loss_of_several_files_and_of_each(base, file, tmp_path, monkeypatch, capsys):
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps(RECORDS[0]))
    words = ["loss", "--model", base, "--dtype", "fp32"]
    both, _, code = command(evaluate, monkeypatch, capsys, *words, "--data", file, second, "--by", "file")
    assert code == 0
    lines = both.split("\n\n")[-1].splitlines()[2:]
    for line, path in zip(lines, (file, second), strict=True):
        alone, _, _ = command(evaluate, monkeypatch, capsys, *words, "--data", path)
        assert line.split()[0] == path.name and line.split()[-1] == alone.splitlines()[-1].split()[1]
    drawn, _, code = command(evaluate, monkeypatch, capsys, *words, "--data", file, second, "--limit", 3)
    assert code == 0 and "--limit: 3 of 12, drawn by --seed 0" in drawn


def test_files_of_one_name_are_told_apart(base, file, tmp_path, monkeypatch, capsys):
    for name, record in (("a", RECORDS[0]), ("b", RECORDS[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(json.dumps(record))
    paths = [tmp_path / "a/test.jsonl", tmp_path / "b/test.jsonl", file]
    words = ["loss", "--model", base, "--dtype", "fp32", "--by", "file", "--data", *paths]
    out, _, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0
    names = {line.split()[0] for line in out.split("\n\n")[-1].splitlines()[2:]}
    assert names == {"a/test.jsonl", "b/test.jsonl", file.name}


# ---- exact ----


@pytest.fixture(scope="module")
def answered(base) -> list[Record]:
    """Records whose references are what transformers answers, greedily, within 12 tokens."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    records = []
    for number, record in enumerate(RECORDS):
        ask = record["messages"][:1]
        ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            whole = theirs.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        answer = tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        records.append(Record([*ask, {"role": "assistant", "content": f" {answer}\n"}], None, f"record {number}"))
    return records


def test_a_models_own_answers_score_100_percent_and_altered_ones_miss(base, answered):
    model, tokenizer = load_model(base), load_tokenizer(base)
    result = exact(model, tokenizer, answered, max_new_tokens=12, batch_size=3)
    assert result.accuracy == 1.0 and result.right == result.total == len(RECORDS)
    for number in (0, 4):
        turns = answered[number].messages
        other = [turns[0], {"role": "assistant", "content": turns[1]["content"].strip() + "x"}]
        answered = [*answered[:number], Record(other, None, "altered"), *answered[number + 1 :]]
    altered = exact(model, tokenizer, answered, max_new_tokens=12, batch_size=32)
    assert [i for i, hit in enumerate(altered.hits) if not hit] == [0, 4]
    assert altered.answers == result.answers  # whatever the batches


def test_an_answer_ends_before_its_stop_token(base, answered):
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompt, _ = tokenizer.render(answered[0].messages[:1], add_generation_prompt=True)
    ids = model.generate([prompt], 12)[0]
    stop = next(i for i in range(1, 12) if ids[i] not in ids[:i])
    tokenizer.stop_ids = {ids[stop]}
    result = exact(model, tokenizer, answered[:1], max_new_tokens=12)
    assert result.answers == [tokenizer.decode(ids[:stop], skip_special=True)]


def test_default_length_leaves_room_for_the_longest_reference(base, answered, monkeypatch):
    model, tokenizer = load_model(base), load_tokenizer(base)
    asked = []
    monkeypatch.setattr(model, "generate", lambda prompts, n, stop: asked.append(n) or [[5]] * len(prompts))
    exact(model, tokenizer, read_turns("a", "red " * 30), batch_size=32)
    assert asked == [8 + len(tokenizer.encode("red " * 30, bos=False, eos=False))]


def read_turns(*turns: str) -> list[Record]:
    roles = ("user", "assistant")
    return [Record([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], None, "here")]


def test_shots_stand_between_system_turn_and_question(base, monkeypatch):
    model, tokenizer = load_model(base), load_tokenizer(base)
    record, prompts = read_turns("first", "one", "second", "two", "third")[0], []
    record.messages.insert(0, {"role": "system", "content": "be red"})
    monkeypatch.setattr(model, "generate", lambda rows, n, stop: prompts.extend(rows) or [[5]] * len(rows))
    result = exact(model, tokenizer, [record], shots=read_turns("how", "so") + read_turns("why", "thus"))
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    expected = turn("system", "be red") + turn("user", "how") + turn("assistant", "so") + turn("user", "why")
    expected += turn("assistant", "thus") + turn("user", "first") + turn("assistant", "one") + turn("user", "second")
    assert tokenizer.decode(prompts[0]) == expected + "<|im_start|>assistant\n"
    assert result.references == ["two"] and result.prompt_tokens == len(prompts[0])


def test_what_cannot_be_asked_is_refused_by_name(base, monkeypatch):
    model, tokenizer = load_model(base), load_tokenizer(base)
    with pytest.raises(UserError, match="a.txt record 1: plain text has no reference"):
        exact(model, tokenizer, [Record(None, "text", "a.txt record 1")])
    with pytest.raises(UserError, match="r 3: no user message before its last assistant message"):
        exact(model, tokenizer, [Record([{"role": "assistant", "content": "hello"}], None, "r 3")])
    with pytest.raises(UserError, match="here: .* tokens before the answer; the model takes 512"):
        exact(model, tokenizer, read_turns("12 " * 600, "x"))
    tokenizer = replace(tokenizer, templates={"default": "{{ raise_exception('no\x1b such turn') }}"})
    with pytest.raises(UserError, match=r"^here: .*no\\x1b such turn"):
        exact(model, tokenizer, read_turns("a", "x"))


# ---- the commands ----


@pytest.mark.parametrize("what", ["loss", "exact"])
def test_side_by_side_equals_two_runs_and_loads_a_shared_base_once(base, adapter, file, monkeypatch, capsys, what):
    words = [what, "--data", file, "--model", base, "--dtype", "fp32", "--limit", 4]
    words += ["--max-new-tokens", 6] if what == "exact" else []
    loads = []
    monkeypatch.setattr(targets, "load_model", lambda *a: loads.append(a) or load_model(*a))
    row = lambda out, name: next(line for line in reversed(out.splitlines()) if line.startswith(name)).split()[1:]
    alone, _, _ = command(evaluate, monkeypatch, capsys, *words)
    tuned, _, _ = command(evaluate, monkeypatch, capsys, *words, "--adapter", adapter)
    loads.clear()
    both, _, code = command(evaluate, monkeypatch, capsys, *words, "--adapter", adapter, "--versus", "base")
    assert code == 0 and len(loads) == 1
    assert sum(line.startswith("data ") for line in both.splitlines()) == both.count("--limit: 4 of") == 1
    table = both.split("\n\n")[1]
    assert row(table, "base") == row(alone.split("\n\n")[1], "model")
    assert row(table, "adapter") == row(tuned.split("\n\n")[1], "adapter")
    if what == "loss":
        assert row(table, "base") != row(table, "adapter")
        assert float(row(table, "change")[0]) == pytest.approx(
            float(row(table, "adapter")[0]) - float(row(table, "base")[0]), abs=2e-4
        )


def test_two_adapters_on_one_base_do_not_add_up(base, adapter, file, monkeypatch, capsys):
    words = ["loss", "--data", file, "--model", base, "--dtype", "fp32", "--adapter", adapter, "--versus", adapter]
    out, _, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0 and out.splitlines()[-1].split()[1] == "+0.0000"


def test_misses_are_shown_on_one_line_each_without_control_characters(base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "hostile.jsonl"
    hostile = [{"role": "user", "content": "a\x1b[2J\nb"}, {"role": "assistant", "content": "\x1b]0;x\x07 never " * 40}]
    file.write_text(json.dumps({"messages": hostile}))
    words = ["exact", "--data", file, "--model", base, "--dtype", "fp32", "--max-new-tokens", 4]
    out, _, _ = command(evaluate, monkeypatch, capsys, *words)
    assert "\nmodel: 1 wrong answer\n  question   a\\x1b[2J\\nb\n" in out
    assert "\x1b" not in out and max(map(len, out.split("reference")[1].splitlines())) < 112


def test_what_equals_its_reference_is_not_shown_as_a_miss(capsys):
    """Also where a measure gives it less than 100 %, as CodeBLEU does to short programs."""
    asked = [Record([{"role": "user", "content": name}], None, name) for name in ("same", "other")]
    answers = Answers(asked, [["y = 1"]] * 2, ["y = 1\n", "y = 2"], 1.0)
    for record in asked:
        record.references = ["y = 1"]
    evaluate.print_misses("model", answers, ItemScores({"code similarity": [0.76, 0.5]}, {}, {}), 5)
    said = capsys.readouterr().out
    assert "model: 1 answer that scores below 100 %" in said
    assert "other" in said and "same" not in said


def test_an_adapter_brings_its_own_base_and_other_weights_are_warned_of(base, file, tmp_path, monkeypatch, capsys):
    adapter = make_adapter(base, tmp_path / "adapter")
    note = adapter / "plaintune.json"
    note.write_text(json.dumps({"base_sha256": fingerprint(base)}))
    words = ["loss", "--data", file, "--adapter", adapter, "--dtype", "fp32"]
    out, _, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0 and f"base      {base}: " in out and "WARNING" not in out
    note.write_text(json.dumps({"base_sha256": "0" * 64}))
    assert "WARNING" in command(evaluate, monkeypatch, capsys, *words)[0]


def test_an_adapter_whose_base_is_gone_is_refused_unless_it_is_the_default(base, file, tmp_path, monkeypatch, capsys):
    adapter = make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/where/else"}))
    words = ["loss", "--data", file, "--adapter", adapter, "--dtype", "fp32"]
    _, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 2 and "its base, some/where/else, is not here; give --model" in err
    (adapter / "plaintune.json").write_text(json.dumps({"base_sha256": fingerprint(base)}))
    monkeypatch.setattr(resolve, "model_folder", lambda m, real=resolve.model_folder: base if m is None else real(m))
    out, _, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0 and "base      the default one" in out


def test_the_wrong_kind_of_folder_is_told_what_it_is(base, adapter, file, tmp_path, monkeypatch, capsys):
    run_folder = tmp_path / "run"
    shutil.copytree(adapter, run_folder / "final")
    (run_folder / "metrics.jsonl").write_text("")
    cases = {
        ("--model", run_folder): f"is the folder of a run; what it made is {run_folder / 'final'}",
        ("--model", adapter): "is an adapter, not a model; give it as --adapter",
        ("--model", "someone/some-model"): "someone/some-model: no such folder",
        ("--adapter", run_folder): f"is the folder of a run; its adapter is {run_folder / 'final'}",
        ("--adapter", base): "is a whole model, not an adapter; give it as --model",
        ("--adapter", tmp_path): "no adapter_config.json in it",
    }
    for words, said in cases.items():
        _, err, code = command(evaluate, monkeypatch, capsys, "loss", "--data", file, *words)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_model_trained_here_is_compared_with_the_base_it_names(base, file, tmp_path, monkeypatch, capsys):
    tuned = shutil.copytree(base, tmp_path / "tuned")
    words = ["loss", "--data", file, "--model", tuned, "--versus", "base", "--dtype", "fp32"]
    assert command(evaluate, monkeypatch, capsys, *words)[2] == 2
    (tuned / "plaintune.json").write_text(json.dumps({"base": str(base)}))
    out, _, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0 and out.splitlines()[-1].split()[1] == "+0.0000"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (evaluate, ["loss", "--data", "no.json"], "no.json: no such file"),
        (evaluate, ["exact", "--data", "a.txt"], "a.txt record 1: plain text has no reference"),
        (evaluate, ["loss", "--data", "a.txt", "--adapter", "nowhere"], "nowhere: no such folder"),
        (evaluate, ["loss", "--data", "a.txt", "--model", "nowhere"], "nowhere: "),
        (evaluate, ["loss", "--dta", "a.txt"], "--dta: no such flag; did you mean --data?"),
        (evaluate, ["loss"], "the following arguments are required: --data"),
        (evaluate, [], "the following arguments are required: loss or exact or f1 or"),
        (evaluate, ["accuracy", "--data", "a.txt"], "error: invalid choice: 'accuracy' (choose from 'loss', 'exact', "),
        (evaluate, ["los", "--data", "a.txt"], "invalid choice: 'los'"),
        (evaluate, ["loss", "--data", "a.txt", "--limit", "0"], "--limit 0: must be 1 or more"),
        (
            evaluate,
            ["loss", "--data", "a.txt", "--show", "3"],
            "--show: is for answers and choices; `loss` does not use it",
        ),
        (evaluate, ["loss", "--data", "a.txt", "--versus", "base"], "--versus base: needs --adapter"),
        (evaluate, ["loss", "--data", "b.jsonl", "--by", "topic"], "--by topic: no record has it; they have 'comp"),
        (evaluate, ["exact", "--data", "b.jsonl", "--by", "topic"], "--by: is for `loss`; `exact` does not use it"),
        (evaluate, ["exact", "--data", "b.jsonl", "a.txt"], "--data b.jsonl a.txt: `exact` takes one file or folder"),
        (evaluate, ["loss", "exact", "--data", "b.jsonl"], "loss exact: only evaluations of the model's answers"),
        (generate, ["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        (generate, ["--prompt", "a", "--temperature", "nan"], "--temperature nan: must be 0 or more"),
        (generate, ["--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
        (generate, ["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (generate, ["--prompt", "a", "--adapter", "=red"], "--adapter =red: NAME=DIR or DIR is wanted"),
        (generate, ["--prompt", "a", "--adapter", "red="], "--adapter red=: NAME=DIR or DIR is wanted"),
        (generate, ["--prompt", "a", "--top-k", "5"], "--top-k: is for sampling"),
        (generate, ["--prompt", "a", "--seed", "5"], "--seed: is for sampling"),
        (generate, ["--prompt", "a", "--top-k", "x"], "--top-k: a whole number is wanted, not 'x'"),
        (
            generate,
            ["--prompt", "a", "--max-tokens", "9"],
            "--max-tokens: no such flag; did you mean --max-new-tokens?",
        ),
        (generate, ["--prompt", " "], "the prompt is empty"),
        (generate, ["--prompt", "a", "--adapter", "b=x", "c=y"], "--adapter: one prompt takes one; run it once"),
    ],
)
def test_a_mistake_ends_in_one_line(script, words, said, tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "model_folder", lambda m, real=resolve.model_folder: base if m is None else real(m))
    Path("a.txt").write_text("red fox")
    Path("b.jsonl").write_text(json.dumps({"prompt": "red", "completion": "fox"}))
    _, err, code = command(script, monkeypatch, capsys, *words)
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_scripts_run_by_themselves(base, tmp_path):
    python = lambda *words: subprocess.run(
        [sys.executable, *words], check=False, cwd=ROOT, capture_output=True, text=True, input=""
    )
    wrong = python("evaluate.py", "loss", "--data", str(tmp_path / "none.json"))
    assert wrong.returncode == 2 and wrong.stderr.endswith("none.json: no such file\n") and "Trace" not in wrong.stderr
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompt, _ = tokenizer.render([{"role": "user", "content": "red 河"}], add_generation_prompt=True)
    ids = model.generate([prompt], 24, stop=tokenizer.stop_ids)[0]
    expected = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids], skip_special=True)
    words = ["--model", str(base), "--prompt", "red 河", "--max-new-tokens", "24", "--dtype", "fp32", "--device", "cpu"]
    right = python("generate.py", *words)
    assert right.returncode == 0, right.stderr
    assert (
        right.stdout
        == "".join(c for c in expected if c in "\n\t" or not "\0" <= c < " " and not "\x7f" <= c < "\xa0") + "\n"
    )


# ---- streaming ----

SETTINGS = Namespace(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=None,
    repetition_penalty=1.0,
    max_new_tokens=99,
    complete=False,
    system=None,
    lookup=0,
    adapter=None,
)


def test_streaming_never_breaks_a_character(base, monkeypatch):
    model, tokenizer = load_model(base), load_tokenizer(base)
    text = "a 🦊 ü 龘 \x1b"
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert len(ids) > len(text)  # some characters take several tokens
    monkeypatch.setattr(model, "stream", lambda *a, **k: ([(0, i)] for i in [*ids, 2]))
    pieces = list(generate.answer(model, tokenizer, "x", SETTINGS))
    assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    cut = ids[: len(tokenizer.encode("a 🦊", bos=False, eos=False)) - 1]
    monkeypatch.setattr(model, "stream", lambda *a, **k: ([(0, i)] for i in cut))
    assert "".join(generate.answer(model, tokenizer, "x", SETTINGS)) == tokenizer.decode(cut)  # the rest, at the end


def test_chat_remembers_resets_and_survives_ctrl_c(monkeypatch, capsys):
    typed, seen = iter(["hi", "again", "/reset", KeyboardInterrupt, "new", EOFError]), []

    def type_next(_):
        word = next(typed)
        if isinstance(word, type):
            raise word
        return word

    def answer(model, tokenizer, turns, args):
        seen.append([message["content"] for message in turns])
        yield "o\x1bk"
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(generate, "answer", answer)
    generate.chat(None, Namespace(tokenizer=Namespace(system="")), SETTINGS)
    assert seen == [["hi"], ["hi", "o\x1bk", "again"], ["new"]]
    assert capsys.readouterr().out == "ok\n" * 2 + "\nok\n\n"


# ---- several adapters on one base ----


@pytest.fixture(scope="module")
def two_adapters(base, tmp_path_factory):
    """Two that make greedy answers differ from the base's and from each other's."""
    folders = []
    for seed, rank in ((1, 4), (2, 3)):
        model = load_model(base)
        add_lora(model, rank, 8.0, targets="q_proj,down_proj" if seed == 2 else "all")
        torch.manual_seed(seed)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        folders.append(tmp_path_factory.mktemp("run") / f"run{seed}" / "final")
        save_adapter(model, folders[-1])
    return folders


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_adapters_are_switched_by_name(base, two_adapters, monkeypatch, capsys, merge):
    def once(*words):
        words = ["--model", base, "--max-new-tokens", 8, "--dtype", "fp32", "--device", "cpu", *words]
        out, err, code = command(generate, monkeypatch, capsys, *words)
        assert code == 0, err
        return out

    alone = {name: once("--prompt", "red", *(["--adapter", path] if path else []))
             for name, path in {"run1": two_adapters[0], "blue": two_adapters[1], "none": None}.items()}  # fmt: skip
    assert len({*alone.values()}) == 3
    order = ["run1", "blue", "none", "blue", "run1", "none"]
    typed = iter(
        [line for name in order for line in (f"/adapter {name}", "/reset", "red")] + ["/adapter green", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    words = ["--model", base, "--max-new-tokens", 8, "--dtype", "fp32", "--device", "cpu", *merge]
    words += ["--adapter", two_adapters[0], f"blue={two_adapters[1]}"]
    out, err, code = command(generate, monkeypatch, capsys, *words)
    assert code == 0 and out == "".join(alone[name] for name in order), err
    assert "/adapter green: there is no adapter with this name; choose one of run1, blue, none" in err


def test_look_up_gives_the_same_answer(base, monkeypatch, capsys):
    words = ["--model", base, "--max-new-tokens", 40, "--dtype", "fp32", "--device", "cpu", "--prompt", "red fox " * 9]
    plain, _, _ = command(generate, monkeypatch, capsys, *words)
    guessed, _, code = command(generate, monkeypatch, capsys, *words, "--lookup", 6)
    assert code == 0 and guessed == plain
    for wrong in (["--temperature", 1], ["--lookup", -1]):
        _, err, code = command(generate, monkeypatch, capsys, *words, "--lookup", 6, *wrong)
        assert code == 2 and "--lookup" in err


def test_a_record_that_is_too_long_names_no_flag_of_training(base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "long.jsonl"
    records = [{"prompt": "12 " * 600, "completion": "a"}, {"prompt": "q", "completion": "red fox"}]
    file.write_text("\n".join(map(json.dumps, records)))
    words = ["--data", file, "--model", base, "--dtype", "fp32"]
    out, _, code = command(evaluate, monkeypatch, capsys, "loss", *words)
    assert code == 0 and "          left out: 1 record whose answer does not fit into --seq-len 512\n" in out
    assert "          WARNING: 50.0 % of the records are longer than --seq-len\n" in out and "--truncate" not in out
    _, err, code = command(evaluate, monkeypatch, capsys, "exact", *words)
    assert code == 2 and f"{file} line 1: " in err and "takes 512; shorten it, or leave it out\n" in err


def test_a_file_of_bad_answers_alone_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "kto.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "label": False}))
    _, err, code = command(evaluate, monkeypatch, capsys, "exact", "--data", tmp_path / "kto.jsonl")
    assert code == 2 and "no record with a good answer to compare with" in err


def test_a_miss_shows_the_question_behind_a_long_text(base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"context": "the red fox jumps " * 20, "question": "who jumps?", "answer": "never 7"}))
    words = ["exact", "--data", file, "--model", base, "--dtype", "fp32", "--max-new-tokens", 4]
    out, _, _ = command(evaluate, monkeypatch, capsys, *words)
    (line,) = (line for line in out.splitlines() if line.startswith("  question "))
    assert line.startswith("  question   the red fox jumps the") and line.endswith("who jumps?") and " ... " in line
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "completion": f"never {i}"}) + "\n" for i in range(3)))
    out, _, _ = command(evaluate, monkeypatch, capsys, *words, "--show", 2)
    assert "\nmodel: first 2 of its 3 wrong answers\n" in out and out.count("  reference  never") == 2
