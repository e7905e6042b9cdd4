"""The scores of answers against their references: each number that of the field's tool, or of an independent
computation; the edge cases; the references that an evaluation can't use."""

import json
import random
import re
import shutil
import string
from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import nltk
import pytest
import sacrebleu
from codebleu import bleu as codebleu_bleu
from codebleu import calc_codebleu
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.translate.meteor_score import meteor_score
from rouge_score import rouge_scorer
from support.helpers import sentence

from common.errors import UserError
from dataset.records import Record
from evals.answers import Answers
from evals.bfcl import accepts_calls
from evals.code_similarity import code_similarity_scores
from evals.exact_match import exact_scores
from evals.json_fields import check_json, json_scores
from evals.numeric_answer import check_number, final_number, numeric_scores
from evals.squad_f1 import f1_scores
from evals.text_overlap import bleu_scores, chrf_scores, find_wordnet, meteor_scores, rouge_scores
from evals.tool_calls import Call, read_calls, tools_scores

WORDS = "the a an The cat cats, Dog! 3 4.5 running runs été 東京 it's -- U.S. quick naïve x".split()
EDGES = [
    ("", ["the"]),
    ("the", ["The!"]),
    ("", ["x"]),
    ("x", ["!!"]),
    ("A cat.", ["a  CAT"]),
    ("東京タワー", ["東京タワー", "東京"]),
    ("same same", ["same"]),
    ("it's", ["its"]),
    ("été\u0301", ["été"]),
    ("a\nb\n\nc", ["a b", "b c"]),
]


def random_cases(count: int = 250) -> list[tuple[str, list[str]]]:
    """Texts with one to three references that share words with them."""
    rng = random.Random(7)
    cases = list(EDGES)
    for _ in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(12)))
        references = []
        for _ in range(rng.randrange(1, 4)):
            words = text.split() if rng.random() < 0.5 else []
            words += rng.choices(WORDS, k=rng.randrange(1, 8))
            rng.shuffle(words)
            references.append(" ".join(words))
        cases.append((text, references))
    return cases


CASES = random_cases()


def answers_of(cases) -> Answers:
    records = []
    for i, (_, references) in enumerate(cases):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": references[0]}]
        records.append(Record(messages, None, f"record {i}"))
    return Answers(records, [references for _, references in cases], [text for text, _ in cases], 1.0)


# ---- SQuAD ----


def official_normalize(s: str) -> str:
    """SQuAD 2.0's script, written anew: lower, no punctuation, no articles, single spaces."""
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())


def official_f1(gold: str, answer: str) -> float:
    gold_words, words = official_normalize(gold).split(), official_normalize(answer).split()
    same = sum((Counter(gold_words) & Counter(words)).values())
    if len(gold_words) == 0 or len(words) == 0:
        return int(gold_words == words)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(words), 1.0 * same / len(gold_words)
    return (2 * precision * recall) / (precision + recall)


def test_f1_and_exact_match_are_squads_item_by_item():
    scores = f1_scores(answers_of(CASES))
    f1 = [max(official_f1(each, text) for each in accepted) for text, accepted in CASES]
    exact = [max(official_normalize(each) == official_normalize(text) for each in accepted) for text, accepted in CASES]
    assert scores.items["f1"] == pytest.approx(f1, abs=1e-12)
    assert scores.items["squad exact"] == exact
    assert scores.columns["F1 %"] == pytest.approx(100 * sum(f1) / len(CASES))
    assert scores.columns["exact %"] == pytest.approx(100 * sum(exact) / len(CASES))
    assert 0 < sum(exact) < sum(f1) < len(CASES)


def test_a_reference_without_a_word_counts_where_there_is_no_other():
    """As SQuAD 2.0's script leaves out what its normalisation empties."""
    scores = f1_scores(answers_of([("", ["the", "cat"]), ("", ["The", "..."]), ("cat", ["a", "cat"])]))
    assert scores.items["f1"] == scores.items["squad exact"] == [0.0, 1.0, 1.0]


def test_long_negative_numbers_keep_all_digits():
    long = "-1234567890123456789012345678901234"
    assert numeric_scores(answers_of([(f"{long}789", [f"{long}700"]), (f"{long}7", [f"{long}7"])])).items[
        "numeric"
    ] == [
        0.0,
        1.0,
    ]


def test_exact_match_accepts_any_reference_and_keeps_case():
    scores = exact_scores(answers_of([(" b\n", ["a", "b"]), ("B", ["a", "b"])]))
    assert scores.items["exact"] == [1.0, 0.0]


# ---- GSM8K ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7.\n#### 1,234", "1234"),
        ("#### $18.00 or 19 ####", "18"),
        ("#### none, so it is 5 of 6", "5"),
        ("#### none", None),
        ("It is 5. #### so", "5"),
        ("The total is $1,234.50.", "1234.5"),
        ("half of it, .5", "0.5"),
        ("that is -7", "-7"),
        ("that is \u22127 degrees", "-7"),
        ("it lost -$3.20!", "-3.2"),
        ("it lost $-3.20!", "-3.2"),
        ("10-3", "3"),
        ("(10)-3 and x-4", "4"),
        ("between 5 - 3", "3"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("1,234,567 people", "1234567"),
        ("1234,567", "567"),
        ("50%", "50"),
        ("007", "7"),
        ("5.", "5"),
        ("version 1.2.3", "0.3"),
        ("٣", "3"),
        ("", None),
        ("no number", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_equal_as_numbers_and_counted():
    cases = [("so 72.0", ["a\n#### 72"]), ("#### 71 72", ["#### 72"]), ("none", ["#### 72"]), ("$1,000", ["#### 1000"])]
    scores = numeric_scores(answers_of(cases))
    assert scores.items["numeric"] == [1.0, 0.0, 0.0, 1.0]
    assert scores.columns == {"right": 2.0, "of": 4.0, "numeric %": 50.0}
    assert scores.notes == ["numbers behind #### in 1 answers, the last number of a text in 2, no number in 1"]
    marked = [("-1 ####", ["1"]), ("3 #### none", ["3"]), ("#### none", ["3"])]
    note = "numbers behind #### in 0 answers, the last number of a text in 2, no number in 1"
    assert numeric_scores(answers_of(marked)).notes == [note]
    check_number(["none", "1"], "here")
    with pytest.raises(UserError, match="^file line 3: its reference has no number; `numeric`"):
        check_number(["none"], "file line 3")


def test_random_numbers_in_any_writing_are_found():
    rng = random.Random(1)
    for _ in range(300):
        value = rng.choice([-1, 1]) * rng.randrange(10**7) / rng.choice([1, 10, 100])
        digits = f"{abs(value):,}" if rng.random() < 0.5 else f"{abs(value)}"
        written = ("-" if value < 0 else "") + rng.choice(["", "$"]) + digits + rng.choice(["", "%", ".", " apples"])
        text = f"first 12 then {written}"
        assert float(final_number(text)) == value, text
        assert float(final_number(f"x 4\n#### {written}\nand 99")) == value, written


def gsm8k_answer(text: str) -> str | None:
    """The answer of a reference, as GSM8K's own code extracts it."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match.group(1).strip().replace(",", "") if match else None


def test_answers_are_right_where_gsm8ks_own_code_says_so():
    rng = random.Random(17)
    cases = []
    for _ in range(250):
        values = [rng.choice([1, -1]) * rng.randrange(10 ** rng.randrange(1, 6)) for _ in range(3)]
        text, reference = rng.choice([(0, 0), (0, 1), (2, 2), (1, 0)])
        steps = f"So {values[2]} + 3 = <<{values[0]}>> and 50 % of it.\n"
        cases.append((f"{steps}#### {values[text]:,}", [f"{steps}#### {values[reference]}"]))
    scores = numeric_scores(answers_of(cases))
    official = [float(gsm8k_answer(text) == gsm8k_answer(reference)) for text, (reference,) in cases]
    assert scores.items["numeric"] == official and 50 < sum(official) < 200


# ---- sacrebleu ----


def test_bleu_and_chrf_are_sacrebleus_with_its_signatures():
    answers = answers_of(CASES)
    streams = [[accepted[i] if i < len(accepted) else None for _, accepted in CASES] for i in range(3)]
    bleu = sacrebleu.corpus_bleu(answers.texts, streams)
    scores = bleu_scores(answers)
    assert scores.columns["BLEU"] == bleu.score > 1
    assert [scores.columns[f"{n}-gram %"] for n in (1, 2, 3, 4)] == bleu.precisions
    each = [sacrebleu.sentence_bleu(text, accepted).score / 100 for text, accepted in CASES]
    assert scores.items["sentence bleu"] == pytest.approx(each, abs=1e-9)
    version = sacrebleu.__version__
    assert scores.notes == [f"sacrebleu nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"]

    chrf = chrf_scores(answers)
    assert chrf.columns["chrF2"] == sacrebleu.corpus_chrf(answers.texts, streams).score
    assert chrf.columns["chrF2++"] == sacrebleu.corpus_chrf(answers.texts, streams, word_order=2).score
    each = [sacrebleu.sentence_chrf(text, accepted).score / 100 for text, accepted in CASES]
    assert chrf.items["sentence chrf"] == pytest.approx(each, abs=1e-9)
    assert "nw:2" in chrf.notes[1] and "nrefs:var" in chrf.notes[0]


def test_equal_texts_score_1_and_chinese_can_be_split():
    answers = answers_of(
        [("one two three four five", ["no", "one two three four five"]), ("去东京的火车", ["去东京的汽车"])]
    )
    assert bleu_scores(answers).hits == [True, False] == chrf_scores(answers).hits
    before = bleu_scores(answers).items["sentence bleu"][1]
    answers.options["bleu_tokenizer"] = "zh"
    scores = bleu_scores(answers)
    assert scores.items["sentence bleu"][1] > before and "tok:zh" in scores.notes[0]


# ---- rouge-score ----


def test_rouge_is_the_best_reference_of_rouge_score_item_by_item():
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = rouge_scores(answers_of(CASES))
    for kind, heading in zip(kinds, ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"), strict=True):
        each = [max(scorer.score(ref, text)[kind].fmeasure for ref in accepted) for text, accepted in CASES]
        assert scores.items[kind] == pytest.approx(each, abs=1e-12)
        assert scores.columns[heading] == pytest.approx(100 * sum(each) / len(each))
    assert "and the references of 2 of 260 records hold none" in scores.notes[1]


# ---- METEOR ----


@pytest.fixture
def small_wordnet(tmp_path, monkeypatch):
    """WordNet's files, with one meaning, of two words: car and auto."""
    for pos in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{pos}").write_text("")
        (tmp_path / f"index.{pos}").write_text("")
        (tmp_path / f"{pos}.exc").write_text("")
    (tmp_path / "cntlist.rev").write_text("")
    (tmp_path / "data.noun").write_text("00000000 06 n 02 car 0 auto 0 000 | a vehicle  \n")
    (tmp_path / "index.noun").write_text("auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [*nltk.data.path])
    return tmp_path


class NoWordNet:
    def synsets(self, word):
        return []


class OneMeaning:
    """What the small WordNet says."""

    def synsets(self, word):
        names = [SimpleNamespace(name=lambda name=name: name) for name in ("car", "auto")]
        return [SimpleNamespace(lemmas=lambda: names)] if word in ("car", "auto") else []


def nltk_meteor(text: str, references: list[str], wordnet) -> float:
    split = nltk.NLTKWordTokenizer().tokenize
    return meteor_score([split(each) for each in references], split(text), wordnet=wordnet)


def test_meteor_is_nltks_and_says_that_synonyms_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    scores = meteor_scores(answers_of(CASES))
    each = [nltk_meteor(text, accepted, NoWordNet()) for text, accepted in CASES]
    assert scores.items["meteor"] == pytest.approx(each, abs=1e-12)
    assert scores.columns["METEOR"] == pytest.approx(100 * sum(each) / len(each))
    assert "stages: exact, stem; not synonym, since no WordNet is installed" in scores.notes[0]


def test_meteor_matches_synonyms_where_wordnet_is(small_wordnet):
    cases = [("my auto stopped", ["my car stopped"]), ("my bus stopped", ["my car stopped"])]
    scores = meteor_scores(answers_of(cases))
    assert scores.items["meteor"] == [nltk_meteor(*case, OneMeaning()) for case in cases]
    whole, part = scores.items["meteor"]
    assert whole > 0.9 > part
    assert f"stages: exact, stem, synonym (WordNet in {small_wordnet})" in scores.notes[0]


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_meteor_finds_the_wordnet_that_nltk_downloads(small_wordnet, tmp_path_factory, monkeypatch, kind):
    """nltk leaves it in its archive."""
    (small_wordnet / "lexnames").write_text("".join(f"{i:02d}\tgroup{i}\t1\n" for i in range(45)))
    corpora = tmp_path_factory.mktemp("nltk") / "corpora"
    shutil.copytree(small_wordnet, corpora / "wordnet")
    if kind == "archive":
        shutil.make_archive(str(corpora / "wordnet"), "zip", corpora, "wordnet")
        shutil.rmtree(corpora / "wordnet")
    monkeypatch.setenv("WNSEARCHDIR", str(corpora))
    monkeypatch.setattr(nltk.data, "path", [str(corpora.parent)])
    scores = meteor_scores(answers_of([("my auto stopped", ["my car stopped"])]))
    assert scores.items["meteor"] == [nltk_meteor("my auto stopped", ["my car stopped"], OneMeaning())]
    assert f"synonym (WordNet in {corpora}" in scores.notes[0]


DEBIAN_FOLDER = Path("/usr/share/wordnet")


def lexicographer_groups() -> str:
    """WordNet's own list of its 45 groups of synsets, which Debian leaves out: number, name, part of speech."""
    kinds = [3, 3, 4, *[1] * 26, *[2] * 15, 3]
    return "".join(f"{i:02d}\tgroup.{i}\t{kind}\n" for i, kind in enumerate(kinds))


@pytest.mark.skipif(not (DEBIAN_FOLDER / "data.noun").is_file(), reason="needs WordNet (Debian's wordnet-base)")
def test_meteor_with_debians_wordnet_is_nltks_own_on_it_item_by_item(tmp_path, monkeypatch):
    """Over 220 texts in which words stand for their synonyms. nltk's reader gets the files as it wants them, in a
    folder of its own; the synonyms are those that the lines of the files say, too."""
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    shutil.copytree(DEBIAN_FOLDER, tmp_path / "corpora/wordnet")
    (tmp_path / "corpora/wordnet/lexnames").write_text(lexicographer_groups())
    # It maps the synsets of other versions for other languages, by an index that Debian leaves out.
    monkeypatch.setattr(WordNetCorpusReader, "map_wn", lambda *_: None)
    with pytest.warns(UserWarning, match="multilingual"):
        reader = WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)
    # A synset is a line: place, group, kind, number of words in base 16, words and their numbers.
    synsets = []
    for line in (DEBIAN_FOLDER / "data.noun").read_text().splitlines():
        if not line.startswith("  "):
            fields = line.split(" ")
            synsets.append(fields[4 : 4 + 2 * int(fields[3], 16) : 2])
    rng = random.Random(11)
    plain = [words for words in synsets if len(words) > 1 and all(word.isalpha() and word.islower() for word in words)]
    cases = []
    while len(cases) < 220:
        chosen = rng.sample(plain, 4)
        reference = [rng.choice(["the", "a"]) if rng.random() < 0.3 else words[0] for words in chosen]
        text = [words[1] if rng.random() < 0.7 else rng.choice(WORDS) for words in chosen]
        cases.append((" ".join(text), [" ".join(reference), " ".join(rng.sample(text, 4))][: rng.randrange(1, 3)]))
    scores = meteor_scores(answers_of(cases))
    assert f"stages: exact, stem, synonym (WordNet in {DEBIAN_FOLDER})" in scores.notes[0]
    each = [nltk_meteor(text, accepted, reader) for text, accepted in cases]
    assert scores.items["meteor"] == pytest.approx(each, abs=1e-12)
    without = [nltk_meteor(text, accepted, NoWordNet()) for text, accepted in cases]
    assert sum(number > other for number, other in zip(each, without, strict=True)) > 40
    found, _ = find_wordnet()
    for words in rng.sample(plain, 50):
        names = {lemma.name() for synset in found.synsets(words[0]) for lemma in synset.lemmas()}
        assert set(words) <= names


# ---- CodeBLEU ----

PROGRAMS = [
    "def f(a, b):\n    return a + b",
    "def g(x):\n    y = x * 2\n    if y > 3:\n        return y\n    return x",
    "for i in range(10):\n    print(i)",
    "class A:\n    def __init__(self):\n        self.x = 1",
    "import os\npaths = [p for p in os.listdir('.') if p]\nprint(paths)",
    "x = (",
]


def test_code_similarity_has_codebleus_parts_of_all_answers():
    rng = random.Random(3)
    cases = []
    for _ in range(40):
        accepted = rng.sample(PROGRAMS[:5], rng.randrange(1, 3))
        cases.append((rng.choice(PROGRAMS), accepted))
    scores = code_similarity_scores(answers_of(cases))
    hypotheses = [text.split() for text, _ in cases]
    references = [[each.split() for each in accepted] for _, accepted in cases]
    n_grams = codebleu_bleu.corpus_bleu(references, hypotheses)
    assert scores.columns["n-grams %"] == pytest.approx(100 * n_grams)
    parts = ["n-grams %", "weighted n-grams %", "syntax %", "data flow %"]
    mean = sum(scores.columns[part] for part in parts) / 4
    assert scores.columns["CodeBLEU %"] == pytest.approx(mean)
    assert all(0 < scores.columns[part] < 100 for part in parts)
    right = [text in accepted for text, accepted in cases]
    same = [number for number, is_same in zip(scores.items["code similarity"], right, strict=True) if is_same]
    assert min(same) > max(
        number for number, is_same in zip(scores.items["code similarity"], right, strict=True) if not is_same
    )


def random_program(rng: random.Random) -> str:
    """A function of three to six statements, whose values flow from one to the next."""
    names = rng.sample(["a", "b", "total", "x", "größe", "item"], 3)
    lines = [f"def {rng.choice(['f', 'run', 'solve'])}({names[0]}, n=2):"]
    for _ in range(rng.randrange(2, 5)):
        target, source = rng.choice(names), names[0]
        lines += rng.choice(
            [
                [f"    {target} = {source} {rng.choice('+-*')} n"],
                [f"    for i in range({source}):", f"        {target} = i + {source}"],
                [f"    if {source} > {rng.randrange(9)}:", f"        {target} = {source}"],
                [f"    {target} = [{source} for _ in range(n)]", f"    print({target})"],
            ]
        )
        names = [target, *(name for name in names if name != target)]
    return "\n".join([*lines, f"    return {names[0]}"])


def test_code_similarity_is_codebleus_item_by_item():
    """Also of empty answers, of text that is no program, and of answers that equal a reference."""
    rng = random.Random(23)
    cases = []
    for i in range(220):
        accepted = [random_program(rng) for _ in range(rng.randrange(1, 3))]
        kept = [line for line in accepted[0].splitlines() if rng.random() < 0.8]
        answers = [accepted[-1], "\n".join(kept), random_program(rng), "", "It can't be done: 東京", "x = ("]
        cases.append((answers[rng.choice([0, 1, 1, 1, 2, 2, 2]) if i > 9 else i % 6], accepted))
    scores = code_similarity_scores(answers_of(cases))
    each = []
    for text, accepted in cases:
        score = calc_codebleu([accepted], [text], "python")
        # It takes a flow of data of which nothing is right for one that is all right.
        each.append(score["codebleu"] - 0.25 * (score["dataflow_match_score"] == 0))
    assert scores.items["code similarity"] == pytest.approx(each, abs=1e-9)
    assert min(each) == 0 and max(each) == 1 and len({round(number, 6) for number in each}) > 100
    whole = calc_codebleu([accepted for _, accepted in cases], [text for text, _ in cases], "python")
    assert scores.columns["CodeBLEU %"] == pytest.approx(100 * whole["codebleu"])
    parts = ["ngram_match_score", "weighted_ngram_match_score", "syntax_match_score", "dataflow_match_score"]
    assert [*scores.columns.values()][1:] == pytest.approx([100 * whole[part] for part in parts])


def test_half_of_a_surrogate_pair_is_no_program_and_ends_nothing():
    program = random_program(random.Random(1))
    scores = code_similarity_scores(answers_of([("\ud800 x", [program]), (program, [program])]))
    assert scores.items["code similarity"][1] == 1.0 > scores.items["code similarity"][0]


def test_code_that_shares_nothing_scores_0_and_a_part_that_no_reference_has_is_left_out():
    scores = code_similarity_scores(answers_of([("", ["y = x + 1\nz = y"]), ("I don't know.", ["print(1)"])]))
    assert scores.items["code similarity"] == [0.0, 0.0] and scores.columns["CodeBLEU %"] == 0
    assert scores.notes[0].endswith("no data flow in the references of 1")
    assert code_similarity_scores(answers_of([("print(7) if 7 else 8", ["print(7) if 7 else 8"])])).hits == [True]


def test_code_is_taken_from_between_fences_and_names_do_not_matter_to_syntax():
    plain = "def f(a):\n    return a + 1"
    renamed = "def h(z):\n    return z + 1"
    fenced = f"Here it is:\n```python\n{renamed}\n```\nIt adds 1."
    scores = code_similarity_scores(answers_of([(fenced, [plain])]))
    assert scores.columns["syntax %"] == 100 and scores.columns["n-grams %"] < 50
    assert "code taken from between ``` in 1 of 1 answers" in scores.notes[0]
    answers = answers_of([(plain, [plain])])
    answers.options["code_language"] = "cobol"
    with pytest.raises(
        UserError, match="^--code-language cobol: its grammar is not installed; pip install tree-sitter"
    ):
        code_similarity_scores(answers)


# ---- JSON ----


def leaves(value, path=()) -> Counter:
    """The leaves of a JSON value, written independently of the program."""
    if isinstance(value, (dict, list)) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return sum((leaves(inner, (*path, key)) for key, inner in pairs), Counter())
    return Counter([json.dumps([path, value if not isinstance(value, bool) else str(value)])])


def random_json(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind < 5:
        return rng.choice([1, 2.5, "x", "y", True, False, None, "é", -3])
    if kind == 5:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice("abcdé"): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def test_json_counts_the_leaves_that_are_right():
    rng = random.Random(5)
    cases = []
    while len(cases) < 300:
        reference, answer = {"r": random_json(rng)}, {"r": random_json(rng)}
        if rng.random() < 0.3:
            answer = reference
        cases.append((json.dumps(answer, indent=rng.choice([None, 1])), [json.dumps(reference)]))
    scores = json_scores(answers_of(cases))
    right = answered = wanted = 0
    for (text, (reference,)), f1 in zip(cases, scores.items["json fields"], strict=True):
        ours, theirs = leaves(json.loads(text)), leaves(json.loads(reference))
        same = (ours & theirs).total()
        assert f1 == pytest.approx(2 * same / (ours.total() + theirs.total()))
        right, answered, wanted = right + same, answered + ours.total(), wanted + theirs.total()
    assert scores.columns["precision %"] == pytest.approx(100 * right / answered)
    assert scores.columns["recall %"] == pytest.approx(100 * right / wanted)
    # In JSON true is not 1, as it is in Python.
    whole = [float(leaves(json.loads(text)) == leaves(json.loads(reference))) for text, (reference,) in cases]
    assert scores.items["json whole"] == whole and 0 < sum(whole) < 300
    assert scores.columns["parsed %"] == 100


@pytest.mark.parametrize(
    ("text", "f1"),
    [
        ('{"a": 1, "b": "x"}', 1),
        ('{"b": "x", "a": 1.0}', 1),
        ('Sure:\n```json\n{"a": 1e0, "b": "x"}\n```', 1),
        ('The answer is {"a": 1, "b": "x"}, I think.', 1),
        ('{"a": true, "b": "x"}', 0.5),
        ('{"a": "1", "b": "x"}', 0.5),
        ('{"a": 1}', 2 / 3),
        ('{"a": 1, "b": "x", "c": {}}', 0.8),
        ("", 0),
        ("{", 0),
        ('{"a": NaN}', 0),
        ("[" * 100_000, 0),
        ('{"a": ' * 300 + "1" + "}" * 300, 0),
        ('{"a": 1e99999999999999999999, "b": "x"}', 0),
    ],
)
def test_json_is_found_in_an_answer_or_it_has_no_fields(text, f1):
    scores = json_scores(answers_of([(text, ['{"a": 1, "b": "x"}'])]))
    assert scores.items["json fields"] == [pytest.approx(f1)]
    assert scores.columns["parsed %"] == (100 if f1 else 0)


def test_a_reference_without_json_is_refused_by_name():
    check_json(['{"a": 1}', "[]"], "here")
    with pytest.raises(UserError, match="^f line 2: its reference is no JSON object or list; `json` compares fields"):
        check_json(["yes"], "f line 2")


# ---- tool calls ----

FORMS = [
    '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": "a"}}\n</tool_call>',
    'I call it. <tool_call>{"name": "f", "arguments": {"y": "a", "x": 1.0}}',
    '{"name": "f", "parameters": {"x": 1, "y": "a"}}',
    '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1, "y": "a"}}]',
    '{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1, \\"y\\": \\"a\\"}"}}',
    '<function=f>{"x": 1, "y": "a"}</function>',
    "[f(x=1, y='a')]",
    "f(y='a', x=1)",
    '```python\nf(x=1, y="a")\n```',
]


def tool_answers(texts: list[str], reference: str, tools=None) -> Answers:
    answers = answers_of([(text, [reference]) for text in texts])
    for record in answers.records:
        record.tools = tools
    return answers


def test_a_call_is_read_in_every_form_that_templates_ask_for():
    reference = json.dumps([{"name": "f", "arguments": {"x": 1, "y": "a"}}])
    scores = tools_scores(tool_answers(FORMS, reference))
    assert scores.items["tools"] == [1.0] * len(FORMS), [read_calls(text) for text in FORMS]


@pytest.mark.parametrize(
    ("text", "right", "name", "decision"),
    [
        ('{"name": "f", "arguments": {"x": 2, "y": "a"}}', 0, 1, 1),
        ('{"name": "f", "arguments": {"x": 1}}', 0, 1, 1),
        ('{"name": "f", "arguments": {"x": true, "y": "a"}}', 0, 1, 1),
        ('{"name": "g", "arguments": {"x": 1, "y": "a"}}', 0, 0, 1),
        ("[f(x=1, y='a'), f(x=1, y='a')]", 0, 0, 1),
        ("f(1, 'a')", 0, 0, 0),
        ("f(x=y)", 0, 0, 0),
        ("[f(x={1, 'a'})]", 0, 0, 0),
        ("[f(x={[1]: 2})]", 0, 0, 0),
        ('[f(x={{"a": 1}}, y="a")]', 0, 0, 0),
        ("[f(x=(1, [2]), y='a')]", 0, 1, 1),
        ("[f(x=1j, y=b'a')]", 0, 0, 0),
        ("It is 3 o'clock (noon).", 0, 0, 0),
        ("", 0, 0, 0),
        ('<tool_call>{"name": "f", "argum', 0, 0, 1),
        ('<tool_call>{"name": "f", "arguments": "oops"}</tool_call>', 0, 0, 1),
        ('<tool_call>{"name": "f", "arguments": []}</tool_call>', 0, 0, 1),
    ],
)
def test_a_wrong_call_is_wrong_in_its_part(text, right, name, decision):
    reference = json.dumps([{"name": "f", "arguments": {"x": 1, "y": "a"}}])
    scores = tools_scores(tool_answers([text], reference))
    assert [scores.items[key][0] for key in ("tools", "tool names", "tool decision")] == [right, name, decision]
    assert scores.columns["malformed"] == (text.startswith("<tool"))


def test_several_calls_come_in_any_order_and_none_is_an_answer():
    two = json.dumps([{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": [1, 2]}}])
    scores = tools_scores(tool_answers(["[g(x=[1, 2]), f()]", "[g(x=[2, 1]), f()]", "[f(), g(x=(1, 2))]"], two))
    assert scores.items["tools"] == [1.0, 0.0, 1.0]
    scores = tools_scores(tool_answers(["No tool fits.", "[f()]"], "[]"))
    assert scores.items["tools"] == [1.0, 0.0]


def test_arguments_that_are_no_object_are_no_call():
    wanted = json.dumps([{"name": "f", "arguments": {}}])
    right = ['{"name": "f", "arguments": {}}', '{"name": "f", "arguments": ""}', '{"name": "f", "arguments": null}']
    wrong = ['{"name": "f", "arguments": "oops"}', '{"name": "f", "arguments": []}', '{"name": "f", "arguments": 0}']
    scores = tools_scores(tool_answers([*right, *wrong], wanted))
    assert scores.items["tools"] == [1.0] * 3 + [0.0] * 3


def canonical(value) -> str:
    """A value as text that is equal for equal JSON: 1 is 1.0, and no truth value."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{key}:{canonical(inner)}" for key, inner in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return repr(float(value)) if is_number else repr(value)


def test_calls_are_right_where_names_and_arguments_are_the_same_json():
    rng = random.Random(29)
    answers, expected = [], []
    for _ in range(250):
        wanted = []
        for _ in range(rng.randrange(3)):
            wanted.append({"name": rng.choice("fg"), "arguments": {"x": random_json(rng), "ü": random_json(rng)}})
        calls = json.loads(json.dumps(wanted))
        rng.shuffle(calls)
        change = rng.randrange(4)
        if change == 1 and calls:
            calls[0]["arguments"]["x"] = random_json(rng)
        elif change == 2 and calls:
            calls.pop()
        text = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls) or "No call is needed."
        answers.append(tool_answers([text], json.dumps(wanted)))
        expected.append(float(sorted(map(canonical, calls)) == sorted(map(canonical, wanted))))
    right = [tools_scores(each).items["tools"][0] for each in answers]
    assert right == expected and 50 < sum(expected) < 240


TYPES = {
    "s": "string", "i": "integer", "n": "number", "b": "boolean", "o": "object",
}  # fmt: skip
SCHEMA = {name: {"type": kind} for name, kind in TYPES.items()}
SCHEMA |= {"l": {"type": "array", "items": {"type": "string"}}, "d": {"type": "array", "items": {"type": "object"}}}


@pytest.mark.parametrize(
    ("arguments", "accepted", "fits"),
    [
        ({"s": "New York, NY"}, {"s": ["new york NY"]}, True),
        ({"s": "NY"}, {"s": ["new york NY"]}, False),
        ({"s": "it's"}, {"s": ['it"s']}, True),
        ({"i": 5}, {"i": [5]}, True),
        ({"i": 5.0}, {"i": [5]}, False),
        ({"i": "5"}, {"i": [5]}, False),
        ({"i": "x"}, {"i": ["x", 5]}, True),
        ({"n": 5}, {"n": [5.0]}, True),
        ({"n": 5}, {"n": [5]}, True),
        ({"b": True}, {"b": [True, ""]}, True),
        ({"b": 1}, {"b": [True]}, False),
        ({}, {"b": [True, ""]}, True),
        ({}, {"b": [True]}, False),
        ({"s": "x", "z": 1}, {"s": ["x"]}, False),
        ({"s": "x", "i": 1}, {"s": ["x"]}, False),
        ({"l": ["A b"]}, {"l": [["ab"], ["c"]]}, True),
        ({"l": ["c", "d"]}, {"l": [["d", "c"]]}, False),
        ({"l": [1]}, {"l": [["1"]]}, False),
        ({"o": {"k": "V"}}, {"o": [{"k": ["v"], "m": [1, ""]}]}, True),
        ({"o": {"k": "w"}}, {"o": [{"k": ["v"]}]}, False),
        ({"o": {}}, {"o": [{"k": ["v"]}]}, False),
        ({"o": {"q": 1}}, {"o": [{"k": ["", "v"]}]}, False),
        ({"d": [{"k": 1}, {"k": 2}]}, {"d": [[{"k": [1]}, {"k": [2, 3]}]]}, True),
        ({"d": [{"k": 1}]}, {"d": [[{"k": [1]}, {"k": [2, 3]}]]}, False),
    ],
)
def test_bfcl_accepts_the_values_and_types_of_its_possible_answers(arguments, accepted, fits):
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": SCHEMA, "required": []}}}
    assert accepts_calls([Call("f", arguments)], [{"f": accepted}], [tool]) is fits


def test_bfcl_wants_every_required_parameter_and_each_call_once():
    parameters = {"type": "object", "properties": SCHEMA, "required": ["s"]}
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    one = {"f": {"s": ["x", ""], "i": [1, ""]}}
    assert accepts_calls([Call("f", {"s": "x"})], [one], tools)
    assert not accepts_calls([Call("f", {"i": 1})], [one], tools)
    assert not accepts_calls([Call("g", {"s": "x"})], [one], tools)
    two = [one, {"f": {"s": ["y"]}}]
    assert accepts_calls([Call("f", {"s": "y"}), Call("f", {"s": "x"})], two, tools)
    assert not accepts_calls([Call("f", {"s": "x"}), Call("f", {"s": "x"})], two, tools)
    assert not accepts_calls([Call("f", {"s": "x"})], two, tools)


def test_a_text_that_shares_words_with_its_references_scores_below_1():
    answers = answers_of([(sentence(1, 9), [sentence(1, 9) + " and more", sentence(2, 20)])])
    for score in (f1_scores, bleu_scores, chrf_scores, rouge_scores, meteor_scores, exact_scores):
        scores = score(answers)
        assert scores.columns.keys() == scores.formats.keys() and scores.hits == [False]
