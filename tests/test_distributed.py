"""1, 2 and 3 processes (gloo, CPU) compute the same run; shards take their share of memory; refusals."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.helpers import chat_base, command, llama
from support.runs import ROOT, data_words, lines, preferences, records, selected_parameters, torchrun
from support.training_runs import run_loop, settings

import checkpoint
import distributed
import lora
import train
from dataset.examples import Dataset, Example
from methods import load_trainable
from planning import multi_gpu as cluster
from planning.memory import Recipe, Workload, expected_memory, meta_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# name: (base, words; ACC: accumulate 2; worst relative difference of losses and norms, absolute one of final weights)
JOBS = {
    "full": ("llama", "--method full", 1e-5, 1e-4),
    "full, replicated": ("llama", "--method full --shard none", 1e-5, 1e-4),
    "full, accumulated": ("llama", "--method full --shard full ACC", 1e-5, 1e-4),
    "full, reduced each time": ("llama", "--method full --shard full ACC --reduce each", 1e-5, 1e-4),
    "full, blocks twice": ("llama", "--method full --shard full --activation-checkpointing full", 1e-5, 1e-4),
    "full, norms twice": ("llama", "--method full --shard full --activation-checkpointing selective", 1e-5, 1e-4),
    "full, some": ("llama", "--method full --shard full --train q_proj|layers.1", 1e-5, 1e-4),
    "full, tied": ("tied", "--method full --shard full", 1e-5, 1e-4),
    "full, packed, mixed": (
        "llama",
        "--method full --shard full --pack --seq-len 96 ACC MIXED",
        1e-5,
        1e-4,
    ),
    "lora, packed, mixed": ("llama", "--shard full --pack --seq-len 96 MIXED", 1e-5, 1e-4),
    "lora": ("llama", "--shard full --dropout 0.3 ACC", 1e-5, 1e-4),
    "lora, replicated": ("llama", "--shard none --dropout 0.3", 1e-5, 1e-4),
    "lora, going on": ("llama", "--shard full --adapter ADAPTER", 1e-5, 1e-4),
    "qlora": ("llama", "--method qlora --shard full ACC", 1e-5, 1e-4),
    "qlora, packed, mixed": ("llama", "--method qlora --shard full --pack --seq-len 96 MIXED", 1e-5, 1e-4),
    "qlora of a folder in NF4": ("nf4", "--method qlora --shard full", 1e-5, 1e-4),
    "qlora with head": ("llama", "--method qlora --quant nf4+head --shard full", 1e-5, 1e-4),
    "routed experts": ("mixtral", "--method full --shard full", 1e-2, 2e-2),  # the balance loss is a product of means
    "routed experts, lora": ("mixtral", "--shard full --dropout 0.2", 1e-2, 1e-2),
    "routed experts, stacked": (
        "mixtral",
        "--target-parameters mlp.experts.gate_up_proj,mlp.experts.down_proj --shard full",
        1e-2,
        1e-2,
    ),
    "gpt2": (
        "gpt2",
        "--method full --shard full",
        1e-5,
        1e-2,
    ),  # a bias of keys has no effect: its gradient is rounding
    "gpt2, qlora": ("gpt2", "--method qlora --shard full", 1e-5, 1e-4),
    "bottleneck": ("llama", "--method bottleneck --lr 3e-2 --placement houlsby --shard full ACC", 1e-5, 1e-4),
    "prompt-tuning": ("llama", "--method prompt-tuning --lr 0.3 --shard full --pack --seq-len 96 MIXED", 1e-5, 1e-4),
    "p-tuning": ("llama", "--method p-tuning --lr 3e-2 --encoder lstm --encoder-size 16 --shard full", 1e-5, 1e-4),
    "prefix-tuning": (
        "llama",
        "--method prefix-tuning --lr 3e-2 --quant nf4 --shard full --pack --seq-len 96",
        1e-5,
        1e-4,
    ),
    "prefix-tuning, blocks twice": (
        "llama",
        "--method prefix-tuning --lr 0.3 --encoder none --shard full --activation-checkpointing full",
        1e-5,
        1e-4,
    ),
    "dora": ("llama", "--dora --init pissa --lora-plus 4 --dropout 0.3 --shard full ACC", 1e-5, 1e-4),
    "qlora, dora": ("llama", "--method qlora --dora --rslora --shard full --pack --seq-len 96 MIXED", 1e-5, 1e-4),
    "loftq": ("llama", "--method qlora --init loftq --shard none", 1e-5, 1e-4),
    "vera": ("llama", "--method vera --lr 0.1 --rank 16 --shard full", 1e-5, 1e-4),
    "ia3": ("llama", "--method ia3 --lr 0.1 --shard full ACC", 1e-5, 1e-4),
    "new tokens": ("tied", "--add-tokens TOKENS --train-tokens <|im_end|> --shard full ACC", 1e-5, 1e-4),
    "new tokens, full": ("llama", "--method full --add-tokens TOKENS --shard full", 1e-5, 1e-4),
    "tables": ("llama", "--modules-to-save embed_tokens,lm_head --shard full --pack --seq-len 96", 1e-5, 1e-4),
    "tables, replicated": ("tied", "--modules-to-save embed_tokens --shard none MIXED", 1e-5, 1e-4),
    "ia3, replicated": ("llama", "--method ia3 --lr 0.1 --shard none --pack --seq-len 96 MIXED", 1e-5, 1e-4),
    "muon": ("llama", "--method full --optimizer muon --shard full", 1e-4, 1e-3),
    "adamw8bit": ("llama", "--method full --optimizer adamw8bit --shard full", 1e-3, 5e-3),
    "dft": ("llama", "--objective dft --neftune 5 --shard full ACC", 1e-4, 1e-4),
    "smoothed": ("llama", "--label-smoothing 0.1 --method full --shard full", 1e-5, 1e-4),
    "dpo": ("llama", "--objective dpo --dropout 0.3 --shard full --pack --seq-len 96 ACC PAIRS", 1e-5, 1e-4),
    "dpo, full": ("llama", "--objective dpo --method full --shard full PAIRS", 1e-5, 1e-4),
    "ipo": ("llama", "--objective ipo --shard none PAIRS", 1e-4, 1e-4),
    "kto": ("llama", "--objective kto --shard full ACC PAIRS", 1e-5, 1e-4),
    "orpo": ("llama", "--objective orpo --shard none --pack --seq-len 96 PAIRS", 1e-5, 1e-4),
    "simpo": ("llama", "--objective simpo --method full --shard full ACC PAIRS", 1e-5, 1e-4),
    "reward": ("llama", "--objective reward --shard full ACC PAIRS", 1e-5, 1e-4),
    "classify": ("tied", "--objective classify --method full --shard full CLASSES", 1e-5, 1e-4),
    "grpo": (
        "llama",
        "--objective grpo --beta 0.04 --group-size 4 --max-new-tokens 12 --shard none ACC QUESTIONS",
        1e-5,
        1e-4,
    ),
    "grpo, full": (
        "llama",
        "--objective grpo --method full --dr-grpo --max-new-tokens 12 --shard none --pack --seq-len 96 QUESTIONS",
        1e-5,
        1e-4,
    ),
    "distill": (
        "llama",
        "--objective distill --teacher TEACHER --method full --shard full --pack --seq-len 96 ACC MIXED",
        1e-5,
        1e-4,
    ),
    "distill, own answers": (
        "llama",
        "--objective distill --teacher self --own-answers --max-new-tokens 8 --shard none ACC",
        1e-5,
        1e-4,
    ),
    "bf16": ("llama", "--method full --shard full --dtype bf16", 2e-2, 1e-2),
    "bf16 weights": ("llama", "--method full --shard full --dtype bf16 --weights bf16", 5e-2, 1e-1),
}


BY_THREE = ("full", "lora", "qlora", "full, packed, mixed", "full, tied", "gpt2", "muon", "adamw8bit")
# The rest of the jobs, which differ less from one another, run with the slow tests alone.
SLOW_JOBS = (
    "lora, going on",
    "muon",
    "gpt2",
    "kto",
    "full, replicated",
    "full, accumulated",
    "full, blocks twice",
    "qlora of a folder in NF4",
    "vera",
    "dft",
    "full, reduced each time",
    "full, norms twice",
    "full, some",
    "qlora, packed, mixed",
    "qlora with head",
    "routed experts, lora",
    "gpt2, qlora",
    "bf16",
    "prefix-tuning, blocks twice",
    "ia3, replicated",
    "qlora, dora",
    "tables, replicated",
    "new tokens, full",
    "tables",
    "loftq",
    "p-tuning",
    "ia3",
    "smoothed",
    "dpo, full",
    "ipo",
    "orpo",
    "simpo",
    "classify",
    "grpo, full",
    "distill, own answers",
)
SLOW_BY_THREE = ("full, tied", "gpt2", "muon", "adamw8bit")
COMPARED = [
    *(pytest.param(name, 2, marks=[pytest.mark.slow] * (name in SLOW_JOBS)) for name in JOBS),
    *(pytest.param(name, 3, marks=[pytest.mark.slow] * (name in SLOW_BY_THREE)) for name in BY_THREE),
]
USED_BY_OTHERS = ("full", "lora", "lora, packed, mixed")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    found = {
        "llama": chat_base(folder / "llama", num_key_value_heads=2),
        "tied": chat_base(folder / "tied", tie_word_embeddings=True),
        "teacher": chat_base(folder / "teacher", num_hidden_layers=1, seed=7),
    }
    size = json.loads((found["llama"] / "config.json").read_text())["vocab_size"]
    common = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    mixtral = transformers.MixtralConfig(
        **common, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(**common, n_embd=64, n_layer=2, n_head=4, n_positions=512)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512} | common
    mistral = transformers.MistralConfig(**small, sliding_window=24)
    gemma2 = transformers.Gemma2Config(**small, sliding_window=24, attn_logit_softcapping=5.0, query_pre_attn_scalar=16)
    for name, config in {"mixtral": mixtral, "gpt2": gpt2, "mistral": mistral, "gemma2": gemma2}.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
        model.save_pretrained(folder / name)
        for file in TOKENIZER:
            shutil.copy(found["llama"] / file, folder / name / file)
        found[name] = folder / name
    line = [sys.executable, "convert.py", "to-nf4", str(found["llama"]), str(folder / "nf4")]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    return found | {"nf4": folder / "nf4"}


@pytest.fixture(scope="module")
def runs(request, bases, tmp_path_factory) -> Path:
    """The jobs of the tests at hand by 1, 2 and 3 processes, in NAME/PROCESSES."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = selected_parameters(request, "name", "processes")
    wanted |= {(name, count) for name, _ in wanted for count in (1, 2)} | {(name, 1) for name in USED_BY_OTHERS}
    data, more, val = (records(folder / f"{name}.jsonl", n, seed) for name, n, seed in
                       (("data", 50, 0), ("more", 20, 200), ("val", 9, 500)))  # fmt: skip
    preferences(folder / "pairs.jsonl", 50, 0)
    preferences(folder / "val-pairs.jsonl", 9, 500)
    (folder / "tokens.txt").write_text("fox jumps\nnever a\n12 7\n")
    first = ["--model", bases["llama"], "--data", data, "--val", val, "--steps", 2, "--rank", 4, "--dtype", "fp32"]
    subprocess.run(
        list(map(str, [sys.executable, "train.py", *first, "--out", folder / "adapter"])), cwd=ROOT, check=True
    )
    for processes in (1, 2, 3):
        jobs = []
        for name, (base, words, _, _) in JOBS.items():
            if (name, processes) not in wanted:
                continue
            batch = 12 // processes // (2 if "ACC" in words.split() else 1)
            words = words.replace("ACC", "--accumulate 2").replace("ADAPTER", str(folder / "adapter/final"))
            words = words.replace("TEACHER", str(bases["teacher"]))
            words = words.replace("TOKENS", str(folder / "tokens.txt")).split()
            mixed = [f"{data}=3", f"{more}=1", "--replay", f"{val}=0.2"] if "MIXED" in words else [data]
            words = ["--val", val, *data_words([word for word in words if word != "MIXED"], folder, mixed)]
            has_rank = "--method" not in words or "qlora" in words
            given = {"--rank": 4} if has_rank and "--adapter" not in words else {}
            given |= {"--lr": 1e-3, "--dtype": "fp32"}
            words += [word for flag, value in given.items() if flag not in words for word in (flag, value)]
            jobs.append(
                ["--model", bases[base], "--batch-size", batch, "--steps", 6, *words]
                + ["--out", folder / name / str(processes)]
            )
        if jobs:
            torchrun(processes, "tests/support/run_jobs.py", json.dumps(jobs, default=str))
    return folder


@pytest.mark.parametrize("name, processes", COMPARED)
def test_as_many_processes_compute_what_one_does(runs, name, processes):
    _, words, loss, weight = JOBS[name]
    one, several = lines(runs / name / "1"), lines(runs / name / str(processes))
    assert [line["step"] for line in several] == [line["step"] for line in one] and len(one) > 9
    for a, b in zip(one, several, strict=True):
        assert a.keys() == b.keys()
        measured = {"loss", "val_loss", "replay_loss", "replay_val_loss", "balance_loss", "grad_norm"}
        for key in a.keys() & {"margin", "val_margin", "logp_chosen", "accuracy", "kl"}:
            # Differences of log-probabilities that are sums over an answer.
            assert b[key] == pytest.approx(a[key], rel=100 * loss, abs=100 * loss), (a["step"], key)
        for key in a.keys() & measured:
            assert b[key] == pytest.approx(a[key], rel=loss * (10 if key == "grad_norm" else 1)), (a["step"], key)
        assert all(a[key] == b[key] for key in a.keys() & {"tokens", "trained_tokens", "lr"})
        # A distance grows with the square of what moves the weights.
        rel = max(1e-3, 4 * loss)
        assert b.get("kl_base", 0.0) == pytest.approx(a.get("kl_base", 0.0), rel=rel, abs=1e-5)
    # A score head leaves no distance to measure, and prompts have no tokens to measure it on.
    assert max(line.get("kl_base", 1.0) for line in one) > 1e-3
    if "MIXED" in words:
        assert any("replay_loss" in line for line in one)
    (file,) = (runs / name / "1" / "final").glob("*.safetensors")
    mine, theirs = load_file(file), load_file(runs / name / str(processes) / "final" / file.name)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype
        assert float((tensor.float() - theirs[key].float()).abs().max()) < weight, key
    assert {f.name for f in file.parent.iterdir()} == {f.name for f in (runs / name / "2" / "final").iterdir()}


def test_the_jobs_moved_the_weights_by_far_more_than_they_differ(runs):
    for run in runs.glob("*/1"):
        losses = [line["loss"] for line in lines(run) if "loss" in line]
        # The losses of KTO and DFT are below 1.
        assert max(losses) - min(losses) > min(0.05, 0.02 * max(losses)), run


def test_dropout_is_there_and_follows_the_seed(runs):
    plain = [line["loss"] for line in lines(runs / "lora, packed, mixed" / "1") if "loss" in line]
    dropped = [line["loss"] for line in lines(runs / "lora" / "1") if "loss" in line]
    assert plain[0] != pytest.approx(dropped[0], rel=1e-3)


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow), "qlora"])
def test_a_rank_of_two_holds_and_reads_half(bases, tmp_path, method):
    """Bytes of parameters, gradients and optimizer at their height, and how much memory loading takes."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 2048}
    llama(tmp_path / "base", std=0.05, dtype=torch.bfloat16, **sizes)  # 45 MB
    torchrun(2, "tests/support/count_bytes.py", method, tmp_path / "base", tmp_path / "held")
    two = [json.loads(Path(f"{tmp_path / 'held'}.{rank}").read_text()) for rank in range(2)]
    # and what `--plan --gpus` says of it: every part, and what a step sends
    adapter = {"rank": 16, "alpha": 16.0, "dropout": 0.0, "targets": "all"}
    setup, layout = Recipe(method), cluster.Layout(2, 2)
    model = meta_model(checkpoint.read_config(tmp_path / "base"), setup, torch.bfloat16, adapter)
    memory = cluster.memory_per_process(model, setup, layout, Workload([80], 60, 1.0, [20], 80, 60, 1))
    sent = sum(cluster.traffic(model, setup, layout, 1))
    one = expected_memory(model, setup, [80], 60, "cpu", 1)
    stored = (tmp_path / "base" / "model.safetensors").stat().st_size
    for rank in two:
        assert rank["parameters"] <= 0.6 * one.weights and rank["gradients"] <= 0.6 * one.gradients
        assert rank["optimizer"] <= 0.6 * one.optimizer
        # what it keeps, half of the file's pages, and what is imported meanwhile
        assert rank["loading"] <= rank["parameters"] + 0.5 * stored + (20e6 if method == "full" else 45e6)
        assert rank["parameters"] == pytest.approx(memory.weights, rel=0.1)
        assert rank["gradients"] == pytest.approx(memory.gradients, rel=0.1)
        assert rank["optimizer"] == pytest.approx(memory.optimizer, rel=0.1)
        assert rank["gathered"] + rank["scattered"] == pytest.approx(sent, rel=0.1)


def test_deal_gives_each_as_many_rows_and_about_as_many_tokens():
    sizes = torch.randint(5, 500, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    for hands in (1, 2, 3, 8):
        dealt = distributed.balance_across_ranks(sizes, hands)
        assert sorted(i for hand in dealt for i in hand) == list(range(96))
        assert {len(hand) for hand in dealt} == {96 // hands}
        tokens = [sum(sizes[i] for i in hand) for hand in dealt]
        assert max(tokens) < 1.05 * min(tokens)
    assert [len(hand) for hand in distributed.balance_across_ranks([4, 4, 4, 4], 3)] == [1, 1, 2]
    assert distributed.balance_across_ranks([7], 2) == [[0], []]


def test_hybrid_is_refused_on_one_node_and_offload_without_shards(bases, tmp_path, monkeypatch, capsys):
    data = records(tmp_path / "data.jsonl", 20, 0)
    words = ["--model", bases["llama"], "--data", data, "--out", tmp_path / "out"]
    _, err, code = command(train, monkeypatch, capsys, *words, "--shard", "hybrid")
    distributed.destroy_process_group()
    assert code == 2 and "--shard hybrid" in err and "one node" in err
    _, err, code = command(train, monkeypatch, capsys, *words, "--shard", "none", "--shard-offload")
    assert code == 2 and "--shard-offload" in err
    assert not (tmp_path / "out").exists()


def test_two_nodes_of_one_process_hold_a_copy_each(runs, bases, tmp_path):
    """--shard hybrid, the nodes being processes that believe to be alone on theirs."""
    job = ["--model", bases["llama"], "--val", runs / "val.jsonl", "--batch-size", 6, "--steps", 6, "--method", "full"]
    job += [
        "--data",
        runs / "data.jsonl",
        "--lr",
        1e-3,
        "--dtype",
        "fp32",
        "--shard",
        "hybrid",
        "--out",
        tmp_path / "o",
    ]
    torchrun(2, "tests/support/run_jobs.py", json.dumps([job], default=str), NODES="2")
    losses = lambda run: [line["loss"] for line in lines(run) if "loss" in line]
    assert losses(tmp_path / "o") == pytest.approx(losses(runs / "full" / "1"), rel=1e-5)


CONTEXT = {  # name: base, words, processes, of which so many share a batch
    "full, packed, mixed": ("llama", "--method full --shard full --pack --seq-len 96 MIXED", 2, 2),
    "lora, dropout": ("llama", "--shard none --dropout 0.3", 2, 2),
    "lora, dropout, two times two": ("llama", "--shard full --dropout 0.3", 4, 2),
    "qlora, blocks twice": ("llama", "--method qlora --shard full --activation-checkpointing full", 2, 2),
    "windows": ("mistral", "--method full --shard full", 2, 2),
    "soft-caps": ("gemma2", "--method full --shard full", 2, 2),
    "learned positions": ("gpt2", "--method full --shard full", 2, 2),
}


SLOW_CONTEXT = ("lora, dropout, two times two", "qlora, blocks twice")


@pytest.fixture(scope="module")
def context_runs(request, bases, runs, tmp_path_factory) -> Path:
    """The jobs of the tests at hand, in NAME/one by one process and in NAME/several by those that share a batch."""
    folder, jobs = tmp_path_factory.mktemp("context"), {}
    wanted = {name for (name,) in selected_parameters(request, "name")}
    data, more, val = (runs / f"{name}.jsonl" for name in ("data", "more", "val"))
    for name, (base, words, processes, together) in CONTEXT.items():
        if name not in wanted:
            continue
        words = words.split()
        mixed = [f"{data}=3", f"{more}=1", "--replay", f"{val}=0.2"] if "MIXED" in words else [data]
        words = [word for word in words if word != "MIXED"] + ["--rank", 4] * ("full" not in words[:2])
        words += ["--model", bases[base], "--val", val, "--data", *mixed, "--steps", 4, "--lr", 1e-3, "--dtype", "fp32"]
        shared = ["--context-parallel", together, "--batch-size", 12 * together // processes]
        jobs.setdefault(processes, []).append([*words, *shared, "--out", folder / name / "several"])
        jobs.setdefault(1, []).append([*words, "--batch-size", 12, "--out", folder / name / "one"])
    for processes, listed in jobs.items():
        said = torchrun(processes, "tests/support/run_jobs.py", json.dumps(listed, default=str))
        assert processes == 1 or "share each batch's tokens (experimental)" in said
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_CONTEXT)) for name in CONTEXT]
)
def test_processes_that_share_a_batch_compute_what_one_does(context_runs, name):
    one, several = (lines(context_runs / name / which) for which in ("one", "several"))
    assert len(one) == len(several) > 4
    for a, b in zip(one, several, strict=True):
        for key in a.keys() & {"loss", "val_loss", "replay_loss", "replay_val_loss", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4 if key == "grad_norm" else 1e-5), (a["step"], key)
        assert all(a[key] == b[key] for key in a.keys() & {"tokens", "trained_tokens"})
    (file,) = (context_runs / name / "one" / "final").glob("*.safetensors")
    mine, theirs = load_file(file), load_file(context_runs / name / "several" / "final" / file.name)
    assert all(float((mine[key] - theirs[key]).abs().max()) < (1e-2 if "bias" in key else 2e-4) for key in mine)


def test_what_can_not_share_a_batch_is_refused(bases, runs, tmp_path, monkeypatch, capsys):
    words = [
        "--model",
        bases["mixtral"],
        "--data",
        runs / "data.jsonl",
        "--out",
        tmp_path / "o",
        "--context-parallel",
        2,
    ]
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "--context-parallel 2: 1, the number of processes, is not a multiple" in err
    said = torchrun(2, "train.py", *words, code=1)
    assert "not with routed experts" in said and 'train.py", line' not in said


@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit(3)", 3), ("sys.exit()", 0)])
def test_a_rank_ends_before_python_takes_its_objects_apart(tmp_path, end, code):
    """A thread of gloo that frees a tensor then would abort the process, as this object does."""
    script = tmp_path / "ends.py"
    lines = f"""
        import atexit, os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import distributed, torch
        class Held:
            def __del__(self):
                os.abort()
        distributed.held = Held()
        atexit.register(lambda: open({str(tmp_path)!r} + '/' + os.environ.get('RANK', 'alone'), 'w'))
        with distributed.safe_exit():
            distributed.init_distributed(torch.device('cpu'))
            # A rank that ends while the other one is still connecting breaks the connection.
            if 'RANK' in os.environ:
                torch.distributed.barrier()
            print('buffered')
            {end}
        print('alone')
        Held.__del__ = lambda self: None
    """
    script.write_text(textwrap.dedent(lines))
    said = torchrun(2, script, code=1 if code else 0)
    assert "buffered" in said and "alone" not in said and "SIGABRT" not in said
    assert f"exitcode  : {code}" in said or not code
    assert (tmp_path / "0").exists() or (tmp_path / "1").exists()
    if not code and not end:
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["buffered", "alone"]


@pytest.mark.parametrize("way", ["shards on the host", "the optimizer's state on the host"])
def test_offloaded_shards_train_as_they_do_on_the_device(bases, tmp_path, way):
    rng, found = torch.Generator().manual_seed(0), []
    ids = torch.randint(0, 300, (12, 20), generator=rng).tolist()
    data = Dataset([Example(row, [False] * 5 + [True] * 15) for row in ids])
    for offload in (False, True):
        shards = offload and way == "shards on the host"
        chosen = settings(method="full", lr=1e-3, steps=5, warmup=0, weight_decay=0.1, batch_size=6, shard="full",
                          dtype="fp32", shard_offload=shards, optimizer_offload=offload and not shards)  # fmt: skip
        device = distributed.init_distributed(torch.device("cpu"))
        model = load_trainable(chosen, bases["llama"], device)
        assert distributed.has_shards(model)
        found.append(run_loop(model, data, chosen, tmp_path, device))
        distributed.destroy_process_group()
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0][-1] < found[0][0] - 0.5


def test_adapters_in_shards_begin_as_others_do_whatever_is_named_first(bases):
    found = []
    for shard, targets in (("none", "v_proj,q_proj"), ("full", "v_proj,q_proj"), ("none", "q_proj,v_proj")):
        chosen = settings(rank=4, alpha=16.0, dropout=0.0, targets=targets, shard=shard, dtype="fp32")
        device = distributed.init_distributed(torch.device("cpu"))
        model = load_trainable(chosen, bases["llama"], device)
        found.append(
            {name: distributed.full_tensor(layer.lora_A.detach()) for name, layer in lora.lora_layers(model).items()}
        )
        assert [layer.number for layer in lora.lora_layers(model).values()] == list(range(6))
        distributed.destroy_process_group()
    for other in found[1:]:
        assert found[0].keys() == other.keys() and all(torch.equal(found[0][name], other[name]) for name in other)
