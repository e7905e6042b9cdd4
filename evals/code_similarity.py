"""How similar a program is to a reference: CodeBLEU (Ren et al. 2020), by the codebleu package.

Its four parts, each in a column of its own: the n-grams of BLEU, n-grams in which the language's
keywords weigh five times as much, subtrees of the syntax tree, and the flow of data between
variables. Of several references all count at once, as the package has it, so that an answer equal to
one of two need not have 100 %. CodeBLEU is the mean of the parts, as in the paper; where no reference
has a flow of data, that of the other three. (The package counts a flow of 0 as 1 in the mean, so that
an empty answer would have 25 %.) No program is run, and nothing is fetched: the grammar is an installed
package, tree-sitter-python for Python.

It says how alike two programs look. Whether one works, only running it says.
"""

import logging
import re
from importlib import import_module
from importlib.metadata import version

from common.errors import UserError
from common.progress import progress
from evals.answers import Answers
from evals.scores import ItemScores
from evals.text_overlap import part_of_100

# {column: the package's name of it}
CODEBLEU_PARTS = {
    "n-grams %": "ngram_match_score",
    "weighted n-grams %": "weighted_ngram_match_score",
    "syntax %": "syntax_match_score",
    "data flow %": "dataflow_match_score",
}
# The first block of code between fences, as chat models write it; its end may have been cut off.
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_similarity_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by CodeBLEU of all, and of each."""
    language = answers.options.get("code_language") or "python"
    check_grammar(language)
    programs = [fenced_code(text) for text in map(encodable, answers.texts)]
    num_fenced = sum(code != text for code, text in zip(programs, answers.texts, strict=True))
    references = []
    for accepted in answers.references:
        references.append([fenced_code(reference) for reference in map(encodable, accepted)])
    # It warns at each program without a flow of data; the note below says it once.
    logging.disable(logging.WARNING)
    try:
        whole = codebleu_parts(programs, references, language)
        items = []
        num_without_flow = 0
        with progress("scoring", len(answers), "answer") as bar:
            for program, accepted in zip(programs, references, strict=True):
                parts = codebleu_parts([program], [accepted], language)
                num_without_flow += "data flow %" not in parts
                items.append(part_of_100(mean_of(parts)))
                bar.update()
    finally:
        logging.disable(logging.NOTSET)
    columns = {"CodeBLEU %": mean_of(whole)}
    columns |= dict.fromkeys(CODEBLEU_PARTS, 0.0) | whole
    note = (
        f"codebleu {version('codebleu')}, {language}: the mean of n-grams, weighted n-grams, syntax and data"
        f" flow; code taken from between ``` in {num_fenced:,} of {len(answers):,} answers; no data flow in"
        f" the references of {num_without_flow:,}"
    )
    return ItemScores({"code similarity": items}, columns, dict.fromkeys(columns, ".2f"), [note])


def codebleu_parts(
    programs: list[str], references: list[list[str]], language: str
) -> dict[str, float]:
    """Returns the parts of CodeBLEU of some programs, in per cent; without the flow of data where no
    reference has one."""
    # Imported here, since --help and other evaluations need none of it.
    from codebleu import calc_codebleu
    from codebleu.dataflow_match import corpus_dataflow_match
    from codebleu.utils import get_tree_sitter_language

    score = calc_codebleu(references, programs, language)
    parts = {heading: 100 * score[part] for heading, part in CODEBLEU_PARTS.items()}
    if parts["data flow %"] == 0:
        # 0 is also what it says of a reference that has none, which then does not match itself.
        each = [reference for accepted in references for reference in accepted]
        alone = [[reference] for reference in each]
        grammar = get_tree_sitter_language(language)
        if not corpus_dataflow_match(alone, each, language, tree_sitter_language=grammar):
            del parts["data flow %"]
    return parts


def encodable(text: str) -> str:
    """Returns a text in which what UTF-8 can't hold (half of a surrogate pair, which JSON can) is a
    question mark: the package takes bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def mean_of(parts: dict[str, float]) -> float:
    """Returns the mean of some parts."""
    return sum(parts.values()) / len(parts)


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
