"""report.html in the run's folder: what came of a run, to be looked at and sent on.

The curves and losses on it are those of metrics.jsonl (evals/run_page.py draws them). What that file does not
say is gathered here as facts: the data and three examples as the model saw them, sample answers before and
after, the flags, hashes and versions, and the command that does it again. The facts stand in the page as
JSON as well, for `evaluate.py report` to lay runs side by side.

The page is written last and ends no run: where it fails, a line says why. It takes a fraction of a second;
sample answers, which the bundled task has anyway, may take AT_LEAST to AT_MOST seconds in other runs, and are
cut there.
"""

import contextlib
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import distributed
from adapter_files import base_size, weights_file
from checkpoint import fingerprint, weight_files
from common.console import number_of, one_line
from common.errors import first_line, read_json_if_there
from common.files import file_sha256
from dataset.encoding import AS_CLASSES, AS_PROMPTS
from dataset.examples import Dataset, Example
from dataset.inspection import spans_of
from evals.compare import HEADINGS, Change
from evals.report import (
    command_text,
    masked_note,
    middle_left_out,
    program_versions,
    without_secrets,
    write_report,
)
from evals.run_page import PAGE_NAME, read_run_metrics, run_page
from evals.table import EVALUATIONS
from flags import OPTIONS, dashed, saved_value
from methods import method_name, method_of, model_of_step_0
from model import Transformer, eager_mode
from objectives import OBJECTIVES
from tokenizer import Tokenizer
from training.best import why_none_is_kept
from training.defaults import is_bundled_task
from training.demo import Demo, has_budget
from training.model_card import UNTOLD, ModelCard, sources_of

# What templates write before a part of a conversation.
ROLE_WORDS = ("system", "user", "human", "assistant", "model", "tool")
NUM_EXAMPLES = 3
NUM_ANSWERS = 3
MOST_ANSWER_TOKENS = 64
# Longer prompts are not answered on the page, nor read by anybody.
LONGEST_PROMPT = 1024
# Seconds that sample answers may take: a share of the training, within limits.
ANSWER_SHARE, AT_LEAST, AT_MOST = 0.05, 10.0, 20.0
# Larger weights are not read once more for their hash.
MOST_HASHED_BYTES = 1 << 30
# What --profile and --plan are, no run has on its page.
NO_SETTINGS = ("plan", "gpus", "gpu_memory", "profile", "resume", "overwrite", "out")


def write_run_report(
    card: ModelCard,
    model: Transformer,
    changes: Sequence[Change] = (),
    demo: Demo | None = None,
) -> None:
    """Writes report.html, and prints where it is. Only rank 0 has something to do.

    card: knows the run. changes: of what was measured before the training and at its end.
    demo: of the bundled task, with its answers.
    """
    if not distributed.is_rank0():
        return
    out = card.metrics.out
    try:
        facts = run_facts(card, model, changes, demo)
        page = run_page(out, read_run_metrics(out), facts)
        write_report(out / PAGE_NAME, page)
    except Exception as error:  # noqa: BLE001 (a run that has trained must not fail for its page)
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"WARNING   {out / PAGE_NAME} was not written ({reason})")
        return
    took = f"; {facts['took']}" if facts.get("took") else ""
    print(f"report    {out / PAGE_NAME}{took}")


def run_facts(
    card: ModelCard, model: Transformer, changes: Sequence[Change], demo: Demo | None
) -> dict:
    """Returns what the page says besides metrics.jsonl, as JSON has it."""
    settings, state = card.settings, card.state
    out = card.metrics.out
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = base_size(model)
    facts: dict = {
        "title": f"{card.base_name}, fine-tuned ({method_name(settings)})",
        "subtitle": f"{out.name}: {how_it_ended(card)}, {time.strftime('%Y-%m-%d %H:%M')}",
        "base": card.base_name,
        "base_sha256": card.origin["base_sha256"],
        "loss_means": OBJECTIVES[settings.objective].lower_loss,
        "data_hash": card.origin["data"],
        "validation_hash": hash_of(card.data.val),
        "method": method_name(settings),
        "steps": settings.steps,
        "trained": f"{trained:,}",
        "trained_share": f"parameters, {100 * trained / total:.2f} % of the model's",
        "device": card.machine(),
        "warnings": run_warnings(card),
        # Of the weights in best/, which are not always those of the lowest one.
        "best_val_loss": state.best_val_loss if state.has_best else None,
    }
    facts["asked_for_safety"] = demo is not None or bool(settings.safety)
    if changes:
        headings = ["", "items", "before", "end", *HEADINGS[4:]]
        facts["changes"] = [headings, *(change.cells() for change in changes)]
    facts |= data_facts(card) | example_facts(card.data.train, card.tokenizer)
    ended = not state.interrupted_by
    if demo is not None and ended:
        facts |= demo_facts(demo)
    elif ended:
        try:
            facts |= sample_answers(card, model)
        except Exception as error:  # noqa: BLE001 (as of memory: the rest of the page is there all the same)
            reason = f"{type(error).__name__}: {first_line(error)}"
            facts["answers_note"] = f"No sample answers: they could not be generated ({reason})."
    config = read_json_if_there(out / "config.json")
    facts |= setting_facts(card, set(config.get("given", settings.given)))
    facts["made"] = origin_rows(card)
    weights = out / ("best" if state.has_best else "final")
    if ended:
        words = ["compare", "base", str(weights), "--target", "HELD_OUT.jsonl"]
        words += ["--general", "GENERAL.txt", "--html", "compare.html"]
        facts["compare_command"] = command_text("evaluate.py", words)
    return facts


def how_it_ended(card: ModelCard) -> str:
    """Returns a clause that says how far the run came."""
    step, steps = card.state.step, card.settings.steps
    if card.state.interrupted_by:
        return f"stopped by a signal after step {step:,} of {steps:,}, --resume goes on"
    if step < steps:
        return f"ended by early stopping after step {step:,} of {steps:,}"
    return f"{number_of(steps, 'step')}"


def run_warnings(card: ModelCard) -> list[str]:
    """Returns what a reader must not miss."""
    settings, state = card.settings, card.state
    if settings.forget_limit is None or state.has_best or state.interrupted_by:
        return []
    score_name = EVALUATIONS[settings.eval_metric].score if settings.eval_metric else ""
    reason = why_none_is_kept(settings, state, score_name)
    return [reason[:1].upper() + reason[1:] + "."]


def hash_of(dataset: Dataset) -> str:
    """Returns a hash of what a dataset's examples ask and how long they are: runs with the same one
    validate on the same examples."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.prompts).tobytes())
    digest.update(np.ascontiguousarray(dataset.lengths).tobytes())
    return digest.hexdigest()


# ---- data ----


def data_facts(card: ModelCard) -> dict:
    """Returns the files of the examples, and what is in them."""
    train, val = card.data.train, card.data.val
    sources = sources_of(train)
    replays = getattr(train.examples, "replays", 0)
    uses = ["training"] * (len(sources) - replays) + ["replay"] * replays
    known = set(map(id, sources))
    for rows in sources_of(val):
        if id(rows) not in known:
            sources.append(rows)
            uses.append("validation")
    table = [["file", "used for", "records"]]
    for rows, use in zip(sources, uses, strict=True):
        for i, (name, _) in enumerate(rows.files):
            table.append([name, use, f"{rows.stats.records:,}" if i == 0 else "as above"])
    held_out = "" if "validation" in uses or not len(val) else ", held out of the same files"
    trained = f"{train.tokens:,} tokens of which {train.trained_tokens:,} are trained"
    examples = f"{number_of(len(train), 'example')} to train on, with {trained}."
    if train.kind == AS_PROMPTS:
        examples = (
            f"{number_of(len(train), 'prompt')} that the model answers, of {train.tokens:,} tokens."
        )
    elif train.kind == AS_CLASSES:
        examples = f"{number_of(len(train), 'example')} to train on, in {len(train.label_names):,} classes."
    limit = card.settings.val_limit
    read = f"; each validation reads {limit:,} of them" if 0 < limit < len(val) else ""
    lines = [f"{examples} To validate: {len(val):,}{held_out}{read}."]
    if len(train):
        median, high, longest = np.percentile(train.lengths, (50, 99, 100)).astype(int).tolist()
        lines.append(
            f"Tokens of an example: median {median:,}, 99 % up to {high:,}, longest {longest:,}."
        )
    dropped = [f"{reason}: {count:,}" for reason, count in train.dropped.items() if count]
    if dropped:
        lines.append(f"Cut or left out: {'; '.join(dropped)}.")
    if train.chat:
        lines.append(f"Chat template: {card.tokenizer.template_name}.")
    return {"files": table, "data": lines}


def example_facts(train: Dataset, tokenizer: Tokenizer) -> dict:
    """Returns three examples, spread evenly, as text in which the trained tokens are marked."""
    count = min(NUM_EXAMPLES, len(train))
    examples, notes, num_masked = [], [], 0
    for i in np.linspace(0, len(train) - 1, count).astype(int).tolist():
        texts = train.examples[i].texts()
        for example, which in zip(texts, (", chosen", ", rejected") if texts[1:] else ("",)):
            spans = []
            for text, is_trained in spans_of(example, tokenizer):
                clean, masked = without_secrets(text)
                num_masked += masked
                # Of a prompt nothing is: a span of it tells its weight.
                is_marked = is_trained and train.kind != AS_PROMPTS
                spans.append([middle_left_out(clean), is_marked])
            # The file's name is enough on a page that is sent on.
            place = example.source.rpartition("/")[2] + which + label_of_example(train, example)
            examples.append([f"{place}, {number_of(len(example.ids), 'token')}", spans])
    if num_masked:
        notes.append(masked_note(num_masked))
    return {"examples": examples, "examples_notes": notes}


def label_of_example(dataset: Dataset, example: Example) -> str:
    """Returns a clause with the class or the judgment of an example; "" where it has none."""
    return f", {one_line(dataset.label_names[example.label], 40)}" if example.label >= 0 else ""


# ---- answers ----


def demo_facts(demo: Demo) -> dict:
    """Returns the table and the answers with which the bundled task ends."""
    answers = []
    for question, reference, base, tuned in demo.shown_answers:
        rows = [["asked", question]]
        if reference:
            rows.append(["reference", reference])
        answers.append([*rows, ["base", base], ["tuned", tuned]])
    note = "The first test notes, which were not trained on, and a question that has nothing to do with them."
    brackets = (
        "In brackets: the 95 % interval of the change. Refusals are told by a list of phrases."
    )
    return {
        "comparison": demo.rows,
        "comparison_notes": [brackets],
        "answers": answers,
        "answers_note": note,
    }


def sample_answers(card: ModelCard, model: Transformer) -> dict:
    """Returns answers to a few validation prompts: of the model as it is now and, where what was trained
    can be switched off, of its base."""
    val = card.data.val
    if not len(val):
        return {"answers_note": "No sample answers: there are no validation examples."}
    if not val.chat:
        return {
            "answers_note": "No sample answers: the examples are plain text, which asks nothing."
        }
    if model.score is not None:
        return {"answers_note": "No sample answers: the model scores texts, and writes none."}
    if distributed.has_shards(model) or distributed.context_parallel:
        note = "No sample answers: the model is shared by several processes."
        return {"answers_note": f"{note} `generate.py --data` answers a file of prompts."}
    asked = answerable(val, model.max_positions)
    if not asked:
        return {
            "answers_note": "No sample answers: the validation prompts are too long for a page."
        }
    start = time.perf_counter()
    training = time.perf_counter() - card.metrics.launched
    seconds = min(AT_MOST, max(AT_LEAST, ANSWER_SHARE * training))
    prompts = [prompt for prompt, _ in asked]
    base = card.first_answers
    was_cut = False
    with eager_mode(model):
        tuned, is_cut = answer_in_time(model, card.tokenizer, prompts, seconds / 2)
        was_cut |= is_cut
        step_0 = model_of_step_0(model, card.settings)
        if step_0 is not None:
            with step_0:
                base, is_cut = answer_in_time(model, card.tokenizer, prompts, seconds / 2)
            was_cut |= is_cut
    took = time.perf_counter() - start
    answers, num_masked = [], 0
    for i, (prompt, reference) in enumerate(asked):
        tokenizer = card.tokenizer
        rows = [("asked", newest_question(tokenizer, prompt))]
        rows.append(("reference", tokenizer.decode(reference, skip_special=True)))
        if base:
            rows.append(("base", base[i]))
        rows.append(("tuned", tuned[i]))
        clean = []
        for name, text in rows:
            text, masked = without_secrets(text.strip())
            num_masked += masked
            if name == "reference" and not text:
                continue  # a prompt alone
            clean.append([name, middle_left_out(text) or "(nothing)"])
        answers.append(clean)
    which = "with the adapter off" if step_0 is not None else "the model before the first step"
    which = f"base: {which}"
    if not base:
        which = "of the base there are none: it was trained over when this run was resumed"
    note = (
        f"{number_of(len(asked), 'validation prompt')}, answered greedily with at most"
        f" {MOST_ANSWER_TOKENS} tokens; tuned: the model after the last step; {which}. This took {took:.1f} s."
    )
    if was_cut:
        note += " The answers were cut where their time was over."
    if num_masked:
        note += f" {masked_note(num_masked)}"
    return {
        "answers": answers,
        "answers_note": note,
        "took": f"its {number_of(len(asked), 'sample answer')} took {took:.1f} s",
    }


def answers_before(card: ModelCard, model: Transformer) -> list[str]:
    """Returns the model's answers to the page's prompts before step 1, where nothing can be switched off to
    get them later on; else nothing. It takes AT_LEAST / 2 seconds at most.

    Nothing also where it is too late for them (a resumed run), where no page follows (--profile), and of the
    bundled task, whose Demo has answers of its own.
    """
    settings = card.settings
    if settings.resume or settings.profile or is_bundled_task(settings):
        return []
    val = card.data.val
    is_shared = distributed.has_shards(model) or distributed.context_parallel
    if is_shared or not len(val) or not val.chat or not distributed.is_rank0():
        return []
    if model.score is not None:
        return []
    if model_of_step_0(model, settings) is not None:
        return []
    prompts = [prompt for prompt, _ in answerable(val, model.max_positions)]
    if not prompts:
        return []
    with eager_mode(model):
        texts, _ = answer_in_time(model, card.tokenizer, prompts, AT_LEAST / 2)
    return texts


def answerable(val: Dataset, max_positions: int) -> list[tuple[list[int], list[int]]]:
    """Returns (prompt, reference), ids each, of a few validation examples, spread evenly: of each its
    last answer and what stands before it."""
    longest = min(LONGEST_PROMPT, max_positions - MOST_ANSWER_TOKENS)
    found = []
    for i in np.linspace(0, len(val) - 1, min(len(val), 4 * NUM_ANSWERS)).astype(int).tolist():
        # Of a pair, the chosen answer.
        example = val.examples[i].texts()[0]
        # Of a prompt alone, all of it.
        start = len(example.ids) if val.kind == AS_PROMPTS else last_answer(example)
        if 0 < start <= longest:
            ids = [int(token) for token in example.ids]
            found.append((ids[:start], ids[start:]))
    every = max(1, len(found) // NUM_ANSWERS)
    return found[::every][:NUM_ANSWERS]


def last_answer(example: Example) -> int:
    """Returns where the last trained run of an example's tokens begins; 0 if there is none."""
    trained = np.asarray(example.loss_weights) > 0
    starts = np.flatnonzero(trained[1:] & ~trained[:-1]) + 1
    return int(starts[-1]) if len(starts) else 0


def newest_question(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Returns what a prompt ends with, as people write it: the last of its parts between control tokens,
    without the word that says whose part it is. The whole text where the template has none of these."""
    control = set(tokenizer.special_tokens.values())
    parts: list[list[int]] = [[]]
    for token in prompt:
        if token in control:
            parts.append([])
        else:
            parts[-1].append(token)
    texts = []
    for ids in parts:
        role, _, text = tokenizer.decode(ids).strip().partition("\n")
        texts.append(text.strip() if role.strip() in ROLE_WORDS else f"{role}\n{text}".strip())
    shown = [text for text in texts if text]
    return shown[-1] if shown else tokenizer.decode(prompt, skip_special=True)


def answer_in_time(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], seconds: float
) -> tuple[list[str], bool]:
    """Returns greedy answers, and whether the time was over before they had ended."""
    deadline = time.perf_counter() + seconds
    answers: list[list[int]] = [[] for _ in prompts]
    was_cut = False
    steps = model.stream(prompts, MOST_ANSWER_TOKENS, stop=tokenizer.stop_ids)
    with contextlib.closing(steps):
        for step in steps:
            for i, token in step:
                answers[i].append(token)
            if time.perf_counter() > deadline:
                was_cut = True
                break
    return [tokenizer.decode(ids, skip_special=True) for ids in answers], was_cut


# ---- how it was made ----


def setting_facts(card: ModelCard, given: set[str]) -> dict:
    """Returns the command, and the rows of what was given and of what was chosen."""
    settings = card.settings
    typed, chosen = [], []
    for name, option in OPTIONS.items():
        value = saved_value(name, getattr(settings, name))
        if name in given and name not in ("resume", "overwrite"):
            typed.append([dashed(name), shown_value(value)])
            continue
        reason = plain_reason(settings.reasons.get(name, ""))
        is_default = value == option.default and not reason
        if name in NO_SETTINGS or is_default or value in (None, (), ""):
            continue
        # A day means nothing to a template that writes none, nor a limit to what it does not limit.
        if (name == "date" and not card.tokenizer.writes_date) or (
            name == "val_limit" and not value
        ):
            continue
        chosen.append([dashed(name), shown_value(value), reason])
    facts = {"given": typed, "chosen": chosen, "command": command_again(card, given)}
    if card.state.earlier_ends:
        count = len(card.state.earlier_ends) + 1
        facts["command_note"] = (
            f"These {count} commands, one after the other, do it again: the run had ended, and was prolonged:"
        )
    return facts


def shown_value(value: object) -> str:
    """Returns a setting's value as one reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def plain_reason(reason: str) -> str:
    """Returns the reason of a setting without the marks that join it to a line of the terminal."""
    reason = reason.strip(" ,:;")
    if reason.startswith("(") and reason.endswith(")"):
        return reason[1:-1]
    return reason


def command_again(card: ModelCard, given: set[str]) -> str:
    """Returns the command that trains the same again: what was typed, without what only concerned this
    start, and what the clock and the calendar have chosen."""
    settings = card.settings
    names = given - set(UNTOLD)
    if has_budget(settings) and not settings.data:
        names |= {"steps", "lr"}
        names -= {"budget"}
    if card.tokenizer.writes_date:
        names.add("date")
    ends = [*card.state.earlier_ends, settings.steps]
    if len(ends) > 1:
        names |= {"steps"}
        names -= {"epochs", "budget"}
    words = []
    for name in OPTIONS:
        if name not in names:
            continue
        value = ends[0] if name == "steps" else saved_value(name, getattr(settings, name))
        if isinstance(value, bool):
            words.append(dashed(name) if value else dashed(f"no_{name}"))
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [dashed(name), *map(str, values)]
    if len(ends) == 1:
        return command_text("train.py", words)
    out = ["--out", card.metrics.out.name]
    commands = [command_text("train.py", [*words, *out])]
    for end in ends[1:]:
        commands.append(command_text("train.py", [*out, "--resume", "--steps", str(end)]))
    return "\n".join(commands)


def origin_rows(card: ModelCard) -> list[list[str]]:
    """Returns what the run was made from and with: hashes, machine, versions."""
    settings, origin, out = card.settings, card.origin, card.metrics.out
    rows = [["base", origin["base"], origin.get("base_revision", "")]]
    rows.append(["SHA-256 of its weights", origin["base_sha256"]])
    if "other_sha256" in origin:
        role = "the teacher's weights" if settings.teacher else "the reward model's weights"
        rows.append([f"SHA-256 of {role}", origin["other_sha256"]])
    gguf = origin.get("base_gguf")
    if gguf is not None:
        rows.append(["SHA-256 of its GGUF file", gguf["sha256"], gguf["file"]])
    told = set()
    for dataset in (card.data.train, card.data.val):
        for source in sources_of(dataset):
            for name, sha256 in source.files:
                if (name, sha256) not in told:
                    rows.append([f"SHA-256 of {name}", sha256])
                told.add((name, sha256))
    for name in ("forget_data", "ewc_data", "safety"):
        file = getattr(settings, name)
        if file and Path(file).is_file():
            rows.append([f"SHA-256 of {Path(file).name}", file_sha256(Path(file)), dashed(name)])
    rows.append(["hash of the examples", origin["data"], "as the model saw them, and their order"])
    if not card.state.interrupted_by:
        for name in ("best", "final"):
            if (out / name).is_dir():
                rows.append([f"SHA-256 of {name}/", weights_hash(out / name, card)])
    dtype = (
        f"{settings.dtype}{'' if not settings.quant else f', base in 4 bits ({settings.quant})'}"
    )
    rows += [["machine", card.machine()], ["computed in", dtype], ["versions", program_versions()]]
    return rows


def weights_hash(folder: Path, card: ModelCard) -> str:
    """Returns the hash of what was trained; of large models the command that computes it."""
    if method_of(card.settings).freezes_base:
        return file_sha256(weights_file(folder))
    size = sum(file.stat().st_size for file in weight_files(folder))
    if size > MOST_HASHED_BYTES:
        return (
            f"not computed for {size / 1e9:.1f} GB; sha256sum {folder.name}/*.safetensors does it"
        )
    return fingerprint(folder)
