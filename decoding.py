"""Writing on: the cache of keys and values, sampling, and prompt look-up. `Transformer.generate` is the way in.

Prompts of all lengths end in the same slot of the cache, so that every step writes one slice for all lines and nothing
is scattered; what a line has not got is masked. The cache's tensors stay as they are for ROUND steps, then get as many
slots more: a product over a slice of larger ones takes a third longer on CPUs. Layers with a sliding window need no
more slots than that: theirs are a ring.

A GPU does a step's kernels faster than Python launches them. So there (`stream_ahead`) the position and the newest
tokens lie in the GPU's memory, where the step itself moves them on: the same launches serve every step, they are
captured in a CUDA graph, and a token costs one replay.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from kernels.attention import Documents, cached_attention, decode_mask, document_attention
from kernels.decode_attention import decode_attention
from kernels.nf4 import NF4, block_scales, dequantized_weight, nf4_linear
from kernels.onednn_linear import can_join, can_pack, pack, packed_linear
from kernels.rope import LENGTH_DEPENDENT, rope
from kernels.triton_utils import use_triton

CACHE_ROUND = 32  # slots; the cache holds a multiple of so many, so that shapes seldom change
GRAPH_ROUND = 256  # the same where steps are captured, which is done anew for new shapes
GRAPH_STEPS = 8  # to come that make up for a capture, which is taken to last as long as two or three (not measured)
PACK_STEPS = 16  # of decoding that make up for packing the weights
LOOKUP_NGRAMS = (3, 2, 1)  # ends of the text that prompt look-up looks for, longest first


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
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    ends = [min(len(row) + max_new_tokens, most) for row in rows]
    if not lookup and repetition_penalty == 1 and max_new_tokens > GRAPH_STEPS and can_run_ahead(model):
        yield from stream_ahead(model, rows, ends, stop, choose, captured=temperature == 0)
        return
    going, texts = list(range(len(rows))), rows  # the prompt number of each line of the cache, and its text so far
    cache, hidden = prefill(model, rows, ends, lookup, CACHE_ROUND)
    draft: list[int] = []
    while True:
        logits = model.logits(hidden)  # [lines, 1 + length of the draft, V]
        for at in range(logits.shape[1]):
            scores = apply_repetition_penalty(logits[:, at], texts, repetition_penalty)
            new = choose(scores).tolist()
            for row, token in zip(texts, new, strict=True):
                row.append(token)
            yield list(zip(going, new, strict=True))
            if at == len(draft) or new[0] != draft[at] or new[0] in stop:
                break
        cache.rollback(len(draft) - at)
        alive = [line for line, i in enumerate(going) if rows[i][-1] not in stop and len(rows[i]) < ends[i]]
        if not alive:
            return
        if len(alive) < len(going):
            cache.keep(alive)
            going = [going[line] for line in alive]
            texts = [rows[i] for i in going]
        change, length = model.config.rope_switch_length, len(texts[0])
        if any(len(row) == change for row in texts):
            draft, (cache, hidden) = [], prefill(model, texts, [ends[i] for i in going], lookup, CACHE_ROUND)
            continue
        room = min(ends[going[0]], change if change and length < change else most) - length - 1
        draft = lookup_draft(texts[0], min(lookup, room))
        hidden = cache.run(torch.tensor([[row[-1], *draft] for row in texts], device=model.device))


def prefill(model, rows: list[list[int]], ends: list[int], lookup: int, multiple: int) -> tuple["KVCache", Tensor]:
    """A cache that holds the rows, with room up to their ends, and the hidden state of each row's end, [rows, 1, D]."""
    new = max(end - len(row) for row, end in zip(rows, ends))
    cache = KVCache(model, [len(row) for row in rows], new, 1 + lookup, multiple)
    return cache, cache.prefill(rows)[:, None]


class KVCache:
    """Keys and values of sequences in progress, [lines, G, slots, d] each a layer.

    lengths: of the prompts; new: tokens that may follow; at_once: tokens that a step may add; multiple: of slots that a
    layer has. Global slot g, counted from the longest prompt's beginning, is slot g mod the layer's number of them.
    """

    def __init__(self, model, lengths: list[int], new: int, at_once: int, multiple: int):
        self.model, self.documents, self.multiple = model, Documents(lengths, model.device), multiple
        self.filled = max(lengths)  # global slots, of every line
        self.starts = torch.tensor([self.filled - n for n in lengths], device=model.device)  # a line's first one
        wanted, windows = self.filled + new + at_once, [layer.window for layer in model.config.layers]
        self.most = [self.round_up(min(wanted, window + at_once) if window else wanted) for window in windows]
        shape = len(lengths), model.config.num_kv_heads, 0, model.config.head_dim
        self.layers = [(torch.empty(shape, dtype=model.dtype, device=model.device),) * 2 for _ in windows]
        self.kinds = [(0, window) for window in windows]  # a layer's number of slots, and its window
        self.make_room(self.filled)

    def round_up(self, slots: int) -> int:
        return -(-slots // self.multiple) * self.multiple

    def lacks_room(self, slots: int) -> bool:
        """Whether `make_room` for so many global slots would change a layer."""
        return any(min(most, self.round_up(slots)) > held for (held, _), most in zip(self.kinds, self.most))

    def make_room(self, slots: int) -> None:
        """For so many global slots, in every layer. Only a ring that is as large as it gets has gone round."""
        for i, ((held, window), most) in enumerate(zip(self.kinds, self.most)):
            more = min(most, self.round_up(slots)) - held
            if more > 0:
                self.layers[i] = tuple(F.pad(x, (0, 0, 0, more)) for x in self.layers[i])
                self.kinds[i] = held + more, window

    def prefill(self, rows: list[list[int]]) -> Tensor:
        """The prompts -> hidden of each one's last token [lines, D]. Where prompts begin with the same tokens, as they
        do after one system turn or after the same examples, these go through the layers once; attention alone takes
        whole prompts."""
        computed, whole, own = shared_prefixes(rows, self.model.config)
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
        spans, ends = self.documents.doc_lengths, lengths.cumsum(0) - 1
        if whole is not None:
            positions, spans, ends = positions[own], spans[own], whole[ends]
        return self.model.hidden(torch.tensor(computed, device=device), positions, spans, attends)[ends]

    def run(self, tokens: Tensor) -> Tensor:
        """The same number of new tokens for each line, int64 [lines, n] -> hidden [lines, n, D]."""
        self.make_room(self.filled + tokens.shape[1])
        hidden = self.forward(tokens, self.filled)
        self.filled += tokens.shape[1]
        return hidden

    def forward(self, tokens: Tensor, filled: int | Tensor) -> Tensor:
        """What `run` does once there is room. filled: global slots, as a number; or int64 [1] on the device: then what
        is launched does not depend on it, and lines may be computed beyond their ends."""
        lines, n = tokens.shape
        steps = torch.arange(n, device=tokens.device)
        positions = (filled - self.starts[:, None] + steps).flatten()
        if isinstance(filled, Tensor):
            positions = positions.clamp(max=self.model.config.max_positions - 1)
            attends = self.attends_on_device(filled)
        else:
            attends = self.attends(filled, n)
        hidden = self.model.hidden(tokens.flatten(), positions, positions + 1, attends)
        return hidden.view(lines, n, -1)

    def attends(self, filled: int, n: int) -> list[Callable]:
        """Attention of n new tokens a line, for each layer: they are written into it first."""
        lines, steps = len(self.starts), torch.arange(n, device=self.starts.device)
        masks = {kind: self.mask(filled, n, *kind) for kind in {*self.kinds}}

        def attend(keys, values, kind):
            mask, slots = masks[kind], kind[0]
            at = filled % slots

            def attention(q, k, v, scores):  # q: [lines * n, H, d]
                k, v = (x.view(lines, n, *x.shape[1:]).transpose(1, 2) for x in (k, v))  # [lines, G, n, d]
                if at + n <= slots:
                    keys[:, :, at : at + n], values[:, :, at : at + n] = k, v
                else:  # over the end of the ring
                    where = (filled + steps) % slots
                    keys.index_copy_(2, where, k), values.index_copy_(2, where, v)
                return cached_attention(q, keys, values, mask, scores)

            return attention

        return [attend(*layer, kind) for layer, kind in zip(self.layers, self.kinds)]

    def attends_on_device(self, filled: Tensor) -> list[Callable]:
        """The same of one new token a line, whose slot is a number on the device."""
        fused = use_triton(filled)
        places = {} if fused else {slots: filled % slots for slots, _ in {*self.kinds}}
        masks = {} if fused else {kind: self.mask(filled, 1, *kind) for kind in {*self.kinds}}

        def attend(keys, values, kind):
            def attention(q, k, v, scores):  # q: [lines, H, d]
                if fused:
                    return decode_attention(q, k, v, keys, values, filled, self.starts, scores)
                keys.index_copy_(2, places[kind[0]], k[:, :, None])
                values.index_copy_(2, places[kind[0]], v[:, :, None])
                return cached_attention(q, keys, values, masks[kind], scores)

            return attention

        return [attend(*layer, kind) for layer, kind in zip(self.layers, self.kinds)]

    def mask(self, filled: int | Tensor, n: int, slots: int, window: int | None) -> Tensor:
        """What n new tokens a line see of a layer's slots, as cached_attention takes it."""
        last, device = filled + (n - 1), self.starts.device
        slot = torch.arange(slots, device=device)
        holds = last - (last - slot) % slots  # the newest global slot that lies there
        rows = filled + torch.arange(n, device=device)
        seen = (holds >= self.starts[:, None, None]) & (holds <= rows[:, None])
        if window is not None:
            seen &= holds > rows[:, None] - window
        heads, kv_heads = self.model.config.num_heads, self.model.config.num_kv_heads
        return decode_mask(seen, kv_heads, heads // kv_heads, self.model.dtype)

    def rollback(self, tokens: int) -> None:
        """Takes the last tokens back: their slots are written anew before they are seen."""
        self.filled -= tokens

    def keep(self, alive: list[int]) -> None:
        """Forgets all lines but these, in this order."""
        alive = torch.tensor(alive, dtype=torch.int64, device=self.starts.device)
        self.starts = self.starts[alive]
        self.layers = [tuple(x.index_select(0, alive) for x in layer) for layer in self.layers]


# ---- steps that a GPU takes by itself ----


def stream_ahead(
    model, rows: list[list[int]], ends: list[int], stop, choose: Callable[[Tensor], Tensor], captured: bool
) -> Iterator[list[tuple[int, int]]]:
    """As `stream`, the GPU one step ahead: the next step is launched before the tokens of the last are read, so that
    the host waits for those only. Lines that have ended are computed on, unread, until half of the lines have; the last
    step of all is for nothing where a stop id ends the text.

    rows: the prompts; ends: their texts' lengths at most. choose: ids [lines] from logits [lines, V]; captured: with
    the step.
    """
    cache, hidden = prefill(model, rows, ends, 0, GRAPH_ROUND)
    steps = Steps(cache, model.logits(hidden)[:, 0], choose, captured)
    lines = going = list(range(len(rows)))  # the prompt number of each line of the cache; of those that have not ended
    left = [end - len(row) for row, end in zip(rows, ends)]
    arriving = PendingTokens(steps.tokens, lines)
    while True:
        more, ahead = max(left[i] for i in going) - 1, None  # more: tokens that may follow those that are arriving
        if more:
            steps.take(more)
            ahead = PendingTokens(steps.tokens, lines)
        new = arriving.read()
        yield [(i, new[i]) for i in going]
        for i in going:
            left[i] -= 1
        going = [i for i in going if left[i] and new[i] not in stop]
        if not going:
            return
        if 2 * len(going) <= len(lines) and max(left[i] for i in going) > GRAPH_STEPS:
            steps.keep([lines.index(i) for i in going])
            lines = going
        arriving = ahead


class PendingTokens:
    """Tokens [lines] on their way to the host, as they are now: they may be overwritten on the device at once."""

    def __init__(self, tokens: Tensor, lines: list[int]):
        self.tokens, self.lines = tokens.to("cpu", non_blocking=True, copy=True), lines
        self.there = None
        if tokens.is_cuda:
            self.there = torch.cuda.Event()
            self.there.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> dict[int, int]:
        """By prompt number, when they have arrived."""
        if self.there is not None:
            self.there.synchronize()
        return dict(zip(self.lines, self.tokens.tolist(), strict=True))


class Steps:
    """One token a line at a time, the newest going in, the next coming out, and all that changes on the device.

    tokens: int64 [lines], the newest ones. filled: int64 [1], global slots of the cache that are filled. logits:
    [lines, V], from which the newest tokens are chosen, where that is done outside of what is captured.
    """

    def __init__(self, cache: KVCache, logits: Tensor, choose: Callable[[Tensor], Tensor], captured: bool):
        self.cache, self.choose, self.tokens = cache, choose, choose(logits)
        self.filled = torch.full((1,), cache.filled, device=logits.device)
        self.logits, self.graph = None if captured else logits, None

    def launch(self) -> None:
        """What every step launches: nothing here depends on which step it is, and all of it ends in the same memory."""
        logits = self.cache.model.logits(self.cache.forward(self.tokens[:, None], self.filled))[:, 0]
        self.filled += 1
        if self.logits is None:
            self.tokens.copy_(self.choose(logits))
        else:
            self.logits.copy_(logits)

    def take(self, steps: int) -> None:
        """The next step. steps: that may come, this one included. The first of a shape is launched kernel by kernel,
        which warms up what the capture needs; those after it are replays."""
        if self.cache.lacks_room(self.cache.filled + 1):
            self.graph = None  # before the cache is copied: a graph holds memory of its own
            self.cache.make_room(self.cache.filled + 1)
        if self.graph is not None:
            self.graph.replay()
        elif steps > GRAPH_STEPS and not failed:
            self.graph = run_and_capture(self.launch, self.tokens.device)
        else:
            self.launch()
        if self.logits is not None:
            self.tokens.copy_(self.choose(self.logits))
        self.cache.filled += 1

    def keep(self, alive: list[int]) -> None:
        """Forgets all lines but these, in this order."""
        self.graph = None
        self.cache.keep(alive)
        alive = torch.tensor(alive, device=self.tokens.device)
        self.tokens = self.tokens[alive]
        self.logits = None if self.logits is None else self.logits[alive]


failed: list["torch.cuda.CUDAGraph"] = []  # captures; kept, as torch's allocator may go on asking them


def run_and_capture(launch: Callable[[], None], device: torch.device) -> "torch.cuda.CUDAGraph | None":
    """Runs launch(), then captures what it launches, which is not run again: a graph to be replayed; or None, and a
    NOTE on stderr, where that fails."""
    stream, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        launch()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):  # if the end of the inner one fails, its
            launch()  # stream stays on: the outer one takes it off
    except RuntimeError as error:
        failed.append(graph)
        cause = error
        while cause.__context__ is not None:  # the end of a capture says only that something was wrong before
            cause = cause.__context__
        print(
            f"NOTE: steps can't be captured in a CUDA graph ({str(cause).strip().partition(chr(10))[0]}); their kernels"
            " are launched one by one, which takes longer",
            file=sys.stderr,
        )
        return None
    return graph


@cache
def side_stream(device: torch.device) -> "torch.cuda.Stream":
    """The one that steps are captured on, for the default stream can't be: always the same one, since cuBLAS keeps a
    workspace for each."""
    return torch.cuda.Stream(device)


def can_run_ahead(model) -> bool:
    """Whether a model's steps can be captured on its device: not where the turns depend on the text's length, or where
    experts get their tokens by numbers that the host reads, nor after a capture that failed."""
    config = model.config
    stretches = any((rope.scaling or {}).get("rope_type") in LENGTH_DEPENDENT for rope in config.ropes)
    routed = any(layer.routed for layer in config.layers)
    return model.device.type == "cuda" and not (failed or stretches or routed)


# ---- prompts that begin alike ----


def shared_prefixes(rows: list[list[int]], config) -> tuple[list[int], list[int], list[int]]:
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


def lookup_draft(row: list[int], most: int) -> list[int]:
    """What followed the row's last few tokens where they last stood before: a guess at what comes (Saxena 2023). The
    model checks all of it in one pass, and what it would have chosen itself is kept (Leviathan et al. 2023)."""
    for n in LOOKUP_NGRAMS if most > 0 else ():
        end = row[-n:]
        for at in range(len(row) - n - 1, -1, -1):
            if row[at : at + n] == end:
                return row[at + n : at + n + most]
    return []


# ---- choosing ----


def apply_repetition_penalty(logits: Tensor, rows: list[list[int]], penalty: float) -> Tensor:
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
    probs = logits.softmax(-1)
    return (
        sample_from(probs, generator) if probs.is_cuda else torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    )


def sample_from(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """What torch.multinomial draws, one a row, by the same random numbers, but without its look at the probabilities,
    for which the host would wait. With q from Exp(1), argmax p / q is i with probability p_i: the exponential races of
    the Gumbel-max trick (Maddison et al. 2014)."""
    noise = torch.empty_like(probs).exponential_(1, generator=generator)
    return torch.div(probs, noise, out=noise).argmax(-1)


# ---- copies of weights, in the layout that decoding wants ----


@contextlib.contextmanager
@torch.no_grad()
def packed_weights(model, steps: int) -> Iterator[None]:
    """Holds copies of weights while it is entered, in the layout that a product with few rows reads fastest.

    On CPUs (see kernels/onednn_linear.py) every weight is packed, the output head included; q, k and v of a layer are
    packed as one matrix, and so are gate and up, where no adapter is on them. On GPUs only those groups are copied,
    each into one matrix, if twice their size is free. Nothing is copied where that does not pay or does not fit.

    The copies are reached by instance attributes that stand over the modules' methods (`forward`, for example), which
    are deleted at the end. Enter it around several calls of `generate`, and they share one copy. Weights must not
    change meanwhile.

    model: a Transformer, with or without adapters.
    steps: the number of decoding steps to come.
    """
    if steps < PACK_STEPS or is_packed(model):
        yield
        return
    linears = {module for module in model.modules() if hasattr(module, "nf4") and module is not model.head}
    groups = {}  # {an attention or MLP module: its linears that read the same input}
    for module in model.modules():
        if hasattr(module, "q"):
            groups[module] = [module.q, module.k, module.v]
        elif hasattr(module, "gate"):
            groups[module] = [module.gate, module.up]
    groups = {module: group for module, group in groups.items() if linears.issuperset(group)}  # without adapted ones
    on_cpu = model.device.type == "cpu"
    if on_cpu:
        total = 2 * sum(m.in_features * m.out_features for m in linears) + 2 * model.head_weight().numel()
        plain = [model.head_weight(), *(m.weight for m in linears if m.nf4 is None)]
        fits = all(can_pack(weight, total) for weight in plain)
    else:
        groups = {module: group for module, group in groups.items() if can_concatenate(group, model.dtype)}
        fits = can_join(sum(fused_bytes(linear) for group in groups.values() for linear in group), model.device)
    if not fits:
        yield
        return

    overrides: list[tuple[nn.Module, str]] = []

    def override(module: nn.Module, method: str, function: Callable) -> None:
        setattr(module, method, function)
        overrides.append((module, method))

    try:
        for module, group in groups.items():
            weights = FusedWeights(group, packed=on_cpu)
            if hasattr(module, "q"):
                override(module, "project", partial(project_fused, module, weights))
                override(module, "forward", partial(attention_fused, module, weights))
            else:
                override(module, "forward", partial(mlp_fused, module, weights))
        if on_cpu:
            for linear in linears.difference(*groups.values()):
                packed = pack(dequantized_weight(linear.frozen, torch.bfloat16))
                override(linear, "forward", partial(packed_linear, packed=packed, bias=linear.bias))
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    override(module, "forward", partial(lora_packed, module))
                    # Of a Linear, this computes layers that are no Linears one by one, each by its own forward.
                    override(module, "forward_shared", module.base.forward_shared)
            override(model, "uncapped_logits", partial(logits_packed, pack(model.head_weight())))
        yield
    finally:
        for module, method in overrides:
            delattr(module, method)


def is_packed(model) -> bool:
    """True while `packed_weights` holds copies of weights of the model."""
    return any("forward" in vars(module) or "uncapped_logits" in vars(module) for module in model.modules())


class FusedWeights:
    """The weights of linears that read the same input, as one matrix: [N, in] -> [N, all their outputs].

    Outputs are in the order of the linears. packed: in oneDNN's layout, for CPUs. Otherwise the copy is in 16 bits, or
    in NF4. Scales of double quantization are written out there, to the same numbers: their nested blocks are counted
    through a whole matrix, which has an offset of its own.
    """

    def __init__(self, linears: list, packed: bool):
        biases = [linear.bias for linear in linears]
        frozen = [linear.frozen for linear in linears]
        self.bias = None if biases[0] is None else torch.cat(biases)
        if packed:
            self.linear = packed_linear
            self.weight = pack(torch.cat([dequantized_weight(each, torch.bfloat16) for each in frozen]))
        elif linears[0].nf4 is None:
            self.linear = F.linear
            self.weight = torch.cat([linear.weight for linear in linears])
        else:
            codes = [each.packed for each in frozen]
            scales = [block_scales(each) for each in frozen]
            self.linear = nf4_linear
            self.weight = NF4(torch.cat(codes), torch.cat(scales))

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight, self.bias)


def can_concatenate(linears: list, dtype: torch.dtype) -> bool:
    """True if linears can be one matrix on a GPU: all in NF4, or all in the 16 bits of the activations' dtype, with
    biases in that dtype."""
    plain = [linear.weight for linear in linears if linear.nf4 is None]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    alike = len(plain) in (0, len(linears))
    return alike and dtype.itemsize == 2 and all(tensor.dtype == dtype for tensor in plain + biases)


def fused_bytes(linear) -> int:
    """The bytes that a linear takes in the weight of FusedWeights on a GPU."""
    if linear.nf4 is None:
        return linear.weight.nbytes
    return linear.nf4.packed.nbytes + 4 * linear.nf4.absmax.numel()


def project_fused(attention, weights: FusedWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Attention.project`, by one product."""
    H, G, d = attention.heads, attention.kv_heads, attention.head_dim
    q, k, v = weights(x).split((H * d, G * d, G * d), -1)
    return q.reshape(-1, H, d), k.reshape(-1, G, d), v.reshape(-1, G, d)


def attention_fused(attention, weights: FusedWeights, x: Tensor, cos_sin, attention_fn) -> Tensor:
    """`Attention.forward`, by one product for q, k and v and, on CPUs, one rotation for q and k."""
    if cos_sin is None or attention.qk_norm or use_triton(x):
        return type(attention).forward(attention, x, cos_sin, attention_fn)
    H, G = attention.heads, attention.kv_heads
    qkv = weights(x).view(-1, H + 2 * G, attention.head_dim)
    qk = rope(qkv[:, : H + G], *cos_sin)
    out = attention_fn(qk[:, :H], qk[:, H:], qkv[:, H + G :], attention.scores)
    return attention.o(out.flatten(1))


def mlp_fused(mlp, weights: FusedWeights, x: Tensor) -> Tensor:
    """`MLP.forward` of a gated MLP, by one product for gate and up."""
    gate, up = weights(x).chunk(2, -1)
    return mlp.down.forward_shared(gate, [mlp.down], up, mlp.activation)[0]


def lora_packed(layer, x: Tensor) -> Tensor:
    """`LoRALinear.forward` on a packed base: the product of the adapter is added to that of the base in place."""
    if layer.merged or layer.uses_dropout:
        return type(layer).forward(layer, x)
    low = F.linear(x, layer.lora_A.to(x.dtype))
    return layer.base(x).addmm_(low, layer.lora_B.to(x.dtype).t(), alpha=layer.scale)


def logits_packed(weight: Tensor, hidden: Tensor) -> Tensor:
    """`Transformer.uncapped_logits`, with the packed weight of the output head."""
    rows = packed_linear(hidden.flatten(0, -2), weight)
    return rows.view(*hidden.shape[:-1], -1)
