"""OpenAssistant's trees of messages, nested or as flat files."""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby

from common.errors import UserError
from dataset.messages import quote_names, require_field, require_object, type_name
from dataset.readers import Container
from dataset.records import Format, Reading, Record

TREES = ("best", "all")  # the path of best-ranked replies, or every path


def oasst_tree(reading: Reading) -> list[Record]:
    """A tree of OpenAssistant (Koepf et al. 2023): the prompt at its root, ranked replies below each message.

    Of a tree comes the path of best-ranked replies, or every path; then an answer that several paths share is trained
    in the first of them. A path ends with an answer; deleted messages, with all below them, are left out.
    """
    paths, taught, stack = [], set(), [(require_object(reading.record["prompt"], reading.where), ())]
    if stack[0][0].get("deleted") is True:
        reading.stats.dropped["a deleted prompt"] += 1
        return []
    while stack:
        node, path = stack.pop()
        path = (*path, node)
        if len(path) > 1000:
            raise UserError(f"{reading.where}: replies nested over 1,000 deep")
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise UserError(f"{reading.where}: replies is {type_name(replies)}, a list of messages is wanted")
        kept = [reply for reply in replies if reply.get("deleted") is not True]
        if len(kept) < len(replies):
            reading.stats.dropped["a deleted reply"] += len(replies) - len(kept)
        replies = sorted(kept, key=lambda reply: _rank(reply, reading.where))
        wanted = replies if reading.trees == "all" else replies[:1]
        stack += [(reply, path) for reply in reversed(wanted)]
        if not wanted:
            paths.append(path)
    records = []
    for path in paths:
        turns, weights = [], []
        for node in path:
            where = node.get(WHERE, reading.where)
            role = OASST_ROLES.get(require_field(node, "role", str, where))
            if role is None:
                raise UserError(f"{where}: role {quote_names([node['role']])} is unknown; prompter or assistant")
            turns.append({"role": role, "content": require_field(node, "text", str, where)})
            weights.append(0.0 if id(node) in taught else 1.0)
        while turns and turns[-1]["role"] != "assistant":
            turns.pop(), weights.pop()
        new = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and weights[i]]
        if not new:
            reading.stats.dropped["a path without an answer of its own" if turns else "a path without an answer"] += 1
            continue
        taught |= {id(path[i]) for i in new}
        records += reading.conversation(turns, weights)
    return records


WHERE = "\0where"  # a key that no file has: the place of a message
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _rank(reply: dict, where: str) -> float:
    rank = math.inf if reply.get("rank") is None else reply["rank"]
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise UserError(f"{reply.get(WHERE, where)}: rank is {type_name(rank)}, a number or null is wanted")
    return math.inf if math.isnan(rank) else rank


def _oasst_messages(reading: Reading) -> list[Record]:
    """The messages of one tree, as `_oasst_group` puts them together."""
    nodes, roots, children = {}, [], {}
    for message in reading.record["messages"]:
        where = message[WHERE]
        id = message["message_id"]
        if id in nodes:
            raise UserError(f"{where}: message_id {id[:40]!r} stands twice")
        nodes[id] = message | {"replies": []}
        parent = message["parent_id"]
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"{where}: parent_id is {type_name(parent)}, a string or null is wanted")
        roots.append(id) if parent is None else children.setdefault(parent, []).append(id)
    for parent, ids in children.items():
        if parent in nodes:
            nodes[parent]["replies"] = [nodes[id] for id in ids]
    reached, stack = set(), list(roots)
    while stack:  # a cycle has no root, and is never reached
        id = stack.pop()
        reached.add(id)
        stack += children.get(id, [])
    if lost := len(nodes.keys() - reached):
        reading.stats.dropped["a message whose parents lead to no root"] += lost
    records = []
    for id in roots:
        records += oasst_tree(Reading({"prompt": nodes[id]}, reading.where, reading.stats, reading.trees))
    return records


def _oasst_group(container: Container, payloads: Iterable) -> Iterator[tuple[int, object]]:
    """Messages put together by tree, which must stand in a row, so that a tree is held and not the file."""
    done = set()

    def values():
        for number, payload in payloads:
            where = container.place(number)
            value = require_object(container.value(number, payload), where)
            if not OASST_MESSAGES.fits(value):
                raise OASST_MESSAGES.misfit(value, where)
            require_field(value, "message_id", str, where)
            if value.get("message_tree_id") is not None:
                require_field(value, "message_tree_id", str, where)
            yield number, value | {WHERE: where}

    tree = lambda pair: pair[1].get("message_tree_id") or pair[1]["message_id"]
    for key, group in groupby(values(), tree):
        group = list(group)
        if key in done:
            raise UserError(f"{container.place(group[0][0])}: tree {str(key)[:40]!r} again; sort the file by tree")
        done.add(key)
        yield group[0][0], {"messages": [value for _, value in group], **dict.fromkeys(OASST_MESSAGES.keys)}


OASST_MESSAGES = Format(
    "OASST messages", ("message_id", "parent_id", "text", "role"), (), _oasst_messages, _oasst_group
)
