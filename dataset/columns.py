"""Columns of a record beside those of its format: other names for a system message, and words that
are not read although the answers may rest on them."""

from common.errors import UserError
from dataset.messages import quote_names

# The names that data sets have for a system message beside a question and an answer.
SYSTEM_NAMES = frozenset(
    ("system_prompt", "system_message", "system_instruction", "sys_prompt", "systemprompt")
)


def with_system_column(record: dict, where: str) -> dict:
    """Returns a record whose system message stands at "system", whatever its column was called.

    Raises UserError if two columns hold different ones, or if one holds no text.
    """
    result = {key: value for key, value in record.items() if key not in SYSTEM_NAMES}
    for key in SYSTEM_NAMES.intersection(record):
        system = record[key]
        if system is None or system == "":
            continue
        if not isinstance(system, str):
            raise UserError(f"{where}: {key} is no string, a system message is wanted")
        if result.get("system") not in (None, "", system):
            raise UserError(f"{where}: {key} and another column hold different system messages")
        result["system"] = system
    return result


def ignored_facts(stats) -> str:
    """Returns a warning about keys that are ignored although they hold words that an answer may rest
    on; "" without any. stats: the `ReadStats` of all records."""
    if not stats.facts:
        return ""
    return (
        f"{quote_names(stats.facts)} held text that is not read; if the answers rest on it, call it context"
        " (beside question and answer) or input (beside instruction and output), or join it to the"
        " question by --map"
    )
