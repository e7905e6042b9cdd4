"""One decoder-only transformer, which computes every supported family (families.py).

A family is a configuration: a row of switches in `Config`, never a subclass: which norms there are
and where, how the matrices of q, k and v are stored, their rotary positions and sliding windows,
which MLP, whether it is a mixture of experts, and whether attention and MLP run one after the other
or in parallel. What a switch does is explained where it is read.

Inside, a batch is one row of real tokens, [tokens, hidden], one document after another, and only
attention knows where a document ends (kernels/attention.py). So padding is never computed, and
packing is batching. `Transformer.forward` is the entry point for batches of shape [B, T].

Shapes in comments: N tokens of a flat batch, B sequences, T positions, D hidden, H heads, G
key-value heads, d head_dim, V vocabulary, E experts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

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
from kernels.seeded_random import seeded_uniform
from kernels.shared_rows import attend_shared, lead_documents
from kernels.swiglu import ACTIVATIONS, Gated, gated
from quant import QuantizedWeight

# Where a model is asked for the next token that has a score head.
NO_LM_HEAD = "the model has a head for sequence classification and no LM head"

# ---- layers ----


class Linear(nn.Module):
    """x W^T + b.

    Mixed precision: a float32 weight (a trained master weight) is cast to x's dtype for the
    product; its gradient is float32.

    nf4: stands in place of the weight, which is frozen then.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.nf4: QuantizedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out]
        if self.nf4 is not None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nf4_linear(x, self.nf4.tensors, bias)
        # Autograd would keep the cast weight until the backward; `linears` casts it again there.
        if torch.is_grad_enabled():
            outputs = linears(x, [self.weight], [self.bias])
        else:
            outputs = linears_reference(x, [self.weight], [self.bias])
        return outputs[0]

    def forward_shared(
        self, x: Tensor, layers: list, up: Tensor | None = None, activation: str = ""
    ) -> list[Tensor]:
        """Returns the outputs of several layers that read the same input, as one autograd function
        where that saves memory or time.

        layers: this one and others.
        The input is x [N, in], or with `up` [N, in], act(x) * up. activation: the name of act.
        """
        if not torch.is_grad_enabled() or not are_plain(layers):
            return forward_each(x, layers, up, activation)
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers]
        return linears(x, weights, biases, up, activation)

    @property
    def frozen(self) -> Frozen:
        """The weight as the kernels take it that do not train it."""
        if self.nf4 is None:
            return (self.weight,)
        return self.nf4.tensors

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight. dtype: of one in NF4, which is dequantized at each call."""
        if self.nf4 is None:
            return self.weight
        return dequantized_weight(self.frozen, dtype)

    def member(self) -> Member | None:
        """Returns this linear of an expert as kernels/grouped.py takes it; None if it has a
        bias."""
        if self.bias is not None:
            return None
        return Member(self.frozen)

    def quantize(self, nf4: NF4) -> None:
        self.register_parameter("weight", None)
        self.nf4 = QuantizedWeight(nf4)

    def dequantize(self, weight: Tensor) -> None:
        self.nf4 = None
        self.weight = nn.Parameter(weight, requires_grad=False)


class Embedding(nn.Module):
    """A table of vectors. (nn.Embedding would first fill it with random numbers.)

    bias, nf4: it has none, which those ask who take it for the output head.
    """

    bias = None
    nf4 = None

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    @property
    def frozen(self) -> Frozen:
        return (self.weight,)

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight

    def forward(self, ids: Tensor) -> Tensor:  # int64 [...] -> [..., size]
        return F.embedding(ids, self.weight)


def are_plain(layers: list[nn.Module]) -> bool:
    """True if all layers are Linears themselves, not adapted ones, and have a weight that is not
    in NF4."""
    return all(type(layer) is Linear and layer.nf4 is None for layer in layers)


def forward_each(
    x: Tensor, layers: list[nn.Module], up: Tensor | None, activation: str
) -> list[Tensor]:
    """Returns what `Linear.forward_shared` returns, computed layer by layer."""
    if up is not None:
        if torch.is_grad_enabled():
            x = Gated.apply(x, up, activation)
        else:
            x = gated(x, up, activation)
    return [layer(x) for layer in layers]


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019.

    offset: added to the weight. Gemma's published weights are the distances from 1.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.offset = offset

    def forward(
        self, x: Tensor, added: Tensor | None = None, pair: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the norm of x. If `pair`, returns x + added (x itself if `added` is None) and the
        norm of that."""
        if pair:
            return add_rms_norm(x, added, self.weight, self.eps, self.offset)
        return rms_norm(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """Ba et al. 2016, computed in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def make_norm(config: Config, enabled: bool = True) -> nn.Module:
    if not enabled:
        return nn.Identity()
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


def add_then_norm(x: Tensor, added: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns x + added (x itself if `added` is None), and the norm of that. An RMSNorm on a GPU
    does both in one kernel."""
    if isinstance(norm, RMSNorm):
        return norm(x, added, pair=True)
    if added is not None:
        x = x + added
    return x, norm(x)


class Attention(nn.Module):
    """The matrices and norms of attention with grouped queries (Ainslie et al. 2023).

    `forward` is given the function that attends, since training and decoding differ in it.
    """

    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        D = config.hidden_size
        H = config.num_heads
        G = config.num_kv_heads
        d = config.head_dim
        self.heads = H
        self.kv_heads = G
        self.head_dim = d
        self.layout = config.qkv
        if self.layout == "split":
            self.q = Linear(D, H * d, config.qkv_bias)
            self.k = Linear(D, G * d, config.qkv_bias)
            self.v = Linear(D, G * d, config.qkv_bias)
        else:
            self.qkv = Linear(D, (H + 2 * G) * d, config.qkv_bias)
        self.o = Linear(H * d, D, config.o_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm == "head":
            self.q_norm = RMSNorm(d, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(d, config.norm_eps, config.norm_offset)
        elif self.qk_norm:  # "whole": over all heads together
            self.q_norm = RMSNorm(H * d, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(G * d, config.norm_eps, config.norm_offset)
        self.scores = Scores(layer.scale, layer.window, config.attention_softcap)

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention_fn: Callable
    ) -> Tensor:
        """Returns what the layer adds to the residual, [N, D].

        x: [N, D].
        cos_sin: cosines and sines of the positions, [N, 1, r / 2] each; None: q and k are not
        rotated.
        attention_fn: a function of q, k, v and self.scores.
        """
        q, k, v = self.project_and_rotate(x, cos_sin)
        out = attention_fn(q, k, v, self.scores)  # [N, H, d]
        return self.o(out.flatten(1))

    def project_and_rotate(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> q [N, H, d], k [N, G, d] and v [N, G, d], with norms and positions applied.

        decoding.py replaces it by one product and one rotation on CPUs, and nothing else of this
        class's forward.
        """
        q, k, v = self.project(x)
        # The norm comes before the rotation, as in the published models.
        if self.qk_norm == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        elif self.qk_norm == "whole":
            q = self.q_norm(q.flatten(1)).view_as(q)
            k = self.k_norm(k.flatten(1)).view_as(k)
        if cos_sin is not None:
            cos, sin = cos_sin
            q, k = rope_qk(q, k, cos, sin)
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> q [N, H, d], k [N, G, d] and v [N, G, d]"""
        H = self.heads
        G = self.kv_heads
        d = self.head_dim
        if self.layout == "split":
            layers = [self.q, self.k, self.v]
            q, k, v = self.q.forward_shared(x, layers)
        elif self.layout == "stacked":
            sizes = (H * d, G * d, G * d)
            q, k, v = self.qkv(x).split(sizes, -1)
        else:  # grouped: for each key-value head its q heads, its k and its v
            n_rep = H // G
            groups = self.qkv(x).view(-1, G, n_rep + 2, d)
            q = groups[:, :, :-2]  # [N, G, n_rep, d]
            k = groups[:, :, -2]  # [N, G, d]
            v = groups[:, :, -1]
        q = q.reshape(-1, H, d)
        k = k.reshape(-1, G, d)
        v = v.reshape(-1, G, d)
        return q, k, v


class MLP(nn.Module):
    """kind "gated": down(act(gate x) * up x) (Shazeer 2020). "stacked": the same, with the rows of
    gate above those of up in one matrix. "plain": down(act(up x)).

    inner: the intermediate size.
    """

    def __init__(self, config: Config, inner: int):
        super().__init__()
        D = config.hidden_size
        self.kind = config.mlp
        self.activation = config.activation
        if self.kind == "stacked":
            self.gate_up = Linear(D, 2 * inner, config.mlp_bias)
        elif self.kind == "gated":
            self.gate = Linear(D, inner, config.mlp_bias)
        if self.kind != "stacked":
            self.up = Linear(D, inner, config.mlp_bias)
        self.down = Linear(inner, D, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        if self.kind == "plain":
            activation = ACTIVATIONS[self.activation]
            return self.down(activation(self.up(x)))
        if self.kind == "stacked":
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = self.gate.forward_shared(x, [self.gate, self.up])
        # `down` gets gate and up, so that act(gate) * up need not be saved for the backward.
        return self.down.forward_shared(gate, [self.down], up, self.activation)[0]


class ScoreHead(nn.Module):
    """What stands in the place of the LM head in a model for sequence classification, and in a reward
    model: scores of a text, from the hidden state of its last token.

    weight: float32 [labels, D], whatever the dtype of the model; there is no bias.
    labels: of the rows, in their order.
    """

    def __init__(self, weight: Tensor, labels: tuple[str, ...]):
        super().__init__()
        assert len(weight) == len(labels), "a row for each label"
        self.weight = nn.Parameter(weight)
        self.labels = labels

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the scores, float32 [M, labels], before any softmax.

        hidden: [M, D], in the dtype of the model.
        """
        return scores_of_hidden(hidden, self.weight)


def scores_of_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns the product of hidden states [M, D] and a score head's weight [labels, D], float32
    [M, labels]. It is computed in float32; transformers computes it in the dtype of the model, which
    is the same in a float32 model."""
    return F.linear(hidden.float(), weight.float())


# ---- mixtures of experts ----


class DropoutSeeds:
    """Decides what the dropout of adapters drops (lora.py), and which noise the embeddings get. All
    adapters of a model share it.

    seeds: int64 [N], one for each token of the current batch; None: the numbers are drawn.
    """

    seeds: Tensor | None = None


class Experts(nn.Module):
    """Many MLPs, of which each token uses a few: those that a router finds likeliest, weighted by
    its probabilities (Shazeer et al. 2017; Jiang et al. 2024, Mixtral). The router is no Linear, so
    adapters leave it as it is."""

    def __init__(self, config: Config):
        super().__init__()
        rules = config.experts
        assert rules is not None, "a layer is routed only if the configuration has experts"
        self.rules = rules
        self.router = Router(config.hidden_size, rules.count)
        self.experts = nn.ModuleList(
            MLP(config, rules.intermediate_size) for _ in range(rules.count)
        )
        self.dropout_seeds = DropoutSeeds()  # Transformer puts its own here
        self.cached_products: list[Product | None] | None = None  # see products()
        # Of a batch in training, for the balance loss: the fraction of choices and the mean
        # probability of each expert, float32 [E]. () once they are used, so that a block that is
        # computed again does not set them anew.
        self.load: tuple[Tensor, Tensor] | tuple[()] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        # In float32, as the published models do: in bf16, more experts would be equally likely.
        logits = self.router(x)
        probs = logits.softmax(-1, dtype=torch.float32)  # [N, E]
        weights, chosen = probs.topk(self.rules.active)  # [N, active]
        if self.rules.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        # One after the other is the general way: it takes any linears, on any device.
        if self.can_group(x):
            out = self.forward_grouped(x, probs, weights, chosen)
            if out is not None:
                return out
        return self.forward_each_expert(x, probs, weights, chosen)

    def can_group(self, x: Tensor | None = None) -> bool:
        """True if all experts can be computed together for x [N, D]. Without x, activations with
        the dtype and device of the weights are meant."""
        if self.experts[0].kind != "gated":
            return False
        like = self.router.weight if x is None else x
        return can_group(like, self.rules.count, self.rules.intermediate_size)

    def forward_grouped(
        self, x: Tensor, probs: Tensor, weights: Tensor, chosen: Tensor
    ) -> Tensor | None:
        """Computes all experts together, without waiting for the GPU. Returns None if the experts'
        linears are not alike."""
        gate_up, down = self.products()
        if gate_up is None or down is None:
            return None
        routes = sort_pairs(chosen, self.rules.count)
        if self.training and self.load is None:
            chosen_fraction = routes.groups.counts / len(x)
            self.load = (chosen_fraction, probs.mean(0))
        first = cast(MLP, self.experts[0])  # all have the same activation
        seeds = self.dropout_seeds.seeds
        return routed_mlp(x, weights, routes, gate_up, down, first.activation, seeds)

    def products(self) -> list[Product | None]:
        """Returns the product of gate and up, and that of down. They are kept in inference mode,
        because with 128 experts making them takes longer than the products of a decoding step."""
        is_inference = torch.is_inference_mode_enabled()
        if self.cached_products is not None and is_inference:
            return self.cached_products
        gate_up = make_product([self.members("gate"), self.members("up")])
        down = make_product([self.members("down")])
        self.cached_products = [gate_up, down] if is_inference else None
        return [gate_up, down]

    def members(self, name: str) -> list[Member | None]:
        """Returns the linear `name` of every expert, as kernels/grouped.py takes it."""
        return [getattr(expert, name).member() for expert in self.experts]

    def train(self, mode: bool = True) -> "Experts":
        # Decoding begins with a call of this, and adapters may have changed before.
        self.cached_products = None
        return super().train(mode)

    def _apply(self, *args, **named) -> "Experts":
        # The parameters are about to move to other memory.
        self.cached_products = None
        return super()._apply(*args, **named)

    def forward_each_expert(
        self, x: Tensor, probs: Tensor, weights: Tensor, chosen: Tensor
    ) -> Tensor:
        """Computes one expert after the other."""
        E = self.rules.count
        # Each token makes `active` pairs with its experts. Sorted by expert, the pairs of an expert
        # are adjacent.
        experts = chosen.flatten()  # [pairs]
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=E)  # [E]
        # Not when a block is computed again: the load would keep all that this computation saves.
        if self.training and self.load is None:
            chosen_fraction = counts / len(x)
            self.load = (chosen_fraction, probs.mean(0))
        token = order // self.rules.active  # [pairs]
        sizes = counts.tolist()  # the host waits for the GPU here, and nowhere else
        parts = x.index_select(0, token).split(sizes)
        seeds = self.dropout_seeds.seeds
        part_seeds: Sequence[Tensor | None] = [None] * E
        if seeds is not None:
            part_seeds = seeds[token].split(sizes)
        outs = []
        for expert, part, expert_seeds in zip(self.experts, parts, part_seeds, strict=True):
            # In training, an expert that no token chose is computed too: without a gradient, even
            # one of zeros, Adam's momentum would not move its weights.
            if len(part) or self.training:
                self.dropout_seeds.seeds = expert_seeds
                outs.append(expert(part))
        self.dropout_seeds.seeds = seeds
        out = torch.cat(outs)  # [pairs, D]
        pair_weights = weights.flatten()[order, None].to(x.dtype)  # [pairs, 1]
        out = out * pair_weights
        return torch.zeros_like(x).index_add(0, token, out)

    def make_weights_contiguous(self) -> None:
        """Moves the weights and adapters of all experts into a few tensors, of which the parameters
        become views: see kernels/grouped.py."""
        self.cached_products = None
        gate_up = []  # in the order of a Product: gate, up, gate, up
        for gate, up in zip(self.members("gate"), self.members("up"), strict=True):
            gate_up += [gate, up]
        for linears_of_product in (gate_up, self.members("down")):
            rows: list[list[Tensor | None]] = []  # the tensors of each linear
            for member in linears_of_product:
                if member is not None:
                    rows.append([*member.frozen, member.A, member.B])
            if len(rows) < len(linears_of_product):
                continue
            for column in zip(*rows, strict=True):
                make_contiguous(list(column))


def stack_expert_weights(model: nn.Module) -> None:
    """Makes the weights of experts contiguous where they are on a GPU, for kernels/grouped.py."""
    for module in model.modules():
        if isinstance(module, Experts) and module.router.weight.is_cuda:
            module.make_weights_contiguous()


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, E]
        return F.linear(x, self.weight.to(x.dtype))


# ---- the model ----


class Block(nn.Module):
    """One layer of the decoder: attention, then an MLP or experts; or both beside each other."""

    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        self.parallel = config.parallel
        self.shared = config.shared_norm
        self.attention_norm = make_norm(config, config.pre_norm)
        self.attention = Attention(config, layer)
        self.attention_post_norm = make_norm(config, config.post_norm)
        self.mlp_norm = make_norm(config, config.pre_norm and not self.shared)
        self.mlp = Experts(config) if layer.routed else MLP(config, config.intermediate_size)
        self.mlp_post_norm = make_norm(config, config.post_norm)
        # Bottleneck adapters (adapters.py): functions of what a sublayer adds, and of the residual
        # that it is added to.
        self.attention_adapter: nn.Module | None = None
        self.mlp_adapter: nn.Module | None = None

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        cos_sin: tuple[Tensor, Tensor] | None,
        attention_fn: Callable,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns the residual, [N, D], and what the next norm still has to add to it:
        [N, D] or None (see `residual_pair`)."""
        x, normed = add_then_norm(x, added, self.attention_norm)
        attended = self.attention(normed, cos_sin, attention_fn)
        attended = self.attention_post_norm(attended)
        if self.attention_adapter is not None:
            attended = self.attention_adapter(attended, x)
        if self.parallel:
            # Both read the residual as it was before attention.
            mlp_input = normed if self.shared else self.mlp_norm(x)
            out = self.mlp(mlp_input)
            if self.mlp_adapter is not None:
                out = self.mlp_adapter(out, x)
            return self.residual_pair(x + attended, out)
        x, normed = add_then_norm(x, attended, self.mlp_norm)
        out = self.mlp_post_norm(self.mlp(normed))
        if self.mlp_adapter is not None:
            out = self.mlp_adapter(out, x)
        return self.residual_pair(x, out)

    def residual_pair(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns (x, added) if the next norm adds in its kernel, else (x + added, None)."""
        if isinstance(self.attention_norm, RMSNorm) and adds_in_norm(x):
            return x, added
        return x + added, None


def with_fresh_casts(hidden: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates Transformer.hidden: meanwhile, casts of the adapters' matrices to the model's dtype
    are at hand (lora.ModelCasts). Compiled blocks cast by themselves."""

    @wraps(hidden)
    def run(model: "Transformer", *inputs, **named) -> Tensor:
        if model.lora_casts is None or model.compiled:
            return hidden(model, *inputs, **named)
        with model.lora_casts.fresh(model.dtype):
            return hidden(model, *inputs, **named)

    return run


class Transformer(nn.Module):
    """The weights are not initialized: checkpoint.load_model builds the model on the meta device
    and fills it.

    compute_dtype: the dtype of activations; None: that of the embedding table. Full fine-tuning
    sets it, to keep float32 weights and compute in bf16.
    activation_checkpointing: one of CHECKPOINTING_KINDS in common/choices.py, what is saved
    for the backward.
    embedding_noise: alpha of NEFTune, the noise that embeddings get while the model trains
    (`add_noise`); 0: none.
    lora_casts: a lora.ModelCasts if there is an adapter.
    prompt: an adapters.VirtualTokens if learned virtual tokens stand before every document.
    score: a ScoreHead, or one that is trained beside an adapter (adapting/score_head.py), in a model
    for sequence classification; while it is there, an LM head is not used.
    unquantized: names of linears that should have been quantized and could not be.
    source: the folder that weights, tokenizer and settings come from; set by whoever loads them.
    """

    source: Path

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing = "none"
        self.embedding_noise = 0.0
        self.attention_fn = document_attention
        self.dropout_seeds = DropoutSeeds()
        self.compiled = False
        self.lora_casts = None
        self.prompt: nn.Module | None = None
        self.unquantized: list[str] = []
        # {the index in config.ropes: its frequencies}, on the device where they were used last. No
        # buffers, since the model is built on the meta device and filled from files.
        self.inv_freqs: dict[int, Tensor] = {}
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.positions = None
        if config.learned_positions:
            self.positions = Embedding(config.max_positions, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = make_norm(config)
        self.head = None
        self.score: nn.Module | None = None
        if config.labels is not None:
            weight = torch.empty(len(config.labels), config.hidden_size, dtype=torch.float32)
            self.score = ScoreHead(weight, config.labels)
        elif not config.tied:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for block in self.blocks:
            if isinstance(block.mlp, Experts):
                block.mlp.dropout_seeds = self.dropout_seeds

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.compute_dtype or self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def size(self) -> int:
        """The number of parameters. A weight in NF4 counts with all the numbers that it stands
        for."""
        size = 0
        for name, parameter in self.named_parameters():
            if ".nf4." not in name:
                size += parameter.numel()
        for linear in quantized_linears(self).values():
            size += linear.in_features * linear.out_features
        return size

    @property
    def head_table(self) -> nn.Module:
        """What holds the weight of the output head: the embedding table, where the two are tied."""
        return self.embed if self.head is None else self.head

    def head_weight(self) -> Tensor:
        """Returns the weight of the output head, [V, D]. One in NF4 is dequantized at each call.

        Single rows that are trained (`head_rows`) stand in it without their gradient.
        Raises UserError if the model has a score head in its place, or had one that was taken off.
        """
        if self.score is not None or (self.head is None and not self.config.tied):
            raise UserError(NO_LM_HEAD)
        return self.head_table.whole_weight(self.dtype)  # type: ignore[operator]

    @property
    def trains_head(self) -> bool:
        """True if the output head is trained, or rows of it are."""
        return self.score is None and any(p.requires_grad for p in self.head_table.parameters())

    def head_rows(self) -> tuple[Tensor, Tensor] | None:
        """Returns the ids of the rows of the output head that are trained alone, int64 [R], and these
        rows, float32 [R, D]; None where it is trained as a whole, or not at all."""
        return getattr(self.head_table, "live_rows", None)

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens stand before every document."""
        if self.prompt is None or self.prompt.merged:
            return 0
        return self.prompt.count  # type: ignore[return-value]

    @property
    def max_positions(self) -> int:
        """The longest text that the model takes, in tokens."""
        return self.config.max_positions - self.virtual_tokens

    @with_fresh_casts
    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor,
        attention_fns: list[Callable],
        leading: Tensor | None = None,
    ) -> Tensor:
        """Returns the normed hidden states, [N, D].

        tokens: int64 [N], or [N - L] with L leading vectors.
        positions: int64 [N].
        lengths: int64 [N], the length of the document that each token is in, as far as it is known.
        attention_fns: for each block, a function of q, k, v and its Scores.
        leading: [L, D], vectors that stand before those of the tokens.
        """
        # Layers share ropes, so the cosines and sines of each rope are computed once.
        num_ropes = len(self.config.ropes)
        tables = [self.cos_sin(i, positions, lengths) for i in range(num_ropes)]
        x = self.embed(tokens).to(self.dtype)
        if self.config.embed_scale != 1.0:
            # The published models round the scale to the dtype of the activations before they
            # multiply.
            scale = torch.tensor(self.config.embed_scale, dtype=x.dtype)
            x = x * scale.item()
        if self.training and self.embedding_noise:
            # After the scale, which transformers counts to the embedding as well.
            x = self.add_noise(x, lengths[len(lengths) - len(x) :])
        if leading is not None:
            # Learned, so they are not scaled.
            x = torch.cat([leading.to(x.dtype), x])
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        checkpointing = None
        if self.activation_checkpointing != "none" and torch.is_grad_enabled():
            checkpointing = ActivationCheckpointing(self.activation_checkpointing, x.device)
        added = None  # what the next norm still has to add to x (Block.residual_pair)
        layers = self.config.layers
        for block, layer, attention_fn in zip(self.blocks, layers, attention_fns, strict=True):
            cos_sin = None if layer.rope is None else tables[layer.rope]
            if checkpointing:
                is_last = block is self.blocks[-1]
                x, added = checkpointing.run(block, is_last, x, added, cos_sin, attention_fn)
            else:
                x, added = block(x, added, cos_sin, attention_fn)
        _, normed = add_then_norm(x, added, self.norm)
        return normed

    def add_noise(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Returns the embeddings x with noise: NEFTune (Jain et al. 2023, algorithm 1).

        It is uniform in (-1, 1), times embedding_noise / sqrt(L * D) in a text of L tokens. Virtual
        tokens have none, and do not count in L.

        x: [N, D], of the tokens.
        lengths: int64 [N], as in `hidden`; the virtual tokens count there.
        """
        D = x.shape[1]
        seeds = self.dropout_seeds.seeds
        if seeds is None:
            noise = 2 * torch.rand(x.shape, device=x.device) - 1
        else:
            noise = seeded_uniform(seeds, D)
        own_lengths = lengths - self.virtual_tokens
        scale = self.embedding_noise / (own_lengths * D).sqrt()  # [N]
        return x + (noise * scale[:, None]).to(x.dtype)

    def cos_sin(self, number: int, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of rope `number` of the configuration, [N, 1, r / 2] in the
        model's dtype.

        positions, lengths: as in `hidden`.
        """
        rope = self.config.ropes[number]
        scaling = rope.scaling or {}
        if scaling.get("rope_type") in LENGTH_DEPENDENT:
            inv_freq = rope_inv_freq(rope.theta, rope.dim, scaling, lengths)  # [N, r / 2]
        else:
            inv_freq = self.fixed_inv_freq(number, positions.device)  # [r / 2]
        # In float32: in bf16, large positions would not be distinct.
        angles = positions[:, None].float() * inv_freq
        factor = scaling.get("attention_factor", 1.0)
        cos = angles.cos() * factor
        sin = angles.sin() * factor
        # One head, which stands for all.
        cos = cos.to(self.dtype).unsqueeze(1)  # [N, 1, r / 2]
        sin = sin.to(self.dtype).unsqueeze(1)
        return cos, sin

    def fixed_inv_freq(self, number: int, device: torch.device) -> Tensor:
        """Returns the frequencies of a rope that does not depend on lengths, float32 [r / 2]."""
        inv_freq = self.inv_freqs.get(number)
        if inv_freq is not None and inv_freq.device == device:
            return inv_freq
        rope = self.config.ropes[number]
        # The table outlives the decoding that may need it first, and serves training then.
        with torch.inference_mode(False):
            inv_freq = rope_inv_freq(rope.theta, rope.dim, rope.scaling).to(device)
        self.inv_freqs[number] = inv_freq
        return inv_freq

    def flat(self, tokens: Tensor, documents: Documents | ShardedDocuments) -> Tensor:
        """Returns the hidden states of a flat batch of whole documents, [N, D], ready for the head.
        This is what training calls. tokens: int64 [N]."""
        self.dropout_seeds.seeds = documents.dropout_seeds
        attention_fn: Callable
        if not isinstance(documents, ShardedDocuments):
            attention_fn = partial(self.attention_fn, documents=documents)
        elif self.compiled:
            attention_fn = torch.compiler.disable(documents.attend)
        else:
            attention_fn = documents.attend
        # Selective checkpointing computes the attention probabilities again in the backward.
        keep_probs = self.activation_checkpointing != "selective"
        if self.virtual_tokens:
            assert isinstance(documents, Documents), "flags.py refuses --context-parallel"
            return self.flat_after_prompt(tokens, documents, keep_probs)
        attention_fns = [partial(attention_fn, keep=keep_probs)] * len(self.blocks)
        return self.hidden(tokens, documents.positions, documents.doc_lengths, attention_fns)

    def flat_after_prompt(self, tokens: Tensor, documents: Documents, keep_probs: bool) -> Tensor:
        """Computes `flat` where virtual tokens stand before every document."""
        prompt: Any = self.prompt
        # Where angles depend on the length of a document, those of its virtual tokens do, too.
        shared = prompt.is_prefix or not decoding.has_length_dependent_rope(self.config)
        rows = lead_documents(documents, prompt.count, prompt.is_prefix, shared)
        attend = partial(attend_shared, partial(self.attention_fn, keep=keep_probs))
        if self.compiled:
            attend = torch.compiler.disable(attend)  # as in compile_blocks
        prefixes = prompt.prefixes() or [None] * len(self.blocks)
        attention_fns = [partial(attend, rows=rows, prefix=prefix) for prefix in prefixes]
        leading = prompt.vectors()
        if leading is not None and not shared:
            leading = leading.repeat(len(documents.lengths), 1)
        num_leading = 0 if leading is None else len(leading)
        positions = rows.documents.positions[rows.select]
        lengths = rows.documents.doc_lengths[rows.select]
        hidden = self.hidden(tokens, positions, lengths, attention_fns, leading)
        return hidden[num_leading:]

    def compile_blocks(self) -> None:
        """Compiles the blocks with torch.compile: one graph for all of them, with the number of
        tokens left open.

        Attention stays outside, because its shapes differ in every batch. So do grouped products,
        which are of as many weights as there are experts. Raises UserError for soft-capped
        attention on a GPU.
        """
        if self.device.type == "cuda" and self.config.attention_softcap:
            raise UserError(
                "--compile on is not possible with this model: on a GPU, its soft-capped attention"
                " is compiled by itself; use --compile off"
            )
        self.compiled = True
        # Not as a decorator where it is defined: that would import the compiler in every run.
        self.attention_fn = torch.compiler.disable(document_attention)
        for block in self.blocks:
            experts = block.mlp
            if isinstance(experts, Experts):
                # The instance's own function, over the class's method.
                forward_grouped = torch.compiler.disable(experts.forward_grouped)
                experts.forward_grouped = forward_grouped  # type: ignore[method-assign]
            block.compile(dynamic=True)

    def logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        logits = self.uncapped_logits(hidden)
        cap = self.config.logit_softcap
        if cap is None:
            return logits
        return cap * (logits / cap).tanh()

    def uncapped_logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        weight = self.head_weight().to(hidden.dtype)
        logits = F.linear(hidden, weight)
        trained = self.head_rows()
        if trained is None or not torch.is_grad_enabled():
            return logits
        ids, rows = trained
        # Once more, since the weight has these rows without their gradient.
        return logits.index_copy(-1, ids, F.linear(hidden, rows.to(hidden.dtype)))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Returns logits of a batch of shape [B, T]. Every row is whole sequences from their start.

        tokens: int64 [B, T].
        segments: int64 [B, T], the example that each token belongs to, numbered from 0 within a
        row; the tokens of an example are adjacent. A negative number is padding, which is not
        computed. None: a row is one example.
        positions: int64 [B, T]; None: counted from 0 in each example.
        keep: int64 [K], indices into the B * T positions whose logits are wanted; none may be
        padding.

        Returns [B, T, V], zeros at padding; or [K, V] in the order of `keep`.
        """
        B, T = tokens.shape
        if segments is None:
            segments = torch.zeros_like(tokens)
        is_real = segments >= 0
        # One number for each example of the batch: a row has at most T of them.
        rows = torch.arange(B, device=segments.device)[:, None]
        examples = (segments + T * rows)[is_real]  # [N]
        _, lengths = torch.unique_consecutive(examples, return_counts=True)
        documents = Documents(lengths.tolist(), tokens.device)

        # The flat batch: the tokens that are no padding, row after row.
        real = is_real.flatten().nonzero().flatten()  # [N], indices into the B * T positions
        if positions is not None:
            documents.positions = positions.flatten()[real]
        hidden = self.flat(tokens.flatten()[real], documents)  # [N, D]
        if keep is None:
            logits = self.logits(hidden)  # [N, V]
            V = logits.shape[-1]
            padded = logits.new_zeros(B * T, V).index_copy(0, real, logits)
            return padded.view(B, T, V)

        # The place of each position among the real tokens; -1 at padding.
        place = torch.full((B * T,), -1, device=tokens.device)
        numbers = torch.arange(len(real), device=real.device)
        place = place.index_copy(0, real, numbers)
        wanted = place[keep]  # [K]
        assert bool((wanted >= 0).all()), "keep names a padding position"
        return self.logits(hidden[wanted])

    def generate(
        self, prompts, max_new_tokens: int, mask: Tensor | None = None, **settings
    ) -> list[list[int]]:
        """Returns the new ids of each prompt, with the stop id that ended it.

        prompts: int64 [B, T], or lists of ids of any lengths, none of them empty.
        mask: [B, T], nonzero where a token of the prompt is real. Padding may be on either side.
        settings: the other arguments of `stream`.
        """
        if mask is not None:
            prompts = [row[is_real.bool()] for row, is_real in zip(prompts, mask, strict=True)]
        answers: list[list[int]] = []
        if settings.get("lookup"):
            # Look-up takes one prompt at a time.
            for prompt in prompts:
                answer = []
                for step in self.stream([prompt], max_new_tokens, **settings):
                    _, token = step[0]
                    answer.append(token)
                answers.append(answer)
            return answers
        answers = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **settings):
            for i, token in step:
                answers[i].append(token)
        return answers

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens: int, **settings) -> Iterator[list[tuple[int, int]]]:
        """Yields, for each step, (prompt number, new id) of every prompt that has not ended.

        A prompt ends with an id in `stop`, after max_new_tokens, or at the model's last position.
        No prompt depends on the others, except that what is sampled with one seed depends on the
        whole batch.

        prompts: int64 [B, T], or lists of ids of any lengths, none of them empty.
        repetition_penalty: that of Keskar et al. 2019 (CTRL), on ids that occur in the prompt or
        the answer. It comes first, then the others in the order in which they stand here.
        temperature: divides the logits. 0, the default, takes the likeliest id, and the next five
        have no effect.
        top_k: only the top_k likeliest ids; 0: all.
        top_p: only the smallest set of ids with probability top_p (Holtzman et al. 2020).
        min_p: only ids at least min_p times as likely as the likeliest (Nguyen et al. 2024).
        seed: of the random numbers.
        seeds: one for each prompt, in place of `seed`: what is sampled for a prompt then depends on
        its own seed alone, but for rounding.
        lookup: for one prompt and temperature 0: speculative decoding, which drafts so many tokens
        at a time from the text so far. The answer is the same, but for rounding.
        draws: the random number of each token (decoding.Draws), in place of all of the above.
        """
        with eval_mode(self), decoding.packed_weights(self, steps=max_new_tokens):
            yield from decoding.stream(self, prompts, max_new_tokens, **settings)


def quantized_linears(model: nn.Module) -> dict[str, Linear]:
    """Returns {name: linear} of the linears whose weight is in NF4."""
    quantized = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.nf4 is not None:
            quantized[name] = module
    return quantized


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode (no dropout) until the context ends, and then into the
    mode of before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def eager_mode(model: Transformer) -> contextlib.AbstractContextManager:
    """Returns a context in which blocks are not compiled: for work whose graphs would not pay, or
    whose shapes would each be compiled."""
    if model.compiled:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
