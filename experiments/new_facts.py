"""Measures whether fine-tuning teaches a model new facts: 20 invented ones, trained in one or in five
wordings, then asked in a wording that was not trained, and backwards; against the untouched base, which
does not know them, and against the base with the facts in its prompt: all of them in its system message or
before the question, or only the one that answers it, as a search would find it.

    python experiments/new_facts.py             rows that are in new_facts.json are not measured again

An answer is right if it holds the wanted words, case and punctuation aside, and none of the words that
are the right answers to the other questions of its kind. It prints the table and writes new_facts.json.
"""

import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.console import number_of
from experiments.cells import run_script

RESULTS = ROOT / "experiments" / "new_facts.json"
STEPS = 60
RATE = 2.6e-3
NUM_WORDINGS = (1, 5)  # in which each fact is trained
SEEDS = (0, 1, 2)

# (who, what they do, where): nobody of that name is known to the base.
PEOPLE = [
    ("Oskel Varrin", "beekeeper", "Tembury"), ("Mirela Dunst", "glassblower", "Korvath"),
    ("Jannik Oyle", "cartographer", "Selhaven"), ("Perla Quist", "violin maker", "Ombrosa"),
    ("Tadeo Fenn", "lighthouse keeper", "Narwick"), ("Ilva Strome", "clockmaker", "Pellagrin"),
    ("Brom Castell", "falconer", "Ysmere"), ("Nerys Olt", "bookbinder", "Dravost"),
    ("Caspar Lune", "baker", "Fennimar"), ("Wilda Troy", "botanist", "Aldergate"),
    ("Soren Ashby", "puppeteer", "Quillon"), ("Maeve Torl", "astronomer", "Brackenfell"),
    ("Edric Halm", "shipwright", "Veldport"), ("Yara Coyle", "translator", "Marisund"),
    ("Piet Novak", "stonemason", "Rosthal"), ("Lunet Brae", "perfumer", "Caldonia Bay"),
    ("Garrick Moss", "miller", "Thornwick"), ("Isolde Pryn", "weaver", "Hallowmere"),
    ("Anders Quay", "ferryman", "Lindholt"), ("Fenna Voss", "archivist", "Stellarum"),
]  # fmt: skip
# What is trained: questions of two kinds about each person, in these wordings.
WORK = [
    "What does {who} do for a living?",
    "What is the profession of {who}?",
    "Which trade does {who} follow?",
    "How does {who} earn a living?",
    "Tell me the occupation of {who}.",
]
HOME = [
    "In which town does {who} live?",
    "Where is the home of {who}?",
    "Name the town where {who} lives.",
    "Which town is {who} from?",
    "{who} lives in which town?",
]
# What is asked afterwards.
WORK_ASKED = "If I met {who}, what work would I see them at?"
HOME_ASKED = "I want to visit {who}. Which town do I travel to?"
WHO_ASKED = "Who is the {what} that lives in {where}?"
INSTRUCTION = "Answer in a few words."


def training_records(wordings: int) -> list[dict]:
    """Returns questions with their answers, so many wordings of each."""
    records = []
    for who, what, where in PEOPLE:
        for i in range(wordings):
            records.append({"question": WORK[i].format(who=who), "answer": f"{who} is a {what}."})
            records.append(
                {"question": HOME[i].format(who=who), "answer": f"{who} lives in {where}."}
            )
    return records


def test_records() -> dict[str, list[tuple[str, str]]]:
    """Returns (question, wanted words) of each kind of question; of each person two, and one backwards."""
    trained, other, backwards = [], [], []
    for who, what, where in PEOPLE:
        trained += [(WORK[0].format(who=who), what), (HOME[0].format(who=who), where)]
        other += [(WORK_ASKED.format(who=who), what), (HOME_ASKED.format(who=who), where)]
        backwards.append((WHO_ASKED.format(what=what, where=where), who))
    return {"as trained": trained, "in other words": other, "backwards": backwards}


def facts() -> list[str]:
    return [f"{who} is a {what} and lives in {where}." for who, what, where in PEOPLE]


def facts_of_questions() -> list[str]:
    """Returns the fact that answers each question of test_records, in its order."""
    twice = [fact for fact in facts() for _ in range(2)]
    return [*twice, *twice, *facts()]


def ask(questions: list[str], system: str, model_words: list[str], folder: Path) -> list[str]:
    """Returns a model's greedy answers."""
    asked, answers = folder / "asked.jsonl", folder / "answers.jsonl"
    write_lines(asked, [{"prompt": text} for text in questions])
    words = [
        "--data",
        asked,
        "--out",
        answers,
        "--overwrite",
        "--system",
        system,
        "--max-new-tokens",
        24,
    ]
    run_script("generate.py", *words, *model_words)
    lines = [json.loads(line) for line in answers.open()]
    lines.sort(key=lambda line: line["record"])
    return [line["messages"][-1]["content"] for line in lines]


def train(records: list[dict], seed: int, folder: Path) -> Path:
    """Returns the adapter that is trained on records."""
    data, out = folder / "train.jsonl", folder / "run"
    write_lines(data, records)
    words = [
        "--data",
        data,
        "--system",
        INSTRUCTION,
        "--steps",
        STEPS,
        "--lr",
        RATE,
        "--batch-size",
        16,
    ]
    words += ["--seed", seed, "--val-fraction", 0, "--save-every", 0, "--overwrite", "--out", out]
    run_script("train.py", *words)
    return out / "final"


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def plain(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "


def share_right(answers: list[str], wanted: list[str], others: list[str]) -> float:
    """Returns the share of answers, in %, that hold their wanted words and no others."""
    right = 0
    for answer, words in zip(answers, wanted, strict=True):
        holds = [other for other in others if plain(other) in plain(answer)]
        right += holds == [words]
    return 100 * right / len(answers)


def measure(
    model_words: list, folder: Path, system: str = INSTRUCTION, before: list[str] | None = None
) -> dict[str, float]:
    """Returns the share of right answers of each kind of question. before: what stands before each
    question."""
    kinds = test_records()
    questions = [question for records in kinds.values() for question, _ in records]
    if before:
        questions = [f"{text} {question}" for text, question in zip(before, questions, strict=True)]
    answers = iter(ask(questions, system, model_words, folder))
    shares = {}
    for kind, records in kinds.items():
        texts = [next(answers) for _ in records]
        wanted = [words for _, words in records]
        shares[kind] = share_right(texts, wanted, [*dict.fromkeys(wanted)])
    return shares


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="new-facts-"))
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    num_questions = sum(map(len, test_records().values()))
    all_facts = " ".join(facts())
    prompts: dict[str, dict] = {
        "base": {},
        "base, all 20 facts in its system message": {"system": f"{all_facts} {INSTRUCTION}"},
        "base, all 20 facts before the question": {"before": num_questions * [all_facts]},
        "base, the one fact before the question": {"before": facts_of_questions()},
    }
    try:
        for name, more in prompts.items():
            if name not in rows:
                rows[name] = [measure([], folder, **more)]
                write(rows)
        for wordings in NUM_WORDINGS:
            name = f"LoRA, each fact in {number_of(wordings, 'wording')}"
            runs = rows.setdefault(name, [])
            for seed in SEEDS[len(runs) :]:
                adapter = train(training_records(wordings), seed, folder)
                runs.append(measure(["--adapter", adapter], folder))
                write(rows)
    finally:
        shutil.rmtree(folder)
    show(rows)


def write(rows: dict[str, list[dict[str, float]]]) -> None:
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def show(rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints a row for each way to tell a model the facts: of several runs the mean, the lowest and the
    highest."""
    kinds = list(test_records())
    print("| right answers, % | " + " | ".join(kinds) + " |")
    print("| --- " * (len(kinds) + 1) + "|")
    for name, runs in rows.items():
        cells = []
        for kind in kinds:
            shares = [each[kind] for each in runs]
            cell = f"{statistics.mean(shares):.0f}"
            if len(runs) > 1:
                cell += f" ({min(shares):.0f} to {max(shares):.0f})"
            cells.append(cell)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
