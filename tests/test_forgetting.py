"""The gauge of every run (KL(base || tuned) at each validation), --forget-limit, and `evaluate.py compare`."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from support.helpers import chat_base, command, llama, sentence
from support.runs import lines, records
from torch.utils._python_dispatch import TorchDispatchMode

import data
import distributed
import evaluate
import train
from checkpoint import load_model
from dataset.examples import Dataset, Example
from evals import bootstrap, compare, forgetting, targets
from evals.answers import Answers
from flags import Flags
from lora import add_lora, load_adapter, lora_layers
from methods import METHODS, model_of_step_0
from tokenizer import load_tokenizer
from training import checkpointer, defaults
from training.state import TrainState


def random_heads(seed: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of a base and a tuned model, and a soft-cap or none."""
    generator = torch.Generator().manual_seed(seed)
    count, width, vocabulary = (int(torch.randint(1, n, (), generator=generator)) for n in (40, 20, 90))
    spread = 3 * torch.rand((), generator=generator)
    parts = [torch.randn(n, width, generator=generator) for n in (count, count, vocabulary, vocabulary)]
    hidden, change, head, head_change = parts
    softcap = 4.0 if seed % 3 == 0 else None
    tuned_head = head if seed % 2 else head + 0.3 * head_change
    return hidden, hidden + spread * change, head, tuned_head, softcap


def oracle_divergence(base_hidden, hidden, base_head, head, softcap) -> float:
    """The same by torch's own divergence in float64, all logits at once."""
    logits = [base_hidden.double() @ base_head.double().T, hidden.double() @ head.double().T]
    if softcap:
        logits = [softcap * torch.tanh(each / softcap) for each in logits]
    base, tuned = (each.log_softmax(-1) for each in logits)
    return float(torch.nn.functional.kl_div(tuned, base, reduction="batchmean", log_target=True))


# ---- the arithmetic ----


def test_the_divergence_equals_torch_s_in_float64_on_200_random_models(monkeypatch):
    for seed in range(200):
        # Chunks of one row, of a few, of all.
        monkeypatch.setitem(forgetting.CHUNK_NUMBERS, "cpu", (1, 150, 1 << 22)[seed % 3])
        case = random_heads(seed)
        assert forgetting.mean_divergence(*case) == pytest.approx(oracle_divergence(*case), rel=1e-4, abs=1e-6), seed


def test_equal_models_have_no_divergence_and_bf16_is_near_fp32():
    hidden, tuned, head, _, _ = random_heads(1)
    assert forgetting.mean_divergence(hidden, hidden.clone(), head, head.clone()) == 0.0
    exact = forgetting.mean_divergence(hidden, tuned, head, head)
    rounded = forgetting.mean_divergence(hidden.bfloat16(), tuned.bfloat16(), head, head)
    assert rounded == pytest.approx(exact, rel=0.05)


def test_no_tensor_holds_the_logits_of_all_rows(monkeypatch):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            out = function(*arguments, **(settings or {}))
            if torch.is_tensor(out):
                self.size = max(self.size, out.numel())
            return out

    monkeypatch.setitem(forgetting.CHUNK_NUMBERS, "cpu", 4 * 300)
    hidden = torch.randn(64, 8)
    head = torch.randn(300, 8)
    with Largest() as largest:
        forgetting.mean_divergence(hidden, hidden + 0.1, head, head)
    assert largest.size == max(4 * 300, head.numel())


def dataset_of(lengths: list[int], prompts: list[int]) -> Dataset:
    examples = []
    for i, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        examples.append(Example([i] * length, [True] * length, f"row {i}", prompt))
    return Dataset(examples)


def chosen(dataset: Dataset, count: int) -> list[tuple[int, int]]:
    """(number of the example, tokens of it) of what is measured."""
    return [(example.ids[0], len(example.ids)) for example in forgetting.fixed_examples(dataset, count).examples]


def test_the_fixed_tokens_are_whole_examples_by_their_hash_then_beginnings_of_long_ones():
    dataset = dataset_of([100, 2000, 100, 100, 900], [5, 1, 4, 3, 2])
    assert chosen(dataset, 250) == [(3, 100), (2, 100), (0, 50)]  # the last one is cut to what is left
    assert chosen(dataset, 700) == [(3, 100), (2, 100), (0, 100), (1, 256), (4, 144)]
    assert sum(size for _, size in chosen(dataset, 2048)) == 3 * 100 + 2 * 512  # a quarter each
    assert chosen(dataset, 101) == [(3, 100)]  # a single token is no text
    assert chosen(dataset_of([3, 4], [2, 1]), 64) == [(1, 4), (0, 3)]
    assert chosen(dataset, 0) == []


def flags_of(steps: int, eval_every: int, **more) -> Flags:
    return Flags(steps=steps, eval_every=eval_every, **more)


class Sampled:
    """A sampler of epochs of so many tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def epoch_tokens(self) -> int:
        return self.tokens


def test_the_number_of_tokens_takes_two_percent_of_the_training_at_most():
    val = dataset_of([100] * 50, list(range(50)))

    def count(tokens: int, eval_every: int) -> tuple[int, str]:
        training = data.TrainingData(val, val, None, Sampled(tokens), 512, None, False)
        return defaults.choose_gauge_tokens(flags_of(100, eval_every), training, 50)

    # Twice the epoch's tokens go through 100 steps of 50 an epoch; six validations.
    assert count(150_000, 20) == (1000, "about 2 % of the training's time")
    assert count(10_000_000, 20) == (2048, "under 2 % of the training's time")
    assert count(30_000, 0)[0] == 1200
    assert count(480, 20) == (64, "about 40 % of the training's time; fewer would say little")
    empty = val.take(np.zeros(50, bool))
    training = data.TrainingData(val, empty, None, Sampled(1), 512, None, False)
    assert defaults.choose_gauge_tokens(flags_of(100, 20), training, 50) == (0, "off: nothing validates")


# ---- the base is the model of step 0, to the bit ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, quant",
    [
        ({"attention_bias": True, "mlp_bias": True}, None),
        ({"attention_bias": True, "mlp_bias": True}, "nf4+head"),
        ({"tie_word_embeddings": True}, None),
        ({"tie_word_embeddings": True}, "nf4"),
    ],
)
def test_with_the_adapter_off_the_logits_are_those_of_step_0_to_the_bit(tmp_path, shape, quant, dtype):
    llama(tmp_path, **shape)
    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    settings = Flags(method="lora", quant=quant)
    model = load_model(tmp_path, dtype, quant=quant)
    with torch.no_grad():
        base = model(tokens)
        add_lora(model, rank=4, alpha=8)
        assert torch.equal(model(tokens), base)
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0, 0.3)
        tuned = model(tokens)
        assert not torch.equal(tuned, base)
        with model_of_step_0(model, settings):
            assert torch.equal(model(tokens), base)
        assert torch.equal(model(tokens), tuned)


def test_only_an_adapter_that_began_at_nothing_can_be_switched_off(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    switched_off = [name for name, row in METHODS.items() if row.switched_off]
    assert switched_off == ["lora", "qlora", "vera", "bottleneck", "ia3"]
    assert model_of_step_0(model, Flags(method="full")) is None
    assert model_of_step_0(model, Flags(method="lora", adapter="some/adapter")) is None
    # Also when it is resumed.
    assert model_of_step_0(model, Flags(method="lora", adapter="some/adapter", resume="on")) is None


# ---- runs ----


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """words(more): the flags of a job of 12 steps that validates every 4."""
    folder = tmp_path_factory.mktemp("job")
    base = chat_base(folder / "base", num_key_value_heads=2)
    files = {name: records(folder / f"{name}.jsonl", n, seed) for name, n, seed in (("data", 40, 0), ("val", 9, 500))}

    def words(*more) -> list[str]:
        common = ["--model", base, "--data", files["data"], "--steps", 12, "--eval-every", 4, "--dtype", "fp32"]
        val = [] if "--val-fraction" in more else ["--val", files["val"]]
        return list(map(str, [*common, *val, "--compile", "off", *more]))

    words.base = base
    words.files = files
    return words


def trained(monkeypatch, capsys, *words) -> str:
    out, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 0, err
    return out


def gauge_of(run: Path) -> dict[int, float]:
    """{step: KL(base || tuned)} of the validations."""
    return {line["step"]: line["kl_base"] for line in lines(run) if "kl_base" in line}


def divergence_of(base, tuned, tokenizer, files: dict, count: int) -> float:
    """KL(base || tuned) on the fixed tokens, by the logits of two models that are loaded from files, in float64."""
    val = data.load([files["val"]], tokenizer, 512, print_fn=lambda line: None)
    total = tokens = 0
    with torch.no_grad():
        for example in forgetting.fixed_examples(val, count).examples:
            ids = torch.tensor(np.asarray(example.ids, np.int64))[None]
            first, second = (model(ids)[0].double().log_softmax(-1) for model in (base, tuned))
            total += float((first.exp() * (first - second)).sum())
            tokens += ids.numel()
    assert tokens == count
    return total / tokens


@pytest.mark.parametrize("method", ["lora", "full", "continued", "head alone"])
def test_a_run_s_gauge_is_the_divergence_of_its_result_from_its_base(job, tmp_path, monkeypatch, capsys, method):
    """Where the adapter can be switched off, nothing is written; else what the base's head is given."""
    base = load_model(job.base)
    more = {"lora": ["--rank", 4], "full": ["--method", "full", "--lr", 1e-3]}
    more["head alone"] = [*more["full"], "--train", "lm_head"]
    if method == "continued":
        trained(monkeypatch, capsys, *job("--rank", 4, "--steps", 3, "--out", tmp_path / "first"))
        load_adapter(base, tmp_path / "first/final")
        more["continued"] = ["--adapter", tmp_path / "first/final"]
    said = trained(monkeypatch, capsys, *job(*more[method], "--out", tmp_path / "run"))
    found = gauge_of(tmp_path / "run")
    assert [*found] == [0, 4, 8, 12] and found[0] == 0.0
    assert "step    12: validation loss" in said and f", KL to the base {found[12]:.4f}" in said
    assert "64 tokens of 2 validation examples" in said
    assert f"gauge     KL(base || tuned) {found[12]:.4f} nats a token on 64 validation tokens" in said

    final = tmp_path / "run/final"
    is_adapter = method in ("lora", "continued")
    tuned = load_model(job.base if is_adapter else final)
    if is_adapter:
        load_adapter(tuned, final)
    expected = divergence_of(base, tuned, load_tokenizer(job.base), job.files, 64)
    assert expected > 1e-3 and found[12] == pytest.approx(expected, rel=1e-3)
    file = tmp_path / "run/gauge.safetensors"
    sizes = {"lora": None, "continued": 64 * 64 * 4 + 64 * 8}
    sizes["full"] = sizes["head alone"] = sizes["continued"] + 4 * base.head_weight().numel()
    if sizes[method] is None:
        assert not file.exists() and "the base is the model without its adapter" in said
    else:
        assert sizes[method] < file.stat().st_size < sizes[method] + 500
        assert "the base is the model before step 1, of which gauge.safetensors keeps" in said


def test_the_gauge_of_a_resumed_run_measures_the_same_tokens(job, tmp_path, monkeypatch, capsys):
    """Whatever --eval-every and --val-limit are now, and with more steps."""
    words = job("--method", "full", "--lr", 1e-3, "--save-every", 4, "--keep", 9)
    trained(monkeypatch, capsys, *words, "--out", tmp_path / "run")
    before = gauge_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoints/step-12")
    resumed = ["--out", tmp_path / "run", "--resume"]
    said = trained(monkeypatch, capsys, *resumed, "--eval-every", 2, "--val-limit", 3)
    after = gauge_of(tmp_path / "run")
    assert [*after] == [0, 4, 8, 10, 12] and after[12] == before[12]
    assert "the base is what gauge.safetensors holds" in said


@pytest.mark.parametrize("damage", ["missing", "cut", "of another run"])
def test_without_the_base_s_numbers_a_resumed_run_has_no_gauge_and_says_so(job, tmp_path, monkeypatch, capsys, damage):
    words = job("--method", "full", "--save-every", 4, "--keep", 9, "--forget-limit", 9)
    trained(monkeypatch, capsys, *words, "--out", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoints/step-12")
    file = tmp_path / "run/gauge.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        tensors["tokens"][0] += 1
        save_file(tensors, file)
    said = trained(monkeypatch, capsys, "--out", tmp_path / "run", "--resume")
    problem = "is of other tokens" if damage == "of another run" else "is missing or damaged"
    assert f"gauge     off: {file} {problem}" in said
    assert [*gauge_of(tmp_path / "run")] == [0, 4, 8]
    assert [line["step"] for line in lines(tmp_path / "run") if "val_loss" in line] == [0, 4, 8, 12]


def test_a_disk_that_is_full_costs_the_file_and_not_the_run(job, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.gauge.save_tensors", full)
    said = trained(monkeypatch, capsys, *job("--method", "full", "--out", tmp_path / "run"))
    assert "in memory alone" in said and "if this run is resumed, the gauge will be off" in said
    assert [*gauge_of(tmp_path / "run")] == [0, 4, 8, 12]


def test_the_other_processes_wait_longer_for_the_disk_than_for_a_step(job, tmp_path, monkeypatch, capsys):
    """A full-disk test of two processes failed where the disk was slow: --timeout was over before it had answered."""
    limits = []
    monkeypatch.setattr(distributed, "set_pg_timeouts", limits.append)
    writing = []

    def slow(*_):
        writing.append(limits[-1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.gauge.save_tensors", slow)
    trained(monkeypatch, capsys, *job("--method", "full", "--timeout", 5, "--out", tmp_path / "run"))
    assert writing == [distributed.SAVE_TIMEOUT] and distributed.SAVE_TIMEOUT.total_seconds() > 5


def test_where_nothing_validates_the_gauge_is_off_and_a_limit_is_refused(job, tmp_path, monkeypatch, capsys):
    words = job("--val-fraction", 0, "--out", tmp_path / "run")
    assert "gauge     off: nothing validates" in trained(monkeypatch, capsys, *words)
    assert gauge_of(tmp_path / "run") == {}
    words = job("--val-fraction", 0, "--forget-limit", 1, "--out", tmp_path / "other")
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "--forget-limit chooses among validations, and --val-fraction 0 has none" in err
    # One prompt alone is not held out.
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "the fox", "completion": "runs"}\n' * 3)
    words = ["--model", job.base, "--data", one, "--forget-limit", 1, "--out", tmp_path / "other"]
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and "KL(base || tuned) can't be measured, nothing validates; give --val FILE" in err
    assert not (tmp_path / "other").exists()
    for value in ("0", "-1", "nan"):
        _, err, code = command(train, monkeypatch, capsys, *job("--forget-limit", value))
        assert code == 2 and "--forget-limit" in err


def test_best_is_the_best_under_the_limit(job, tmp_path, monkeypatch, capsys):
    words = job("--rank", 4, "--save-every", 4, "--keep", 1, "--schedule", "constant")
    trained(monkeypatch, capsys, *words, "--out", tmp_path / "free")
    losses = {line["step"]: line["val_loss"] for line in lines(tmp_path / "free") if "val_loss" in line}
    gauge = gauge_of(tmp_path / "free")
    # The run learns all the time, and gets away from its base: without a limit the end is the best.
    assert losses[12] < losses[8] < losses[4] < losses[0] and gauge[4] < gauge[8] < gauge[12]
    limit = (gauge[4] + gauge[8]) / 2

    said = trained(monkeypatch, capsys, *words, "--forget-limit", limit, "--out", tmp_path / "run")
    assert gauge_of(tmp_path / "run") == gauge
    assert f"KL to the base {gauge[8]:.4f}, not under --forget-limit {limit:g}" in said
    assert (
        f"best/ is the best under --forget-limit {limit:g}: validation loss {losses[4]:.4f}, KL to the base"
        f" {gauge[4]:.4f} nats a token; final/ {losses[12]:.4f} and {gauge[12]:.4f}"
    ) in said
    assert said.rstrip().endswith(f"--adapter {tmp_path / 'run/best'}")
    best = load_model(job.base)
    load_adapter(best, tmp_path / "run/best")
    base = load_model(job.base)
    found = divergence_of(base, best, load_tokenizer(job.base), job.files, 64)
    assert found == pytest.approx(gauge[4], rel=1e-3)
    # The checkpoint that stays besides the newest is the best one under the limit.
    kept = [folder.name for folder in checkpointer.list_checkpoints(tmp_path / "run/checkpoints")]
    assert kept == ["step-4", "step-12"]

    said = trained(monkeypatch, capsys, *words, "--forget-limit", gauge[4] / 2, "--out", tmp_path / "none")
    assert f"no validation was under --forget-limit {gauge[4] / 2:g}, so there is no best/" in said
    assert f"the lowest KL to the base was {gauge[4]:.4f} nats a token" in said
    assert not (tmp_path / "none/best").exists()
    assert said.rstrip().endswith(f"--adapter {tmp_path / 'none/final'}")


def test_validations_over_the_limit_count_for_patience(job, tmp_path, monkeypatch, capsys):
    words = job("--rank", 4, "--eval-every", 1, "--forget-limit", 1e-6, "--patience", 2, "--out", tmp_path / "run")
    said = trained(monkeypatch, capsys, *words)
    assert [*gauge_of(tmp_path / "run")] == [0, 1, 2]
    assert "2 validations without a new best (--patience)" in said


def test_the_gauge_changes_no_number_of_the_training(job, tmp_path, monkeypatch, capsys):
    """The run with dropout and with no gauge at all."""
    words = job("--rank", 4, "--dropout", 0.3)
    trained(monkeypatch, capsys, *words, "--out", tmp_path / "with")
    monkeypatch.setattr(defaults, "choose_gauge_tokens", lambda *_: (0, "off"))
    trained(monkeypatch, capsys, *words, "--out", tmp_path / "without")
    runs = []
    for name in ("with", "without"):
        keys = ("step", "loss", "val_loss", "grad_norm")
        runs.append([[line.get(key) for key in keys] for line in lines(tmp_path / name)])
    assert runs[0] == runs[1] and len(runs[0]) == 16
    files = [(tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]


def test_a_state_keeps_what_the_gauge_has_found():
    state = TrainState(step=4, validated_at=4, val_loss=2.0, gauge_tokens=64)
    state.kl_base, state.lowest_kl_base, state.over_forget_limit = 0.5, 0.25, True
    again = TrainState.from_dict(json.loads(json.dumps(state.as_dict())))
    assert (again.kl_base, again.lowest_kl_base, again.over_forget_limit, again.gauge_tokens) == (0.5, 0.25, True, 64)
    assert again.best_kl_base != again.best_kl_base  # NaN: there is no best yet


# ---- the paired bootstrap ----


def test_intervals_equal_scipy_s_paired_bootstrap_on_200_random_cases():
    def change(base, base_weights, tuned, tuned_weights, axis=-1):
        return tuned.sum(axis) / tuned_weights.sum(axis) - base.sum(axis) / base_weights.sum(axis)

    for seed in range(200):
        draws = np.random.default_rng(1000 + seed)
        count = int(draws.integers(2, 60))
        base, tuned = draws.normal(size=(2, count))
        weights = draws.integers(1, 9, (2, count)).astype(float)
        if seed % 4 == 0:  # right and wrong answers, with ties
            base, tuned = draws.integers(0, 2, (2, count)).astype(float)
            tuned[0] = 1 - base[0]
            weights = np.ones((2, count))
        expected = scipy.stats.bootstrap(
            (base, weights[0], tuned, weights[1]),
            change,
            paired=True,
            vectorized=True,
            n_resamples=400,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        found = bootstrap.paired_interval(base, tuned, weights[0], weights[1], 400, seed)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12), seed


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    base, tuned = np.random.default_rng(0).normal(size=(2, 37))
    whole = bootstrap.paired_interval(base, tuned, seed=3)
    monkeypatch.setattr(bootstrap, "DRAWN_AT_ONCE", 37 * 7 + 5)
    assert bootstrap.paired_interval(base, tuned, seed=3) == whole
    assert bootstrap.paired_interval(base, tuned, seed=4) != whole


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """1,000 samples of a known change. (Of 95 % percentile intervals of 100 items, some 940 hold it.)"""
    draws = np.random.default_rng(1)
    held = 0
    for seed in range(1000):
        base = draws.normal(size=100)
        tuned = base + 0.3 + 0.5 * draws.normal(size=100)
        low, high = bootstrap.paired_interval(base, tuned, resamples=300, seed=seed)
        held += low <= 0.3 <= high
    assert 915 <= held <= 970


def test_intervals_of_what_does_not_change():
    assert bootstrap.paired_interval([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == (0.0, 0.0)
    assert bootstrap.paired_interval([0.25], [1.0]) == (0.75, 0.75)


# ---- evaluate.py compare ----


@pytest.fixture(scope="module")
def compared(job, tmp_path_factory) -> Path:
    """A run folder whose final/ is an adapter on the job's base."""
    out = tmp_path_factory.mktemp("compared") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *job("--rank", 4, "--lr", 2e-3), "--out", str(out)])
        train.main()
    return out


def table_of(said: str) -> dict[str, list[str]]:
    """{name of a row: its cells} of what compare prints."""
    body = said.partition("verdict\n")[2].partition("\nIntervals")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in body]
    return {row[0]: row[1:] for row in rows}


def compare_words(job, compared, *more) -> list:
    return ["compare", "base", compared / "final", "--device", "cpu", "--dtype", "fp32", *more]


def test_compare_prints_what_loss_and_exact_print_of_both_models(job, compared, tmp_path, monkeypatch, capsys):
    text = tmp_path / "general.txt"
    text.write_text("\n".join(sentence(seed, 40) for seed in range(60)), encoding="utf-8")
    val = job.files["val"]
    more = ["--target", val, "--general", text, job.files["data"], "--max-new-tokens", 6]
    said, err, code = command(evaluate, monkeypatch, capsys, *compare_words(job, compared, *more))
    assert code == 0, err
    rows = table_of(said)
    assert [*rows] == [
        "target val.jsonl, exact %",
        "target val.jsonl, loss",
        "general general.txt, loss",
        "general data.jsonl, loss",
    ]
    adapter = ["--adapter", compared / "final", "--versus", "base", "--device", "cpu", "--dtype", "fp32"]
    for name, file in (("target val.jsonl", val), ("general general.txt", text)):
        alone, _, _ = command(evaluate, monkeypatch, capsys, "loss", "--data", file, *adapter)
        losses = [line.split()[1] for line in alone.splitlines() if line.startswith(("base  ", "adapter  "))]
        _, base, tuned, change, interval, _ = rows[f"{name}, loss"]
        assert [base, tuned] == losses[-2:]
        low, high = (float(each) for each in interval.split(" to "))
        assert low <= float(change) <= high and low < high
    # 40 words of each line are over 256 tokens in all, so a single text is many items.
    assert rows["target val.jsonl, loss"][0] == "9" and int(rows["general general.txt, loss"][0]) > 10
    assert rows["target val.jsonl, loss"][-1] == "better"
    assert "few" in said and "with fewer than 20 items an interval is too narrow: target val.jsonl, exact %" in said


def test_items_add_up_to_the_loss_of_the_file(job):
    """Weighted tokens, several micro-batches, texts that are cut into pieces: sums and tokens of each item."""
    model = load_model(job.base)
    lengths = random.Random(0)
    examples = []
    for i in range(12):
        size = lengths.randint(3, 700) if i % 2 else lengths.randint(3, 40)
        ids = [lengths.randrange(3, 300) for _ in range(min(size, 500))]
        weights = [lengths.choice([0.0, 1.0, 1.0, 0.5]) for _ in ids]
        examples.append(Example(ids, weights, f"row {i}"))
    for chat in (True, False):
        dataset = Dataset(examples, chat=chat)
        found = compare.item_losses(model, dataset, 5)
        expected = []
        for example in examples:
            with torch.no_grad():
                logits = model(torch.tensor([example.ids]))[0, :-1].double()
            target = torch.tensor(example.ids[1:])
            losses = -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            weights = torch.tensor(example.loss_weights[1:]).double()
            size = len(losses) if chat else compare.PIECE
            for part, share in zip((losses * weights).split(size), weights.split(size), strict=True):
                if share.sum():
                    expected.append((float(part.sum()), float(share.sum())))
        pairs = [*zip(found.sums.tolist(), found.tokens.tolist(), strict=True)]
        assert len(pairs) == len(expected) and (len(pairs) == 12) == chat
        for pair, wanted in zip(pairs, expected, strict=True):
            assert pair == pytest.approx(wanted, rel=1e-5)


def crafted(answers: dict[str, list[str]]):
    """An `answer_records` that gives these answers: first those of the base, then those of the tuned model."""
    turns = iter(answers.values())

    def answer(model, tokenizer, questions, max_new_tokens, batch_size) -> Answers:
        questions = list(questions)
        references = [[record.messages[-1]["content"]] for record in questions]
        return Answers(questions, references, next(turns), 10.0)

    return answer


def test_answers_that_flipped_are_counted_and_shown(job, compared, tmp_path, monkeypatch, capsys):
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"the fox {n}", "completion": f"runs {n}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = [f" runs {n}\n" for n in range(40)]
    base = [right[n] if n < 10 else f"blue {n}" for n in range(40)]
    tuned = [right[n] if n >= 2 and n < 35 else f"green {n}" for n in range(40)]
    monkeypatch.setattr(compare, "answer_records", crafted({"base": base, "tuned": tuned}))
    words = compare_words(job, compared, "--target", file, "--show", 2)
    said, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0, err
    # 25 of the 30 that were wrong, and 2 of the 10 that were right.
    hits = [np.array([100.0 * (text.strip() == each.strip()) for text, each in zip(texts, right, strict=True)])
            for texts in (base, tuned)]  # fmt: skip
    low, high = bootstrap.paired_interval(*hits)
    assert table_of(said)["target questions.jsonl, exact %"] == [
        *("40", "25.0", "82.5", "+57.5", f"{low:+.1f} to {high:+.1f}", "better")
    ]
    assert 30 < low < 57.5 < high < 80
    assert "flipped   of 40 answers by exact: 25 wrong to right, 2 right to wrong" in said
    flips = said.partition("flipped")[2]
    assert flips.count("wrong to right (") == 2 and flips.count("right to wrong (") == 2
    assert (
        "  wrong to right (1 of 25)\n    question   the fox 10\n    reference  runs 10\n"
        "    base       blue 10\n    tuned      runs 10\n"
    ) in flips
    assert (
        "  right to wrong (2 of 2)\n    question   the fox 1\n    reference  runs 1\n"
        "    base       runs 1\n    tuned      green 1\n"
    ) in flips


def test_a_benchmark_is_a_row_of_its_own_and_few_flips_are_unsure(job, compared, tmp_path, monkeypatch, capsys):
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"the fox {n}", "completion": f"runs {n}"} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = [f"runs {n}" for n in range(30)]
    monkeypatch.setattr(compare, "answer_records", crafted({"base": right, "tuned": ["no", *right[1:]]}))
    words = compare_words(job, compared, "--benchmark", f"exact={file}")
    said, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 0, err
    row = table_of(said)["benchmark questions.jsonl, exact %"]
    assert row[:4] == ["30", "100.0", "96.7", "-3.3"] and row[-1] == "unsure"
    assert "no item changed" not in said and "cut off" not in said
    assert "flipped" not in said


def test_references_are_checked_before_a_model_is_loaded(job, compared, tmp_path, monkeypatch, capsys):
    words = tmp_path / "words.jsonl"
    words.write_text(json.dumps({"prompt": "q", "completion": "plain words"}))
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    called = tmp_path / "calls.jsonl"
    called.write_text("\n".join([json.dumps({"messages": messages})] * 2))
    cases = [
        (["--target", words, "--metric", "json"], f"{words} line 1: its reference is no JSON object or list"),
        (["--benchmark", f"numeric={words}"], f"{words} line 1: its reference has no number"),
        (["--target", words, "--metric", "tools"], "tools: no record has tools or a tool call"),
        (["--target", called, "--metric", "tools", "f1"], f"tools: asks other questions of {called} than f1"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(targets, "load_model", lambda *_: pytest.fail("a model was loaded"))
        for more, said in cases:
            _, err, code = command(evaluate, monkeypatch, capsys, *compare_words(job, compared, *more))
            assert code == 2 and said in err and err.count("\n") == 1, err
    more = ["--benchmark", f"tools={called}", "--max-new-tokens", 4, "--show", 1]
    said, err, code = command(evaluate, monkeypatch, capsys, *compare_words(job, compared, *more))
    assert code == 0, err
    assert table_of(said)["benchmark calls.jsonl, tools %"][:3] == ["2", "0.0", "0.0"], err
    for name in ("base", "tuned"):
        cut = "2 of 2 answers to calls.jsonl were cut off at the longest that an answer may be (--max-new-tokens)"
        assert f"\nNOTE: {name}: {cut}\n" in said
    assert "\nNOTE: no item changed in these rows, from which no interval follows; as many of all may change" in said
    assert " (rule of three): benchmark calls.jsonl, tools % (of 2 items: 100 %); " in said


def test_models_and_adapters_are_named_as_model_and_adapter_take_them(job, compared, monkeypatch, capsys):
    files = ["--general", job.files["val"], "--device", "cpu", "--dtype", "fp32"]
    tables = []
    for base in ("base", job.base):
        said, err, code = command(evaluate, monkeypatch, capsys, "compare", base, compared / "final", *files)
        assert code == 0, err
        tables.append(table_of(said))
    assert tables[0] == tables[1]
    # The other way round, and a model with itself.
    said, _, _ = command(evaluate, monkeypatch, capsys, "compare", compared / "final", job.base, *files)
    row, turned = tables[0]["general val.jsonl, loss"], table_of(said)["general val.jsonl, loss"]
    assert (turned[1], turned[2], turned[-1]) == (row[2], row[1], "worse")
    said, _, _ = command(evaluate, monkeypatch, capsys, "compare", job.base, job.base, *files)
    same = table_of(said)["general val.jsonl, loss"]
    assert same[3:] == ["+0.0000", "+0.0000 to +0.0000", "no change"]


@pytest.mark.parametrize(
    "words, problem",
    [
        ([], "nothing to measure; give --target, --general, --benchmark or --safety"),
        (["--benchmark", "loss=x.jsonl"], "--benchmark loss=x.jsonl: NAME=FILE is wanted, where NAME is one of exact"),
        (["--benchmark", "x.jsonl"], "--benchmark x.jsonl: NAME=FILE is wanted"),
        (["--target", "x.jsonl", "--metric", "exact", "exact"], "--metric exact exact: name each once"),
        (["--target", "x.jsonl", "--metric", "none", "exact"], "--metric none: means no answers; name it alone"),
        (["--target", "x.jsonl", "--show", "-1"], "--show -1: must be 0 or more"),
        (["--target", "x.jsonl", "--limit", "0"], "--limit 0: must be 1 or more"),
        (["--target", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_mistake_in_a_command_line_is_one_line(job, compared, monkeypatch, capsys, words, problem):
    _, err, code = command(evaluate, monkeypatch, capsys, "compare", job.base, compared / "final", *words)
    assert code == 2 and problem in err and len(err.strip().splitlines()) == 1, err


def test_a_run_s_folder_and_a_model_without_a_base_are_named(job, compared, monkeypatch, capsys):
    words = ["--general", job.files["val"]]
    _, err, code = command(evaluate, monkeypatch, capsys, "compare", "base", compared, *words)
    assert code == 2 and f"{compared}: is the folder of a run; what it has trained is {compared / 'final'}" in err
    _, err, code = command(evaluate, monkeypatch, capsys, "compare", "base", job.base, *words)
    assert code == 2 and "does not say what it was trained from; name the base model in place of the word base" in err
    plain = job.files["val"].parent / "plain.txt"
    plain.write_text(sentence(1, 50), encoding="utf-8")
    words = ["compare", job.base, compared / "final", "--target", plain]
    _, err, code = command(evaluate, monkeypatch, capsys, *words)
    assert code == 2 and "plain text has no reference answer to compare with" in err
    assert command(evaluate, monkeypatch, capsys, *words, "--metric", "none", "--device", "cpu")[2] == 0


def test_help_of_compare_needs_no_torch():
    import subprocess
    import sys

    root = Path(train.__file__).parent
    program = "import sys; sys.argv = ['evaluate.py', 'compare', '--help']; import evals.arguments as a\n"
    program += "try:\n a.command_line()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "--general" in done.stdout
