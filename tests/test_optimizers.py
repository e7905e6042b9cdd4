"""AdamW in 8 bits against bitsandbytes, stochastic rounding, Muon, the state on the host, and whole runs of each."""

import json

import bitsandbytes
import numpy as np
import pytest
import torch
from support.helpers import chat_base, command, llama
from support.kernel_checks import give_gradients
from support.training_runs import run_loop, settings
from torch import nn

import lora
import optimizers
import train
from checkpoint import load_model
from data import BUNDLED_TASK, load
from dataset.examples import Dataset
from interop.resolve import model_folder
from optimizers import AdamW, OffloadedAdamW, make_optimizers, round_stochastically, share_too_small_to_move
from tokenizer import load_tokenizer

CPU = torch.device("cpu")


def twins(*shapes, dtype=torch.float32, seed=0) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(seed)
    ours = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moments_in_8_bits_are_those_of_bitsandbytes(decay):
    """Codes and scales bit for bit over ten steps; a short last block, and a tensor that is too small for 8 bits."""
    shapes = (70, 65), (64, 128), (4096,), (63, 65)
    ours, theirs = twins(*shapes)
    mine = AdamW([{"params": ours}], lr=1e-2, bits=8, weight_decay=decay)
    peer = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=decay)
    for step in range(10):
        give_gradients(step, ours, theirs)
        mine.step(), peer.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            for name, other in (("m", "state1"), ("v", "state2")):
                torch.testing.assert_close(mine.state[a][name], peer.state[b][other].flatten(), rtol=1e-6, atol=0)
                if a.numel() >= 4096:
                    assert mine.state[a][name].dtype == torch.uint8
                    assert torch.equal(mine.state[a][f"{name}_scale"], peer.state[b][f"absmax{other[-1]}"])
    assert mine.state[ours[3]]["m"].dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 32])
def test_pieces_make_no_difference(bits, monkeypatch):
    sides = twins((70, 65), (5000,), dtype=torch.float32 if bits == 8 else torch.float64)
    for size, parameters in zip((1 << 18, 512), sides):
        monkeypatch.setitem(optimizers.CHUNK_NUMEL, "cpu", size)
        stepper = AdamW([{"params": parameters}], lr=1e-2, bits=bits)
        for step in range(3):
            give_gradients(step, parameters)
            stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_in_32_bits_it_is_the_adamw_of_torch(fused, monkeypatch):
    """By torch's fused step, and piece by piece as for bf16 weights."""
    if not fused:
        monkeypatch.setattr(AdamW, "fused", lambda self, ps, group, found_inf: [self.update(p, group) for p in ps])
    ours, theirs = twins((70, 65), (33,))
    mine = AdamW([{"params": ours}], lr=1e-2, weight_decay=0.1)
    peer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(10):
        give_gradients(step, ours, theirs)
        mine.step(), peer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    torch.manual_seed(0)
    for number in (1.0, -1.0, 1.001, -3.14159, 1e-30, 0.0, -2.5e-3):
        x = torch.full((200_000,), number)
        got = round_stochastically(x)
        nearest = x[:1].bfloat16()
        around = torch.tensor([-1, 0, 1], dtype=torch.int16)
        neighbours = (nearest.view(torch.int16) + around).view(torch.bfloat16)
        assert set(got.unique().tolist()) <= set(neighbours.tolist())
        if number == nearest.item():
            assert (got == nearest).all()
        else:
            gap = abs(neighbours[1] - neighbours[0]).item()
            assert got.double().mean().item() == pytest.approx(number, abs=0.01 * gap)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(round_stochastically(odd).isnan(), odd.isnan()) and round_stochastically(odd)[0] == float("inf")


def test_small_steps_are_not_lost_in_bf16():
    """1,000 steps of 1e-5 on weights of 1, whose neighbours are 0.004 and 0.008 away."""
    (ours,), (theirs,) = twins((64, 64), dtype=torch.bfloat16)
    for p in (ours, theirs):
        p.data.fill_(1.0)
    assert (
        share_too_small_to_move([ours], 1e-5) == 1 == share_too_small_to_move([theirs], 1e-3)
        and share_too_small_to_move([ours], 4e-3) == 0
    )
    mine, peer = AdamW([{"params": [ours]}], lr=1e-5, bits=8), torch.optim.AdamW([theirs], lr=1e-5, weight_decay=0)
    for _ in range(1000):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        mine.step(), peer.step()
    assert (theirs == 1).all() and ours.double().mean().item() == pytest.approx(0.99, abs=2e-4)


def test_muon_takes_the_matrices_of_the_blocks_and_makes_them_orthogonal(tmp_path):
    llama(tmp_path, std=0.1)
    model = load_model(tmp_path)
    muon, adam = make_optimizers(model, "muon", 1e-2, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {f"blocks.{i}.{n}.weight" for i in range(3) for n in (
        "attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
    assert {names[p] for group in adam.param_groups for p in group["params"]} == set(names.values()) - by_muon
    up = model.blocks[0].mlp.up.weight  # [112, 64]
    before = up.detach().clone()
    up.grad = torch.randn_like(up) @ torch.diag(torch.logspace(0, 1.5, 64))
    muon.step()
    lengths = torch.linalg.svdvals((before * (1 - 1e-2 * 0.1) - up) / (1e-2 * 0.2 * 112**0.5))
    assert 0.5 < lengths.min() and lengths.max() < 1.3


def test_the_state_on_the_host_steps_as_adamw():
    ours, theirs = twins((70, 65), (33,))
    mine, peer = (
        OffloadedAdamW([{"params": ours}], 1e-2, 0.1),
        torch.optim.AdamW(theirs, 1e-2, weight_decay=0.1, fused=True),
    )
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in ours]
    masters = [nn.Parameter(p.detach().float()) for p in narrow]
    half, whole = (
        OffloadedAdamW([{"params": narrow}], 1e-4),
        torch.optim.AdamW(masters, 1e-4, weight_decay=0, fused=True),
    )
    for step in range(20):
        give_gradients(step, ours, theirs, narrow, masters)
        for p, q in zip(masters, narrow, strict=True):
            p.grad = q.grad.float()
        for optimizer in (mine, peer, half, whole):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(narrow, masters, strict=True))


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("optimizers") / "base", std=0.1)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "numbers.json"
    file.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i} it is"} for i in range(60)]))
    return file


@pytest.mark.parametrize(
    "more, said",
    [
        (["--optimizer", "adamw8bit"], "AdamW with moments in 8 bits"),
        (["--optimizer", "muon"], "Muon on matrices"),
        (["--weights", "bf16"], "rounded up or down at random"),
        (["--weights", "bf16", "--optimizer", "adamw8bit"], "rounded up or down at random"),
        (
            ["--weights", "bf16", "--optimizer", "adamw8bit", "--lr", "1e-6"],
            "steps of --lr 1e-06 are too small for 100 %",
        ),
    ],
)
def test_full_fine_tuning_learns_with_each(base, numbers, tmp_path, monkeypatch, capsys, more, said):
    words = ["--model", base, "--data", numbers, "--method", "full", "--steps", 24, "--lr", "3e-3", "--out", tmp_path]
    out, _, code = command(train, monkeypatch, capsys, *words, *more)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["val_loss"] for line in lines if "val_loss" in line]
    assert code == 0 and said in out and found[-1] < found[0] - (-0.01 if "1e-6" in more else 0.5)
    weights = load_model(tmp_path / "final")
    assert weights.dtype == torch.float32 and all(bool(p.isfinite().all()) for p in weights.parameters())


def test_a_rate_that_moves_nothing_is_said(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--method", "full", "--steps", 1, "--lr", "1e-10", "--out", tmp_path]
    out, _, code = command(train, monkeypatch, capsys, *words)
    assert code == 0 and "steps of --lr 1e-10 are too small for" in out and "raise --lr" in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_can_hold_the_state(base, numbers, tmp_path, monkeypatch, capsys):
    words = ["--model", base, "--data", numbers, "--method", "full", "--steps", 24, "--lr", "3e-3", "--dtype", "fp32"]
    losses = []
    for name, more in (("there", ["--optimizer-offload"]), ("here", [])):
        _, _, code = command(train, monkeypatch, capsys, *words, *more, "--out", tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert code == 0
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0][-1] < losses[0][0] - 0.5


def bundled_losses(data: Dataset, folder, optimizer: str, method: str, seed: int, steps: int) -> list[float]:
    model = load_model(model_folder(None), torch.bfloat16 if method == "lora" else torch.float32)
    model.compute_dtype = torch.bfloat16
    if method == "lora":
        torch.manual_seed(seed)
        lora.add_lora(model, 8, 16.0)
    rate = 1.3e-3 if method == "lora" else 1.3e-4
    folder.mkdir()
    chosen = settings(steps=steps, lr=rate, warmup=1, optimizer=optimizer, method=method, seed=seed, batch_size=8)
    return run_loop(model, data, chosen, folder)


@pytest.mark.slow
def test_8_bits_follow_32_on_the_bundled_task(tmp_path):
    """Two curves of one order of the data, apart by less than other adapters to begin with make it."""
    data = load(BUNDLED_TASK["train"][:1], load_tokenizer(model_folder(None)), 512)
    data = data.take(np.argsort(data.lengths, kind="stable")[:100])  # quick ones
    wide, narrow = (bundled_losses(data, tmp_path / kind, kind, "lora", 0, 12) for kind in ("adamw", "adamw8bit"))
    assert wide[-1] < 0.5 * wide[0]
    assert narrow == pytest.approx(wide, rel=0.03)


@pytest.mark.slow
def test_8_bits_follow_32_in_full_fine_tuning_of_the_bundled_task(tmp_path):
    data = load(BUNDLED_TASK["train"][:1], load_tokenizer(model_folder(None)), 512)
    wide, narrow = (bundled_losses(data, tmp_path / kind, kind, "full", 0, 40) for kind in ("adamw", "adamw8bit"))
    other = bundled_losses(data, tmp_path / "other", "adamw", "full", 1, 40)
    tail = [sum(curve[-10:]) / 10 for curve in (wide, narrow, other)]
    assert tail[0] < 0.2 * wide[0] and abs(tail[1] - tail[0]) < max(abs(tail[2] - tail[0]), 0.05 * tail[0])


def test_training_imports_no_compiler(tmp_path, monkeypatch):
    """150 MB and a second of every start; a process of its own, for this one has it."""
    import subprocess
    import sys
    from pathlib import Path

    base = chat_base(tmp_path / "base", std=0.1)
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i}!"} for i in range(40)]))
    words = ["train.py", "--model", str(base), "--data", str(tmp_path / "data.json"), "--steps", "2"]
    code = f"""
import sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
sys.argv = {[*words, "--out", str(tmp_path / "run")]!r}
import train
train.main()
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "triton"))]
"""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
