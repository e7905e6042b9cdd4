"""One decoder-only transformer that is every supported family, by configuration (families.py).

A family is a row of switches in `Config`, never a subclass: which norms there are and where, how q, k and v lie in
their matrices, what rotates them and how far they see, which MLP, whether experts share it, whether attention and MLP
stand in a row or side by side. What a switch does is said where it is read.

Tokens flow flat: inside, a batch is one row of real tokens, [tokens, hidden], one document after another, and only
attention knows where a document ends (kernels/attention.py). So padding is never computed and packing is batching.
[B, T] is a shape at the door, in `Transformer.forward`. Shapes in comments: N tokens of a flat batch, B sequences,
T positions, D hidden, H heads, G key-value heads, d head_dim, V vocabulary, E experts.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decoding
from common.errors import UserError
from families import Config, Layer
from kernels.activation_checkpointing import ActivationCheckpointing
from kernels.attention import Documents, Scores, document_attention
from kernels.context_parallel import ShardedDocuments
from kernels.experts import can_group, routed_mlp, sort_pairs
from kernels.grouped import Member, Product, make_contiguous, make_product
from kernels.linear import linears, linears_reference
from kernels.nf4 import NF4, Frozen, dequantized_weight, nf4_linear
from kernels.rms_norm import add_rms_norm, adds_in_norm, rms_norm
from kernels.rope import LENGTH_DEPENDENT, rope_inv_freq, rope_qk
from kernels.swiglu import ACTIVATIONS, Gated, gated
from quant import QuantizedWeight


class Linear(nn.Module):
    """x W^T + b. An fp32 weight (a trained master) is cast to x's dtype for the product, its gradient comes in fp32.
    nf4: in place of the weight, which is frozen then."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.nf4: QuantizedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.nf4 is not None:
            return nf4_linear(x, self.nf4.tensors, None if self.bias is None else self.bias.to(x.dtype))
        if torch.is_grad_enabled():
            return linears(x, [self.weight], [self.bias])[0]
        return linears_reference(x, [self.weight], [self.bias])[0]

    def forward_shared(self, x: Tensor, layers: list, up: Tensor | None = None, activation: str = "") -> list[Tensor]:
        """What several layers, of which this is the first, make of x, or of act(x) * up: in one function where that
        saves memory or time."""
        if torch.is_grad_enabled() and all(type(layer) is Linear and layer.nf4 is None for layer in layers):
            return linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers], up, activation)
        return forward_each(x, layers, up, activation)

    @property
    def frozen(self) -> Frozen:
        """The weight as kernels take it that do not train it."""
        return (self.weight,) if self.nf4 is None else self.nf4.tensors

    def member(self) -> Member | None:
        """As kernels/grouped.py takes a linear of an expert; None if it can't."""
        return None if self.bias is not None else Member(self.frozen)

    def quantize(self, nf4: NF4) -> None:
        self.weight, self.nf4 = None, QuantizedWeight(nf4)

    def dequantize(self, weight: Tensor) -> None:
        self.nf4, self.weight = None, nn.Parameter(weight, requires_grad=False)


class Embedding(nn.Module):
    """Rows of a table. (torch's own fills the table with random numbers first.)"""

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:  # int64 [...] -> [..., size]
        return F.embedding(ids, self.weight)


def forward_each(x: Tensor, layers: list[nn.Module], up: Tensor | None, activation: str) -> list[Tensor]:
    if up is not None:
        x = Gated.apply(x, up, activation) if torch.is_grad_enabled() else gated(x, up, activation)
    return [layer(x) for layer in layers]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.empty(size)), eps, offset

    def forward(self, x: Tensor, added: Tensor | None = None, pair: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x, or as a pair x + added (x itself for None) and the norm of that."""
        if pair:
            return add_rms_norm(x, added, self.weight, self.eps, self.offset)
        return rms_norm(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """Ba et al. 2016, in fp32 inside whatever the dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config: Config, wanted: bool = True) -> nn.Module:
    if not wanted:
        return nn.Identity()
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


def add_then_norm(x: Tensor, added: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns x + added, or x itself for None, and the norm of that: of an RMSNorm on a GPU, in one kernel."""
    if isinstance(norm, RMSNorm):
        return norm(x, added, pair=True)
    total = x if added is None else x + added
    return total, norm(total)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        D, H, G, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.layout = H, G, d, config.qkv
        if self.layout == "split":
            self.q, self.k, self.v = (Linear(D, rows * d, config.qkv_bias) for rows in (H, G, G))
        else:
            self.qkv = Linear(D, (H + 2 * G) * d, config.qkv_bias)
        self.o = Linear(H * d, D, config.o_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            sizes = (d, d) if self.qk_norm == "head" else (H * d, G * d)
            self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps, config.norm_offset) for size in sizes)
        self.scores = Scores(layer.scale, layer.window, config.attention_softcap)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention_fn) -> Tensor:
        """cos_sin: cosines and sines [N, 1, r / 2] of the positions; attention_fn: takes q, k, v and self.scores."""
        q, k, v = self.project(x)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm:  # whole: all heads of a token together
            q, k = (norm(x.flatten(1)).view_as(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        if cos_sin is not None:
            q, k = rope_qk(q, k, *cos_sin)
        return self.o(attention_fn(q, k, v, self.scores).flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N, D] -> [N, H, d], [N, G, d], [N, G, d]
        H, G, d = self.heads, self.kv_heads, self.head_dim
        if self.layout == "split":
            q, k, v = self.q.forward_shared(x, [self.q, self.k, self.v])
        elif self.layout == "stacked":
            q, k, v = self.qkv(x).split((H * d, G * d, G * d), -1)
        else:  # grouped: the q heads of a key-value head, then it
            groups = self.qkv(x).view(-1, G, H // G + 2, d)
            q, k, v = groups[:, :, :-2], groups[:, :, -2], groups[:, :, -1]
        return q.reshape(-1, H, d), k.reshape(-1, G, d), v.reshape(-1, G, d)


class MLP(nn.Module):
    """gated: down(act(gate x) * up x) (Shazeer 2020); stacked: the same, gate's rows above up's in one matrix; plain:
    down(act(up x))."""

    def __init__(self, config: Config, inner: int):
        super().__init__()
        D, bias, self.kind, self.activation = config.hidden_size, config.mlp_bias, config.mlp, config.activation
        if self.kind == "stacked":
            self.gate_up = Linear(D, 2 * inner, bias)
        elif self.kind == "gated":
            self.gate = Linear(D, inner, bias)
        if self.kind != "stacked":
            self.up = Linear(D, inner, bias)
        self.down = Linear(inner, D, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.down(ACTIVATIONS[self.activation](self.up(x)))
        if self.kind == "stacked":
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = self.gate.forward_shared(x, [self.gate, self.up])
        return self.down.forward_shared(gate, [self.down], up, self.activation)[0]


class DropoutSeeds:
    """What decides an adapter's dropout (lora.py): a number for each token at hand, int64 [N], or nothing."""

    seeds: Tensor | None = None


class Experts(nn.Module):
    """Many MLPs of which each token uses few: those that a router finds likeliest, weighted by its probabilities
    (Shazeer et al. 2017; Jiang et al. 2024, Mixtral). The router is no Linear: adapters leave it as it is."""

    def __init__(self, config: Config):
        super().__init__()
        self.rules = config.experts
        self.router = Router(config.hidden_size, self.rules.count)
        self.experts = nn.ModuleList(MLP(config, self.rules.intermediate_size) for _ in range(self.rules.count))
        self.dropout_seeds = DropoutSeeds()  # the model's own
        self.cached_products: list[Product | None] | None = None  # see products()
        self.load = None  # of a batch in training: fraction of choices [E], mean probability [E], fp32; () when used

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1, dtype=torch.float32)  # [N, E]
        weights, chosen = probs.topk(self.rules.active)  # [N, active]
        if self.rules.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.can_group(x):
            out = self.forward_grouped(x, probs, weights, chosen)
            if out is not None:
                return out
        return self.forward_each_expert(x, probs, weights, chosen)

    def can_group(self, x: Tensor | None = None) -> bool:
        """Whether the experts can be computed all at once for x [N, D]; without it, for activations in the dtype and on
        the device of the weights."""
        like = self.router.weight if x is None else x
        gated_apart = self.experts[0].kind == "gated"
        return gated_apart and can_group(like, self.rules.count, self.rules.intermediate_size)

    def forward_grouped(self, x: Tensor, probs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor | None:
        """Without a wait for the GPU; None where the experts' linears are not alike."""
        products = self.products()
        if None in products:
            return None
        routes = sort_pairs(chosen, self.rules.count)
        if self.training and self.load is None:
            self.load = routes.groups.counts / len(x), probs.mean(0)
        return routed_mlp(x, weights, routes, *products, self.experts[0].activation, self.dropout_seeds.seeds)

    def products(self) -> list[Product | None]:
        """Of gate and up, and of down. While a text is written they are kept, since with 128 experts making them takes
        longer than a step's products."""
        if self.cached_products is not None and torch.is_inference_mode_enabled():
            return self.cached_products
        products = [
            make_product([[getattr(expert, name).member() for expert in self.experts] for name in names])
            for names in (("gate", "up"), ("down",))
        ]
        self.cached_products = products if torch.is_inference_mode_enabled() else None
        return products

    def train(self, mode: bool = True) -> nn.Module:
        self.cached_products = None  # `stream` and others begin with this, and adapters may have changed before
        return super().train(mode)

    def _apply(self, *args, **named) -> nn.Module:
        self.cached_products = None  # their memory is about to be left
        return super()._apply(*args, **named)

    def forward_each_expert(self, x: Tensor, probs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        E, active = self.rules.count, self.rules.active
        order = chosen.flatten().argsort(stable=True)  # token-expert pairs, by expert
        counts = torch.bincount(chosen.flatten(), minlength=E)
        if self.training and self.load is None:  # not when the block is computed again: it would keep all that it made
            self.load = counts / len(x), probs.mean(0)
        token = order // active
        parts = x.index_select(0, token).split(counts.tolist())  # a GPU is waited for here, and nowhere else
        # In training also those that nobody chose: without a gradient of zero, Adam's momentum would not move them
        wanted = [(e, part) for e, part in zip(self.experts, parts, strict=True) if len(part) or self.training]
        seeds, self.dropout_seeds.seeds = self.dropout_seeds.seeds, None
        if seeds is not None:
            part_seeds = [part for part in seeds[token].split(counts.tolist()) if len(part) or self.training]
        outs = []
        for i, (expert, part) in enumerate(wanted):
            self.dropout_seeds.seeds = None if seeds is None else part_seeds[i]
            outs.append(expert(part))
        self.dropout_seeds.seeds, out = seeds, torch.cat(outs)
        out = out * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, out)

    def make_weights_contiguous(self) -> None:
        """Moves the experts' matrices and adapters into few tensors, of which the parameters are parts: see
        kernels/grouped.py."""
        self.cached_products = None
        for names in (("gate", "up"), ("down",)):
            members = [getattr(expert, name).member() for expert in self.experts for name in names]
            if None not in members:
                for column in zip(*([*member.frozen, member.A, member.B] for member in members), strict=True):
                    make_contiguous(column)


def stack_expert_weights(model: nn.Module) -> None:
    """On GPUs, for kernels/grouped.py."""
    for module in model.modules():
        if isinstance(module, Experts) and module.router.weight.is_cuda:
            module.make_weights_contiguous()


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, E]
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        self.parallel, self.shared = config.parallel, config.shared_norm
        self.attention_norm = make_norm(config, config.pre_norm)
        self.attention = Attention(config, layer)
        self.attention_post_norm = make_norm(config, config.post_norm)
        self.mlp_norm = make_norm(config, config.pre_norm and not self.shared)
        self.mlp = Experts(config) if layer.routed else MLP(config, config.intermediate_size)
        self.mlp_post_norm = make_norm(config, config.post_norm)

    def forward(
        self, x: Tensor, added: Tensor | None, cos_sin: tuple[Tensor, Tensor] | None, attention_fn
    ) -> tuple[Tensor, Tensor | None]:
        """From one pair to the next: the residual and, where the norm that follows adds, what is to be added to it."""
        x, normal = add_then_norm(x, added, self.attention_norm)
        attended = self.attention_post_norm(self.attention(normal, cos_sin, attention_fn))
        if self.parallel:
            out = self.mlp(normal if self.shared else self.mlp_norm(x))
            return self.residual_pair(x + attended, out)
        x, normal = add_then_norm(x, attended, self.mlp_norm)
        return self.residual_pair(x, self.mlp_post_norm(self.mlp(normal)))

    def residual_pair(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.attention_norm, RMSNorm) and adds_in_norm(x):
            return x, added
        return x + added, None


def with_fresh_casts(hidden: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Transformer.hidden, around which an adapter's matrices are cast to the model's dtype (lora.ModelCasts); compiled
    blocks cast for themselves."""

    @wraps(hidden)
    def run(model: "Transformer", *inputs, **named) -> Tensor:
        if model.lora_casts is None or model.compiled:
            return hidden(model, *inputs, **named)
        with model.lora_casts.fresh(model.dtype):
            return hidden(model, *inputs, **named)

    return run


class Transformer(nn.Module):
    """Built with uninitialised weights (on the meta device by checkpoint.load_model, which fills them).

    compute_dtype: the activations' dtype; None means the embedding table's. Full fine-tuning keeps fp32 weights and
    computes in bf16 by setting it.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.compute_dtype = config, None
        self.activation_checkpointing = "none"  # one of KINDS: what is kept for the backward
        self.attention_fn, self.dropout_seeds, self.compiled = document_attention, DropoutSeeds(), False
        self.lora_casts = None  # lora.ModelCasts, where there is an adapter
        self.unquantized: list[str] = []  # linears that were to be quantised and could not be
        self.inv_freqs: dict[int, Tensor] = {}  # of config.ropes, on the device where they were last used
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.positions = Embedding(config.max_positions, config.hidden_size) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = make_norm(config)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        for block in self.blocks:
            if isinstance(block.mlp, Experts):
                block.mlp.dropout_seeds = self.dropout_seeds

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def size(self) -> int:
        """Numbers in all parameters, those in 4 bits counted as what they stand for."""
        plain = sum(p.numel() for name, p in self.named_parameters() if ".nf4." not in name)
        return plain + sum(layer.in_features * layer.out_features for layer in quantized_linears(self).values())

    def head_weight(self) -> Tensor:
        """[V, D]; of a head in 4 bits, made anew at each call."""
        if self.head is None:
            return self.embed.weight
        return self.head.weight if self.head.nf4 is None else dequantized_weight(self.head.frozen, self.dtype)

    @with_fresh_casts
    def hidden(self, tokens: Tensor, positions: Tensor, lengths: Tensor, attention_fns: list) -> Tensor:
        """tokens, positions: int64 [N]; lengths: int64 [N], of the document that each token is in, as long as it is so
        far; attention_fns: a function of q, k, v and scores for each block. Returns [N, D], normalised."""
        tables = [self.cos_sin(i, positions, lengths) for i in range(len(self.config.ropes))]
        x = self.embed(tokens).to(self.dtype)
        if self.config.embed_scale != 1.0:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype).item()  # rounded first, as it is published
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        again = (
            ActivationCheckpointing(self.activation_checkpointing, x.device)
            if self.activation_checkpointing != "none" and torch.is_grad_enabled()
            else None
        )
        added = None  # to x: what a block has computed, where the next norm adds it (Block.hand_over)
        for block, layer, attention_fn in zip(self.blocks, self.config.layers, attention_fns, strict=True):
            cos_sin = None if layer.rope is None else tables[layer.rope]
            if again:
                x, added = again.run(block, block is self.blocks[-1], x, added, cos_sin, attention_fn)
            else:
                x, added = block(x, added, cos_sin, attention_fn)
        return add_then_norm(x, added, self.norm)[1]

    def cos_sin(self, number: int, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [N, 1, r / 2] in the model's dtype, of rope `number` of the configuration."""
        spec, scaling = self.config.ropes[number], self.config.ropes[number].scaling or {}
        if scaling.get("rope_type") in LENGTH_DEPENDENT:
            table = rope_inv_freq(spec.theta, spec.dim, scaling, lengths)
        else:
            table = self.inv_freqs.get(number)
            if table is None or table.device != positions.device:
                with torch.inference_mode(False):  # it outlives a text that is written, and serves training then
                    table = rope_inv_freq(spec.theta, spec.dim, spec.scaling).to(positions.device)
                self.inv_freqs[number] = table
        angles, sharper = positions[:, None].float() * table, scaling.get("attention_factor", 1.0)
        return tuple((wave * sharper).to(self.dtype).unsqueeze(1) for wave in (angles.cos(), angles.sin()))

    def flat(self, tokens: Tensor, documents: Documents) -> Tensor:
        """The training path: int64 [N] tokens of whole documents -> [N, D], ready for the head."""
        self.dropout_seeds.seeds = documents.dropout_seeds
        attention_fn, keep = (
            partial(self.attention_fn, documents=documents),
            self.activation_checkpointing != "selective",
        )
        if isinstance(documents, ShardedDocuments):
            attention_fn = torch.compiler.disable(documents.attend) if self.compiled else documents.attend
        attention_fn = partial(attention_fn, keep=keep)
        return self.hidden(tokens, documents.positions, documents.doc_lengths, [attention_fn] * len(self.blocks))

    def compile_blocks(self) -> None:
        """torch.compile of the blocks: one graph for all of them, with the number of tokens left open, and attention
        outside, whose shapes are other ones in every batch; so are grouped products, of as many weights as experts."""
        if self.device.type == "cuda" and self.config.attention_softcap:
            raise UserError("--compile on: not with this model's soft-capped attention, which a GPU compiles by itself")
        self.compiled = True
        self.attention_fn = torch.compiler.disable(
            document_attention
        )  # not where it is defined: that imports the compiler
        for block in self.blocks:
            if isinstance(block.mlp, Experts):
                block.mlp.forward_grouped = torch.compiler.disable(block.mlp.forward_grouped)
            block.compile(dynamic=True)

    def logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        logits = self.uncapped_logits(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def uncapped_logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
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

    def generate(self, prompts, max_new_tokens: int, mask: Tensor | None = None, **settings) -> list[list[int]]:
        """New ids for each prompt, the stop id that ended it included.

        prompts: int64 [B, T], or lists of ids of any lengths (none empty). mask: [B, T], nonzero where a prompt's
        token is real and not padding, on whichever side that is. Other arguments as in `stream`.
        """
        if mask is not None:
            prompts = [row[real.bool()] for row, real in zip(prompts, mask, strict=True)]
        rows: list[list[int]] = [[] for _ in prompts]
        if settings.get("lookup"):
            return [[step[0][1] for step in self.stream([p], max_new_tokens, **settings)] for p in prompts]
        for step in self.stream(prompts, max_new_tokens, **settings):
            for row, token in step:
                rows[row].append(token)
        return rows

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens: int, **settings) -> Iterator[list[tuple[int, int]]]:
        """Yields, a step at a time, (prompt number, new id) for every prompt that is still going.

        prompts: int64 [B, T], or lists of ids of any lengths (none empty). None sees another, but what is sampled with
        a seed depends on the whole batch. temperature 0, the default, takes the likeliest token. Otherwise, in this
        order: the repetition_penalty of Keskar et al. 2019 (CTRL) on ids seen in prompt or answer, temperature, the
        top_k likeliest (0: all), the smallest set of probability top_p (Holtzman et al. 2020), drawn with `seed`. A
        prompt ends with an id in `stop`, after max_new_tokens, or at the model's limit. lookup: for one prompt, greedy:
        guess so many tokens at a time from the text so far; the answer is the same, but for rounding.
        """
        with eval_mode(self), decoding.packed_weights(self, steps=max_new_tokens):
            yield from decoding.stream(self, prompts, max_new_tokens, **settings)


def quantized_linears(model: nn.Module) -> dict[str, Linear]:
    """The linears whose weight is in 4 bits, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.nf4 is not None}


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, and afterwards whatever was before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
