"""Every function in kernels/ against its plain reference in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative
from support.kernel_checks import compare, random

from kernels import cross_entropy
from kernels.attention import (
    KEEP_PROBS_UP_TO,
    Documents,
    QuerySuffix,
    Scores,
    cached_attention,
    decode_mask,
    document_attention,
    suffix_attention,
)
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear import linears, linears_reference
from kernels.lora_linear import LoRAWeights, lora_linears, lora_linears_reference
from kernels.onednn_linear import can_pack, pack_weight, packed_linear
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import rope
from kernels.swiglu import Gated, gated_reference

DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("rows, softcap", [(1, None), (7, None), (100, None), (7, 3.0), (100, 3.0)])
def test_linear_cross_entropy(monkeypatch, dtype, tolerance, rows, softcap):
    monkeypatch.setitem(cross_entropy.LOGITS_BYTES, "cpu", 50 * 16 * 4)  # several chunks, the last one ragged
    hidden, weight = random(rows, 24, dtype=dtype), random(50, 24, dtype=torch.float32, seed=1)
    targets = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(2))
    cap = lambda logits: softcap * torch.tanh(logits / softcap) if softcap else logits
    reference = lambda h, w, t: F.cross_entropy(cap(h @ w.t()), t, reduction="sum")
    compare(lambda h, w, t: linear_cross_entropy(h, w, t, softcap)[0], reference, [hidden, weight, targets], tolerance)
    narrow, narrow_losses = linear_cross_entropy_reference(hidden, weight, targets, softcap)
    loss, losses = linear_cross_entropy(hidden, weight, targets, softcap)
    assert float((loss - narrow).detach().abs()) <= 2e-6 * float(narrow.detach())
    assert not losses.requires_grad and relative(losses, narrow_losses) < 2e-6


def test_linear_cross_entropy_keeps_small_losses_exact():
    """A token that is almost certain has a loss and a gradient of about 1e-6, not 0."""
    hidden = torch.tensor([[14.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    loss.backward()
    assert 0 < float(loss) < 1e-5 and -1e-5 < float(hidden.grad) < 0


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (33, 24), (7, 3, 8)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype, tolerance, shape, offset):
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=torch.float32)]
    reference = lambda x, w: F.rms_norm(x, (x.shape[-1],), w + offset, 1e-5)
    compare(lambda x, w: rms_norm(x, w, 1e-5, offset), reference, inputs, tolerance)
    assert torch.allclose(rms_norm(*inputs, 1e-5, offset), rms_norm_reference(*inputs, 1e-5, offset), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [True, False])
def test_add_rms_norm_is_the_addition_and_the_norm(dtype, adds):
    x, y = (random(33, 24, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(24, dtype=torch.float32)
    total, normal = add_rms_norm(x, y if adds else None, weight, 1e-5, 1.0)
    assert torch.equal(total, x + y if adds else x)
    assert torch.equal(normal, rms_norm(total, weight, 1e-5, 1.0))
    wanted = add_rms_norm_reference(x, y if adds else None, weight, 1e-5, 1.0)
    assert torch.equal(total, wanted[0]) and torch.allclose(normal, wanted[1], atol=2e-2)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("size", [10, 17])  # of a head, of which 10 dimensions are turned
def test_rope_is_a_rotation_of_complex_numbers(dtype, tolerance, size):
    angles = torch.rand(13, 5, dtype=torch.float64) * 100

    def reference(x):
        turned = torch.complex(x[..., :5], x[..., 5:10]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag, x[..., 10:]], -1)

    compare(
        lambda x: rope(x, *(wave[:, None].to(x.dtype) for wave in (angles.cos(), angles.sin()))),
        reference,
        [random(13, 3, size, dtype=dtype)],
        tolerance,
    )


def one(function):
    """A function that returns several tensors, as one: side by side."""
    return lambda *inputs: torch.cat([*function(*inputs)], 1)


INPUTS = ["", "silu", "gelu", "gelu_tanh", "relu"]  # x itself, or act(x) * up


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("outs", [(40,), (40, 8, 24)])
def test_lora_linears(dtype, tolerance, bias, activation, outs):
    x, up = random(19, 24, dtype=dtype), random(19, 24, dtype=dtype, seed=1) if activation else None
    tensors = []
    for rank, out in enumerate(outs, start=3):
        tensors += [random(out, 24, dtype=dtype, grad=False), random(out, dtype=dtype, grad=False) if bias else None]
        tensors += [random(rank, 24, dtype=torch.float32), random(out, rank, dtype=torch.float32)]

    def run(function):
        def call(x, up, *tensors):
            every = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
            each = [LoRAWeights((W,), b, A, B, 0.7 + i) for i, (W, b, A, B) in enumerate(every)]
            return function(x, each, up, activation)

        return one(call)

    compare(run(lora_linears), run(lora_linears_reference), [x, up, *tensors], tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", INPUTS)
@pytest.mark.parametrize("outs", [(40,), (40, 8, 24)])
def test_linears(dtype, tolerance, bias, activation, outs):
    """fp32 weights whatever the input, of which one is frozen; nothing of a weight's size is kept but itself."""
    x, up = random(19, 24, dtype=dtype), random(19, 24, dtype=dtype, seed=1) if activation else None
    weights = [random(out, 24, dtype=torch.float32, grad=out != 8) for out in outs]
    biases = [random(out, dtype=torch.float32) if bias else None for out in outs]
    run = lambda function: one(lambda x, up, *t: function(x, t[: len(outs)], t[len(outs) :], up, activation))
    compare(run(linears), run(linears_reference), [x, up, *weights, *biases], tolerance)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linears(x, weights, biases, up, activation)
    given = {t.data_ptr() for t in (x, up, *weights, *biases) if t is not None}
    assert {t.data_ptr() for t in kept} <= given


@pytest.mark.parametrize("adapted", [True, False])
def test_up_gets_its_gradient_where_gate_wants_none(adapted):
    """As in the first block, where adapters are on up and down alone."""
    gate, up, weight = (random(*shape, dtype=torch.float32) for shape in ((7, 8), (7, 8), (5, 8)))
    gate.requires_grad_(False)
    A, B = random(2, 8, dtype=torch.float32), random(5, 2, dtype=torch.float32)
    if adapted:
        (out,) = lora_linears(gate, [LoRAWeights((weight.detach(),), None, A, B, 0.5)], up, "silu")
        wanted = F.linear(F.silu(gate) * up, weight.detach() + 0.5 * B @ A)
    else:
        (out,) = linears(gate, [weight], [None], up, "silu")
        wanted = F.linear(F.silu(gate) * up, weight)
    (got,) = torch.autograd.grad(out.sum(), up)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.sum(), up)[0])


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("activation", INPUTS[1:])
def test_gated(dtype, tolerance, activation):
    inputs = [random(19, 24, dtype=dtype), random(19, 24, dtype=dtype, seed=1)]
    function = lambda gate, up: Gated.apply(gate, up, activation)
    compare(function, lambda gate, up: gated_reference(gate, up, activation), inputs, tolerance)


def attention_reference(q, k, v, lengths, scale, window=None, softcap=None):
    outs, share = [], q.shape[1] // k.shape[1]
    for document in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q, k, v = document
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        scores = scores.masked_fill((back < 0) | (back >= (window or len(q))), float("-inf"))
        outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v))
    return torch.cat(outs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths", [[6, 6], [1], [5, 7, 7, 8], [3, 40, 41, 2]])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("short", [128, 5, 0])  # rows of a slice; or by scaled_dot_product_attention, or nothing kept
@pytest.mark.parametrize("rules", [(0.3,), (0.3, 6), (0.3, 1), (0.5, None, 0.8), (0.5, 20, 0.8)])
def test_document_attention(monkeypatch, dtype, tolerance, lengths, heads, kv_heads, short, rules, keep):
    monkeypatch.setattr("kernels.attention.KEEP_PROBS_UP_TO", KEEP_PROBS_UP_TO if short else 0)
    monkeypatch.setattr("kernels.attention.SLICE_QUERIES", short)
    monkeypatch.setattr("kernels.attention.MAX_SCORES", 1)  # the fewest queries at a time, the last ones ragged
    qkv = [random(sum(lengths), n, 8, dtype=dtype, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads))]
    documents = Documents(lengths)
    compare(
        lambda q, k, v: document_attention(q, k, v, Scores(*rules), documents, keep),
        lambda q, k, v: attention_reference(q, k, v, lengths, *rules),
        qkv,
        tolerance,
    )


@pytest.mark.parametrize("rules", [(0.3,), (0.3, 6), (0.5, None, 0.8), (0.5, 3, 0.8)])
@pytest.mark.parametrize("n", [1, 3])
def test_cached_attention_is_the_last_rows_of_attention(rules, n):
    """Lines of different lengths, with rubbish in the rows that lie behind the new tokens."""
    lengths, (scale, window, softcap) = [9, 3, 5], (*rules, None, None)[:3]
    keys, values, q = torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8), torch.randn(3, n, 4, 8)
    places = torch.arange(11)
    rows = torch.tensor(lengths)[:, None] - n + torch.arange(n)
    seen = (places <= rows[..., None]) & (places > rows[..., None] - (window or 99))
    mask = decode_mask(seen, 2, 2, torch.float32)
    got = cached_attention(q.flatten(0, 1), keys, values, mask, Scores(*rules)).view(3, n, 4, 8)
    for line, length in enumerate(lengths):
        queries = torch.zeros(length, 4, 8)
        queries[-n:] = q[line]
        k, v = (x[line, :, :length].transpose(0, 1) for x in (keys, values))
        wanted = attention_reference(queries, k, v, [length], scale, window, softcap)[-n:]
        assert torch.allclose(got[line], wanted, atol=1e-6)


def test_documents_of_like_length_share_a_group():
    assert [group.documents for group in Documents([50, 52, 53, 55, 200, 210]).groups] == [4, 2]
    assert Documents([3, 2]).positions.tolist() == [0, 1, 2, 0, 1]


def test_without_gradients_none_are_computed(monkeypatch):
    """In validation the head's weight still requires a gradient; a tensor of its size must not be made for it."""
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4, 5])
    monkeypatch.setattr(torch, "zeros_like", lambda *arguments, **settings: pytest.fail("a gradient was made"))
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    reference, _ = linear_cross_entropy_reference(hidden, weight.detach(), targets)
    assert float(loss) == pytest.approx(float(reference), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_gives_the_same_bits(rows, bias):
    """Packed for 16 rows, used with others as well."""
    weight, b = torch.randn(72, 48).bfloat16(), torch.randn(72).bfloat16() if bias else None
    x = torch.randn(rows, 48).bfloat16()
    if not can_pack(weight, 0):
        assert not torch.backends.mkldnn.is_available()
        return
    got, wanted = packed_linear(x, pack_weight(weight), b), F.linear(x, weight, b)
    assert got.dtype == torch.bfloat16 and float((got.float() - wanted.float()).abs().max()) <= 0.25  # two last bits
    exact = x.double() @ weight.double().t() + (b.double() if bias else 0)
    assert float((got.double() - exact).abs().max()) < 0.2
    assert not can_pack(weight, 3 << 30) and not can_pack(weight.float(), 0)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes, those apart that were there before."""

    def __init__(self, *there):
        super().__init__()
        self.bytes, self.there = 0, {tensor.data_ptr() for tensor in there}

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        out = function(*arguments, **(settings or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in self.there:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_all_logits_are_never_there(trained):
    """Of a step at vocabulary 128,256, 2,048 tokens, hidden 512, in bf16, where they would take 525 MB, or 1 GB in
    fp32: the largest tensor is the head's gradient where it is trained, and else no more than a chunk."""
    hidden = random(2048, 512, dtype=torch.bfloat16)
    weight = random(128256, 512, dtype=torch.float32 if trained else torch.bfloat16, grad=trained)
    targets = torch.arange(2048)
    with Largest(hidden, weight) as seen:
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert hidden.grad is not None and (weight.grad is not None) == trained
    assert seen.bytes == 128256 * 512 * 4 if trained else seen.bytes <= 32 << 20


@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 3.0), (60, 3.0)])
def test_the_last_tokens_of_a_document_attend_as_in_the_whole(window, softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(50, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    scores = Scores(0.3, window, softcap)
    whole = document_attention(q, k, v, scores, Documents([50]))
    weights = torch.randn(50, 4, 8, dtype=torch.float64)
    wanted = torch.autograd.grad((whole * weights).sum(), (q, k, v))
    found, total = [], [torch.zeros_like(x) for x in (q, k, v)]
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        piece = QuerySuffix(stop - start, stop)
        out = suffix_attention(q[start:stop], k[:stop], v[:stop], scores, piece)
        for sum, grad in zip(total, torch.autograd.grad((out * weights[start:stop]).sum(), (q, k, v)), strict=True):
            sum += grad
        found.append(out)
    torch.testing.assert_close(torch.cat(found), whole)
    for a, b in zip(total, wanted, strict=True):
        torch.testing.assert_close(a, b)
