"""Programming problems with tests: HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021).

    {"task_id", "prompt", "entry_point", "test", "canonical_solution"}             HumanEval
    {"task_id", "text", "test_list", "code", "test_setup_code", ...}               MBPP
    {"task_id", "prompt", "test_list", "code", "test_imports", ...}                MBPP, sanitized

A row of CODE_FORMATS says how each is read, asked, and made into a program. A model is asked through its
chat template, and its code is taken out of the answer; or it continues a text, up to a stop sequence.
"""

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from dataset.folders import TEST, Fetched
from dataset.formats import local_listing
from dataset.readers import recognize

# What Austin et al. test, and the tasks that they put before each question.
MBPP_TESTED = range(11, 511)
MBPP_SHOTS = (2, 3, 4)
# A fence may be indented, as in a numbered list.
CODE_BLOCK = re.compile(r"^([ \t]*)```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass
class Problem:
    """One problem.

    id: the file's own name of it, its task_id.
    place: where it stands, for messages.
    prompt: what is asked: the beginning of a program (HumanEval), or words (MBPP).
    entry_point: the name of the function that is wanted; "" where the file does not say.
    setup: code that stands between an answer and the tests.
    tests: statements that raise an exception unless the answer is right.
    solution: the file's own.
    """

    id: str | int
    place: str
    prompt: str
    entry_point: str
    setup: str
    tests: list[str]
    solution: str


class CodeFormat(NamedTuple):
    """A format of problems.

    keys: a record that has all of these is one.
    read: from a record and its place to a Problem.
    messages: from a problem and the shots to a conversation that asks for it.
    text: the same, for a model that continues texts.
    stops: where a continuation ends: it is cut at the first of these.
    program: from a problem and code to a program that ends well if the code is right. Its last
        argument is True for a continuation.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[dict, str], Problem]
    messages: Callable[[Problem, list[Problem]], list[dict]]
    text: Callable[[Problem, list[Problem]], str]
    stops: tuple[str, ...]
    program: Callable[[Problem, str, bool], str]


class Problems(NamedTuple):
    """The problems of a file.

    shots: solved ones that are put before each question.
    note: what was read and what was left out, for people.
    """

    format: CodeFormat
    problems: list[Problem]
    shots: list[Problem]
    note: str


# ---- reading a file ----


def read_problems(data: str | Path | Fetched) -> Problems:
    """Reads the problems of a file, in any container that train.py reads.

    data: what --data names, fetched.
    Raises UserError that names the record where it is of no known format, lacks a key, or has a
    task_id that occurred before; or where there is no problem at all.
    """
    if isinstance(data, Fetched):
        files = data.files()
    else:
        files = local_listing(Path(data), TEST).paths
    format = None
    problems: dict[str, Problem] = {}
    for file in files:
        container = recognize(file)
        for number, payload in container.payloads():
            place = container.place(number)
            record = container.value(number, payload)
            if not isinstance(record, dict):
                raise UserError(f"{place}: is not an object with the keys of a problem")
            format = format or format_of(record, place)
            problem = format.read(record, place)
            if str(problem.id) in problems:
                raise UserError(f"{place}: task_id {problem.id} occurs twice in the file")
            problems[str(problem.id)] = problem
    if format is None:
        raise UserError(f"{data}: holds no problem")
    return choose_problems(format, list(problems.values()), data)


def format_of(record: dict, place: str) -> CodeFormat:
    """Returns the format of a record. Raises UserError if it is none of CODE_FORMATS."""
    for format in CODE_FORMATS:
        if all(key in record for key in format.keys):
            return format
    wanted = "; or ".join(f"{', '.join(format.keys)} ({format.name})" for format in CODE_FORMATS)
    there = ", ".join(str(key) for key in list(record)[:12])
    raise UserError(f"{place}: is no problem with tests; its keys are {there}; wanted: {wanted}")


def choose_problems(
    format: CodeFormat, problems: list[Problem], data: str | Path | Fetched
) -> Problems:
    """Returns the problems that are tested. Of MBPP, those that its paper tests, if the file has
    them, and its three shots."""
    note = f"{data}: {len(problems):,} problems of {format.name}"
    if format is not MBPP:
        return Problems(format, problems, [], note)
    shots = [each for each in problems if each.id in MBPP_SHOTS]
    tested = [each for each in problems if each.id in MBPP_TESTED]
    span = f"task_id {MBPP_TESTED[0]} to {MBPP_TESTED[-1]}"
    if tested:
        note += f", of which {len(tested):,} are for tests ({span})"
    else:
        tested = [each for each in problems if each not in shots]
        note += f", none of them of the part for tests ({span}): all are asked"
    if not tested:
        raise UserError(f"{data}: holds the examples before the question alone (2, 3, 4)")
    if len(shots) < len(MBPP_SHOTS):
        shots = []
        note += "; tasks 2, 3 and 4, the paper's examples, are missing: asked without any"
    else:
        note += "; tasks 2, 3 and 4 stand before each as examples"
    return Problems(format, tested, shots, note)


def text_at(record: dict, key: str, place: str) -> str:
    """Returns the text at a key. Raises UserError if there is none."""
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{place}: {key} is {type(value).__name__}, a text is wanted")
    return value.replace("\r\n", "\n")


def texts_at(record: dict, key: str, place: str) -> list[str]:
    """Returns the list of texts at a key. Raises UserError if it is none."""
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UserError(f"{place}: {key} is no list of texts")
    return [each.replace("\r\n", "\n") for each in value]


def id_at(record: dict, place: str) -> str | int:
    """Returns the task_id. Raises UserError if there is none."""
    value = record.get("task_id")
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UserError(f"{place}: task_id is {type(value).__name__}, a text or number is wanted")
    return value


def read_humaneval(record: dict, place: str) -> Problem:
    """Reads a record of HumanEval."""
    entry_point = text_at(record, "entry_point", place)
    # It becomes code.
    if not entry_point.isidentifier():
        raise UserError(f"{place}: entry_point is not the name of a function")
    tests = [text_at(record, "test", place), f"check({entry_point})"]
    solution = ""
    if "canonical_solution" in record:
        solution = text_at(record, "canonical_solution", place)
    prompt = text_at(record, "prompt", place)
    return Problem(id_at(record, place), place, prompt, entry_point, "", tests, solution)


def read_mbpp(record: dict, place: str) -> Problem:
    """Reads a record of MBPP. Its challenge_test_list is not used, as in its paper's numbers."""
    prompt = text_at(record, "text" if "text" in record else "prompt", place)
    setup = ""
    if "test_setup_code" in record:
        setup = text_at(record, "test_setup_code", place)
    elif "test_imports" in record:
        setup = "\n".join(texts_at(record, "test_imports", place))
    tests = texts_at(record, "test_list", place)
    if not tests:
        raise UserError(f"{place}: test_list is empty, so that any program would pass")
    solution = text_at(record, "code", place)
    return Problem(id_at(record, place), place, prompt.strip(), "", setup, tests, solution)


# ---- asking ----


def code_block(code: str) -> str:
    """Returns code as a block of Markdown."""
    return f"```python\n{code.strip(chr(10))}\n```"


def humaneval_messages(problem: Problem, shots: list[Problem]) -> list[dict]:
    """Asks for a whole function, of which the beginning is there."""
    question = "Complete this Python function. Answer with the whole function in one code block."
    return [{"role": "user", "content": f"{question}\n\n{code_block(problem.prompt)}"}]


def humaneval_text(problem: Problem, shots: list[Problem]) -> str:
    """Returns the beginning of the program, without the line end, which most tokenizers have in one
    token with the indentation behind it: no model has seen them apart."""
    return problem.prompt.rstrip("\n")


def mbpp_task(problem: Problem) -> str:
    """Returns the words of Austin et al. 2021, section 3."""
    tests = "\n".join(problem.tests)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.prompt}"
        f" Your code should pass these tests:\n\n{tests}\n"
    )


def mbpp_messages(problem: Problem, shots: list[Problem]) -> list[dict]:
    """Asks as Austin et al. do, with the shots as the conversation so far."""
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": mbpp_task(shot)})
        messages.append({"role": "assistant", "content": code_block(shot.solution)})
    return [*messages, {"role": "user", "content": mbpp_task(problem)}]


def mbpp_text(problem: Problem, shots: list[Problem]) -> str:
    """Asks as Austin et al. do, in one text."""
    text = ""
    for shot in shots:
        text += f"{mbpp_task(shot)}[BEGIN]\n{shot.solution}\n[DONE]\n\n"
    return f"{text}{mbpp_task(problem)}[BEGIN]\n"


# ---- from an answer to a program ----


def cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """Returns the text up to the first of the stop sequences."""
    ends = [text.find(stop) for stop in stops]
    return text[: min([end for end in ends if end >= 0], default=len(text))]


def code_of_answer(answer: str, entry_point: str) -> str:
    """Returns the code of a chat's answer: its first code block, or the first one that defines the
    function; of a block that was cut off what is there. An answer without one is all code.

    entry_point: the function's name; "" if it is not known.
    """
    blocks = []
    for indent, block in CODE_BLOCK.findall(answer):
        # What the block's fence is indented by does not belong to the code.
        blocks.append(re.sub(rf"^{indent}", "", block, flags=re.MULTILINE))
    if not blocks:
        return answer
    if entry_point:
        for block in blocks:
            if defines(block, entry_point):
                return block
    return blocks[0]


def defines(code: str, name: str) -> bool:
    """True if code defines a function of that name, in the first column."""
    return re.search(rf"^(async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None


def humaneval_program(problem: Problem, code: str, is_continuation: bool) -> str:
    """Returns a program that tests code. What stands in the prompt before the function (imports,
    other functions) belongs to it, also where the code repeats the function itself."""
    if is_continuation or not defines(code, problem.entry_point):
        code = problem.prompt + code
    else:
        code = whole_prompt(problem.prompt) + "\n" + code
    return "\n".join([code, *problem.tests, ""])


def whole_prompt(prompt: str) -> str:
    """Returns the beginning of a program so that it is a program itself; "" if that can't be."""
    for rest in ("", "    pass\n"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(prompt + rest)
        except (SyntaxError, ValueError):
            continue
        return prompt + rest
    return ""


def mbpp_program(problem: Problem, code: str, is_continuation: bool) -> str:
    """Returns a program that tests code."""
    return "\n".join([code, problem.setup, *problem.tests, ""])


HUMANEVAL = CodeFormat(
    "HumanEval",
    ("task_id", "prompt", "entry_point", "test"),
    read_humaneval,
    humaneval_messages,
    humaneval_text,
    # Chen et al. 2021, section 2.
    ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    humaneval_program,
)
MBPP = CodeFormat(
    "MBPP",
    ("task_id", "code", "test_list"),
    read_mbpp,
    mbpp_messages,
    mbpp_text,
    ("[DONE]",),
    mbpp_program,
)
CODE_FORMATS = (HUMANEVAL, MBPP)
