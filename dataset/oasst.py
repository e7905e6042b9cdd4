"""Reads the trees of OpenAssistant (Koepf et al. 2023): a prompt at the root, and ranked replies
below each message.

A tree is one nested object, {"message_tree_id", "prompt": {"role", "text", "replies": [...]}}, or
several objects one after another, {"message_id", "parent_id", "role", "text"}, as in the released
flat files. A path from the root to a message without replies is a conversation. `--trees` decides
which paths are trained: only that of the best-ranked replies, or all. An answer that several paths
share is trained in the first of them.

A path ends with an answer. Deleted messages, and all messages below them, are left out.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby

from common.errors import UserError
from dataset.messages import quote_names, require_field, require_object, type_name
from dataset.readers import Container
from dataset.records import Format, Reading, Record

# The values of --trees: the path of best-ranked replies, or every path.
TREES = ("best", "all")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
MAX_PATH = 1000  # messages of a path
# A key that no file has: under it a message of a flat file keeps its place, for errors.
WHERE = "\0where"


def oasst_tree(reading: Reading) -> list[Record]:
    """Reads a nested tree. Returns a record for each path with an answer of its own, in the order
    of their ranks."""
    root = require_object(reading.record["prompt"], reading.where)
    if root.get("deleted") is True:
        reading.stats.dropped["a deleted prompt"] += 1
        return []
    records = []
    trained_nodes = set()  # the answers of earlier paths, as id() of their objects
    for path in _paths(root, reading):
        messages = []
        weights = []
        for node in path:
            is_trained_already = id(node) in trained_nodes
            messages.append(_message(node, reading))
            weights.append(0.0 if is_trained_already else 1.0)
        # Nothing is learned from a prompt that nobody has answered.
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
            weights.pop()

        num_new_answers = 0
        for node, message, weight in zip(path, messages, weights):
            if message["role"] == "assistant" and weight:
                num_new_answers += 1
                trained_nodes.add(id(node))
        if num_new_answers:
            records += reading.conversation(messages, weights)
        elif messages:
            reading.stats.dropped["a path without an answer of its own"] += 1
        else:
            reading.stats.dropped["a path without an answer"] += 1
    return records


def _paths(root: dict, reading: Reading) -> list[tuple[dict, ...]]:
    """Returns the paths from the root to messages without replies; with --trees best only the
    best-ranked one."""
    paths = []
    # A stack and no recursion, since a file may nest its replies deeper than Python calls.
    stack: list[tuple[dict, tuple[dict, ...]]] = [(root, ())]
    while stack:
        node, path = stack.pop()
        path = (*path, node)
        if len(path) > MAX_PATH:
            raise UserError(f"{reading.where}: replies nested over {MAX_PATH:,} deep")
        replies = _replies(node, reading)
        if reading.trees != "all":
            replies = replies[:1]
        if not replies:
            paths.append(path)
        # Reversed, because the reply that is put on the stack last is visited first.
        for reply in reversed(replies):
            stack.append((reply, path))
    return paths


def _replies(node: dict, reading: Reading) -> list[dict]:
    """Returns the replies to a message, the best-ranked first, without the deleted ones, which are
    counted."""
    replies = node.get("replies")
    if not replies:
        return []
    is_list = isinstance(replies, list)
    if not is_list or not all(isinstance(reply, dict) for reply in replies):
        actual = type_name(replies)
        raise UserError(f"{reading.where}: replies is {actual}, a list of messages is wanted")
    remaining = [reply for reply in replies if reply.get("deleted") is not True]
    num_deleted = len(replies) - len(remaining)
    if num_deleted:
        reading.stats.dropped["a deleted reply"] += num_deleted
    return sorted(remaining, key=lambda reply: _rank(reply, reading.where))


def _rank(reply: dict, where: str) -> float:
    """Returns the rank of a reply, 0 for the best; infinity if it has none."""
    rank = reply.get("rank")
    if rank is None:
        return math.inf
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        where = reply.get(WHERE, where)
        raise UserError(f"{where}: rank is {type_name(rank)}, a number or null is wanted")
    # Nothing is smaller or larger than NaN, so the order of the replies would depend on chance.
    if math.isnan(rank):
        return math.inf
    return rank


def _message(node: dict, reading: Reading) -> dict:
    """Returns a message of a tree as a message of a conversation."""
    where = node.get(WHERE, reading.where)
    role = OASST_ROLES.get(require_field(node, "role", str, where))
    if role is None:
        unknown = quote_names([node["role"]])
        raise UserError(f"{where}: role {unknown} is unknown; prompter or assistant")
    return {"role": role, "content": require_field(node, "text", str, where)}


# ---- flat files ----


def _flat_tree(reading: Reading) -> list[Record]:
    """Reads the messages of one tree of a flat file, which `_group_by_tree` collected."""
    nodes: dict[str, dict] = {}  # by message_id
    roots: list[str] = []  # ids
    children: dict[str, list[str]] = {}  # parent_id: ids of its replies
    for message in reading.record["messages"]:
        where = message[WHERE]
        id = message["message_id"]
        if id in nodes:
            raise UserError(f"{where}: message_id {id[:40]!r} stands twice")
        nodes[id] = message | {"replies": []}
        parent = message["parent_id"]
        if parent is not None and not isinstance(parent, str):
            actual = type_name(parent)
            raise UserError(f"{where}: parent_id is {actual}, a string or null is wanted")
        if parent is None:
            roots.append(id)
        else:
            children.setdefault(parent, []).append(id)
    for parent, ids in children.items():
        if parent in nodes:
            nodes[parent]["replies"] = [nodes[id] for id in ids]

    # Messages whose parent is missing are not below a root, and neither are those whose parents
    # form a cycle.
    reached = set()
    stack = list(roots)
    while stack:
        id = stack.pop()
        reached.add(id)
        stack += children.get(id, [])
    num_lost = len(nodes.keys() - reached)
    if num_lost:
        reading.stats.dropped["a message whose parents lead to no root"] += num_lost

    records = []
    for id in roots:
        tree = {"prompt": nodes[id]}
        records += oasst_tree(Reading(tree, reading.where, reading.stats, reading.trees))
    return records


def _group_by_tree(
    container: Container, payloads: Iterable, faults: list
) -> Iterator[tuple[int, object]]:
    """Yields (number of the first message, {"messages": [...]}) for each tree of a flat file.

    The messages of a tree must follow each other, so that one tree is in memory and not the file.
    faults: gets (number, UserError) of each record that is no message.
    Raises UserError if the messages of a tree do not follow each other.
    """
    finished_trees = set()
    for tree, numbered in groupby(_flat_messages(container, payloads, faults), _tree_of):
        numbered = list(numbered)
        first_number = numbered[0][0]
        if tree in finished_trees:
            place = container.place(first_number)
            raise UserError(f"{place}: tree {str(tree)[:40]!r} again; sort the file by tree")
        finished_trees.add(tree)
        # The keys of the format are there so that the group is recognized as one of it.
        group: dict[str, object] = {"messages": [message for _, message in numbered]}
        group.update(dict.fromkeys(OASST_MESSAGES.keys))
        yield first_number, group


def _flat_messages(
    container: Container, payloads: Iterable, faults: list
) -> Iterator[tuple[int, dict]]:
    """Yields (number, message) for each record of a flat file, with the message's place at the key
    WHERE. faults: gets (number, UserError) of each record that is no message."""
    for number, payload in payloads:
        where = container.place(number)
        try:
            message = require_object(container.value(number, payload), where)
            if not OASST_MESSAGES.fits(message):
                raise OASST_MESSAGES.misfit(message, where)
            require_field(message, "message_id", str, where)
            if message.get("message_tree_id") is not None:
                require_field(message, "message_tree_id", str, where)
        except UserError as error:
            faults.append((number, error))
            continue
        yield number, message | {WHERE: where}


def _tree_of(numbered: tuple[int, dict]) -> str:
    """Returns the id of a message's tree; without one it is a tree of its own."""
    _, message = numbered
    return message.get("message_tree_id") or message["message_id"]


OASST_MESSAGES = Format(
    "OASST messages", ("message_id", "parent_id", "text", "role"), (), _flat_tree, _group_by_tree
)
