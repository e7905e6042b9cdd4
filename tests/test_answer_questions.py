"""What evaluate.py asks and compares with: several references, references in files of their own, every answer of a
conversation, tools; answers drawn at random; answers that are saved, and scored again without a model."""

import json

import pytest
from support.helpers import chat_base, command, sentence

import evaluate
import generate
from dataset.formats import open_source
from dataset.records import ReadStats
from evals import saved_answers, targets


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("base"))


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def asked(tmp_path):
    """Six questions, of which the odd ones accept two answers."""
    records = []
    for i in range(6):
        answers = [sentence(-i - 1, 3), f"other {i}"] if i % 2 else [sentence(-i - 1, 3)]
        records.append({"question": sentence(i, 4 + i), "answer": answers})
    return lines(tmp_path / "asked.jsonl", *records)


def words(base, *more):
    return [*more, "--model", base, "--dtype", "fp32", "--max-new-tokens", 5]


def row(out: str, name: str) -> list[str]:
    return next(line for line in reversed(out.splitlines()) if line.startswith(name + " ")).split()[1:]


# ---- several references ----


def accepted(path) -> tuple[list, str]:
    stats = ReadStats()
    source = open_source(path)
    records = source.read_all(stats)
    return [(record.messages[-1]["content"], record.references) for record in records], source.summary(stats)


def test_formats_carry_all_accepted_answers_and_train_the_first(tmp_path):
    squad = {"text": ["one", "1", "one"], "answer_start": [0, 0, 0]}
    path = lines(tmp_path / "a.jsonl", {"context": "c", "question": "q", "answers": squad})
    found, summary = accepted(path)
    assert found == [("one", ["one", "1"])]
    assert "1 with several accepted answers, the first of which is trained" in summary

    qas = [{"question": "q", "id": "x", "answers": [{"text": "b"}, {"text": "c"}]}]
    nested = {"data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(nested))
    assert accepted(tmp_path / "squad.json")[0] == [("b", ["b", "c"])]

    summaries = {"dialogue": "d", "summary1": "s1", "topic1": "t", "summary2": "s2", "summary3": "s3", "fname": "f"}
    path = lines(tmp_path / "b.jsonl", summaries, {"dialogue": "d", "summary1": "only"})
    assert accepted(path)[0] == [("s1", ["s1", "s2", "s3"]), ("only", None)]

    path = lines(
        tmp_path / "c.jsonl", {"question": "q", "answers": ["", "x", "y"]}, {"question": "q", "answers": ["x"]}
    )
    assert accepted(path)[0] == [("x", ["x", "y"]), ("x", None)]


# ---- saved, and scored again ----


def test_saved_answers_score_as_they_did_without_loading_a_model(base, asked, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    first, _, code = command(
        evaluate, monkeypatch, capsys, *words(base, "f1", "rouge", "chrf", "--data", asked, "--out", out)
    )
    assert code == 0
    direct, _, _ = command(evaluate, monkeypatch, capsys, *words(base, "f1", "rouge", "chrf", "--data", asked))
    tables = first.split("\n\n", 1)[1]
    assert "NOTE: model: 6 of 6 answers were cut off at the longest that an answer may be" in tables
    assert tables == direct.split("\n\n", 1)[1]
    saved = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["record"] for line in saved] == [1, 2, 3, 4, 5, 6]
    assert saved[1]["references"][1] == "other 1" and "references" not in saved[0]
    assert saved[0]["source"] == "asked.jsonl line 1"

    monkeypatch.setattr(targets, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for more in ([], ["--data", asked]):
        again, _, code = command(evaluate, monkeypatch, capsys, "f1", "rouge", "chrf", "--answers", out, *more)
        assert code == 0
        for table in ("F1 %", "ROUGE-1", "chrF2"):
            heading = next(i for i, line in enumerate(tables.splitlines()) if table in line)
            there = next(i for i, line in enumerate(again.splitlines()) if table in line)
            mine = tables.splitlines()[heading + 2].split()[1:]
            assert again.splitlines()[there + 2].split() == ["answers", *mine]
        assert tables.split("wrong answers")[-1].split("\n", 1)[1] == again.split("wrong answers")[-1].split("\n", 1)[1]


def test_the_answers_of_generate_are_scored_too(base, asked, tmp_path, monkeypatch, capsys):
    out = tmp_path / "generated.jsonl"
    drawn = ["--temperature", 1, "--seed", 3, "--samples", 2]
    _, err, code = command(generate, monkeypatch, capsys, *words(base, "--data", asked, "--out", out, *drawn))
    assert code == 0, err
    printed, _, code = command(evaluate, monkeypatch, capsys, "exact", "--answers", out)
    assert code == 0 and row(printed, "generated")[:2] == ["0", "12"]
    assert "12 answers to 6 records" in printed
    direct = tmp_path / "evaluated.jsonl"
    command(evaluate, monkeypatch, capsys, *words(base, "exact", "--data", asked, "--out", direct, *drawn))
    texts = [[json.loads(line)["messages"][-1] for line in file.read_text().splitlines()] for file in (out, direct)]
    assert texts[0] == texts[1] and len({text["content"] for text in texts[0]}) > 6


def test_random_draws_follow_from_the_seed(base, asked, monkeypatch, capsys):
    run = lambda *more: command(
        evaluate, monkeypatch, capsys, *words(base, "chrf", "--data", asked, "--temperature", 1, "--show", 1, *more)
    )[0]
    assert run("--seed", 1) == run("--seed", 1) != run("--seed", 2)
    # A table's numbers, and not only the texts, are of all samples.
    assert row(run("--samples", 3), "model") != row(run(), "model")


def test_two_files_side_by_side_and_versus_saves_both(base, asked, tmp_path, monkeypatch, capsys):
    out = tmp_path / "two.jsonl"
    printed, err, code = command(
        evaluate, monkeypatch, capsys, *words(base, "f1", "--data", asked, "--out", out, "--versus", base)
    )
    assert code == 0, err
    other = tmp_path / "two.versus.jsonl"
    assert other.is_file() and row(printed, "change")[0] == "+0.00"
    good = []
    for line in other.read_text().splitlines():
        value = json.loads(line)
        value["messages"][-1]["content"] = value["reference"]
        good.append(value)
    lines(other, *good)
    printed, _, _ = command(evaluate, monkeypatch, capsys, "f1", "--answers", out, other)
    assert row(printed, "two.versus") == ["100.00", "100.00", "6"]
    assert row(printed, "change")[1] == "+100.00"


def test_a_run_that_was_stopped_goes_on_and_is_not_overwritten(base, asked, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    run = words(base, "f1", "--data", asked, "--out", out, "--batch-size", 2)
    whole, _, _ = command(evaluate, monkeypatch, capsys, *run)
    content = out.read_bytes()
    _, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 2 and "is there already; --overwrite replaces it" in err
    out.unlink()

    write = saved_answers.AnswerFile.write
    monkeypatch.setattr(
        saved_answers.AnswerFile, "write", lambda *a: write(*a) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    _, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 130 and "2 of 6 answers are in" in err and not out.exists()
    monkeypatch.setattr(saved_answers.AnswerFile, "write", write)
    _, err, code = command(evaluate, monkeypatch, capsys, "f1", "--answers", f"{out}.partial")
    assert code == 2 and "holds the answers of an unfinished run" in err
    again, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 0 and again == whole and out.read_bytes() == content and "resume    2 of 6" in err


def test_two_models_go_on_where_the_second_was_stopped(base, asked, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "answers.jsonl", tmp_path / "answers.versus.jsonl"
    run = words(base, "f1", "--data", asked, "--out", out, "--versus", base, "--batch-size", 2)
    whole, _, _ = command(evaluate, monkeypatch, capsys, *run)
    content = out.read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    for file in (out, other):
        file.unlink()
    write = saved_answers.AnswerFile.write
    calls = []

    def stop_at_5(*arguments):
        write(*arguments)
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(saved_answers.AnswerFile, "write", stop_at_5)
    _, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 130 and "4 of 6 answers are in" in err and other.exists() and not out.exists()
    # The finished one is not answered again, nor with other settings.
    _, err, code = command(evaluate, monkeypatch, capsys, *run, "--max-new-tokens", 3)
    assert code == 2 and "holds answers that were generated with other settings" in err
    again, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 0 and again == whole and len(calls) == 6 and "resume    6 of 6" in err
    assert out.read_bytes() == other.read_bytes() == content and not list(tmp_path.glob("*.partial"))
    _, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 2 and "is there already; --overwrite replaces it" in err


def test_no_file_of_answers_replaces_the_questions(base, asked, monkeypatch, capsys):
    name = asked.with_name("q.versus.jsonl")
    asked.rename(name)
    before = name.read_bytes()
    run = words(base, "f1", "--data", name, "--out", name.with_name("q.jsonl"), "--versus", base, "--overwrite")
    _, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 2 and f"{name} is the file of --data, which it would replace" in err and name.read_bytes() == before


def test_a_grammar_that_is_not_installed_is_said_before_anything_is_answered(base, asked, monkeypatch, capsys):
    run = words(base, "code-similarity", "--data", asked, "--code-language", "c_sharp")
    monkeypatch.setattr(evaluate, "answer_records", None)
    _, err, code = command(evaluate, monkeypatch, capsys, *run)
    assert code == 2 and "--code-language c_sharp: its grammar is not installed; pip install tree-sitter-c-sharp" in err


def test_the_user_may_have_the_last_word(base, tmp_path, monkeypatch, capsys):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "bye"}]
    file = lines(tmp_path / "talk.jsonl", {"messages": talk}, {"messages": talk})
    out = tmp_path / "out.jsonl"
    printed, err, code = command(evaluate, monkeypatch, capsys, *words(base, "f1", "--data", file, "--out", out))
    assert code == 0, err
    assert [json.loads(line)["reference"] for line in out.read_text().splitlines()] == ["a", "a"]
    again, err, code = command(evaluate, monkeypatch, capsys, "f1", "--answers", out)
    assert code == 0 and row(again, "out") == row(printed, "model"), err


def test_answers_that_fit_nothing_are_refused_in_one_line(asked, tmp_path, monkeypatch, capsys):
    def line(number, question, **more):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
        return {"record": number, "messages": messages} | more

    other = lines(tmp_path / "other.jsonl", *(line(i, "?", reference="r") for i in range(1, 7)))
    few = lines(tmp_path / "few.jsonl", line(1, sentence(0, 4), reference="r"))
    bare = lines(tmp_path / "bare.jsonl", line(1, "?"))
    twice = lines(tmp_path / "twice.jsonl", line(1, "?", reference="r"), line(1, "?", reference="r"))
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    call = lines(tmp_path / "call.jsonl", line(1, "?", reference="", reference_tool_calls=calls))
    empty = lines(tmp_path / "empty.jsonl")
    cases = [
        (["--answers", other, "--data", asked], "record 1 answers another question than"),
        (["--answers", few, "--data", asked], "answers 1 questions, and"),
        (["--answers", bare], "bare.jsonl line 1: has no reference to compare with; give the --data"),
        (["--answers", twice], "twice.jsonl line 2: record 1 sample 1 is answered twice"),
        (["--answers", call], "call.jsonl line 1: its reference is a tool call, which `tools` compares"),
        (["--answers", asked], "asked.jsonl line 1: is no answer of `generate.py --data`"),
        (["--answers", empty], "empty.jsonl: holds no answers"),
        (["--answers", tmp_path / "no.jsonl"], "no.jsonl: no such file"),
        (["--answers", other, few], "answers other questions than"),
        (["--answers", other, "--model", "x"], "--model: is for a model; --answers scores saved answers"),
        (["--answers", other, "--limit", 3], "--limit: is for a file of questions; add --data FILE"),
        (["--data", asked, "--out", asked], "is the file of --data, which it would replace"),
        (["--data", asked, "--out", "a.txt"], "is written as JSON lines"),
        (["--data", asked, "--samples", 2], "at --temperature 0 all samples are the same"),
        (["--data", asked, "--overwrite"], "--overwrite: there is no --out to replace"),
        (["--data", asked, "--bleu-tokenizer", "zh"], "--bleu-tokenizer: is for `bleu`"),
        (["tools", "--data", asked], "tools: asks other questions of a file"),
        (["numeric", "--data", asked, "--model", "nowhere"], "nowhere"),
    ]
    for more, said in cases:
        _, err, code = command(evaluate, monkeypatch, capsys, "f1", *more)
        assert code == 2 and said in err and err.count("\n") == 1, (more, err)
    _, err, code = command(evaluate, monkeypatch, capsys, "loss", "--data", asked, "--temperature", 1)
    assert code == 2 and "--temperature: is for answers;" in err


def test_a_reference_that_an_evaluation_cannot_use_is_named_before_the_model_is_loaded(
    base, asked, monkeypatch, capsys
):
    monkeypatch.setattr(targets, "load_model", lambda *_: pytest.fail("a model was loaded"))
    for name, place, said in (("numeric", 3, "has no number"), ("json", 1, "is no JSON object or list")):
        _, err, code = command(evaluate, monkeypatch, capsys, *words(base, name, "--data", asked))
        assert code == 2 and f"asked.jsonl line {place}: its reference {said}" in err and err.count("\n") == 1


def test_questions_alone_are_told_from_a_format_that_is_not_known(tmp_path, monkeypatch, capsys):
    alone = lines(tmp_path / "alone.jsonl", {"prompt": "What?"}, {"prompt": "Who?"})
    odd = lines(tmp_path / "odd.jsonl", {"foo": 1})
    said = f"error: {alone}: prompt alone, with no answer to compare with; give records that have one"
    for what, more in (("rouge", ", or texts with an answer a line (--references FILE)"), ("classify", "")):
        _, err, code = command(evaluate, monkeypatch, capsys, what, "--data", alone)
        assert code == 2 and err == f"{said}{more}\n"
        _, err, code = command(evaluate, monkeypatch, capsys, what, "--data", odd)
        assert code == 2 and f"{odd} line 1: keys 'foo': no known format" in err and err.count("\n") == 1


# ---- references in files of their own ----


def test_lines_of_two_languages_are_prompts_and_references(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "test.en").write_text("one\n\ntwo\u2028half\r\nthree\n")
    (tmp_path / "test.de").write_text("eins\nleer\nzwei\ndrei\n")
    (tmp_path / "test2.de").write_text("EINS\nleer\n\nDREI\n")
    out = tmp_path / "out.jsonl"
    files = ["--data", tmp_path / "test.en", "--references", tmp_path / "test.de", tmp_path / "test2.de"]
    printed, err, code = command(
        evaluate, monkeypatch, capsys, *words(base, "bleu", *files, "--system", "Translate.", "--out", out)
    )
    assert code == 0, err
    assert "nrefs:var" in printed and "1 left out, whose prompt or reference is empty" in printed
    saved = [json.loads(line) for line in out.read_text().strip().split("\n")]
    assert [line["references"] for line in saved] == [["eins", "EINS"], ["zwei"], ["drei", "DREI"]]
    assert [message["content"] for message in saved[1]["messages"][:2]] == ["Translate.", "two\u2028half"]
    again, _, code = command(evaluate, monkeypatch, capsys, "bleu", "--answers", out)
    assert code == 0 and row(again, "out") == row(printed, "model")
    (tmp_path / "short.de").write_text("eins\n")
    files[-2:] = [tmp_path / "short.de"]
    _, err, code = command(evaluate, monkeypatch, capsys, *words(base, "bleu", *files))
    assert code == 2 and "short.de: 1 lines, and " in err and "has 4 prompts" in err


# ---- every answer of a conversation ----


def test_every_answer_of_a_conversation_is_asked_for(base, tmp_path, monkeypatch, capsys):
    talk = []
    for i, text in enumerate(["hello", "q1", "a1", "q2", "a2"]):
        talk.append({"role": "assistant" if i % 2 == 0 else "user", "content": text})
    file = lines(tmp_path / "talk.jsonl", {"messages": talk}, {"messages": talk[1:3]})
    out = tmp_path / "out.jsonl"
    printed, _, code = command(
        evaluate, monkeypatch, capsys, *words(base, "f1", "--data", file, "--turns", "all", "--out", out)
    )
    assert code == 0 and "--turns all: 3 answers of 2 conversations" in printed
    saved = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["reference"] for line in saved] == ["a1", "a2", "a1"]
    assert [message["content"] for message in saved[1]["messages"][:-1]] == ["hello", "q1", "a1", "q2"]
    assert saved[1]["source"] == "talk.jsonl line 1 answer 2"
    printed, _, _ = command(evaluate, monkeypatch, capsys, "f1", "--answers", out, "--data", file, "--turns", "all")
    assert "3 answers to 3 records" in printed


# ---- tools ----

FUNCTION = {
    "name": "area", "description": "Area", "parameters": {
        "type": "dict", "properties": {"base": {"type": "float"}, "unit": {"type": "string"}}, "required": ["base"],
    },
}  # fmt: skip


def test_the_last_message_that_calls_is_the_question_about_tools(base, tmp_path, monkeypatch, capsys):
    call = {"type": "function", "function": {"name": "area", "arguments": {"base": 2}}}
    user, words_ = {"role": "user", "content": "q"}, {"role": "assistant", "content": "It is 4."}
    calling = {"role": "assistant", "tool_calls": [call]}
    tools = [{"type": "function", "function": FUNCTION | {"parameters": {"type": "object", "properties": {}}}}]
    talk = [user, calling, {"role": "tool", "content": "4"}, words_]
    file = lines(
        tmp_path / "tools.jsonl",
        {"messages": talk, "tools": tools},
        {"messages": [user, words_], "tools": tools},
        {"messages": [user, words_]},
    )
    out = tmp_path / "out.jsonl"
    printed, err, code = command(evaluate, monkeypatch, capsys, *words(base, "tools", "--data", file, "--out", out))
    assert code == 0, err
    assert "2 questions about tools, 1 to be answered without a call, 1 records without tools left out" in printed
    assert "NOTE: 2 of 2 prompts have tools" in err
    saved = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["references"] for line in saved] == [['[{"name": "area", "arguments": {"base": 2}}]'], ["[]"]]
    assert [message["role"] for message in saved[0]["messages"]] == ["user", "assistant"]
    saved[0]["messages"][-1]["content"] = '<tool_call>{"name": "area", "arguments": {"base": 2.0}}</tool_call>'
    printed, _, code = command(evaluate, monkeypatch, capsys, "tools", "--answers", lines(out, *saved))
    assert code == 0 and row(printed, "out") == ["100.0", "100.0", "100.0", "0", "2"]
    # generate.py's own files have the call of the reference, and no list.
    del saved[0]["references"]
    saved[0]["reference_tool_calls"] = [call]
    printed, _, _ = command(evaluate, monkeypatch, capsys, "tools", "--answers", lines(out, *saved))
    assert row(printed, "out")[0] == "100.0"
    every, _, _ = command(evaluate, monkeypatch, capsys, *words(base, "tools", "--data", file, "--turns", "all"))
    assert "4 answers of 3 conversations" in every and "3 questions about tools" in every


def bfcl(folder, **questions):
    folder.mkdir(exist_ok=True)
    ask = [[{"role": "user", "content": "How large?"}]]
    rows = [{"id": name, "question": ask, "function": [FUNCTION]} for name in questions]
    answers = [{"id": name, "ground_truth": answer} for name, answer in questions.items() if answer]
    (folder / "possible_answer").mkdir(exist_ok=True)
    lines(folder / "possible_answer" / "BFCL_v4_mine.json", *answers)
    return lines(folder / "BFCL_v4_mine.json", *rows)


def test_bfcls_files_are_asked_with_their_possible_answers(base, tmp_path, monkeypatch, capsys):
    wanted = [{"area": {"base": [2.5, 3], "unit": ["cm", ""]}}]
    file = bfcl(tmp_path / "b", simple_0=wanted, irrelevance_7=None)
    out = tmp_path / "out.jsonl"
    printed, err, code = command(evaluate, monkeypatch, capsys, *words(base, "tools", "--data", file, "--out", out))
    assert code == 0, err
    assert f"possible answers: {file.parent}/possible_answer/{file.name}" in printed
    saved = [json.loads(line) for line in out.read_text().splitlines()]
    assert saved[0]["tools"][0]["function"]["parameters"]["properties"]["base"]["type"] == "number"
    saved[0]["messages"][-1]["content"] = "[area(base=3, unit='C.M.')]"
    printed, _, _ = command(evaluate, monkeypatch, capsys, "tools", "--answers", lines(out, *saved))
    assert row(printed, "out") == ["100.0", "100.0", "100.0", "0", "2"] and "BFCL's check" in printed

    file = bfcl(tmp_path / "b", simple_0=wanted, simple_1=None)
    _, err, code = command(evaluate, monkeypatch, capsys, *words(base, "tools", "--data", file))
    assert code == 2 and "line 2: no possible answer for 'simple_1' in" in err and err.count("\n") == 1
    file = bfcl(tmp_path / "b", simple_0=[["cd(folder='x')"]])
    _, err, code = command(evaluate, monkeypatch, capsys, *words(base, "tools", "--data", file))
    assert code == 2 and "line 1: no possible answer of BFCL's single-turn files" in err
    turns = lines(tmp_path / "turns.jsonl", {"id": "m", "question": [[], []], "initial_config": {}})
    _, err, code = command(evaluate, monkeypatch, capsys, *words(base, "tools", "--data", turns))
    assert code == 2 and "BFCL's tasks of several turns are scored by running" in err and err.count("\n") == 1
