"""BFCL's single-turn files for Python (Patil et al. 2025): which calls their possible answers accept.

A possible answer names, for each wanted call, the accepted values of each parameter; "" among them
means that the parameter may be left out:

    [{"area": {"base": [10], "height": [5], "unit": ["cm", ""]}}]

A call is right if it has every required parameter and no unknown one, and each value is of the
parameter's type and among the accepted ones. Strings are compared without spaces, the punctuation
,./-_*^ and letter case; a whole number is taken for a float where one is wanted. Each wanted call
takes one of the answer's, in order, and there must be as many.

Files of several turns are scored in BFCL by running its simulated programs, which is not done here.
"""

import json
import re
from pathlib import Path

from common.errors import UserError
from dataset.readers import recognize
from dataset.records import Record

ANSWERS_FOLDER = "possible_answer"
SCHEMA_TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
IGNORED_CHARACTERS = re.compile(r"[ ,./\-_*^]")


# ---- the files ----


def add_possible_answers(records: list[Record], data: Path) -> None:
    """Gives BFCL's questions their references, from the file of the same name in the folder
    possible_answer beside theirs, and prints which file that is. Questions of the irrelevance
    category have none: there, no function fits, and the right answer calls nothing.

    Raises UserError where a question has no possible answer.
    """
    accepted: dict[object, str] = {}
    path = data.parent / ANSWERS_FOLDER / data.name
    if path.is_file():
        accepted = read_possible_answers(path)
        print(f"          possible answers: {path}")
    for record in records:
        if "irrelevance" in str(record.id):
            record.references = ["[]"]
        elif record.id in accepted:
            record.references = [accepted[record.id]]
        else:
            where = f"in {path}" if accepted else f", and there is no {path}"
            raise UserError(f"{record.where}: no possible answer for {record.id!r} {where}")


def read_possible_answers(path: Path) -> dict[object, str]:
    """Returns {id: the possible answer as JSON}. Raises UserError naming a line that is none."""
    accepted: dict[object, str] = {}
    container = recognize(path)
    for number, payload in container.payloads():
        where = container.place(number)
        value = container.value(number, payload)
        answer = value.get("ground_truth") if isinstance(value, dict) else None
        if not isinstance(answer, list) or not is_possible_answer(answer):
            raise UserError(
                f"{where}: no possible answer of BFCL's single-turn files for Python"
                ' ({"id", "ground_truth": [{function: {parameter: [values]}}]})'
            )
        accepted[value.get("id")] = json.dumps(answer, ensure_ascii=False)
    return accepted


def is_possible_answer(wanted: list) -> bool:
    """True if wanted calls are in BFCL's form, and not {"name", "arguments"}."""
    if not wanted:
        return False
    for call in wanted:
        if not isinstance(call, dict) or len(call) != 1:
            return False
        (parameters,) = call.values()
        if not isinstance(parameters, dict):
            return False
        if not all(isinstance(values, list) for values in parameters.values()):
            return False
    return True


# ---- the check ----


def accepts_calls(calls: list, wanted: list[dict], tools: list[dict]) -> bool:
    """True if an answer's calls are those of a possible answer.

    calls: each with its name and arguments. tools: the schemas of the functions, by whose types the
    values are checked.
    """
    if len(calls) != len(wanted):
        return False
    schemas = {tool["function"]["name"]: tool["function"] for tool in tools}
    waiting = list(calls)
    for call in wanted:
        ((name, accepted),) = call.items()
        parameters = schemas.get(name, {}).get("parameters") or {}
        for given in waiting:
            if given.name == name and accepts_arguments(given.arguments, accepted, parameters):
                waiting.remove(given)
                break
        else:
            return False
    return True


def accepts_arguments(arguments: dict, accepted: dict, parameters: dict) -> bool:
    """True if the arguments of a call are accepted. parameters: the schema of them."""
    properties = parameters.get("properties") or {}
    if any(name not in arguments for name in parameters.get("required") or ()):
        return False
    for name, value in arguments.items():
        if name not in properties or name not in accepted:
            return False
        if not accepts_value(value, accepted[name], properties[name]):
            return False
    return all(name in arguments or "" in values for name, values in accepted.items())


def accepts_value(value: object, accepted: list, schema: dict) -> bool:
    """True if the value of a parameter is accepted. schema: of the parameter."""
    if isinstance(value, tuple):
        value = list(value)
    wanted_type = SCHEMA_TYPES.get(schema.get("type"))
    if wanted_type is float and type(value) is int:
        value = float(value)
    accepted_type = type_of_accepted(accepted)
    # Where accepted values are of another type, they stand for a variable, and only equality counts.
    is_variable = accepted_type is not None and accepted_type is not wanted_type
    inner_type = None
    if wanted_type is list:
        inner_type = SCHEMA_TYPES.get((schema.get("items") or {}).get("type"))
    if type(value) is not wanted_type:
        if accepted_type is None or type(value) is not accepted_type:
            return False
        is_variable = True
    elif inner_type is not None and not has_inner_types(value, accepted, inner_type):
        return False
    if is_variable:
        return value in accepted
    if isinstance(value, dict):
        objects = [each for each in accepted if isinstance(each, dict)]
        return any(accepts_object(value, each) for each in objects)
    if isinstance(value, str):
        return plain(value) in [plain(each) for each in accepted if isinstance(each, str)]
    if isinstance(value, list) and inner_type is dict:
        return any(accepts_objects(value, each) for each in accepted)
    if isinstance(value, list):
        # Of a value that may be left out, "" is in the place of a list without elements.
        lists = [each for each in accepted if isinstance(each, list) or each == ""]
        return [*map(plain, value)] in [[*map(plain, each)] for each in lists]
    return value in accepted


def type_of_accepted(accepted: list) -> type | None:
    """Returns the type of the first accepted value; None if only leaving it out is accepted."""
    for each in accepted:
        if each != "":
            return type(each)
    return None


def has_inner_types(values: list, accepted: list, inner_type: type) -> bool:
    """True if the elements of a list are of the type that the schema wants, or, for some accepted
    list, of that list's."""
    for each in accepted:
        if not isinstance(each, list):
            return True
        allowed = (inner_type, type_of_accepted(each))
        if all(type(value) in allowed for value in values):
            return True
    return False


def accepts_objects(values: list, accepted: list) -> bool:
    """True if the objects of a list are accepted, in order."""
    if len(values) != len(accepted):
        return False
    pairs = zip(values, accepted, strict=True)
    return all(isinstance(value, dict) and accepts_object(value, each) for value, each in pairs)


def accepts_object(value: dict, accepted: dict) -> bool:
    """True if an object has accepted values at all its keys, and all keys that can't be left out."""
    for key, inner in value.items():
        if key not in accepted or plain(inner) not in [plain(each) for each in accepted[key]]:
            return False
    return all(key in value or "" in inner for key, inner in accepted.items())


def plain(value: object) -> object:
    """Returns a string without what is not compared; another value as it is."""
    if not isinstance(value, str):
        return value
    return IGNORED_CHARACTERS.sub("", value).lower().replace("'", '"')
