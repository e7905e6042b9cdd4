"""EVALUATIONS: a row for each thing that evaluate.py measures on a file of examples; and COMMANDS, what
else it does.

Nothing is imported here that takes time, since --help is written from the rows; a row's function is
imported when it is called.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

# The loops of evaluate.py. LOSS reads the references. GENERATE lets the model answer, and compares
# the answers with the references. CHOOSE asks how probable the model finds each of some choices.
# EXECUTE lets the model write programs, and runs them.
LOSS, GENERATE, CHOOSE, EXECUTE = "loss", "generate", "choose", "execute"


class Evaluation(NamedTuple):
    """How one thing is measured.

    kind: the loop of evaluate.py that measures it.
    function: "module:name" of the function that the loop calls. For LOSS: of a model, a dataset and
        a batch size; returns ExampleLosses. For GENERATE: of the answers (evals/answers.py); returns
        ItemScores. For CHOOSE: of the command line and what it opened (evals/targets.py); returns a
        ChoiceTask (evals/choices.py). For EXECUTE: of tested programs (evals/pass_at_k.py) and the
        values of k; returns ItemScores.
    help: what --help says of it.
    check: "module:name" of a function of (references, where) that raises UserError where the
        evaluation can't use the references of the record at that place; called before a model is
        loaded. "": it can use any.
    score: for GENERATE, the heading of the column that is the evaluation's one number: the higher,
        the better. train.py --eval-metric keeps the best weights by it.
    """

    kind: str
    function: str
    help: str
    check: str = ""
    score: str = ""

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
        "evals.loss:example_losses",
        "how probable the model finds the reference answers, every one of a conversation, as the mean"
        " of -log p for each token (in nats, lower is better), as perplexity, its exponential, and in"
        " bits for each byte of the text, which compares models whose tokens differ",
    ),
    "exact": Evaluation(
        GENERATE,
        "evals.exact_match:exact_scores",
        "the model writes the answers itself, always taking the most probable token, and an answer is"
        " right if it equals the reference, apart from spaces and line ends around it; this takes"
        " longer, and is for tasks with one right answer",
        score="exact %",
    ),
    "f1": Evaluation(
        GENERATE,
        "evals.squad_f1:f1_scores",
        "the words that answer and reference share, as SQuAD counts them (F1), and exact match without"
        " case, punctuation and articles; for short answers to questions",
        score="F1 %",
    ),
    "numeric": Evaluation(
        GENERATE,
        "evals.numeric_answer:numeric_scores",
        "the first number behind #### in the answer, else its last number, is that of the reference"
        " (GSM8K)",
        "evals.numeric_answer:check_number",
        score="numeric %",
    ),
    "bleu": Evaluation(
        GENERATE,
        "evals.text_overlap:bleu_scores",
        "BLEU of all answers together, by sacrebleu; for translations",
        score="BLEU",
    ),
    "chrf": Evaluation(
        GENERATE,
        "evals.text_overlap:chrf_scores",
        "chrF2 and chrF2++, of characters and words, by sacrebleu; for translations",
        score="chrF2",
    ),
    "rouge": Evaluation(
        GENERATE,
        "evals.text_overlap:rouge_scores",
        "ROUGE-1, -2, -L and -Lsum (F1), by rouge-score; for summaries in English",
        score="ROUGE-1",
    ),
    "meteor": Evaluation(
        GENERATE,
        "evals.text_overlap:meteor_scores",
        "METEOR, which also matches stems and, where WordNet is installed, synonyms; by nltk",
        score="METEOR",
    ),
    "code-similarity": Evaluation(
        GENERATE,
        "evals.code_similarity:code_similarity_scores",
        "CodeBLEU and its four parts: how alike two programs look, none of which is run",
        score="CodeBLEU %",
    ),
    "json": Evaluation(
        GENERATE,
        "evals.json_fields:json_scores",
        "the answer is JSON, its fields those of the reference (precision, recall, F1), the whole value"
        " right",
        "evals.json_fields:check_json",
        score="F1 %",
    ),
    "tools": Evaluation(
        GENERATE,
        "evals.tool_calls:tools_scores",
        "the answer calls the tools that the reference calls, with equal arguments; also for BFCL's"
        " files, with their folder possible_answer beside them",
        score="right %",
    ),
    "choices": Evaluation(
        CHOOSE,
        "evals.multiple_choice:read_choice_task",
        "multiple choice, as lm-evaluation-harness measures it: which of some answers the model finds"
        " most probable. --data is the released file of HellaSwag, ARC, OpenBookQA, QASC or"
        " TruthfulQA (mc_task.json), the folder of MMLU (with dev/ and test/), or a file of yours"
        " (--task). acc: the share of right choices; acc_norm, acc_bytes: with log-probabilities"
        " divided by the length of the choice, in characters or bytes; ±: the standard error",
    ),
    "classify": Evaluation(
        CHOOSE,
        "evals.classification:read_classes",
        "classification: which of the labels, all answers that occur in --data, the model finds most"
        " probable after each text; accuracy, precision, recall, F1, ROC-AUC, calibration error and"
        " confusion matrix",
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
COMMANDS: dict[str, Command] = {
    "pairs": Command(
        "evals.pairwise:pairs_arguments",
        "evals.pairwise:make_pairs_page",
        "makes a page on which people judge two models' answers side by side, blinded",
    ),
    "tally": Command(
        "evals.tally:tally_arguments",
        "evals.tally:print_tally",
        "counts the judgements that people export from such pages",
    ),
    "compare": Command(
        "evals.compare_arguments:compare_arguments",
        "evals.compare:compare_models",
        "a model before and after its training: what it has learned and what it has forgotten, with"
        " confidence intervals, and the answers that changed",
    ),
    "continual": Command(
        "evals.continual_arguments:continual_arguments",
        "evals.continual:print_transfer",
        "tasks that were trained one after the other: each after each training, average accuracy, transfer"
        " and forgetting",
    ),
    "report": Command(
        "evals.report_arguments:report_arguments",
        "evals.side_by_side:report_runs",
        "runs of train.py side by side: losses, settings that differ, and a page with their curves",
    ),
    "refusals": Command(
        "evals.safety_arguments:refusals_arguments",
        "evals.safety:measure_refusals",
        "does the model refuse harmful prompts, and only those (AdvBench, XSTest)",
    ),
    "toxicity": Command(
        "evals.safety_arguments:toxicity_arguments",
        "evals.toxicity:measure_toxicity",
        "how toxic the worst of several continuations is (RealToxicityPrompts)",
    ),
    "probe": Command(
        "evals.safety_arguments:probe_arguments",
        "evals.probe:measure_probe",
        "open questions that look for broad misalignment after a narrow training",
    ),
    "judge": Command(
        "evals.safety_arguments:judge_arguments",
        "evals.safety:measure_judged",
        "answers judged by a Python function of yours: style, persona, anything",
    ),
}
