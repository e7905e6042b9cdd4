"""Score heads: what a classifier or a reward model has in the place of the LM head.

    scores of a text = W h    h: the hidden state of its last token, [D]; W: float32 [labels, D]

Softmax over the labels makes probabilities of them; a reward model has one label, whose score is the
reward. transformers calls such a model XForSequenceClassification, and reads h at the last token of a
text that is not pad_token_id (checkpoint.name_padding). Here texts have no padding.

In full fine-tuning the head is a part of the model (model.ScoreHead), and its folder one that
AutoModelForSequenceClassification loads. Beside LoRA it is a module of the adapter: PEFT's files of
task_type SEQ_CLS hold it as a whole (modules_to_save). They don't hold its labels. These stand in
labels.json beside them, as config.json would say them: id2label and pad_token_id.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter_files import (
    CONFIG_FILE,
    PREFIX,
    adapter_modules,
    has_adapter,
    is_whole,
    weights_file,
)
from checkpoint import copy_local_rows, name_padding, open_safetensors, settings_of_labels
from common.console import one_line
from common.errors import UserError, read_json, read_json_if_there
from common.files import write_json
from distributed import full_tensor, to_local
from families import MAX_CLASSES, Config, labels_by_number, numbered_labels
from kernels.attention import Documents
from model import NO_LM_HEAD, ScoreHead, Transformer, scores_of_hidden
from tokenizer import Tokenizer

# The one label of a reward model.
REWARD = "reward"
# The task of PEFT's files that have a score head.
TASK = "SEQ_CLS"
# What PEFT writes as modules_to_save for that task: a head may have either name, and here has the
# second.
HEAD_NAMES = ("classifier", "score")
SCORE_TENSOR = f"{PREFIX}score.weight"
LABELS_FILE = "labels.json"
# The spread of a new head's numbers where config.json does not say it, as in transformers.
INITIALIZER_RANGE = 0.02


class TrainedScoreHead(nn.Module):
    """A score head that is trained beside an adapter, and computes as model.ScoreHead does.

    weight: float32 [labels, D].
    base: the head of the model that the adapter is on, which is frozen, and computes while the adapter
        is switched off; None where that model has an LM head.
    """

    is_adapter = True
    is_whole = True

    def __init__(self, weight: Tensor, labels: tuple[str, ...], base: ScoreHead | None):
        super().__init__()
        assert len(weight) == len(labels), "a row for each label"
        self.weight = nn.Parameter(weight)
        self.labels = labels
        self.base = base
        self.merged = False
        # True once merging has made it a part of the model; `merged` alone is an adapter that is off.
        self.is_in_base = False

    def forward(self, hidden: Tensor) -> Tensor:  # [M, D] -> float32 [M, labels]
        if self.merged and not self.is_in_base:
            if self.base is None:
                raise UserError("without its adapter the model has no score head")
            return self.base(hidden)
        return scores_of_hidden(hidden, self.weight)

    # ---- what adapter_files.py asks of every module of an adapter ----

    @property
    def before(self) -> nn.Module | None:
        return ScoreHead(self.weight.detach(), self.labels) if self.is_in_base else self.base

    @property
    def saved_numbers(self) -> int:
        return 0

    def start(self, model: Transformer) -> None:
        start_score_head(model)

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        return {SCORE_TENSOR: self.weight}


# ---- on a model ----


def add_score_head(model: Transformer, labels: Sequence[str]) -> None:
    """Puts a score head in the place of a model's LM head, whose memory is freed. It is trained, and has
    its first numbers (`start_score_head`) unless the model has no memory yet. What else is trained
    stays so.

    labels: all different. A head that is there already, with these labels, stays as it is; it is
        trained as a copy beside an adapter that has none of its own.
    Raises UserError for labels that are none, where the model has a head with others, and beside an
    adapter other than LoRA.
    """
    labels = checked_labels(labels)
    head = model.score
    if head is not None and head.labels != labels:
        theirs = one_line(", ".join(head.labels), 100)  # type: ignore[arg-type]
        wanted = one_line(", ".join(labels), 100)
        raise UserError(f"{model.source}: its score head has the labels {theirs}, not {wanted}")
    adapted = has_adapter(model)
    if head is not None and (is_whole(head) or not adapted):
        return
    for module in adapter_modules(model).values():
        if not getattr(module, "takes_score_head", False):
            raise UserError(
                "a score head is trained with --method full, lora or qlora, and not with --init loftq"
            )
    if adapted:
        put_trained_head(model, labels)
    else:
        model.score = ScoreHead(empty_weight(model, labels), labels).train(model.training)
    model.head = None
    start_score_head(model)


def put_trained_head(model: Transformer, labels: tuple[str, ...]) -> None:
    """Puts a trained score head without numbers on a model that has an adapter. An LM head stays on the
    model, unused, so that the adapter can be taken off again."""
    base = model.score
    assert base is None or isinstance(base, ScoreHead), "one adapter at a time"
    head = TrainedScoreHead(empty_weight(model, labels), labels, base)
    model.score = head.train(model.training)


def empty_weight(model: Transformer, labels: tuple[str, ...]) -> Tensor:
    """Returns memory for a score head's weight, where the model has its own."""
    shape = len(labels), model.config.hidden_size
    return torch.empty(shape, dtype=torch.float32, device=model.device)


@torch.no_grad()
def start_score_head(model: Transformer) -> None:
    """Gives a new score head its first numbers: those of the head that it is beside, else normal ones
    with the standard deviation initializer_range of config.json, as transformers has it. Does nothing
    on the meta device. All ranks must call it.

    The numbers follow from torch's seed alone: they are drawn on the CPU, by a generator of their own,
    and each rank keeps its rows.
    """
    head = model.score
    assert head is not None, "the model has a score head"
    weight: Tensor = head.weight  # type: ignore[assignment]
    if to_local(weight).is_meta:
        return
    base = getattr(head, "base", None)
    if base is not None:
        first = full_tensor(base.weight)
    else:
        spread = model.config.raw.get("initializer_range")
        if type(spread) not in (int, float) or not 0 < spread < 1e9:
            spread = INITIALIZER_RANGE
        generator = torch.Generator().manual_seed(torch.initial_seed())
        first = torch.empty(weight.shape).normal_(0.0, spread, generator=generator)
    copy_local_rows(weight, first)


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the labels. Raises UserError unless there are some, not too many, all of them different
    texts."""
    by_number = labels_by_number({str(number): label for number, label in enumerate(labels)})
    if by_number is None:
        raise UserError(
            f"a score head needs 1 to {MAX_CLASSES:,} labels, all of them different texts"
        )
    return by_number


def document_scores(model: Transformer, tokens: Tensor, documents: Documents) -> Tensor:
    """Returns the scores of the documents of a flat batch, float32 [documents, labels], before any
    softmax. tokens: int64 [N], as for Transformer.flat."""
    assert isinstance(documents, Documents), "a document is on one rank"
    assert model.score is not None, "the model has a score head"
    hidden = model.flat(tokens, documents)  # [N, D]
    last = documents.cu_seqlens[1:] - 1  # of each document, int32 [documents]
    return model.score(hidden.index_select(0, last))


# ---- what a classifier reads ----


def classification_texts(
    tokenizer: Tokenizer, conversations: Sequence[tuple[list[dict], list | None]]
) -> list[list[int] | UserError]:
    """Returns for each conversation what a classifier reads of it, or why it can't.

    One message of a user alone is its text as transformers' pipeline "text-classification" encodes it:
    with what the tokenizer puts around every text (bos, rarely eos), and without a chat template.
    (What spells a control token is plain text, as everywhere here; the pipeline makes that token of
    it.) Several messages are what the chat template writes of them.

    conversations: (messages, tools) each.
    """
    results: list = [None] * len(conversations)
    chats = []
    for i, (messages, tools) in enumerate(conversations):
        if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
            text = messages[0]["content"]
            results[i] = tokenizer.encode(text, bos=tokenizer.adds_bos, eos=tokenizer.adds_eos)
        else:
            chats.append(i)
    # Nothing of them is trained as words, so that each is encoded in one piece.
    rendered = tokenizer.render_each([conversations[i] for i in chats], roles=())
    for i, chat in zip(chats, rendered, strict=True):
        results[i] = chat if isinstance(chat, UserError) else chat.ids
    for i, ids in enumerate(results):
        if ids == []:
            results[i] = UserError("an empty text has no last token to classify")
    return results


# ---- PEFT's files ----


def has_described_head(config: dict) -> bool:
    """True if an adapter_config.json is of an adapter for sequence classification."""
    saved = config.get("modules_to_save")
    names_score = isinstance(saved, list) and "score" in saved
    task = config.get("task_type")
    return task == TASK or (task is None and names_score)


def other_saved_modules(config: dict) -> object:
    """Returns modules_to_save of an adapter_config.json without the score head."""
    saved = config.get("modules_to_save")
    if not isinstance(saved, list) or not has_described_head(config):
        return saved
    return [name for name in saved if name not in HEAD_NAMES]


def add_described_head(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts the score head of an adapter's folder, if it has one, on a model that has the adapter.

    where: its adapter_config.json, `config`. tensors: of its file.
    Raises UserError if the adapter is for a score head that is neither in the file nor on the model.
    """
    if not has_described_head(config):
        return
    stored = tensors.get(SCORE_TENSOR)
    if stored is None:
        if model.score is None:
            raise UserError(f"{where}: task_type is {TASK}, and the file has no {SCORE_TENSOR}")
        return
    # Of another width the shape is refused when it is read.
    count = len(stored) if stored.dim() == 2 else 0
    labels = labels_beside(where.parent, count)
    base = model.score
    if labels is None and base is not None and len(base.weight) == count:  # type: ignore[arg-type]
        labels = base.labels  # type: ignore[assignment]
    put_trained_head(model, labels or numbered_labels(count))


def labels_beside(adapter: Path, count: int) -> tuple[str, ...] | None:
    """Returns the labels in the folder of an adapter; None where it does not name them, as PEFT's own
    folders don't.

    count: the rows of its score head.
    Raises UserError if there are others than `count`.
    """
    file = adapter / LABELS_FILE
    if not 0 < count <= MAX_CLASSES:
        raise UserError(f"{weights_file(adapter)}: {SCORE_TENSOR} must be [labels, hidden size]")
    if not file.is_file():
        return None
    labels = labels_by_number(read_json(file).get("id2label"))
    if labels is None or len(labels) != count:
        raise UserError(
            f"{file}: id2label must name the {count:,} labels of the score head, all different, by"
            " their numbers from 0 on"
        )
    return labels


def write_labels(model: Transformer, folder: Path) -> str:
    """Writes labels.json into the folder of an adapter with a score head, and names the padding token in
    the tokenizer's files there.

    Returns what a user must know of that token, a clause, or "".
    """
    assert isinstance(model.score, TrainedScoreHead), "it is the adapter's"
    # An adapter need not bring a tokenizer along; then its base's counts.
    padding = name_padding(folder, model.config, model.source)
    facts = settings_of_labels(model.score.labels) | {"pad_token_id": padding.id}
    write_json(facts, folder / LABELS_FILE)
    return padding.note


def head_labels(config: Config, adapter: str | Path | None) -> tuple[str, ...] | None:
    """Returns the labels of the score head that a model has, or that an adapter brings; None if the
    model has an LM head then.

    config: of the base.
    Raises UserError where the adapter says too little of its head.
    """
    if adapter is None:
        return config.labels
    if not has_described_head(read_json_if_there(Path(adapter) / CONFIG_FILE)):
        return config.labels
    file = weights_file(adapter)
    if not file.is_file():
        return config.labels
    with open_safetensors(file) as stored:
        if SCORE_TENSOR not in stored.keys():  # noqa: SIM118 (it is no dict)
            return config.labels
        shape = stored.get_slice(SCORE_TENSOR).get_shape()
    count = shape[0] if len(shape) == 2 else 0
    labels = labels_beside(Path(adapter), count)
    if labels is None and config.labels is not None and len(config.labels) == count:
        return config.labels
    return labels or numbered_labels(count)


def require_lm_head(folder: Path, config: Config, adapter: str | Path | None) -> None:
    """Raises UserError if a model has a score head in the place of an LM head, or an adapter brings one.
    folder, config: of the base."""
    if head_labels(config, adapter) is not None:
        raise UserError(f"{adapter or folder}: {NO_LM_HEAD}")
