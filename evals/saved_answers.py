"""Answers in a file, written and scored again: `--out` and `--answers`.

The file is that of `generate.py --data` (docs/answers.md has its keys), so either program's answers
can be scored by the other, without a model:

    evaluate.py f1 --data FILE --out answers.jsonl      answers, saves, scores; goes on where it was stopped
    evaluate.py rouge --answers answers.jsonl           scores what was saved by the references in it
    evaluate.py f1 --answers A.jsonl B.jsonl            side by side
    evaluate.py f1 --answers A.jsonl --data FILE        by the references of FILE
"""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapter_files import weights_file
from checkpoint import fingerprint
from common.errors import UserError
from common.files import file_sha256
from dataset.folders import TEST
from dataset.formats import Map
from dataset.prompts import Prompt
from dataset.records import Record
from evals.answer_file import FIRST_LINE, AnswerFile
from evals.answers import Answers, longest_answer, question_of
from evals.batch_answers import AnswerSettings, answer_into_file
from evals.questions import TOOLS, read_questions
from evals.table import EVALUATIONS, imported
from evals.targets import Target, file_of_target
from evals.tool_calls import calls_as_json, is_calls
from interop.remote_data import fetch_data
from model import Transformer
from tokenizer import Tokenizer


@dataclass
class SavedAnswers:
    """The lines of a file of answers, in the order of records and samples.

    keys: (record, sample) of each. questions: the messages of each before the answer, without system
    messages.
    """

    path: Path
    keys: list[tuple[int, int]] = field(default_factory=list)
    questions: list[list[tuple]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    num_cut: int = 0


# ---- saved ----


def answer_files_of(args: argparse.Namespace, targets: Sequence[Target]) -> dict[str, AnswerFile]:
    """Returns the file of each target's answers by the target's name (see file_of_target), none without
    --out. Once all are finished, `remove_partials` is to be called.

    Raises UserError where one can't be written, or is what --data names.
    """
    files: dict[str, AnswerFile] = {}
    if args.out is None:
        return files
    for target in targets:
        out = file_of_target(Path(args.out), target, targets)
        if out.resolve() == Path(args.data).resolve():
            raise UserError(
                f"--out {args.out}: {out} is the file of --data, which it would replace"
            )
        files[target.name] = AnswerFile(out, args.overwrite, len(targets) > 1)
    return files


def remove_partials(files: dict[str, AnswerFile]) -> None:
    """Removes what `answer_files_of` has kept so that a command could be continued."""
    for file in files.values():
        file.remove_partial()


def settings_of(args: argparse.Namespace) -> AnswerSettings:
    """Returns how a command line wants questions to be answered; max_new_tokens is 0 where it does
    not say."""
    return AnswerSettings(
        args.samples or 1,
        # What is not drawn has no seed.
        args.seed if args.temperature else None,
        args.max_new_tokens or 0,
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
    )


def origin_of(model: Transformer, target: Target, quant: str | None, dtype: str) -> dict:
    """Returns what a target's answers depend on, as the file of answers keeps it. dtype: in which the
    model computes."""
    adapter = None
    if target.adapter is not None:
        adapter = file_sha256(weights_file(target.adapter))
    return {
        "model": fingerprint(model.source),
        "adapter": adapter,
        "quant": quant,
        "merge": False,
        "dtype": dtype,
    }


def answer_and_save(
    args: argparse.Namespace,
    file: AnswerFile,
    target: Target,
    model: Transformer,
    tokenizer: Tokenizer,
    records: list[Record],
    settings: AnswerSettings,
    batch_size: int,
    dtype: str,
) -> Answers:
    """Answers the records into a file, or goes on where an earlier run was stopped, and returns the
    answers of the file.

    settings: with max_new_tokens 0 for the default, which follows from the references.
    dtype: in which the model computes.
    """
    prompts = []
    references = []
    folder = Path(args.data) if Path(args.data).is_dir() else Path(args.data).parent
    for record in records:
        messages, accepted = question_of(record)
        references.append(accepted)
        reference = record.messages[-1]
        if record.references is None:
            # A user may have had the last word.
            reference = [each for each in record.messages if each["role"] == "assistant"][-1]
        elif reference["role"] != "assistant":
            reference = None
        # As generate.py writes it: from the file's own name on.
        place = record.where.removeprefix(f"{folder}/")
        prompts.append(Prompt(record, place, messages, None, reference))
    if not settings.max_new_tokens:
        settings = settings._replace(max_new_tokens=longest_answer(tokenizer, references))
    origin = origin_of(model, target, args.quant, dtype)
    with file:
        answer_into_file(model, tokenizer, prompts, settings, file, batch_size, origin)
    saved = read_saved(file.out, args.what)
    return answers_of_saved(saved, references_by_record(saved, records, file.out))


# ---- scored again ----


def score_saved(args: argparse.Namespace) -> dict[str, Answers]:
    """Returns the answers of each file of --answers, with the references of --data, where it is
    given, else those that it holds.

    Raises UserError where a file answers other questions than --data has, or than the first file, or
    where it has no references.
    """
    files = [read_saved(Path(name), args.what) for name in args.answers]
    first = files[0]
    for other in files[1:]:
        if (other.keys, other.questions) != (first.keys, first.questions):
            raise UserError(
                f"--answers {other.path}: answers other questions than {first.path}; files are compared"
                " answer by answer"
            )
    records = None
    if args.data is not None:
        map_fn = Map(args.map) if args.map else None
        records = read_questions(args, fetch_data(args.data, TEST), map_fn, args.system or "")
    result = {}
    for saved in files:
        if records is not None:
            references = references_by_record(saved, records, args.data)
        else:
            references = references_in_file(saved, args.what)
        result[name_of_file(saved.path, result)] = answers_of_saved(saved, references)
        print(
            f"answers   {saved.path}: {len(saved.texts):,} answers to {num_records(saved):,} records"
        )
    return result


def name_of_file(path: Path, named: Collection[str]) -> str:
    """Returns what a file of answers is called in a table. named: the names of the files before it."""
    name = path.name.removesuffix(path.suffix)
    return str(path) if name in named else name


def num_records(saved: SavedAnswers) -> int:
    """Returns how many records are answered."""
    return len({record for record, _ in saved.keys})


def answers_of_saved(saved: SavedAnswers, references: list[list[str]]) -> Answers:
    """Returns saved answers beside their references."""
    prompt_tokens = sum(saved.prompt_tokens) / len(saved.prompt_tokens)
    return Answers(saved.records, references, saved.texts, prompt_tokens, saved.num_cut)


def references_by_record(
    saved: SavedAnswers, records: list[Record], data: str | Path
) -> list[list[str]]:
    """Returns the references of the records that were answered. data: where they are from, for errors.

    Raises UserError where the answers are to other questions.
    """
    advice = (
        "give the --data, --limit, --seed and --turns that the answers were made with, or leave --data out"
        " to use the references that the answers hold (--limit of generate.py takes the first records, and"
        " that of evaluate.py draws)"
    )
    if num_records(saved) != len(records):
        raise UserError(
            f"{saved.path}: answers {num_records(saved):,} questions, and {data} has {len(records):,};"
            f" {advice}"
        )
    references = []
    for (number, _), question in zip(saved.keys, saved.questions, strict=True):
        if number > len(records):
            raise UserError(
                f"{saved.path}: answers record {number:,} of {len(records):,}; {advice}"
            )
        messages, accepted = question_of(records[number - 1])
        if spoken(messages) != question:
            raise UserError(
                f"{saved.path}: record {number:,} answers another question than"
                f" {records[number - 1].where}; {advice}"
            )
        references.append(accepted)
    return references


def references_in_file(saved: SavedAnswers, names: list[str]) -> list[list[str]]:
    """Returns the references that a file of answers holds. names: of the evaluations.

    Raises UserError where one is missing, or is none that an evaluation can use.
    """
    references = []
    for record in saved.records:
        if not record.references:
            raise UserError(
                f"{record.where}: has no reference to compare with; give the --data that the answers"
                " are to, with its references"
            )
        for name in names:
            if EVALUATIONS[name].check:
                imported(EVALUATIONS[name].check)(record.references, record.where)
        references.append(record.references)
    return references


def read_saved(path: Path, names: list[str]) -> SavedAnswers:
    """Reads a file of answers. names: of the evaluations, by which its references are read.

    Raises UserError naming the file, or the line that is no answer.
    """
    saved = SavedAnswers(path)
    lines = []
    try:
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if number == 1 and line.startswith(FIRST_LINE):
                raise unfinished(path)
            if line.strip():
                lines.append(saved_line(line, f"{path} line {number}"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file of answers is wanted") from None
    if not lines:
        raise UserError(f"{path}: holds no answers")
    lines.sort(key=lambda line: (line["record"], line.get("sample", 1)))
    for line in lines:
        key = (line["record"], line.get("sample", 1))
        if saved.keys and key == saved.keys[-1]:
            raise UserError(f"{line['where']}: record {key[0]} sample {key[1]} is answered twice")
        *messages, answer = line["messages"]
        references = references_of_line(line, TOOLS in names)
        saved.keys.append(key)
        saved.questions.append(spoken(messages))
        saved.texts.append(answer["content"])
        saved.prompt_tokens.append(line.get("prompt_tokens", 0))
        saved.num_cut += line.get("finish") == "length"
        # The question is shown with a wrong answer. The place of the reference is behind it.
        shown = [*messages, {"role": "assistant", "content": (references or [""])[0]}]
        saved.records.append(
            Record(shown, None, line["where"], line.get("tools"), references=references)
        )
    return saved


def unfinished(path: Path) -> UserError:
    """Returns the error for the partial file of a run that was stopped."""
    return UserError(
        f"{path}: holds the answers of an unfinished run; finish it by its own command"
    )


def saved_line(line: bytes, where: str) -> dict:
    """Returns a line of a file of answers as {"record", "messages", "where", ...}; a continued text is
    one message. Raises UserError if it is none."""
    problem = f"{where}: is no answer of `generate.py --data` or `evaluate.py --out`"
    try:
        value = json.loads(line)
        if "completion" in value:
            value["messages"] = [
                {"role": "user", "content": value["prompt"]},
                {"role": "assistant", "content": value["completion"]},
            ]
        *messages, answer = value["messages"]
        spoken(messages)
        good = answer["role"] == "assistant" and isinstance(answer["content"], str)
        good = good and isinstance(value["record"], int) and value["record"] > 0
        good = good and isinstance(value.get("sample", 1), int)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(problem) from None
    if not good:
        raise UserError(problem)
    return value | {"where": where}


def references_of_line(line: dict, about_tools: bool) -> list[str] | None:
    """Returns the references in a line of answers; None without any.

    about_tools: the calls of a reference are wanted, as JSON. Raises UserError where the reference is a
    tool call and must not be.
    """
    where = line["where"]
    references = line.get("references")
    calls = line.get("reference_tool_calls")
    if references is not None:
        is_list = isinstance(references, list) and bool(references)
        if not is_list or not all(isinstance(each, str) for each in references):
            raise UserError(f"{where}: references is no list of strings")
        if not about_tools or is_calls(references[0]):
            return references
    if about_tools:
        has_tools = bool(calls or line.get("tools"))
        return [calls_as_json(calls or [])] if has_tools else None
    if calls:
        raise UserError(f"{where}: its reference is a tool call, which `tools` compares")
    reference = line.get("reference")
    return [reference] if isinstance(reference, str) and reference.strip() else None


def spoken(messages: list[dict]) -> list[tuple]:
    """Returns what is said in a conversation, system messages aside, for comparison."""
    result = []
    for message in messages:
        if message["role"] != "system":
            calls = json.dumps(message.get("tool_calls") or [], sort_keys=True)
            result.append((message["role"], message.get("content") or "", calls))
    return result
