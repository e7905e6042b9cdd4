"""Routed experts as grouped products (kernels/experts.py and grouped.py) against the plain loop over the experts.

torch's grouped product computes on CPUs too, in bf16 and fp32, so everything is run here as on a GPU: where there is
none, the Triton kernels in their interpreter.
"""

import numpy as np
import pytest
import torch
import transformers
from support.helpers import batch_loss, relative
from torch import nn

import adapter_files
import lora
from checkpoint import hf_name, load_model, save_model
from common.choices import CHECKPOINTING_KINDS
from data import collate
from dataset.examples import Example
from families import Config
from kernels import experts, triton_utils
from kernels import grouped as kernel
from kernels.nf4 import dequantized_weight, nf4_dequantize_reference
from model import Experts, Linear, Transformer
from quant import quantize

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": {"num_local_experts": 5, "intermediate_size": 128},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 64, "head_dim": 16, "norm_topk_prob": False},
}
TARGETS = {  # by published names, of both families
    "all": "all",
    "gate alone": "w1,gate_proj",
    "up and down": "w3,w2,up_proj,down_proj",
    "down alone": "w2,down_proj",
    "one expert of all": "experts.3.w1,experts.3.w2,experts.3.gate_proj,experts.3.down_proj",
}


@pytest.fixture
def grouped(monkeypatch):
    """Has the experts computed in grouped products from here on; a list of the calls of torch's grouped product."""
    calls, product = [], torch._grouped_mm

    def counted(*args, **named):
        calls.append(args)
        return product(*args, **named)

    monkeypatch.setattr(torch, "_grouped_mm", counted)
    monkeypatch.setattr(experts, "multiplies_groups", lambda x: True)
    return calls


def make(family: str, method: str = "full", targets: str = "all", dropout: float = 0.0, rank: int = 8) -> Transformer:
    """A model of one layer with random weights, in fp32, in training."""
    config = Config.from_hf(transformers.CONFIG_MAPPING[family](**SIZES, **FAMILIES[family]).to_dict())
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    if method == "qlora":
        for name, module in model.named_modules():
            if isinstance(module, Linear) and "blocks" in name:
                module.quantize(quantize(module.weight))
    if method != "full":
        names = {hf_name(model, name) for name, module in model.named_modules() if isinstance(module, Linear)}
        wanted = [t for t in TARGETS[targets].split(",") if t == "all" or any(n.endswith("." + t) for n in names)]
        lora.add_lora(model, rank, 12.0, dropout, wanted)
        for layer in lora.lora_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.2)
    return model.train()


def widened(model: Transformer, dtype: torch.dtype) -> Transformer:
    """In dtype, but for the scales of quantised weights."""
    for name, parameter in model.named_parameters():
        if ".nf4." not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def results(model: Transformer, tokens: int, dtype: torch.dtype, keys: bool = True) -> dict[str, torch.Tensor]:
    """Output, loads and all gradients of the one layer of experts, for `tokens` random rows."""
    layer: Experts = model.blocks[0].mlp
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()
    target = torch.randn(tokens, 64, generator=generator).to(dtype)
    model.dropout_seeds.seeds = torch.arange(tokens) * 977 if keys else None
    layer.load = None
    out = layer(x)
    chosen, probability = layer.load
    ((out * target).sum() + len(chosen) * (chosen * probability).sum()).backward()
    found = {"out": out.detach(), "chosen": chosen, "probability": probability.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def assert_close(got: dict, wanted: dict, tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        if value.any():
            assert relative(got[name].double(), value.double()) < tolerance, name
        else:
            assert not got[name].any(), name


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(grouped, monkeypatch, family, tokens):
    """In fp32 against the loop in float64; of few tokens, most experts get none, and gradients of zeros."""
    got = results(make(family), tokens, torch.float32)
    assert len(grouped) == 6
    monkeypatch.undo()
    wanted = results(widened(make(family), torch.float64), tokens, torch.float64)
    assert_close(got, wanted, 2e-6)
    if tokens == 1:
        assert sum(not value.any() for value in got.values()) == 3 * (len(got["chosen"]) - 2)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(grouped, monkeypatch, family, method, targets, tokens):
    got = results(make(family, method, targets), tokens, torch.float32)
    assert grouped
    monkeypatch.undo()
    wanted = results(widened(make(family, method, targets), torch.float64), tokens, torch.float64)
    assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("targets", ["all", "one expert of all"])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_ranks_that_a_grouped_product_does_not_take(grouped, monkeypatch, targets, rank):
    got = results(make("mixtral", "lora", targets, rank=rank), 20, torch.float32)
    assert grouped
    monkeypatch.undo()
    wanted = results(widened(make("mixtral", "lora", targets, rank=rank), torch.float64), 20, torch.float64)
    assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("targets", TARGETS)
def test_dropout_drops_the_same_as_in_the_loop(grouped, monkeypatch, targets):
    got = results(make("qwen3_moe", "lora", targets, dropout=0.3), 40, torch.float32)
    assert grouped
    monkeypatch.undo()
    model = widened(make("qwen3_moe", "lora", targets, dropout=0.3), torch.float64)
    assert_close(got, results(model, 40, torch.float64), 2e-6)
    without = results(widened(make("qwen3_moe", "lora", targets), torch.float64), 40, torch.float64)
    assert relative(got["out"].double(), without["out"]) > 1e-3


def test_dropout_without_keys_is_drawn(grouped):
    model = make("mixtral", "lora", dropout=0.5)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(results(model, 20, torch.float32, keys=False)["out"])
    assert grouped and torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(grouped, monkeypatch, family, method):
    """Against the loop in bf16, whose products round in other places. Full: fp32 masters, gradients in fp32."""

    def model():
        made = make(family, method)
        for name, parameter in made.named_parameters():
            narrow = method != "full" and ".lora_" not in name and ".nf4." not in name
            parameter.data = parameter.data.to(torch.bfloat16) if narrow else parameter.data
        return made

    got = results(model(), 40, torch.bfloat16)
    assert grouped
    monkeypatch.undo()
    wanted = results(model(), 40, torch.bfloat16)
    assert all(got[name].dtype == value.dtype for name, value in wanted.items())
    assert_close(got, wanted, 2e-2)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_other_activations(grouped, monkeypatch, activation):
    def model():
        made = make("mixtral")
        for expert in made.blocks[0].mlp.experts:
            expert.activation = activation
        return made

    got = results(model(), 20, torch.float32)
    monkeypatch.undo()
    assert_close(got, results(widened(model(), torch.float64), 20, torch.float64), 2e-6)


def test_what_an_empty_group_leaves_reaches_no_gradient(grouped, monkeypatch):
    """GPUs of compute capability 10 fill a group's outer product with garbage where the group has no rows."""
    product = torch._grouped_mm

    def with_garbage(a, b, offs=None):
        made = product(a, b, offs=offs)
        if made.dim() == 3:
            made[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return made

    monkeypatch.setattr(torch, "_grouped_mm", with_garbage)
    assert any(grad.isnan().any() for grad in results(make("mixtral"), 1, torch.float32).values())
    monkeypatch.setattr(kernel, "leaves_garbage", lambda x: True)
    assert not any(grad.isnan().any() for grad in results(make("mixtral"), 1, torch.float32).values())


def test_gate_and_up_in_nf4_and_down_not(grouped, monkeypatch):
    """As where the inner size is no whole number of blocks."""

    def model():
        made = make("mixtral", "qlora")
        for expert in made.blocks[0].mlp.experts:
            base = expert.down.base
            base.dequantize(dequantized_weight(base.frozen, torch.float32))
        return made

    got = results(model(), 20, torch.float32)
    assert grouped
    monkeypatch.undo()
    assert_close(got, results(widened(model(), torch.float64), 20, torch.float64), 2e-6)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_parameters_that_lie_together(grouped, method):
    """They are multiplied with where they are, and stay what they were for all that reads and writes them."""
    model, fresh = make("mixtral", method), make("mixtral", method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.blocks[0].mlp.make_weights_contiguous()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    down = [expert.down.member() for expert in model.blocks[0].mlp.experts]
    for column in zip(*([*member.frozen, member.A] for member in down), strict=True):
        if column[0] is not None:
            joint = kernel.as_one(column)
            assert joint.data_ptr() == column[0].data_ptr() and torch.equal(joint, torch.stack(list(column)))
            model.blocks[0].mlp.make_weights_contiguous()  # again: nothing moves
            assert joint.data_ptr() == column[0].data_ptr()
    assert_close(results(model, 20, torch.float32), results(fresh, 20, torch.float32), 1e-7)
    for each in (model, fresh):
        trained = [p for p in each.parameters() if p.grad is not None]
        torch.optim.AdamW(trained, lr=0.1, foreach=True).step()
        each.zero_grad()
    assert_close(results(model, 20, torch.float32), results(fresh, 20, torch.float32), 1e-7)
    with torch.inference_mode():
        out = model.eval().blocks[0].mlp(torch.ones(3, 64))
    if method != "full":
        lora.merge(model)
        with torch.inference_mode():
            merged = model.eval().blocks[0].mlp(torch.ones(3, 64))
        assert relative(merged, out) < 1e-5
    elsewhere = model.to(torch.float64).blocks[0].mlp
    assert kernel.as_one([expert.down.member().frozen[0] for expert in elsewhere.experts]) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mixtral of two layers, as transformers writes it."""
    path = tmp_path_factory.mktemp("mixtral")
    config = transformers.MixtralConfig(**(SIZES | FAMILIES["mixtral"] | {"num_hidden_layers": 2}))
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    theirs.save_pretrained(path)
    return path


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_files_are_the_same(folder, tmp_path, quant):
    model = load_model(folder, quant=quant)
    save_model(model, tmp_path / "apart")
    for block in model.blocks:
        block.mlp.make_weights_contiguous()
    save_model(model, tmp_path / "together")
    apart, together = (tmp_path / name / "model.safetensors" for name in ("apart", "together"))
    assert apart.read_bytes() == together.read_bytes()


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_text_is_the_same(folder, grouped, monkeypatch, quant):
    """Written token by token; what the experts' products keep meanwhile follows adapters that are merged."""
    prompts = [[5, 7, 11], [3, 1, 4, 1, 5, 9]]
    model = load_model(folder, quant=quant)
    lora.add_lora(model, 8, 16.0)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    for block in model.blocks:
        block.mlp.make_weights_contiguous()
    adapted = model.generate(prompts, 12)
    assert grouped
    lora.merge(model, keep=True)
    merged = model.generate(prompts, 12)
    lora.unmerge(model)
    adapter_files.remove_adapter(model)
    plain = model.generate(prompts, 12)
    monkeypatch.undo()
    again = load_model(folder, quant=quant)
    assert plain == again.generate(prompts, 12)
    assert adapted == merged != plain


@pytest.mark.parametrize("kind", CHECKPOINTING_KINDS[1:])
def test_recomputed_blocks(folder, grouped, kind):
    found = []
    for each in ("none", kind):
        model = load_model(folder).train()
        model.activation_checkpointing = each
        tokens = torch.arange(40) % 96
        batch = collate(
            [Example(tokens[:15].numpy(), np.ones(15, np.float32)), Example(tokens.numpy(), np.ones(40))], "cpu"
        )
        loss = batch_loss(model, batch)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
    assert len(grouped) > 12
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_parameters_that_moved_on_are_copied(grouped):
    model, fresh = make("mixtral"), make("mixtral")
    model.blocks[0].mlp.make_weights_contiguous()
    down = model.blocks[0].mlp.experts[2].down
    down.weight.data = down.weight.data * 2
    fresh.blocks[0].mlp.experts[2].down.weight.data *= 2
    column = [expert.down.weight for expert in model.blocks[0].mlp.experts]
    assert kernel.as_one(column) is None
    assert_close(results(model, 20, torch.float32), results(fresh, 20, torch.float32), 1e-7)


@pytest.fixture
def triton_too(monkeypatch):
    """The layer's Triton kernels compute, in small tiles; at least one must have run by the end."""
    if isinstance(triton_utils.triton, triton_utils.TritonStub):
        pytest.skip("needs triton")
    asked = []
    for module in (experts, kernel):
        monkeypatch.setattr(module, "use_triton", lambda x: asked.append(x) or True)
    monkeypatch.setattr(experts, "COLUMNS_PER_BLOCK", 32)
    for name, size in {"TILE_ROWS": 16, "TILE_COLUMNS": 32, "BYTES": 512}.items():
        monkeypatch.setattr(kernel, name, size)
    yield
    assert asked


@pytest.mark.parametrize("tokens", [1, 43])
@pytest.mark.parametrize("method, targets", [("full", "all"), ("lora", "all"), ("lora", "one expert of all")])
@pytest.mark.parametrize("family", FAMILIES)
def test_triton_kernels(grouped, triton_too, monkeypatch, family, method, targets, tokens):
    got = results(make(family, method, targets), tokens, torch.float32)
    assert grouped
    monkeypatch.undo()
    wanted = results(widened(make(family, method, targets), torch.float64), tokens, torch.float64)
    assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("double", [True, False])
def test_triton_dequantises_all_experts_in_one_launch(triton_too, monkeypatch, double):
    torch.manual_seed(0)
    separate = [quantize(weight, double) for weight in torch.randn(6, 48, 192)]
    wanted = torch.stack([nf4_dequantize_reference(nf4, torch.float32) for nf4 in separate])
    launched, launch = [], kernel.dequantize_experts_on_gpu
    monkeypatch.setattr(kernel, "dequantize_experts_on_gpu", lambda *args: launched.append(args) or launch(*args))
    together = [kernel.NF4(*(None if t is None else nn.Parameter(t, False) for t in nf4)) for nf4 in separate]
    for column in zip(*together, strict=True):
        kernel.make_contiguous(column)
    for joint, matrices in ((False, separate), (True, together)):
        product = kernel.make_product([[kernel.Member(nf4) for nf4 in matrices]])
        assert product.joint == joint
        assert torch.equal(kernel.stacked(product, torch.float32), wanted)
        assert len(launched) == joint


@pytest.mark.parametrize("ranks, stacked_by_rank", [(8, True), (40, False)])
def test_triton_adds_low_rank_products(triton_too, ranks, stacked_by_rank):
    """Into columns of a wider matrix, for experts with many rows, one, and none."""
    torch.manual_seed(0)
    counts, width = [50, 0, 1, 0, 20, 3], 72
    expert = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    ends = torch.tensor(counts).cumsum(0).int()
    made, low = torch.randn(74, 2 * width), torch.randn(74, ranks)
    matrices = torch.randn(6, ranks, width) if stacked_by_rank else torch.randn(6, width, ranks).transpose(1, 2)
    wanted = made.double()
    wanted[:, width:] += 0.7 * torch.einsum("mr,mrw->mw", low.double(), matrices.double()[expert])
    kernel.add_low_rank(made[:, width:], low, matrices, 0.7, kernel.Groups(expert, ends))
    assert relative(made.double(), wanted) < 1e-6


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("linears", [1, 2])
def test_triton_multiplies_few_rows_with_quantised_experts(triton_too, double, linears):
    torch.manual_seed(0)
    separate = [quantize(weight, double) for weight in torch.randn(6 * linears, 40, 1024)]
    together = [kernel.NF4(*(None if t is None else nn.Parameter(t, False) for t in nf4)) for nf4 in separate]
    for column in zip(*together, strict=True):
        kernel.make_contiguous(column)
    members = [kernel.Member(nf4) for nf4 in together]
    product = kernel.make_product([members[i::linears] for i in range(linears)])
    expert = torch.tensor([0, 0, 2, 5])
    rows = kernel.Groups(expert, torch.tensor([2, 2, 3, 3, 3, 4], dtype=torch.int32))
    x = torch.randn(4, 1024)
    made, lows = kernel.multiply(x, product, rows)
    wide = torch.stack([nf4_dequantize_reference(nf4, torch.float32) for nf4 in separate]).view(6, -1, 1024)
    wanted = torch.einsum("mi,moi->mo", x.double(), wide.double()[expert])
    assert relative(made.double(), wanted) < 1e-6 and lows == [None] * linears
    assert product.joint


def test_adapters_of_grouped_experts_are_cast_once(grouped):
    """Where the experts are multiplied with together, their casts are made there, and by nothing else."""
    cast_elsewhere = {number for numbers in make("mixtral", "lora").lora_casts.groups for number in numbers}
    assert len(cast_elsewhere) == 4  # q, k, v and o
