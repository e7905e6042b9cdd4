"""Label smoothing, DFT, each token's loss with gradients, and NEFTune, against torch, transformers and trl.

The losses run on both paths: in plain PyTorch, and through the kernel (on the GPU where there is one, else in triton's
interpreter).
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from scipy import stats
from support.family_cases import CASES, IDS, SIZES
from support.helpers import llama, relative
from support.kernel_checks import compare, random
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.neftune import activate_neftune, neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import selective_log_softmax

import adapters
import lora
import model as model_file
from checkpoint import load_model
from data import collate
from dataset.examples import Example
from kernels import cross_entropy, triton_utils
from kernels.attention import Documents
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, linear_token_losses
from kernels.seeded_random import seeded_uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 5e-6), (torch.bfloat16, 4e-2)]
SIZE = 24  # of a hidden state
SHAPES = [(7, 50), (3, 4100)]  # tokens and vocabulary: several chunks, and several blocks of the kernel, the last short
KINDS = {"smoothing": {"smoothing": 0.2}, "by confidence": {"by_confidence": True}}


@pytest.fixture(params=["pytorch", "kernel"])
def path(request, monkeypatch):
    """The way to compute, in chunks of two tokens."""
    is_kernel = request.param == "kernel"
    if is_kernel and isinstance(triton_utils.triton, triton_utils.TritonStub):
        pytest.skip("needs triton")
    monkeypatch.setattr(cross_entropy, "use_triton", lambda x: is_kernel)
    monkeypatch.setattr(cross_entropy, "PRODUCT_TILE", (2, 4))
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(cross_entropy.LOGITS_BYTES, device, 2 * SHAPES[0][1] * 4)
    return request.param


def made(tokens, vocabulary, dtype=torch.float32, **grads):
    """hidden, the head's weight in fp32, and targets, of which every second one is the likeliest id."""
    hidden = random(tokens, SIZE, dtype=dtype, grad=grads.get("hidden", True))
    weight = random(vocabulary, SIZE, dtype=torch.float32, seed=1, grad=grads.get("weight", True))
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    targets[::2] = (hidden.float() @ weight.t()).argmax(-1)[::2]
    leaves = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in (hidden, weight)]
    return [*leaves, targets.to(DEVICE)]


def capped(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def wanted_losses(logits, targets, smoothing=0.0, by_confidence=False):
    """By the definitions, in logits' dtype: Szegedy et al. 2016, section 7, and Wu et al. 2025."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    if by_confidence:
        return -chosen.exp().detach() * chosen
    return -(1 - smoothing) * chosen - smoothing * logprobs.mean(-1)


# ---- label smoothing and DFT ----


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_reweighted_losses_are_their_definitions(path, dtype, tolerance, shape, softcap, kind):
    """Weighted, beside."""
    inputs = made(*shape, dtype)
    loss_weights = torch.linspace(0.1, 2, shape[0], device=DEVICE)
    each = []

    def ours(hidden, weight, targets):
        loss, losses = linear_cross_entropy(hidden, weight, targets, softcap, loss_weights, **KINDS[kind])
        each.append(losses)
        return loss

    def wide(hidden, weight, targets):
        losses = wanted_losses(capped(hidden @ weight.t(), softcap), targets, **KINDS[kind])
        assert not each[-1].requires_grad and relative(each[-1].double(), losses) < tolerance
        return (losses * loss_weights).sum()

    compare(ours, wide, inputs, tolerance)
    loss, losses = linear_cross_entropy(*inputs, softcap, loss_weights, **KINDS[kind])
    reference, losses_of_reference = linear_cross_entropy_reference(*inputs, softcap, loss_weights, **KINDS[kind])
    assert relative(loss, reference) < tolerance and relative(losses, losses_of_reference) < tolerance


@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
def test_label_smoothing_is_torch_s_and_that_of_transformers(path, smoothing):
    hidden, weight, targets = made(6, 50)
    loss, losses = linear_cross_entropy(hidden, weight, targets, smoothing=smoothing)
    ours = torch.autograd.grad(loss, [hidden, weight])
    logits = hidden @ weight.t()
    theirs = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, theirs.detach(), rtol=2e-6, atol=0)
    # Positions without a label count for nothing there; here they don't reach the head.
    padded = torch.cat([logits, logits.new_ones(3, 50)])[None]
    labels = torch.cat([targets, targets.new_full((3,), -100)])[None]
    mean = LabelSmoother(epsilon=smoothing)({"logits": padded}, labels)
    torch.testing.assert_close(loss.detach() / 6, mean.detach(), rtol=2e-6, atol=0)
    for total in (theirs.sum(), 6 * mean):
        for mine, other in zip(ours, torch.autograd.grad(total, [hidden, weight], retain_graph=True), strict=True):
            assert relative(mine, other) < 2e-6


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dft_is_trl_s(path, softcap):
    hidden, weight, targets = made(6, 50)
    loss, losses = linear_cross_entropy(hidden, weight, targets, softcap, by_confidence=True)
    ours = torch.autograd.grad(loss, [hidden, weight])
    # What SFTTrainer._compute_loss does with loss_type="dft" (trl 1.16, trainer/sft_trainer.py), token by token.
    # In float64: of likely tokens, its difference of logits leaves little of fp32.
    log_probs = selective_log_softmax(capped(hidden.double() @ weight.double().t(), softcap), targets)
    per_token_loss = -log_probs * log_probs.exp().detach()
    torch.testing.assert_close(losses.double(), per_token_loss.detach(), rtol=5e-6, atol=3e-7)
    for mine, other in zip(ours, torch.autograd.grad(per_token_loss.sum(), [hidden, weight]), strict=True):
        assert relative(mine, other) < 2e-6


def test_tokens_that_are_almost_certain_or_all_but_impossible(path):
    """Their losses are about 1e-6 and 14 times 1e-6 by DFT, with gradients that are not 0."""
    hidden = torch.tensor([[14.0], [-14.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], device=DEVICE)
    targets = torch.tensor([0, 0], device=DEVICE)
    loss, losses = linear_cross_entropy(hidden, weight, targets, by_confidence=True)
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    wanted = wanted_losses(wide @ weight.double().t(), targets, by_confidence=True)
    wanted.sum().backward()
    # 1 + 8e-7 is rounded to fp32 on the way, and in the kernel also the difference of logits of 14.
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=0.2, atol=0)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=0.2, atol=0)
    torch.testing.assert_close(losses[1].double(), wanted[1].detach(), rtol=1e-5, atol=0)


def test_smoothing_counts_no_padding_and_no_common_part_of_the_logits(monkeypatch, path):
    """The kernel's rows are padded from 50 to 64 here, with what is no number; all logits lie 1,000 above 0."""
    hidden, weight, targets = made(5, 50)
    hidden = torch.cat([hidden.detach(), hidden.new_ones(5, 1)], 1).requires_grad_()
    weight = torch.cat([weight.detach(), weight.new_full((50, 1), 1000.0)], 1)
    new_empty = torch.Tensor.new_empty

    def filled(self, *shape, **more):
        made = new_empty(self, *shape, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    loss, losses = linear_cross_entropy(hidden, weight, targets, smoothing=0.5)
    loss.backward()
    assert bool(hidden.grad.isfinite().all())
    wanted = wanted_losses(hidden.double() @ weight.double().t(), targets, smoothing=0.5)
    # fp32 holds such logits to 6e-5.
    torch.testing.assert_close(losses.double(), wanted, rtol=0, atol=2e-4)


def test_smoothing_and_confidence_exclude_each_other():
    with pytest.raises(AssertionError, match="exclude each other"):
        linear_cross_entropy(*made(3, 50), smoothing=0.1, by_confidence=True)


def rows_of_a_frozen_head(vocabulary):
    """The ids of two rows that are trained, the rows, and a frozen head in which they stand."""
    ids = torch.tensor([vocabulary - 1, 3], device=DEVICE)
    rows = random(2, SIZE, dtype=torch.float32, seed=7).detach().to(DEVICE).requires_grad_()
    weight = random(vocabulary, SIZE, dtype=torch.float32, seed=1, grad=False).to(DEVICE)
    return ids, rows, weight.index_copy(0, ids, rows.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_trained_rows_get_the_gradient_of_reweighted_losses(path, kind, softcap):
    hidden, _, targets = made(7, 50)
    targets[:4] = torch.tensor([49, 3, 3, 0])
    ids, rows, weight = rows_of_a_frozen_head(50)
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        loss, _ = function(hidden, weight, targets, softcap, None, (ids, rows), **KINDS[kind])
        found.append(torch.autograd.grad(1.7 * loss, [hidden, rows]))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 5e-6


# ---- each token's loss, with gradients ----


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_losses(path, dtype, tolerance, shape, softcap):
    """Against float64, each token's loss with an arriving gradient of its own, some of them negative."""
    ours = lambda hidden, weight, targets: linear_token_losses(hidden, weight, targets, softcap)
    wide = lambda hidden, weight, targets: wanted_losses(capped(hidden @ weight.t(), softcap), targets)
    compare(ours, wide, made(*shape, dtype), tolerance)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_token_losses_where_one_side_is_frozen(path, trained):
    grads = {"hidden": False, "weight": False} | {trained: True}
    inputs = made(7, 50, **grads)
    compare(linear_token_losses, lambda h, w, t: wanted_losses(h @ w.t(), t), inputs, 5e-6)
    losses = linear_token_losses(*inputs)
    losses.sum().backward()
    assert (inputs[0].grad is None) == (trained == "weight") and (inputs[1].grad is None) == (trained == "hidden")


def test_a_loss_that_weighs_tokens_once_all_are_known(path):
    """The log sigmoid of a difference of sums, as a preference is."""
    inputs = made(7, 50)

    def ours(*inputs):
        losses = linear_token_losses(*inputs)
        return F.logsigmoid(0.3 * (losses[:3].sum() - losses[3:].sum()))

    def wide(hidden, weight, targets):
        losses = wanted_losses(hidden @ weight.t(), targets)
        return F.logsigmoid(0.3 * (losses[:3].sum() - losses[3:].sum()))

    compare(ours, wide, inputs, 5e-6)


def test_the_sum_of_token_losses_is_the_cross_entropy_to_the_bit(path):
    inputs = made(7, 50)
    loss, losses = linear_cross_entropy(*inputs)
    wanted = torch.autograd.grad(loss, inputs[:2])
    with_gradients = linear_token_losses(*inputs)
    assert torch.equal(with_gradients, losses)
    # A sum hands one number to all tokens, as a view.
    found = torch.autograd.grad(with_gradients.sum(), inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_losses_give_trained_rows_their_gradient(path, softcap):
    hidden, _, targets = made(7, 50)
    targets[:4] = torch.tensor([49, 3, 3, 0])
    ids, rows, weight = rows_of_a_frozen_head(50)
    arriving = torch.linspace(-1, 2, 7, device=DEVICE)
    losses = linear_token_losses(hidden, weight, targets, softcap, (ids, rows))
    found = torch.autograd.grad(losses, [hidden, rows], arriving)
    reference, _ = linear_cross_entropy_reference(hidden, weight, targets, softcap, arriving, (ids, rows))
    for ours, theirs in zip(found, torch.autograd.grad(reference, [hidden, rows]), strict=True):
        assert relative(ours, theirs) < 5e-6


def test_no_tokens_have_no_loss_and_gradients_of_zeros(path):
    inputs = made(0, 50)
    losses = linear_token_losses(*inputs)
    assert losses.shape == (0,) and losses.dtype == torch.float32
    losses.sum().backward()
    assert inputs[0].grad.shape == (0, SIZE) and torch.equal(inputs[1].grad, torch.zeros_like(inputs[1]))
    ids, rows, weight = rows_of_a_frozen_head(50)
    linear_token_losses(inputs[0], weight, inputs[2], None, (ids, rows)).sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_token_losses_without_gradients(path):
    inputs = made(7, 50)
    with torch.no_grad():
        losses = linear_token_losses(*inputs)
    assert not losses.requires_grad and torch.equal(losses, linear_token_losses(*inputs).detach())


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operator makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_token_losses_keep_their_arguments_alone_and_never_make_all_logits(path):
    hidden, weight, targets = made(40, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), LargestTensor() as seen:
        linear_token_losses(hidden, weight, targets, 3.0).sum().backward()
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (hidden, weight, targets)}
    assert seen.numbers == 50 * SIZE  # the head's gradient; all logits would be 50 * 40


# ---- NEFTune ----

ALPHA = 7.0
LENGTHS = [5, 37, 120]


def examples(lengths=LENGTHS, seeded=True):
    """Of drawn tokens, with seeds of 7 bytes as Loader gives them."""
    generator = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = generator.integers(3, 96, length).tolist()
        seed = int(generator.integers(2**56)) if seeded else None
        made.append(Example(ids, [1.0] * length, dropout_seed=seed))
    return made


def noisy_model(folder, case=None, alpha=ALPHA):
    """A random checkpoint in transformers and here, both in training mode, ours with noise."""
    if case is None:
        theirs = llama(folder, num_hidden_layers=1)
    else:
        family, changes, _ = CASES[case]
        config = transformers.CONFIG_MAPPING[family](**(SIZES | IDS | changes))
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        theirs.save_pretrained(folder)
    model = load_model(folder)
    model.embedding_noise = alpha
    return theirs.train(), model.train()


def input_of_blocks(model, batch):
    """Returns what the first block of a model gets for a batch, [N, D] without gradients."""
    got = []
    handle = model.blocks[0].register_forward_pre_hook(lambda block, inputs: got.append(inputs[0].detach()))
    model.flat(batch.tokens, batch.documents)
    handle.remove()
    return got[0]


def noise_of(model, batch):
    """Returns the noise that a batch's embeddings get, [N, D]."""
    with torch.no_grad():
        return input_of_blocks(model, batch) - model.embed(batch.tokens)


def test_seeded_numbers_are_uniform_and_independent():
    """Over the seeds of a batch's tokens, which are a few numbers that differ and many that follow each other."""
    seeds = collate(examples([2000] * 3)).documents.dropout_seeds
    numbers = seeded_uniform(seeds, 64).double()
    assert -1 < float(numbers.min()) < -0.9999 and 0.9999 < float(numbers.max()) < 1
    N = numbers.numel()
    assert abs(float(numbers.mean())) < 4 * math.sqrt(1 / 3 / N)
    assert abs(float(numbers.square().mean()) - 1 / 3) < 4 * math.sqrt(4 / 45 / N)
    assert stats.kstest(numbers.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    # Each column and token by itself: no one of the smallest p-values is too small for so many tests.
    for lines in (numbers.t(), numbers[::50]):
        smallest = min(stats.kstest(line.numpy(), stats.uniform(-1, 2).cdf).pvalue for line in lines)
        assert smallest > 1e-3 / len(lines)
    # Correlations are what chance makes them, within five standard deviations.
    unit = numbers * math.sqrt(3)
    between_columns = (unit.t() @ unit / len(unit)).fill_diagonal_(0)
    assert float(between_columns.abs().max()) < 5 / math.sqrt(len(unit))
    for distance in (1, 2, 8, 2000):  # tokens that follow each other, and the same places of two examples
        a, b = unit[:-distance], unit[distance:]
        assert abs(float((a * b).mean())) < 4 / math.sqrt(a.numel())
    for distance in (1, 2, 32):
        assert abs(float((unit[:, :-distance] * unit[:, distance:]).mean())) < 4 / math.sqrt(N)
    assert len(numbers.unique(dim=0)) == len(seeds)


@pytest.mark.parametrize("seeds", ["of examples", "small"])
def test_noise_has_nothing_in_common_with_the_adapters_dropout(seeds):
    keys = torch.arange(2000) if seeds == "small" else collate(examples([1000] * 2)).documents.dropout_seeds
    noise = seeded_uniform(keys, 32) * math.sqrt(3)
    for layer in range(12):
        dropped = lora.seeded_dropout(torch.ones(len(keys), 32), 0.5, keys, layer) - 1  # 1 or -1
        for shift in (0, 1, -1):  # the same token's, and its neighbours'
            correlation = (noise * dropped.roll(shift, 0)).mean()
            assert abs(float(correlation)) < 5 / math.sqrt(noise.numel())


def test_all_bits_of_a_seed_count():
    seeds = torch.tensor([12345] + [12345 + 2**bit for bit in range(63)])
    assert len(seeded_uniform(seeds, 8).unique(dim=0)) == 64


@pytest.mark.parametrize("seeded", [True, False])
def test_noise_is_as_large_as_that_of_transformers(tmp_path, seeded):
    """For each length of an example, in one batch here, where transformers takes one length a batch."""
    _, model = noisy_model(tmp_path)
    D = model.config.hidden_size
    rows = examples(LENGTHS * 20, seeded)
    torch.manual_seed(0)
    noise = noise_of(model, collate(rows))
    parts = dict(zip(LENGTHS, ([], [], []), strict=True))
    for example, part in zip(rows, noise.split([len(row.ids) for row in rows]), strict=True):
        parts[len(example.ids)].append(part)
    module = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
    for length in LENGTHS:
        ours = torch.cat(parts[length]).flatten().double()
        theirs = neftune_post_forward_hook(module, None, torch.zeros(20, length, D)).flatten().double()
        size = ALPHA / math.sqrt(length * D)
        assert float(ours.abs().max()) < size * 1.0001 and float(ours.abs().max()) > size * 0.998
        # The standard deviation of a uniform number's variance is sqrt(0.8) of it.
        error = 4 * math.sqrt(0.8 / len(ours))
        for each in (ours, theirs):
            assert abs(float(each.square().mean()) / (size**2 / 3) - 1) < error
        assert stats.ks_2samp(ours.numpy(), theirs.numpy(), method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("case", [None, "gemma", "gemma2", "gemma3", "gpt2"])
def test_noise_is_added_where_transformers_adds_it(monkeypatch, tmp_path, case):
    """The noise that transformers drew, added here: the same logits. Gemma's table is scaled before, not the noise."""
    theirs, model = noisy_model(tmp_path, case)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    table = theirs.get_input_embeddings()
    ids = torch.tensor(examples([40])[0].ids)
    plain = table(ids[None])
    outputs = []
    hook = activate_neftune(theirs, ALPHA)
    table.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
    hook.remove()
    drawn = (outputs[0] - plain)[0].detach() / (ALPHA / math.sqrt(40 * plain.shape[-1]))
    assert 0.99 < float(drawn.abs().max()) < 1.001
    monkeypatch.setattr(model_file, "seeded_uniform", lambda seeds, columns: drawn)
    batch = collate(examples([40]))
    with torch.no_grad():
        found = model.logits(model.flat(batch.tokens, batch.documents))
        assert relative(found, wanted) < 1e-5
        assert relative(model.eval().logits(model.flat(batch.tokens, batch.documents)), wanted) > 1e-4


def test_noise_does_not_depend_on_how_a_step_is_cut(tmp_path):
    _, model = noisy_model(tmp_path)
    rows = examples([4, 9, 9, 30])
    together = input_of_blocks(model, collate(rows)).split([4, 9, 9, 30])
    alone = [input_of_blocks(model, collate([row])) for row in rows]
    halves = [input_of_blocks(model, collate(rows[i : i + 2])) for i in (2, 0)]
    halves = [*halves[1].split([4, 9]), *halves[0].split([9, 30])]
    for a, b, c in zip(together, alone, halves, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    # Another seed is other noise, and it moves what is trained.
    other = Example(rows[3].ids, rows[3].loss_weights, dropout_seed=rows[3].dropout_seed + 1)
    assert not torch.equal(input_of_blocks(model, collate([other])), alone[3])


def test_noise_is_in_training_only(tmp_path):
    _, model = noisy_model(tmp_path)
    batch = collate(examples())
    noise = noise_of(model, batch)
    assert float(noise.abs().max()) > 0
    with torch.no_grad():
        trained = model.flat(batch.tokens, batch.documents)
        evaluated = model.eval().flat(batch.tokens, batch.documents)
    assert relative(trained, evaluated) > 1e-3 and torch.equal(noise_of(model, batch), torch.zeros_like(noise))
    model.embedding_noise = 0.0
    assert torch.equal(noise_of(model.train(), batch), torch.zeros_like(noise))
    with torch.no_grad():
        assert torch.equal(model.flat(batch.tokens, batch.documents), evaluated)


def test_noise_is_drawn_where_there_are_no_seeds(tmp_path):
    _, model = noisy_model(tmp_path)
    tokens, documents = torch.tensor(examples([20])[0].ids), Documents([20])
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(noise_of(model, SimpleNamespace(tokens=tokens, documents=documents)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_noise_in_bf16_is_that_of_float32_rounded(tmp_path):
    _, model = noisy_model(tmp_path)
    batch = collate(examples())
    wide = input_of_blocks(model, batch)
    model.compute_dtype = torch.bfloat16
    narrow = input_of_blocks(model, batch)
    assert narrow.dtype == torch.bfloat16 and relative(narrow.float(), wide) < 5e-3
    # All but rounding is there: 0.01 of the noise.
    noise = wide - model.embed(batch.tokens).detach()
    assert float((narrow.float() - model.embed(batch.tokens).detach() - noise).mean().abs()) < 0.01 * noise.std()


@pytest.mark.parametrize("add", ["prompt", "prefix"])
def test_virtual_tokens_get_no_noise_and_do_not_count(tmp_path, add):
    """As in peft, which embeds the tokens alone, and puts its own vectors before them."""
    _, model = noisy_model(tmp_path)
    batch = collate(examples())
    wanted = input_of_blocks(model, batch)
    if add == "prompt":
        adapters.add_prompt(model, 4, "random")
    else:
        adapters.add_prefix(model, 4, "none")
    model.train()
    found = input_of_blocks(model, batch)
    leading = 4 if add == "prompt" else 0
    assert len(found) == leading + len(batch.tokens) and torch.equal(found[leading:], wanted)
    if add == "prompt":
        assert torch.equal(found[:4], model.prompt.vectors().detach())


@pytest.mark.parametrize("kind", ["none", "full"])
def test_the_table_s_gradient_passes_through_noise(tmp_path, kind):
    """Noise is a constant: of two passes, the gradients are the same where blocks are computed again."""
    _, model = noisy_model(tmp_path)
    batch = collate(examples([6, 9]))
    found = []
    for checkpointing in ("none", kind):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        hidden = model.flat(batch.tokens, batch.documents)
        linear_cross_entropy(hidden[:-1], model.head_weight(), batch.tokens[1:])[0].backward()
        found.append(model.embed.weight.grad.clone())
    assert float(found[0].abs().max()) > 0 and relative(found[1], found[0]) < 1e-6
