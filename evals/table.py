"""EVALUATIONS: a row for each thing that evaluate.py measures on a file of examples; and COMMANDS, what
else it does.

Nothing is imported here that takes time, since --help is written from the rows; a row's function is
imported when it is called.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

# The loops of evaluate.py. LOSS reads the references. GENERATE lets the model answer, and compares
# the answers with the references. EXECUTE lets the model write programs, and runs them.
LOSS, GENERATE, EXECUTE = "loss", "generate", "execute"


class Evaluation(NamedTuple):
    """How one thing is measured.

    kind: the loop of evaluate.py that measures it.
    function: "module:name" of the function that the loop calls. For LOSS: of a model, a dataset and
        a batch size; returns the row of the table. For GENERATE: of the answers (evals/answers.py);
        returns Scores. For EXECUTE: of tested programs (evals/pass_at_k.py) and the values of k;
        returns Scores.
    help: what --help says of it.
    """

    kind: str
    function: str
    help: str

    def load(self) -> Callable:
        """Returns the function."""
        return imported(self.function)


class Command(NamedTuple):
    """A first word of evaluate.py's command line that has options of its own.

    arguments: "module:name" of the function that parses the words behind it; its module imports
        nothing that takes time.
    function: "module:name" of the function that carries it out, given what was parsed.
    help: what --help says of it.
    """

    arguments: str
    function: str
    help: str


def imported(path: str) -> Callable:
    """Imports the function that "module:name" names."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


EVALUATIONS = {
    "loss": Evaluation(
        LOSS,
        "evals.loss:loss",
        "how probable the model finds the reference answers, every one of a conversation, as the mean"
        " of -log p for each token (in nats, lower is better) and as perplexity, its exponential",
    ),
    "exact": Evaluation(
        GENERATE,
        "evals.exact_match:exact_scores",
        "the model writes the answers itself, always taking the most probable token, and an answer is"
        " right if it equals the reference, apart from spaces and line ends around it; this takes"
        " longer, and is for tasks with one right answer",
    ),
    "pass-at-k": Evaluation(
        EXECUTE,
        "evals.pass_at_k:pass_at_k_scores",
        "the model writes programs for the problems of HumanEval or MBPP, in the formats of their"
        " files, and the tests of the file are run on them: pass@k is the share of problems that"
        " are solved within k attempts",
    ),
}

# {word: the command}, as in `evaluate.py compare BASE TUNED`.
COMMANDS: dict[str, Command] = {}
