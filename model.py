"""One decoder-only transformer that is every supported family, by configuration.

A family is a row of switches in `Config`, never a subclass. Today: Llama and what shares its shape (Llama 2, 3, 3.1,
3.2, TinyLlama, SmolLM2): RMSNorm before attention and MLP, rotary positions, grouped-query attention, SwiGLU, tied or
untied output head.

Tokens flow flat: inside, a batch is one row of real tokens, [tokens, hidden], one document after another, and only
attention knows where a document ends (kernels/attention.py). So padding is never computed and packing is batching.
[B, T] is a shape at the door, in `Transformer.forward`. Shapes in comments: N tokens of a flat batch, B sequences,
T positions, D hidden, H heads, G key-value heads, d head_dim, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from kernels.attention import Documents, document_attention
from kernels.norm import rms_norm
from kernels.rope import rope

MAX_LAYERS = 1_000  # a hostile config.json must not keep the machine busy building modules
FAMILIES = {"llama": "LlamaForCausalLM"}  # model_type of config.json: the architecture, if it names one


@dataclass(frozen=True)
class Config:
    """What distinguishes one checkpoint from another. `raw` is config.json as found, for writing it back."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    tied: bool  # the output head is the embedding table
    attention_bias: bool
    mlp_bias: bool
    rope_theta: float
    rope_scaling: dict | None  # {"rope_type": "llama3", "factor": ...}
    raw: dict

    @staticmethod
    def from_hf(raw: dict, where: str = "config.json") -> "Config":
        """Parses config.json as transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) write it.

        Raises UserError, beginning with `where`, on an unknown family, a missing or impossible value, or a feature that
        this file does not compute: a switch that is ignored would change the model in silence.
        """
        family = raw.get("model_type")
        if str(family) not in FAMILIES:
            raise UserError(f"{where}: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})")
        if raw.get("architectures") not in (None, [], [FAMILIES[family]]):
            raise UserError(f"{where}: architectures {raw['architectures']!r} is not supported for {family}")
        if raw.get("is_causal") is False or raw.get("attention_dropout"):
            key = "attention_dropout" if raw.get("attention_dropout") else "is_causal"
            raise UserError(f"{where}: {key} {raw[key]!r} is not supported; take it out to do without")
        read = _Reader(raw, where)
        hidden, heads = read("hidden_size", int), read("num_attention_heads", int)
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(raw.get(key) or {}, dict):
                raise UserError(f"{where}: {key} is no JSON object")
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # both: transformers takes the former
        theta, scaling = _rope_settings({"rope_theta": raw.get("rope_theta", 10_000.0)} | rope, where)
        if read("hidden_act", str, "silu") != "silu":
            raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported for {family} (only silu)")
        if heads and hidden % heads and not raw.get("head_dim"):
            raise UserError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        config = Config(
            family=family,
            vocab_size=read("vocab_size", int),
            hidden_size=hidden,
            num_layers=read("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=read("num_key_value_heads", int, heads),
            head_dim=read("head_dim", int, hidden // heads),
            intermediate_size=read("intermediate_size", int),
            max_positions=read("max_position_embeddings", int, 2048),
            norm_eps=read("rms_norm_eps", float, 1e-6),
            tied=read("tie_word_embeddings", bool, False),
            attention_bias=read("attention_bias", bool, False),
            mlp_bias=read("mlp_bias", bool, False),
            rope_theta=theta,
            rope_scaling=scaling,
            raw=raw,
        )
        if config.num_heads % config.num_kv_heads:
            raise UserError(
                f"{where}: {heads} attention heads do not divide over {config.num_kv_heads} key-value heads"
            )
        if config.num_layers > MAX_LAYERS:
            raise UserError(f"{where}: num_hidden_layers is {config.num_layers}, at most {MAX_LAYERS} are possible")
        if config.num_heads * config.head_dim >= 1e9:
            raise UserError(f"{where}: num_attention_heads {heads} x head_dim {config.head_dim} is no possible width")
        if config.head_dim % 2:
            raise UserError(f"{where}: head_dim {config.head_dim} is odd, rotary positions need pairs")
        return config


class _Reader:
    """Typed look-ups in a config.json; sizes must be positive."""

    def __init__(self, raw: dict, where: str):
        self.raw, self.where = raw, where

    def __call__(self, key: str, kind: type, default=None):
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise UserError(f"{self.where}: {key} is missing")
            return default
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{self.where}: {key} is {value!r}, {kind.__name__} is wanted")
        if kind in (int, float) and not 0 < value < 1e9:
            raise UserError(f"{self.where}: {key} is {value!r}, a positive size is wanted")
        return kind(value)


def _rope_settings(parameters: dict, where: str) -> tuple[float, dict | None]:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", 10_000.0)
    if type(theta) not in (int, float) or not 0 < theta < 1e30:
        raise UserError(f"{where}: rope_theta is {theta!r}, a positive number is wanted")
    if kind == "default":
        return float(theta), None
    needs = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if str(kind) not in needs:
        raise UserError(f"{where}: rope scaling {kind!r} is not supported (supported: {', '.join(needs)})")
    for key in needs[kind]:
        if type(parameters.get(key)) not in (int, float) or not 0 < parameters[key] < 1e30:
            raise UserError(
                f"{where}: rope scaling {kind} needs a positive number {key}, found {parameters.get(key)!r}"
            )
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise UserError(f"{where}: rope scaling llama3 needs low_freq_factor below high_freq_factor")
    return float(theta), {"rope_type": kind, **{key: parameters[key] for key in needs[kind]}}


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [d / 2], with the checkpoint's scaling."""
    d = config.head_dim
    # In transformers' order of operations: a position of 100,000 makes 0.003 of a last bit's 3e-8
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in the
    # number of turns that they make within the original context.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


class Linear(nn.Module):
    """x W^T + b. An fp32 weight (a trained master) is cast to x's dtype for the product, its gradient comes in fp32."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, H, G, self.head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = Linear(D, H * self.head_dim, config.attention_bias)
        self.k = Linear(D, G * self.head_dim, config.attention_bias)
        self.v = Linear(D, G * self.head_dim, config.attention_bias)
        self.o = Linear(H * self.head_dim, D, config.attention_bias)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], attend) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v)
        )  # [N, H or G, d]
        out = attend(rope(q, *turns), rope(k, *turns), v)  # [N, H, d]
        return self.o(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate = Linear(D, hidden, config.mlp_bias)
        self.up = Linear(D, hidden, config.mlp_bias)
        self.down = Linear(hidden, D, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns, attend)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Built with uninitialised weights (on the meta device by checkpoint.load_model, which fills them).

    compute_dtype: the activations' dtype; None means the embedding table's. Full fine-tuning keeps fp32 weights and
    computes in bf16 by setting it.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.compute_dtype, self.frequencies = config, None, None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def head_weight(self) -> Tensor:  # [V, D]
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(self, tokens: Tensor, positions: Tensor, attends: list) -> Tensor:
        """tokens and positions: int64 [N]; attends: an attention function a block. Returns [N, D], normalised."""
        if self.frequencies is None or self.frequencies.device != positions.device:
            self.frequencies = rope_frequencies(self.config).to(positions.device)
        angles = positions[:, None].float() * self.frequencies  # [N, d / 2], fp32
        turns = angles.cos(), angles.sin()
        x = self.embed(tokens).to(self.dtype)
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, turns, attend)
        return self.norm(x)

    def flat(self, tokens: Tensor, documents: Documents) -> Tensor:
        """The training path: int64 [N] tokens of whole documents -> [N, D], ready for the head."""
        attend = lambda q, k, v: document_attention(q, k, v, documents)
        return self.hidden(tokens, documents.positions, [attend] * len(self.blocks))

    def logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return F.linear(hidden, self.head_weight().to(hidden.dtype))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The door for batches of shape [B, T]; every row is whole sequences from their start.

        tokens: int64 [B, T]. segments: int64 [B, T], the example that each token belongs to, numbered from 0 within a
        row in runs; negative is padding, which is not computed. Without it a row is one example. positions: int64
        [B, T], default: from 0 in each example. keep: int64 [K], indices into the B * T positions whose logits are
        wanted. Returns logits [B, T, V] (zeros at padding), or [K, V] in the order of keep.
        """
        B, T = tokens.shape
        if segments is None:
            segments = torch.zeros_like(tokens)
        keys = (segments + T * torch.arange(B, device=segments.device)[:, None])[segments >= 0]  # one number an example
        real = (segments >= 0).flatten().nonzero().flatten()  # [N]
        documents = Documents(torch.unique_consecutive(keys, return_counts=True)[1].tolist(), tokens.device)
        if positions is not None:
            documents.positions = positions.flatten()[real]
        hidden = self.flat(tokens.flatten()[real], documents)  # [N, D]
        if keep is None:
            logits = self.logits(hidden)
            return logits.new_zeros(B * T, logits.shape[-1]).index_copy(0, real, logits).view(B, T, -1)
        row = torch.full((B * T,), -1, device=tokens.device).index_copy(
            0, real, torch.arange(len(real), device=real.device)
        )
        assert bool((row[keep] >= 0).all()), "keep names a padding position"
        return self.logits(hidden[row[keep]])

    def generate(self, prompts, max_new_tokens: int, **settings) -> list[list[int]]:
        """New ids for each prompt, the stop id that ended it included. Arguments as in `stream`."""
        rows: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **settings):
            for row, token in step:
                rows[row].append(token)
        return rows

    @torch.no_grad()
    def stream(
        self,
        prompts,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: set[int] | frozenset[int] = frozenset(),
        seed: int | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields, a step at a time, (prompt number, new id) for every prompt that is still going.

        prompts: int64 [B, T], or lists of ids of any lengths (none empty). None sees another, but what is sampled with
        a seed depends on the whole batch.
        temperature 0 takes the likeliest token. Otherwise, in this order: the penalty of Keskar et al. 2019 (CTRL) on
        ids seen in prompt or answer, temperature, the top_k likeliest (0: all), the smallest set of probability top_p
        (Holtzman et al. 2020). A prompt ends with an id in `stop`, after max_new_tokens, or at the model's limit.
        """
        rows = [list(map(int, prompt)) for prompt in prompts]
        if not rows or max_new_tokens < 1:
            return
        limit = min(max(map(len, rows)) + max_new_tokens, self.config.max_positions)
        for row in rows:
            if not 0 < len(row) < self.config.max_positions:
                raise UserError(f"a prompt has {len(row)} tokens; the model takes 1 to {self.config.max_positions - 1}")
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        with evaluating(self):
            cache = KVCache(self, [len(row) for row in rows], limit)
            hidden = cache.prefill(torch.tensor([t for row in rows for t in row], device=self.device))  # [B, D]
            going = list(range(len(rows)))  # the prompt number of each line of the cache
            ends = [min(len(row) + max_new_tokens, self.config.max_positions) for row in rows]
            while going:
                logits = self.logits(hidden).float()  # [B, V]
                if repetition_penalty != 1.0:
                    penalise_repetition_(logits, [rows[i] for i in going], repetition_penalty)
                new = sample(logits, temperature, top_k, top_p, generator).tolist()
                for i, token in zip(going, new, strict=True):
                    rows[i].append(token)
                yield list(zip(going, new, strict=True))
                alive = [line for line, i in enumerate(going) if rows[i][-1] not in stop and len(rows[i]) < ends[i]]
                if len(alive) < len(going):
                    cache.keep(alive)
                    going = [going[line] for line in alive]
                if going:
                    hidden = cache.step(torch.tensor([rows[i][-1] for i in going], device=self.device))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and afterwards whatever was before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


class KVCache:
    """Keys and values of sequences in progress, [lines, G, length, d] a layer, each line filled up to its length."""

    def __init__(self, model: Transformer, lengths: list[int], limit: int):
        config = model.config
        self.model, self.lengths = model, torch.tensor(lengths, device=model.device)
        self.documents = Documents(lengths, model.device)
        shape = (2, len(lengths), config.num_kv_heads, limit, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.blocks]

    def prefill(self, tokens: Tensor) -> Tensor:  # flat prompts [N] -> hidden of each prompt's last token [lines, D]
        positions = self.documents.positions
        line = torch.arange(len(self.lengths), device=tokens.device).repeat_interleave(self.lengths)

        def attend(layer):
            def attention(q, k, v):
                layer[0][line, :, positions], layer[1][line, :, positions] = k, v
                return document_attention(q, k, v, self.documents)

            return attention

        hidden = self.model.hidden(tokens, positions, [attend(layer) for layer in self.layers])
        return hidden[self.lengths.cumsum(0) - 1]

    def step(self, tokens: Tensor) -> Tensor:  # one new token a line [lines] -> hidden [lines, D]
        positions, line = self.lengths, torch.arange(len(tokens), device=tokens.device)
        longest = int(positions.max()) + 1
        seen = (torch.arange(longest, device=tokens.device) <= positions[:, None])[
            :, None, None
        ]  # [lines, 1, 1, length]

        def attend(layer):
            def attention(q, k, v):  # q: [lines, H, d]
                layer[0][line, :, positions], layer[1][line, :, positions] = k, v
                keys, values = layer[:, :, :, :longest]
                shared = q.unflatten(1, (keys.shape[1], -1))  # [lines, G, H / G, d]: heads of one key as its queries
                return F.scaled_dot_product_attention(shared, keys, values, attn_mask=seen).flatten(1, 2)

            return attention

        hidden = self.model.hidden(tokens, positions, [attend(layer) for layer in self.layers])
        self.lengths = self.lengths + 1
        return hidden

    def keep(self, alive: list[int]) -> None:
        """Forgets all lines but these, in this order."""
        alive = torch.tensor(alive, dtype=torch.int64, device=self.lengths.device)
        self.lengths = self.lengths[alive]
        self.layers = [layer.index_select(1, alive) for layer in self.layers]


def penalise_repetition_(logits: Tensor, rows: list[list[int]], penalty: float) -> None:
    for line, row in zip(logits, rows, strict=True):
        ids = torch.tensor(sorted(set(row)), device=logits.device)
        line[ids] = torch.where(line[ids] > 0, line[ids] / penalty, line[ids] * penalty)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One id a row, int64 [B], from float32 logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the mass of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        ordered[:, 0] = logits.max(-1).values  # top_p 0 still leaves the likeliest
        logits = torch.empty_like(logits).scatter_(1, ids, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
