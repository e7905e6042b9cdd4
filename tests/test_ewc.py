"""Elastic weight consolidation: --ewc, its Fisher information, its penalty and gradients, and what they do to a run."""

import functools
import json
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, command, llama, output_of, sentence
from support.runs import ROOT, assert_same, lines, records, torchrun

import train
from checkpoint import hf_name, load_model
from common.errors import UserError, run
from dataset.examples import Dataset, Example
from flags import Flags
from kernels.nf4 import dequantized_weight
from lora import LoRALinear, add_lora, lora_layers
from methods import METHODS, method_of
from model import DropoutSeeds, Linear
from planning import memory
from training import defaults, ewc
from training.ewc import HeldUpdate, HeldWeight
from training.metrics import MetricsLogger

CPU = torch.device("cpu")
ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


def sequences(count: int, seed: int = 0) -> list[Example]:
    """Random ids; of some examples, the last part is predicted alone."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt, answer = rng.randint(1, 6), rng.randint(1, 12)
        ids = [rng.randrange(96) for _ in range(prompt + answer)]
        trained = [number % 2 == 0] * prompt + [True] * answer
        found.append(Example(ids, trained))
    return found


def measured(model, settings, chosen: list[Example], monkeypatch) -> tuple[dict, list[torch.Tensor]]:
    """What is held, with its Fisher information, and the labels that were drawn for each sequence."""
    labels = []
    draw = ewc.sample_labels

    def keep(*arguments):
        labels.append(draw(*arguments))
        return labels[-1]

    monkeypatch.setattr(ewc, "sample_labels", keep)
    held = ewc.held_near_start(settings, model)
    ewc.measure_fisher(model, held, chosen, settings.seed, CPU)
    return held, labels


def oracle_fisher(folder: Path, chosen: list[Example], labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """{published name: F} by transformers' model and autograd in float64, a sequence at a time."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example, drawn in zip(chosen, labels, strict=True):
        places = [i for i in range(1, len(example.ids)) if example.loss_weights[i]]
        logprobs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        total = sum(logprobs[i - 1, label] for i, label in zip(places, drawn, strict=True))
        for name, gradient in zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True):
            fisher[name] += gradient**2
    tokens = sum(map(len, labels))
    return {name: total / tokens for name, total in fisher.items()}


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert mine.shape == theirs.shape and theirs.abs().max() > 0
    assert float((mine.double() - theirs).norm() / theirs.norm()) < tolerance


# ---- the Fisher information ----


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_the_fisher_information_of_full_equals_transformers_in_float64(tmp_path, monkeypatch, shape):
    llama(tmp_path, **shape)
    model = load_model(tmp_path)
    chosen = sequences(7)
    held, labels = measured(model, Flags(method="full", ewc=1.0), chosen, monkeypatch)
    expected = oracle_fisher(tmp_path, chosen, labels)
    assert {hf_name(model, name) for name in held} == expected.keys()
    for name, each in held.items():
        assert_close(each.fisher, expected[hf_name(model, name)])
        assert torch.equal(each.start, each.parameter) and each.parameter.grad is None


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_that_of_adapted_weights_equals_it_too_though_they_are_not_trained(tmp_path, monkeypatch, checkpointing):
    llama(tmp_path)
    model = load_model(tmp_path)
    add_lora(model, **ADAPTER)
    model.activation_checkpointing = checkpointing
    chosen = sequences(6)
    held, labels = measured(model, Flags(ewc=1.0), chosen, monkeypatch)
    expected = oracle_fisher(tmp_path, chosen, labels)
    assert len(held) == 3 * 7
    for name, each in held.items():
        assert_close(each.fisher, expected[f"{name}.weight"])
    assert model.activation_checkpointing == checkpointing
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())


def test_with_an_adapter_that_is_continued_it_is_that_of_the_merged_weights(tmp_path, monkeypatch):
    merged = llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    add_lora(model, **ADAPTER)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            merged.get_submodule(name).weight += layer.delta()
    merged.save_pretrained(tmp_path / "merged")
    chosen = sequences(5)
    held, labels = measured(model, Flags(ewc=1.0, adapter="before"), chosen, monkeypatch)
    expected = oracle_fisher(tmp_path / "merged", chosen, labels)
    for name, each in held.items():
        assert_close(each.fisher, expected[f"{name}.weight"])
        assert torch.equal(each.start[0], each.layer.lora_A) and torch.equal(each.start[1], each.layer.lora_B)
        assert float(each.pull(1.0)) == 0.0


@pytest.mark.parametrize("quant, dtype", [(None, torch.bfloat16), ("nf4", torch.bfloat16), ("nf4", torch.float32)])
def test_in_bf16_and_4_bits_it_is_near_that_of_the_dequantized_weights(tmp_path, monkeypatch, quant, dtype):
    theirs = llama(tmp_path / "base", intermediate_size=128, std=0.1)
    model = load_model(tmp_path / "base", dtype, quant=quant)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                weight = dequantized_weight(module.frozen, torch.float32)
                theirs.get_submodule(hf_name(model, name)).weight.copy_(weight)
    theirs.save_pretrained(tmp_path / "same")
    add_lora(model, **ADAPTER)
    chosen = sequences(24)
    held, labels = measured(model, Flags(ewc=1.0, quant=quant), chosen, monkeypatch)
    expected = oracle_fisher(tmp_path / "same", chosen, labels)
    for name, each in held.items():
        assert each.fisher.dtype == dtype
        assert_close(each.fisher, expected[f"{name}.weight"], 0.1 if dtype == torch.bfloat16 else 1e-3)


def test_small_squares_are_not_lost_beside_a_large_sum_in_bf16():
    torch.manual_seed(0)
    total = torch.ones(4000, dtype=torch.bfloat16)
    for _ in range(64):
        total = ewc.round_stochastically(total.float() + 1 / 1024)
    assert float(total.float().mean()) == pytest.approx(1 + 64 / 1024, abs=0.004)


def test_labels_are_drawn_from_the_model_by_the_seed_in_chunks_of_any_size(monkeypatch):
    hidden, head = torch.eye(3), 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    many = hidden.repeat(4000, 1)
    expected = (head.T).softmax(-1)  # of each of the three rows
    drawn = ewc.sample_labels(many, head, None, torch.Generator().manual_seed(0))
    shares = torch.stack([torch.bincount(drawn[i::3], minlength=5) / 4000 for i in range(3)])
    assert torch.allclose(shares, expected, atol=0.03)
    assert torch.equal(drawn, ewc.sample_labels(many, head, None, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, ewc.sample_labels(many, head, None, torch.Generator().manual_seed(1)))
    capped = ewc.sample_labels(many, 9 * head, 0.01, torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(capped, minlength=5) / 12000, torch.full((5,), 0.2), atol=0.02)
    monkeypatch.setitem(ewc.CHUNK_NUMBERS, "cpu", 1)
    one_by_one = ewc.sample_labels(many[:1200], head, None, torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(one_by_one[::3], minlength=5) / 400, expected[0], atol=0.1)


def test_the_run_s_own_random_numbers_are_not_touched(tmp_path, monkeypatch):
    llama(tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    add_lora(model, **ADAPTER)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measured(model, Flags(ewc=1.0), sequences(2), monkeypatch)
    assert torch.equal(torch.rand(3), expected)


# ---- the penalty and its gradients ----


def test_penalty_and_gradients_of_weights_equal_autograd_on_100_random_cases(monkeypatch):
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(ewc, "NUMBERS_AT_ONCE", (1, 7, 1 << 24)[seed % 3])
        shape = [int(torch.randint(1, 7, (), generator=generator)) for _ in range(1 + seed % 3)]
        theta, start, gradient = (torch.randn(shape, generator=generator) for _ in range(3))
        fisher = torch.rand(shape, generator=generator)
        parameter = torch.nn.Parameter(theta.clone())
        parameter.grad = gradient.clone() if seed % 4 else None
        penalty = HeldWeight(parameter, start, fisher).pull(0.1 * seed)

        exact = theta.double().requires_grad_()
        wanted = 0.1 * seed / 2 * (fisher.double() * (exact - start.double()) ** 2).sum()
        wanted.backward()
        assert float(penalty) == pytest.approx(wanted.item(), rel=1e-5)
        before = gradient if seed % 4 else torch.zeros(shape)
        assert torch.allclose(parameter.grad.double(), before.double() + exact.grad, rtol=1e-5, atol=1e-6)


def test_penalty_and_gradients_of_updates_equal_autograd_on_100_random_cases(monkeypatch):
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(ewc, "NUMBERS_AT_ONCE", (1, 7, 1 << 24)[seed % 3])
        rows, columns, rank = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(3))
        layer = LoRALinear(Linear(columns, rows, bias=False), rank, 3.0, 0.0, DropoutSeeds(), 0)
        A, A0, dA = (torch.randn(rank, columns, generator=generator) for _ in range(3))
        B, B0, dB = (torch.randn(rows, rank, generator=generator) for _ in range(3))
        fisher = torch.rand(rows, columns, generator=generator)
        layer.lora_A.data, layer.lora_B.data = A.clone(), B.clone()
        layer.lora_A.grad, layer.lora_B.grad = dA.clone(), dB.clone()
        start = (A0, B0) if seed % 2 else None
        penalty = HeldUpdate(layer, start, fisher).pull(0.1 * seed)

        exact_A, exact_B = (each.double().requires_grad_() for each in (A, B))
        change = exact_B @ exact_A - (B0.double() @ A0.double() if start else 0)
        wanted = 0.1 * seed / 2 * (fisher.double() * (3.0 / rank * change) ** 2).sum()
        wanted.backward()
        assert float(penalty) == pytest.approx(wanted.item(), rel=1e-5)
        assert torch.allclose(layer.lora_A.grad.double(), dA + exact_A.grad, rtol=1e-4, atol=1e-4)
        assert torch.allclose(layer.lora_B.grad.double(), dB + exact_B.grad, rtol=1e-4, atol=1e-4)


def test_every_method_says_what_of_it_is_held():
    held = {name: row.held for name, row in METHODS.items()}
    assert {name: kind for name, kind in held.items() if kind} == {
        "full": "weights", "lora": "updates", "qlora": "updates",
    }  # fmt: skip
    assert method_of(Flags(quant="nf4")).held == "updates"


def test_the_plan_counts_what_is_kept(tmp_path):
    llama(tmp_path)
    cases = [("full", None, torch.float32), ("lora", None, torch.bfloat16), ("qlora", "nf4", torch.bfloat16)]
    for method, quant, dtype in cases:
        model = load_model(tmp_path, dtype, quant=quant)
        if method != "full":
            add_lora(model, **ADAPTER)
        held = ewc.held_near_start(Flags(method=method, quant=quant, ewc=1.0), model)
        kept = sum(tensor.nbytes for each in held.values() for tensor in each.memory())
        recipes = memory.Recipe(method, ewc=True), memory.Recipe(method)
        told, without = (memory.expected_memory(model, recipe, [20], 20, "cpu", 1) for recipe in recipes)
        assert told.held == kept > 0 and told.peak == without.peak + kept


# ---- the sequences ----


def test_plain_text_is_cut_and_few_sequences_are_taken_again():
    text = Dataset([Example(list(range(300)), [True] * 300), Example([1] * 129, [True] * 129)])
    assert [len(each.ids) for each in ewc.cut_text(text)] == [128, 128, 44, 128]  # a single token is no text
    assert np.asarray(ewc.cut_text(text)[1].ids).tolist() == list(range(128, 256))
    chat = Dataset([Example([1] * 300, [True] * 300)], chat=True)
    assert [len(each.ids) for each in ewc.cut_text(chat)] == [300]


# ---- runs ----


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """words(more): the flags of a job of 9 steps."""
    folder = tmp_path_factory.mktemp("job")
    base = chat_base(folder / "base", num_key_value_heads=2)
    files = {name: records(folder / f"{name}.jsonl", n, seed)
             for name, n, seed in (("data", 40, 0), ("val", 9, 500), ("general", 30, 900))}  # fmt: skip

    def words(*more) -> list[str]:
        common = ["--model", base, "--data", files["data"], "--val", files["val"], "--steps", 9, "--eval-every", 4]
        held = ["--ewc-samples", 8] if "--ewc" in more and "--ewc-samples" not in more else []
        return list(map(str, [*common, "--dtype", "fp32", "--batch-size", 6, *held, *more]))

    words.base, words.files = base, files
    return words


trained = functools.partial(output_of, train)


def refused(monkeypatch, capsys, *words) -> str:
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("method", ["--method full --lr 1e-3", "--rank 4 --dropout 0.2", "--method qlora --rank 4"])
def test_a_run_says_what_it_holds_and_logs_the_penalty(job, monkeypatch, capsys, tmp_path, method):
    general, run = job.files["general"], tmp_path / "run"
    flags = [*method.split(), "--ewc", 20, "--ewc-data", general, "--log-every", 3, "--save-every", 3, "--out", run]
    out = trained(monkeypatch, capsys, *job(*flags))
    assert "ewc       lambda 20: a penalty on the weights' distance from their start" in out
    assert "8 sequences, " in out and f"of {general} (--ewc-data): about" in out
    assert "ewc.safetensors keeps" in out and ", EWC penalty " in out
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert steps[0]["ewc_penalty"] == 0.0  # nothing has moved yet
    assert all(line["ewc_penalty"] > 0 for line in steps[1:])


def test_lambda_0_is_a_run_without_it_to_the_bit_and_another_is_not(job, monkeypatch, capsys, tmp_path):
    common = ["--rank", 4, "--dropout", 0.2]
    trained(monkeypatch, capsys, *job(*common, "--out", tmp_path / "plain"))
    trained(monkeypatch, capsys, *job(*common, "--out", tmp_path / "zero"), "--ewc", "0")
    trained(monkeypatch, capsys, *job(*common, "--out", tmp_path / "held", "--ewc", 50))
    assert_same(tmp_path / "plain", tmp_path / "zero")
    assert not (tmp_path / "zero/ewc.safetensors").exists()
    losses = [[line.get("loss") for line in lines(tmp_path / name)] for name in ("plain", "held")]
    # Until the first step both are one run: the Fisher information leaves order and dropout as they are.
    assert losses[0][1] == losses[1][1] and losses[0] != losses[1]


@pytest.mark.parametrize("method", ["--method full --lr 1e-3", "--rank 4 --dropout 0.2", "--adapter ADAPTER"])
def test_a_resumed_run_equals_one_that_was_not_to_the_bit(job, monkeypatch, capsys, tmp_path, method):
    if "ADAPTER" in method:
        trained(monkeypatch, capsys, *job("--steps", 2, "--ewc", 1, "--out", tmp_path / "first"))
    flags = [*method.replace("ADAPTER", str(tmp_path / "first/final")).split(), "--ewc", 30, "--save-every", 3]
    trained(monkeypatch, capsys, *job(*flags, "--out", tmp_path / "whole"))
    assert lines(tmp_path / "whole")[-2]["ewc_penalty"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/final")
    shutil.rmtree(tmp_path / "again/checkpoints/step-9")
    monkeypatch.setattr(ewc, "measure_fisher", None)  # it is read
    out = trained(monkeypatch, capsys, "--resume", "--out", str(tmp_path / "again"))
    assert "resumed   after step 6" in out
    assert "ewc       lambda 30: Fisher information as ewc.safetensors holds it" in out
    assert_same(tmp_path / "whole", tmp_path / "again")
    penalties = [[line.get("ewc_penalty") for line in lines(tmp_path / name)] for name in ("whole", "again")]
    assert penalties[0] == penalties[1]


def test_a_stopped_run_without_checkpoints_can_be_resumed(job, monkeypatch, capsys, tmp_path):
    log_step = MetricsLogger.log_step

    def stop_at_3(self, step, *arguments):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        log_step(self, step, *arguments)

    flags = ["--ewc", 30, "--save-every", 0, "--rank", 4]
    trained(monkeypatch, capsys, *job(*flags, "--out", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log_step", stop_at_3)
        patch.setattr(sys, "argv", ["train.py", *map(str, job(*flags, "--out", tmp_path / "stopped"))])
        with pytest.raises(SystemExit):
            run(train.main)
    assert "--resume goes on" in capsys.readouterr().out
    trained(monkeypatch, capsys, "--resume", "--out", tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_is_not_resumed_without_what_it_held(job, monkeypatch, capsys, tmp_path):
    out, run = tmp_path / "run", tmp_path / "run/ewc.safetensors"
    trained(monkeypatch, capsys, *job("--ewc", 5, "--save-every", 3, "--out", out))
    shutil.rmtree(out / "final")
    stored = load_file(run)
    run.unlink()
    advice = "the run can't go on as it began; put the file back, or begin anew"
    shutil.rmtree(out / "checkpoints/step-9")
    told = refused(monkeypatch, capsys, "--resume", "--out", out)
    assert told == f"error: --resume: {run} is missing or damaged, {advice}"
    stored.popitem()
    save_file(stored, run)
    told = refused(monkeypatch, capsys, "--resume", "--out", out)
    assert told == f"error: --resume: {run} is of another model or method, {advice}"
    told = refused(monkeypatch, capsys, "--resume", "--out", out, "--ewc", 6)
    assert "--ewc 6.0 (it was 5.0)" in told
    own = ["--ewc", 1, "--ewc-data", out / "metrics.jsonl", "--overwrite", "--out", out]
    assert "metrics.jsonl lies in --out" in refused(monkeypatch, capsys, *job(*own))
    # Another run in this folder begins without it.
    trained(monkeypatch, capsys, *job("--overwrite", "--out", out))
    assert not run.exists()


def test_a_full_disk_ends_nothing_but_the_resuming(job, monkeypatch, capsys, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ewc, "save_tensors", full)
    run = tmp_path / "run"
    out = trained(monkeypatch, capsys, *job("--ewc", 5, "--save-every", 3, "--out", run))
    assert "WARNING: not kept, so this run can't be resumed: " in out
    assert not (run / "ewc.safetensors").exists() and (run / "final").exists()


def test_the_data_are_those_of_ewc_data_else_of_replay_else_bundled(job, monkeypatch, capsys, tmp_path):
    general = job.files["general"]
    replayed = ["--replay", f"{general}=0.2"]
    short = ["--steps", 1, "--eval-every", 0, "--ewc", 5, "--overwrite", "--out", tmp_path / "run"]
    out = trained(monkeypatch, capsys, *job(*short, *replayed))
    assert f"8 sequences, 390 tokens, of {general} (--replay): about" in out
    out = trained(monkeypatch, capsys, *job(*short))
    assert "8 sequences, 1,024 tokens, of assets/general.txt (bundled; --ewc-data FILE names another): about" in out
    out = trained(monkeypatch, capsys, *job(*short, *replayed, "--ewc-data", general, "--ewc-samples", 45))
    assert f"of {general} (--ewc-data; of 30 there, each is read 1.5 times with other labels): about" in out


def test_what_it_can_t_be_combined_with_is_refused_in_one_line(job, monkeypatch, capsys, tmp_path):
    def told(*words) -> str:
        return refused(monkeypatch, capsys, *job("--out", tmp_path / "run", *words))

    assert told("--ewc-samples", 3) == "error: --ewc-samples: is for --ewc LAMBDA, which is not given"
    assert told("--ewc", 1, "--shard", "full") == "error: --ewc: needs whole weights on every process, not --shard full"
    offloaded = told("--ewc", 1, "--method", "full", "--optimizer-offload")
    assert offloaded == "error: --ewc: is not for --optimizer-offload, which has the weights on the host"
    assert told("--ewc", 1, "--context-parallel", 2) == "error: --ewc: is not for --context-parallel"
    assert told("--ewc", -1) == "error: --ewc -1: must be 0 or more"
    assert told("--ewc", "nan") == "error: --ewc nan: must be 0 or more"
    assert "nothing.jsonl" in told("--ewc", 1, "--ewc-data", tmp_path / "nothing.jsonl")
    monkeypatch.setitem(METHODS, "lora", METHODS["lora"]._replace(held=None))
    assert told("--ewc", 1) == (
        "error: --ewc: is not for --method lora, it holds the weights of full fine-tuning and the updates of LoRA alone"
    )
    assert not (tmp_path / "run").exists()


def test_several_processes_are_told_to_keep_whole_weights(tmp_path, monkeypatch):
    llama(tmp_path)
    monkeypatch.setattr("distributed.world_size", lambda: 2)
    with pytest.raises(UserError) as error:
        defaults.choose_shard(Flags(method="full", ewc=1.0), tmp_path, CPU)
    why = "needs whole weights on every process, and 2 processes would share them; add --shard none"
    assert str(error.value) == f"--ewc: {why}"
    assert defaults.choose_shard(Flags(method="full", ewc=1.0, shard="none"), tmp_path, CPU)[0] == "none"


def test_adapters_on_routed_experts_are_refused(tmp_path, monkeypatch):
    llama(tmp_path)
    model = load_model(tmp_path)
    add_lora(model, **ADAPTER)
    (layer, *_) = lora_layers(model).values()
    monkeypatch.setattr(ewc, "lora_layers", lambda model: {"model.layers.0.mlp.experts.3.up_proj": layer})
    with pytest.raises(UserError, match="--ewc: is not for adapters on routed experts; --targets q_proj,k_proj"):
        ewc.held_near_start(Flags(ewc=1.0), model)


def test_it_is_refused_where_it_alone_does_not_fit(job, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "RUNTIME", {"cpu": 0.0})
    flags = job("--ewc", 1, "--method", "full", "--out", tmp_path / "run")
    sizes = []
    whole = ewc.memory.expected_memory

    def keep(*arguments):
        sizes.append(whole(*arguments))
        return sizes[-1]

    monkeypatch.setattr(ewc.multi_gpu, "expected_memory", keep)
    trained(monkeypatch, capsys, *flags)
    room = sizes[-1].peak - sizes[-1].held / 2
    monkeypatch.setattr(memory, "device_memory", lambda device: room)
    told = refused(monkeypatch, capsys, *flags, "--overwrite")
    assert told.startswith("error: --ewc: keeps 0.0 GB more, so that the run would take 0.0 GB of the 0.0 GB here; ")


def test_two_processes_compute_the_run_of_one(job, monkeypatch, capsys, tmp_path):
    flags = job("--rank", 4, "--ewc", 30, "--steps", 4, "--save-every", 2, "--ewc-data", job.files["general"])
    trained(monkeypatch, capsys, *flags, "--out", tmp_path / "one")
    more = ["--shard", "none", "--batch-size", "3", "--out", str(tmp_path / "two")]
    torchrun(2, ROOT / "train.py", *flags, *more)
    one, two = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["ewc_penalty"] == pytest.approx(a["ewc_penalty"], rel=2e-3)
    mine, theirs = (load_file(tmp_path / name / "ewc.safetensors") for name in ("one", "two"))
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-6), name


@pytest.fixture(scope="module")
def general_base(job, tmp_path_factory):
    """A base that has learned some general records, and these records."""
    folder = tmp_path_factory.mktemp("general")
    general = folder / "general.jsonl"
    rng = random.Random(1)
    answers = ["the red fox", "a blue dog jumps", "never 12", "green always runs"]
    texts = [{"prompt": sentence(i, 4), "completion": rng.choice(answers)} for i in range(48)]
    general.write_text("".join(json.dumps(text) + "\n" for text in texts))
    words = ["--model", job.base, "--data", general, "--val", general, "--method", "full", "--lr", 3e-3, "--steps", 40]
    words += ["--batch-size", 6, "--dtype", "fp32", "--eval-every", 0, "--save-every", 0, "--out", folder / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *map(str, words)])
        train.main()
    return folder / "run/final", general


@pytest.mark.parametrize("method, lr, strength, most", [("full", 2e-3, 1000, 0.7), ("lora", 1e-2, 300, 0.5)])
def test_a_run_with_it_learns_and_forgets_less(
    job, general_base, monkeypatch, capsys, tmp_path, method, lr, strength, most
):
    base, general = general_base
    words = ["--model", base, "--method", method, "--lr", lr, "--steps", 20, "--eval-every", 20, "--save-every", 0]
    forgotten, learned = [], []
    for held in ([], ["--ewc", strength, "--ewc-data", general, "--ewc-samples", 48]):
        run = tmp_path / str(len(held))
        # What is forgotten shows in the loss on the general records.
        trained(monkeypatch, capsys, *job(*words, *held, "--val", general, "--out", run))
        before, after = (line["val_loss"] for line in lines(run) if "val_loss" in line)
        forgotten.append(after - before)
        losses = [line["loss"] for line in lines(run) if "loss" in line]
        learned.append(losses[0] - sum(losses[-5:]) / 5)
    assert forgotten[0] > 0.3 and forgotten[1] < most * forgotten[0]
    assert learned[1] > 0.9 * learned[0] > 2
