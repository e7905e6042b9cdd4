"""Figures of how the program reads, to be compared between two commits. It judges nothing and fails nobody.

    python tests/support/figures.py [--root CHECKOUT] [--step]

Counted in the program's files (not tests, benchmarks or lessons): Python files in the root; syntax nodes a code line;
lines of over 100 columns; lines that are a comment; places that ask which method trains, outside methods.py; places
that write to the settings; public names that two files or more define. --step also runs a LoRA step on a small model
under a tracer, and counts the files, functions and lines of the program that one optimizer step walks through.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG = 100  # columns
WITHOUT_TEXT = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)  # nodes that are no word
NOT_PROGRAM = ("tests", "benchmarks", "lessons", "assets")
SETTINGS = ("flags", "settings", "config")  # names of variables that hold them
METHOD = ("lora", "method", "quant", "trains_adapter")  # attributes of the settings by which a method is recognized
RECIPES = (*SETTINGS, "setup", "recipe")
LOOPS = ("optimize", "train_loop")  # what the loop has been called
BETWEEN_STEPS = ("after_step", "validate", "save", "run", "flush")  # what is no part of a step, called by the loop


def program_files(root: Path) -> list[Path]:
    """The program's Python files that git knows, relative to the checkout's root."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split() if Path(name).parts[0] not in NOT_PROGRAM]


def code_lines(source: str) -> set[int]:
    """The numbers of lines that hold code: not blank, not a comment, not a docstring."""
    lines: set[int] = set()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def public_names(tree: ast.Module) -> set[str]:
    """The names without a leading underscore that a file defines at its top: functions, classes, constants."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = [each for target in node.targets for each in getattr(target, "elts", [target])]
            names.update(each.id for each in targets if isinstance(each, ast.Name))
    return {name for name in names if not name.startswith("_") and name != "main"}


def writes_to_settings(tree: ast.Module) -> int:
    """Assignments to an attribute of a variable that holds the settings, and calls of setattr with one."""
    count = 0
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if is_single(node) else []
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                count += isinstance(each, ast.Attribute) and is_settings(each.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            count += is_settings(node.args[0])
    return count


def places_that_ask(tree: ast.Module) -> int:
    """Conditions, comparisons and products with a truth value that look at the method of the settings."""
    asking: set[ast.AST] = set()
    for node in ast.walk(tree):
        conditions = []
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            conditions = [node.test]
        elif isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp) or is_product(node):
            conditions = [node]
        elif isinstance(node, ast.comprehension):
            conditions = node.ifs
        for condition in conditions:
            asking.update(each for each in ast.walk(condition) if isinstance(each, ast.Attribute))
    looked_up = {each for node in ast.walk(tree) if isinstance(node, ast.Subscript) for each in ast.walk(node.slice)}
    return sum(
        each.attr in METHOD and isinstance(each.value, ast.Name) and each.value.id in RECIPES
        for each in asking - looked_up
    )


def is_product(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)


def is_single(node: ast.AST) -> bool:
    return isinstance(node, ast.AugAssign | ast.AnnAssign)


def is_settings(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in SETTINGS


def figures(root: Path) -> dict[str, str]:
    nodes = code = total = long = comments = asks = writes = 0
    definitions: dict[str, list[str]] = defaultdict(list)
    files = program_files(root)
    for file in files:
        source = (root / file).read_text(encoding="utf-8")
        tree = ast.parse(source)
        lines = source.splitlines()
        nodes += sum(not isinstance(node, WITHOUT_TEXT) for node in ast.walk(tree))
        code += len(code_lines(source))
        total += len(lines)
        long += sum(len(line) > LONG for line in lines)
        comments += sum(line.lstrip().startswith("#") for line in lines)
        writes += writes_to_settings(tree)
        if file.name != "methods.py":
            asks += places_that_ask(tree)
        for name in public_names(tree):
            definitions[name].append(str(file))
    twice = sorted(name for name, places in definitions.items() if len(places) > 1)
    return {
        "Python files in the root": str(sum(len(file.parts) == 1 for file in files)),
        "Python files, lines, code lines": f"{len(files)}, {total:,}, {code:,}",
        "syntax nodes a code line": f"{nodes / code:.2f}",
        f"lines of over {LONG} columns": f"{100 * long / total:.1f} %",
        "comment lines": f"{100 * comments / total:.1f} %",
        "places that ask for the method": str(asks),
        "writes to settings": str(writes),
        "public names defined twice": f"{len(twice)} ({', '.join(twice[:12])}{', ...' if len(twice) > 12 else ''})",
    }


TRACER = """
import json, sys
from pathlib import Path
root, out, loops, outside = Path(sys.argv[1]), sys.argv[2], *(set(words.split()) for words in sys.argv[3:5])
sys.path.insert(0, str(root))
seen, steps = {}, []

def inside(frame):
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if file.startswith(str(root)) and name in outside:
            return False
        if name in loops:
            return True
        frame = frame.f_back
    return False

def lines_of(frame, event, _):
    if event == "line":
        key = frame.f_code.co_filename, frame.f_code.co_qualname
        seen.setdefault(key, set()).add(frame.f_lineno)
    return lines_of

def calls(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(str(root)) and inside(frame):
        return lines_of

import train
sys.argv = ["train.py", *sys.argv[5:]]
import threading
sys.settrace(calls)
threading.settrace(calls)
train.main()
sys.settrace(None)
files = {file for file, _ in seen}
counts = len(files), len(seen), sum(map(len, seen.values()))
Path(out).write_text(json.dumps([counts, sorted(str(Path(file).relative_to(root)) for file in files)]))
"""


def walk_of_a_step(root: Path) -> dict[str, str]:
    """Files, functions and lines of the program that are executed between the beginning and the end of a LoRA step."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import golden

    with tempfile.TemporaryDirectory(prefix="figures-") as temporary:
        folder = Path(temporary)
        inputs = golden.make_inputs(folder)
        words = ["--rank", "4", "--data", inputs["DATA"], "--model", inputs["MODEL"], "--val", inputs["VAL"]]
        words += (
            "--dtype fp32 --batch-size 6 --accumulate 2 --steps 2 --eval-every 0 --device cpu --compile off".split()
        )
        words += ["--save-every", "0", "--out", folder / "run"]
        out = folder / "counts.json"
        line = [sys.executable, "-c", TRACER, root, out, " ".join(LOOPS), " ".join(BETWEEN_STEPS), *words]
        subprocess.run(list(map(str, line)), check=True, capture_output=True, cwd=root)
        (files, functions, lines), names = json.loads(out.read_text())
    return {
        "files, functions, lines of a LoRA step": f"{files}, {functions}, {lines}",
        "its files": ", ".join(names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to look at (default: this one)")
    parser.add_argument("--step", action="store_true", help="trace a training step as well")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    result = figures(root) | (walk_of_a_step(root) if arguments.step else {})
    for name, value in result.items():
        print(f"{name:42}{value}")


if __name__ == "__main__":
    main()
