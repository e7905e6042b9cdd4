"""The commands of the README and of docs/ run, on a small model; the files and names that they mention exist."""

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from support.helpers import chat_base, sentence

import convert
import data
import evaluate
import generate
import train
from common.errors import run
from evals.sandbox import sandbox_refusal

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train.py": train, "evaluate.py": evaluate, "generate.py": generate, "convert.py": convert, "data.py": data}
QUICKER = {  # what is added so that a command takes seconds
    "train.py": "--steps 4 --eval-every 0 --dtype fp32 --device cpu --compile off",
    "evaluate.py": "--dtype fp32 --device cpu",
    "generate.py": "--dtype fp32 --device cpu --max-new-tokens 4",
}


def commands(page: Path) -> list[str]:
    """The lines `python SCRIPT.py ...` of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    return [line for line in lines if line.split()[1] in SCRIPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the pages' commands name: FOLDER, data files, and a run in runs/mine."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("FOLDER", "TEACHER"):
        chat_base(folder / name, hidden_size=64)
    for name, count in (("examples.json", 40), ("more.jsonl", 20), ("held_out.json", 12)):
        records = [{"prompt": sentence(i, 5), "completion": sentence(i + 99, 4)} for i in range(count)]
        lines = "\n".join(json.dumps(record) for record in records)
        (folder / name).write_text(lines if name.endswith("jsonl") else json.dumps(records))
    problem = {
        "task_id": 0,
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(one):\n    assert one()",
    }
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))
    (folder / "recipe.yaml").write_text(
        "base_model: FOLDER\ndatasets: [{path: examples.json, type: alpaca}]\nlearning_rate: 1e-4\n"
    )
    keys = ("prompt", "chosen", "rejected")
    pairs = [dict(zip(keys, (sentence(i + 50 * k, 5) for k in range(3)))) for i in range(40)]
    (folder / "preferences.json").write_text(json.dumps(pairs))
    for name in ("train.csv", "test.csv", "reviews.csv"):
        rows = [f"{sentence(i, 5)},{'AB'[i % 2]}" for i in range(24)]
        (folder / name).write_text("\n".join(["text,label", *rows]))
    story = {"activity_label": "Fox", "ctx_a": "A fox runs.", "ctx_b": "the dog", "endings": [*"abcd"], "label": 1}
    (folder / "hellaswag.jsonl").write_text("\n".join([json.dumps(story)] * 6))
    siqa = {"context": "Fox runs.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}
    (folder / "siqa.jsonl").write_text("\n".join([json.dumps(siqa)] * 4))
    (folder / "questions.jsonl").write_text("\n".join(json.dumps({"question": sentence(i, 5)}) for i in range(12)))
    functions = ("my.py", "choices.md", "siqa"), ("my.py", "objectives.md", "score"), ("style.py", "safety.md", "style")
    for name, page, function in functions:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(re.search(rf"```python\n(def {function}.*?)```", text, re.DOTALL)[1])
    (folder / "xstest_prompts.csv").write_text(
        "id,prompt,type,label\n1,red fox,homonyms,safe\n2,blue dog,contrast_homonyms,unsafe\n"
    )
    (folder / "prompts.jsonl").write_text('{"prompt": {"text": "the red fox", "toxicity": 0.1}}\n')
    (folder / "general.txt").write_text(" ".join(sentence(i, 30) for i in range(40)))
    return folder


def run_command(line: str, capsys) -> str:
    """stdout of a command, run in this process in the current folder."""
    script, *words = shlex.split(line)[1:]
    extra = QUICKER.get(script, "").split()
    if "--resume" in words or "--plan" in words:
        extra = [word for word in extra if word not in ("--steps", "4")] if "--plan" in words else []
    if "--gpus" in words or words[0] == "report":
        extra = []
    sys.argv = [script, *words, *extra]
    try:
        run(SCRIPTS[script].main)
    except SystemExit as end:
        assert not end.code, f"{line}: {capsys.readouterr().err}"
    return capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    if not Path("runs/mine").exists():
        run_command("python train.py --model FOLDER --data examples.json --out runs/mine", capsys)
    for line in commands(page):
        if "pass-at-k" in line and sandbox_refusal() is not None:
            continue
        out = re.search(r"--out (runs/\S+)", line)
        if out and Path(out[1]).exists() and "--resume" not in line:
            line += " --overwrite"
        run_command(line, capsys)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists() or link.startswith("http"), f"{page.name}: {link}"
    for name in re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|sh|md))`", text):
        assert (ROOT / name).exists() or name in ("my.py",), f"{page.name}: {name}"


def test_the_glossary_leads_to_what_it_names():
    for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines():
        for file, name in re.findall(r"`([\w/]+\.py)`, `([\w.]+)`", line):
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), f"{file} has no {name}"
