"""What is no matter of taste about the house: which files the root holds, which way imports run, and that names are
unique. Everything else is for reviewers."""

import ast
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from support.figures import public_names

ROOT = Path(__file__).resolve().parents[1]
ROOT_FILES = {
    *("train.py", "flags.py", "model.py", "families.py", "decoding.py", "lora.py", "methods.py", "adapters.py"),
    "adapter_files.py",
    *("quant.py", "data.py", "tokenizer.py", "checkpoint.py", "objectives.py", "optimizers.py", "distributed.py"),
    *("evaluate.py", "generate.py", "convert.py", "sweep.py"),
}
ROOMS = {"kernels", "training", "planning", "dataset", "tokenization", "adapting", "interop", "evals", "common"}
OTHER_FOLDERS = {"assets", "benchmarks", "docs", "experiments", "lessons", "tests", ".ci", ".github"}

# A file imports from levels below its own, and from none above. A room's files are on the room's level, and import each
# other; so do files that are named here together with the room they belong to.
LEVELS = (
    ("common",),
    ("kernels", "families"),
    ("quant", "distributed"),
    ("decoding",),
    ("model",),
    ("checkpoint", "tokenization", "tokenizer"),
    ("adapter_files",),
    ("adapting",),
    ("lora", "adapters", "optimizers", "dataset"),
    ("methods",),
    ("flags",),
    ("interop", "data"),
    ("objectives", "planning"),
    ("evals", "training"),
    ("train", "evaluate", "generate", "convert", "sweep"),
)
# Pairs of (importer, imported) on one level.
WITHIN_A_LEVEL = {("checkpoint", "tokenizer"), ("tokenizer", "tokenization"), ("training", "evals")}
WITHIN_A_LEVEL |= {("data", "interop")}
SCRIPTS_IN_ROOMS = {"kernels/bench.py"}  # started by hand: it measures the kernels beside what uses them
# Names of pip packages that program, tests or benchmarks import, and of standard modules: a folder or file of ours that
# had such a name would be imported in their place.
TAKEN = {"gguf", "tokenizers", "datasets", "transformers", "peft", "trl", "wandb", "inspect", "tokenize", "code"}
TAKEN |= {"profile", "signal", "queue", "types", "select"}


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if not path.parts[-2].startswith("."))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in listed.splitlines()]


def program() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and (path.parts[0] in ROOMS or len(path.parts) == 1)]


def level_of(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def own_imports(path: Path) -> set[str]:
    """The root files and rooms that a file imports when it is imported, or later inside a function."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    main_guard = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    ignored = {each for node in main_guard for each in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    own = {name for names in LEVELS for name in names}
    return names & own


def test_the_root_holds_twenty_files_at_most():
    files = {path.name for path in tracked() if len(path.parts) == 1 and path.suffix == ".py"}
    assert files <= ROOT_FILES and len(ROOT_FILES) <= 20


def test_rooms_are_one_level_deep_and_known():
    folders = {path.parts[0] for path in tracked() if len(path.parts) > 1}
    assert folders <= ROOMS | OTHER_FOLDERS
    assert [path for path in program() if len(path.parts) > 2] == []


@pytest.mark.parametrize("path", program(), ids=str)
def test_imports_run_downwards(path):
    if str(path) in SCRIPTS_IN_ROOMS:
        return
    mine = path.parts[0].removesuffix(".py")
    for other in own_imports(path) - {mine}:
        if (mine, other) in WITHIN_A_LEVEL:
            continue
        assert level_of(other) < level_of(mine), f"{path} imports {other}, which is not below it"


def test_no_name_takes_a_package_s_place():
    names = {path.parts[0].removesuffix(".py") for path in tracked()}
    assert names & TAKEN == set()


def test_scripts_do_not_import_each_other():
    scripts = LEVELS[-1]
    for name in scripts:
        path = Path(f"{name}.py")
        if (ROOT / path).is_file():
            assert own_imports(path) & {*scripts} <= {name}


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [module for module in modules if module.startswith("test_")], path.name


def test_a_public_name_is_defined_once():
    places = defaultdict(list)
    for path in program():
        for name in public_names(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            places[name].append(str(path))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
