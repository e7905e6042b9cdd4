"""report.html of every run, `--html` of evaluations, `evaluate.py report`, and --tensorboard: what a page says is
what was measured, whatever stands in data and answers is text, nothing is loaded, and it looks right in a browser."""

import importlib.util
import json
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.browser import open_browser, requested_addresses
from support.helpers import chat_base, command, sentence
from support.runs import lines

import evaluate
import flags
import train
from common import console
from common.errors import UserError
from evals import charts, printed_page, report, run_page
from training import metrics as metrics_module
from training import outcome, run_report
from training.metrics import MetricsLogger

EVIL = [
    "</script><script>window.ran=1</script>",
    "<img src=x onerror='window.ran=1'>",
    "<style>*{display:none}</style></pre></dl>",
    "\u202eleft \u2067 open",
    "null \x00 \x1b[31m {{ 7 * 7 }}",
]
SECRETS = "write to jane.doe@example.com with sk-abcdefghijklmnopqrstuvwxyz0123456789ABCD"
ELEMENTS = {"html", "meta", "title", "style", "header", "h1", "p", "section", "h2", "h3", "div", "span", "b", "small"}
ELEMENTS |= {
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "dl",
    "dt",
    "dd",
    "figure",
    "figcaption",
}
ELEMENTS |= {"ul", "li", "svg", "path", "line", "circle", "rect", "text", "pre", "mark", "footer", "script"}
VOID = ("meta", "link", "img")


class Page(HTMLParser):
    """A page taken apart: the text in each element, tables as rows, charts as {title: {step: {curve: number}}}."""

    def __init__(self, file: Path):
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements, self.attributes, self.open = set(), [], []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.charts: dict[str, dict[int, dict[str, float]]] = {}
        self.chart = ""
        self.feed(self.source)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in VOID:
            return
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        text = self.texts[tag][-1]
        if tag == "h3" and "figcaption" in self.open:
            self.chart = text
            self.charts[text] = {}
        if tag == "title" and "svg" in self.open:
            first, *rest = text.split("\n")
            numbers = dict(line.rsplit(": ", 1) for line in rest)
            values = {name: float(number) for name, number in numbers.items()}
            self.charts[self.chart][int(first.split()[1].replace(",", ""))] = values
        while self.open.pop() != tag:
            assert tag == "html"

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return self.texts["html"][0]

    @property
    def facts(self) -> dict:
        (script,) = self.texts["script"]
        return json.loads(script)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, and examples of which many are hostile."""
    folder = tmp_path_factory.mktemp("report")
    chat_base(folder / "base")
    records = []
    for i in range(30):
        prompt = f"{sentence(i, 2)} {SECRETS if i % 4 == 0 else ' '.join(EVIL)}"
        records.append({"prompt": prompt, "completion": f"{sentence(i + 99, 3)} {EVIL[0] if i % 4 else ''}"})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def trained(folder: Path, name: str, *words, keep=None) -> str:
    """What a run into folder / name prints."""
    with pytest.MonkeyPatch.context() as patch:
        argv = ["train.py", "--model", folder / "base", "--data", folder / "data.json", "--dtype", "fp32"]
        patch.setattr("sys.argv", [*map(str, [*argv, "--val-fraction", 0.15, "--out", folder / name, *words])])
        with console.transcript() as kept:
            train.main()
    return kept.text


@pytest.fixture(scope="module")
def run(folder) -> tuple[Path, str]:
    """A run of 24 steps: its folder, and what it has printed."""
    words = ["--batch-size", 2, "--eval-every", 6, "--seed", 1, "--save-every", 0, "--tensorboard"]
    said = trained(folder, "run", "--steps", 24, *words)
    return folder / "run", said


def check_curves(page: Page, folder: Path) -> None:
    """The numbers under the pointer are those of metrics.jsonl, all of them in a run so short."""
    wanted = lines(folder)
    places = {
        "loss": ("Loss, nats a token", "training, each step", 1),
        "val_loss": ("Loss, nats a token", "validation", 1),
        "kl_base": ("Distance from the base, KL in nats a token", "KL(base || tuned)", 1),
        "lr": ("Learning rate", "learning rate", 1),
        "grad_norm": ("Gradient norm", "each step", 1),
        "tokens_per_s": ("Speed, tokens/s", "each step", 1),
        "memory_mb": ("Peak memory, GB", "peak so far", 1e-3),
    }
    for name, (title, label, scale) in places.items():
        mine = {line["step"]: line[name] * scale for line in wanted if line.get(name) is not None}
        shown = {step: values[label] for step, values in page.charts[title].items() if label in values}
        assert mine.keys() == shown.keys() and mine, name
        assert all(shown[step] == pytest.approx(value, rel=1e-5) for step, value in mine.items()), name


# ---- the page of a run ----


def test_the_page_says_the_numbers_of_the_run(run):
    folder, said = run
    page = Page(folder / "report.html")
    check_curves(page, folder)
    validations = [line for line in lines(folder) if "val_loss" in line]
    before, after = (f"{line['val_loss']:.4f}" for line in (validations[0], validations[-1]))
    assert f"The loss on held-out examples fell from {before} to {after} nats a token in 24 steps." in page.text
    (certain, changes, numbers, files) = page.tables
    assert certain[0] == ["", "items", "before", "end", "change", "95 % interval", "verdict"]
    assert certain[1][:4] == ["validation loss, nats a token", "7", before, after] and certain[1][-1] == "better"
    low, high = (float(each) for each in certain[1][5].split(" to "))
    assert low < validations[-1]["val_loss"] - validations[0]["val_loss"] < high < 0
    assert changes[0][1] == "before training (step 0)" and changes[1][1] == before and changes[1][-1] == after
    assert [row[0] for row in numbers[1:]] == ["0", "6", "12", "18", "24"]
    assert numbers[1][1:] == [before, "0.0000"]
    assert files[1] == ["data.json", "training", "30"]
    means = {
        step: values["training, running mean"] for step, values in page.charts["Loss, nats a token"].items() if step
    }
    losses = [line["loss"] for line in lines(folder) if "loss" in line]
    assert means[24] == pytest.approx((losses[-1] + losses[-2]) / 2, rel=1e-5)
    facts = page.facts
    origin = json.loads((folder / "final/plaintune.json").read_text())
    for digest in (origin["base_sha256"], origin["data"]):
        assert digest in page.text
    hashes = [text for text in page.texts["dd"] if re.match("[0-9a-f]{64}", text)]
    # Of base, data file, examples, best/ and final/.
    assert len(hashes) == 5
    assert facts["command"].startswith("python train.py \\\n    --model ") and "--seed 1" in facts["command"]
    assert "--out" not in facts["command"] and "--tensorboard" not in facts["command"]
    given = {row[0]: row[1] for row in facts["given"]}
    assert given["--steps"] == "24" and given["--tensorboard"] == "yes"
    chosen = {row[0]: row[1:] for row in facts["chosen"]}
    assert chosen["--rank"][0] == "8" and "saves nothing in fp32" in chosen["--compile"][1] and "--steps" not in chosen
    assert f"report    {folder / 'report.html'}; its 3 sample answers took " in said
    # Nothing of a page that is written aside is left.
    assert not list(folder.glob(".*partial*"))


def test_trained_tokens_are_marked_and_answers_are_those_of_both_models(run, folder):
    page = Page(run[0] / "report.html")
    records = json.loads((folder / "data.json").read_text())
    assert len(page.facts["examples"]) == 3 and len(page.facts["answers"]) == 3
    for title, spans in page.facts["examples"]:
        number = int(re.match(r"data\.json record (\d+), ", title)[1])
        marked = "".join(text for text, is_trained in spans if is_trained)
        assert marked == records[number - 1]["completion"] + "<|im_end|>"
        assert "".join(text for text, _ in spans).startswith("<|im_start|>user\n")
    assert [report.visible(spans[1][0]) for _, spans in page.facts["examples"]] == page.texts["mark"]
    asked = {record["prompt"]: record["completion"] for record in records}
    for rows in page.facts["answers"]:
        assert [name for name, _ in rows] == ["asked", "reference", "base", "tuned"]
        (prompt,) = [each for each in asked if report.without_secrets(each)[0].strip() == rows[0][1]]
        assert rows[1][1] == asked[prompt].strip()
        assert rows[2][1] != rows[3][1]


def test_hostile_text_stays_text_and_secrets_are_masked(run):
    page = Page(run[0] / "report.html")
    assert page.elements <= ELEMENTS, page.elements - ELEMENTS
    assert len(page.texts["script"]) == 1 and "{{ 7 * 7 }}" in page.text
    for evil in EVIL[:3]:
        assert evil in page.text
    assert not set(page.source) & set("\u202e\u2067\x00\x1b") and "\\u202e" in page.text
    assert "jane.doe" not in page.source and "sk-abcdef" not in page.source
    assert re.search(r"\d+ parts look like addresses or secrets and are masked on this page", page.text)


def test_nothing_is_loaded_from_elsewhere(run):
    page = Page(run[0] / "report.html")
    assert not [each for each in page.attributes if each[1] in ("src", "href", "style", "xlink:href", "onload")]
    style = page.texts["style"][0]
    assert "url(" not in style and "@import" not in style and "://" not in page.source.split("<header>")[0]
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "script" not in policy


def test_a_resumed_run_writes_it_anew_and_event_files_go_on(folder):
    trained(folder, "longer", "--steps", 8, "--eval-every", 4, "--tensorboard", "--save-every", 4)
    page = Page(folder / "longer/report.html")
    assert max(page.charts["Learning rate"]) == 8 and "8 steps, 20" in page.text
    # As if it had been killed after step 9 of a longer one: what was logged after the checkpoint does not count.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLogger, "close", lambda self: (self.flush(), self.tensorboard.sync()))
        patch.setattr(outcome, "save_final", lambda *_: None)
        trained(folder, "longer", "--resume", "--steps", 10)
    shutil.rmtree(folder / "longer/checkpoints/step-10", ignore_errors=True)
    trained(folder, "longer", "--resume", "--steps", 14)
    page = Page(folder / "longer/report.html")
    check_curves(page, folder / "longer")
    assert max(page.charts["Learning rate"]) == 14 and "14 steps, 20" in page.text
    first, second = page.facts["command"].split("\n", 10)[0], page.facts["command"].rpartition("python")[2]
    assert first == "python train.py \\" and "--steps 8 \\\n" in page.facts["command"]
    assert second == " train.py \\\n    --out longer \\\n    --resume \\\n    --steps 14"
    assert "These 2 commands, one after the other, do it again" in page.text
    # The model before the training is known from the run's folder.
    assert page.tables[0][1][0] == "validation loss, nats a token"
    check_events(folder / "longer")


def test_a_stopped_run_says_so_and_answers_nothing(folder, monkeypatch):
    log_step = MetricsLogger.log_step

    def stop_at_3(self, step, *arguments):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        log_step(self, step, *arguments)

    monkeypatch.setattr(MetricsLogger, "log_step", stop_at_3)
    with pytest.raises(SystemExit):
        trained(folder, "stopped", "--steps", 9)
    page = Page(folder / "stopped/report.html")
    steps = [line["step"] for line in lines(folder / "stopped") if "loss" in line]
    assert f"stopped by a signal after step {steps[-1]} of 9, --resume goes on" in page.text and steps[-1] < 9
    assert "answers" not in page.facts and "SHA-256 of final/" not in page.text
    assert list(page.charts["Learning rate"]) == steps


def test_full_fine_tuning_answers_before_it_trains_and_a_failure_is_one_line(folder, monkeypatch):
    trained(folder, "full", "--method", "full", "--steps", 2, "--save-every", 1)
    page = Page(folder / "full/report.html")
    names = ["asked", "reference", "base", "tuned"]
    assert [[name for name, _ in rows] for rows in page.facts["answers"]] == [names] * 3
    assert "base: the model before the first step" in page.text
    # Its adapter is off, which is the same model.
    adapted = Page(folder / "run/report.html")
    for mine, theirs in zip(page.facts["answers"], adapted.facts["answers"], strict=True):
        assert mine[:3] == theirs[:3]
    # The page is made of what a resumed run still knows.
    said = trained(folder, "full", "--resume", "--steps", 3)
    page = Page(folder / "full/report.html")
    assert [[name for name, _ in rows] for rows in page.facts["answers"]] == [["asked", "reference", "tuned"]] * 3
    assert "of the base there are none: it was trained over when this run was resumed" in page.text
    assert "report    " in said

    def fails(*_):
        raise ZeroDivisionError("of the page")

    monkeypatch.setattr(run_report, "run_page", fails)
    said = trained(folder, "full", "--method", "full", "--steps", 1, "--overwrite")
    where = folder / "full/report.html"
    assert f"WARNING   {where} was not written (ZeroDivisionError: of the page)\n" in said
    assert not where.exists() and (folder / "full/final/model.safetensors").is_file() and "next      " in said


def test_answers_end_when_their_time_is_over(run, folder):
    from checkpoint import load_model
    from tokenizer import load_tokenizer

    model, tokenizer = load_model(folder / "base"), load_tokenizer(folder / "base")
    whole, was_cut = run_report.answer_in_time(model, tokenizer, [[5, 6], [7]], 60)
    assert not was_cut and whole == [
        tokenizer.decode(ids, skip_special=True) for ids in model.generate([[5, 6], [7]], 64, stop=tokenizer.stop_ids)
    ]
    cut, was_cut = run_report.answer_in_time(model, tokenizer, [[5, 6], [7]], 0)
    assert was_cut and all(text.startswith(part[:1]) and len(part) < len(text) for part, text in zip(cut, whole))


def test_numbers_that_some_runs_have_besides_get_charts_and_columns(tmp_path):
    written = [{"step": 0, "val_loss": 2.0, "val_f1": 0.25}]
    written += [
        {"step": step, "loss": 2.0 - step / 9, "tokens": 5, "penalty": 0.5 * step, "mfu": None} for step in (1, 2)
    ]
    written += [{"step": 2, "val_loss": 1.0, "val_f1": 0.75}, {"step": 4, "val_loss": 1.5, "val_f1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    lines_read = run_page.read_run_metrics(tmp_path)
    for best, held in ((1.0, ": best/ holds these weights."), (2.0, ".")):
        (tmp_path / "page.html").write_text(run_page.run_page(tmp_path, lines_read, {"best_val_loss": best}))
        assert f"It was lowest at step 2, 1.0000{held}" in Page(tmp_path / "page.html").text
    page = Page(tmp_path / "page.html")
    name = "validation answers, F1 %"
    assert page.charts[name] == {0: {name: 0.25}, 2: {name: 0.75}, 4: {name: 0.5}}
    assert page.charts["penalty"] == {1: {"penalty": 0.5}, 2: {"penalty": 1.0}} and "mfu" not in page.charts
    changes, numbers = page.tables
    assert changes[-1] == [name, "0.2500", "0.7500", "0.5000"]
    assert numbers[0] == ["step", "validation loss, nats a token", name]


# ---- runs side by side ----


def test_runs_side_by_side(run, folder, tmp_path, monkeypatch, capsys):
    trained(folder, "other", "--steps", 5, "--eval-every", 5, "--lr", "1e-3", "--seed", 1)
    capsys.readouterr()
    file = tmp_path / "runs.html"
    out, err, code = command(evaluate, monkeypatch, capsys, "report", run[0], folder / "other", "--html", file)
    assert (err, code) == ("", 0)
    table = [line.split() for line in out.splitlines()]
    last = {name: [x for x in lines(folder / name) if "val_loss" in x][-1] for name in ("run", "other")}
    for row, name in zip(table[2:4], ("run", "other"), strict=True):
        assert row[0] == name and f"{last[name]['val_loss']:.4f}" in row and f"{last[name]['kl_base']:.4f}" in row
    assert ["--steps", "24", "5"] in table and ["--seed", "1", "1"] not in table and "NOTE" not in out
    page = Page(file)
    results, differences = page.tables
    assert [row[0] for row in results] == ["", "run", "other"] and ["--lr", "0.0073", "0.001"] in differences
    losses = page.charts["Validation loss, nats a token"]
    for name in ("run", "other"):
        shown = {step: values[name] for step, values in losses.items() if name in values}
        wanted = {x["step"]: x["val_loss"] for x in lines(folder / name) if "val_loss" in x}
        assert shown == pytest.approx(wanted, rel=1e-5)
    # The same questions, so the answers stand below each other.
    rows = [text for text in page.texts["dt"] if text in ("asked", "reference", "base", "run", "other")]
    assert rows[:5] == ["asked", "reference", "base", "run", "other"]


def test_a_run_without_a_page_and_one_of_other_examples_are_said(run, folder, tmp_path, monkeypatch, capsys):
    killed = tmp_path / "killed"
    killed.mkdir()
    text = (run[0] / "metrics.jsonl").read_text()
    (killed / "metrics.jsonl").write_text(text + '{"step": 25, "lo')
    out, err, code = command(evaluate, monkeypatch, capsys, "report", killed, "--html", tmp_path / "one.html")
    assert (err, code) == ("", 0)
    page = Page(tmp_path / "one.html")
    assert page.charts["Learning rate"] == Page(run[0] / "report.html").charts["Learning rate"]
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    page = (other / "report.html").read_text()
    (other / "report.html").write_text(re.sub('"validation_hash": "....', '"validation_hash": "0000', page))
    out, _, _ = command(evaluate, monkeypatch, capsys, "report", run[0], other, killed)
    assert "NOTE: the runs have different validation examples: their losses don't compare\n" in out
    assert "NOTE: killed: no report.html with facts" in out and "--html FILE writes a page" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{run}/../run"], "is named twice"),
        (["{run}/final"], "holds no metrics.jsonl; name {run}"),
        (["{folder}"], "holds no metrics.jsonl; the folder of a run is wanted"),
        (["{run}", "--html", "{folder}/data.json"], "is there already and no page of a report; give another name"),
        (["{run}", "--html", "{folder}/none/x.html"], "there is no such folder"),
        (["{run}", "{folder}/longer", "--html", "{run}/report.html"], "is the page of a run; give another name"),
    ],
)
def test_what_is_no_run_or_no_page_is_refused(run, folder, monkeypatch, capsys, words, message):
    places = {"run": run[0], "folder": folder}
    before = (folder / "data.json").read_bytes()
    words = [word.format(**places) for word in words]
    out, err, code = command(evaluate, monkeypatch, capsys, "report", *words)
    assert code == 2 and out == "" and message.format(**places) in err and err.count("\n") == 1
    assert (folder / "data.json").read_bytes() == before


def test_the_page_of_a_run_is_made_anew_of_it_alone(run, folder, monkeypatch, capsys):
    file = run[0] / "report.html"
    before = Page(file).facts
    words = ["--adapter", run[0] / "final", "--data", folder / "data.json", "--html", file]
    _, err, code = command(evaluate, monkeypatch, capsys, "loss", *words)
    assert code == 2 and f"--html {file}: is the page of a run; give another name" in err
    _, err, code = command(evaluate, monkeypatch, capsys, "report", run[0], "--html", file)
    assert (err, code) == ("", 0) and Page(file).facts == before


def test_damaged_numbers_are_left_out(tmp_path):
    lines_of = ['{"step": 1, "loss": 2.0, "tokens": 5, "seconds": 1.0}', '{"step": 2, "loss": "x", "tokens": null}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines_of, '{"step": 3, "loss": null, "seconds": []}']))
    read = run_page.read_run_metrics(tmp_path)
    assert read == [{"step": 1, "loss": 2.0, "tokens": 5, "seconds": 1.0}, {"step": 2}, {"step": 3, "loss": None}]
    assert "1 step had no finite loss" in run_page.run_page(tmp_path, read, {})


# ---- pages of evaluations ----


def test_an_evaluation_as_a_page_says_what_it_prints(run, folder, tmp_path, monkeypatch, capsys):
    page_file = tmp_path / "exact.html"
    words = ["--adapter", run[0] / "final", "--versus", "base", "--data", folder / "data.json", "--limit", 5]
    words += ["--dtype", "fp32", "--html", page_file]
    out, err, code = command(evaluate, monkeypatch, capsys, "exact", "f1", *words)
    assert code == 0, err
    page = Page(page_file)
    assert page.elements <= ELEMENTS | {"script"} and "script" not in page.elements
    for rows in page.tables:
        assert console.table(rows) in out
    assert len(page.tables) == 2 and out.endswith(f"\npage      {page_file}\n")
    assert page.texts["h1"] == ["exact, f1 on data.json"]
    assert page.texts["dt"].count("question") == 10 == out.count("  question ") and "reference" in page.texts["dt"]
    for digest in (
        run_report.file_sha256(folder / "data.json"),
        json.loads((run[0] / "final/plaintune.json").read_text())["base_sha256"],
    ):
        assert digest in page.text
    assert "jane.doe@example.com" not in page.source
    # It replaces its like, and nothing else.
    with pytest.raises(UserError, match="no page of a report"):
        report.check_report_file(folder / "data.json")
    report.check_report_file(page_file)


def test_a_comparison_as_a_page_has_its_intervals(run, folder, tmp_path, monkeypatch, capsys):
    words = ["--target", folder / "data.json", "--limit", 4, "--dtype", "fp32", "--html", tmp_path / "compare.html"]
    out, err, code = command(evaluate, monkeypatch, capsys, "compare", "base", run[0] / "final", *words)
    assert code == 0, err
    page = Page(tmp_path / "compare.html")
    (rows,) = page.tables
    assert rows[0][5] == "95 % interval" and rows[1][0] == "target data.json, exact %" and console.table(rows) in out
    assert "flipped: of 4 answers by exact" in page.text and out.count("was made on it") == 1


def test_lines_become_what_they_are():
    kept = console.Transcript()
    kept.text = """data      a.json: 5 records
          --limit: 3 of 5
WARNING: the two models differ
A sentence of a note.
  wrong to right (1 of 2)
    question   why?  because
    reference  \nsomething is no fact of ten letters
"""
    blocks, num_masked = printed_page.blocks_of_output(kept)
    assert num_masked == 0
    assert [(block.kind, block.value) for block in blocks] == [
        ("warning", "the two models differ"),
        ("text", "A sentence of a note."),
        ("heading", "wrong to right (1 of 2)"),
        ("answers", [[["question", "why?  because"], ["reference", "(nothing)"]]]),
        ("text", "something is no fact of ten letters"),
        ("heading", "What was measured"),
        ("facts", [["data", "a.json: 5 records; --limit: 3 of 5"]]),
    ]


# ---- charts ----


def test_a_long_curve_keeps_its_peaks_and_a_gap_its_gap():
    random = np.random.default_rng(0)
    values = random.normal(size=20_000)
    values[[7, 12_345]] = (50, -60)
    points = list(enumerate(values.tolist()))
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS and thin == sorted(thin) and {(7, 50.0), (12_345, -60.0)} <= set(thin)
    assert set(thin) <= set(points) and charts.thinned(points[:600]) == points[:600]
    chart = charts.line_chart("x", [charts.Curve("a", [(1, 2.0), (2, None), (3, 4.0), (4, 5.0)])])
    (path,) = re.findall(r'<path class="c0" d="([^"]+)"', chart.svg)
    assert re.sub(r"[\d. ]+", "", path) == "MML" and "step 2" not in chart.svg
    assert charts.line_chart("x", [charts.Curve("a", [(1, None)])]) is None


@pytest.mark.parametrize(
    ("values", "from_zero", "labels"),
    [
        ([1.0, 2.0, 3.0], False, ["1.0", "1.5", "2.0", "2.5", "3.0"]),
        ([0.5, 3.0], False, ["0", "1", "2", "3"]),
        ([2e-5, 1e-4], True, ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        ([12_000, 31_000], True, ["0", "10k", "20k", "30k", "40k"]),
        ([4.0], False, ["3.6", "3.8", "4.0", "4.2", "4.4"]),
        ([0.0, 0.0], True, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        ([1.0, 2.0, 1.5, 900.0], True, ["1", "10", "100", "1,000"]),
    ],
)
def test_axes_have_round_numbers_in_order_within_the_picture(values, from_zero, labels):
    axis = charts.y_axis(values, from_zero)
    assert [label for _, label in axis.ticks] == labels
    heights = [axis.place(value) for value, _ in axis.ticks]
    assert heights == sorted(heights, reverse=True)
    for value in values:
        assert charts.TOP - 0.01 <= axis.place(value) <= charts.HEIGHT - charts.BOTTOM + 0.01
    # Equal steps on paper.
    assert np.diff(heights) == pytest.approx(np.diff(heights)[0])


# ---- TensorBoard ----


def check_events(folder: Path) -> None:
    """TensorBoard's own reader finds each number of metrics.jsonl, once, in its float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    wanted: dict[str, dict[int, float]] = {}
    for line in lines(folder):
        for name, value in line.items():
            if name != "step" and value is not None:
                wanted.setdefault(name, {})[line["step"]] = value
    assert set(events.Tags()["scalars"]) == wanted.keys() and {"loss", "val_loss", "kl_base", "lr"} <= wanted.keys()
    for name, values in wanted.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(found) == len(values), name
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in sorted(values.items())], name


def test_tensorboard_reads_the_numbers_of_metrics_jsonl(run):
    check_events(run[0])


def test_without_the_package_it_is_said_before_anything_is_read(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    with pytest.raises(UserError, match="^--tensorboard: the package is not installed; pip install tensorboard$"):
        flags.parse_flags(["--tensorboard"])


def test_a_full_disk_ends_the_event_files_and_not_the_run(tmp_path):
    said = []
    files = metrics_module.TensorBoardFiles(tmp_path, 0, said.append)
    files.write({"step": 1, "loss": 2.0, "grad_norm": None})

    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    files.writer.close()
    files.writer = Full()
    for step in (2, 3):
        files.write({"step": step, "loss": 1.0})
    files.close()
    problem = "no more is written ([Errno 28] No space left on device); training goes on"
    assert said == [f"WARNING   {tmp_path / 'tensorboard'}: {problem}"]


# ---- in a browser ----


def test_the_pages_in_a_browser(run, folder, tmp_path):
    """Light and dark, wide and narrow: charts are drawn in the colors of the room, nothing overflows but within its own
    frame, no script runs, nothing is asked for but the file, and the browser has nothing to complain of."""
    browser = open_browser(tmp_path / "profile", tmp_path / "downloads")
    try:
        seen = {}
        for width, scheme in ((1200, "light"), (390, "dark")):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get((run[0] / "report.html").as_uri())
            seen[scheme] = browser.execute_script(
                """
                const charts = [...document.querySelectorAll('svg.chart')].map(each => each.getBoundingClientRect());
                const line = getComputedStyle(document.querySelector('path.c1')).stroke;
                const body = getComputedStyle(document.body);
                const letters = document.querySelector('svg.chart text').getBoundingClientRect().height;
                return {ran: window.ran, charts: charts.map(each => [each.width, each.height, each.x]), line, letters,
                        page: body.backgroundColor, ink: body.color, over: document.documentElement.scrollWidth,
                        fonts: getComputedStyle(document.querySelector('.tile b')).fontSize}
                """
            )
        light, dark = seen["light"], seen["dark"]
        assert light["ran"] is None and len(light["charts"]) == 6
        assert light["line"] == "rgb(210, 80, 15)" and dark["line"] == "rgb(255, 154, 102)"
        assert (
            light["page"] == "rgb(255, 255, 255)" and dark["page"] == "rgb(21, 22, 23)" and light["ink"] != dark["ink"]
        )
        assert light["over"] <= 1200 and dark["over"] <= 390
        # Two columns on a desk, one on a telephone, with letters that can be read on both.
        assert len({x for _, _, x in light["charts"]}) == 2 and len({x for _, _, x in dark["charts"]}) == 1
        assert all(width > 330 and height > 170 for width, height, _ in light["charts"] + dark["charts"])
        assert dark["letters"] > 9 and light["letters"] < 22
        assert {address.partition("?")[0] for address in requested_addresses(browser)} <= {
            (run[0] / "report.html").as_uri()
        }
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
