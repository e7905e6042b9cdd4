"""pass@k: the probability that at least one of k programs that a model writes passes the tests.

With n programs for a problem, of which c pass, an estimate without bias is

    pass@k = 1 - C(n - c, k) / C(n, k)                    (Chen et al. 2021, equation 1)

and the table has its mean over the problems. The programs run in evals/sandbox.py, as many at a time
as there are cores.
"""

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.console import number_of
from common.errors import UserError, printable
from common.progress import progress
from dataset.folders import Fetched
from dataset.prompts import Prompt
from dataset.readers import recognize
from dataset.records import Record
from evals.answer_file import AnswerFile
from evals.answers import note_of_cut_answers
from evals.batch_answers import answer_into_file, answer_prompts, encode_prompts
from evals.code_arguments import CODE_TOKENS
from evals.code_problems import Problem, Problems, code_of_answer, cut_at_stop, read_problems
from evals.intervals import wilson_interval
from evals.questions import drawn
from evals.sandbox import ENDS, PASSED, Limits, Outcome, run_programs, sandbox_refusal
from evals.saved_answers import name_of_file, origin_of, settings_of, unfinished
from evals.scores import ItemScores
from evals.targets import Target
from model import Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class CodeAnswer:
    """An answer to a problem.

    is_continuation: the text goes on where the prompt ends; else it is a chat's answer.
    is_ours: generated here, so that it ends where it would go on to something else. Another program's is
        run as it is: its own rules have ended it.
    is_cut: it was cut off at the most tokens that an answer may have.
    """

    text: str
    is_continuation: bool
    is_cut: bool = False
    is_ours: bool = True


@dataclass
class TestedPrograms:
    """The programs that a model has written, and what became of each.

    answers, programs, outcomes: for each problem, a list with an entry for each answer to it.
    """

    problems: list[Problem]
    answers: list[list[CodeAnswer]]
    programs: list[list[str]]
    outcomes: list[list[Outcome]]

    @property
    def num_passed(self) -> list[int]:
        """For each problem, how many of its programs pass."""
        counts = []
        for outcomes in self.outcomes:
            counts.append(sum(outcome.end == PASSED for outcome in outcomes))
        return counts

    def misses(self) -> list[tuple[Problem, CodeAnswer, Outcome]]:
        """Returns the answers whose program does not pass, with what became of it."""
        misses = []
        for problem, answers, outcomes in zip(
            self.problems, self.answers, self.outcomes, strict=True
        ):
            for answer, outcome in zip(answers, outcomes, strict=True):
                if outcome.end != PASSED:
                    misses.append((problem, answer, outcome))
        return misses


# ---- the estimate ----


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k for a problem with n programs, of which c pass.

    k: at most n.
    """
    assert 0 <= c <= n and 0 < k <= n
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_scores(tested: TestedPrograms, ks: Sequence[int]) -> ItemScores:
    """Returns pass@k in percent for each k, its number for each problem, and in the notes the 95 %
    intervals over the problems and what became of the programs."""
    items = {}
    columns: dict[str, float] = {"problems": len(tested.problems)}
    formats = {"problems": ",.0f"}
    notes = []
    counts = tested.num_passed
    for k in ks:
        numbers = []
        for outcomes, c in zip(tested.outcomes, counts, strict=True):
            numbers.append(pass_at_k(len(outcomes), c, k))
        mean = sum(numbers) / len(numbers)
        name = f"pass@{k}"
        items[name] = numbers
        columns[f"{name} %"] = 100 * mean
        formats[f"{name} %"] = ".1f"
        low, high = wilson_interval(sum(numbers), len(numbers))
        notes.append(
            f"{name} {100 * mean:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} % over"
            f" {number_of(len(numbers), 'problem')}"
        )
    ends = Counter(outcome.end for outcomes in tested.outcomes for outcome in outcomes)
    listed = ", ".join(f"{ends[end]:,} {end}" for end in ENDS if ends[end])
    notes.append(f"{number_of(ends.total(), 'program')}: {listed}")
    num_cut = sum(answer.is_cut for answers in tested.answers for answer in answers)
    if num_cut:
        notes.append(note_of_cut_answers(num_cut, ends.total()))
    return ItemScores(items, columns, formats, notes)


# ---- the programs are run ----


def refuse_without_sandbox() -> None:
    """Raises UserError with the reason, if this machine can't run programs safely."""
    reason = sandbox_refusal()
    if reason is not None:
        raise UserError(f"no program is run: {reason}")


def limits_of(args: argparse.Namespace) -> Limits:
    """Returns the limits of each program."""
    return Limits(seconds=args.time_limit, memory=args.memory_limit << 20)


def check_programs(
    asked: Problems, answers: list[list[CodeAnswer]], limits: Limits, name: str
) -> TestedPrograms:
    """Makes a program of each answer, runs it with its tests, and returns what became of them.

    name: of what has written them, for the progress bar.
    """
    programs = []
    for problem, texts in zip(asked.problems, answers, strict=True):
        programs.append([program_of(asked, problem, answer) for answer in texts])
    # Samples are often the same.
    different = list(dict.fromkeys(program for several in programs for program in several))
    outcomes: dict[str, Outcome] = {}
    num_passed = 0
    bar = progress(f"testing {name}", len(different), "program")
    with bar:
        for number, outcome in run_programs(different, limits):
            outcomes[different[number]] = outcome
            num_passed += outcome.end == PASSED
            bar.set_postfix_str(f"{num_passed:,} passed", refresh=False)
            bar.update(1)
    ends = [[outcomes[program] for program in several] for several in programs]
    return TestedPrograms(asked.problems, answers, programs, ends)


def program_of(asked: Problems, problem: Problem, answer: CodeAnswer) -> str:
    """Returns the program that tests an answer."""
    if answer.is_continuation:
        stops = asked.format.stops
        if not answer.is_ours:
            # What is no code, as MBPP's [DONE], ends any program.
            stops = tuple(stop for stop in stops if not stop.startswith("\n"))
        code = cut_at_stop(answer.text, stops)
    else:
        code = code_of_answer(answer.text, problem.entry_point)
    return asked.format.program(problem, code, answer.is_continuation)


# ---- the problems ----


def read_asked(args: argparse.Namespace, file: str | Path | Fetched) -> Problems:
    """Reads the problems, of which --limit are drawn by --seed, and prints what was read.

    file: what --data names, fetched.
    """
    asked = read_problems(file)
    print(f"data      {asked.note}")
    return draw_problems(asked, args.limit, args.seed)


def draw_problems(asked: Problems, limit: int | None, seed: int) -> Problems:
    """Returns the problems with `limit` of them (None: all), drawn by the seed, in the order of the
    file, and prints that they are."""
    if limit is None or limit >= len(asked.problems):
        return asked
    records = []
    for problem in asked.problems:
        message = {"role": "user", "content": problem.prompt}
        records.append(Record([message], None, problem.place, id=problem.id))
    chosen = {record.id for record in drawn(records, limit, seed)}
    return asked._replace(problems=[each for each in asked.problems if each.id in chosen])


# ---- the model answers ----


def code_prompts(asked: Problems, is_complete: bool, system: str) -> list[Prompt]:
    """Returns the prompts of the problems.

    is_complete: texts to continue, else conversations. system: their system message, or "".
    """
    prompts = []
    for problem in asked.problems:
        messages = text = None
        if is_complete:
            text = asked.format.text(problem, asked.shots)
        else:
            messages = asked.format.messages(problem, asked.shots)
            if system:
                messages.insert(0, {"role": "system", "content": system})
        record = Record(messages, text, problem.place, id=problem.id)
        reference = None
        if problem.solution:
            reference = {"role": "assistant", "content": problem.solution}
        prompts.append(Prompt(record, problem.place, messages, text, reference))
    return prompts


def write_programs(
    model: Transformer,
    tokenizer: Tokenizer,
    asked: Problems,
    args: argparse.Namespace,
    target: Target,
    file: AnswerFile | None,
    batch_size: int,
) -> list[list[CodeAnswer]]:
    """Lets a model answer each problem --samples times.

    target: what the model was loaded from. file: gets the answers, and may have some of them
        already; None: they are not kept.
    Returns the answers to each problem.
    """
    prompts = code_prompts(asked, args.complete, tokenizer.system)
    settings = settings_of(args)
    settings = settings._replace(max_new_tokens=settings.max_new_tokens or CODE_TOKENS)
    stops = asked.format.stops if args.complete else ()
    if file is not None:
        origin = origin_of(model, target, args.quant, str(model.dtype).removeprefix("torch."))
        with file:
            answer_into_file(model, tokenizer, prompts, settings, file, batch_size, origin, stops)
        return read_code_answers(file.out, asked)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.jsonl"
        with AnswerFile(out, overwrite=False) as temporary:
            encoded = encode_prompts(model, tokenizer, prompts)
            temporary.begin(settings._asdict() | {"batch_size": batch_size}, None)
            answer_prompts(
                model, tokenizer, prompts, encoded, settings, temporary, batch_size, stops
            )
            temporary.finish()
        return read_code_answers(out, asked)


# ---- answers that are there ----


def score_code_answers(
    names: list[str], asked: Problems, k: int
) -> dict[str, list[list[CodeAnswer]]]:
    """Returns the answers of each file of --answers to each problem, by what the file is called.

    Raises UserError as read_code_answers does, or where a problem has fewer than k answers.
    """
    result: dict[str, list[list[CodeAnswer]]] = {}
    for name in names:
        answers = read_code_answers(Path(name), asked)
        check_counts(answers, asked, k, name)
        result[name_of_file(Path(name), result)] = answers
        count = sum(map(len, answers))
        print(f"answers   {name}: {count:,} answers to {len(answers):,} problems")
    return result


def read_code_answers(file: Path, asked: Problems) -> list[list[CodeAnswer]]:
    """Returns the answers to each problem that stand in a file.

    A line has the problem's name as "id" or "task_id", and a chat's answer as the last of its
    "messages", or a continuation of the prompt as "completion".
    Raises UserError that names the line, where it has not these or answers no problem of the file;
    or the first problem without an answer.
    """
    answers: dict[str, list[CodeAnswer]] = {str(problem.id): [] for problem in asked.problems}
    container = recognize(file)
    keys = set()
    for number, payload in container.payloads():
        place = container.place(number)
        line = container.value(number, payload)
        name = None
        if isinstance(line, dict):
            if list(line) == ["settings"]:
                raise unfinished(file)
            name = line.get("id", line.get("task_id"))
        if name is None:
            raise UserError(f'{place}: names no problem; "id" or "task_id" is wanted')
        if str(name) not in answers:
            raise UserError(
                f"{place}: answers {printable(str(name)[:60])}, which is no problem of --data; give"
                " the file that was answered, and the same --limit and --seed"
            )
        # A line of human-eval's has no number, and a problem may be answered by equal lines.
        if "record" in line:
            key = f"record {line['record']} sample {line.get('sample', 1)}"
            if key in keys:
                raise UserError(f"{place}: {key} is answered twice")
            keys.add(key)
        answers[str(name)].append(answer_in(line, place))
    missing = [name for name, several in answers.items() if not several]
    if missing:
        raise UserError(
            f"{file}: has no answer to {missing[0]}, and to {len(missing):,} of {len(answers):,}"
            " problems; answer all of them, or give the same --limit and --seed"
        )
    return list(answers.values())


def answer_in(line: dict, place: str) -> CodeAnswer:
    """Returns the answer of a line. Raises UserError if it has none."""
    is_cut = line.get("finish") == "length"
    if isinstance(line.get("completion"), str):
        return CodeAnswer(line["completion"], True, is_cut, is_ours="record" in line)
    messages = line.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        content = messages[-1].get("content")
        if messages[-1].get("role") == "assistant" and isinstance(content, str):
            return CodeAnswer(content, False, is_cut)
    raise UserError(
        f'{place}: has no answer; a text as "completion" is wanted, or "messages" that end with one'
        " of the assistant"
    )


def check_counts(answers: list[list[CodeAnswer]], asked: Problems, k: int, file: str) -> None:
    """Raises UserError where a problem has fewer than k answers."""
    for problem, several in zip(asked.problems, answers, strict=True):
        if len(several) < k:
            raise UserError(
                f"--k {k}: {file} has {len(several)} answers to {problem.id}, and {k} are needed"
            )
