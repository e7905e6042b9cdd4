"""DPO, IPO, KTO, ORPO and SimPO: losses and gradients against trl, what the reference is, pairs and judged answers out
of files, and whole runs.

Where these differ from trl 1.16.0 on purpose: ORPO's own loss of the chosen answer is the paper's, a mean over that
answer's tokens of each pair (trl: over the tokens of all prompts and chosen answers of a batch). The reward of IPO and
of --length-normalized is what their losses compare, a mean over tokens (trl: a sum). KTO's mismatched answers come from
the next prompt of the data (trl: of a batch that was set up beforehand). A pair of equal rewards counts half in the
accuracy (trl: not at all). Label smoothing of DPO is Mitchell's, which trl has for CPO alone."""

import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file
from support.helpers import SHARED, chat_base, command, move, needs_shared, refusal_of, relative, sentence
from support.preferences import (
    Judged,
    Pair,
    example_of_judged,
    example_of_pair,
    gradients_of,
    hf_model,
    random_judged,
    random_pairs,
    reference_model,
    step,
    trl_judged,
    trl_pairs,
    trl_trainer,
)
from support.runs import lines, torchrun
from support.training_runs import CPU
from support.training_runs import settings as run_settings
from torch.nn.functional import logsigmoid

import data
import flags
import train
from checkpoint import hf_name, load_model
from common.errors import UserError
from data import MicroBatches, TrainingData, collate
from dataset.examples import DUMMY_EXAMPLE, Dataset, Example
from dataset.sampler import Sampler
from dataset.whole_examples import with_partners
from methods import METHODS, load_trainable, model_of_step_0
from model import eval_mode
from objectives import (
    OBJECTIVES,
    ScoredAnswers,
    StepTotals,
    WholeRun,
    check_objective,
    dpo_loss,
    log_of_complement,
    make_objective,
    text_logps,
)
from tokenizer import load_tokenizer
from training import attention_trial, reference
from training.validation import validate

OF_PAIRS = ("dpo", "ipo", "orpo", "simpo")
OF_WHOLES = (*OF_PAIRS, "kto")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base") / "base", num_key_value_heads=2)


@pytest.fixture(scope="module")
def other(base, tmp_path_factory) -> Path:
    """A base whose weights lie near those of the first one: the reference that trl compares with."""
    model = hf_model(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    return folder


def options(objective: str, **changes):
    """A run's settings with the objective's own defaults."""
    wanted = {"objective": objective, "dtype": "fp32", "shard": "none"} | dict(OBJECTIVES[objective].defaults)
    return run_settings(**(wanted | changes))


def examples_for(objective: str, count: int, seed: int = 0) -> list[Example]:
    if objective == "kto":
        return [example_of_judged(each) for each in random_judged(count, seed)]
    return [example_of_pair(each) for each in random_pairs(count, seed)]


# ---- losses and gradients against trl ----


class Compared:
    """What trl computes, and what we do of the same ids. atol and rtol: 1e-5."""

    def __init__(self, base: Path, other: Path, folder: Path):
        self.base, self.other, self.folder = base, other, folder
        self.ours = load_model(base)
        self.reference = reference_model(load_model(other))

    def trainer(self, kind: str, **config):
        return trl_trainer(kind, self.base, self.other, self.folder, **config)

    def equal(self, trainer, wanted: torch.Tensor, examples: list[Example], objective: str, **changes) -> dict:
        """Asserts that losses and gradients are equal, and returns what we report."""
        run = WholeRun(options(objective, **changes), self.reference)
        loss, gradients, reported, _ = step(run, self.ours, [examples], lambda name: hf_name(self.ours, name))
        theirs = gradients_of(trainer.model, wanted)
        assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
        assert gradients.keys() == theirs.keys()
        for name, gradient in gradients.items():
            assert theirs[name].norm() > 0 and relative(gradient, theirs[name]) < 1e-5, name
        return {name: float(value) for name, value in reported.items()}


@pytest.fixture(scope="module")
def compared(base, other, tmp_path_factory) -> Compared:
    return Compared(base, other, tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize(
    ("loss_type", "objective", "changes"),
    [
        ("sigmoid", "dpo", {"beta": 0.1}),
        ("sigmoid", "dpo", {"beta": 0.7}),
        ("sigmoid_norm", "dpo", {"beta": 5.0, "length_normalized": True}),
        ("ipo", "ipo", {"beta": 0.2}),
    ],
)
def test_dpo_and_ipo_equal_trl(compared, loss_type, objective, changes):
    pairs = random_pairs(7)
    trainer = compared.trainer("dpo", loss_type=loss_type, beta=changes["beta"])
    loss = trainer.compute_loss(trainer.model, trl_pairs(trainer, pairs))
    reported = compared.equal(trainer, loss, [example_of_pair(pair) for pair in pairs], objective, **changes)
    theirs = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    names = {"logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"}
    if loss_type == "sigmoid":
        names |= {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected"}
        names |= {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    for mine, name in names.items():
        assert reported[mine] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), mine


@pytest.mark.parametrize(("weights", "seed"), [((1.0, 1.0), 24), ((1.5, 0.7), 24), ((1.5, 0.7), 3)])
def test_kto_equals_trl(compared, weights, seed):
    judged = random_judged(7, seed)
    names = ("desirable_weight", "undesirable_weight")
    changes = {"beta": 0.3} | dict(zip(names, weights, strict=True))
    trainer = compared.trainer("kto", **changes)
    loss = trainer.compute_loss(trainer.model, trl_judged(trainer, judged))
    reported = compared.equal(trainer, loss, [example_of_judged(each) for each in judged], "kto", **changes)
    theirs = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    # With the second seed the estimate is below 0, and so counts as 0.
    assert theirs["kl"] > 0.1 if seed == 24 else theirs["kl"] == 0
    for mine, name in {"kl": "kl", "reward_good": "rewards/chosen", "reward_bad": "rewards/rejected"}.items():
        assert reported[mine] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), mine


@pytest.mark.parametrize(("beta", "margin"), [(2.0, 1.0), (2.5, 0.0)])
def test_simpo_equals_trl(compared, beta, margin):
    pairs = random_pairs(7, seed=5)
    trainer = compared.trainer("cpo", loss_type="simpo", cpo_alpha=0.0, beta=beta, simpo_gamma=margin)
    loss = trainer.compute_loss(trainer.model, trl_pairs(trainer, pairs))
    examples = [example_of_pair(pair) for pair in pairs]
    reported = compared.equal(trainer, loss, examples, "simpo", beta=beta, margin=margin)
    theirs = trainer._stored_metrics["train"]
    for mine, name in {"reward_chosen": "chosen", "margin": "margins", "accuracy": "accuracies"}.items():
        assert reported[mine] == pytest.approx(theirs[f"rewards/{name}"][0], rel=1e-4, abs=1e-5), mine


def test_orpo_equals_trl_but_for_its_own_loss(compared):
    pairs = random_pairs(7, seed=6)
    trainer = compared.trainer("orpo", beta=0.3)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, trl_pairs(trainer, pairs))
    odds_ratios = trainer.odds_ratio_loss(chosen, rejected)[0]
    # Of the paper's equation 6, the first part is the mean over the chosen answer's tokens.
    wanted = -chosen.mean() - odds_ratios.mean()
    compared.equal(trainer, wanted, [example_of_pair(pair) for pair in pairs], "orpo", beta=0.3)


def test_label_smoothing_of_dpo_is_mitchell_s(compared):
    torch.manual_seed(0)
    logps = torch.randn(9, 2, dtype=torch.float64) * 20
    answers = ScoredAnswers(logps, torch.zeros_like(logps), torch.ones_like(logps), torch.zeros(9))
    settings = options("dpo", beta=0.2, label_smoothing=0.15)
    losses, rewards = dpo_loss(answers, settings)
    difference = 0.2 * (logps[:, 0] - logps[:, 1])
    # Mitchell 2023, equation 3.
    wanted = -0.85 * difference.sigmoid().log() - 0.15 * (1 - difference.sigmoid()).log()
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=1e-9)
    # The same equation stands in trl's CPO, which has no reference.
    trainer = compared.trainer("cpo", loss_type="sigmoid", beta=0.2, label_smoothing=0.15)
    torch.testing.assert_close(losses, trainer.cpo_loss(*logps.T)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rewards, 0.2 * logps)
    # "robust" (Chowdhury et al. 2024) is another loss: it divides, so as to be unbiased.
    robust = (-0.85 * logsigmoid(difference) + 0.15 * logsigmoid(-difference)) / 0.7
    assert (losses - robust).abs().max() > 0.1
    plain, _ = dpo_loss(answers, options("dpo", beta=0.2))
    torch.testing.assert_close(plain, -logsigmoid(difference))


# ---- the reference, and the first loss ----


def of_method(name: str, **changes):
    """The settings of a run of DPO by a method, a new adapter's options as they are chosen."""
    row = METHODS[name]
    chosen = {key: value for key, value in (flags.NEW_ADAPTER | dict(row.defaults)).items() if key in row.options}
    if row.quant:
        chosen["quant"] = row.quant
    return options("dpo", method=name, **(chosen | changes))


CASES = {name: (name, {}) for name in METHODS} | {
    "dropout": ("lora", {"dropout": 0.5}),
    "bf16": ("lora", {"dtype": "bf16"}),
    "rsLoRA": ("lora", {"rslora": True, "rank_pattern": "q_proj=2"}),
    "DoRA": ("lora", {"dora": True}),
    "PiSSA": ("lora", {"init": "pissa"}),
    "LoftQ": ("qlora", {"init": "loftq"}),
    "trained tables": ("lora", {"modules_to_save": "embed_tokens,lm_head"}),
    "trained tokens": ("lora", {"train_tokens": "<|im_end|>"}),
    "new tokens": ("lora", {"add_tokens": "TOKENS"}),
}  # fmt: skip
# Whose model of step 0 is gone once they have trained.
NOTED = {"full", "prompt-tuning", "p-tuning", "prefix-tuning", "DoRA", "PiSSA", "LoftQ"}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_model_of_step_0_to_the_bit_or_noted(base, tmp_path, case):
    name, changes = CASES[case]
    if changes.get("add_tokens"):
        changes = {"add_tokens": str(tmp_path / "tokens.txt")}
        (tmp_path / "tokens.txt").write_text("fox jumps\n12 7\n")
    settings = of_method(name, **changes)
    model = load_trainable(settings, base, CPU)
    batch = collate(examples_for("dpo", 5), whole=True)
    # Some kernels round otherwise where there are gradients: a step's reference has to be as its policy is.
    before = {}
    for has_gradients in (True, False):
        with torch.set_grad_enabled(has_gradients), eval_mode(model):
            before[has_gradients] = text_logps(model, batch).detach()
    found = reference.reference_of_run(settings, model)
    assert (found is reference.noted_reference) == (case in NOTED)
    assert (model_of_step_0(model, settings) is None) == (case in NOTED)
    if case in NOTED:
        return
    move(model)
    model.train()
    for has_gradients, wanted in before.items():
        with torch.set_grad_enabled(has_gradients):
            values = found(batch)
        assert torch.equal(values, wanted) and not values.requires_grad
    # And the model is as it was, trained and in training.
    assert model.training
    with torch.no_grad(), eval_mode(model):
        assert (text_logps(model, batch) - before[False]).abs().max() > 0.1


def test_a_run_that_goes_on_from_an_adapter_notes_its_reference(base):
    settings = of_method("lora")
    model = load_trainable(settings, base, CPU)
    going_on = of_method("lora", adapter="somewhere")
    assert reference.reference_of_run(going_on, model) is reference.noted_reference


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora", "ia3", "vera"])
def test_dpo_begins_at_log_2_exactly(base, dtype, method):
    changes = {"dropout": 0.5} if "dropout" in METHODS[method].options else {}
    settings = of_method(method, dtype=dtype, **changes)
    model = load_trainable(settings, base, CPU)
    run = make_objective(settings, reference.reference_of_run(settings, model))
    found = validate(run, model, Dataset(examples_for("dpo", 9), kind=OBJECTIVES["dpo"].kind), CPU)
    assert (found["margin"], found["reward_chosen"], found["accuracy"]) == (0, 0, 0.5)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-7)
    # And a step, as the policy of which no dropout is left.
    for count in (1, 7):
        loss, gradients, reported, _ = step(run, model.eval(), [examples_for("dpo", count)])
        assert reported["margin"] == 0 and reported["accuracy"] == 0.5
        assert loss == pytest.approx(math.log(2), abs=1e-7) and any(each.any() for each in gradients.values())
        if count == 1:
            assert loss == torch.tensor(math.log(2))


def test_dropout_is_in_the_policy_and_not_in_the_reference(base):
    settings = of_method("lora", dropout=0.5)
    model = load_trainable(settings, base, CPU)
    move(model)
    seeded = [example_of_pair(pair, dropout_seed=number) for number, pair in enumerate(random_pairs(4))]
    batch = collate(seeded, whole=True)
    found = reference.reference_of_run(settings, model)
    with torch.no_grad(), eval_mode(model):
        quiet = text_logps(model, batch)
    model.train()
    with torch.no_grad():
        loud, again = text_logps(model, batch), text_logps(model, batch)
    assert (quiet - loud).abs().min() > 0.01 and torch.equal(loud, again)
    # What is dropped follows from the example alone, and the second text of a pair drops other numbers.
    alone = collate(seeded[2:3], whole=True)
    with torch.no_grad():
        torch.testing.assert_close(text_logps(model, alone), loud[4:6], rtol=1e-4, atol=1e-4)
        twice = collate([example_of_pair(Pair([5], [6, 7, 8], [6, 7, 8]), dropout_seed=1)], whole=True)
        assert torch.diff(text_logps(model, twice)).abs() > 0.01
    with torch.no_grad():
        assert torch.equal(found(batch), reference_model(load_model(base))(batch))


def training_data(train_set: Dataset, val_set: Dataset) -> TrainingData:
    return TrainingData(train_set, val_set, None, Sampler(train_set.lengths, [len(train_set)], [len(train_set)], 0),
                        512, None, False)  # fmt: skip


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_noted_reference_is_of_each_text_and_read_again(base, tmp_path, write, objective):
    kind = OBJECTIVES[objective].kind
    sets = [write(records_of_words(count, seed), kind) for count, seed in ((11, 0), (5, 900))]
    if objective == "kto":
        sets = [with_partners(each) for each in sets]
    settings = options(objective, method="full", batch_size=4, max_tokens=300)
    model = load_trainable(settings, base, CPU)
    reference.note_reference(settings, model, training_data(*sets), tmp_path, False)
    plain = reference_model(load_model(base))
    run = make_objective(settings, reference.reference_of_run(settings, model))
    found = validate(run, model, sets[0], CPU)
    if objective == "dpo":
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(found["margin"]) < 1e-5
    else:
        assert found["loss"] == pytest.approx(0.5, abs=1e-6) and found["kl"] == pytest.approx(0, abs=1e-4)
    noted = []
    for dataset in sets:
        for example in dataset.examples:
            batch = collate([example], whole=True)
            torch.testing.assert_close(reference.noted_reference(batch), plain(batch), rtol=1e-5, atol=1e-4)
            if batch.mismatched:
                other = batch.mismatched
                torch.testing.assert_close(reference.noted_reference(other), plain(other), rtol=1e-5, atol=1e-4)
            noted.append(example.reference)
    # What is taken of them keeps its own.
    some = sets[0].take(np.array([7, 2]))
    assert [each.reference for each in some.examples] == [noted[7], noted[2]]
    move(model)  # by now another one
    for each in sets:
        each.examples.reference = None
    reference.note_reference(settings, model, training_data(*sets), tmp_path, True)
    assert [example.reference for each in sets for example in each.examples] == noted


def test_a_noted_reference_of_other_examples_is_refused(tmp_path):
    one, other = (Dataset(examples_for("dpo", count), kind=OBJECTIVES["dpo"].kind) for count in (5, 6))
    file = tmp_path / reference.REFERENCE_FILE
    reference.write_reference(file, {"train": torch.zeros(5, 2), "val": torch.zeros(5, 2)})
    assert reference.read_reference(file, {"train": one, "val": one})["val"].shape == (5, 2)
    with pytest.raises(UserError, match="is of other examples, and the model before step 1 can't be had any more"):
        reference.read_reference(file, {"train": one, "val": other})


# ---- log-probabilities ----


def test_log_probabilities_equal_transformers_alone_and_in_a_batch(base):
    pairs = random_pairs(9, seed=11)
    model, theirs = load_model(base), hf_model(base)
    wanted = []
    for pair in pairs:
        for ids in pair.rows:
            with torch.no_grad():
                logps = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            answer = torch.tensor(ids[len(pair.prompt) :])
            wanted.append(logps[len(pair.prompt) - 1 :].gather(1, answer[:, None]).sum())
    wanted = torch.stack(wanted)
    examples = [example_of_pair(pair) for pair in pairs]
    together = text_logps(model, collate(examples, whole=True))
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-5)
    alone = torch.cat([text_logps(model, collate([example], whole=True)) for example in examples])
    torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=1e-5)
    backwards = text_logps(model, collate(examples[::-1], whole=True)).reshape(-1, 2).flip(0).flatten()
    torch.testing.assert_close(backwards, wanted, rtol=1e-5, atol=1e-5)
    lengths = [len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    batch = collate(examples, whole=True)
    assert batch.texts.lengths.tolist() == lengths and batch.texts.count == len(lengths)


def test_the_texts_of_a_batch_do_not_see_each_other(base):
    model = load_model(base)
    first, second = random_pairs(2, seed=12)
    changed = first._replace(rejected=[id + 1 for id in first.rejected])
    before, after = (text_logps(model, collate([example_of_pair(each), example_of_pair(second)], whole=True))
                     for each in (first, changed))  # fmt: skip
    assert before[1] != after[1]
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


def test_weights_of_an_example_are_not_in_its_log_probabilities(base):
    model = load_model(base)
    pairs = random_pairs(3)
    weighted, plain = ([example_of_pair(pair, weight=weight) for pair in pairs] for weight in (2.5, 1.0))
    batch = collate(weighted, whole=True)
    assert torch.equal(text_logps(model, batch), text_logps(model, collate(plain, whole=True)))
    assert (batch.texts.weights.tolist(), batch.texts.weight_sum) == ([2.5] * 3, 7.5)


def test_a_batch_of_supervised_texts_has_no_wholes():
    examples = [Example([3, 4, 5], [0.0, 1.0, 1.0]), Example([6, 7], [0.0, 1.0])]
    batch = collate(examples)
    assert batch.texts is None and batch.mismatched is None
    assert StepTotals.of([batch]).num_examples == 0


# ---- a step, however it is cut ----


@pytest.mark.parametrize("objective", OF_WHOLES)
def test_a_step_s_gradients_do_not_depend_on_how_it_is_cut(base, other, objective):
    examples = examples_for(objective, 8, seed=24)
    run = WholeRun(options(objective), reference_model(load_model(other)))
    model = load_model(base)
    loss, wanted, reported, totals = step(run, model, [examples])
    assert totals.num_examples == 8
    if objective == "kto":
        assert totals.kl > 0.1
    # A rank that has no row left gets a dummy, which counts nothing.
    cuts = [[examples[:4], examples[4:]], [examples[i : i + 2] for i in range(0, 8, 2)]]
    cuts.append([examples[:3], [DUMMY_EXAMPLE], examples[3:]])
    for cut in cuts:
        again, gradients, reported_again, _ = step(run, model, cut)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            assert relative(gradient, wanted[name]) < 1e-5, name
        assert {name: float(value) for name, value in reported_again.items()} == pytest.approx(
            {name: float(value) for name, value in reported.items()}, rel=1e-5, abs=1e-5
        )


@pytest.mark.parametrize("objective", OF_PAIRS)
def test_a_weight_counts_as_copies_of_a_pair(base, other, objective):
    pairs = random_pairs(4, seed=22)
    run = WholeRun(options(objective), reference_model(load_model(other)))
    model = load_model(base)
    copies = [example_of_pair(pair) for pair in [*pairs, pairs[1], pairs[1]]]
    loss, wanted, reported, _ = step(run, model, [copies])
    weighted = [example_of_pair(pair, weight=3.0 if number == 1 else 1.0) for number, pair in enumerate(pairs)]
    again, gradients, reported_again, totals = step(run, model, [weighted[:2], weighted[2:]])
    assert totals.num_examples == 6
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    assert all(relative(gradient, wanted[name]) < 1e-5 for name, gradient in gradients.items())
    assert {name: float(value) for name, value in reported_again.items()} == pytest.approx(
        {name: float(value) for name, value in reported.items()}, rel=1e-5, abs=1e-5
    )
    examples = Dataset(weighted, kind=OBJECTIVES[objective].kind)
    assert validate(run, model, examples, CPU)["loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("objective", OF_WHOLES)
def test_a_validation_reports_what_a_step_does(base, other, objective):
    examples = examples_for(objective, 20, seed=23)
    run = WholeRun(options(objective), reference_model(load_model(other)))
    model = load_model(base)
    loss, _, reported, _ = step(run, model, [examples])
    sums = []
    found = validate(run, model, Dataset(examples, kind=OBJECTIVES[objective].kind), CPU, sums=sums)
    wanted = {"loss": float(loss)} | {name: float(value) for name, value in reported.items()}
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    sums = torch.cat(sums, 1)  # of each example, for the interval of the change
    assert sums.shape == (2, 20) and float(sums[0].sum() / sums[1].sum()) == pytest.approx(found["loss"], rel=1e-5)


def test_attention_is_tried_with_the_objective_s_own_loss(base, monkeypatch):
    """--attention compares the loss and the gradients of a step on GPUs; here the step alone runs."""
    examples = Dataset(examples_for("dpo", 6), kind=OBJECTIVES["dpo"].kind)
    settings = of_method("lora")
    model = load_trainable(settings, base, CPU)
    run = make_objective(settings, reference.reference_of_run(settings, model))
    loader = MicroBatches(examples, Sampler(examples.lengths, [6], [6], 0), CPU, 4, seeded=True)
    found = []
    monkeypatch.setattr(attention_trial.flash_versions, "use", lambda name, device, step: found.extend(step()) or 0.0)
    attention_trial.use_flash_version("fa3", model, run, loader)
    assert float(found[0]) == pytest.approx(math.log(2), abs=1e-5) and found[1].isfinite().all()


# ---- KTO ----


def test_the_kl_is_the_mean_over_mismatched_answers_and_not_below_0(base, other):
    judged = random_judged(9, seed=31)
    model, before = load_model(base), reference_model(load_model(other))
    others = [Judged(each.prompt, each.other, [], True) for each in judged]
    batch = collate([example_of_judged(each) for each in others], whole=True)
    ratios = (text_logps(model, batch) - before(batch)).detach()
    examples = [example_of_judged(each) for each in judged]
    cut = [collate(examples[:5], whole=True), collate(examples[5:], whole=True)]
    kl = WholeRun(options("kto"), before).begin_step(model, cut, 0, 0)[1].kl
    assert not kl.requires_grad
    assert float(ratios.mean()) > 0.01 and float(kl) == pytest.approx(float(ratios.mean()), rel=1e-4)
    # A model in training is asked without its dropout, and is in training afterwards.
    settings = of_method("lora", dropout=0.5)
    trained = load_trainable(settings, base, CPU)
    move(trained)
    trained.train()
    run = WholeRun(options("kto"), reference.reference_of_run(settings, trained))
    found = [float(run.begin_step(trained, cut, 0, 0)[1].kl) for _ in range(2)]
    assert trained.training
    trained.eval()
    found.append(float(run.begin_step(trained, cut, 0, 0)[1].kl))
    assert found[0] > 0.01 and len(set(found)) == 1
    # The other way round the mean is below 0.
    exchanged = WholeRun(options("kto"), reference_model(model))
    assert float(exchanged.begin_step(load_model(other), cut, 0, 0)[1].kl) == 0


def partners(dataset: Dataset, tokenizer) -> list[tuple[str, str]]:
    """The texts of each mismatched example: what is asked, and the answer."""
    found = []
    for example in dataset.examples:
        start = int(np.flatnonzero(example.mismatched.loss_weights)[0])
        ids = [int(id) for id in example.mismatched.ids]
        found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])))
    return found


def judged_lines(prompts: str) -> list[dict]:
    """One answer to each of these prompts, by their letters; every other one is good."""
    return [
        {"prompt": f"prompt {letter}", "completion": f"answer {number}", "label": number % 2 == 0}
        for number, letter in enumerate(prompts)
    ]


@pytest.mark.parametrize("prompts", ["abcd", "aabbccdd", "aabcc", "abab", "aba", "abcabc", "abbca"])
def test_a_partner_is_of_another_prompt_and_each_answer_is_taken_about_once(base, write, prompts):
    dataset = with_partners(write(judged_lines(prompts), OBJECTIVES["kto"].kind))
    found = partners(dataset, load_tokenizer(base))
    taken = Counter()
    for number, (asked, answer) in enumerate(found):
        (partner,) = [i for i in range(len(prompts)) if answer.startswith(f"answer {i}<")]
        taken[partner] += 1
        assert f"prompt {prompts[number]}<" in asked
        assert prompts[partner] != prompts[number]
    assert max(taken.values()) <= 2
    if prompts in ("abcd", "aabbccdd", "abab", "abcabc"):
        assert set(taken.values()) == {1}


def test_with_one_prompt_alone_the_partner_is_another_answer(base, write):
    found = partners(with_partners(write(judged_lines("aaa"), OBJECTIVES["kto"].kind)), load_tokenizer(base))
    assert all(not answer.startswith(f"answer {number}<") for number, (_, answer) in enumerate(found))


def test_of_a_mismatched_answer_what_is_no_answer_counts_nothing(base, write):
    """An answer may be several messages, with what a user or a tool says in between."""
    long = [said("assistant", "one"), said("user", "more"), said("assistant", "two")]
    records = [
        {"prompt": [said("user", "q")], "chosen": long, "rejected": [said("assistant", "three")]},
        {"prompt": [said("user", "r")], "chosen": [said("assistant", "four")], "rejected": [said("assistant", "five")]},
    ]
    dataset = with_partners(write(records, OBJECTIVES["kto"].kind))
    tokenizer = load_tokenizer(base)
    (found,) = [e.mismatched for e in dataset.examples if "more" in tokenizer.decode(list(map(int, e.mismatched.ids)))]
    assert trained_text(tokenizer, found.ids, found.loss_weights) == "one<|im_end|>two<|im_end|>"


# ---- data ----


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content} | more


def records_of_words(count: int, seed: int = 0) -> list[dict]:
    return [
        {
            "prompt": sentence(seed + i, i % 7 + 1),
            "chosen": sentence(seed + 300 + i, i % 9 + 1),
            "rejected": sentence(seed + 600 + i, 3 * i % 11 + 2),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def write(base, tmp_path_factory):
    """write(records, kind): what is read of a file of them."""
    folder = tmp_path_factory.mktemp("records")

    def read(records: list[dict], kind: str, seq_len: int = 512, tokenizer=None, print_fn=lambda line: None) -> Dataset:
        file = folder / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        tokenizer = tokenizer or load_tokenizer(base)
        return data.load([file], tokenizer, seq_len, kind=kind, flag="--objective x", print_fn=print_fn)

    return read


def trained_text(tokenizer, ids, weights) -> str:
    return tokenizer.decode([int(id) for id, weight in zip(ids, weights, strict=True) if weight])


def texts_of(example: Example, tokenizer) -> list[tuple[str, str]]:
    """(the whole, what is trained of it) of each text."""
    parts = [slice(None)]
    if example.split:
        parts = [slice(example.split), slice(example.split, None)]
    found = []
    for part in parts:
        ids, weights = example.ids[part], example.loss_weights[part]
        found.append((tokenizer.decode(list(map(int, ids))).rstrip("\n"), trained_text(tokenizer, ids, weights)))
    return found


@pytest.fixture(scope="module")
def oracle(base):
    """oracle(messages): the text of a conversation as transformers renders it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def rendered(messages: list[dict], **more) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more).rstrip("\n")

    return rendered


def answers_of(messages: list[dict]) -> str:
    return "".join(f"{each['content']}<|im_end|>" for each in messages if each["role"] == "assistant")


def wanted_texts(oracle, asked: list[dict], *answers: list[dict]) -> list[tuple[str, str]]:
    return [(oracle([*asked, *answer]), answers_of(answer)) for answer in answers]


def sharegpt(turn: dict) -> dict:
    return said({"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]], turn["value"])


def transcript(text: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [said(roles[who], what.strip()) for who, what in zip(parts[::2], parts[1::2], strict=True)]


def first_records(name: str, count: int, folder: Path) -> tuple[Path, list[dict]]:
    """A file of the first records of a shared one, and these."""
    text = (SHARED / name).read_text(encoding="utf-8")
    records = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
    return (folder / name).rename(folder / "part.jsonl"), records[:count]


def read_pair(record: dict) -> tuple[list[dict], list[dict], list[dict]]:
    """What is asked and both answers, of a record of any of the two files."""
    if "conversations" in record:
        asked = [sharegpt(turn) for turn in record["conversations"]]
        return asked, [sharegpt(record["chosen"])], [sharegpt(record["rejected"])]
    sides = [transcript(record[side]) for side in ("chosen", "rejected")]
    same = 0
    while sides[0][same] == sides[1][same]:
        same += 1
    return sides[0][:same], sides[0][same:], sides[1][same:]


@needs_shared
@pytest.mark.parametrize("name", ["preference_en_300.json", "hh_rlhf_harmless_test_500.jsonl"])
def test_pairs_of_a_file_are_as_the_template_writes_them(base, oracle, tmp_path, name):
    file, records = first_records(name, 90, tmp_path)
    tokenizer = load_tokenizer(base)
    pairs = [read_pair(record) for record in records]
    # One says nothing at all, and is left out.
    pairs = [pair for pair in pairs if pair[1][-1]["content"]]
    dataset = data.load([file], tokenizer, 1 << 20, kind=OBJECTIVES["dpo"].kind)
    assert [texts_of(each, tokenizer) for each in dataset.examples] == [wanted_texts(oracle, *pair) for pair in pairs]
    assert len(pairs) >= 89 and any(len(asked) > 2 for asked, *_ in pairs)
    example = dataset.examples[3]
    assert (example.weight, example.label, example.mismatched) == (1.0, -1, None)
    # As judged answers, the good one stands before the bad one.
    dataset = data.load([file], tokenizer, 1 << 20, kind=OBJECTIVES["kto"].kind)
    found = [texts_of(each, tokenizer) for each in dataset.examples]
    assert found == [[text] for pair in pairs for text in wanted_texts(oracle, *pair)]
    labels = [dataset.label_names[each.label] for each in dataset.examples]
    assert labels == ["good", "bad"] * len(pairs)


@needs_shared
def test_judged_answers_of_a_file_are_as_the_template_writes_them(base, oracle, tmp_path):
    file, records = first_records("kto_en_demo.json", 60, tmp_path)
    tokenizer = load_tokenizer(base)
    dataset = with_partners(data.load([file], tokenizer, 1 << 20, kind=OBJECTIVES["kto"].kind))
    assert len(dataset) == 60 and any(len(record["messages"]) > 2 for record in records)
    assert {record["label"] for record in records} == {True, False}
    after = [*records[1:], records[0]]
    for record, next_record, example in zip(records, after, dataset.examples, strict=True):
        *asked, answer = record["messages"]
        assert texts_of(example, tokenizer) == wanted_texts(oracle, asked, [answer])
        assert dataset.label_names[example.label] == ("good" if record["label"] else "bad")
        # Of the next record the answer, behind the own prompt.
        assert texts_of(example.mismatched, tokenizer) == wanted_texts(oracle, asked, next_record["messages"][-1:])


def test_a_pair_trains_what_stands_behind_its_prompt(base, oracle, write):
    tokenizer = load_tokenizer(base)
    asked = [said("system", "s"), said("user", "q"), said("assistant", "x"), said("user", "r")]
    good, bad = [said("assistant", "good")], [said("assistant", "bad")]
    several = [said("assistant", "one"), said("user", "more"), said("assistant", "two")]
    records = [
        {"prompt": asked, "chosen": good, "rejected": bad, "weight": 2.5},
        {"chosen": [*asked, *good], "rejected": [*asked, *bad]},
        {"prompt": asked, "chosen": several, "rejected": bad},
        # Both begin with one answer, which so belongs to the prompt.
        {"prompt": asked, "chosen": several, "rejected": [*several[:2], said("assistant", "three")]},
    ]
    dataset = write(records, OBJECTIVES["dpo"].kind)
    found = [texts_of(example, tokenizer) for example in dataset.examples]
    assert found[:2] == [wanted_texts(oracle, asked, good, bad)] * 2
    assert found[2] == wanted_texts(oracle, asked, several, bad)
    assert found[3] == wanted_texts(oracle, [*asked, *several[:2]], several[2:], [said("assistant", "three")])
    assert [example.weight for example in dataset.examples] == [2.5, 1, 1, 1]
    # A text stands alone: the second one begins like the first.
    for example in dataset.examples:
        assert example.text_lengths == [example.split, len(example.ids) - example.split]
        assert example.ids[0] == example.ids[example.split]


WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chosen_answer_may_call_a_tool(base, oracle, tmp_path, write):
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": WITH_TOOLS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    asked = [said("user", "q")]
    chosen = [said("assistant", "", tool_calls=[call]), said("tool", "7"), said("assistant", "it is 7")]
    rejected = [said("assistant", "no idea")]
    records = [{"prompt": asked, "chosen": chosen, "rejected": rejected, "tools": tools}]
    (example,) = write(records, OBJECTIVES["dpo"].kind, tokenizer=tokenizer).examples
    wanted = [oracle([*asked, *side], tools=tools, chat_template=WITH_TOOLS) for side in (chosen, rejected)]
    trained = ["<call>add</call><|im_end|>it is 7<|im_end|>", "no idea<|im_end|>"]
    assert texts_of(example, tokenizer) == list(zip(wanted, trained, strict=True))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_message_with_weight_0_is_not_trained_in_silence(base, write, objective, side):
    """ "weight": 0 on a message says that it is not to be trained: it is no part of the answer, or the record is
    refused or left out. A record's own weight is that of the pair."""
    several = [said("assistant", "one", weight=0), said("user", "more"), said("assistant", "two")]
    plain = [said("assistant", "three")]
    record = {"prompt": [said("user", "q")], "chosen": plain, "rejected": plain} | {side: several}
    other_side = "rejected" if side == "chosen" else "chosen"
    record[other_side] = [said("assistant", "four")]
    try:
        dataset = write([record, *records_of_words(1)], OBJECTIVES[objective].kind)
    except UserError:
        return
    tokenizer = load_tokenizer(base)
    trained = [text[1] for example in dataset.examples for text in texts_of(example, tokenizer)]
    assert not any("one" in each for each in trained), trained


def test_a_record_s_weight_is_that_of_a_judged_answer(write):
    records = [
        {"prompt": "q", "completion": "a", "label": True, "weight": 2.5},
        {"prompt": "r", "completion": "b", "label": False},
        {"prompt": "s", "completion": "c", "label": False, "weight": 0},
    ]
    dataset = write(records, OBJECTIVES["kto"].kind)
    assert [(example.weight, example.label) for example in dataset.examples] == [(2.5, 1), (1, 0)]
    batch = collate(list(dataset.examples), whole=True)
    assert (batch.texts.weights.tolist(), batch.texts.labels.tolist()) == ([2.5, 1], [1, 0])


def test_what_is_left_out_is_counted(write):
    good, bad = "the dog", "the fox jumps"
    records = [
        {"prompt": "fox", "chosen": good, "rejected": bad},
        {"prompt": "fox", "chosen": good, "rejected": good},
        {"prompt": "fox", "chosen": good, "rejected": bad, "weight": 0},
        {"prompt": "fox", "chosen": sentence(1, 90), "rejected": bad},
        {"prompt": "fox", "chosen": good, "rejected": sentence(2, 90)},
    ]
    printed = []
    dataset = write(records, OBJECTIVES["dpo"].kind, seq_len=64, print_fn=printed.append)
    assert len(dataset) == 1
    assert "dropped 1 (chosen and rejected do not differ), dropped 1 (without a trained token)" in printed[0]
    assert dataset.dropped == {"of which a text does not fit into --seq-len 64": 2}
    assert "          left out: 2 records of which a text does not fit into --seq-len 64" in printed
    dataset = write(records, OBJECTIVES["kto"].kind, seq_len=64)
    assert len(dataset) == 4 and dataset.dropped == {"of which a text does not fit into --seq-len 64": 2}
    with pytest.raises(UserError, match="no record can be trained on"):
        write(records[3:], OBJECTIVES["dpo"].kind, seq_len=64)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_an_answer_that_just_fits_is_kept(write, objective):
    """What a template writes behind the last trained token is not needed."""
    records = [{"prompt": "fox", "chosen": "the dog", "rejected": "the red fox jumps"}]
    kind = OBJECTIVES[objective].kind
    longest = max(np.flatnonzero(example.loss_weights)[-1] + 1 - example.split
                  for example in write(records, kind).examples)  # fmt: skip
    assert write(records, kind, seq_len=int(longest)).dropped == {}
    dropped = 0
    try:
        dropped = sum(write(records, kind, seq_len=int(longest) - 1).dropped.values())
    except UserError:
        dropped = 1
    assert dropped == 1


def test_texts_that_the_template_writes_alike_are_left_out(base, write):
    records = records_of_words(2)
    records.append({"prompt": "q", "chosen": "a", "rejected": [said("assistant", "a", reasoning_content="hm")]})
    printed = []
    assert len(write(records, OBJECTIVES["dpo"].kind, print_fn=printed.append)) == 2
    assert "dropped 1 (whose chosen and rejected answers are one as the template writes them)" in printed[0]


# ---- what is refused ----


@pytest.fixture(scope="module")
def files(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    judged = [
        {"prompt": sentence(i, 3), "completion": sentence(99 + i, i % 9 + 1), "label": i % 3 == 0} for i in range(20)
    ]
    contents = {
        "pairs": records_of_words(24),
        "val": records_of_words(9, 2000),
        "alpaca": [{"instruction": f"q {i}", "output": "a"} for i in range(6)],
        "judged": judged,
        "good": [each | {"label": True} for each in judged],
        "bad": [each | {"label": False} for each in judged],
    }
    for name, records in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: folder / f"{name}.jsonl" for name in contents}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dpo --data ALPACA", "its records are Alpaca; --objective dpo wants preferences"),
        ("orpo --data JUDGED", "its records are KTO; --objective orpo wants preferences"),
        ("kto --data ALPACA", "its records are Alpaca; --objective kto wants judged answers"),
        ("dpo --data PAIRS --val ALPACA", "its records are Alpaca"),
        ("kto --data GOOD", "all answers are good; --objective kto learns from good and bad ones"),
        ("kto --data BAD", "all answers are bad"),
        ("dpo", "--objective dpo: the bundled task has no such data; give --data FILE"),
        ("dpo --data PAIRS --replay ALPACA=0.2", "--replay: mixes in texts"),
        ("kto --data PAIRS --truncate prompt", "--truncate: --objective kto takes whole answers"),
        ("ipo --data PAIRS --train-on last-answer", "--train-on: --objective ipo takes whole answers"),
        ("dpo --data PAIRS --eval-metric rouge", "--eval-metric: compares answers with references"),
        ("dpo --data PAIRS --beta 0", "--beta 0: must be above 0"),
        ("dpo --data PAIRS --beta nan", "--beta nan: must be above 0"),
        ("dpo --data PAIRS --label-smoothing 0.5", "--label-smoothing 0.5: must be below 0.5"),
        ("dpo --data PAIRS --label-smoothing -0.1", "--label-smoothing -0.1: must be 0 or more"),
        ("ipo --data PAIRS --label-smoothing 0.1", "--label-smoothing: is for --objective"),
        ("dpo --data PAIRS --margin 1", "--margin: is for --objective simpo, not for --objective dpo"),
        ("simpo --data PAIRS --margin -1", "--margin -1: must be 0 or more"),
        ("kto --data PAIRS --length-normalized", "--length-normalized: is for --objective dpo"),
        ("dpo --data PAIRS --desirable-weight 2", "--desirable-weight: is for --objective kto"),
        ("kto --data PAIRS --undesirable-weight 0", "--undesirable-weight 0: must be above 0"),
        ("sft --data PAIRS --beta 0.1", "--beta: is for --objective dpo"),
        ("dpo --data PAIRS --seq-len 8", "no record can be trained on (24 of which a text does not fit"),
        ("dop --data PAIRS", "--objective: invalid choice: 'dop'"),
    ],
)
def test_what_does_not_go_together_ends_with_one_line(base, files, tmp_path, monkeypatch, capsys, words, said):
    given = words
    for name, file in files.items():
        given = given.replace(name.upper(), str(file))
    # The command of a bundled task has a model of its own.
    more = ["--model", base] if "--data" in words else []
    line = refusal_of(train, monkeypatch, capsys, "--objective", *given.split(), *more, "--out", tmp_path / "run")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_context_parallel_is_refused(files):
    given = flags.Flags(objective="dpo", data=[str(files["pairs"])], context_parallel=2)
    with pytest.raises(UserError, match="--context-parallel: shares the tokens of a text; not with --objective dpo"):
        check_objective(given)


# ---- whole runs ----


REPORTED = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
REPORTED_OF = dict.fromkeys(OF_PAIRS, REPORTED) | {"kto": ("accuracy", "reward_good", "reward_bad", "kl")}


@pytest.fixture
def run(base, files, tmp_path, monkeypatch, capsys):
    """run(name, words): a run of six examples a step, which ends well, in this folder."""

    def start(name: str, *words) -> Path:
        given = ["--model", base, "--data", files["pairs"], "--val", files["val"], "--batch-size", 6]
        given += ["--dtype", "fp32", "--out", tmp_path / name, *words]
        _, err, code = command(train, monkeypatch, capsys, *given)
        assert code == 0, err
        return tmp_path / name

    return start


@pytest.mark.parametrize("objective", OF_WHOLES)
def test_a_run_reports_each_step_and_each_validation(run, objective):
    words = ["--objective", objective, "--rank", 4, "--steps", 4, "--eval-every", 2, "--lr", 3e-3]
    found = lines(run("run", *words))
    steps = [line for line in found if "loss" in line]
    validations = [line for line in found if "val_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and [line["step"] for line in validations] == [0, 2, 4]
    for name in REPORTED_OF[objective]:
        assert all(isinstance(line[name], float) for line in steps), name
        assert all(isinstance(line[f"val_{name}"], float) for line in validations), name
    beginning, end = validations[0], validations[-1]
    assert end["val_loss"] != beginning["val_loss"]
    if objective in ("dpo", "ipo"):
        assert beginning["val_margin"] == beginning["val_reward_chosen"] == 0 and beginning["val_accuracy"] == 0.5
        assert beginning["val_loss"] == pytest.approx({"dpo": math.log(2), "ipo": 25.0}[objective], abs=1e-6)
    if objective == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and steps[0]["margin"] == 0
        margin = end["val_reward_chosen"] - end["val_reward_rejected"]
        assert end["val_margin"] == pytest.approx(margin, abs=1e-6) != 0
    if objective == "kto":
        assert beginning["val_loss"] == 0.5 and beginning["val_kl"] == 0


def test_packed_rows_hold_whole_pairs_and_change_nothing(run):
    words = ["--objective", "dpo", "--rank", 4, "--steps", 3, "--eval-every", 3, "--lr", 3e-3, "--seq-len", 64]
    packed = lines(run("packed", *words, "--pack"))
    plain = lines(run("plain", *words, "--no-pack"))
    assert packed[0]["val_loss"] == plain[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-7)
    # A row has room for two texts of --seq-len, and so for several short pairs.
    assert packed[1]["tokens"] > 1.25 * plain[1]["tokens"]
    assert packed[1]["loss"] == pytest.approx(math.log(2), abs=1e-7) and packed[1]["margin"] == 0


RESUMED = {
    "dpo lora": "--objective dpo --rank 4 --dropout 0.2 --beta 0.3",
    "dpo full": "--objective dpo --method full --lr 1e-3 --accumulate 2",
    "kto lora": "--objective kto --rank 4",
    "kto full": "--objective kto --method full --lr 1e-3",
}
LINES = ("step", "loss", "val_loss", "lr", "grad_norm", "kl", *REPORTED, *(f"val_{name}" for name in REPORTED))


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_run_that_was_not_stopped(run, tmp_path, monkeypatch, capsys, case):
    words = RESUMED[case].split()
    whole = run("whole", *words, "--steps", 6, "--save-every", 3, "--eval-every", 2)
    cut = shutil.copytree(whole, tmp_path / "cut", symlinks=True)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints/step-6")
    out, err, code = command(train, monkeypatch, capsys, "--out", cut, "--resume")
    assert code == 0, err
    assert "resumed   after step 3 of 6" in out
    assert ("read from reference.safetensors" in out) == ("full" in case)
    mine, theirs = ([[line.get(name) for name in LINES] for line in lines(each)] for each in (whole, cut))
    assert mine == theirs
    (file,) = (whole / "final").glob("*.safetensors")
    mine, theirs = load_file(file), load_file(cut / "final" / file.name)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, 100)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        content = bytearray(file.read_bytes())
        content[-5] ^= 0x40
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "a flipped bit"])
def test_a_reference_that_is_not_whole_ends_a_resumed_run(run, monkeypatch, capsys, how):
    folder = run("run", "--objective", "dpo", "--method", "full", "--steps", 4, "--save-every", 2)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints/step-4")
    damage(folder / "reference.safetensors", how)
    line = refusal_of(train, monkeypatch, capsys, "--out", folder, "--resume")
    assert "reference.safetensors is" in line and "damaged" in line and "--overwrite" in line
    assert not (folder / "final").exists() and (folder / "checkpoints/step-2").is_dir()


def learnable(folder: Path, name: str, count: int, seed: int) -> Path:
    """Preferences for answers that say "河"."""
    records = []
    for i in range(count):
        words = [sentence(seed + 2 * i + side, 4).replace("河", "fox") for side in (0, 1)]
        records.append({"prompt": sentence(i, 2), "chosen": f"河 {words[0]}", "rejected": f"blue {words[1]}"})
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.mark.parametrize("objective", OF_WHOLES)
def test_what_is_easily_told_apart_is_learned(run, tmp_path, objective):
    files = [learnable(tmp_path, "train.jsonl", 60, 0), learnable(tmp_path, "held_out.jsonl", 20, 7000)]
    words = ["--objective", objective, "--data", files[0], "--val", files[1], "--val-limit", 0]
    found = lines(run("run", *words, "--lr", 1e-2, "--steps", 16, "--eval-every", 16))
    validations = [line for line in found if "val_loss" in line]
    assert validations[0]["val_accuracy"] < 0.7 and validations[-1]["val_accuracy"] > 0.95
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--objective dpo", "--objective kto", "--objective kto --method full"])
def test_two_processes_take_the_steps_of_one(base, files, run, tmp_path, words):
    more = ["--steps", 4, "--eval-every", 2, "--lr", 1e-3, *words.split()]
    one = lines(run("one", *more))
    given = ["--model", base, "--data", files["pairs"], "--val", files["val"], "--dtype", "fp32", "--device", "cpu"]
    torchrun(2, "train.py", *given, "--batch-size", 3, *more, "--out", tmp_path / "two", OMP_NUM_THREADS="1")
    two = lines(tmp_path / "two")
    names = ("step", "loss", "val_loss", "grad_norm", "accuracy", "kl", "val_kl", "logp_chosen", "val_logp_chosen")
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        known = {name: mine[name] for name in names if name in mine}
        assert {name: theirs[name] for name in known} == pytest.approx(known, rel=1e-4, abs=1e-5)


# ---- log(1 - p) ----


def true_complement(logp: float) -> tuple[float, float]:
    """log(1 - exp(logp)) and its slope."""
    with mpmath.workdps(60):
        exact = mpmath.mpf(logp)
        return float(mpmath.log1p(-mpmath.exp(exact))), float(-1 / mpmath.expm1(-exact))


EDGES = [-1e-7, -(2.0**-23), -1e-6, -1e-3, -0.4999, -0.5, -0.5001, -math.log(2), -1.0, -10.0, -80.0, -103.0]


@settings(max_examples=150, deadline=None)
@given(strategies.one_of(strategies.sampled_from(EDGES), strategies.floats(-120.0, -(2.0**-22), width=32)))
def test_the_logarithm_of_a_complement_is_exact(logp):
    x = torch.tensor(logp, dtype=torch.float32).clamp(max=-torch.finfo(torch.float32).eps).requires_grad_()
    wanted, slope = true_complement(x.item())
    found = log_of_complement(x)
    found.backward()
    assert found.item() == pytest.approx(wanted, rel=1e-6, abs=1e-44)
    assert float(x.grad) == pytest.approx(slope, rel=2e-6, abs=1e-37)


def test_the_logarithm_of_a_complement_is_finite_at_its_ends():
    x = torch.tensor([0.0, -1e-12, 1e-8, -1e4, -math.inf], requires_grad=True)
    found = log_of_complement(x)
    # A probability of 1 is the largest below it.
    assert found[:3].tolist() == pytest.approx([math.log(2.0**-23)] * 3, rel=1e-6)
    assert found[3:].tolist() == [0, 0]
    found.sum().backward()
    assert x.grad.isfinite().all() and x.grad[3:].tolist() == [0, 0]
    doubles = torch.tensor([-1e-10, -30.0], dtype=torch.float64)
    wanted = [true_complement(value)[0] for value in doubles.tolist()]
    assert log_of_complement(doubles).tolist() == pytest.approx(wanted, rel=1e-9)


def test_the_loss_of_orpo_is_finite_where_an_answer_is_certain():
    logps = torch.tensor([[0.0, -50.0], [-1e-9, -0.0]], requires_grad=True)
    answers = ScoredAnswers(logps, None, torch.ones(2, 2), torch.zeros(2))
    losses, _ = OBJECTIVES["orpo"].equation(answers, options("orpo"))
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad.isfinite().all()
