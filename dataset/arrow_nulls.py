"""Takes the nulls out of tools and tool calls that Arrow wrote and no person did.

A column of Parquet or Arrow has one type. So in a file of several tools each call has the arguments
of all of them, and each schema the parameters of all of them; what a record did not have is null.
Trained as they stand, such nulls would teach the model arguments that its tools do not have. The
library `datasets` writes them into JSON as well.

A null is taken out where it can't be a value: in a schema, and in a call where the tool has no such
argument or does not allow null for it. Where it may be one (the tool allows null for an argument
that may also be left out, or has no schema), the record is refused if it comes from an Arrow file,
and left as it stands if it comes from JSON, whose writer wrote what he meant.
"""

from common.errors import UserError
from dataset.messages import WrittenObject

# Keys of a JSON schema behind which an object's properties may be.
REFERENCES = frozenset(("$ref", "anyOf", "oneOf", "allOf"))
# Keys of a JSON schema that hold values and no schemas. In them null means null.
VALUES_OF_SCHEMA = ("default", "const", "enum", "examples", "example")


def clean_tools(tools: list[dict], from_arrow: bool) -> list[dict]:
    """Returns the tools without nulls that Arrow filled in.

    tools: as `Record` has them.
    from_arrow: whether they come from a Parquet or Arrow file.
    """
    clean = []
    for tool in tools:
        filled_in = from_arrow and not isinstance(tool, WrittenObject)
        clean.append(without_nulls(tool, filled_in))
    return clean


def clean_calls(
    messages: list[dict], tools: list[dict] | None, from_arrow: bool, where: str
) -> list[dict]:
    """Returns the messages with calls whose arguments have no nulls that Arrow filled in.

    tools: those that can be called, as `clean_tools` returns them.
    Raises UserError that names an argument whose null may be either.
    """
    clean = []
    for message in messages:
        calls = message.get("tool_calls", ())
        if any(holds_null(call["function"]["arguments"]) for call in calls):
            calls = [clean_call(call, tools or [], from_arrow, where) for call in calls]
            message = message | {"tool_calls": calls}
        clean.append(message)
    return clean


def clean_call(call: dict, tools: list[dict], from_arrow: bool, where: str) -> dict:
    """Returns a tool call as `clean_calls` does."""
    function = call["function"]
    name = function["name"]
    arguments = function["arguments"]
    schema = None
    for tool in tools:
        if tool["function"].get("name") == name:
            # A function without a schema has no arguments.
            schema = parameters_of(tool["function"]) or {}
    filled_in = from_arrow and not isinstance(arguments, WrittenObject)
    place = f"{where}: arguments of {name[:40]}"
    arguments = clean_arguments(arguments, schema, filled_in, place)
    return call | {"function": function | {"arguments": arguments}}


def holds_null(value: object) -> bool:
    """True if a value of JSON is null, or holds one."""
    if isinstance(value, dict):
        return any(holds_null(each) for each in value.values())
    if isinstance(value, list):
        return any(holds_null(each) for each in value)
    return value is None


def parameters_of(function: dict) -> dict | None:
    """Returns the schema of a function's arguments, None if it has none."""
    for key in ("parameters", "input_schema"):
        schema = function.get(key)
        if isinstance(schema, dict):
            return schema
    return None


def without_nulls(schema: object, from_arrow: bool, names_properties: bool = False) -> object:
    """Returns a part of a tool's schema without nulls in the place of a key that is not there.

    from_arrow: False keeps nulls but those in the place of a property's schema.
    names_properties: whether the keys of the object are names of properties.
    """
    if isinstance(schema, list):
        return [without_nulls(each, from_arrow) for each in schema]
    if not isinstance(schema, dict):
        return schema
    clean = {}
    for key, value in schema.items():
        if value is None and (from_arrow or names_properties):
            continue
        if not names_properties and key in VALUES_OF_SCHEMA:
            clean[key] = value
        else:
            clean[key] = without_nulls(value, from_arrow, key == "properties")
    return clean


def clean_arguments(value: object, schema: object, from_arrow: bool, place: str) -> object:
    """Returns the arguments of a call, or a value in them, without nulls that Arrow filled in.

    schema: of the value; None if it is not known.
    place: the record and the function, for errors.
    """
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [clean_arguments(each, items, from_arrow, place) for each in value]
    if not isinstance(value, dict):
        return value
    properties = None
    required: object = ()
    is_open = False
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        properties = schema["properties"]
        required = schema.get("required") or ()
        is_open = bool(schema.get("additionalProperties"))
    elif isinstance(schema, dict) and from_arrow and not REFERENCES.intersection(schema):
        # An object that names no arguments has none that could be null.
        properties = {}
        is_open = bool(schema.get("additionalProperties"))
    clean = {}
    for key, each in value.items():
        if each is not None:
            inner = properties.get(key) if properties is not None else None
            clean[key] = clean_arguments(each, inner, from_arrow, place)
            continue
        is_unknown = properties is not None and key not in properties and not is_open
        if is_unknown:
            continue
        nullable = True
        if properties is not None and key in properties:
            nullable = allows_null(properties[key])
        is_required = isinstance(required, (list, tuple)) and key in required
        if from_arrow and not nullable and not is_required:
            continue
        if from_arrow and not (nullable and is_required):
            raise UserError(
                f"{place}: {key[:40]!r} is null, and in a Parquet or Arrow file that can't be told"
                " from an argument that was not given; store tools and tool calls as JSON in"
                " strings, or take the nulls out with --map"
            )
        clean[key] = each
    return clean


def allows_null(schema: object) -> bool:
    """True if null is a value of this schema, or if it can't be known."""
    if not isinstance(schema, dict):
        return True
    if schema.get("nullable") is True:
        return True
    kind = schema.get("type")
    if isinstance(kind, str):
        return kind == "null"
    if isinstance(kind, list):
        return "null" in kind
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    return True
