"""How much of a text's words another one has: BLEU, chrF, ROUGE and METEOR, by the field's packages.

    bleu     Papineni et al. 2002, by sacrebleu (Post 2018), of all answers together
    chrf     Popovic 2015: of characters; chrF++ of words as well; by sacrebleu
    rouge    Lin 2004: of single words, pairs and the longest common subsequence; by rouge-score
    meteor   Lavie and Agarwal 2007: words, their stems and synonyms in order; by nltk

What a number depends on besides the texts, the packages' own signatures and settings, is printed
below the table, since numbers of other settings don't compare.
"""

import contextlib
import os
import re
import warnings
from importlib.metadata import version
from pathlib import Path

from common.progress import progress
from evals.answers import Answers
from evals.scores import ItemScores

ROUGE_KINDS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
# Where Debian's package wordnet-base puts WordNet 3.0; WordNet's own variable names another folder.
DEBIAN_WORDNET = "/usr/share/wordnet"
WORDNET_VARIABLE = "WNSEARCHDIR"
# Where nltk.download("wordnet") puts it, in one of nltk's folders: nltk reads it out of the archive too.
NLTK_WORDNETS = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")
# The groups of synsets, which nltk's reader wants in a file that Debian leaves out. Their names have
# no part in METEOR.
NUM_LEXNAMES = 45


# ---- BLEU and chrF ----


def bleu_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by BLEU of them all. The number of each answer is its sentence BLEU."""
    # Imported here, since --help and other evaluations need none of it.
    from sacrebleu.metrics import BLEU

    tokenizer = answers.options.get("bleu_tokenizer") or "13a"
    streams = reference_streams(answers.references)
    corpus = BLEU(tokenize=tokenizer)
    score = corpus.corpus_score(answers.texts, streams)
    # Of one sentence, orders that it is too short for do not count.
    sentence = BLEU(tokenize=tokenizer, effective_order=True)
    items = []
    for text, references in zip(answers.texts, answers.references, strict=True):
        items.append(part_of_100(sentence.sentence_score(text, references).score))
    columns = {"BLEU": score.score}
    for order, precision in enumerate(score.precisions, 1):
        columns[f"{order}-gram %"] = precision
    columns |= {"brevity penalty": score.bp, "length ratio": score.sys_len / max(score.ref_len, 1)}
    formats = dict.fromkeys(columns, ".2f") | {"brevity penalty": ".3f", "length ratio": ".3f"}
    notes = [f"sacrebleu {corpus.get_signature()}"]
    return ItemScores({"sentence bleu": items}, columns, formats, notes)


def chrf_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by chrF2 and chrF2++ of them all. The number of each answer is its own chrF2."""
    from sacrebleu.metrics import CHRF

    streams = reference_streams(answers.references)
    characters = CHRF()
    with_words = CHRF(word_order=2)
    columns = {
        "chrF2": characters.corpus_score(answers.texts, streams).score,
        "chrF2++": with_words.corpus_score(answers.texts, streams).score,
    }
    # Another one, since a signature says how many references were scored last.
    sentence = CHRF()
    items = []
    for text, references in zip(answers.texts, answers.references, strict=True):
        items.append(part_of_100(sentence.sentence_score(text, references).score))
    notes = []
    for name, metric in (("chrF2", characters), ("chrF2++", with_words)):
        notes.append(f"sacrebleu {name}: {metric.get_signature()}")
    return ItemScores({"sentence chrf": items}, columns, dict.fromkeys(columns, ".2f"), notes)


def reference_streams(references: list[list[str]]) -> list[list[str | None]]:
    """Returns the first reference of each record, the second, ..., with None where it has no such
    one: the form that sacrebleu wants."""
    most = max(len(accepted) for accepted in references)
    streams: list[list[str | None]] = []
    for number in range(most):
        stream = [accepted[number] if number < len(accepted) else None for accepted in references]
        streams.append(stream)
    return streams


def part_of_100(score: float) -> float:
    """Returns a score of up to 100 as one of up to 1. The score of equal texts may be above 100, by
    rounding."""
    return min(1.0, round(score / 100, 12))


# ---- ROUGE ----


def rouge_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by the F1 of ROUGE-1, -2, -L and -Lsum, each that of the best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([*ROUGE_KINDS], use_stemmer=True)
    items: dict[str, list[float]] = {kind: [] for kind in ROUGE_KINDS}
    with progress("scoring", len(answers), "answer") as bar:
        for text, references in zip(answers.texts, answers.references, strict=True):
            scores = scorer.score_multi(references, text)
            for kind, score in scores.items():
                items[kind].append(score.fmeasure)
            bar.update()
    columns = {}
    for kind, heading in ROUGE_KINDS.items():
        columns[heading] = 100 * sum(items[kind]) / len(answers)
    note = (
        f"rouge-score {version('rouge-score')}: F1, Porter stemmer, the best of an answer's references;"
        " Lsum takes each line as a sentence"
    )
    notes = [note]
    num_unread = 0
    for accepted in answers.references:
        num_unread += not any(re.search("[a-z0-9]", each.lower()) for each in accepted)
    if num_unread:
        notes.append(
            f"NOTE: rouge-score reads the letters a to z and digits only, and the references of"
            f" {num_unread:,} of {len(answers):,} records hold none: their score is 0. Use `chrf`"
        )
    return ItemScores(items, columns, dict.fromkeys(columns, ".2f"), notes)


# ---- METEOR ----


def meteor_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by METEOR, of the best reference, and says which of its stages ran."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import meteor_score

    wordnet, place = find_wordnet()
    split = NLTKWordTokenizer().tokenize
    items = []
    with progress("scoring", len(answers), "answer") as bar:
        for text, references in zip(answers.texts, answers.references, strict=True):
            accepted = [split(reference) for reference in references]
            items.append(meteor_score(accepted, split(text), wordnet=wordnet))
            bar.update()
    columns = {"METEOR": 100 * sum(items) / len(items)}
    stages = f"exact, stem, synonym (WordNet in {place})"
    if place is None:
        stages = (
            "exact, stem; not synonym, since no WordNet is installed (Debian's wordnet-base, or"
            f" its folder in {WORDNET_VARIABLE}), so the number is a little low"
        )
    note = (
        f"nltk {version('nltk')}: METEOR with alpha 0.9, beta 3, gamma 0.5, words by"
        f" NLTKWordTokenizer, the best of an answer's references; stages: {stages}"
    )
    notes = [note]
    return ItemScores({"meteor": items}, columns, {"METEOR": ".2f"}, notes)


class NoSynonyms:
    """Stands for WordNet where there is none."""

    def synsets(self, word: str) -> list:
        """Returns nothing: no word has a synonym."""
        return []


def find_wordnet():
    """Returns nltk's reader of WordNet and where WordNet is; without one, a reader that knows no
    synonyms, and None."""
    import nltk

    folder = Path(os.environ.get(WORDNET_VARIABLE) or DEBIAN_WORDNET)
    if (folder / "data.noun").is_file():
        return read_wordnet(folder), str(folder)
    for name in NLTK_WORDNETS:
        with contextlib.suppress(LookupError):
            place = nltk.data.find(name)
            return read_wordnet(place), str(place)
    return NoSynonyms(), None


def read_wordnet(folder):
    """Returns nltk's reader of the WordNet files in a folder, as Princeton publishes them. folder: a Path,
    or what nltk.data.find returns."""
    import io

    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class FolderReader(WordNetCorpusReader):
        """The reader, with a list of lexnames where the folder has none, and no other languages."""

        def open(self, file):
            has_list = not isinstance(folder, Path) or (folder / file).is_file()
            if file == "lexnames" and not has_list:
                return io.StringIO("".join(f"{i:02d}\tgroup{i}\t1\n" for i in range(NUM_LEXNAMES)))
            return super().open(file)

        def map_wn(self, version="wordnet"):
            """Maps nothing: other languages' data, which would be mapped, are not there."""

    root = folder
    if isinstance(folder, Path):
        # nltk opens no file outside the folders that it was told of.
        if str(folder) not in nltk.data.path:
            nltk.data.path.append(str(folder))
        root = str(folder)
    with warnings.catch_warnings():
        # It says that there are no other languages, which METEOR does not ask for.
        warnings.simplefilter("ignore")
        return FolderReader(root, None)
