"""From the configuration file of another program to a command line of train.py.

    python convert.py recipe FILE

FILE is the YAML or JSON of torchtune, Axolotl, LLaMA-Factory or trl; which one, its keys say. What
is printed is a shell script: the command, and as comments what of the file is not in it. Each value
of the file ends in one of four places, so that nothing is dropped in silence: it is carried over, it
is done here anyway, it is not carried over (with the reason), or it is switched off. What the file
leaves open is filled with the other program's default where ours differs.

What an option of theirs is here stands in common/known_names.py; what is particular to a program
(where the data are named, what its defaults are) in interop/recipe_programs.py and recipe_rows.py.
"""

import argparse
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import parse_args, shortened
from common.errors import UserError, printable, read_json, read_text
from common.known_names import TRAIN_NAMES, Counterpart, as_number
from flags import (
    NEW_ADAPTER,
    OPTIONS,
    Flags,
    check_data,
    check_memory,
    check_method,
    check_numbers,
    dashed,
    make_parser,
)
from interop.recipe_programs import OTHER_PROGRAMS, Program
from methods import METHODS

# A configuration has some dozen values. These limits keep a file that is none from taking long.
FILE_BYTES = 1 << 17
MOST_VALUES = 2_000
DEEPEST = 20
# How many other values one value may name, as ${output_dir}, and the characters of each.
MOST_RESOLVED = 20
LONGEST_RESOLVED = 4_096

# {flag: name of the option} of train.py.
OPTION_OF_FLAG = {dashed(name): name for name in OPTIONS} | {"--no-pack": "pack"}


@dataclass
class Conversion:
    """What becomes of a configuration file.

    leaves: {dotted key: value} of all that stands in the file.
    flags: {flag of train.py: its values, as words}.
    carried, anyway, left_out: {dotted key: the words here, or the reason}.
    off: keys without a value, or that switch something off that is not there.
    filled: {their option: the words} for what the file leaves open.
    differs: sentences on what the command computes otherwise.
    parser: of train.py, which is asked whether it takes a value.
    """

    program: Program
    leaves: dict[str, object]
    flags: dict[str, list[str]] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    anyway: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    off: list[str] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    parser: argparse.ArgumentParser = field(default_factory=make_parser)

    def is_open(self, key: str) -> bool:
        """Returns True if a key is in the file and was not dealt with yet."""
        places = (self.carried, self.anyway, self.left_out, self.off)
        return key in self.leaves and not any(key in place for place in places)

    def open_under(self, prefix: str) -> list[str]:
        """Returns the keys at `prefix` or below it that were not dealt with yet."""
        inside = (f"{prefix}.", f"{prefix}[")
        keys = [key for key in self.leaves if key == prefix or key.startswith(inside)]
        return [key for key in keys if self.is_open(key)]

    def text(self, key: str) -> str:
        """Returns a value as it would be typed; "" if the key is not in the file."""
        return as_text(self.leaves.get(key))

    def is_true(self, key: str) -> bool:
        return self.text(key) == "true"

    def carry(self, key: str, words: str) -> None:
        """Adds words to the command, for a key. Where another key has said otherwise, or the option
        is not there, the key is left out."""
        problem = self.add(words)
        if problem:
            self.left_out[key] = problem
        elif words:
            self.carried[key] = words

    def add(self, words: str) -> str:
        """Adds words to the command. Returns why they can't be added, or ""."""
        if not words:
            return ""
        flag, *values = shlex.split(words)
        if flag not in OPTION_OF_FLAG:
            return f"{flag} is not there yet"
        if flag == "--data":
            known = self.flags.setdefault(flag, [])
            known += [value for value in values if value not in known]
            return ""
        try:
            given = vars(parse_args(self.parser, [f"{flag}={value}" for value in values] or [flag]))
            check_numbers(Flags(**given))
        except UserError as error:
            return f"{error}".removesuffix("; see --help")
        if self.flags.setdefault(flag, values) != values:
            return f"{flag} is {' '.join(self.flags[flag])} by another key"
        return ""

    def take(self, key: str, row: Counterpart) -> None:
        """Puts a key where its row says."""
        words = row.translate(as_text(self.leaves[key]))
        if words:
            self.carry(key, words)
        elif words is None:
            self.left_out[key] = row.note or "nothing here means this value"
        elif self.text(key) in ("false", "none", "0", "-1"):
            self.off.append(key)
        elif row.flag:
            self.anyway[key] = f"as {row.flag} has it"
        else:
            self.anyway[key] = row.note


def print_recipe(file: Path) -> None:
    """Prints the command line of a configuration file, and what is not in it."""
    for line in recipe_lines(read_recipe(file), file):
        print(line)


def read_recipe(file: Path) -> Conversion:
    """Returns what becomes of a configuration file.

    Raises UserError if it can't be read, or is no configuration of a training that is known.
    """
    leaves = flattened(read_configuration(file), file)
    recipe = Conversion(pick_program(leaves, file), leaves)
    for key, value in leaves.items():
        if value is None or value == "":
            recipe.off.append(key)
    recipe.program.read(recipe)
    carry_by_name(recipe)
    settle_steps(recipe)
    fill_in(recipe)
    settle_validation(recipe)
    drop_what_the_method_lacks(recipe)
    note_differences(recipe)
    note_refusal(recipe)
    return recipe


# ---- the file ----


def read_configuration(file: Path) -> dict:
    """Returns the object in a YAML or JSON file.

    Raises UserError naming the file and line if it is neither, holds no object, gives a key twice,
    or merges other parts of the file (<<), which a small file can do without end.
    """
    if file.suffix == ".json":
        return read_json(file)
    # Most runs of this program read no YAML.
    import yaml

    text = read_text(file, FILE_BYTES)
    try:
        # As yaml.safe_load does it, with a look at the keys in between.
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        refuse_doubtful_keys(root, file)
        value = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise UserError(f"{file}: not YAML{where} ({printable(str(error.problem))})") from None
    except RecursionError:
        raise UserError(f"{file}: YAML nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # A character that YAML does not have, a date or a number that there is not.
        problem = printable(str(error).splitlines()[0])
        raise UserError(f"{file}: not YAML ({problem})") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{file}: holds a YAML {kind}; a configuration is key: value")
    return value


def refuse_doubtful_keys(root, file: Path) -> None:
    """Raises UserError if an object of a YAML file has a key twice, of which YAML would take the
    last, or merges others. root: its node."""
    nodes = [root]
    seen = set()
    while nodes:
        node = nodes.pop()
        # A part that is named (&) and used again (*) is one node.
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.id == "sequence":
            nodes += node.value
        if node.id != "mapping":
            continue
        keys = set()
        for key, value in node.value:
            nodes.append(value)
            line = f"{file}: line {key.start_mark.line + 1}"
            if key.tag == "tag:yaml.org,2002:merge":
                raise UserError(f"{line}: merges another part of the file (<<); write its keys out")
            if key.id == "scalar" and key.value in keys:
                raise UserError(f"{line}: {printable(key.value)} is given twice; remove one")
            keys.add(key.value if key.id == "scalar" else id(key))


def flattened(value: object, file: Path) -> dict[str, object]:
    """Returns {dotted key: value} of a configuration: a.b for objects, a[0].b for lists of objects.
    Lists of plain values are values.

    Raises UserError if it is too deep or too large to be one.
    """
    leaves: dict[str, object] = {}

    def visit(value: object, key: str, depth: int) -> None:
        if depth > DEEPEST or len(leaves) > MOST_VALUES:
            raise UserError(f"{file}: is deeper or larger than a configuration")
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                visit(inner, f"{key}.{name}" if key else str(name), depth + 1)
        elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
            for number, inner in enumerate(value):
                visit(inner, f"{key}[{number}]", depth + 1)
        elif key in leaves:
            raise UserError(f"{file}: {printable(key)} is given twice; remove one")
        else:
            is_empty = isinstance(value, dict | list) and not value
            leaves[key] = None if is_empty else value

    visit(value, "", 0)
    return {key: resolved(value, leaves) for key, value in leaves.items()}


def resolved(value: object, leaves: dict[str, object]) -> object:
    """Returns a value with the other values that it names, as ${output_dir} in torchtune's files."""
    if not isinstance(value, str):
        return value

    def named(match: re.Match) -> str:
        other = leaves.get(match[1])
        if isinstance(other, str | int | float) and len(str(other)) <= LONGEST_RESOLVED:
            return str(other)
        return match[0]

    return re.sub(r"\$\{([\w.]+)\}", named, value, count=MOST_RESOLVED)


def pick_program(leaves: dict[str, object], file: Path) -> Program:
    """Returns the program whose configuration a file is. Raises UserError if it is of none."""
    for program in OTHER_PROGRAMS:
        if program.is_mine(leaves):
            problem = program.why_no_training(leaves)
            if problem:
                raise UserError(f"{file}: is a configuration of {program.name}, but {problem}")
            return program
    raise UserError(
        f"{file}: is no configuration of torchtune (_component_), Axolotl (base_model), LLaMA-Factory"
        " (stage, finetuning_type) or trl (model_name_or_path, learning_rate)"
    )


def as_text(value: object) -> str:
    """Returns a value as it would be typed: true, 0.0001, q_proj,v_proj."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list):
        return ",".join(as_text(each) for each in value)
    return str(value)


# ---- key by key ----


def carry_by_name(recipe: Conversion) -> None:
    """Deals with every key that is left, by the table of known names and the program's own."""
    for key in recipe.leaves:
        if not recipe.is_open(key):
            continue
        row = row_of(recipe.program, key)
        if row is not None:
            recipe.take(key, row)
        elif recipe.leaves[key] is False:
            recipe.off.append(key)
        else:
            recipe.left_out[key] = "is not known here"


def row_of(program: Program, key: str) -> Counterpart | None:
    """Returns the row of a key; of a nested one, that of what it is a part of.

    What an option of the whole is called says nothing about one inside of something else: the
    output_dir of a profiler is not that of the run.
    """
    if key in program.rows:
        return program.rows[key]
    if key in TRAIN_NAMES:
        return TRAIN_NAMES[key]
    parent = key
    while "." in parent or "[" in parent:
        parent = parent[: max(parent.rfind("."), parent.rfind("["))]
        row = program.rows.get(parent) or TRAIN_NAMES.get(parent)
        if row is not None and not row.flag:
            return row
    return None


def settle_steps(recipe: Conversion) -> None:
    """Leaves one of --steps and --epochs, and makes steps of a share that warms up, if the steps are
    known."""
    steps = recipe.flags.get("--steps")
    if steps is None:
        return
    if "--epochs" in recipe.flags:
        drop(recipe, "--epochs", f"the run ends after {steps[0]} steps")
    share = as_number(recipe.text("warmup_ratio"))
    if share and "warmup_ratio" in recipe.left_out and "--warmup" not in recipe.flags:
        count = math.ceil(share * float(steps[0]))
        del recipe.left_out["warmup_ratio"]
        recipe.carry("warmup_ratio", f"--warmup {count}")


def fill_in(recipe: Conversion) -> None:
    """Adds the other program's defaults for what the file leaves open, where ours differ."""
    rows = [row_of(recipe.program, key) for key in (*recipe.left_out, *recipe.anyway)]
    said = {OPTION_OF_FLAG.get(row.flag) for row in rows if row is not None}
    for name, value in recipe.program.defaults(recipe).items():
        row = TRAIN_NAMES[name]
        words = row.translate(value) or ""
        flag = words.partition(" ")[0]
        option = OPTION_OF_FLAG.get(flag)
        if option is None or option in {OPTION_OF_FLAG[each] for each in recipe.flags}:
            continue
        if option == "epochs" and "--steps" in recipe.flags:
            continue
        # What the file says, and could not be carried over, is no default either.
        if option in said:
            continue
        default = OPTIONS[option].default
        is_ours = default is not None and as_text(default) == words.partition(" ")[2]
        if not is_ours:
            recipe.add(words)
            recipe.filled[name] = words


def settle_validation(recipe: Conversion) -> None:
    """Takes --val-fraction out of the command where it means nothing."""
    if "--val-fraction" not in recipe.flags or (
        "--data" in recipe.flags and "--val" not in recipe.flags
    ):
        return
    drop(recipe, "--val-fraction", "there is a file of validation examples, or no file to part")


def drop(recipe: Conversion, flag: str, reason: str) -> None:
    """Takes an option out of the command."""
    del recipe.flags[flag]
    for key, words in list(recipe.carried.items()):
        if words.split()[0] == flag:
            del recipe.carried[key]
            recipe.left_out[key] = reason
    for name, words in list(recipe.filled.items()):
        if words.split()[0] == flag:
            del recipe.filled[name]


def drop_what_the_method_lacks(recipe: Conversion) -> None:
    """Takes options out of the command that belong to other methods than --method."""
    method = recipe.flags.get("--method", [OPTIONS["method"].default])[0]
    owned = {name for row in METHODS.values() for name in row.options}
    foreign = owned - set(METHODS[method].options)
    reason = f"means nothing to --method {method}"
    if "--adapter" in recipe.flags:
        # It has a shape of its own.
        foreign |= set(NEW_ADAPTER)
        reason = "the adapter that training goes on from has its own"
    for flag in list(recipe.flags):
        if OPTION_OF_FLAG[flag] in foreign:
            drop(recipe, flag, reason)


def note_differences(recipe: Conversion) -> None:
    """Adds what the command computes otherwise than the other program did."""
    flags = recipe.flags
    batch = int(flags.get("--batch-size", ["8"])[0])
    accumulate = int(flags.get("--accumulate", ["1"])[0])
    what = "packed rows of --seq-len tokens" if "--pack" in flags else "examples"
    recipe.differs.append(
        f"a step is {batch} x {accumulate} {what} on each process; `torchrun --nproc-per-node N"
        " train.py` starts N of them"
    )
    recipe.differs.append(
        "an example that is longer than --seq-len is cut at a turn or left out, and counted"
    )
    if "--warmup" not in flags:
        recipe.differs.append(
            "the learning rate rises in the first 5 % of the steps, unless --warmup says how many"
        )
    if "--data" not in flags:
        recipe.differs.append(
            "WARNING: the file names no data, and without --data the bundled task is trained"
        )
    method = flags.get("--method", ["lora"])[0]
    is_bf16 = any(recipe.text(key) in ("bf16", "bfloat16") for key in ("dtype", "torch_dtype"))
    if method == "full" and is_bf16 and "--weights" not in flags:
        recipe.differs.append(
            "there the trained weights are in bf16, here in fp32, so that small steps are not lost;"
            " --weights bf16 takes half the memory"
        )


def note_refusal(recipe: Conversion) -> None:
    """Adds a warning if train.py would refuse the command, for what the file asks for together."""
    words = [word for part in command_words(recipe) for word in part]
    try:
        given = vars(parse_args(recipe.parser, words))
        flags = Flags(**given, given=frozenset(given))
        for check in (check_numbers, check_data, check_memory, check_method):
            check(flags)
    except UserError as error:
        recipe.differs.append(f"WARNING: train.py refuses this command: {error}")


# ---- what is printed ----


def command_words(recipe: Conversion) -> list[list[str]]:
    """Returns the words of the command, a list for each option, as a shell must get them."""
    # In the order of --help, which is that of reading.
    order = list(OPTION_OF_FLAG.values())
    flags = sorted(recipe.flags, key=lambda flag: order.index(OPTION_OF_FLAG[flag]))
    parts = []
    for flag in flags:
        values = recipe.flags[flag]
        if any(value.startswith("-") for value in values):
            # A value that looks like a flag.
            parts += [[f"{flag}={value}"] for value in values]
        else:
            parts.append([flag, *values])
    return parts


def recipe_lines(recipe: Conversion, file: Path) -> list[str]:
    """Returns the lines of the shell script: the command, and comments."""
    count = len(recipe.leaves)
    sums = (
        f"{count} values: {len(recipe.carried)} carried over, {len(recipe.left_out)} not carried over,"
        f" {len(recipe.anyway)} so here anyway, {len(recipe.off)} not set or off"
    )
    lines = [comment(f"{file}, a configuration of {recipe.program.name} with {sums}")]
    lines += [comment(warning) for warning in recipe.differs if warning.startswith("WARNING")]
    parts = [shlex.join(words) for words in command_words(recipe)]
    lines.append(" \\\n    ".join(["python train.py", *parts]))
    lines += section("not carried over:", valued(recipe, recipe.left_out))
    lines += section(
        "differs:", [text for text in recipe.differs if not text.startswith("WARNING")]
    )
    lines += section(
        f"not in the file, and so filled with the default of {recipe.program.name}:",
        [f"{name}: {words}" for name, words in recipe.filled.items()],
    )
    lines += section("carried over:", valued(recipe, recipe.carried))
    lines += section("so here anyway:", by_reason(recipe.anyway))
    if recipe.off:
        lines += section("not set, or off:", [", ".join(recipe.off)])
    return lines


def comment(text: str) -> str:
    """Returns a comment of a shell script, on one line whatever the text holds."""
    return f"# {printable(text)}"


def section(title: str, texts: list[str]) -> list[str]:
    """Returns a title and its lines as comments; nothing if there are no lines."""
    if not texts:
        return []
    return ["#", comment(title), *(comment(f"  {text}") for text in texts)]


def valued(recipe: Conversion, texts: dict[str, str]) -> list[str]:
    """Returns a line for each key: key, value, what becomes of it."""
    return [f"{key}: {shortened(recipe.text(key))} -> {text}" for key, text in texts.items()]


def by_reason(texts: dict[str, str]) -> list[str]:
    """Returns a line for each reason, with the keys that it is the reason of."""
    keys_of: dict[str, list[str]] = {}
    for key, text in texts.items():
        keys_of.setdefault(text, []).append(key)
    return [f"{', '.join(keys)}: {text}" for text, keys in keys_of.items()]
