"""The kernels in Triton, forward and backward, against float64: on the GPU where there is one, else in the interpreter.

Each is called through its function, which is told that it is on a GPU, on ragged shapes. So is what goes another way on
GPUs without a kernel of its own: linears with adapters.
"""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import transformers
from support.helpers import llama, relative
from support.kernel_checks import compare, give_gradients, random

import decoding
import lora
import optimizers
import quant
from checkpoint import load_model
from common.choices import CHECKPOINTING_KINDS
from kernels import cross_entropy, lora_linear, nf4, rms_norm, rope, swiglu, triton_utils
from kernels.attention import Documents, Scores, decode_mask
from kernels.decode_attention import decode_attention
from kernels.linear import linears, linears_reference
from kernels.lora_linear import Casts, LoRAWeights, lora_linears, lora_linears_reference
from optimizers import AdamW
from quant import quantize

pytestmark = pytest.mark.skipif(isinstance(triton_utils.triton, triton_utils.TritonStub), reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# triton's interpreter cuts bf16 off instead of rounding it, and takes its bits for numbers in products
DTYPES = [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)]
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SWITCHED = (rms_norm, rope, swiglu, cross_entropy, nf4, lora_linear, lora, optimizers)  # modules that ask on_gpu
calls = []


@pytest.fixture(autouse=True)
def triton_only(monkeypatch):
    """Every function thinks that it is on a GPU; at least one kernel must have run by the end."""
    calls.clear()
    switch(monkeypatch, True)
    yield
    assert calls


def switch(monkeypatch, gpu: bool) -> None:
    """Tells every function that it is on a GPU, or that it is not."""
    for module in SWITCHED:
        monkeypatch.setattr(module, "use_triton", (lambda x: calls.append(x) or True) if gpu else (lambda x: False))


def there(*tensors):
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


ROWS = [(1, 8), (33, 24), (7, 3, 100), (5, 576), (21, 3, 64)]  # the last ones of heads


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs share the rows of a backward that trains the weight, so that each takes several."""
    monkeypatch.setattr(rms_norm, "programs_at_once", lambda device, warps: 2)


def wide_norm(x, weight, offset):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (weight + offset)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("trained", [True, False])
def test_rms_norm(few_programs, dtype, tolerance, shape, offset, trained):
    inputs = there(random(*shape, dtype=dtype), random(shape[-1], dtype=torch.float32, grad=trained))
    reference = lambda x, w: rms_norm.rms_norm_reference(x.float(), w, 1e-5, offset).double()
    wide = lambda x, w: wide_norm(x, w, offset)
    compare(lambda x, w: rms_norm.rms_norm(x, w, 1e-5, offset), wide, inputs, tolerance)
    with torch.no_grad():
        assert relative(rms_norm.rms_norm(*inputs, 1e-5, offset).float(), reference(*inputs).float()) < tolerance


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", ROWS[:-1])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_add_rms_norm(few_programs, dtype, tolerance, shape, offset, trained, adds):
    """The sum and its norm, and gradients of both, where both are read or one of them."""
    x, y = (random(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    inputs = there(x, *([y] if adds else []), random(shape[-1], dtype=torch.float32, grad=trained))

    def ours(*inputs):
        return rms_norm.add_rms_norm(inputs[0], inputs[1] if adds else None, inputs[-1], 1e-5, offset)

    def wide(*inputs):
        total = inputs[0] + inputs[1] if adds else inputs[0]
        return total, wide_norm(total, inputs[-1], offset)

    both = lambda pair: torch.cat(pair, -1)
    compare(lambda *x: both(ours(*x)), lambda *x: both(wide(*x)), inputs, tolerance)
    compare(lambda *x: ours(*x)[1], lambda *x: wide(*x)[1], inputs, tolerance)
    total, normal = ours(*inputs)
    if DEVICE == "cuda" or dtype == torch.float32:  # the interpreter does not round to bf16
        assert torch.equal(total, inputs[0] + inputs[1] if adds else inputs[0])
    assert torch.equal(normal, rms_norm.rms_norm(total, inputs[-1], 1e-5, offset))  # the sum is rounded first
    grads = torch.autograd.grad(total.sum(), inputs[: 1 + adds])
    assert all(bool((grad == 1).all()) for grad in grads)


def test_a_long_rows_weight_is_trained_by_columns(few_programs, monkeypatch):
    monkeypatch.setattr(rms_norm, "LONG", 100)
    monkeypatch.setattr(rms_norm, "NORM_COLUMNS", 64)
    inputs = there(random(7, 150, dtype=torch.float32), random(150, dtype=torch.float32))
    compare(lambda x, w: rms_norm.rms_norm(x, w, 1e-5), lambda x, w: wide_norm(x, w, 0.0), inputs, 5e-6)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("size", [10, 17])
@pytest.mark.parametrize("tokens, heads, kv_heads", [(1, 1, 1), (13, 6, 2), (5, 9, 3)])
def test_rope_of_q_and_k(dtype, tolerance, size, tokens, heads, kv_heads):
    angles = torch.rand(tokens, 5, dtype=torch.float64) * 100
    q, k = there(random(tokens, heads, size, dtype=dtype), random(tokens, kv_heads, size, dtype=dtype, seed=1))

    def ours(q, k):
        waves = (wave[:, None].to(q.device, q.dtype) for wave in (angles.cos(), angles.sin()))
        return torch.cat(rope.rope_qk(q, k, *waves), 1)

    def reference(q, k):
        cos, sin = (wave[:, None].to(q.device) for wave in (angles.cos(), angles.sin()))
        return rope.rope_reference(torch.cat([q, k], 1), cos, sin)

    compare(ours, reference, [q, k], tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (7, 1025), (3, 2048)])
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize("stacked", [True, False])  # gate and up as halves of one matrix, rows of which are far apart
def test_gate(dtype, tolerance, shape, activation, stacked):
    rows, width = shape
    inputs = (
        there(random(rows, 2 * width, dtype=dtype))
        if stacked
        else [random(*shape, dtype=dtype, seed=i) for i in (0, 1)]
    )
    inputs = there(*inputs)
    halves = lambda x: x[0].chunk(2, -1) if stacked else x
    ours = lambda *x: swiglu.Gated.apply(*halves(x), activation)
    compare(ours, lambda *x: swiglu.gated_reference(*halves(x), activation), inputs, tolerance)
    with torch.no_grad():
        gate, up = halves(inputs)
        *_, product = swiglu.gated_backward(torch.ones_like(gate), gate, up, activation, product=True)
        wanted = swiglu.gated_reference(gate.double(), up.double(), activation)
        assert product.dtype == dtype and float((product - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_gates_far_from_zero():
    """Where exponentials overflow or vanish, the activations are 0 or the identity, and their slopes 0 or 1."""
    for activation in swiglu.ACTIVATIONS:
        gate, up = there(torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]]), torch.ones(1, 5))
        dgate, _, product = swiglu.gated_backward(torch.ones_like(gate), gate, up, activation, product=True)
        assert product.tolist() == [[0.0, 0.0, 0.0, 200.0, 1e4]]
        assert dgate.tolist() == [[0.0, 0.0, 0.0 if activation == "relu" else 0.5, 1.0, 1.0]]


def test_no_number_stays_none():
    for activation in swiglu.ACTIVATIONS:
        assert swiglu.gated(*there(torch.tensor([[torch.nan]]), torch.ones(1, 1)), activation).isnan().all()


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("ranks, scales", [([3], [0.7]), ([3, 4, 8], [2.5] * 3), ([4, 4, 5], [0.7, 1.7, 0.7])])
@pytest.mark.parametrize("given, frozen_input", [(False, False), (True, False), (True, True)])
def test_lora_linears(dtype, tolerance, bias, activation, ranks, scales, given, frozen_input):
    """A and B cast by the function itself, or given cast: gradients reach the masters either way."""
    calls.append("has no kernel where there is no gate")
    x = random(19, 24, dtype=dtype, grad=not frozen_input)
    up = random(19, 24, dtype=dtype, seed=1) if activation else None
    tensors = []
    for number, rank in enumerate(ranks):
        out = (40, 8, 24)[number]
        tensors += [random(out, 24, dtype=dtype, grad=False), random(out, dtype=dtype, grad=False) if bias else None]
        tensors += [random(rank, 24, dtype=torch.float32), random(out, rank, dtype=torch.float32)]

    def run(function, cast=False):
        def call(x, up, *tensors):
            every = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
            each = [LoRAWeights((W,), b, A, B, scale) for (W, b, A, B), scale in zip(every, scales, strict=True)]
            if not cast:
                return torch.cat(list(function(x, each, up, activation)), 1)
            A = torch.cat([linear.A.detach() for linear in each]).to(x.dtype)
            casts = Casts(A, [linear.B.detach().to(x.dtype) for linear in each])
            return torch.cat(list(function(x, each, up, activation, casts)), 1)

        return call

    inputs = [t if t is None else there(t)[0] for t in (x, up, *tensors)]
    compare(run(lora_linears, given), run(lora_linears_reference), inputs, tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("trained", [True, False])
def test_linears_behind_a_gate(dtype, tolerance, activation, trained):
    x, up = there(random(19, 24, dtype=dtype), random(19, 24, dtype=dtype, seed=1))
    parameters = there(random(40, 24, dtype=torch.float32, grad=trained), random(40, dtype=torch.float32))
    run = lambda function: lambda x, up, w, b: function(x, [w], [b], up, activation)[0]
    compare(run(linears), run(linears_reference), [x, up, *parameters], tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("rows, vocabulary", [(1, 50), (7, 50), (3, 4096), (5, 9001)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy(monkeypatch, dtype, tolerance, rows, vocabulary, softcap, weighted):
    monkeypatch.setitem(cross_entropy.LOGITS_BYTES, "cuda", 2 * vocabulary * 4)  # several chunks, one ragged
    monkeypatch.setattr(cross_entropy, "PRODUCT_TILE", (2, 4))
    hidden, weight = there(random(rows, 24, dtype=dtype), random(vocabulary, 24, dtype=torch.float32, seed=1))
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    loss_weights = torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(DEVICE) if weighted else None
    each = []

    def ours(h, w, t):
        loss, losses = cross_entropy.linear_cross_entropy(h, w, t, softcap, loss_weights)
        each.append(losses)
        return loss

    def wide(h, w, t):
        logits = softcap * torch.tanh(h @ w.t() / softcap) if softcap else h @ w.t()
        losses = torch.nn.functional.cross_entropy(logits, t, reduction="none")
        assert relative(each[-1].double(), losses) < tolerance
        return (losses * loss_weights if weighted else losses).sum()

    compare(ours, wide, [hidden, weight, targets], tolerance)


def test_rows_of_the_kernel_are_padded(monkeypatch):
    """To 32 bytes in bf16; and what a chunk leaves in the padding is read by nobody."""
    shapes = []
    launch = cross_entropy.softmax_on_gpu
    spy = lambda logits, *more: shapes.append((logits.shape, logits.stride())) or launch(logits, *more)
    monkeypatch.setattr(cross_entropy, "softmax_on_gpu", spy)
    monkeypatch.setattr(cross_entropy, "rows_of_chunks", lambda *_: 4)
    hidden, weight = there(random(6, 24, dtype=torch.float32), random(37, 24, dtype=torch.float32, seed=1))
    new_empty = torch.Tensor.new_empty

    def filled(self, *shape, **more):
        made = new_empty(self, *shape, **more)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    loss, _ = cross_entropy.linear_cross_entropy(hidden, weight, torch.arange(6, device=DEVICE))
    loss.backward()
    assert shapes == [((4, 37), (48, 1)), ((2, 37), (48, 1))]
    reference, _ = cross_entropy.linear_cross_entropy_reference(hidden, weight, torch.arange(6, device=DEVICE))
    assert relative(loss, reference) < 1e-6 and bool(hidden.grad.isfinite().all() and weight.grad.isfinite().all())


def test_chunks_fill_the_multiprocessors():
    calls.append("no kernel is to run here")
    rows = cross_entropy.rows_of_chunks
    llama, processors = (128256, 4096, 2), 132  # of a product with d logits, 128 rows are 16 tiles
    assert rows(8192, *llama, processors) == 2048  # 256 tiles: two waves, all but full
    assert rows(100, *llama, processors) == 128 and rows(0, *llama, processors) == 128
    assert rows(8064, *llama, 148) == 1152  # 7 chunks of 144 tiles, a wave each; of 2,048 rows 4, and 8 waves
    for tokens in (1, 129, 5000, 20_000):
        for vocabulary in (50, 32003, 151669, 5_000_000):
            chosen = rows(tokens, vocabulary, 2048, 2, processors)
            most = max(128, cross_entropy.LOGITS_BYTES["cuda"] // (2 * vocabulary))
            assert chosen % 128 == 0 and 0 < chosen <= most


def test_a_token_that_is_almost_certain():
    hidden, weight = there(torch.tensor([[14.0]]), torch.tensor([[1.0], [0.0]]))
    hidden.requires_grad_()
    loss, _ = cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([0], device=DEVICE))
    loss.backward()
    assert 0 < loss.item() < 1e-5 and -1e-5 < hidden.grad.item() < 0


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(1, 64), (33, 192), (70, 640)])
def test_nf4_bit_for_bit(double, dtype, shape):
    frozen = quantize(random(*shape, dtype=torch.float32, grad=False).to(DEVICE), double)
    wanted = nf4.nf4_dequantize_reference(frozen, dtype)
    assert torch.equal(nf4.nf4_dequantize(frozen, dtype), wanted)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (HALF, 1e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out, size", [(70, 192), (5, 4224)])  # rows of W of several steps, the last one short
def test_nf4_multiplies_while_it_dequantises(monkeypatch, double, dtype, tolerance, rows, bias, out, size):
    made = []
    monkeypatch.setattr(nf4, "nf4_dequantize", lambda *x: made.append(x) or nf4.dequantize_nf4_on_gpu(*x))
    frozen = quantize(random(out, size, dtype=torch.float32, grad=False).to(DEVICE), double)
    x, b = there(random(rows, size, dtype=dtype, grad=False), random(out, dtype=dtype, grad=False))
    with torch.no_grad():
        got = nf4.nf4_linear(x, frozen, b if bias else None)
        same = nf4.frozen_product(x, tuple(frozen), b if bias else None)
    matrix = nf4.nf4_dequantize_reference(frozen, dtype if rows == 17 else torch.float32).double()
    wanted = x.double() @ matrix.t() + (b.double() if bias else 0)
    assert got.dtype == dtype and relative(got.double(), wanted) < tolerance and torch.equal(got, same)
    assert len(made) == (2 if rows == 17 else 0)


def test_a_frozen_product_with_a_plain_matrix():
    calls.append("no kernel is to run here")
    x, weight, bias = there(*(random(*shape, dtype=torch.float32, grad=False) for shape in ((3, 24), (40, 24), (40,))))
    assert torch.equal(nf4.frozen_product(x, (weight,), bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_adapters_of_few_rows_without_gradients(monkeypatch, rows, kind):
    """As a text is written: a matrix in NF4 is made whole for many rows alone."""
    calls.append("a plain matrix has no kernel")
    made = []
    monkeypatch.setattr(nf4, "nf4_dequantize", lambda *x: made.append(x) or nf4.dequantize_nf4_on_gpu(*x))
    x, *rest = there(*(random(*size, dtype=torch.float32) for size in ((rows, 128), (4, 128), (72, 4), (4, 128))))
    W, bias, B = there(*(random(*size, dtype=torch.float32, grad=False) for size in ((72, 128), (72,), (64, 4))))
    V = random(64, 128, dtype=torch.float32, grad=False, seed=5).to(DEVICE)
    frozen = [(each,) if kind == "plain" else tuple(quantize(each, True)) for each in (W, V)]
    each = [LoRAWeights(frozen[0], bias, rest[0], rest[1], 1.7), LoRAWeights(frozen[1], None, rest[2], B, 0.3)]
    with torch.no_grad():
        got = lora_linears(x, each)
    assert bool(made) == (kind == "nf4" and rows == 30)
    for a, b in zip(got, lora_linears_reference(x.detach(), each), strict=True):
        assert relative(a, b.detach()) < 1e-5


# ---- AdamW ----


def trained(*shapes, dtype) -> list[torch.nn.Parameter]:
    tensors = [random(*shape, dtype=dtype, seed=i).to(DEVICE) for i, shape in enumerate(shapes)]
    return [torch.nn.Parameter(tensor.detach()) for tensor in tensors]


def give_mild_gradients(step: int, parameters: list) -> None:
    """Of sizes that differ by row, a tenth of them 0."""
    for p in parameters:
        grad = random(*p.shape, dtype=torch.float32, grad=False, seed=100 * step)
        grad *= 10 ** random(len(p), 1, dtype=torch.float32, grad=False, seed=step).view(-1, *[1] * (p.dim() - 1))
        dropped = torch.rand(p.shape, generator=torch.Generator().manual_seed(step)) < 0.1
        p.grad = grad.masked_fill(dropped, 0).to(p)


def plain_step(optimizer: AdamW, monkeypatch) -> None:
    """By PyTorch, with the quantiser of GPUs on CPUs too."""
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "use_triton", lambda x: False)
        patch.setattr(quant, "cpu_lookup", lambda signed: None)
        optimizer.step()


def equal_codes(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for one in a thousand, that lie between two numbers to rounding and got the other."""
    apart = (ours.int() - wanted.int()).abs()
    return bool(apart.max() <= 1) and float((apart > 0).float().mean()) < 1e-3


@pytest.mark.parametrize("bits, dtype", [(8, torch.float32), (8, torch.bfloat16), (32, torch.bfloat16)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_plain_step(monkeypatch, bits, dtype, decay):
    """Ten steps, each from the state of the kernel; last blocks shorter than 256, and a tensor that is too small for 8
    bits. A weight in bf16 is one of the two next to the plain step's in fp32."""
    shapes = (70, 65), (64, 128), (4096,), (63, 65)
    ours, theirs = trained(*shapes, dtype=dtype), trained(*shapes, dtype=torch.float32)
    mine, plain = (AdamW([{"params": p}], lr=1e-2, bits=bits, weight_decay=decay) for p in (ours, theirs))
    monkeypatch.setattr(AdamW, "fused", lambda self, p, *_: [self.update(each, self.param_groups[0]) for each in p])
    for step in range(10):
        give_mild_gradients(step, ours)
        before = [p.detach().float().clone() for p in ours]
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a)
            b.grad = a.grad.float()
            for name, value in mine.state_of(a, mine.param_groups[0]).items():
                target = plain.state_of(b, plain.param_groups[0])[name]
                target.copy_(value.view(target.shape))
        mine.step()
        plain_step(plain, monkeypatch)
        for a, b, old in zip(ours, theirs, before, strict=True):
            rounding = 1e-6 * old.abs() + 1e-4 * (b - old).abs()  # of fp32, where a sum is smaller than its terms
            assert ((a - b).abs() <= rounding + (b.abs() / 128 if dtype == torch.bfloat16 else 0)).all()
            for name, value in mine.state[a].items():
                wanted = plain.state[b][name].view(value.shape)
                if value.dtype == torch.uint8:
                    assert equal_codes(value, wanted)
                else:
                    terms = wanted.abs() + (b.grad.abs().view(value.shape) if name == "m" else 0)
                    assert ((value - wanted).abs() <= 5e-6 * terms).all()
    narrow = [mine.state[p]["m"].dtype == torch.uint8 for p in ours]
    assert narrow == [bits == 8] * 3 + [False]


def test_adamw_quantises_to_the_nearest_number():
    """Bit for bit as `quantize_8bit` on GPUs, values in the middle of two numbers included, and blocks of zeros. With
    such betas the moments are the gradient and its square."""
    numbers = torch.tensor(nf4.dynamic_numbers(True))
    middles = (numbers[:-1] + numbers[1:]) / 2
    near = torch.cat([middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))])
    values = torch.cat([numbers, near, torch.zeros(300), torch.randn(5000) * 10 ** torch.randn(5000)])
    values = torch.cat([values, torch.full((256,), 1e-39), 10.0 ** torch.linspace(-9, 0, 1000)])
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    grad = torch.nn.functional.pad(blocks, (0, 1), value=1.0).flatten()[:-3].to(DEVICE)  # of each the largest is 1
    for scale in (1.0, 3.7):
        p = torch.nn.Parameter(torch.zeros_like(grad))
        p.grad = grad * scale
        optimizer = AdamW([{"params": [p], "betas": (1e-30, 1e-30)}], lr=1e-3, bits=8)
        optimizer.step()
        state = optimizer.state[p]
        for name, moment in (("m", p.grad), ("v", p.grad.square())):
            signed = name == "m"
            numbers = nf4.dynamic_codebook(moment.device, signed)
            padded = torch.nn.functional.pad(moment, (0, 3)).view(-1, 256)
            codes, absmax = quant.nearest(padded, numbers)
            assert torch.equal(state[name], codes.flatten()[:-3]) and torch.equal(state[f"{name}_scale"], absmax)


def test_adamw_follows_bitsandbytes():
    """Whose quantiser on CPUs takes the neighbour of one number in a thousand, and never a second moment of 0."""
    ours, theirs = (trained((70, 65), (64, 128), dtype=torch.float32) for _ in range(2))
    mine = AdamW([{"params": ours}], lr=1e-2, bits=8, weight_decay=0.1)
    peer = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)

    def apart(name: str, other: str) -> float:
        """The share of other codes; of each pair of scales the largest difference."""
        pairs = [(mine.state[a], peer.state[b]) for a, b in zip(ours, theirs, strict=True)]
        codes = torch.cat([(a[name] != b[other].flatten()).float() for a, b in pairs])
        scales = torch.cat([a[f"{name}_scale"] / b[f"absmax{other[-1]}"] - 1 for a, b in pairs])
        return float(codes.mean()), float(scales.abs().max())

    for step in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = random(*a.shape, dtype=torch.float32, grad=False, seed=100 + step).to(DEVICE) * 0.01
            b.grad = a.grad.clone()
        mine.step(), peer.step()
        if step == 0:
            assert apart("m", "state1") < (0.003, 0) and apart("v", "state2")[0] < 0.04
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert apart("m", "state1")[0] < 0.05 and apart("v", "state2")[0] < 0.05
    assert all(relative(a.detach(), b.detach()) < 3e-3 for a, b in zip(ours, theirs, strict=True))


def test_adamw_rounds_bf16_to_be_right_on_average():
    """A first step is as long as lr: from 1 to one of the neighbours of 1 - lr, each draw of its own, and the same
    again from the same random state."""
    results, size, lr = [], 100_000, 1e-3
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        p = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=DEVICE))
        p.grad = torch.ones_like(p)
        AdamW([{"params": [p]}], lr=lr, bits=8).step()
        results.append(p.detach().double())
    first, again, other = results
    assert torch.equal(first, again) and not torch.equal(first, other)
    below = 1 - 2**-8  # the number before 1
    assert set(first.unique().tolist()) == {below, 1.0}
    assert first.mean().item() == pytest.approx(1 - lr, abs=2e-5)
    down = (first == below).double() - lr * 256
    spread = down.var().item()
    for apart in (1, 2, 4, 8, 256, 2048):  # draws of a call, of a thread, a block, a program
        assert abs((down[apart:] * down[:-apart]).mean().item()) < 0.02 * spread
    assert abs((down * ((other == below).double() - lr * 256)).mean().item()) < 0.02 * spread


class NoNumbers(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor becomes a number of Python's, for which the host would wait."""

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        assert "_local_scalar_dense" not in str(function)
        return function(*arguments, **(settings or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_step_of_adamw_changes_nothing_and_is_not_waited_for(dtype):
    ours = trained((64, 128), (30,), dtype=dtype)
    optimizer = AdamW([{"params": ours}], lr=1e-2, bits=8)
    good, bad = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    give_gradients(0, ours)
    optimizer.step(good)
    tensors = lambda: [*ours, *(value for p in ours for value in optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in tensors()]
    assert all(optimizer.state[p]["step"] == 1 for p in ours)
    for p in ours:
        p.grad.fill_(float("nan"))
    with NoNumbers():
        optimizer.step(bad)
    assert all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))
    give_gradients(1, ours)
    optimizer.step(good)
    assert all(optimizer.state[p]["step"] == 2 for p in ours)
    assert not any(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))


# ---- whole models ----


@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2, "attention_bias": True},
        {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": True},
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ({}, {"head_dim": 22}, {"hidden_act": "gelu"})),
    ],
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_model_with_every_kernel_is_the_model(tmp_path, monkeypatch, shape, method):
    """Loss and every gradient against the plain forms."""
    llama(tmp_path, std=0.1, **{"intermediate_size": 128} | shape)

    def run(on_gpu):
        switch(monkeypatch, on_gpu)
        model = load_model(tmp_path, torch.float32, DEVICE, "nf4" if method == "qlora" else None)
        if method != "full":
            torch.manual_seed(0)
            lora.add_lora(model, 4, 10.0)
            for layer in lora.lora_layers(model).values():
                torch.nn.init.normal_(layer.lora_B, std=0.1)
        model.train()
        tokens = torch.arange(90, device=DEVICE) % 96
        hidden = model.flat(tokens, Documents([30, 30, 30], DEVICE))
        loss, _ = cross_entropy.linear_cross_entropy(hidden, model.head_weight(), tokens.roll(-1))
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    loss, grads = run(True)
    plain, wanted = run(False)
    assert relative(loss, plain) < 1e-5 and grads.keys() == wanted.keys()
    assert all(relative(grads[name], wanted[name]) < 2e-5 for name in grads)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "offload")) for kind in CHECKPOINTING_KINDS[1:]]
)
def test_blocks_that_hand_sums_over_are_computed_again(tmp_path, kind):
    """With the kernels: a sum that is left to the next block is made before that is computed again."""
    llama(tmp_path, std=0.1, intermediate_size=128, num_key_value_heads=2)

    def run(kind):
        model = load_model(tmp_path, torch.float32, DEVICE).train()
        model.activation_checkpointing = kind
        hidden = model.flat(torch.arange(90, device=DEVICE) % 96, Documents([30, 30, 30], DEVICE))
        (hidden * torch.linspace(-1, 1, 64, device=DEVICE)).sum().backward()
        return hidden, {name: p.grad for name, p in model.named_parameters() if name != "head.weight"}

    (hidden, grads), (wanted_hidden, wanted) = run(kind), run("none")
    assert torch.equal(hidden, wanted_hidden)
    assert all(relative(grads[name], wanted[name]) < 1e-5 for name in grads)


@pytest.fixture
def first_launch(monkeypatch):
    """Forgets whether Triton launches, before and after: what a test has found is of that test alone."""
    triton_utils.triton_launches.cache_clear()
    yield
    triton_utils.triton_launches.cache_clear()
    calls.append("no kernel is to run here")


def build_module(folder) -> None:
    """What Triton's driver does at the first launch: compiles a C module that includes Python.h."""
    from triton.runtime.build import _build

    source = folder / "nothing.c"
    source.write_text("#include <Python.h>\n")
    _build("nothing", str(source), str(folder), [], [], [], [])


def test_without_a_c_compiler_the_plain_forms_compute(first_launch, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(triton_utils, "launch_nothing", lambda: build_module(tmp_path))
    assert not triton_utils.triton_launches() and not triton_utils.triton_launches()
    said = capfd.readouterr().err
    assert said.count("NOTE: Triton cannot launch its kernels (there is no C compiler") == 1


def test_without_pythons_headers_the_plain_forms_compute(first_launch, monkeypatch, tmp_path, capfd):
    import sysconfig

    paths = sysconfig.get_paths
    monkeypatch.setattr(sysconfig, "get_paths", lambda **more: paths(**more) | {"include": str(tmp_path)})
    monkeypatch.setattr(triton_utils, "launch_nothing", lambda: build_module(tmp_path))
    assert not triton_utils.triton_launches()
    assert "Python's headers" in capfd.readouterr().err


def test_an_error_of_a_kernel_of_ours_is_not_taken_for_a_missing_compiler(first_launch, monkeypatch):
    """What cannot come from the machine is a fault, and is shown."""
    monkeypatch.setattr(triton_utils, "launch_nothing", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        triton_utils.triton_launches()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (HALF, 2e-3)])
@pytest.mark.parametrize(
    "filled, rules",
    [(5, (0.3,)), (63, (0.5, None, 0.8)), (150, (0.3,)), (64, (0.5, 20, 0.8)), (150, (0.3, 9)), (165, (0.5, 70, 0.8))],
)
@pytest.mark.parametrize("heads, kv_heads, size, programs", [(4, 2, 20, 256), (34, 2, 16, 20), (3, 3, 16, 1)])
def test_decoding_attends_to_what_the_cache_holds(
    monkeypatch, dtype, tolerance, rules, filled, heads, kv_heads, size, programs
):
    """Of lines that begin at different slots; in rings that have gone round, and in caches of which a part is filled;
    what is not seen is no number."""
    calls.append(filled)
    lines, slots, (scale, window, softcap) = 3, 100, (*rules, None, None)[:3]
    starts = torch.tensor([0, 3, max(0, filled - 70)])
    if filled >= slots and window is None:
        slots = 200
    monkeypatch.setattr("kernels.decode_attention.SLOTS_PER_TILE", 1)
    monkeypatch.setattr("kernels.decode_attention.PROGRAMS", programs)
    q, k, v = (
        random(lines, n, size, dtype=dtype, seed=i, grad=False) for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    keys, values = (random(lines, kv_heads, slots, size, dtype=dtype, seed=i, grad=False) for i in (3, 4))
    holds = filled - (filled - torch.arange(slots)) % slots
    seen = (holds >= starts[:, None]) & (holds > filled - (window or 999))
    unseen = (~seen | (holds == filled))[:, None, :, None]
    keys, values = (x.masked_fill(unseen, float("nan")) for x in (keys, values))
    there = [x.to(DEVICE) for x in (q, k, v, keys, values, torch.tensor([filled]), starts)]
    got = decode_attention(*there, Scores(*rules)).cpu()
    for cache, new, after in ((keys, k, there[3]), (values, v, there[4])):
        cache[:, :, filled % slots] = new
        assert torch.equal(after.cpu().nan_to_num(), cache.nan_to_num()), "only the new token's slot is written"
    keys, values = (x.nan_to_num().double() for x in (keys, values))
    mask = decode_mask(seen[:, None], kv_heads, heads // kv_heads, torch.float64)
    weights = scale * q.double().view(lines * kv_heads, -1, size) @ keys.flatten(0, 1).transpose(1, 2)
    weights = weights if softcap is None else softcap * (weights / softcap).tanh()
    wanted = ((weights + mask).softmax(-1) @ values.flatten(0, 1)).view(lines, heads, size)
    assert relative(got.double(), wanted) < tolerance


@pytest.mark.parametrize("windowed", [False, True])
def test_a_text_is_written_by_kernels_as_by_plain_steps(tmp_path, monkeypatch, windowed):
    """All of a step's kernels, with launches that do not depend on the step, against the plain path."""
    if windowed:
        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "initializer_range": 0.3}
        torch.manual_seed(0)
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).save_pretrained(tmp_path)
    else:
        llama(tmp_path, num_key_value_heads=2, num_hidden_layers=2)
    model, prompts = load_model(tmp_path, torch.float32, torch.device(DEVICE)), [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13]]
    monkeypatch.setattr(decoding, "can_run_ahead", lambda model: False)
    wanted = [*model.stream(prompts, 14)]
    monkeypatch.setattr(decoding, "can_run_ahead", lambda model: True)
    monkeypatch.setattr(decoding, "use_triton", lambda x: calls.append(x) or True)
    monkeypatch.setattr(decoding, "GRAPH_ROUND", 16)
    if DEVICE == "cpu":  # what the interpreter runs can't be captured
        repeat = lambda launch, device: launch() or SimpleNamespace(replay=launch)
        monkeypatch.setattr(decoding, "run_and_capture", repeat)
    assert [*model.stream(prompts, 14)] == wanted
