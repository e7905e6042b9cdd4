"""What planning/memory.py foretells against what is there: tensors held between forward and backward, the peak of a
step, the moments; its counts against the model; the recommendation; and `train.py --plan`, which reads no weights.
"""

import gc
import json
import re

import pytest
import torch
import transformers
from support.helpers import batch_loss, chat_base, command

import data
import train
from adapting.score_head import add_score_head, document_scores
from checkpoint import load_model, read_config
from common import device
from common.errors import UserError
from data import Batch
from families import Config
from flags import Flags, parse_flags
from kernels import activation_checkpointing
from kernels.attention import Documents
from optimizers import make_optimizers
from planning import memory as plan
from planning import multi_gpu
from planning.memory import Recipe, Workload, expected_memory, flops_a_token, meta_model
from training.defaults import choose_compile

ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all"}
LENGTHS = [90, 100, 110, 20]
CPU = torch.device("cpu")
SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 256}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "phi3": ("Phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "neox": ("GPTNeoX", {}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def write(folder, family: str):
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**SIZES | more)
    getattr(transformers, name + "ForCausalLM")(config).save_pretrained(folder)
    return folder


def measure(run):
    """What run() returns, the bytes that it leaves behind, and the most that it had."""
    gc.collect()  # what earlier tests left in cycles must not be freed while this is counted
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = run()
    finally:
        gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return out, total, peak


def batch() -> Batch:
    tokens = torch.randint(0, 96, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(0, sum(LENGTHS) - 1, 2)  # half of them are trained
    return Batch(tokens, Documents(sorted(LENGTHS)), rows, tokens[rows + 1])


CASES = [
    ("llama", method, checkpointing)
    for method in ("full", "lora", "qlora")
    for checkpointing in ("none", "selective", "full")
]
CASES += [(family, "lora", checkpointing) for family in list(FAMILIES)[1:] for checkpointing in ("none", "full")]


@pytest.mark.parametrize("family, method, checkpointing", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_foretold_is_what_is_held(tmp_path, family, method, checkpointing, dtype):
    write(tmp_path, family)
    setup = Recipe(method, checkpointing=checkpointing)
    drawn = meta_model(read_config(tmp_path), setup, dtype, ADAPTER)
    model = load_model(
        tmp_path, torch.float32 if method == "full" else dtype, quant="nf4" if method == "qlora" else None
    )
    if method != "full":
        plan.lora.add_lora(model, **ADAPTER)
    model.compute_dtype, model.activation_checkpointing = dtype, checkpointing
    model.train()
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in drawn.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    }
    one = batch()
    trained = len(one.targets)
    told = expected_memory(drawn, setup, LENGTHS, trained, "cpu", 1)
    assert told == expected_memory(model, setup, LENGTHS, trained, "cpu", 1)
    assert told.weights == sum(p.nbytes for p in model.parameters())
    run = lambda: batch_loss(model, one, trained)
    run()  # tables and masks that stay are made
    loss, held, _ = measure(run)
    between = told.activations + trained * model.config.hidden_size * model.dtype.itemsize
    if method == "full":  # and the head's gradient is there
        between += 4 * model.config.vocab_size * model.config.hidden_size
    assert held == pytest.approx(between, rel=0.1)
    _, left, _ = measure(loss.backward)
    assert left + held == pytest.approx(told.gradients, abs=0.02 * held)  # all else is gone
    model.zero_grad()

    def step():
        run().backward()

    _, _, peak = measure(step)
    assert peak == pytest.approx(told.peak - told.weights - told.optimizer - told.runtime, rel=0.1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_a_score_head_holds(tmp_path, method):
    write(tmp_path, "llama")
    setup = Recipe(method)
    drawn = meta_model(read_config(tmp_path), setup, torch.float32, ADAPTER)
    model = load_model(tmp_path)
    if method != "full":
        plan.lora.add_lora(model, **ADAPTER)
    for each in (drawn, model):
        add_score_head(each, ["no", "yes"])
    model.train()
    one = batch()
    told = expected_memory(drawn, setup, LENGTHS, 0, "cpu", 1)
    assert told == expected_memory(model, setup, LENGTHS, 0, "cpu", 1) and not told.tied
    run = lambda: document_scores(model, one.tokens, one.documents).square().sum()
    run()
    loss, held, _ = measure(run)
    assert held == pytest.approx(told.activations, rel=0.1)
    loss.backward()
    model.zero_grad()
    _, _, peak = measure(lambda: run().backward())
    assert peak == pytest.approx(told.peak - told.weights - told.optimizer - told.runtime, rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_moments(tmp_path, optimizer, weights):
    if (optimizer, weights) == ("muon", "bf16"):
        return  # refused
    write(tmp_path, "llama")
    setup = Recipe("full", optimizer, weights)
    told = expected_memory(
        meta_model(read_config(tmp_path), setup, torch.bfloat16, ADAPTER), setup, LENGTHS, 9, "cpu", 1
    )
    model = load_model(tmp_path, torch.float32 if weights == "fp32" else torch.bfloat16)
    steppers = make_optimizers(model, optimizer, 1e-3, 0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for stepper in steppers:
        stepper.step()
    states = [state for stepper in steppers for state in stepper.state.values()]
    held = sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t) and t.numel() > 1)
    assert held == pytest.approx(told.optimizer, rel=0.1)


def test_operations_are_those_of_the_products(tmp_path):
    """Against torch's own counter, attention included (whose products here are whole, not half)."""
    from torch.utils.flop_counter import FlopCounterMode

    for family, method in (("llama", "full"), ("llama", "lora"), ("phi3", "lora")):
        folder = write(tmp_path / f"{family}-{method}", family)
        model = load_model(folder)
        if method == "lora":
            plan.lora.add_lora(model, **ADAPTER)
        model.train()
        one = batch()
        in_place = {torch.ops.aten.addmm_: lambda to, a, b, **_: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            batch_loss(model, one, 1).backward()
        c, tokens = model.config, sum(LENGTHS)
        padded = sum(group.documents * group.length**2 for group in one.documents.groups)
        told = flops_a_token(model, [], len(one.targets) / tokens) * tokens
        told += (
            12 * padded * c.num_heads * c.head_dim * c.num_layers
        )  # two products forward, four backward, 2 FLOP each
        first = 2 * tokens * c.hidden_size * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        told -= first if method == "lora" else 0  # nothing before the first block wants a gradient
        if method == "lora":  # an adapter takes 6 a weight: forward, and both gradients
            assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())
        assert counter.get_total_flops() == pytest.approx(told, rel=0.02)


def test_windows_take_from_the_operations_of_attention(tmp_path):
    """Long documents with a window of 7 tokens, against a count of all pairs."""
    lengths = [3, 500, 41]
    for window in (None, 7):
        pairs = 0
        for length in lengths:
            for place in range(length):
                pairs += place + 1 if window is None else min(place + 1, window)
        # T (T + 1) / 2 pairs in truth, T^2 / 2 in the formula; w T - w (w - 1) / 2 and w T - w^2 / 2 with a window.
        halves = sum(length if window is None else min(length, window) for length in lengths)
        assert plan.mean_context(lengths, window) == pytest.approx((pairs - halves / 2) / sum(lengths))
    model = load_model(write(tmp_path, "gemma2"))
    config = model.config
    windows = [layer.window for layer in config.layers]
    assert len(set(windows)) == 2  # every other layer looks back over all
    told = flops_a_token(model, lengths) - flops_a_token(model)
    contexts = [plan.mean_context(lengths, window) for window in windows]
    assert told == pytest.approx(14 * sum(contexts) * config.num_heads * config.head_dim)


def table(text: str) -> list[list[str]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    return [line.split() for line in lines[start + 1 :] if line[:4] in ("full", "lora", "qlor")]


def job(**changes) -> Workload:
    usual = {"lengths": LENGTHS, "trained": 100, "share": 0.5, "all_lengths": [90], "tokens": 1e5, "to_learn": 5_000}
    return Workload(**(usual | {"accumulate": 1} | changes))


@pytest.mark.parametrize(
    "room, to_learn, wanted",
    [
        (1e12, 0.1, r"--method lora: .* full would learn no more"),
        (1e12, 2.6, r"--method lora --rank 11: .* all of them"),
        (1e12, 100, r"--method full: .* and full fits"),
        (0, 0.1, "nothing fits: the least, --method qlora"),
        ("qlora", 0.1, r"--method qlora: .* 16-bit weights do not fit"),
        ("full", 0.1, r"--method lora --activation-checkpointing full"),
    ],
)
def test_the_recommendation(monkeypatch, capsys, room, to_learn, wanted):
    """to_learn: as many times what the adapter can hold."""
    raw = transformers.LlamaConfig(**SIZES | {"hidden_size": 1024, "intermediate_size": 4096}).to_dict()
    config = Config.from_hf(raw)

    def peak(setup):
        return expected_memory(meta_model(config, setup, torch.bfloat16, ADAPTER), setup, LENGTHS, 100, "cpu", 1).peak

    if room == "qlora":
        room = peak(Recipe("lora", checkpointing="full")) - 1
    elif room == "full":
        room = (peak(Recipe("lora", checkpointing="full")) + peak(Recipe("lora", checkpointing="selective"))) / 2
    monkeypatch.setattr(plan, "device_memory", lambda device: room / plan.FITS)
    adapted = [
        p.numel() for p in meta_model(config, Recipe("lora"), torch.bfloat16, ADAPTER).parameters() if p.requires_grad
    ]
    workload = job(to_learn=int(to_learn * plan.CAPACITY * sum(adapted) / plan.BITS))
    plan.print_plan(config, workload, CPU, torch.bfloat16, ADAPTER, None)
    said = capsys.readouterr().out
    assert re.search(wanted, said.splitlines()[-1]), said
    assert len(table(said)) == 5 and ("!" in said.splitlines()[2]) == (room != 1e12)


@pytest.mark.parametrize("gpus", [[], ["--gpus", 1, "--gpu-memory", 24]])
def test_a_plan_recommends_the_method_that_is_asked_for(tmp_path, monkeypatch, capsys, gpus):
    base = chat_base(tmp_path / "base")
    for method in ("full", "lora", "qlora"):
        said, _, code = command(train, monkeypatch, capsys, "--model", base, "--plan", "--method", method, *gpus)
        assert code == 0 and said.splitlines()[-1].startswith(f"plan      --method {method}"), said
        assert [row[0] for row in table(said)] == ["full"] * 3 + ["lora", "qlora"]
    said, _, _ = command(train, monkeypatch, capsys, "--model", base, "--plan", "--quant", "nf4", *gpus)
    assert said.splitlines()[-1].startswith("plan      --method qlora")


def test_a_plan_reads_no_weights(tmp_path, monkeypatch, capsys):
    base = chat_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i}!"} for i in range(40)]))
    words = ["--model", base, "--data", tmp_path / "data.json", "--plan", "--out", tmp_path / "run"]
    said, _, code = command(train, monkeypatch, capsys, *words)
    assert code == 0 and not (tmp_path / "run").exists()
    assert "plan      --method lora" in said and [row[0] for row in table(said)] == ["full"] * 3 + ["lora", "qlora"]


@pytest.mark.parametrize("more", [[], ["--pack", "--seq-len", 64]])
def test_a_plan_builds_no_batch(tmp_path, monkeypatch, capsys, more):
    """It learns what a step holds from the lengths of the rows. See data.collate, which builds every batch."""

    def refuse(*arguments):
        raise AssertionError("a batch was built")

    monkeypatch.setattr(data, "collate", refuse)
    base = chat_base(tmp_path / "base")
    records = [{"instruction": f"say {i}", "output": f"{i}!"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["--model", base, "--data", tmp_path / "data.json", "--plan", *more]
    said, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0 and "plan      --method lora" in said, err


def test_a_plan_from_config_json_alone(tmp_path, monkeypatch, capsys):
    """8B, which no test could load: weights in 16 bits are 16 GB, in NF4 with 16-bit tables 5.7."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    words = ["--model", tmp_path, "--plan", "--seq-len", 4096, "--batch-size", 1, "--steps", 10, "--dtype", "bf16"]
    said, _, code = command(train, monkeypatch, capsys, *words)
    weights = {row[0]: float(row[1]) for row in table(said) if "lora" in row[0]}
    assert code == 0 and "for 10 steps of 1 x 1 rows of 4,096 tokens" in said
    assert weights["lora"] == pytest.approx(16.1, abs=0.1) and weights["qlora"] == pytest.approx(5.8, abs=0.1)


# ---- a GPU's memory and clock, without one ----

GPU = torch.device("cuda")


@pytest.mark.parametrize("room, wanted", [(1e9, 16384), (16383, 12288), (5000, 4096), (1100, 1024), (3, 1024)])
def test_a_micro_batch_has_as_many_tokens_as_fit(room, wanted):
    """A token takes a byte here."""
    assert plan.tokens_at_once(GPU, room, lambda tokens: tokens) == wanted
    assert plan.tokens_at_once(CPU, room, lambda tokens: tokens) == 2048  # whatever fits


def test_a_job_in_smaller_micro_batches():
    long = job(lengths=[3000, 2000, 1000, 500], trained=650, accumulate=2)
    assert long.cut(10_000) is long
    some = long.cut(4200)
    assert (some.lengths, some.trained, some.accumulate) == ([3000, 1000], 400, 4)
    assert long.cut(100).lengths == [3000] and long.cut(100).accumulate == 6  # an example is never cut


def test_a_card_that_is_smaller_gets_smaller_micro_batches():
    """Llama 3.1 8B, LoRA: 16,384 tokens at a time fit into 141 GB, and not into 80 or 48."""
    raw = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ).to_dict()  # fmt: skip
    setup = Recipe("lora")
    model = meta_model(Config.from_hf(raw), setup, torch.bfloat16, ADAPTER)

    def chosen(gigabytes: float) -> int:
        peak = lambda tokens: expected_memory(model, setup, [tokens], tokens, "cuda", 2).peak
        return plan.tokens_at_once(GPU, plan.FITS * (gigabytes * 1e9 - plan.CONTEXT), peak)

    assert chosen(141) == 16384 > chosen(80) > chosen(48) > chosen(24) == 1024


def test_smaller_micro_batches_train_the_same(tmp_path, monkeypatch, capsys):
    base = chat_base(tmp_path / "base")
    data = [{"instruction": f"say {i}", "output": f"{i}!" * (1 + i % 5)} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    words = ["--model", base, "--data", tmp_path / "data.json", "--steps", 3, "--device", "cpu", "--dtype", "fp32"]
    losses, said = {}, {}
    for most in (2048, 60):
        monkeypatch.setattr(plan, "tokens_at_once", lambda *_, most=most: most)
        out = tmp_path / str(most)
        said[most], err, code = command(train, monkeypatch, capsys, *words, "--out", out)
        assert code == 0, err
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[most] = [row.get("loss", row.get("val_loss")) for row in rows]
    assert losses[60] == pytest.approx(losses[2048], rel=1e-4) and losses[60] != losses[2048]
    line = "in micro-batches of at most 60 tokens; more do not fit"
    assert line in said[60] and "in micro-batches" not in said[2048]


def test_a_product_on_a_gpu_is_timed_by_its_events(monkeypatch):
    """The first products warm up; what the host takes is not counted."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(done)

        def synchronize(self):
            done.append("waited")

        def elapsed_time(self, end):
            return 3.0 * (end.at - self.at)  # ms: three a product

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert plan.seconds_on_gpu(lambda: done.append("product")) == pytest.approx(3e-3)
    assert done.index("waited") == len(done) - 1 and len(done) > 16


@pytest.mark.parametrize("variable", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_a_gpu_s_segments_grow_unless_the_user_says_otherwise(monkeypatch, variable):
    asked = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick_device("auto") == GPU
    assert asked == ([] if variable else ["expandable_segments:True"])


def test_blocks_are_not_compiled_on_a_gpu_by_themselves():
    compiled, reason = choose_compile(Flags(method="lora"), GPU, seconds=1e6)
    assert compiled == "off" and "not measured yet" in reason


def test_one_stream_for_all_that_travels(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    activation_checkpointing.offload_stream.cache_clear()
    streams = {activation_checkpointing.ActivationCheckpointing("offload", GPU).stream for _ in range(3)}
    activation_checkpointing.offload_stream.cache_clear()
    assert streams == {1} and made == [GPU]


# ---- what a plan says to a person ----


def test_a_plan_has_100_columns_and_says_hours_and_days(tmp_path, monkeypatch, capsys):
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(plan, "product_rate", lambda *_: 1e11)
    words = ["--model", tmp_path, "--plan", "--seq-len", 2048, "--steps", 1000, "--dtype", "bf16"]
    said, _, code = command(train, monkeypatch, capsys, *words)
    assert code == 0 and max(map(len, said.splitlines()[1:11])) <= 100, said
    last = said.splitlines()[-1]
    # 8 x 2048 x 1000 tokens of some 30 GFLOP, at 45 % of 100 GFLOP/s: 130 days.
    assert re.search(r"not on this machine: --method q?lora .*takes .* days; --plan --gpus 1 --gpu-memory 24", last), (
        said
    )
    monkeypatch.setattr(plan, "product_rate", lambda *_: 1e15)
    said, _, _ = command(train, monkeypatch, capsys, *words)
    assert re.search(r"--method q?lora.*: .* GB, [0-9]+ min; ", said.splitlines()[-1]), said


@pytest.mark.parametrize(
    ("gigabytes", "card", "fits"),
    [(12, "RTX 4060 Ti", "qlora"), (24, "RTX 4090", "lora"), (48, "L40S", "lora"), (80, "H100", "lora"),
     (141, "H200", "lora")],
)  # fmt: skip
def test_cards_up_to_141_gigabytes(tmp_path, monkeypatch, capsys, gigabytes, card, fits):
    """An 8B model: 16 GB of weights in 16 bits, 5.8 in NF4."""
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    words = ["--model", tmp_path, "--plan", "--gpus", 1, "--gpu-memory", gigabytes, "--seq-len", 512]
    words += ["--batch-size", 1]
    said, _, code = command(train, monkeypatch, capsys, *words)
    assert code == 0 and max(map(len, said.splitlines()[1:9])) <= 100, said
    assert card in said and f"plan      --method {fits}" in said.splitlines()[-1], said


def test_a_card_of_8_gigabytes_is_too_small_for_8b(tmp_path, monkeypatch, capsys):
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    words = ["--model", tmp_path, "--plan", "--gpus", 1, "--gpu-memory", 8, "--seq-len", 512, "--batch-size", 1]
    said, _, code = command(train, monkeypatch, capsys, *words)
    last = said.splitlines()[-1]
    assert code == 0 and last.startswith("plan      nothing fits: the least, --method qlora"), said
    assert "on 1 GPU, takes 6.4 of 6.3 GB; more --gpus" in last


def test_a_plan_for_gpus_counts_the_data(tmp_path, monkeypatch, capsys):
    base = chat_base(tmp_path / "base")
    records = [{"instruction": f"say {i}", "output": f"{i}!"} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["--model", base, "--data", tmp_path / "data.json", "--plan", "--gpus", 1, 2, "--gpu-memory", 24]
    said, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    rows = table(said)
    assert [row[0] for row in rows] == ["full"] * 6 + ["lora"] * 2 + ["qlora"] * 2
    assert re.search(r" (\d+ s|[\d.]+ min)$", said.splitlines()[-1].rpartition(", ")[2].rjust(9)), said
    assert said.splitlines()[-1].startswith("plan      --method lora on 1 GPU: ")

    # The time: twice the steps take twice as long, on twice the cards half.
    config = Config.from_hf(transformers.LlamaConfig(**SIZES).to_dict())
    model = meta_model(config, Recipe("lora"), torch.bfloat16, ADAPTER)

    def seconds(steps: int, gpus: int) -> float:
        tokens = 1000.0 * steps
        card = multi_gpu.card_of(24)
        return multi_gpu.best_way(model, Recipe("lora"), gpus, job(tokens=tokens), steps, 1e12, card).seconds

    assert seconds(200, 1) == pytest.approx(2 * seconds(100, 1))
    assert seconds(100, 2) == pytest.approx(seconds(100, 1) / 2, rel=0.5)


def test_gpu_memory_alone_means_nothing():
    with pytest.raises(UserError, match="--gpu-memory: is about the GPUs of --plan --gpus; give --gpus 1 as well"):
        parse_flags(["--plan", "--gpu-memory", "24"])
