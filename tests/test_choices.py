"""Log-likelihoods of choices, and multiple choice, equal to lm-evaluation-harness item by item."""

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.helpers import SHARED, chat_base, command, needs_shared, sentence

import evaluate
from checkpoint import load_model
from evals import choices
from evals.arguments import evaluation_arguments
from evals.choices import Pair, PrefixTree, encode_pair, log_likelihoods
from evals.multiple_choice import accuracy_scores, best_choice, choice_task
from interop.resolve import base_folder
from tokenizer import load_tokenizer

SUPPORT = Path(__file__).parent / "support"
ODD_TEXTS = ["naïve café", "河は流れる", "a [title] b  c [brackets] d", "Trailing space ", "\ttab", "?", "don't  stop"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"), num_key_value_heads=2)


# ---- the engine ----


def random_pairs(seed: int, questions: int = 12) -> list[list[Pair]]:
    """Questions behind three shared beginnings, with choices that begin alike, are equal, or are one another's
    beginning."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(n)]

    beginnings = [ids(n) for n in (1, 17, 60)]
    made = []
    for number in range(questions):
        context = rng.choice(beginnings) + ids(rng.randrange(0, 12))
        stem = ids(rng.randrange(1, 4))
        last = [Pair(context, stem), Pair(context, stem + ids(3)), Pair(context, stem + ids(1))]
        made.append([*last, Pair(context, ids(rng.choice([1, 7]))), last[number % 3]])
    return made


def expected(model, question: list[Pair]) -> list[float]:
    """Each pair computed alone, the whole text and all its logits."""
    sums = []
    for context, continuation in question:
        text = (context + continuation)[-(model.config.max_positions + 1) :]
        with torch.inference_mode():
            logprobs = model(torch.tensor([text[:-1]])).log_softmax(-1)[0]
        places = range(len(text) - 1 - len(continuation), len(text) - 1)
        sums.append(sum(float(logprobs[i, token]) for i, token in zip(places, continuation, strict=True)))
    return sums


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
SHAPES = {"plain": {}, "length_dependent_rope": {"rope_scaling": DYNAMIC}}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_likelihoods_equal_those_of_each_text_alone(shape, batch_size, tmp_path):
    model = load_model(chat_base(tmp_path, num_key_value_heads=2, **SHAPES[shape]))
    questions = random_pairs(1)
    results = log_likelihoods(model, questions, batch_size)
    for question, values in zip(questions, results, strict=True):
        assert values == pytest.approx(expected(model, question), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"window": 9}])
def test_texts_that_share_little_are_computed_alone(base, monkeypatch, changes):
    """The cost of a call decides, which is far above what these small texts take."""
    model = load_model(base)
    for block in model.blocks:
        block.attention.scores = block.attention.scores._replace(**changes)
    rng = random.Random(5)
    ids = [rng.randrange(3, 300) for _ in range(900)]
    # Cut at their beginning, these share no node; the last question shares all but the end.
    cut = [[Pair(ids, ids[:n]) for n in (4, 9, 2)], [Pair(ids[:300], ids[:n]) for n in (4, 9, 2)]]
    questions = cut + random_pairs(6)
    pieces, results = [], []
    of_tree = PrefixTree.pieces
    monkeypatch.setattr(PrefixTree, "pieces", lambda tree: pieces.append(of_tree(tree)) or pieces[-1])
    for cost in (0, choices.CALL_COST, 1 << 40):
        monkeypatch.setattr(choices, "CALL_COST", cost)
        results.append(log_likelihoods(model, questions, 64))
    alone, default, together = pieces
    assert len(alone) > len(default) > len(together)
    # Those that share nothing are the only ones that are worth it.
    assert len(default) == len(together) + 2
    assert all(piece.suffix is not None for piece in alone)
    for question, *values in zip(questions, *results, strict=True):
        for each in values:
            assert each == pytest.approx(expected(model, question), abs=1e-4)


@pytest.mark.parametrize("changes", [{"sliding_window": 9}, {"softcap": 5.0}, {"sliding_window": 9, "softcap": 5.0}])
def test_windows_and_soft_caps_hold_in_the_tree(base, changes):
    model = load_model(base)
    for block in model.blocks:
        scores = block.attention.scores
        block.attention.scores = scores._replace(window=changes.get("sliding_window"), softcap=changes.get("softcap"))
    plain = log_likelihoods(load_model(base), random_pairs(2), 64)
    results = log_likelihoods(model, random_pairs(2), 64)
    for question, values in zip(random_pairs(2), results, strict=True):
        assert values == pytest.approx(expected(model, question), abs=1e-4)
    assert max(abs(a - b) for x, y in zip(plain, results, strict=True) for a, b in zip(x, y, strict=True)) > 0.01


def test_a_gpu_s_one_call_computes_the_same(base, monkeypatch):
    """The arguments of the one call for all texts, carried out text by text."""

    def by_text(q, k, v, scores, cu_q, cu_k, longest_q, longest_k):
        parts = []
        assert longest_q == max(cu_q.diff()) and longest_k == max(cu_k.diff())
        for i in range(len(cu_q) - 1):
            keys = slice(int(cu_k[i]), int(cu_k[i + 1]))
            part = q[cu_q[i] : cu_q[i + 1]]
            piece = choices.QuerySuffix(len(part), keys.stop - keys.start)
            parts.append(choices.suffix_attention(part, k[keys], v[keys], scores, piece))
        return torch.cat(parts)

    model = load_model(base)
    before = log_likelihoods(model, random_pairs(3), 64)
    monkeypatch.setattr(choices, "flash_supports", lambda q: True)
    monkeypatch.setattr(choices, "flash_attention", by_text)
    for values, wanted in zip(log_likelihoods(model, random_pairs(3), 64), before, strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)


def test_shared_tokens_are_computed_once_and_few_logits_are(base, monkeypatch):
    model = load_model(base)
    shots = [7] * 100
    questions = [[Pair(shots + [i, i + 1], [letter]) for letter in (10, 11, 12, 13)] for i in range(20, 28)]
    nodes, rows = [], []
    hidden, logits = PrefixTree.hidden, type(model).logits
    monkeypatch.setattr(PrefixTree, "hidden", lambda tree, m: nodes.append(len(tree.tokens)) or hidden(tree, m))
    monkeypatch.setattr(type(model), "logits", lambda m, h: rows.append(len(h)) or logits(m, h))
    log_likelihoods(model, questions, 64)
    assert nodes == [100 + 8 * 2] and rows == [8]


def test_batches_hold_what_fits(base, monkeypatch):
    model = load_model(base)
    before = log_likelihoods(model, random_pairs(4), 64)
    sizes = []
    hidden = PrefixTree.hidden
    monkeypatch.setattr(PrefixTree, "hidden", lambda tree, m: sizes.append(len(tree.tokens)) or hidden(tree, m))
    monkeypatch.setattr(choices, "NODES_AT_ONCE", 120)
    monkeypatch.setattr(choices, "LOGITS_AT_ONCE", 7 * model.config.vocab_size)
    after = log_likelihoods(model, random_pairs(4), 64)
    assert len(sizes) > 2 and max(sizes) <= 120
    for values, wanted in zip(after, before, strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)


# ---- multiple choice, beside the harness ----


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def texts(seed: int, count: int) -> list[str]:
    """Short texts, some of them odd."""
    rng = random.Random(seed)
    made = [sentence(seed * 100 + i, rng.randrange(1, 9)) for i in range(count)]
    if seed % 3 == 0:
        made[rng.randrange(count)] = rng.choice(ODD_TEXTS)
    if seed % 7 == 0:
        made[1] = made[0]  # a tie
    return made


def mmlu_rows(seed: int, count: int) -> list[list[str]]:
    rows = []
    for i in range(count):
        question, *four = texts(seed + i, 5)
        if i % 5 == 0:
            question += "\n" + ODD_TEXTS[i % len(ODD_TEXTS)]
        rows.append([question, *four, "ABCD"[i % 4]])
    return rows


def hellaswag_records(count: int) -> list[dict]:
    records = []
    for i in range(count):
        a, b, label, *endings = texts(i, 7)
        record = {"ind": i, "activity_label": label.title(), "ctx_a": a, "ctx_b": "" if i % 4 == 0 else b}
        record |= {"endings": endings, "label": i % 4 if i % 2 else str(i % 4), "split": "val"}
        if i == 3:  # longer than the model's 512 positions
            record["ctx_a"] = sentence(1, 700)
        records.append(record)
    return records


def ai2_records(count: int, choices: int) -> list[dict]:
    records = []
    for i in range(count):
        stem, *answers = texts(500 + i, 1 + choices)
        labels = "ABCDEFGH" if i % 3 else "12345678"
        listed = [{"text": text, "label": labels[n]} for n, text in enumerate(answers)]
        if i % 4 == 0:
            stem += " "  # a trailing space goes to the choice
        key = labels[i % choices] + (" " if i == 5 else "")
        records.append({"id": str(i), "question": {"stem": stem, "choices": listed}, "answerKey": key.strip()})
    return records


def truthful_records(count: int) -> list[dict]:
    records = []
    for i in range(count):
        answers = list(dict.fromkeys(texts(900 + 3 * i, 6)))
        mc1 = {answer: int(n == 0) for n, answer in enumerate(answers[:4])}
        mc2 = {answer: int(n < 2 + i % 2) for n, answer in enumerate(answers)}
        records.append({"question": sentence(i, 6) + "?", "mc1_targets": mc1, "mc2_targets": mc2})
    return records


def hf_ai2(record: dict) -> dict:
    """A record of AI2's format as Hugging Face's datasets have it."""
    question = record["question"]
    listed = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    both = {"question": question["stem"], "question_stem": question["stem"]}
    return both | {"choices": listed, "answerKey": record["answerKey"]}


def hf_query(record: dict) -> dict:
    """A record of llm-foundry's format as ARC in Hugging Face's datasets."""
    letters = [*"ABCDEFGH"][: len(record["choices"])]
    listed = {"text": record["choices"], "label": letters}
    question = record["query"].removeprefix("Question: ")
    return {"question": question, "choices": listed, "answerKey": letters[record["gold"]]}


def hf_truthful(record: dict) -> dict:
    targets = {}
    for key in ("mc1_targets", "mc2_targets"):
        targets[key] = {"choices": [*record[key]], "labels": [*record[key].values()]}
    return {"question": record["question"]} | targets


def hf_mmlu(row: list[str]) -> dict:
    return {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}


ALL_METRICS = ["acc", "acc_norm", "acc_bytes"]


def write_cases(folder: Path, sources: dict) -> tuple[dict, dict]:
    """Returns the words of our command line and the harness' specification for each task.

    sources: mmlu: {subject: (dev rows, test rows)}, and a list of records for each other task.
    """
    ours, theirs = {}, {}
    for part in ("dev", "test"):
        (folder / "mmlu" / part).mkdir(parents=True)
    for subject, parts in sources["mmlu"].items():
        for part, rows in zip(("dev", "test"), parts, strict=True):
            with open(folder / "mmlu" / part / f"{subject}_{part}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
            write_lines(folder / f"{subject}_{part}.jsonl", [hf_mmlu(row) for row in rows])
        spec = {"config": f"mmlu/default/mmlu_{subject}.yaml", "data": folder / f"{subject}_test.jsonl"}
        theirs[f"mmlu_{subject}"] = spec | {"shots": 5, "shots_data": folder / f"{subject}_dev.jsonl"}
    ours["mmlu"] = ["--data", folder / "mmlu"]

    def add(name: str, task: str, config: str, convert, shots: int = 0, metrics: list | None = None) -> None:
        records = sources[task]
        file = write_lines(folder / f"{task}.jsonl", records)
        spec = {"config": config, "data": write_lines(folder / f"{name}.hf", [convert(each) for each in records])}
        ours[name] = ["--data", file]
        if shots:
            examples = write_lines(folder / f"{task}_dev.jsonl", records[:shots])
            ours[name] += ["--shots", shots, "--shots-data", examples]
            examples = write_lines(folder / "dev.hf", [convert(record) for record in records[:shots]])
            spec |= {"shots": shots, "shots_data": examples}
        theirs[name] = spec | ({"metrics": metrics} if metrics else {})

    add("hellaswag", "hellaswag", "hellaswag/hellaswag.yaml", dict, metrics=ALL_METRICS)
    add("hellaswag_shots", "hellaswag", "hellaswag/hellaswag.yaml", dict, 3, ALL_METRICS)
    add("arc", "arc", "arc/arc_easy.yaml", hf_ai2, metrics=ALL_METRICS)
    add("qasc", "qasc", "arc/arc_challenge.yaml", hf_ai2, metrics=ALL_METRICS)
    add("openbookqa", "openbookqa", "openbookqa/openbookqa.yaml", hf_ai2, metrics=ALL_METRICS)
    if "query" in sources:
        add("query", "query", "arc/arc_easy.yaml", hf_query, metrics=ALL_METRICS)
    add("truthfulqa_mc1", "truthfulqa", "truthfulqa/truthfulqa_mc1.yaml", hf_truthful)
    add("truthfulqa_mc2", "truthfulqa", "truthfulqa/truthfulqa_mc2.yaml", hf_truthful)
    return ours, theirs


def run_harness(model: Path, tasks: dict, folder: Path) -> dict:
    """What the harness finds, in a process of its own in another directory."""
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"model": model, "tasks": tasks}, default=str))
    words = [sys.executable, SUPPORT / "harness_scores.py", spec, folder / "out.json"]
    environment = os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(words, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())["tasks"]


def our_results(model, tokenizer, words: list) -> tuple:
    """The questions, log-likelihoods and scores of one command line."""
    args = evaluation_arguments(["choices", *map(str, words)])
    task = choice_task(args, args.data)
    likelihoods = log_likelihoods(model, task.encode(tokenizer, model.config.max_positions), 64)
    return task.questions, likelihoods, task.score(likelihoods)


def compare(folder: Path, model_folder: Path, sources: dict, most: float = 1e-4) -> int:
    """Asserts that all is equal, and returns the number of items. most: by which a log-likelihood may
    differ."""
    ours, theirs = write_cases(folder, sources)
    harness = run_harness(model_folder, theirs, folder)
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    count = 0
    for name, words in ours.items():
        questions, likelihoods, scores = our_results(model, tokenizer, words)
        if name == "mmlu":
            continue_at = 0
            items = scores.items["acc"]
            for subject in sorted(sources["mmlu"]):
                wanted = harness[f"mmlu_{subject}"]
                part = slice(continue_at, continue_at + len(wanted["likelihoods"]))
                continue_at = part.stop
                assert_close(likelihoods[part], wanted["likelihoods"], most)
                assert items[part] == wanted["items"]["acc"]
                assert_means(scores.parts[subject], wanted["scores"])
                assert {question.group for question in questions[part]} == {subject}
            assert continue_at == len(items)
            count += continue_at
            continue
        wanted = harness[name]
        if name.startswith("truthfulqa"):
            metric = name[-3:].upper()
            mine = [i for i, question in enumerate(questions) if question.group == metric]
            assert_close([likelihoods[i] for i in mine], wanted["likelihoods"], most)
            assert scores.items[metric] == pytest.approx(wanted["items"]["acc"], abs=1e-4)
            renamed = {f"acc{end}": scores.columns[f"{metric}{end}"] for end in (" %", " ±")}
            assert_means(renamed, wanted["scores"])
        else:
            assert_close(likelihoods, wanted["likelihoods"], most)
            assert scores.items == wanted["items"]
            assert_means(scores.columns, wanted["scores"])
        count += len(wanted["likelihoods"])
    return count


def assert_close(ours: list[list[float]], theirs: list[list[float]], most: float) -> None:
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, abs=most, rel=1e-6)


def assert_means(columns: dict, scores: dict) -> None:
    for metric in [name for name in scores if not name.endswith("_stderr")]:
        assert columns[f"{metric} %"] == pytest.approx(100 * scores[metric], abs=1e-3)
        assert columns[f"{metric} ±"] == pytest.approx(100 * scores[f"{metric}_stderr"], abs=1e-3)


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install -r tests/requirements.txt"
)


@needs_harness
def test_a_random_model_scores_as_in_the_harness(base, tmp_path):
    sources: dict = {
        "mmlu": {name: (mmlu_rows(n, 5), mmlu_rows(n + 9, 30)) for n, name in enumerate(("anatomy", "global_facts"))},
        "hellaswag": hellaswag_records(40),
        "arc": ai2_records(30, 4),
        "qasc": ai2_records(20, 8),
        "openbookqa": ai2_records(30, 4),
        "truthfulqa": truthful_records(25),
    }
    assert compare(tmp_path, base, sources) >= 200


@needs_harness
@needs_shared
@pytest.mark.slow
def test_the_default_base_scores_as_in_the_harness_on_real_files(tmp_path):
    def lines(name: str, count: int) -> list[dict]:
        with open(SHARED / name, encoding="utf-8") as file:
            return [json.loads(line) for line, _ in zip(file, range(count))]

    def rows(subject: str, part: str, count: int) -> list[list[str]]:
        with open(SHARED / "mmlu" / part / f"{subject}_{part}.csv", newline="", encoding="utf-8") as file:
            return list(csv.reader(file))[:count]

    subjects = [file.name.removesuffix("_dev.csv") for file in (SHARED / "mmlu" / "dev").iterdir()]
    with open(SHARED / "TruthfulQA.csv", newline="", encoding="utf-8") as file:
        answered = [record for record, _ in zip(csv.DictReader(file), range(12))]
    truthful = []
    for record in answered:
        right, wrong = (record[f"{kind} Answers"].split("; ") for kind in ("Correct", "Incorrect"))
        mc1 = {record["Best Answer"]: 1} | dict.fromkeys(wrong, 0)
        mc2 = dict.fromkeys(right, 1) | dict.fromkeys(wrong, 0)
        truthful.append({"question": record["Question"], "mc1_targets": mc1, "mc2_targets": mc2})
    sources: dict = {
        "mmlu": {each: (rows(each, "dev", 5), rows(each, "test", 3)) for each in subjects},
        "hellaswag": lines("hellaswag_val_1k.jsonl", 30),
        "arc": lines("openbookqa_test.jsonl", 20),
        "qasc": lines("qasc_dev_500.jsonl", 20),
        "openbookqa": lines("openbookqa_test.jsonl", 40),
        "query": lines("arc_easy_icl_500.jsonl", 20) + lines("arc_challenge_icl_500.jsonl", 20),
        "truthfulqa": truthful,
    }
    # The harness sums a vocabulary of 49,152 in float32, which leaves it some 1e-5 a token above float64; ours stays
    # within 1e-4 of that, as the next test says.
    assert compare(tmp_path, base_folder(None, None), sources, most=5e-4) >= 200


@needs_shared
@pytest.mark.slow
def test_the_default_base_s_log_likelihoods_are_those_of_float64():
    folder = base_folder(None, None)
    words = ["--data", SHARED / "hellaswag_val_1k.jsonl", "--limit", 12]
    args = evaluation_arguments(["choices", *map(str, words)])
    pairs = choice_task(args, args.data).encode(load_tokenizer(folder), 8192)
    ours = log_likelihoods(load_model(folder), pairs, 64)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for question, values in zip(pairs, ours, strict=True):
        for (context, continuation), value in zip(question, values, strict=True):
            ids = torch.tensor([context + continuation])
            with torch.no_grad():
                logprobs = reference(ids[:, :-1]).logits.log_softmax(-1)[0, -len(continuation) :]
            wanted = logprobs.gather(1, ids[0, -len(continuation) :, None]).sum()
            assert value == pytest.approx(float(wanted), abs=1e-4)


# ---- the command ----


def choices_command(monkeypatch, capsys, base: Path, *words) -> tuple[str, str, int]:
    fixed = ["choices", "--model", base, "--dtype", "fp32", "--device", "cpu"]
    return command(evaluate, monkeypatch, capsys, *fixed, *words)


def questions_of(*words) -> list[choices.Question]:
    args = evaluation_arguments(["choices", *map(str, words)])
    return choice_task(args, args.data).questions


def test_the_command_prints_scores_subjects_and_wrong_choices(base, tmp_path, monkeypatch, capsys):
    write_cases(tmp_path, {"mmlu": {"anatomy": (mmlu_rows(1, 5), mmlu_rows(2, 9))}} | {
        name: [] for name in ("hellaswag", "arc", "qasc", "openbookqa", "truthfulqa")})  # fmt: skip
    words = ["--data", tmp_path / "mmlu", "--shots", "2", "--show", "1", "--limit", "6"]
    out, err, code = choices_command(monkeypatch, capsys, base, *words)
    assert code == 0, err
    lines = out.splitlines()
    place = tmp_path / "mmlu"
    assert lines[0] == f"data      {place}: part test, 1 subject, 9 questions, 2 examples before each; task mmlu"
    assert lines[1] == "          --limit: 6 of 9, drawn by --seed 0"
    table = [line.split() for line in lines if line.startswith(("model  ", "anatomy"))]
    scored = [row for row in table if row[1] == "6"]
    assert [row[0] for row in scored] == ["model", "anatomy"] and scored[0][1:] == scored[1][1:]
    (count,) = [line for line in lines if line.startswith("model: 1 of ")]
    wrong = 6 - round(6 * float(scored[0][2]) / 100)
    assert count == f"model: 1 of {wrong} wrong choices"
    right, chosen = (
        [line.split()[1] for line in lines if line.startswith(f"  {name} ")] for name in ("right", "chosen")
    )
    assert len(right) == len(chosen) == 1 and right != chosen


def test_two_models_stand_side_by_side(base, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / "hellaswag.jsonl", hellaswag_records(3)[:3])
    out, err, code = choices_command(monkeypatch, capsys, base, "--data", file, "--versus", base)
    assert code == 0, err
    last = next(line.split() for line in out.splitlines() if line.startswith("change"))
    assert last[1:] == ["+0"] + 3 * ["+0.0"]  # no change of a standard error


def test_questions_that_are_too_long_are_counted(base, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / "hellaswag.jsonl", hellaswag_records(5))
    out, _, code = choices_command(monkeypatch, capsys, base, "--data", file)
    note = "NOTE: 1 of 5 questions have more tokens than the model's 512 positions; their beginning is cut off"
    assert code == 0 and note in out.splitlines()


def test_a_function_of_the_user_is_a_task(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def siqa(record):\n"
        "    choices = [record[f'answer{letter}'] for letter in 'ABC']\n"
        "    return f\"{record['context']} {record['question']}\", choices, 'ABC'.index(record['correct'])\n"
    )
    record = {
        "context": "Fox runs.",
        "question": "Why?",
        "answerA": "red",
        "answerB": "blue",
        "answerC": "12",
        "correct": "B",
    }
    file = write_lines(tmp_path / "siqa.jsonl", [record, record | {"correct": "C"}])
    questions = questions_of("--data", file, "--task", f"{tmp_path / 'mine.py'}:siqa")
    assert [question.context for question in questions] == ["Fox runs. Why?"] * 2
    assert [question.gold for question in questions] == [(1,), (2,)]
    assert questions[0].choices == ["red", "blue", "12"]


def test_truthfulqa_of_the_generation_file_has_its_answers_with_a_full_stop(tmp_path, capsys):
    row = {"Type": "x", "Question": "Why?", "Best Answer": "Red; or so", "Correct Answers": "Red; Very red.;"}
    with open(tmp_path / "TruthfulQA.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*row, "Incorrect Answers"])
        writer.writeheader()
        writer.writerow(row | {"Incorrect Answers": "Blue;Green "})
    first, second = questions_of("--data", tmp_path / "TruthfulQA.csv")
    assert (first.choices, first.gold, first.group) == (["Red, or so.", "Blue.", "Green."], (0,), "MC1")
    assert (second.choices, second.gold) == (["Red.", "Very red.", "Blue.", "Green."], (0, 1))
    assert first.before.endswith("Barcelona, Spain.\n\n") and first.context == "Q: Why?\nA:"
    assert "numbers of mc_task.json are others" in capsys.readouterr().out


def test_llm_foundrys_form_is_arcs_prompt(tmp_path):
    record = {"query": "Question: Why?", "choices": ["red", "blue"], "gold": 1}
    (question,) = questions_of("--data", write_lines(tmp_path / "arc_easy.jsonl", [record]))
    assert question[:3] == ("Question: Why?\nAnswer:", ["red", "blue"], (1,))


def test_the_limit_is_of_each_subject(tmp_path, capsys):
    for part, count in (("dev", 5), ("test", 12)):
        (tmp_path / part).mkdir()
        for n, subject in enumerate(("anatomy", "global_facts")):
            with open(tmp_path / part / f"{subject}_{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows(mmlu_rows(n, count))
    questions = questions_of("--data", tmp_path, "--limit", 4, "--seed", 1)
    assert [question.group for question in questions] == ["anatomy"] * 4 + ["global_facts"] * 4
    assert questions_of("--data", tmp_path, "--limit", 4, "--seed", 1) == questions
    assert questions_of("--data", tmp_path, "--limit", 4, "--seed", 2) != questions
    assert "--limit: 8 of 24, of each group 4, drawn by --seed 1" in capsys.readouterr().out
    one = questions_of("--data", tmp_path / "test" / "anatomy_test.csv", "--shots", 0)
    assert len(one) == 12
    assert one[0].before == "The following are multiple choice questions (with answers) about anatomy.\n\n"


GOOD = {"query": "Why?", "choices": ["red", "blue"], "gold": 1}
AI2 = {"question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}}
HUB_ARC = {"id": "1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
HUB_MMLU = {"question": "Why?", "subject": "anatomy", "choices": [*"wxyz"], "answer": 1}
STORY = {"activity_label": "Fox", "ctx_a": "It runs.", "ctx_b": "", "endings": [*"wxyz"]}
TRUTHFUL = {"question": "Why?", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}
MISTAKES = [  # name of the file, records, further words, message
    ("a.jsonl", [{"a": 1}], [], "{file} line 1: its keys (a) are those of no task (mmlu: question, subject, "),
    ("a.jsonl", [GOOD, {"query": "?", "gold": 0}], [], "{file} line 2: no 'choices'"),
    ("a.jsonl", [GOOD, GOOD | {"gold": 2}], [], "{file} line 2: the right choice is number 2; there are 0 to 1"),
    ("a.jsonl", [GOOD | {"gold": "x"}], [], "{file} line 1: not as the task query wants it (ValueError: "),
    ("a.jsonl", [GOOD | {"choices": ["red", 3]}], [], "{file} line 1: the context must be a text"),
    ("a.jsonl", [GOOD | {"choices": ["red", "fox " * 700]}], [], "{file} line 1: a choice of "),
    ("TruthfulQA.jsonl", [{"question": "Why?", "mc1_targets": {}}], [], "{file} line 1: its keys (mc1_t"),
    ("a.jsonl", [GOOD], ["--task", "truthfulqa-csv"], "{file} line 1: no 'Question'; records of truthfulqa-csv"),
    ("a.jsonl", [GOOD], ["--task", "mmlu"], "{file} line 1: no 'question'; records of mmlu have question, subject, "),
    ("a.csv", [GOOD], ["--task", "mmlu"], "{file}: no test/SUBJECT_test.csv nor val/SUBJECT_val.csv in it"),
    ("a.jsonl", [GOOD | {"choices": ["red"]}], [], "{file} line 1: 1 choice; at least 2 are wanted"),
    ("a.jsonl", [AI2 | {"answerKey": "A"}], [], "{file}: could be arc, openbookqa, qasc, which are in one format"),
    ("arc.jsonl", [AI2 | {"answerKey": "C"}], [], "{file} line 1: not as the task arc wants it (ValueError"),
    ("a.jsonl", [GOOD], ["--shots", "2"], "--shots 2: name the file of the examples by --shots-data FILE"),
    ("a.jsonl", [GOOD], ["--shots", "2", "--shots-data", "{file}"], "--shots 2: {file} has only 1 examples"),
    ("a.jsonl", [GOOD], ["--shots-data", "none"], "--shots-data none: no example of it is used; say"),
    ("a.jsonl", [GOOD], ["--shots-data", "none", "--shots", "0"], "--shots-data none: no example of it is used; say"),
    ("a.jsonl", [HUB_MMLU], ["--shots-data", "{file}"], "--shots 5: {file}, on anatomy, has only 1 examples"),
    ("a.jsonl", [HUB_MMLU], ["--shots", "5"], "--shots 5: name the file of the examples by --shots-data FILE"),
    ("a.jsonl", [HUB_MMLU, HUB_MMLU | {"answer": 4}], [], "{file} line 2: not as the task mmlu wants it (ValueError"),
    ("a.jsonl", [HUB_MMLU | {"choices": ["a", "b"]}], [], "{file} line 1: not as the task mmlu wants it (ValueError"),
    ("a.jsonl", [HUB_MMLU | {"question": None}], [], "{file} line 1: not as the task mmlu wants it (TypeError"),
    ("a.jsonl", [TRUTHFUL], ["--shots-data", "none"], "--shots-data none: TruthfulQA has six examples of its own"),
    ("a.jsonl", [GOOD | {"gold": 1.9}], [], "{file} line 1: not as the task query wants it (ValueError: 1.9 is"),
    ("a.jsonl", [GOOD | {"gold": True}], [], "{file} line 1: not as the task query wants it (ValueError: True is"),
    ("a.jsonl", [GOOD | {"gold": "1.0"}], [], "{file} line 1: not as the task query wants it (ValueError: "),
    ("a.jsonl", [STORY | {"label": 2.7}], [], "{file} line 1: not as the task hellaswag wants it (ValueError: 2.7 is"),
    ("arc.jsonl", [HUB_ARC | {"question": None}], [], "{file} line 1: not as the task arc wants it (TypeError: the"),
    ("arc.jsonl", [HUB_ARC | {"choices": {"text": ["a"], "label": [*"AB"]}}], [], "{file} line 1: not as the task"),
    ("a.jsonl", [HUB_ARC], [], "{file}: could be arc, openbookqa, qasc, which are in one format; say"),
    ("a.jsonl", [GOOD], ["--task", "siqa"], "--task siqa: not one of mmlu, hellaswag, "),
    ("a.jsonl", [GOOD], ["--task", "none.py:f"], "--task none.py:f: FILE.py:NAME is wanted"),
    ("a.jsonl", [GOOD], ["--template", "chatml"], "--template: is for conversations; `choices`"),
    ("a.jsonl", [GOOD], ["--labels", "x"], "--labels: is for `classify`; `choices` does not use it"),
    ("a.jsonl", [GOOD], ["--shots", "-1"], "--shots -1: must be 0 or more"),
]  # fmt: skip


@pytest.mark.parametrize("name, records, words, message", MISTAKES)
def test_a_mistake_ends_with_one_line(name, records, words, message, base, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / name, records)
    words = [word.format(file=file) for word in words]
    _, err, code = choices_command(monkeypatch, capsys, base, "--data", file, *words)
    assert code == 2
    assert err.strip().removeprefix("error: ").startswith(message.format(file=file))


def test_faulty_records_are_left_out_when_asked(base, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / "a.jsonl", [GOOD, GOOD | {"gold": 7}, GOOD])
    out, _, code = choices_command(monkeypatch, capsys, base, "--data", file, "--skip-bad")
    assert code == 0 and f"--skip-bad: 1 of 3 records left out, such as {file} line 2: the right" in out


def test_faults_of_a_file_are_a_line_each(base, tmp_path, monkeypatch, capsys):
    bad = [GOOD | {"gold": 7}, {"query": "?"}] * 11
    file = write_lines(tmp_path / "a.jsonl", [GOOD, *bad])
    with open(file, "a", encoding="utf-8") as lines:
        lines.write("\n{broken")
    out, err, code = choices_command(monkeypatch, capsys, base, "--data", file)
    said = err.splitlines()
    assert code == 2 and len(said) == 21 and "\\n" not in err
    assert said[0] == f"error: {file} line 2: the right choice is number 7; there are 0 to 1"
    assert said[1].strip().startswith(f"{file} line 3: no 'choices'; records of query have query, choices, gold")
    count = f"23 faulty records in {file}, of which these are the first 20; mend them, or --skip-bad leaves them out"
    assert said[20].strip() == count
    # A line that is no JSON is a faulty record as well.
    out, _, code = choices_command(monkeypatch, capsys, base, "--data", file, "--skip-bad")
    lines = out.splitlines()
    assert code == 0 and lines[0] == f"data      {file}: 24 records; task query (by its keys)"
    assert lines[1].startswith(f"          --skip-bad: 23 of 24 records left out, such as {file} line 2: the right")


def test_faulty_examples_are_never_left_out(base, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / "a.jsonl", [GOOD])
    shots = write_lines(tmp_path / "dev.jsonl", [GOOD, GOOD | {"gold": 7}])
    words = ["--data", file, "--shots", "2", "--shots-data", shots, "--skip-bad"]
    _, err, code = choices_command(monkeypatch, capsys, base, *words)
    assert code == 2 and err == f"error: {shots} line 2: the right choice is number 7; there are 0 to 1\n"


def write_mmlu(folder: Path, parts: dict[str, list], subject: str = "anatomy") -> Path:
    """Writes rows of a subject as the parts of MMLU's released folder, and returns the folder."""
    for part, rows in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        with open(folder / part / f"{subject}_{part}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def test_faulty_rows_of_mmlu_are_left_out_when_asked(base, tmp_path, monkeypatch, capsys):
    good = ["why", *"abcd", "A"]
    folder = write_mmlu(tmp_path, {"test": [good, good[:3], good, [*good[:5], "E"]]})
    write_mmlu(tmp_path, {"test": [good[:5], good]}, "virology")
    words = ["--data", folder, "--shots", "0"]
    _, err, code = choices_command(monkeypatch, capsys, base, *words)
    places = [line.removeprefix("error: ").strip().partition(": ")[0] for line in err.splitlines()]
    test = folder / "test"
    assert code == 2 and places == [
        f"{test / 'anatomy_test.csv'} row 2",
        f"{test / 'anatomy_test.csv'} row 4",
        f"{test / 'virology_test.csv'} row 1",
        f"3 faulty records in {folder}; mend them, or --skip-bad leaves them out",
    ]
    out, _, code = choices_command(monkeypatch, capsys, base, *words, "--skip-bad")
    columns = "MMLU has 6: question, four choices, letter"
    assert code == 0 and out.splitlines()[:2] == [
        f"data      {folder}: part test, 2 subjects, 3 questions, 0 examples before each; task mmlu",
        f"          --skip-bad: 3 of 6 rows left out, such as {places[0]}: 3 columns; {columns}",
    ]
    write_mmlu(tmp_path, {"test": [good[:5]]}, "virology")
    _, err, code = choices_command(monkeypatch, capsys, base, *words, "--skip-bad")
    assert code == 2 and err == f"error: {test / 'virology_test.csv'}: no question in it\n"


def test_what_mmlu_s_folder_has_no_use_for_is_refused(base, tmp_path, monkeypatch, capsys):
    good = ["why", *"abcd", "A"]
    folder = write_mmlu(tmp_path / "mmlu", {"dev": [good], "test": [good]})
    (tmp_path / "mine.py").write_text("def same(record):\n    return record\n")
    function = f"{tmp_path / 'mine.py'}:same"
    unused = f"--shots-data {folder}: no example of it is used; say how many by --shots N"
    problems = {
        ("--map", function): f"--map {function}: is for records; MMLU's folder holds rows without keys",
        ("--shots", "0", "--shots-data", folder): unused,
    }
    for words, problem in problems.items():
        _, err, code = choices_command(monkeypatch, capsys, base, "--data", folder, *words)
        assert code == 2 and err == f"error: {problem}\n"
    (question,) = questions_of("--data", folder, "--shots", 1, "--shots-data", folder / "dev")
    assert question.before.endswith("Answer: A\n\n")


def test_a_quote_of_mmlu_that_is_not_closed_is_one_line(base, tmp_path, monkeypatch, capsys):
    folder = write_mmlu(tmp_path, {"test": [["why", *"abcd", "A"]]})
    file = folder / "test" / "anatomy_test.csv"
    file.write_text(file.read_text() + 'why,a,b,"c' + "x" * 200_000)
    # Whatever reads a table raises the limit for the whole process.
    before = csv.field_size_limit(131_072)
    try:
        _, err, code = choices_command(monkeypatch, capsys, base, "--data", folder, "--shots", "0")
    finally:
        csv.field_size_limit(before)
    assert code == 2 and err.startswith(f"error: {file} row 2: field larger than") and len(err.splitlines()) == 1


def test_mmlu_s_validation_part_is_read_where_there_is_no_test(tmp_path, capsys):
    rows = {"dev": mmlu_rows(1, 5), "val": mmlu_rows(2, 4)}
    folder = write_mmlu(tmp_path, rows)
    file = folder / "val" / "anatomy_val.csv"
    found = [questions_of("--data", each) for each in (folder, folder / "val", file)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    for line, place in zip(capsys.readouterr().out.splitlines(), (folder, folder / "val", file), strict=True):
        assert line == f"data      {place}: part val, 1 subject, 4 questions, 5 examples before each; task mmlu"
    write_mmlu(tmp_path, {"test": rows["val"]})
    of_test = questions_of("--data", folder)
    # The same rows make the same questions, whatever part they are of.
    assert [each._replace(where="") for each in of_test] == [each._replace(where="") for each in found[0]]
    assert "part test" in capsys.readouterr().out
    assert questions_of("--data", folder / "val") == found[0]


def without_places(questions: list[choices.Question]) -> list[choices.Question]:
    return [question._replace(where="") for question in questions]


def write_parquet(path: Path, records: list[dict]) -> Path:
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("write", [write_lines, write_parquet])
@pytest.mark.parametrize(
    "name, count, key", [("arc", 4, "question"), ("qasc", 8, "question"), ("openbookqa", 5, "question_stem")]
)
def test_the_hub_s_form_of_ai2_s_files_is_the_same_questions(write, name, count, key, tmp_path):
    released = ai2_records(12, count)
    on_the_hub = []
    for record in released:
        both = hf_ai2(record)
        on_the_hub.append({"id": record["id"], **{each: both[each] for each in (key, "choices", "answerKey")}})
    wanted = questions_of("--data", write_lines(tmp_path / f"{name}.jsonl", released))
    # OpenBookQA is known by its keys there; the others by the file's name.
    file = write(tmp_path / ("test.file" if name == "openbookqa" else f"{name}-test.file"), on_the_hub)
    assert without_places(questions_of("--data", file)) == without_places(wanted)


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_the_hub_s_form_of_mmlu_is_the_same_questions(write, tmp_path, capsys):
    files: dict[str, list] = {"dev": [], "test": []}
    for n, subject in enumerate(("anatomy", "global_facts")):
        rows = {"dev": mmlu_rows(n, 5), "test": mmlu_rows(n + 20, 7)}
        write_mmlu(tmp_path / "mmlu", rows, subject)
        for part, of_part in rows.items():
            files[part] += [hf_mmlu(row) | {"subject": subject} for row in of_part]
    paths = {part: write(tmp_path / f"{part}.file", records) for part, records in files.items()}
    cases = {
        (): ("--shots", 0),
        ("--shots-data", paths["dev"]): (),
        ("--shots-data", paths["dev"], "--shots", 2): ("--shots", 2),
        ("--shots-data", paths["dev"], "--limit", 3): ("--limit", 3),
        ("--task", "mmlu"): ("--shots", 0),
    }
    for words, of_folder in cases.items():
        wanted = questions_of("--data", tmp_path / "mmlu", *of_folder)
        capsys.readouterr()
        assert without_places(questions_of("--data", paths["test"], *words)) == without_places(wanted)
        examples = "5 examples" if "--shots-data" in words else "no examples"
        examples = "2 examples" if 2 in words else examples
        assert f"14 records, {examples} before each" in capsys.readouterr().out


def test_a_number_may_be_a_text_or_a_whole_float(tmp_path):
    records = [GOOD | {"gold": gold} for gold in (1, "1", 1.0)]
    questions = questions_of("--data", write_lines(tmp_path / "a.jsonl", records))
    assert [question.gold for question in questions] == [(1,)] * 3


def test_a_function_of_the_user_may_return_numpy_s_numbers_but_no_truth_value(base, tmp_path, monkeypatch, capsys):
    file = write_lines(tmp_path / "a.jsonl", [{"a": 1}])
    program = tmp_path / "mine.py"
    source = "import numpy as np\n\ndef task(record):\n    return 'Why?', ['red', 'blue'], "
    program.write_text(f"{source}np.argmax([0, 1])\n")
    (question,) = questions_of("--data", file, "--task", f"{program}:task")
    assert question.gold == (1,) and type(question.gold[0]) is int
    for value in ("True", "np.bool_(True)", "1.0", "'1'", "np.float64(1)"):
        program.write_text(f"{source}{value}\n")
        _, err, code = choices_command(monkeypatch, capsys, base, "--data", file, "--task", f"{program}:task")
        assert code == 2 and f"{file} line 1: the right choice is number " in err


def test_a_question_of_truthfulqa_is_counted_once(base, tmp_path, capsys):
    records = truthful_records(4)
    # Longer than 600 tokens, of which the six examples take 531: one question by both, one by MC2 alone.
    records[1]["question"] = sentence(1, 100)
    records[2]["mc2_targets"] |= {sentence(2, 80): 0}
    words = ["--data", write_lines(tmp_path / "truthful.jsonl", records)]
    args = evaluation_arguments(["choices", *map(str, words)])
    choice_task(args, args.data).encode(load_tokenizer(base), 600)
    note = "NOTE: 2 of 4 questions have more tokens than the model's 600 positions; their beginning is cut off"
    assert note in capsys.readouterr().out.splitlines()
    assert len(questions_of(*words, "--limit", "3")) == 6
    assert "          --limit: 3 of 4, drawn by --seed 0" in capsys.readouterr().out.splitlines()


HARNESS_POOL = """
import json, sys
from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr
samples = json.loads(sys.argv[1])
errors = [mean_stderr(sample) if len(sample) > 1 else 0.0 for sample in samples]
print(float(pooled_sample_stderr(errors, [len(sample) for sample in samples])))
"""


@needs_harness
@pytest.mark.parametrize("counts", [[(18, 20), (3, 20), (10, 20)], [(2, 9), (30, 31), (0, 4), (1, 1)]])
def test_the_standard_error_of_several_subjects_is_the_harness_s_pooled_one(counts, tmp_path):
    questions, likelihoods, samples = [], [], []
    for subject, (right, size) in enumerate(counts):
        samples.append([float(i < right) for i in range(size)])
        questions += [choices.Question("Why?", [*"ABCD"], (1,), f"subject{subject}")] * size
        likelihoods += [[0.0, 1.0 if i < right else -1.0, -2.0, -2.0] for i in range(size)]
    scores = accuracy_scores(questions, likelihoods)
    # In a process of its own, from another directory: the harness imports a package named evaluate.
    words = [sys.executable, "-c", HARNESS_POOL, json.dumps(samples)]
    done = subprocess.run(words, check=True, cwd=tmp_path, capture_output=True, text=True)
    wanted = float(done.stdout.split()[-1])
    assert scores.columns["acc ±"] == pytest.approx(100 * wanted, abs=1e-6)
    if counts[0] == (18, 20):
        assert wanted == pytest.approx(0.0523, abs=5e-5)
    assert scores.notes[0].endswith("; ± pools the variance within the subjects")


def test_subjects_of_one_question_each_have_the_error_of_all_together():
    questions = [choices.Question("Why?", [*"ABCD"], (0,), f"subject{i}") for i in range(4)]
    scores = accuracy_scores(questions, [[1.0, 0.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 0.0, 0.0]])
    assert scores.columns["acc ±"] == pytest.approx(25.0) and "pools" not in scores.notes[0]


@pytest.mark.parametrize(
    "row, message",
    [
        (["question", "a", "b", "c", "d"], "anatomy_test.csv row 2: 5 columns; MMLU has 6"),
        (["question", *"abcd", "E"], "anatomy_test.csv row 2: its last column is 'E', not A, B, C or D"),
    ],
)  # fmt: skip
def test_a_faulty_row_of_mmlu_is_named(row, message, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "test").mkdir()
    with open(tmp_path / "test" / "anatomy_test.csv", "w", newline="") as file:
        csv.writer(file).writerows([["why", *"abcd", "A"], row])
    _, err, code = choices_command(monkeypatch, capsys, base, "--data", tmp_path, "--shots", "0")
    assert code == 2 and message in err
    _, err, code = choices_command(monkeypatch, capsys, base, "--data", tmp_path)
    assert code == 2 and "anatomy_dev.csv: no such file; it holds the examples of --shots 5" in err


def test_without_a_context_the_first_token_stands_in_its_place(base):
    tokenizer = load_tokenizer(base)
    assert encode_pair(tokenizer, "", " red fox") == ([tokenizer.bos_id], tokenizer.encode(" red fox"))
    assert encode_pair(tokenizer, "  ", "red") == ([tokenizer.bos_id], tokenizer.encode("  red"))


def test_the_first_of_equal_choices_is_taken_and_an_empty_one_never_by_length():
    assert best_choice([-2.0, -1.0, -1.0]) == 1
    assert best_choice([-3.0, -2.0, -0.5], [3, 1, 0]) == 0
