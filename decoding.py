"""Decoding: the cache of keys and values, sampling, speculative decoding by prompt look-up, and
packed weights.

`Transformer.stream` and `Transformer.generate` are the entry points; this file never imports
model.py.

The prompts of a batch are aligned at their ends: whatever their lengths, they end in the same slot
of the cache. So each step writes one slice for all sequences, and the slots before the first token
of a sequence are masked. The cache's tensors keep their size for CACHE_ROUND steps and then get as
many slots more, because a product over a slice of larger tensors takes a third longer on CPUs. A
layer with a sliding window needs only as many slots as its window: they are a ring buffer.

A GPU executes the kernels of a step faster than Python launches them. So on a GPU (`stream_ahead`)
the position and the newest tokens stay in the GPU's memory, and the step itself updates them. The
launches are then the same in every step: a CUDA graph captures them, and a token costs one replay.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, first_line
from kernels.attention import Documents, cached_attention, decode_mask, document_attention
from kernels.decode_attention import decode_attention
from kernels.draws import draw
from kernels.nf4 import NF4, block_scales, dequantized_weight, nf4_linear
from kernels.onednn_linear import can_join, can_pack, pack_weight, packed_linear
from kernels.rope import LENGTH_DEPENDENT, rope
from kernels.shared_rows import SharedRows, attend_shared
from kernels.triton_utils import use_triton

# The cache holds a multiple of so many slots, so that shapes seldom change.
CACHE_ROUND = 32

# The same where steps are captured, because a new shape needs a new capture.
GRAPH_ROUND = 256

# So many steps to come make up for a capture, if it takes as long as two or three steps (not
# measured).
GRAPH_STEPS = 8

# So many steps to come make up for packing the weights.
PACK_STEPS = 16

# Prompt look-up searches for the last so many tokens of the text, the longest first.
LOOKUP_NGRAMS = (3, 2, 1)


def stream(
    model,
    prompts,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: set[int] | frozenset[int] = frozenset(),
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    lookup: int = 0,
    draws: "Draws | None" = None,
) -> Iterator[list[tuple[int, int]]]:
    """Yields what Transformer.stream documents, for a model in evaluation mode."""
    # The ids of each prompt; the new ids are appended to them.
    texts = [list(map(int, prompt)) for prompt in prompts]
    if not texts or max_new_tokens < 1:
        return
    max_positions = model.max_positions
    for text in texts:
        if not 0 < len(text) < max_positions:
            raise UserError(
                f"a prompt has {len(text)} tokens; the model takes 1 to {max_positions - 1}"
            )
        # On a GPU the embedding would end the program at this token, without naming it.
        if max(text) >= model.config.vocab_size:
            raise UserError(
                f"a prompt has token {max(text)}, which is beyond the model's"
                f" {model.config.vocab_size}: the tokenizer is that of another model"
            )
    if lookup:
        assert len(texts) == 1 and temperature == 0, "look-up is for one prompt, greedily"
    generator = None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    own_generators = [torch.Generator(model.device).manual_seed(each) for each in seeds or ()]

    def choose(logits: Tensor, rows: list[int]) -> Tensor:
        if draws is not None:
            return draws.choose(logits, rows)
        generators: torch.Generator | list[torch.Generator] | None = generator
        if own_generators:
            generators = [own_generators[i] for i in rows]
        return sample(logits, temperature, top_k, top_p, generators, min_p)

    ends = [min(len(text) + max_new_tokens, max_positions) for text in texts]

    # A draft and the penalty depend on the ids so far, so the host must read these after each step.
    needs_ids = lookup or repetition_penalty != 1
    pays_off = max_new_tokens > GRAPH_STEPS
    if not needs_ids and pays_off and can_run_ahead(model):
        # With a temperature, the random numbers are drawn outside the graph.
        captured = temperature == 0 and draws is None
        yield from stream_ahead(model, texts, ends, stop, choose, captured)
    else:
        yield from stream_step_by_step(model, texts, ends, stop, choose, repetition_penalty, lookup)


def stream_step_by_step(
    model,
    texts: list[list[int]],
    ends: list[int],
    stop: set[int] | frozenset[int],
    choose: Callable[[Tensor, list[int]], Tensor],
    repetition_penalty: float,
    lookup: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yields what `stream` yields. The host reads the ids of each step before it launches the next.

    texts: the prompts, to which the new ids are appended.
    ends: the length that each text may reach, in tokens.
    choose: a function from logits [B, V] and the prompt number of each row to ids [B].
    """
    active = list(range(len(texts)))  # the prompt number of each sequence in the cache
    active_texts = texts
    kv_cache, hidden = prefill(model, texts, ends, lookup, CACHE_ROUND)
    draft: list[int] = []  # of the only sequence, if there is look-up
    while True:
        # Accept the draft's tokens up to the first that the model would not have chosen itself. In
        # place of that one, or after the last, stands the model's own choice.
        logits = model.logits(hidden)  # [B, 1 + len(draft), V]
        for accepted in range(logits.shape[1]):
            scores = apply_repetition_penalty(logits[:, accepted], active_texts, repetition_penalty)
            new = choose(scores, active).tolist()
            for text, token in zip(active_texts, new, strict=True):
                text.append(token)
            yield list(zip(active, new, strict=True))
            if accepted == len(draft) or new[0] != draft[accepted] or new[0] in stop:
                break
        kv_cache.rollback(len(draft) - accepted)

        # Remove the sequences that have ended.
        alive = []
        for row, i in enumerate(active):
            text = texts[i]
            if text[-1] not in stop and len(text) < ends[i]:
                alive.append(row)
        if not alive:
            return
        if len(alive) < len(active):
            kv_cache.keep(alive)
            active = [active[row] for row in alive]
            active_texts = [texts[i] for i in active]

        # From this length on, longrope rotates with another table: all keys are computed again.
        switch_length = model.config.rope_switch_length
        if switch_length:
            switch_length -= model.virtual_tokens
        if any(len(text) == switch_length for text in active_texts):
            draft = []
            active_ends = [ends[i] for i in active]
            kv_cache, hidden = prefill(model, active_texts, active_ends, lookup, CACHE_ROUND)
            continue

        # A draft must not go beyond the end of the text, nor beyond the switch. The step adds one
        # token more than the draft has.
        length = len(active_texts[0])
        limit = model.max_positions
        if switch_length and length < switch_length:
            limit = switch_length
        room = min(ends[active[0]], limit) - length - 1
        draft = lookup_draft(active_texts[0], min(lookup, room))
        tokens = [[text[-1], *draft] for text in active_texts]
        hidden = kv_cache.run(torch.tensor(tokens, device=model.device))  # [B, 1 + len(draft), D]


def prefill(
    model, texts: list[list[int]], ends: list[int], lookup: int, multiple: int
) -> tuple["KVCache", Tensor]:
    """Returns a cache that holds the texts, and the hidden state of their last tokens, [B, 1, D].

    ends: the length that each text may reach, in tokens.
    lookup: the number of tokens of a draft.
    multiple: the cache holds a multiple of so many slots.
    """
    lengths = [len(text) for text in texts]
    new = max(end - length for end, length in zip(ends, lengths))
    kv_cache = KVCache(model, lengths, new, 1 + lookup, multiple)
    last_hidden = kv_cache.prefill(texts)  # [B, D]
    return kv_cache, last_hidden[:, None]


class SlotKind(NamedTuple):
    """What layers of a cache have in common that share masks.

    slots: the number of slots, for each sequence.
    window: as in families.Layer.
    """

    slots: int
    window: int | None


class KVCache:
    """The keys and values of B sequences: two tensors a layer, [B, kv_heads, slots, head_dim].

    Global slots are counted from the beginning of the longest prompt. Global slot g is slot g mod
    slots of a layer.

    lengths: of the prompts, in tokens. The virtual tokens of a learned prompt come before each.
    new: tokens that may follow.
    at_once: tokens that one step may add.
    multiple: a layer has a multiple of so many slots.
    """

    def __init__(self, model, lengths: list[int], new: int, at_once: int, multiple: int):
        self.model = model
        lengths = [length + model.virtual_tokens for length in lengths]
        self.documents = Documents(lengths, model.device)
        self.multiple = multiple
        self.filled = max(lengths)  # global slots, of every sequence
        # The global slot of the first token of each sequence, int64 [B].
        self.starts = torch.tensor([self.filled - n for n in lengths], device=model.device)

        needed = self.filled + new + at_once
        self.max_slots = []
        self.kinds: list[SlotKind] = []  # of each layer
        self.layers: list[tuple[Tensor, Tensor]] = []
        shape = (len(lengths), model.config.num_kv_heads, 0, model.config.head_dim)
        for layer in model.config.layers:
            slots = needed
            if layer.window:
                # The first of the tokens that come at once attends to window - 1 tokens before it.
                # The others must not overwrite these.
                slots = min(needed, layer.window + at_once)
            self.max_slots.append(self.round_up(slots))
            self.kinds.append(SlotKind(0, layer.window))
            # make_room replaces it, by two tensors.
            no_slots = torch.empty(shape, dtype=model.dtype, device=model.device)
            self.layers.append((no_slots, no_slots))
        self.make_room(self.filled)

    def round_up(self, slots: int) -> int:
        return -(-slots // self.multiple) * self.multiple

    def lacks_room(self, slots: int) -> bool:
        """True if `make_room` for so many global slots would change a layer."""
        for kind, most in zip(self.kinds, self.max_slots):
            if min(most, self.round_up(slots)) > kind.slots:
                return True
        return False

    def make_room(self, slots: int) -> None:
        """Gives every layer room for so many global slots.

        A ring can grow without moving its entries, because it wraps around only when it has its
        largest size.
        """
        for i, most in enumerate(self.max_slots):
            kind = self.kinds[i]
            new_size = min(most, self.round_up(slots))
            if new_size > kind.slots:
                padding = (0, 0, 0, new_size - kind.slots)  # behind the slots; none of head_dim
                keys, values = self.layers[i]
                self.layers[i] = (F.pad(keys, padding), F.pad(values, padding))
                self.kinds[i] = SlotKind(new_size, kind.window)

    def prefill(self, texts: list[list[int]]) -> Tensor:
        """Runs the prompts through the model and stores their keys and values.

        Tokens that several prompts begin with, such as a system message or examples, go through the
        layers once. Only attention takes whole prompts.

        Returns the hidden state of each prompt's last token, [B, D].
        """
        prompt = self.model.prompt
        count = self.model.virtual_tokens
        if count:
            # Negative ids stand for virtual tokens, which all texts begin with.
            texts = [[*range(-count, 0), *text] for text in texts]
        tokens, expand_list, select_list = shared_prefixes(texts, self.model.config)
        num_virtual = 0
        if count:
            order_virtual_first(tokens, expand_list, select_list)
            num_virtual = sum(token < 0 for token in tokens)
            tokens = tokens[num_virtual:]
        prefixes = None
        leading: Tensor | None = None
        num_prefix = 0
        if count and prompt.is_prefix:
            num_prefix = num_virtual
            # Where texts of other lengths have virtual tokens of their own, these are all alike.
            groups = num_virtual // count
            prefixes = [prefix.repeated(groups) for prefix in prompt.prefixes()]
            # Their keys and values are all that there is of them.
            select_list = select_list[num_virtual:]
        elif count:
            leading = prompt.vectors().repeat(num_virtual // count, 1)

        device = self.starts.device
        positions = self.documents.positions  # [N], of the tokens of all prompts
        rows: SharedRows | None = None
        # Where no two texts begin alike, sharing would only copy.
        if len(select_list) < len(positions) or leading is not None:
            expand = torch.tensor(expand_list, device=device)  # int64 [N]
            select = torch.tensor(select_list, device=device)
            rows = SharedRows(self.documents, expand, select)
        places = self.prompt_places()

        def make_attention(i: int, keys: Tensor, values: Tensor, kind: SlotKind) -> Callable:
            last, sequence, slot = places[kind.slots]

            def attend(q, k, v, scores, documents):  # q: [N, H, d]
                keys[sequence, :, slot] = k[last]
                values[sequence, :, slot] = v[last]
                return document_attention(q, k, v, scores, documents)

            if rows is None:
                return partial(attend, documents=self.documents)
            prefix = prefixes[i] if prefixes else None
            return partial(attend_shared, attend, rows=rows, prefix=prefix)

        attention_fns = []
        for i, ((keys, values), kind) in enumerate(zip(self.layers, self.kinds)):
            attention_fns.append(make_attention(i, keys, values, kind))

        doc_lengths = self.documents.doc_lengths  # [N]
        lengths = self.filled - self.starts  # [B]
        ends = lengths.cumsum(0) - 1  # the index of each prompt's last token
        if rows is not None:
            positions = positions[rows.select]
            doc_lengths = doc_lengths[rows.select]
            # A prefix has rows in `expand`, and none that are computed.
            ends = rows.expand[ends] - num_prefix
        token_ids = torch.tensor(tokens, device=device)
        hidden = self.model.hidden(token_ids, positions, doc_lengths, attention_fns, leading)
        return hidden[ends]

    def prompt_places(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Returns where the keys and values of the prompts' tokens go, for each number of slots.

        A ring has room for the last tokens only, M of them. The three tensors, int64 [M], are the
        indices of these tokens among those of all prompts, their sequences, and their slots.
        """
        positions = self.documents.positions  # [N]
        lengths = self.filled - self.starts  # [B]
        numbers = torch.arange(len(lengths), device=self.starts.device)
        sequence = numbers.repeat_interleave(lengths)  # [N]
        global_slots = positions + self.starts[sequence]  # [N]
        places = {}
        for slots in {kind.slots for kind in self.kinds}:
            last = (global_slots >= self.filled - slots).nonzero().flatten()
            places[slots] = (last, sequence[last], global_slots[last] % slots)
        return places

    def run(self, tokens: Tensor) -> Tensor:
        """Adds n new tokens to each sequence. Returns their hidden states, [B, n, D].

        tokens: int64 [B, n].
        """
        self.make_room(self.filled + tokens.shape[1])
        hidden = self.forward(tokens, self.filled)
        self.filled += tokens.shape[1]
        return hidden

    def forward(self, tokens: Tensor, filled: int | Tensor) -> Tensor:
        """Computes what `run` returns, once there is room.

        tokens: int64 [B, n].
        filled: global slots, as a number; or int64 [1] on the device. Then the launches do not
        depend on it, n is 1, and sequences may be computed beyond their ends.
        """
        B, n = tokens.shape
        steps = torch.arange(n, device=tokens.device)
        positions = (filled - self.starts[:, None] + steps).flatten()  # [B * n]
        if isinstance(filled, Tensor):
            # A sequence beyond its end must not ask for a position that the model does not have.
            positions = positions.clamp(max=self.model.config.max_positions - 1)
            attention_fns = self.attention_fns_on_device(filled)
        else:
            attention_fns = self.attention_fns(filled, n)
        hidden = self.model.hidden(tokens.flatten(), positions, positions + 1, attention_fns)
        return hidden.view(B, n, -1)

    def attention_fns(self, filled: int, n: int) -> list[Callable]:
        """Returns, for each layer, the attention of n new tokens of each sequence.

        It first writes their keys and values into the cache.
        """
        B = len(self.starts)
        steps = torch.arange(n, device=self.starts.device)
        masks = self.masks(filled, n)

        def make_attention(keys: Tensor, values: Tensor, kind: SlotKind) -> Callable:
            first = filled % kind.slots
            end = first + n
            is_in_one_piece = end <= kind.slots

            def attention(q, k, v, scores):  # q: [B * n, H, d]
                by_sequence = (B, n, *k.shape[1:])
                k = k.view(by_sequence).transpose(1, 2)  # [B, G, n, d]
                v = v.view(by_sequence).transpose(1, 2)
                if is_in_one_piece:
                    keys[:, :, first:end] = k
                    values[:, :, first:end] = v
                else:
                    # What is beyond the end of the ring goes to its beginning.
                    slot = (filled + steps) % kind.slots
                    keys.index_copy_(2, slot, k)
                    values.index_copy_(2, slot, v)
                return cached_attention(q, keys, values, masks[kind], scores)

            return attention

        attention_fns = []
        for (keys, values), kind in zip(self.layers, self.kinds):
            attention_fns.append(make_attention(keys, values, kind))
        return attention_fns

    def attention_fns_on_device(self, filled: Tensor) -> list[Callable]:
        """Returns what `attention_fns` returns, for one new token of each sequence, whose slot is
        on the device."""

        def make_fused(keys: Tensor, values: Tensor) -> Callable:
            def attention(q, k, v, scores):  # q: [B, H, d]
                return decode_attention(q, k, v, keys, values, filled, self.starts, scores)

            return attention

        if use_triton(filled):
            return [make_fused(keys, values) for keys, values in self.layers]

        # The write to the cache must be one launch whatever the number in `filled`: so the slots
        # are computed on the device, once for all layers of a size.
        new_slot = {}
        for slots in {kind.slots for kind in self.kinds}:
            new_slot[slots] = filled % slots
        masks = self.masks(filled, 1)

        def make_attention(keys: Tensor, values: Tensor, kind: SlotKind) -> Callable:
            slot = new_slot[kind.slots]

            def attention(q, k, v, scores):  # q: [B, H, d]
                keys.index_copy_(2, slot, k[:, :, None])
                values.index_copy_(2, slot, v[:, :, None])
                return cached_attention(q, keys, values, masks[kind], scores)

            return attention

        attention_fns = []
        for (keys, values), kind in zip(self.layers, self.kinds):
            attention_fns.append(make_attention(keys, values, kind))
        return attention_fns

    def masks(self, filled: int | Tensor, n: int) -> dict[SlotKind, Tensor]:
        """Returns the mask of n new tokens of each sequence for each kind of layer."""
        masks = {}
        for kind in set(self.kinds):
            masks[kind] = self.mask(filled, n, kind.slots, kind.window)
        return masks

    def mask(self, filled: int | Tensor, n: int, slots: int, window: int | None) -> Tensor:
        """Returns the mask of n new tokens of each sequence over a layer's slots, as
        `cached_attention` takes it."""
        device = self.starts.device
        last = filled + (n - 1)
        slot = torch.arange(slots, device=device)
        keys = last - (last - slot) % slots  # [slots], the newest global slot that each slot holds
        queries = filled + torch.arange(n, device=device)[:, None]  # [n, 1]
        is_own = keys >= self.starts[:, None, None]  # [B, 1, slots]
        visible = is_own & (keys <= queries)  # [B, n, slots]
        if window is not None:
            visible &= keys > queries - window
        kv_heads = self.model.config.num_kv_heads
        n_rep = self.model.config.num_heads // kv_heads
        return decode_mask(visible, kv_heads, n_rep, self.model.dtype)

    def rollback(self, tokens: int) -> None:
        """Removes the last tokens.

        Their slots stay as they are: they are written again before any token attends to them.
        """
        self.filled -= tokens

    def keep(self, alive: list[int]) -> None:
        """Removes all sequences but these, which come in this order."""
        rows = torch.tensor(alive, dtype=torch.int64, device=self.starts.device)
        self.starts = self.starts[rows]
        layers = []
        for keys, values in self.layers:
            kept_keys = keys.index_select(0, rows)
            kept_values = values.index_select(0, rows)
            layers.append((kept_keys, kept_values))
        self.layers = layers


# ---- steps that a GPU takes without the host ----


def stream_ahead(
    model,
    texts: list[list[int]],
    ends: list[int],
    stop,
    choose: Callable[[Tensor, list[int]], Tensor],
    captured: bool,
) -> Iterator[list[tuple[int, int]]]:
    """Yields what `stream` yields, with the GPU one step ahead.

    The host launches the next step before it reads the tokens of the last one, so it waits for the
    tokens only. A sequence that has ended is still computed, and its tokens ignored, until half of
    the sequences have ended. If a stop id ends the last text, one step was computed for nothing.

    texts: the prompts.
    ends: the length that each text may reach, in tokens.
    choose: a function from logits [B, V] and the prompt number of each row to ids [B].
    captured: `choose` is captured in the CUDA graph, with the step.
    """
    kv_cache, hidden = prefill(model, texts, ends, 0, GRAPH_ROUND)
    steps = Steps(kv_cache, model.logits(hidden)[:, 0], choose, captured)
    in_cache = list(range(len(texts)))  # the prompt number of each sequence in the cache
    active = in_cache  # those of them that have not ended
    # The number of tokens that each text may still get.
    left = [end - len(text) for text, end in zip(texts, ends)]
    arriving = PendingTokens(steps.tokens, in_cache)
    while True:
        ahead: PendingTokens | None = None
        more = max(left[i] for i in active) - 1  # tokens that may follow those that are arriving
        if more:
            steps.take(more)
            ahead = PendingTokens(steps.tokens, in_cache)
        new = arriving.read()
        yield [(i, new[i]) for i in active]
        for i in active:
            left[i] -= 1
        active = [i for i in active if left[i] and new[i] not in stop]
        if not active:
            return
        # A smaller batch needs a new capture, so it must be much smaller, with many steps to come.
        half_have_ended = 2 * len(active) <= len(in_cache)
        if half_have_ended and max(left[i] for i in active) > GRAPH_STEPS:
            steps.keep([in_cache.index(i) for i in active])
            in_cache = active
        assert ahead is not None, "a text that goes on had tokens left, so a step was launched"
        arriving = ahead


class PendingTokens:
    """A copy of tokens [B] that is on its way to the host. The tokens on the device may be
    overwritten at once.

    prompt_numbers: of each token.
    """

    def __init__(self, tokens: Tensor, prompt_numbers: list[int]):
        # On a CPU the next step would overwrite the tokens, were they not copied.
        self.tokens = tokens.to("cpu", non_blocking=True, copy=True)
        self.prompt_numbers = prompt_numbers
        self.arrived = None
        if tokens.is_cuda:
            self.arrived = torch.cuda.Event()
            stream = torch.cuda.current_stream(tokens.device)
            self.arrived.record(stream)

    def read(self) -> dict[int, int]:
        """Waits until the tokens have arrived, and returns {prompt number: token}."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens = self.tokens.tolist()
        return dict(zip(self.prompt_numbers, tokens, strict=True))


class Steps:
    """Decoding steps of one token for each sequence. All that changes from step to step is on the
    device.

    rows: the prompt number of each sequence, which `choose` is told.
    tokens: int64 [B], the newest ones: the input of a step, and its output.
    filled: int64 [1], the number of global slots of the cache that are filled.
    logits: [B, V], from which the newest tokens are chosen; None if that is part of what is
    captured.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        logits: Tensor,
        choose: Callable[[Tensor, list[int]], Tensor],
        captured: bool,
    ):
        self.cache = kv_cache
        self.choose = choose
        self.rows = list(range(len(logits)))
        self.tokens = choose(logits, self.rows)
        self.filled = torch.full((1,), kv_cache.filled, device=logits.device)
        self.logits = None if captured else logits
        self.graph: torch.cuda.CUDAGraph | None = None

    def launch(self) -> None:
        """Launches the kernels of a step.

        They are the same in every step, and write their results to the same memory.
        """
        hidden = self.cache.forward(self.tokens[:, None], self.filled)  # [B, 1, D]
        logits = self.cache.model.logits(hidden)[:, 0]  # [B, V]
        self.filled += 1
        if self.logits is None:
            self.tokens.copy_(self.choose(logits, self.rows))
        else:
            self.logits.copy_(logits)

    def take(self, steps: int) -> None:
        """Takes the next step. steps: how many may come, this one included.

        The first step of a shape is launched kernel by kernel, which warms up what the capture
        needs. Those after it are replays.
        """
        if self.cache.lacks_room(self.cache.filled + 1):
            self.graph = None  # before the cache is copied, because a graph has memory of its own
            self.cache.make_room(self.cache.filled + 1)
        if self.graph is not None:
            self.graph.replay()
        elif steps > GRAPH_STEPS and not failed_graphs:
            self.graph = run_and_capture(self.launch, self.tokens.device)
        else:
            self.launch()
        if self.logits is not None:
            self.tokens.copy_(self.choose(self.logits, self.rows))
        self.cache.filled += 1

    def keep(self, alive: list[int]) -> None:
        """Removes all sequences but these, which come in this order."""
        self.graph = None
        self.cache.keep(alive)
        self.rows = [self.rows[row] for row in alive]
        rows = torch.tensor(alive, device=self.tokens.device)
        self.tokens = self.tokens[rows]
        if self.logits is not None:
            self.logits = self.logits[rows]


# Graphs whose capture failed. They are never freed, because torch's allocator may still ask them.
failed_graphs: list["torch.cuda.CUDAGraph"] = []


def run_and_capture(
    launch: Callable[[], None], device: torch.device
) -> "torch.cuda.CUDAGraph | None":
    """Runs launch(), then captures what it launches, without running it again.

    Returns the graph, to be replayed. If the capture fails, prints a NOTE to stderr and returns
    None.
    """
    current = torch.cuda.current_stream(device)
    side = side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        launch()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # torch.cuda.graph selects the stream by itself. But if its end fails, it leaves the stream
        # selected; the outer context manager takes it off.
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            launch()
    except RuntimeError as error:
        failed_graphs.append(graph)
        reason = first_line(first_error(error))
        print(
            f"NOTE: steps can't be captured in a CUDA graph ({reason}); their kernels are launched"
            " one by one, which takes longer",
            file=sys.stderr,
        )
        return None
    return graph


def first_error(error: BaseException) -> BaseException:
    """Returns the error that a chain of errors began with.

    The end of a capture says only that something was wrong before; the first error says what.
    """
    while error.__context__ is not None:
        error = error.__context__
    return error


@cache
def side_stream(device: torch.device) -> "torch.cuda.Stream":
    """Returns the stream that steps are captured on, since the default stream can't be captured.

    It is always the same one, because cuBLAS keeps a workspace for each stream.
    """
    return torch.cuda.Stream(device)


def can_run_ahead(model) -> bool:
    """True if a model's steps can be captured on its device.

    They can't if the angles of a rope depend on the length of the text, or if experts get their
    tokens by numbers that the host reads. After a capture that failed, nothing is captured any
    more.
    """
    if model.device.type != "cuda" or failed_graphs:
        return False
    if any(layer.routed for layer in model.config.layers):
        return False
    return not has_length_dependent_rope(model.config)


def has_length_dependent_rope(config) -> bool:
    for each in config.ropes:
        if each.scaling and each.scaling["rope_type"] in LENGTH_DEPENDENT:
            return True
    return False


# ---- prompts that begin with the same tokens ----


def shared_prefixes(texts: list[list[int]], config) -> tuple[list[int], list[int], list[int]]:
    """Finds the tokens that need to be computed once only: two tokens are one if the same tokens
    stand before them.

    With ropes whose angles depend on the length of the text, their texts must also be of the same
    length.

    Returns (tokens, expand, select): the tokens to compute; for each token of all texts, the index
    of the computed one that it is; for each computed token, the index of its first occurrence among
    the tokens of all texts.
    """
    by_length = has_length_dependent_rope(config)
    # {(index of the token before, id): index}, a prefix tree of the texts.
    computed: dict[tuple[int, int], int] = {}
    expand: list[int] = []
    select: list[int] = []
    for text in texts:
        # Negative numbers stand for the beginning of a text, since no token has such an index.
        index = -1
        if by_length:
            index = -len(text)
        for token in text:
            new_index = len(computed)
            index = computed.setdefault((index, token), new_index)
            if index == new_index:
                select.append(len(expand))
            expand.append(index)
    tokens = [token for _, token in computed]
    return tokens, expand, select


def order_virtual_first(tokens: list[int], expand: list[int], select: list[int]) -> None:
    """Reorders what `shared_prefixes` has returned, in place, so that virtual tokens, whose ids are
    negative, come before all others."""
    order = sorted(range(len(tokens)), key=lambda row: tokens[row] >= 0)
    new_row = {row: i for i, row in enumerate(order)}
    tokens[:] = [tokens[row] for row in order]
    select[:] = [select[row] for row in order]
    expand[:] = [new_row[row] for row in expand]


# ---- speculative decoding by prompt look-up ----


def lookup_draft(text: list[int], most: int) -> list[int]:
    """Returns a guess at the next tokens, at most `most`: those that followed the last few tokens
    of the text where these last occurred before (prompt look-up, Saxena 2023).

    The model checks all of them in one pass, and those that it would have chosen itself are
    accepted (speculative decoding, Leviathan et al. 2023).
    """
    if most <= 0:
        return []
    for n in LOOKUP_NGRAMS:
        ngram = text[-n:]
        last_start = len(text) - n - 1  # the latest place that is not the end of the text itself
        for start in range(last_start, -1, -1):
            follows = start + n
            if text[start:follows] == ngram:
                return text[follows : follows + most]
    return []


# ---- sampling ----


def apply_repetition_penalty(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    """Returns logits with the penalty of Keskar et al. 2019 (CTRL) on the ids that each text
    contains, in float32; with a penalty of 1, the logits as they are. logits: [B, V]."""
    if penalty == 1.0:
        return logits
    logits = logits.float()
    for row, text in zip(logits, texts, strict=True):
        ids = torch.tensor(sorted(set(text)), device=logits.device)
        before = row[ids]
        # Negative logits are multiplied: to divide them would make their ids likelier.
        row[ids] = torch.where(before > 0, before / penalty, before * penalty)
    return logits


class Draws:
    """The random numbers that the answers to a batch of prompts are drawn by, one a token, and what came
    of them: the model's own probabilities, at temperature 1 with nothing left out.

    uniforms: float32 [B, max_new_tokens], from 0 to below 1.
    logps: float32 [B, max_new_tokens], the log-probability of each token when it was drawn; 0 behind the
        end of an answer.
    """

    def __init__(self, uniforms: Tensor):
        self.uniforms = uniforms
        self.logps = torch.zeros_like(uniforms)
        self.step = 0
        # Most steps have the rows of the step before.
        self.rows: list[int] = []
        self.index = torch.empty(0, dtype=torch.int64, device=uniforms.device)

    def choose(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Returns the next token of some of the prompts, int64 [rows]. logits: [rows, V]."""
        if rows != self.rows:
            self.rows = list(rows)
            self.index = torch.tensor(rows, device=logits.device)
        tokens, logps = draw(logits, self.uniforms[self.index, self.step])
        self.logps[self.index, self.step] = logps
        self.step += 1
        return tokens


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | list[torch.Generator] | None,
    min_p: float = 0.0,
) -> Tensor:
    """Returns one id for each row of logits [B, V], int64 [B].

    generator: of all draws, or a list of one for each row. The other arguments are those of
    Transformer.stream.
    """
    if temperature == 0:
        return logits.float().argmax(-1)  # on CPUs, float32 is five times as fast as bf16
    probs = sampling_probs(logits, temperature, top_k, top_p, min_p)
    if probs.is_cuda or isinstance(generator, list):
        return sample_from(probs, generator)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def sampling_probs(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Returns the probabilities that ids are drawn with, float32 [B, V]; the arguments are those of
    Transformer.stream, with a temperature above 0."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < kth_largest, float("-inf"))
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        ordered_probs = ordered.softmax(-1)
        # The probability of all likelier ids together. An id is kept if these do not reach top_p.
        mass_before = ordered_probs.cumsum(-1) - ordered_probs
        ordered = ordered.masked_fill(mass_before >= top_p, float("-inf"))
        ordered[:, 0] = logits.max(-1).values  # with top_p 0, the likeliest id remains
        logits = torch.empty_like(logits).scatter_(1, ids, ordered)
    probs = logits.softmax(-1)
    if min_p > 0:
        least = min_p * probs.max(-1, keepdim=True).values  # [B, 1]
        probs = logits.masked_fill(probs < least, float("-inf")).softmax(-1)
    return probs


def sample_from(probs: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Draws one id for each row of probs [B, V], int64 [B]: what torch.multinomial draws, by the
    same random numbers. generator: of all rows, or a list of one for each.

    torch.multinomial checks the probabilities first, and the host waits for that. With q from
    Exp(1), argmax p / q is i with probability p_i: the exponential races of the Gumbel-max trick
    (Maddison et al. 2014).
    """
    noise = torch.empty_like(probs)
    if isinstance(generator, list):
        for row, own in zip(noise, generator, strict=True):
            row.exponential_(1, generator=own)
    else:
        noise.exponential_(1, generator=generator)
    ratio = torch.div(probs, noise, out=noise)  # in the memory of the noise
    return ratio.argmax(-1)


# ---- packed weights: copies in the layout that decoding reads fastest ----


@contextlib.contextmanager
@torch.no_grad()
def packed_weights(model, steps: int) -> Iterator[None]:
    """Copies weights into the layout that a product with few rows reads fastest, until the context
    ends.

    On CPUs (see kernels/onednn_linear.py) every weight is packed, the output head included. The q,
    k and v of a layer are packed as one matrix, and so are gate and up; weights under an adapter
    are packed alone. On GPUs only those groups are copied, each into one matrix, if twice their
    size is free. Nothing is copied where that does not pay or does not fit.

    Instance attributes that stand over the modules' methods (`forward`, for example) use the
    copies; they are deleted at the end. Several calls of `generate` inside the context share the
    copies. Weights must not change meanwhile.

    model: a Transformer, with or without adapters.
    steps: the number of decoding steps to come.
    """
    if steps < PACK_STEPS or is_packed(model):
        yield
        return
    on_cpu = model.device.type == "cpu"
    linears = set()
    for module in model.blocks.modules():
        if hasattr(module, "nf4"):
            linears.add(module)
    groups = linears_by_input(model, linears)
    if on_cpu:
        fits = can_pack_all(model, linears)
    else:
        for module, group in list(groups.items()):
            if not can_concatenate(group, model.dtype):
                del groups[module]
        copied_bytes = 0
        for group in groups.values():
            copied_bytes += sum(fused_bytes(linear) for linear in group)
        fits = can_join(copied_bytes, model.device)
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
                override(module, "project_and_rotate", partial(rotate_fused, module, weights))
            else:
                override(module, "forward", partial(mlp_fused, module, weights))
        if on_cpu:
            pack_alone(model, linears.difference(*groups.values()), override)
        else:
            keep_head(model, override)
        yield
    finally:
        for module, method in overrides:
            delattr(module, method)


def pack_alone(model, linears: set, override: Callable[[nn.Module, str, Callable], None]) -> None:
    """Packs for a CPU what reads an input of its own: these linears, and the output head.

    override: override(module, method, function) puts a function in the place of a method.
    """
    for linear in linears:
        packed = pack_weight(dequantized_weight(linear.frozen, torch.bfloat16))
        override(linear, "forward", partial(packed_linear, packed=packed, bias=linear.bias))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            override(module, "forward", partial(lora_packed, module))
            # That of a Linear calls the forward of each layer in turn, if not all layers are plain
            # Linears.
            override(module, "forward_shared", module.base.forward_shared)
    packed_head = pack_weight(model.head_weight().to(model.dtype))
    override(model, "uncapped_logits", partial(logits_packed, packed_head))


def keep_head(model, override: Callable[[nn.Module, str, Callable], None]) -> None:
    """Keeps the output head of a model on a GPU in the dtype of the activations, where each step would
    have to make it: of a head that is trained, or of which rows are. override: as of `pack_alone`."""
    is_made = model.head_rows() is not None
    if model.trains_head and (is_made or model.head_weight().dtype != model.dtype):
        head = model.head_weight().to(model.dtype)
        override(model, "uncapped_logits", partial(F.linear, weight=head))


def is_packed(model) -> bool:
    """True inside the context of `packed_weights`, if it made copies."""
    for module in model.modules():
        attributes = vars(module)
        if "forward" in attributes or "uncapped_logits" in attributes:
            return True
    return False


def linears_by_input(model, linears: set) -> dict[nn.Module, list]:
    """Returns {an attention module: its q, k and v, or an MLP: its gate and up}, where all of these
    are in `linears` (a layer with an adapter is not)."""
    groups = {}
    for module in model.modules():
        if hasattr(module, "q"):
            group = [module.q, module.k, module.v]
        elif hasattr(module, "gate"):
            group = [module.gate, module.up]
        else:
            continue
        if linears.issuperset(group):
            groups[module] = group
    return groups


def can_pack_all(model, linears: set) -> bool:
    """True if a CPU can pack all these linears and the output head."""
    # One that is trained is in float32.
    head = model.head_weight().to(model.dtype)
    numel = head.numel()
    plain = [head]
    for linear in linears:
        numel += linear.in_features * linear.out_features
        if linear.nf4 is None:
            plain.append(linear.weight)
    packed_bytes = 2 * numel  # in bf16, also of what is in NF4
    return all(can_pack(weight, packed_bytes) for weight in plain)


class FusedWeights:
    """The weights of linears that read the same input, as one matrix.

    Called with x [N, in], it returns [N, all their outputs]. Outputs are in the order of the
    linears. packed: in oneDNN's layout, for CPUs. Otherwise the copy is in 16 bits, or in NF4.
    Scales of double quantization are written out there, to the same
    numbers: their nested blocks are counted through a whole matrix, which has an offset of its own.
    """

    def __init__(self, linears: list, packed: bool):
        biases = [linear.bias for linear in linears]
        frozen = [linear.frozen for linear in linears]
        self.bias = None
        if biases[0] is not None:
            self.bias = torch.cat(biases)
        self.linear: Callable[..., Tensor]  # linear(x, self.weight, self.bias)
        self.weight: Tensor | NF4
        if packed:
            joined = torch.cat([dequantized_weight(each, torch.bfloat16) for each in frozen])
            self.linear = packed_linear
            self.weight = pack_weight(joined)
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
    """True if linears can be one matrix on a GPU: all in NF4, or all in the 16 bits of the
    activations' dtype, with biases in that dtype."""
    plain = [linear.weight for linear in linears if linear.nf4 is None]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    all_or_none_plain = len(plain) in (0, len(linears))
    if not all_or_none_plain or dtype.itemsize != 2:
        return False
    return all(tensor.dtype == dtype for tensor in plain + biases)


def fused_bytes(linear) -> int:
    """The bytes that a linear takes in the weight of FusedWeights on a GPU."""
    if linear.nf4 is None:
        return linear.weight.nbytes
    return linear.nf4.packed.nbytes + 4 * linear.nf4.absmax.numel()


def project_fused(attention, weights: FusedWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `Attention.project` by one product."""
    H = attention.heads
    G = attention.kv_heads
    d = attention.head_dim
    qkv = weights(x)  # [N, (H + 2 G) d]
    q, k, v = qkv.split((H * d, G * d, G * d), -1)
    q = q.reshape(-1, H, d)
    k = k.reshape(-1, G, d)
    v = v.reshape(-1, G, d)
    return q, k, v


def rotate_fused(
    attention, weights: FusedWeights, x: Tensor, cos_sin
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `Attention.project_and_rotate` by one product for q, k and v and, on CPUs, one
    rotation for q and k."""
    # Where something comes between the product and the rotation, or where a kernel rotates both,
    # only the product is one: the class's own function calls `project_fused`.
    if cos_sin is None or attention.qk_norm or use_triton(x):
        return type(attention).project_and_rotate(attention, x, cos_sin)
    H = attention.heads
    G = attention.kv_heads
    num_heads = H + 2 * G
    qkv = weights(x).view(-1, num_heads, attention.head_dim)  # [N, H + 2 G, d]
    qk = rope(qkv[:, : H + G], *cos_sin)
    q = qk[:, :H]
    k = qk[:, H:]
    v = qkv[:, H + G :]
    return q, k, v


def mlp_fused(mlp, weights: FusedWeights, x: Tensor) -> Tensor:
    """Computes `MLP.forward` of a gated MLP by one product for gate and up."""
    gate_up = weights(x)  # [N, 2 inner]
    gate, up = gate_up.chunk(2, -1)
    return mlp.down.forward_shared(gate, [mlp.down], up, mlp.activation)[0]


def lora_packed(layer, x: Tensor) -> Tensor:
    """Computes `LoRALinear.forward` on a packed base. The adapter's product is added to that of the
    base in place."""
    if layer.merged or layer.uses_dropout:
        return type(layer).forward(layer, x)
    A, B = layer.factors()
    low = F.linear(x, A.to(x.dtype))  # [N, rank]
    y = layer.base(x)
    if layer.lora_magnitude is not None and layer.base.bias is not None:
        y = y - layer.base.bias  # DoRA scales what stands before it
    return layer.scaled(y.addmm_(low, B.to(x.dtype).t(), alpha=layer.scale))


def logits_packed(weight: Tensor, hidden: Tensor) -> Tensor:
    """Computes `Transformer.uncapped_logits` with the packed weight of the output head."""
    rows = packed_linear(hidden.flatten(0, -2), weight)  # [all rows, V]
    return rows.view(*hidden.shape[:-1], -1)
