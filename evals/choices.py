"""Log-likelihoods of continuations, given contexts: what multiple choice and classification compare.

A question is a list of (context, continuation) pairs, one for each choice. The choices of a question
begin alike, and so do questions behind the same few-shot examples. So the texts of a batch form a
prefix tree, and a token is computed once for all texts that begin with the same tokens: linears see
each node of the tree once, and attention lets a node attend to the nodes above it. Nothing is
padded, and only nodes that predict a scored token get logits.

The definitions are those of lm-evaluation-harness: how a context and a continuation become tokens
(`encode_pair`), and where a text is cut that is too long (`score_texts`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.progress import progress
from decoding import has_length_dependent_rope, shared_prefixes
from evals.scores import ItemScores
from kernels.attention import (
    Documents,
    QuerySuffix,
    cached_attention,
    cu_seqlens,
    decode_mask,
    flash_attention,
    flash_supports,
    suffix_attention,
)
from kernels.attention import (
    Scores as AttentionScores,
)
from model import Transformer, eval_mode
from tokenizer import Tokenizer

# The most nodes of a batch's prefix tree, unless a single question has more.
NODES_AT_ONCE = 16_384
# So many scores of a query and a key are computed in about the time that a call of attention takes.
CALL_COST = 1 << 15
# Logits, rows times vocabulary, that are computed at a time; in float32 they take 128 MB.
LOGITS_AT_ONCE = 32 << 20


class Pair(NamedTuple):
    """A context and a continuation, in tokens; neither is empty, and the model has a position for
    each token of the continuation. Of the context no logits are
    wanted but those of its last token, which predicts the first one of the continuation."""

    context: list[int]
    continuation: list[int]


class Question(NamedTuple):
    """A question and its choices.

    before: what stands before the context: examples, a description of the task.
    gold: the numbers of the right choices, at least one.
    group: what the scores are also given for: the subject, for example; "" for nothing.
    where: the place of its record, for messages.
    """

    context: str
    choices: list[str]
    gold: tuple[int, ...]
    group: str = ""
    where: str = ""
    before: str = ""


class ChoiceTask(NamedTuple):
    """Questions, and what is done with them.

    encode: a function from a tokenizer and the number of the model's positions to the pairs of each
        question.
    score: a function from the log-likelihoods of all pairs to ItemScores, whose first items are those of
        the first questions.
    encode_texts, score_by_head: for a model with a score head, in the place of these two; None where
        the task has nothing to ask it. A function from a tokenizer and the number of positions to the
        text of each question, in tokens; and one from the model, these texts and the most of them that
        are computed at a time to ItemScores.
    """

    questions: list[Question]
    encode: Callable[[Tokenizer, int], list[list[Pair]]]
    score: Callable[[list[list[float]]], ItemScores]
    encode_texts: Callable[[Tokenizer, int], list[list[int]]] | None = None
    score_by_head: Callable[[Transformer, list[list[int]], int], ItemScores] | None = None


# ---- texts to tokens ----


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encodes a context and what follows it, as lm-evaluation-harness does.

    Spaces at the context's end go to the continuation, since most tokenizers put a space at the
    beginning of a word. Both are encoded as one text, and what is longer than the context alone is
    the continuation. Without a context, the beginning-of-text token stands in its place (the
    end-of-text token, where there is none).
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = tokenizer.encode(continuation)
        if prefix is None or (ids and ids[0] == prefix):
            return Pair(ids[:1], ids[1:])
        return Pair([prefix], ids)
    context_ids = tokenizer.encode(stripped, bos=tokenizer.adds_bos)
    ids = tokenizer.encode(stripped + continuation, bos=tokenizer.adds_bos)
    return Pair(context_ids, ids[len(context_ids) :])


# ---- log-likelihoods ----


def log_likelihoods(
    model: Transformer, questions: Sequence[Sequence[Pair]], batch_size: int
) -> list[list[float]]:
    """Returns, for each pair of each question, the sum of log p over the tokens of the
    continuation, in nats.

    batch_size: the most questions that are computed at a time; fewer, where their prefix tree would
        have more than NODES_AT_ONCE nodes.
    """
    texts, ends = score_texts(model, questions)
    results: list[list[float]] = [[] for _ in questions]
    bar = progress("scoring", len(questions), "question")
    with bar, eval_mode(model), torch.inference_mode():
        for batch in batches_by_prefix(texts, batch_size):
            batch_texts = [texts[i] for i in batch]
            batch_ends = [ends[i] for i in batch]
            sums = tree_log_likelihoods(model, batch_texts, batch_ends)
            for i, values in zip(batch, sums, strict=True):
                results[i] = values
            bar.update(len(batch))
    return results


def score_texts(
    model: Transformer, questions: Sequence[Sequence[Pair]]
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Returns the texts of each question, a text for each pair, and how many tokens at the end of
    each text are scored.

    The last token of a text predicts nothing that is asked for. So a text may have one token more
    than the model has positions; of a longer one the beginning is cut off.
    """
    most = model.max_positions + 1
    texts = []
    ends = []
    for question in questions:
        for pair in question:
            assert pair.context and 0 < len(pair.continuation) < most, (
                "whoever encodes it checks it"
            )
        texts.append([(pair.context + pair.continuation)[-most:] for pair in question])
        ends.append([len(pair.continuation) for pair in question])
    return texts, ends


def batches_by_prefix(
    texts: Sequence[Sequence[Sequence[int]]], batch_size: int
) -> Iterator[list[int]]:
    """Yields the numbers of questions in batches, in which those that begin alike come together."""
    order = sorted(range(len(texts)), key=lambda i: texts[i][0])
    batch: list[int] = []
    nodes = 0
    last: Sequence[int] = []
    for i in order:
        new = new_nodes(texts[i], last)
        if batch and (len(batch) == batch_size or nodes + new > NODES_AT_ONCE):
            yield batch
            batch = []
            nodes = 0
            new = new_nodes(texts[i], [])
        batch.append(i)
        nodes += new
        last = texts[i][-1]
    if batch:
        yield batch


def new_nodes(question: Sequence[Sequence[int]], last: Sequence[int]) -> int:
    """Returns how many nodes the texts of a question add to a prefix tree, at most. last: the text
    before them."""
    count = 0
    for text in question:
        count += len(text) - shared_length(text, last)
        last = text
    return count


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two texts begin with alike."""
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length


def tree_log_likelihoods(
    model: Transformer, texts: list[list[list[int]]], ends: list[list[int]]
) -> list[list[float]]:
    """Computes the log-likelihoods of a batch of questions.

    texts: of each question. ends: how many tokens at the end of each text are scored.
    """
    # The last token of a text is only predicted.
    tree = PrefixTree([[text[:-1] for text in each] for each in texts], model)
    hidden = tree.hidden(model)  # [nodes, D]

    # What is scored: (node that predicts, token that it predicts), and to which text it belongs.
    nodes: list[int] = []
    targets: list[int] = []
    text_numbers: list[int] = []
    number = 0
    for question, question_ends in zip(texts, ends, strict=True):
        for text, end in zip(question, question_ends, strict=True):
            nodes += tree.paths[number][-end:]
            targets += text[-end:]
            text_numbers += [number] * end
            number += 1
    logprobs = predicted_logprobs(model, hidden, nodes, targets)  # [scored]
    sums = torch.zeros(number, dtype=torch.float64)
    sums.index_add_(0, torch.tensor(text_numbers), logprobs)

    values = iter(sums.tolist())
    return [[next(values) for _ in question] for question in texts]


def predicted_logprobs(
    model: Transformer, hidden: Tensor, nodes: list[int], targets: list[int]
) -> Tensor:
    """Returns the log-probability of each target after its node, float64 on the CPU.

    hidden: [all nodes, D]. A node that predicts several targets (the letters of four choices) gets
    its logits once.
    """
    device = hidden.device
    rows, row_of = torch.tensor(nodes).unique(return_inverse=True)
    target = torch.tensor(targets)
    logprobs = torch.empty(len(nodes), dtype=torch.float64)
    rows_at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(rows), rows_at_once):
        part = rows[start : start + rows_at_once]
        logits = model.logits(hidden[part.to(device)]).float()  # [rows, V]
        log_sums = logits.logsumexp(-1)
        mine = ((row_of >= start) & (row_of < start + len(part))).nonzero().flatten()
        row = (row_of[mine] - start).to(device)
        values = logits[row, target[mine].to(device)] - log_sums[row]
        logprobs[mine] = values.double().cpu()
    return logprobs


# ---- the prefix tree ----


class Piece(NamedTuple):
    """Nodes that a question adds to a prefix tree, and what they attend to.

    start, end: the range of the nodes.
    keys: int64 [keys], the nodes that these attend to: those above them in the tree, and themselves.
    suffix: set where the keys are one text, of which the nodes are the last tokens.
    visible: bool [end - start, keys], which keys each node attends to, where they are several
        texts; else None.
    depths: int64 [keys], the positions of the keys, the last of which are those of the nodes.
    """

    start: int
    end: int
    keys: Tensor
    suffix: QuerySuffix | None
    visible: Tensor | None
    depths: Tensor


class PrefixTree:
    """The texts of a batch of questions as one tree. Its nodes are numbered in the order of the
    texts, so the nodes that a text adds are adjacent, and are the end of the text.

    paths: for each text, the node of each of its tokens.
    """

    def __init__(self, questions: list[list[list[int]]], model: Transformer):
        texts = [text for question in questions for text in question]
        tokens, expand, select = shared_prefixes(texts, model.config)
        device = model.device
        self.tokens = torch.tensor(tokens, device=device)
        self.texts = texts
        self.select = select  # where among the tokens of all texts each node first stands
        self.paths: list[list[int]] = []
        start = 0
        for text in texts:
            self.paths.append(expand[start : start + len(text)])
            start += len(text)
        positions = [position for text in texts for position in range(len(text))]
        lengths = [len(text) for text in texts for _ in text]
        self.depths = torch.tensor([positions[i] for i in select])
        self.positions = self.depths.to(device)
        self.lengths = torch.tensor([lengths[i] for i in select], device=device)
        self.question_sizes = [len(question) for question in questions]
        self.device = device

    def hidden(self, model: Transformer) -> Tensor:
        """Returns the hidden state of each node, [nodes, D], ready for the head."""
        if model.virtual_tokens:
            # A learned prompt stands before whole documents.
            whole = Documents([len(text) for text in self.texts], self.device)
            tokens = [token for text in self.texts for token in text]
            hidden = model.flat(torch.tensor(tokens, device=self.device), whole)
            return hidden[torch.tensor(self.select, device=self.device)]
        attention = self.attention_fn(model)
        attention_fns = [attention] * len(model.blocks)
        return model.hidden(self.tokens, self.positions, self.lengths, attention_fns)

    def attention_fn(self, model: Transformer) -> Callable:
        """Returns the function of q, k, v and scores by which each node attends to those above it."""
        like = torch.empty(0, model.config.head_dim, dtype=model.dtype, device=self.device)
        softcaps = model.config.attention_softcap
        if flash_supports(like) and not softcaps and not has_length_dependent_rope(model.config):
            return self.flash_attention_fn()
        pieces = self.pieces()

        def attention(q: Tensor, k: Tensor, v: Tensor, scores: AttentionScores) -> Tensor:
            out = torch.empty_like(q)
            for piece in pieces:
                queries = q[piece.start : piece.end]
                keys = k.index_select(0, piece.keys)
                values = v.index_select(0, piece.keys)
                if piece.suffix is not None:
                    part = suffix_attention(queries, keys, values, scores, piece.suffix)
                else:
                    part = visible_attention(queries, keys, values, scores, piece)
                out[piece.start : piece.end] = part
            return out

        return attention

    def flash_attention_fn(self) -> Callable:
        """Returns that function for a GPU: one call for all texts, each with its own queries and
        the keys of its whole path."""
        sizes = []  # the nodes that each text adds
        keys: list[int] = []
        lengths = []
        done = 0
        for path in self.paths:
            added = sum(node >= done for node in path)
            if added:
                sizes.append(added)
                keys += path
                lengths.append(len(path))
                done = path[-1] + 1
        cu_seqlens_q = cu_seqlens(sizes, self.device)
        cu_seqlens_k = cu_seqlens(lengths, self.device)
        longest_q = max(sizes)
        longest_k = max(lengths)
        key_nodes = torch.tensor(keys, device=self.device)

        def attention(q: Tensor, k: Tensor, v: Tensor, scores: AttentionScores) -> Tensor:
            k = k.index_select(0, key_nodes)
            v = v.index_select(0, key_nodes)
            return flash_attention(
                q, k, v, scores, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k
            )

        return attention

    def pieces(self) -> list[Piece]:
        """Returns the pieces, in the order of their nodes: one for each question that adds nodes, or
        one for each of its texts, where that saves enough."""
        pieces = []
        done = 0
        first = 0
        for size in self.question_sizes:
            paths = self.paths[first : first + size]
            first += size
            for group in self.groups(paths, done):
                end = max(done, *(path[-1] + 1 for path in group))
                if end > done:
                    pieces.append(self.piece(group, done, end))
                done = end
        return pieces

    def groups(self, paths: list[list[int]], done: int) -> list[list[list[int]]]:
        """Returns the texts of a question in groups, each of which becomes a piece: all together, or
        each alone. Together, each node is compared with the keys of all texts, which is wasted work
        where they share little, such as texts that were cut at their beginning.

        paths: of the texts. done: how many nodes there are before them.
        """
        keys = len({node for path in paths for node in path})
        end = done
        alone = 0
        for path in paths:
            alone += max(0, path[-1] + 1 - end) * len(path)
            end = max(end, path[-1] + 1)
        together = (end - done) * keys
        if together - alone > CALL_COST * (len(paths) - 1):
            return [[path] for path in paths]
        return [paths]

    def piece(self, paths: list[list[int]], start: int, end: int) -> Piece:
        """Returns the piece of some texts of a question. paths: of the texts. start, end: the nodes
        that they add."""
        above = sorted({node for path in paths for node in path if node < start})
        key_list = above + list(range(start, end))
        keys = torch.tensor(key_list)
        depths = self.depths[keys]
        num_queries = end - start
        if len(key_list) == max(len(path) for path in paths):
            suffix = QuerySuffix(num_queries, len(key_list), self.device)
            return Piece(start, end, keys.to(self.device), suffix, None, depths.to(self.device))
        column = {node: i for i, node in enumerate(key_list)}
        visible = torch.zeros(num_queries, len(key_list), dtype=torch.bool)
        done = start
        for path in paths:
            columns = torch.tensor([column[node] for node in path])
            for depth, node in enumerate(path):
                # A node that an earlier text has as well is done, and what a text adds is its end.
                if node >= done:
                    visible[node - start, columns[: depth + 1]] = True
            done = max(done, path[-1] + 1)
        return Piece(
            start, end, keys.to(self.device), None, visible.to(self.device), depths.to(self.device)
        )


def visible_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: AttentionScores, piece: Piece
) -> Tensor:
    """Computes attention of the nodes of a piece to the keys that they see.

    q: [queries, heads, head_dim]; k, v: [keys, kv_heads, head_dim].
    Returns [queries, heads, head_dim].
    """
    visible = piece.visible
    assert visible is not None, "a piece of one text goes to suffix_attention"
    if scores.window:
        depths = piece.depths
        distance = depths[-len(q) :, None] - depths  # [queries, keys]
        visible = visible & (distance < scores.window)
    n_rep = q.shape[1] // k.shape[1]
    # The query heads of a key-value head are rows of one product; all key-value heads share a mask.
    mask = decode_mask(visible[None], 1, n_rep, q.dtype)  # [1, n_rep * queries, keys]
    keys = k.transpose(0, 1)[None].contiguous()  # [1, kv_heads, keys, d]
    values = v.transpose(0, 1)[None].contiguous()
    return cached_attention(q, keys, values, mask, scores)
