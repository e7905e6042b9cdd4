"""How similar a program is to a reference: CodeBLEU (Ren et al. 2020), by the codebleu package.

Its four parts, each in a column of its own: the n-grams of BLEU, n-grams in which the language's
keywords weigh five times as much, subtrees of the syntax tree, and the flow of data between
variables. CodeBLEU is their mean. No program is run, and nothing is fetched: the grammar is an
installed package, tree-sitter-python for Python.

It says how alike two programs look. Whether one works, only running it says.
"""

import logging
import re
from importlib import import_module
from importlib.metadata import version

from common.errors import UserError
from common.progress import progress
from evals.answers import Answers
from evals.scores import Scores

# {column: the package's name of it}
CODEBLEU_PARTS = {
    "CodeBLEU %": "codebleu",
    "n-grams %": "ngram_match_score",
    "weighted n-grams %": "weighted_ngram_match_score",
    "syntax %": "syntax_match_score",
    "data flow %": "dataflow_match_score",
}
# The first block of code between fences, as chat models write it; its end may have been cut off.
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_similarity_scores(answers: Answers) -> Scores:
    """Scores answers by CodeBLEU of all, and of each."""
    from codebleu import calc_codebleu

    language = answers.options.get("code_language") or "python"
    check_grammar(language)
    programs = [fenced_code(text) for text in answers.texts]
    num_fenced = sum(code != text for code, text in zip(programs, answers.texts, strict=True))
    references = []
    for accepted in answers.references:
        references.append([fenced_code(reference) for reference in accepted])
    # It warns at each program without a flow of data; the note below says it once.
    logging.disable(logging.WARNING)
    try:
        whole = calc_codebleu(references, programs, language)
        items = []
        with progress("scoring", len(answers), "answer") as bar:
            for program, accepted in zip(programs, references, strict=True):
                score = calc_codebleu([accepted], [program], language)["codebleu"]
                items.append(min(1.0, round(score, 12)))
                bar.update()
    finally:
        logging.disable(logging.NOTSET)
    columns = {heading: 100 * whole[part] for heading, part in CODEBLEU_PARTS.items()}
    note = (
        f"codebleu {version('codebleu')}, {language}: a quarter each of n-grams, weighted n-grams, syntax"
        f" and data flow; code taken from between ``` in {num_fenced:,} of {len(answers):,} answers"
    )
    notes = [note]
    if whole["dataflow_match_score"] == 0:
        notes.append("NOTE: the data flow is 0, and codebleu then counts it as 1 in the mean")
    return Scores({"code similarity": items}, columns, dict.fromkeys(columns, ".2f"), notes)


def fenced_code(text: str) -> str:
    """Returns the first block of code that a text has between fences; the text if it has none."""
    block = FENCED.search(text)
    return block[1] if block else text


def check_grammar(language: str) -> None:
    """Raises UserError where the grammar of a language is not installed."""
    package = f"tree_sitter_{language}"
    try:
        import_module(package)
    except ImportError:
        name = package.replace("_", "-")
        raise UserError(
            f"--code-language {language}: its grammar is not installed; pip install {name}"
        ) from None
