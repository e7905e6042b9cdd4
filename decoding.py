"""Writing on: the cache of keys and values, sampling, and prompt look-up. `Transformer.generate` is the way in.

Prompts of all lengths end in the same slot of the cache, so that every step writes one slice for all lines and nothing
is scattered; what a line has not got is masked. The cache's tensors stay as they are for ROUND steps, then get as many
slots more: a product over a slice of larger ones takes a third longer on CPUs. Layers with a sliding window need no
more slots than that: theirs are a ring.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from kernels.attention import Documents, cached_attention, document_attention, stacked_mask
from kernels.rope import LENGTH_DEPENDENT

ROUND = 32  # slots; the cache holds a multiple of so many, so that shapes seldom change
GRAMS = (3, 2, 1)  # ends of the text that prompt look-up looks for, longest first


def stream(
    model,
    prompts,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: set[int] | frozenset[int] = frozenset(),
    seed: int | None = None,
    lookup: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """What Transformer.stream documents, for a model in evaluation mode."""
    rows = [list(map(int, prompt)) for prompt in prompts]
    if not rows or max_new_tokens < 1:
        return
    most = model.config.max_positions
    for row in rows:
        if not 0 < len(row) < most:
            raise UserError(f"a prompt has {len(row)} tokens; the model takes 1 to {most - 1}")
    assert not lookup or (len(rows) == 1 and temperature == 0), "look-up is for one prompt, greedily"
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    ends = [min(len(row) + max_new_tokens, most) for row in rows]
    going, texts = list(range(len(rows))), rows  # the prompt number of each line of the cache, and its text so far
    cache, hidden = prefill(model, rows, ends, lookup)
    draft: list[int] = []
    while True:
        logits = model.logits(hidden)  # [lines, 1 + length of the draft, V]
        for at in range(logits.shape[1]):
            scores = penalised(logits[:, at], texts, repetition_penalty)
            new = sample(scores, temperature, top_k, top_p, generator).tolist()
            for row, token in zip(texts, new, strict=True):
                row.append(token)
            yield list(zip(going, new, strict=True))
            if at == len(draft) or new[0] != draft[at] or new[0] in stop:
                break
        cache.forget(len(draft) - at)
        alive = [line for line, i in enumerate(going) if rows[i][-1] not in stop and len(rows[i]) < ends[i]]
        if not alive:
            return
        if len(alive) < len(going):
            cache.keep(alive)
            going = [going[line] for line in alive]
            texts = [rows[i] for i in going]
        change, length = model.config.turns_change_at, len(texts[0])
        if any(len(row) == change for row in texts):
            draft, (cache, hidden) = [], prefill(model, texts, [ends[i] for i in going], lookup)
            continue
        room = min(ends[going[0]], change if change and length < change else most) - length - 1
        draft = propose(texts[0], min(lookup, room))
        hidden = cache.run(torch.tensor([[row[-1], *draft] for row in texts], device=model.device))


def prefill(model, rows: list[list[int]], ends: list[int], lookup: int) -> tuple["KVCache", Tensor]:
    """A cache that holds the rows, with room up to their ends, and the hidden state of each row's end, [rows, 1, D]."""
    cache = KVCache(model, [len(row) for row in rows], max(end - len(row) for row, end in zip(rows, ends)), 1 + lookup)
    return cache, cache.prefill(rows)[:, None]


class KVCache:
    """Keys and values of sequences in progress, [lines, G, slots, d] each a layer.

    lengths: of the prompts; new: tokens that may follow; at_once: tokens that a step may add. Global slot g, counted
    from the longest prompt's beginning, is slot g mod the layer's number of them.
    """

    def __init__(self, model, lengths: list[int], new: int, at_once: int = 1):
        self.model, self.documents = model, Documents(lengths, model.device)
        self.filled = max(lengths)  # global slots, of every line
        self.starts = torch.tensor([self.filled - n for n in lengths], device=model.device)  # a line's first one
        wanted, windows = self.filled + new + at_once, [layer.window for layer in model.config.layers]
        self.most = [rounded(min(wanted, window + at_once) if window else wanted) for window in windows]
        shape = len(lengths), model.config.num_kv_heads, 0, model.config.head_dim
        self.layers = [(torch.empty(shape, dtype=model.dtype, device=model.device),) * 2 for _ in windows]
        self.kinds = [(0, window) for window in windows]  # a layer's number of slots, and its window
        self.make_room(self.filled)

    def make_room(self, slots: int) -> None:
        """For so many global slots, in every layer. Only a ring that is as large as it gets has gone round."""
        for i, ((held, window), most) in enumerate(zip(self.kinds, self.most)):
            more = min(most, rounded(slots)) - held
            if more > 0:
                self.layers[i] = tuple(F.pad(x, (0, 0, 0, more)) for x in self.layers[i])
                self.kinds[i] = held + more, window

    def prefill(self, rows: list[list[int]]) -> Tensor:
        """The prompts -> hidden of each one's last token [lines, D]. Where prompts begin with the same tokens, as they
        do after one system turn or after the same examples, these go through the layers once; attention alone takes
        whole prompts."""
        computed, whole, own = shared_beginnings(rows, self.model.config)
        device, positions, lengths = self.starts.device, self.documents.positions, self.filled - self.starts
        whole, own = (torch.tensor(x, device=device) if len(computed) < len(positions) else None for x in (whole, own))
        line = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        places = positions + self.starts[line]  # global slots [N]
        kept = {}
        for slots, _ in {*self.kinds}:
            last = (places >= self.filled - slots).nonzero().flatten()  # the tokens that the layer has room for
            kept[slots] = last, line[last], places[last] % slots

        def attend(keys, values, slots):
            last, lines, at = kept[slots]

            def attention(q, k, v, scores):
                if whole is not None:
                    q, k, v = (x.index_select(0, whole) for x in (q, k, v))
                keys[lines, :, at], values[lines, :, at] = k[last], v[last]
                out = document_attention(q, k, v, scores, self.documents)
                return out if own is None else out.index_select(0, own)

            return attention

        attends = [attend(*layer, slots) for layer, (slots, _) in zip(self.layers, self.kinds)]
        spans, ends = self.documents.spans, lengths.cumsum(0) - 1
        if whole is not None:
            positions, spans, ends = positions[own], spans[own], whole[ends]
        return self.model.hidden(torch.tensor(computed, device=device), positions, spans, attends)[ends]

    def run(self, tokens: Tensor) -> Tensor:
        """The same number of new tokens for each line, int64 [lines, n] -> hidden [lines, n, D]."""
        lines, n = tokens.shape
        self.make_room(self.filled + n)
        steps = torch.arange(n, device=tokens.device)
        positions = (self.filled - self.starts[:, None] + steps).flatten()
        masks = {kind: self.mask(n, *kind) for kind in {*self.kinds}}

        def attend(keys, values, kind):
            mask, slots = masks[kind], kind[0]
            at = self.filled % slots

            def attention(q, k, v, scores):  # q: [lines * n, H, d]
                k, v = (x.view(lines, n, *x.shape[1:]).transpose(1, 2) for x in (k, v))  # [lines, G, n, d]
                if at + n <= slots:
                    keys[:, :, at : at + n], values[:, :, at : at + n] = k, v
                else:  # over the end of the ring
                    where = (self.filled + steps) % slots
                    keys.index_copy_(2, where, k), values.index_copy_(2, where, v)
                return cached_attention(q, keys, values, mask, scores)

            return attention

        attends = [attend(*layer, kind) for layer, kind in zip(self.layers, self.kinds)]
        hidden = self.model.hidden(tokens.flatten(), positions, positions + 1, attends)
        self.filled += n
        return hidden.view(lines, n, -1)

    def mask(self, n: int, slots: int, window: int | None) -> Tensor:
        """What n new tokens a line see of a layer's slots, as cached_attention takes it."""
        last, device = self.filled + n - 1, self.starts.device
        slot = torch.arange(slots, device=device)
        holds = last - (last - slot) % slots  # the newest global slot that lies there
        rows = self.filled + torch.arange(n, device=device)
        seen = (holds >= self.starts[:, None, None]) & (holds <= rows[:, None])
        if window is not None:
            seen &= holds > rows[:, None] - window
        heads, kv_heads = self.model.config.num_heads, self.model.config.num_kv_heads
        return stacked_mask(seen, kv_heads, heads // kv_heads, self.model.dtype)

    def forget(self, tokens: int) -> None:
        """Takes the last tokens back: their slots are written anew before they are seen."""
        self.filled -= tokens

    def keep(self, alive: list[int]) -> None:
        """Forgets all lines but these, in this order."""
        alive = torch.tensor(alive, dtype=torch.int64, device=self.starts.device)
        self.starts = self.starts[alive]
        self.layers = [tuple(x.index_select(0, alive) for x in layer) for layer in self.layers]


def rounded(slots: int) -> int:
    return -(-slots // ROUND) * ROUND


def shared_beginnings(rows: list[list[int]], config) -> tuple[list[int], list[int], list[int]]:
    """(tokens to compute, for each token of all rows the one computed that it is, for each computed its first place).

    Two tokens are one where everything up to them is the same. For ropes that stretch with the text, its length too.
    """
    stretches = any((rope.scaling or {}).get("rope_type") in LENGTH_DEPENDENT for rope in config.ropes)
    computed: dict[tuple[int, int], int] = {}  # (the token before, id) -> its number
    whole, own = [], []
    for row in rows:
        at = -len(row) if stretches else -1  # before the first token
        for token in row:
            count = len(computed)
            at = computed.setdefault((at, token), count)
            if at == count:
                own.append(len(whole))
            whole.append(at)
    return [token for _, token in computed], whole, own


# ---- prompt look-up ----


def propose(row: list[int], most: int) -> list[int]:
    """What followed the row's last few tokens where they last stood before: a guess at what comes (Saxena 2023). The
    model checks all of it in one pass, and what it would have chosen itself is kept (Leviathan et al. 2023)."""
    for n in GRAMS if most > 0 else ():
        end = row[-n:]
        for at in range(len(row) - n - 1, -1, -1):
            if row[at : at + n] == end:
                return row[at + n : at + n + most]
    return []


# ---- choosing ----


def penalised(logits: Tensor, rows: list[list[int]], penalty: float) -> Tensor:
    """Logits with the penalty of Keskar et al. 2019 (CTRL) on ids that a row holds, then float32."""
    if penalty == 1.0:
        return logits
    logits = logits.float()
    for line, row in zip(logits, rows, strict=True):
        ids = torch.tensor(sorted(set(row)), device=logits.device)
        line[ids] = torch.where(line[ids] > 0, line[ids] / penalty, line[ids] * penalty)
    return logits


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One id a row, int64 [B], from logits [B, V]."""
    if temperature == 0:
        return logits.float().argmax(-1)  # on CPUs five times as fast as in bf16
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the mass of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        ordered[:, 0] = logits.max(-1).values  # top_p 0 still leaves the likeliest
        logits = torch.empty_like(logits).scatter_(1, ids, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
