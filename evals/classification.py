"""Classification: which of the labels a model finds most probable after each text.

A record is a conversation whose last answer is a label, as train.py reads a CSV with a column of
labels. Every label that occurs is scored as it was trained, with the chat template around it and the
token that ends an answer; the prompt is computed once for all of them (evals/choices.py). Scaled to
1 over the labels, these probabilities give what scikit-learn measures, and the calibration error.

A model with a score head (adapting/score_head.py) is not asked for labels: their probabilities are the
softmax of its scores, and what it reads is the record without its answer.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from adapting.score_head import classification_texts, document_scores
from checkpoint import read_config
from common import console
from common.errors import UserError, read_text
from common.files import atomic_file
from common.progress import progress
from dataset.records import Record
from evals.answers import split_reference
from evals.choices import NODES_AT_ONCE, ChoiceTask, Pair, Question
from evals.scores import ItemScores
from evals.targets import (
    Opened,
    draw_records,
    file_of_target,
    open_with_answers,
    records_with_references,
)
from kernels.attention import Documents
from model import Transformer, eval_mode
from tokenizer import EncodedChat, Tokenizer

# Records that go through the chat template at a time.
RECORDS_AT_ONCE = 256
# Contextual calibration (Zhao et al. 2021, section 5) asks after these, which say nothing.
CONTENT_FREE = ("N/A", "[MASK]", "")
# Bins of the expected calibration error, of equal width (Guo et al. 2017, section 2).
CALIBRATION_BINS = 15
# Of so many classes, all are listed, and their confusion matrix is printed.
FEW_CLASSES = 12


def read_classes(args: argparse.Namespace, opened: Opened) -> ChoiceTask:
    """Reads the records and labels of evaluate.py's command line, and prints what was read.

    Raises UserError where the records have no labels to compare with, or a record has one that
    --labels lacks.
    """
    source = open_with_answers(opened.file, opened.map_fn, args.skip_bad)
    source.system = opened.system
    records = records_with_references(source, None, args.seed)
    references = [split_reference(record)[1] for record in records]
    of_heads = labels_of_heads(args, opened)
    if of_heads is not None:
        labels = of_heads
    else:
        labels = read_labels(args.labels) if args.labels else labels_of(references, source.path)
    for record, reference in zip(records, references, strict=True):
        if reference not in labels:
            known = f"in --labels {args.labels}"
            if of_heads is not None:
                known = f"one of the score head's: {console.one_line(', '.join(labels), 100)}"
            raise UserError(
                f"{record.where}: its label {console.one_line(reference)!r} is not {known}"
            )
    print(f"          {len(labels):,} labels: {console.one_line(', '.join(labels))}")
    warn_of_like_labels(labels)
    if args.limit is not None and args.limit < len(records):
        records = draw_records(records, args.limit, args.seed)
    pictures: Iterator[Path] = iter(())
    if args.picture:
        check_picture(Path(args.picture))
        targets = opened.targets
        pictures = (file_of_target(Path(args.picture), each, targets) for each in targets)

    number_of = {label: number for number, label in enumerate(labels)}
    questions = []
    for record in records:
        messages, reference = split_reference(record)
        gold = (number_of[reference],)
        questions.append(Question(last_question(messages), labels, gold, where=record.where))

    warn_of_rare_labels([labels[question.gold[0]] for question in questions])

    def encode(tokenizer: Tokenizer, max_positions: int) -> list[list[Pair]]:
        return encode_labels(tokenizer, records, labels, args.calibrate, max_positions)

    def score(likelihoods: list[list[float]]) -> ItemScores:
        return score_probs(label_probs(likelihoods, len(questions)))

    def encode_texts(tokenizer: Tokenizer, max_positions: int) -> list[list[int]]:
        return encode_records(tokenizer, records, max_positions)

    def score_by_head(model: Transformer, texts: list[list[int]], batch_size: int) -> ItemScores:
        return score_probs(head_probs(model, texts, batch_size))

    def score_probs(probs: np.ndarray) -> ItemScores:
        gold = np.array([question.gold[0] for question in questions])
        scores = classification_scores(gold, probs, labels, args.show)
        if args.picture:
            # The targets are scored in their order.
            picture = next(pictures)
            draw_confusion(gold, probs.argmax(1), labels, picture)
            scores.notes.insert(0, f"confusion matrix: {picture}")
        return scores

    return ChoiceTask(questions, encode, score, encode_texts, score_by_head)


# ---- labels ----


def labels_of(references: list[str], path: str) -> list[str]:
    """Returns the distinct references, sorted. Raises UserError where they are no classes."""
    labels = sorted(set(references))
    if len(labels) == 1:
        raise UserError(
            f"{path}: every record has the label {console.one_line(labels[0])!r}; name the other labels"
            " by `evaluate.py classify --labels FILE`, one a line"
        )
    if len(labels) > FEW_CLASSES and 2 * len(labels) > len(references):
        raise UserError(
            f"{path}: {len(labels):,} different answers in {len(references):,} records are no classes;"
            " use `exact`, or name the labels by `evaluate.py classify --labels FILE`, one a line"
        )
    return labels


def labels_of_heads(args: argparse.Namespace, opened: Opened) -> list[str] | None:
    """Returns the labels of the targets' score heads; None where no target has one. A target without
    one is then asked for these labels.

    Raises UserError where two heads have different labels, where --labels are others, and where a head
    classifies nothing.
    """
    found: list[tuple[str, ...]] = []
    for target in opened.targets:
        of_target = target.score_labels()
        if of_target is None:
            continue
        found.append(of_target)
        where = target.adapter or target.folder
        if len(of_target) == 1:
            raise UserError(
                f"{where}: its score head has one label, {of_target[0]}: a reward model, which can't"
                " classify"
            )
        problem = read_config(target.folder).raw.get("problem_type")
        if problem not in (None, "single_label_classification"):
            raise UserError(
                f"{where}: config.json says problem_type {problem}; scores of that are no"
                " probabilities of one label"
            )
    if not found:
        return None
    if found[0] != found[-1]:
        both = " and ".join(console.one_line(", ".join(labels), 100) for labels in found)
        raise UserError(f"--versus: the two score heads have different labels: {both}")
    if args.calibrate:
        raise UserError(
            "--calibrate: is for models that are asked with a prompt, not for score heads"
        )
    labels = [*found[0]]
    if args.labels and {*read_labels(args.labels)} != {*labels}:
        known = console.one_line(", ".join(labels), 100)
        raise UserError(f"--labels {args.labels}: the score head has others: {known}")
    return labels


def read_labels(file: str) -> list[str]:
    """Returns the labels of --labels, one a line."""
    path = Path(file)
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    doubles = [line for line, count in Counter(lines).items() if count > 1]
    if doubles:
        raise UserError(f"--labels {file}: the label {doubles[0]!r} stands there twice")
    if len(lines) < 2:
        raise UserError(f"--labels {file}: at least 2 labels are wanted, one a line")
    return lines


def warn_of_rare_labels(references: list[str]) -> None:
    """Prints which labels occur only once: their precision, recall and F1 say next to nothing."""
    once = [label for label, count in Counter(references).items() if count == 1]
    if once:
        names = console.one_line(", ".join(once))
        what = (
            "1 label occurs once, so its"
            if len(once) == 1
            else f"{len(once):,} labels occur once, so their"
        )
        print(f"WARNING: {what} own scores mean little: {names}")


def warn_of_like_labels(labels: list[str]) -> None:
    """Prints which labels differ by spaces or case alone: to the table's reader they are one class."""
    seen: dict[str, str] = {}
    for label in labels:
        first = seen.setdefault(" ".join(label.split()).casefold(), label)
        if first != label:
            print(
                f"WARNING: {first!r} and {label!r} are two labels, which differ by spaces or case alone; if"
                " they are one class, make them alike (--map)"
            )


def last_question(messages: list[dict]) -> str:
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return questions[-1]


# ---- prompts and labels as tokens ----


def encode_labels(
    tokenizer: Tokenizer, records: list[Record], labels: list[str], calibrate: bool, most: int
) -> list[list[Pair]]:
    """Returns for each record the pairs of its prompt and every label; with `calibrate`, also for
    the prompts of CONTENT_FREE, behind the others.

    most: positions of the model.
    Raises UserError naming the record that the template refuses, or that is too long.
    """
    conversations = [(split_reference(record)[0], record.tools) for record in records]
    places = [record.where for record in records]
    if calibrate:
        messages, tools = conversations[0]
        for text in CONTENT_FREE:
            conversations.append((with_last_question(messages, text), tools))
            places.append(f"--calibrate, the text {text!r}")
    prompts = []
    for start in range(0, len(conversations), RECORDS_AT_ONCE):
        some = conversations[start : start + RECORDS_AT_ONCE]
        prompts += [chat.ids for chat in render_some(tokenizer, some, places[start:], True)]

    # What follows a prompt begins behind the header of the answer, whatever was asked: so the labels
    # are encoded behind the first prompt, and, to be sure, behind the last.
    endings = label_endings(tokenizer, conversations[0], prompts[0], labels, places[0])
    last = label_endings(tokenizer, conversations[-1], prompts[-1], labels, places[-1])
    pairs = []
    for conversation, prompt, place in zip(conversations, prompts, places, strict=True):
        mine = endings
        if endings != last:
            mine = label_endings(tokenizer, conversation, prompt, labels, place)
        longest = max(len(ending) for ending in mine)
        if len(prompt) + longest - 1 > most:
            raise UserError(
                f"{place}: {len(prompt):,} tokens before the label, and {longest:,} in it; the model"
                f" takes {most:,}; shorten it, or leave it out"
            )
        pairs.append([Pair(prompt, ending) for ending in mine])
    return pairs


def render_some(
    tokenizer: Tokenizer, conversations: list, places: list[str], prompt: bool
) -> list[EncodedChat]:
    """Returns the conversations in tokens. Raises UserError naming the one that the template
    refuses."""
    chats = tokenizer.render_each(conversations, add_generation_prompt=prompt)
    for chat, place in zip(chats, places):
        if isinstance(chat, UserError):
            raise UserError(f"{place}: {console.one_line(str(chat), 200)}")
    return chats


def label_endings(
    tokenizer: Tokenizer, conversation: tuple, prompt: list[int], labels: list[str], place: str
) -> list[list[int]]:
    """Returns the tokens of each label behind a prompt, up to the last one that training has, which
    ends the answer."""
    messages, tools = conversation
    answered = [([*messages, {"role": "assistant", "content": label}], tools) for label in labels]
    chats = render_some(tokenizer, answered, [place] * len(labels), False)
    endings = []
    for label, chat in zip(labels, chats, strict=True):
        _, end, _ = chat.spans[-1]
        if chat.ids[: len(prompt)] != prompt or end <= len(prompt):
            raise UserError(
                f"{place}: chat template {tokenizer.template_name} does not put the label {label!r}"
                " behind the prompt that asks for it"
            )
        endings.append(chat.ids[len(prompt) : end])
    return endings


def encode_records(tokenizer: Tokenizer, records: list[Record], most: int) -> list[list[int]]:
    """Returns what a score head reads of each record. most: positions of the model.

    Raises UserError naming the record that can't be encoded, or that is too long.
    """
    conversations = [(split_reference(record)[0], record.tools) for record in records]
    texts: list[list[int]] = []
    for start in range(0, len(conversations), RECORDS_AT_ONCE):
        some = conversations[start : start + RECORDS_AT_ONCE]
        encoded = classification_texts(tokenizer, some)
        for record, ids in zip(records[start:], encoded):
            if isinstance(ids, UserError):
                raise UserError(f"{record.where}: {console.one_line(str(ids), 200)}")
            if len(ids) > most:
                raise UserError(
                    f"{record.where}: {len(ids):,} tokens; the model takes {most:,}; shorten it, or"
                    " leave it out"
                )
            texts.append(ids)
    return texts


def with_last_question(messages: list[dict], text: str) -> list[dict]:
    """Returns the messages with another text as their last question."""
    number = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return [*messages[:number], messages[number] | {"content": text}, *messages[number + 1 :]]


# ---- scores ----


def label_probs(likelihoods: list[list[float]], num_records: int) -> np.ndarray:
    """Returns the probability of each label, float64 [records, labels], 1 in sum.

    likelihoods: of the records and, where they are calibrated, of the prompts that say nothing. Then
        each probability is divided by the label's mean one after those (Zhao et al. 2021, with
        W = diag(p_cf)^-1, b = 0). In logarithms it is the pointwise mutual information.
    """
    logprobs = log_softmax(np.array(likelihoods[:num_records]))
    content_free = likelihoods[num_records:]
    if content_free:
        # In logarithms throughout: a long label may be improbable beyond what a float holds.
        each = log_softmax(np.array(content_free))
        prior = np.logaddexp.reduce(each, axis=0) - np.log(len(content_free))
        logprobs = log_softmax(logprobs - prior)
    return np.exp(logprobs)


def head_probs(model: Transformer, texts: list[list[int]], batch_size: int) -> np.ndarray:
    """Returns the probability of each label of a score head after each text, float64 [texts, labels].

    batch_size: the most texts that are computed at a time; fewer, where they have more than
        NODES_AT_ONCE tokens.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches: list[list[int]] = [[]]
    tokens = 0  # of the last batch
    for i in order:
        is_full = len(batches[-1]) == batch_size or tokens + len(texts[i]) > NODES_AT_ONCE
        if batches[-1] and is_full:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += len(texts[i])
    assert model.score is not None, "the model has a score head"
    scores = np.empty((len(texts), len(model.score.labels)))  # type: ignore[arg-type]
    bar = progress("scoring", len(texts), "text")
    with bar, eval_mode(model), torch.inference_mode():
        for batch in batches:
            ids = [id for i in batch for id in texts[i]]
            documents = Documents([len(texts[i]) for i in batch], model.device)
            of_batch = document_scores(model, torch.tensor(ids, device=model.device), documents)
            scores[batch] = of_batch.double().cpu().numpy()
            bar.update(len(batch))
    return np.exp(log_softmax(scores))


def log_softmax(logprobs: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the softmax of each row."""
    shifted = logprobs - logprobs.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def classification_scores(
    gold: np.ndarray, probs: np.ndarray, labels: list[str], show: int
) -> ItemScores:
    """ItemScores the most probable label of each record.

    gold: int [records], the number of the right label. probs: float [records, labels].
    show: how many classes are listed, of more than FEW_CLASSES.
    Precision, recall and F1 are means over the classes that occur, in the references or in the
    predictions (scikit-learn's "macro"); a class that is never predicted has the precision 0.
    """
    from sklearn import metrics

    chosen = probs.argmax(1)
    hits = chosen == gold
    macro = metrics.precision_recall_fscore_support(gold, chosen, average="macro", zero_division=0)
    precision, recall, f1, _ = macro
    micro_f1 = metrics.f1_score(gold, chosen, average="micro")
    num_records = len(gold)
    error = float(hits.std(ddof=1)) / num_records**0.5 if num_records > 1 else 0.0
    columns = {
        "records": float(num_records),
        "accuracy %": 100 * float(hits.mean()),
        "±": 100 * error,
        "precision %": 100 * float(precision),
        "recall %": 100 * float(recall),
        "macro F1 %": 100 * float(f1),
        "micro F1 %": 100 * float(micro_f1),
        "ROC-AUC": roc_auc(gold, probs),
        "ECE %": 100 * expected_calibration_error(probs.max(1), hits),
    }
    formats = {name: ".1f" if name[-1] in "%±" else ",.0f" for name in columns}
    formats |= {"ROC-AUC": ".3f", "F1 %": ".1f", "n": ",.0f"}
    items = {
        "accuracy": hits.astype(float).tolist(),
        "p(right)": probs[np.arange(num_records), gold].tolist(),
    }
    notes = confusion_notes(gold, chosen, labels, show)
    parts = class_rows(gold, chosen, labels)
    if len(parts) > FEW_CLASSES and show < len(parts):
        lowest = sorted(parts, key=lambda name: parts[name]["F1 %"])[:show]
        notes.append(
            f"the {len(lowest)} of {len(parts)} classes with the lowest F1 (--show {len(parts)}: all)"
        )
        parts = {name: parts[name] for name in lowest}
    return ItemScores(items, columns, formats, notes, parts, chosen.tolist())


def class_rows(
    gold: np.ndarray, chosen: np.ndarray, labels: list[str]
) -> dict[str, dict[str, float]]:
    """Returns precision, recall, F1 and the number of references of each class that occurs, in the
    references or in the predictions."""
    from sklearn import metrics

    numbers = sorted({*gold.tolist(), *chosen.tolist()})
    each = metrics.precision_recall_fscore_support(gold, chosen, labels=numbers, zero_division=0)
    rows = {}
    names = short_names([labels[number] for number in numbers])
    for name, precision, recall, f1, count in zip(names, *each, strict=True):
        rows[name] = {
            "precision %": 100 * float(precision),
            "recall %": 100 * float(recall),
            "F1 %": 100 * float(f1),
            "n": float(count),
        }
    return rows


def short_names(labels: list[str]) -> list[str]:
    """Returns a different name of one line for each label: its first 40 characters, more of labels that
    begin alike, and where that is not enough its number."""
    names = [console.one_line(label, 40) for label in labels]
    counts = Counter(names)
    names = [
        console.one_line(label, 2 * len(label) + 40) if counts[name] > 1 else name
        for name, label in zip(names, labels, strict=True)
    ]
    counts = Counter(names)
    return [f"{name} (label {i})" if counts[name] > 1 else name for i, name in enumerate(names, 1)]


def roc_auc(gold: np.ndarray, probs: np.ndarray) -> float:
    """Returns the mean over the classes of the area under the ROC curve, each class against all
    others; NaN where every record is of one class. Classes without a record have none."""
    from sklearn import metrics

    areas = []
    for number in range(probs.shape[1]):
        is_class = gold == number
        if is_class.any() and not is_class.all():
            areas.append(metrics.roc_auc_score(is_class, probs[:, number]))
    return float(np.mean(areas)) if areas else float("nan")


def expected_calibration_error(confidence: np.ndarray, hits: np.ndarray) -> float:
    """Returns the mean distance of confidence and accuracy (Guo et al. 2017, eq. 3), from 0 to 1.

    confidence: the probability of the chosen label, [records]. hits: whether it is right.
    """
    # Bin m holds the confidences in ((m - 1) / M, m / M].
    bins = np.ceil(confidence * CALIBRATION_BINS).clip(1)
    error = 0.0
    for number in np.unique(bins):
        mine = bins == number
        error += mine.mean() * abs(hits[mine].mean() - confidence[mine].mean())
    return float(error)


# ---- the confusion matrix ----


def confusion_notes(
    gold: np.ndarray, chosen: np.ndarray, labels: list[str], show: int
) -> list[str]:
    """Returns lines below the table: the confusion matrix of few classes, the most frequent
    confusions of many, and which labels were never predicted."""
    from sklearn import metrics

    matrix = metrics.confusion_matrix(gold, chosen, labels=range(len(labels)))
    notes = []
    if len(labels) <= FEW_CLASSES:
        names = [console.one_line(label, 20) for label in labels]
        rows = [["right \\ chosen", *names]]
        for name, counts in zip(names, matrix, strict=True):
            rows.append([name, *[f"{count:,}" for count in counts]])
        notes.append("\n" + console.table(rows))
    else:
        off = matrix * (1 - np.eye(len(labels), dtype=int))
        order = np.argsort(-off, axis=None, kind="stable")[:show]
        for place in order:
            right, wrong = divmod(int(place), len(labels))
            if off[right, wrong]:
                notes.append(
                    f"{off[right, wrong]:,} of {matrix[right].sum():,} {labels[right]!r} taken for"
                    f" {labels[wrong]!r}"
                )
    occurs = matrix.sum(1) > 0
    is_chosen = matrix.sum(0) > 0
    never = [labels[number] for number in np.flatnonzero(occurs & ~is_chosen)]
    if never:
        names = console.one_line(", ".join(never))
        notes.append(
            f"WARNING: {len(never):,} of the {occurs.sum():,} labels that occur are never predicted: {names}"
        )
    return notes


def check_picture(path: Path) -> None:
    """Raises UserError before the model is loaded, where the picture can't be written."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--picture {path}: a PNG is drawn; name it FILE.png")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.parent}")


def draw_confusion(gold: np.ndarray, chosen: np.ndarray, labels: list[str], picture: Path) -> None:
    """Draws the confusion matrix as a PNG: a row for each right label, a column for each chosen one,
    and the share of the row as its color; of few classes with the counts."""
    import matplotlib

    # The backend that needs no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn import metrics

    matrix = metrics.confusion_matrix(gold, chosen, labels=range(len(labels)))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(4.0, 0.22 * len(labels) + 2)
    figure, axes = pyplot.subplots(figsize=(side + 1, side), dpi=120)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # A $ in a name would begin a formula.
    names = [console.one_line(label, 30).replace("$", r"\$") for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), names, fontsize=7)
    accuracy = f"{100 * np.mean(gold == chosen):.1f} % of {len(gold):,} right"
    axes.set(xlabel="chosen", ylabel="right", title=accuracy)
    if len(labels) <= FEW_CLASSES:
        for row in range(len(labels)):
            for column in range(len(labels)):
                color = "white" if shares[row, column] > 0.5 else "black"
                count = f"{matrix[row, column]:,}"
                axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="share of the right label")
    figure.tight_layout()
    with atomic_file(picture) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)
