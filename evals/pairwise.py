"""A blinded A/B page: which of two models' answers do people prefer?

    python evaluate.py pairs base.jsonl tuned.jsonl --out page.html

The two files are of `generate.py --data`. Their answers are joined by the number of the record, and
go into one HTML file that loads nothing: evals/pairs.html.jinja with its .css and .js beside it. It
shows a pair at a time, the one model's answer on the left in half of the pairs, by --seed. Which
side is whose stands in the page only as `key`, a text that the page copies into the judgements that
it exports and never reads; evals/tally.py reads it.

Answers come from models that may write anything. So they are JSON in the page, with every `<`, `>`
and `&` and everything beyond ASCII escaped, and the script puts them in as text, never as markup.
The page's Content-Security-Policy lets no script run but that one, by its hash, and nothing be
loaded or sent.
"""

import argparse
import base64
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.errors import UserError, printable, read_text
from common.files import atomic_file

# The format of the page's data and of the judgements; a page and a tally of different ones don't
# understand each other.
JUDGEMENTS_FORMAT = "plaintune judgements 1"
# Sides are balanced within every so many pairs in a row. So a rater who stops early has still seen
# each model about as often on the left.
SIDES_BLOCK = 10
LONGEST_MODEL_NAME = 60
# How many records a message names.
NAMED_RECORDS = 5

# (record, sample) of an answer.
AnswerKey = tuple[int, int]


class WrittenAnswer(NamedTuple):
    """One line of a file of answers.

    where: the file and line. question: what was asked: the prompt's messages without system
    messages, or its text; and the tools. system: the system messages. shown: the question as
    (role, text). was_cut: whether the answer was cut off for its length. reference: the record's
    own answer, None if it has none.
    """

    where: str
    question: object
    system: list
    shown: list[tuple[str, str]]
    text: str
    was_cut: bool
    reference: str | None


class JoinedAnswers(NamedTuple):
    """The pairs of two files.

    pairs: of each (record, sample), the answers of both models. identical: those of the pairs that
    are not to be judged, since the answers are the same. alone: for each file, how many answers have
    no partner. other_system: pairs whose system messages differ.
    """

    pairs: dict[AnswerKey, tuple[WrittenAnswer, WrittenAnswer]]
    identical: set[AnswerKey]
    alone: tuple[int, int]
    other_system: int


def pairs_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py pairs`. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py pairs",
        description="Makes one HTML page on which people judge two models' answers side by side,"
        " without being told which is whose. It opens in any browser, from this disk and without a network;"
        " send it to the raters. What they export is counted by `evaluate.py tally`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    answers_help = "answers of the {} model, written by `generate.py --data FILE --out {}`"
    add("a", metavar="A.jsonl", type=Path, help=answers_help.format("first", "A.jsonl"))
    add(
        "b",
        metavar="B.jsonl",
        type=Path,
        help=answers_help.format("second", "B.jsonl") + ", to the same prompts",
    )
    add("--out", metavar="PAGE", type=Path, required=True, help="the page, as page.html; required")
    add("--overwrite", action="store_true", help="replace PAGE if it is there")
    add(
        "--names",
        metavar="A,B",
        help="what the models are called in the tally, as base,tuned; the page does not show it;"
        " default: the names of the files",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which pairs --limit draws, and which answer stands on which side; default: %(default)s",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="use N pairs only, drawn at random by --seed; default: all of them",
    )
    add(
        "--keep-identical",
        action="store_true",
        help="show pairs whose two answers are the same, too, for ratings of each answer; default:"
        " they are left out and counted, and the tally takes them for ties",
    )
    args = cli.parse_args(parser, argv)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be 1 or more")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    args.names = model_names(args.names, args.a, args.b)
    return args


def model_names(typed: str | None, a: Path, b: Path) -> tuple[str, str]:
    """Returns what the two models are called. Raises UserError for names that are none, or equal."""
    if typed is None:
        names = [a.stem, b.stem]
        if names[0] == names[1]:
            names = [str(a), str(b)]
        if names[0] == names[1]:
            raise UserError(f"{a}: is given twice; the answers of two models are wanted")
        return shortened_name(names[0]), shortened_name(names[1])
    names = [name.strip() for name in typed.split(",")]
    if len(names) != 2 or "" in names or names[0] == names[1]:
        raise UserError(f"--names {typed}: two different names with a comma between are wanted")
    for name in names:
        if len(name) > LONGEST_MODEL_NAME or not name.isprintable():
            raise UserError(f"--names {typed}: a name has at most {LONGEST_MODEL_NAME} characters")
    return names[0], names[1]


def shortened_name(name: str) -> str:
    """Returns the name of a file as the name of a model: its end, without control characters."""
    return printable(name)[-LONGEST_MODEL_NAME:]


# Only a file with this near its beginning is a page of this program, which --overwrite may replace.
PAIRS_PAGE_MARK = '<meta name="generator" content="plaintune">'


def make_pairs_page(args: argparse.Namespace) -> None:
    """Writes the page, and prints what is on it."""
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {args.out}: is there already; --overwrite replaces it")
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder, the name of a file is wanted")
    if args.out.exists() and PAIRS_PAGE_MARK.encode() not in args.out.read_bytes()[:500]:
        raise UserError(
            f"--out {args.out}: is no page of pairs, which alone is replaced; give another name"
        )
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no such folder")
    sides = [read_pair_answers(args.a), read_pair_answers(args.b)]
    joined = join_answers(*sides, files=(args.a, args.b), keep_identical=args.keep_identical)
    chosen, identical = drawn_pairs(joined, args.limit, args.seed)
    pairs = {key: joined.pairs[key] for key in chosen}
    data = pairs_page_data(pairs, args.names, args.seed, identical)
    page = render_pairs_page(data)
    with atomic_file(args.out) as tmp:
        tmp.write_text(page, encoding="utf-8")

    width = max(9, *map(len, args.names))
    for name, file, answers in zip(args.names, (args.a, args.b), sides, strict=True):
        print(f"{name:{width}} {file}: {len(answers):,} answers")
    print(f"pairs     {len(pairs):,} to be judged{left_out(joined, len(pairs), identical)}")
    if joined.other_system:
        print(
            f"NOTE: in {joined.other_system:,} pairs the models had different system messages, which"
            " the page does not show"
        )
    megabytes = len(page) / 1e6
    print(f"page      {args.out}, {megabytes:.1f} MB, number {data['page']}; open it in a browser")
    print("next      python evaluate.py tally judgements-NAME-....json, as the raters export them")


def left_out(joined: JoinedAnswers, num_pairs: int, num_identical: int) -> str:
    """Returns a clause that says which answers are in no pair of the page."""
    parts = []
    if num_pairs + num_identical < len(joined.pairs):
        parts.append(f"drawn from {len(joined.pairs):,} by --seed")
    if num_identical:
        parts.append(f"{num_identical:,} whose two answers are identical left out")
    for count, name in zip(joined.alone, ("first", "second"), strict=True):
        if count:
            parts.append(f"{count:,} answers that only the {name} file has left out")
    return f" ({'; '.join(parts)})" if parts else ""


# ---- the answers ----


def read_pair_answers(path: Path) -> dict[AnswerKey, WrittenAnswer]:
    """Reads a file of `generate.py --data`. Returns its answers by (record, sample).

    Raises UserError naming the line that is no answer, or that answers what another line answers.
    """
    answers: dict[AnswerKey, WrittenAnswer] = {}
    # Other characters that Python calls line ends may stand within a line of JSON.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: is not JSON; {ANSWERS_WANTED}") from None
        key = answer_key(fields, where)
        if key in answers:
            what = f"record {key[0]} sample {key[1]}"
            raise UserError(f"{where}: answers {what}, as {answers[key].where} does")
        answers[key] = written_answer(fields, where)
    if not answers:
        raise UserError(f"{path}: holds no answers; {ANSWERS_WANTED}")
    return answers


ANSWERS_WANTED = "a file that `generate.py --data FILE --out ANSWERS.jsonl` has written is wanted"


def answer_key(fields: object, where: str) -> AnswerKey:
    """Returns (record, sample) of a line. Raises UserError where it has none."""
    if not isinstance(fields, dict):
        raise UserError(f"{where}: is no JSON object; {ANSWERS_WANTED}")
    key = (fields.get("record"), fields.get("sample", 1))
    for name, number in zip(("record", "sample"), key, strict=True):
        # True and False are numbers in Python.
        if type(number) is not int:
            raise UserError(f"{where}: has no number as `{name}`; {ANSWERS_WANTED}")
    return key  # type: ignore[return-value]


def written_answer(fields: dict, where: str) -> WrittenAnswer:
    """Returns the answer of a line. Raises UserError where it has none."""
    messages = fields.get("messages")
    tools = fields.get("tools")
    system: list = []
    if isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages):
        *asked, answer = messages
        if answer.get("role") != "assistant":
            raise UserError(f"{where}: its last message is not the assistant's; {ANSWERS_WANTED}")
        system = [message for message in asked if message.get("role") == "system"]
        question: object = [message for message in asked if message.get("role") != "system"]
        text = shown_text(answer)
        shown = [(str(message.get("role")), shown_text(message)) for message in asked]
    elif isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        question = fields["prompt"]
        text = fields["completion"]
        shown = [("text to continue", fields["prompt"])]
    else:
        raise UserError(
            f"{where}: has neither `messages` nor `prompt` and `completion`; {ANSWERS_WANTED}"
        )
    if tools:
        shown.insert(0, ("tools", json.dumps(tools, indent=2, ensure_ascii=False)))
    reference = fields.get("reference")
    if not isinstance(reference, str) or not reference:
        reference = None
    calls = fields.get("reference_tool_calls")
    if calls:
        reference = shown_text({"content": reference, "tool_calls": calls})
    was_cut = fields.get("finish") == "length"
    return WrittenAnswer(where, [question, tools], system, shown, text, was_cut, reference)


def shown_text(message: Mapping) -> str:
    """Returns what a message says, as text; its tool calls as JSON."""
    content = message.get("content")
    parts = [] if content is None else [content]
    if isinstance(content, list):
        # Typed parts, as {"type": "text", "text": ...}.
        parts = [part.get("text", part) if isinstance(part, dict) else part for part in content]
    if message.get("tool_calls"):
        parts.append(message["tool_calls"])
    texts = []
    for part in parts:
        is_text = isinstance(part, str)
        texts.append(part if is_text else json.dumps(part, indent=2, ensure_ascii=False))
    return "\n".join(texts)


def join_answers(
    a: dict[AnswerKey, WrittenAnswer],
    b: dict[AnswerKey, WrittenAnswer],
    files: tuple[Path, Path],
    keep_identical: bool,
) -> JoinedAnswers:
    """Joins two models' answers by record and sample. files: for messages.

    Raises UserError where a record is another prompt in the other file, or where no pair is left.
    """
    pairs = {}
    identical = set()
    other_system = 0
    others = []
    for key in sorted(a.keys() & b.keys()):
        if a[key].question != b[key].question:
            others.append(key)
            continue
        if a[key].text == b[key].text and not keep_identical:
            identical.add(key)
        other_system += a[key].system != b[key].system
        pairs[key] = (a[key], b[key])
    if others:
        records = ", ".join(f"{record}" for record, _ in others[:NAMED_RECORDS])
        more = ", ..." if len(others) > NAMED_RECORDS else ""
        raise UserError(
            f"{a[others[0]].where} and {b[others[0]].where}: record {others[0][0]} is not the same"
            f" prompt in both ({len(others):,} such: {records}{more}); let both models answer one"
            " --data"
        )
    if not pairs:
        raise UserError(f"{files[0]} and {files[1]}: have no record in common")
    if len(identical) == len(pairs):
        problem = f"all {len(pairs):,} answers are the same in both, so there is nothing to judge"
        raise UserError(f"{files[0]} and {files[1]}: {problem}; --keep-identical shows them")
    alone = (len(a) - len(pairs), len(b) - len(pairs))
    return JoinedAnswers(pairs, identical, alone, other_system)


# ---- the page ----


def drawn_pairs(joined: JoinedAnswers, limit: int | None, seed: int) -> tuple[list[AnswerKey], int]:
    """Returns the pairs to be judged, in the order of the records: `limit` of them, drawn at random
    by the seed, or all. And how many identical ones belong to them, which count as ties: as large a
    share of the identical ones as is drawn of the others.

    Raises UserError where there are not as many.
    """
    differing = [key for key in joined.pairs if key not in joined.identical]
    if limit is None:
        return sorted(differing), len(joined.identical)
    if limit > len(differing):
        raise UserError(f"--limit {limit}: there are only {len(differing):,} pairs that differ")
    chosen = random.Random(f"pairs {seed}").sample(differing, limit)
    return sorted(chosen), round(limit * len(joined.identical) / len(differing))


def random_sides(count: int, seed: int) -> str:
    """Returns which model's answer stands on the left of each pair, as "ABBA...": each model's in
    half of every SIDES_BLOCK pairs, in random order by the seed."""
    source = random.Random(f"sides {seed}")
    sides = ""
    while len(sides) < count:
        half = SIDES_BLOCK // 2
        sides += "".join(source.sample("A" * half + "B" * half, SIDES_BLOCK))
    return sides[:count]


def pairs_page_data(
    pairs: dict[AnswerKey, tuple[WrittenAnswer, WrittenAnswer]],
    names: tuple[str, str],
    seed: int,
    identical: int,
) -> dict:
    """Returns what the page's script reads: the pairs, left and right, and the key.

    `page` is a hash of all the rest: the number by which the browser keeps a page's judgements, and
    the tally knows them.
    """
    sides = random_sides(len(pairs), seed)
    shown_pairs = []
    for side, (a, b) in zip(sides, pairs.values(), strict=True):
        left, right = (a, b) if side == "A" else (b, a)
        shown = (
            a.shown if a.system == b.system else [each for each in a.shown if each[0] != "system"]
        )
        shown_pairs.append(
            {
                "question": [{"role": role, "text": text} for role, text in shown],
                "reference": a.reference if a.reference is not None else b.reference,
                "left": {"text": left.text, "was_cut": left.was_cut},
                "right": {"text": right.text, "was_cut": right.was_cut},
            }
        )
    key = {"names": names, "sides": sides, "identical": identical, "records": [*pairs]}
    # Encoded not as a secret, but so that nobody reads it by chance.
    encoded = base64.b64encode(json.dumps(key).encode()).decode()
    data = {"format": JUDGEMENTS_FORMAT, "key": encoded, "pairs": shown_pairs}
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    return {"page": digest[:16]} | data


def render_pairs_page(data: dict) -> str:
    """Returns the page as ASCII HTML."""
    # Needed nowhere else here, and --help is to be quick.
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    style = (folder / "pairs.css").read_text(encoding="ascii")
    script = (folder / "pairs.js").read_text(encoding="ascii")
    return environment.get_template("pairs.html.jinja").render(
        data=json_in_html(data),
        style=style,
        script=script,
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
    )


def json_in_html(value: object) -> str:
    """Returns JSON that may stand within a <script> element: without a character that could end the
    element, or begin another one or a comment, and in ASCII."""
    text = json.dumps(value, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def csp_hash(text: str) -> str:
    """Returns the hash by which a Content-Security-Policy allows an inline script or style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
