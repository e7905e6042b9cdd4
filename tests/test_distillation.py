"""--objective distill: the divergence against torch's own on all logits, losses and gradients against trl, answers that
the student writes itself, what the teacher reads and is, and whole runs."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from support.helpers import chat_base, move, output_of, refusal_of, relative, sentence
from support.preferences import answered, gradients_of, hf_model, random_pairs
from support.runs import lines, records
from support.training_runs import CPU
from support.training_runs import settings as run_settings

import convert
import train
from checkpoint import hf_name, load_model
from common.errors import UserError
from data import Batch, MicroBatches, TrainingData, collate
from dataset.examples import Example
from flags import parse_flags
from kernels import divergence
from kernels.divergence import linear_divergence
from methods import load_trainable
from model import Transformer, quantized_linears
from objectives import Losses, StepTotals, check_objective, supervised_loss, token_logps
from tokenizer import Tokenizer, load_tokenizer
from training.defaults import Settings, resolve_defaults
from training.distillation import DistillRun, OwnAnswersRun, Teacher
from training.run_objective import objective_of_run

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ROWS = 306  # of the embedding table of chat_base
# What a teacher is asked that is shown the reference.
ASKS_AS_TEACHER = "{}\n\nA right answer to this is:\n\n{}\n\nNow give an answer of your own."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base") / "base", num_key_value_heads=2, num_hidden_layers=2)


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """A teacher with the same tokens that has larger layers and more rows in its tables, as if padded."""
    folder = chat_base(tmp_path_factory.mktemp("larger") / "larger", hidden_size=128, seed=7)
    model = hf_model(folder)
    model.resize_token_embeddings(ROWS + 14, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[ROWS:] = 3.0
    model.save_pretrained(folder)
    return folder


def options(**changes) -> Settings:
    return run_settings(**({"objective": "distill", "dtype": "fp32", "shard": "none"} | changes))


# ---- the divergence ----


class Heads(NamedTuple):
    """What a divergence is computed from."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor


def random_heads(tokens: int = 11, rows: int = 40, teacher_rows: int = 40, dtype=torch.float32) -> Heads:
    torch.manual_seed(tokens + rows)
    shapes = ((tokens, 16), (rows, 16), (tokens, 24), (teacher_rows, 24))
    heads = Heads(*(torch.randn(shape).to(dtype) for shape in shapes))
    heads.hidden.requires_grad_()
    heads.weight.requires_grad_()
    return heads


def divergence_of_all_logits(heads: Heads, reverse: bool, softcaps=(None, None)) -> torch.Tensor:
    """torch's own KL divergence of each token, [tokens], of the logits of the tokens that both have."""
    rows = min(len(heads.weight), len(heads.teacher_weight))
    pairs = ((heads.hidden, heads.weight), (heads.teacher_hidden, heads.teacher_weight))
    logps = []
    for (hidden, weight), softcap in zip(pairs, softcaps, strict=True):
        logits = F.linear(hidden, weight[:rows]).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logps.append(logits.log_softmax(-1))
    student, teacher = logps
    if reverse:
        student, teacher = teacher, student
    # F.kl_div(log q, log p) is KL(p || q).
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert wanted.norm() > 0 and relative(found, wanted) < tolerance


CASES = {
    "plain": ((11, 40, 40), (None, None), False),
    "weights": ((11, 40, 40), (None, None), True),
    "soft-caps": ((11, 40, 40), (2.0, 3.0), True),
    "soft-cap of the student": ((11, 40, 40), (2.0, None), False),
    "soft-cap of the teacher": ((11, 40, 40), (None, 2.0), False),
    "a larger teacher": ((11, 40, 47), (2.0, None), True),
    "a larger student": ((11, 47, 40), (None, None), True),
}


@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_divergence_is_torch_s_on_all_logits(monkeypatch, case, reverse, at_once):
    sizes, softcaps, is_weighted = CASES[case]
    monkeypatch.setitem(divergence.LOGITS_BYTES, "cpu", at_once * min(sizes[1:]) * 4)
    heads = random_heads(*sizes)
    weights = None
    if is_weighted:
        weights = torch.rand(len(heads.hidden))
        weights[3] = 0
    wanted_each = divergence_of_all_logits(heads, reverse, softcaps)
    wanted = (wanted_each * (1.0 if weights is None else weights)).sum()
    (wanted * 0.7).backward()
    wanted_gradients = heads.hidden.grad.clone(), heads.weight.grad.clone()
    heads.hidden.grad = heads.weight.grad = None

    total, each = linear_divergence(*heads, reverse, softcaps, weights)
    (total * 0.7).backward()
    assert total.dtype == torch.float32 and not each.requires_grad
    torch.testing.assert_close(each, wanted_each.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.detach(), wanted.detach(), rtol=1e-5, atol=1e-5)
    for found, gradient in zip((heads.hidden.grad, heads.weight.grad), wanted_gradients, strict=True):
        assert_close(found, gradient)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [(40, 40), (47, 40)])
def test_rows_that_are_trained_alone_get_their_part_of_the_gradient(rows, reverse):
    heads = random_heads(11, *rows)
    ids = torch.tensor([5, rows[0] - 1, 0])
    weights = torch.rand(11)
    (divergence_of_all_logits(heads, reverse, (2.0, None)) * weights).sum().backward()
    wanted, wanted_hidden = heads.weight.grad[ids], heads.hidden.grad.clone()
    # A row that the teacher has not is no token of the loss.
    assert bool(wanted[1].any()) == (rows[0] == 40)
    heads.hidden.grad = None
    of_ids = heads.weight.detach()[ids].requires_grad_()
    frozen = heads._replace(weight=heads.weight.detach())
    total, _ = linear_divergence(*frozen, reverse, (2.0, None), weights, (ids, of_ids))
    total.backward()
    assert_close(of_ids.grad, wanted)
    assert_close(heads.hidden.grad, wanted_hidden)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_divergence_in_bf16_is_that_of_the_rounded_logits(reverse):
    heads = random_heads(dtype=torch.bfloat16)
    wanted_each = divergence_of_all_logits(heads, reverse)
    wanted_each.sum().backward()
    wanted = heads.hidden.grad.clone(), heads.weight.grad.clone()
    heads.hidden.grad = heads.weight.grad = None
    total, each = linear_divergence(*heads, reverse)
    total.backward()
    # Both add up in float32 what the same products in bf16 give.
    torch.testing.assert_close(each, wanted_each.detach(), rtol=1e-5, atol=1e-5)
    for found, gradient in zip((heads.hidden.grad, heads.weight.grad), wanted, strict=True):
        assert_close(found, gradient, 2**-7)


@pytest.mark.parametrize("reverse", [False, True])
def test_without_gradients_or_tokens_the_divergence_is_a_number(reverse):
    heads = random_heads()
    with torch.no_grad():
        total, each = linear_divergence(*heads, reverse, loss_weights=torch.full((11,), 0.5))
    assert not total.requires_grad and heads.hidden.grad is None
    wanted = divergence_of_all_logits(heads, reverse).detach()
    torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, 0.5 * wanted.sum(), rtol=1e-5, atol=1e-5)

    none = random_heads(tokens=0)
    total, each = linear_divergence(*none, reverse, loss_weights=torch.zeros(0))
    total.backward()
    assert total == 0 and each.shape == (0,)
    assert none.hidden.grad.shape == (0, 16) and not none.weight.grad.any()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_token_that_one_of_the_models_is_certain_of_leaves_finite_numbers(reverse):
    heads = random_heads(4)
    certain = heads._replace(hidden=(100 * heads.hidden).detach().requires_grad_())
    for each in (certain, heads._replace(teacher_hidden=100 * heads.teacher_hidden)):
        total, of_tokens = linear_divergence(*each, reverse)
        (gradient,) = torch.autograd.grad(total, each.hidden)
        assert of_tokens.isfinite().all() and (of_tokens > 0).all() and gradient.isfinite().all()


# ---- a step, against trl ----


def random_examples(count: int = 7, **fields) -> list[Example]:
    return [answered(pair.prompt, pair.chosen, **fields) for pair in random_pairs(count)]


class Step(NamedTuple):
    """loss: with the balance loss of routed experts. losses: as they are reported."""

    loss: float
    losses: Losses
    gradients: dict[str, torch.Tensor]
    totals: StepTotals


def step_of(run: DistillRun, model: Transformer, batches: list[Batch], step: int = 0) -> Step:
    """Computes a step of these micro-batches of the data."""
    model.zero_grad(set_to_none=True)
    batches, totals = run.begin_step(model, batches, step, 0)
    losses, loss = Losses(CPU), 0.0
    for batch in batches:
        of_batch = run(model, batch, totals, losses)
        of_batch.backward()
        loss += float(of_batch.detach())
    gradients = {hf_name(model, name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss, losses, gradients, totals)


def distill_run(model: Transformer, teacher: Path, source: Path, **changes) -> DistillRun:
    """Distillation on given answers. source: whose tokenizer the student has."""
    settings = options(**({"teacher": str(teacher), "divergence": "forward"} | changes))
    return DistillRun(settings, Teacher(settings, model, load_tokenizer(source)))


@pytest.fixture(scope="module")
def plain_teacher(tmp_path_factory) -> Path:
    """As many rows as the student has, since trl compares the logits of all ids."""
    return chat_base(tmp_path_factory.mktemp("plain") / "teacher", hidden_size=96, num_hidden_layers=1, seed=5)


@pytest.fixture(scope="module")
def trl_step(base, plain_teacher):
    """trl_step(examples, beta): GKD's loss of some examples, and the gradients of the student."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    student, teacher = hf_model(base), hf_model(plain_teacher)

    def compute(examples: list[Example], beta: float) -> tuple[float, dict[str, torch.Tensor]]:
        all_logits: tuple[list, list] = ([], [])
        labels = []
        for example in examples:
            ids = torch.tensor([example.ids])
            for model, found in zip((student, teacher), all_logits, strict=True):
                found.append(model(ids).logits[:, :-1])
            is_trained = torch.tensor([example.loss_weights])[:, 1:] > 0
            labels.append(torch.where(is_trained, ids[:, 1:], -100))
        of_student, of_teacher = (torch.cat(each, 1) for each in all_logits)
        loss = GKDTrainer.generalized_jsd_loss(of_student, of_teacher.detach(), torch.cat(labels, 1), beta)
        return float(loss.detach()), gradients_of(student, loss)

    return compute


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0), ("reverse", 1)])
def test_loss_and_gradients_of_a_step_equal_trl_s_however_it_is_cut(base, plain_teacher, trl_step, kind, beta):
    examples = random_examples()
    wanted, wanted_gradients = trl_step(examples, beta)
    model = load_model(base)
    run = distill_run(model, plain_teacher, base, divergence=kind)
    for sizes in ([7], [3, 4], [1] * 7):
        parts = iter(examples)
        step = step_of(run, model, [collate([next(parts) for _ in range(size)]) for size in sizes])
        assert step.loss == pytest.approx(wanted, rel=1e-5) == pytest.approx(float(step.losses.loss), rel=1e-6)
        assert step.gradients.keys() == wanted_gradients.keys()
        for name, gradient in wanted_gradients.items():
            assert gradient.norm() > 0 and relative(step.gradients[name], gradient) < 1e-5, name


def test_weights_and_replayed_data_count_as_with_other_losses(base, plain_teacher, trl_step):
    examples = random_examples(4)
    factors = (0.5, 1.0, 2.0, 1.0)
    alone = [trl_step([example], 0)[0] * sum(example.loss_weights) for example in examples]
    weighted = [
        answered(pair.prompt, pair.chosen, weight=factor, is_replay=i >= 2)
        for i, (pair, factor) in enumerate(zip(random_pairs(4), factors, strict=True))
    ]
    model = load_model(base)
    run = distill_run(model, plain_teacher, base)
    step = step_of(run, model, [collate(weighted[:3]), collate(weighted[3:])])
    weights = [sum(example.loss_weights) for example in weighted]
    sums = [value * factor for value, factor in zip(alone, factors, strict=True)]
    assert step.loss == pytest.approx(sum(sums) / sum(weights), rel=1e-5)
    replayed = step.losses.extra(step.totals)["replay_loss"]
    assert float(replayed) == pytest.approx(sum(sums[2:]) / sum(weights[2:]), rel=1e-5)


@pytest.fixture(scope="module")
def mixtral(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    config = transformers.MixtralConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copy(base / file, folder / file)
    return folder


def test_the_balance_loss_of_routed_experts_stays(base, larger, mixtral):
    model = load_model(mixtral)
    model.train()
    batch = collate(random_examples())
    supervised = Losses(CPU)
    supervised_loss(model, batch, StepTotals.of([batch]), supervised)
    run = distill_run(model, larger, mixtral)
    step = step_of(run, model, [batch])
    assert float(step.losses.balance_loss) == float(supervised.balance_loss) > 1
    balance = model.config.experts.balance * float(supervised.balance_loss)
    assert step.loss == pytest.approx(float(step.losses.loss) + balance, rel=1e-6)
    model.zero_grad(set_to_none=True)
    total, _ = run.divergence(model, batch, run.teacher.hidden(batch))
    (total / step.totals.loss_weight_sum).backward()
    names = {name: p.grad for name, p in model.named_parameters() if ".router" in name or ".gate" in name}
    assert any(not torch.equal(step.gradients[hf_name(model, name)], alone) for name, alone in names.items())
    # A teacher's experts are none of the student.
    dense = load_model(base)
    assert step_of(distill_run(dense, mixtral, base), dense, [batch]).losses.balance_loss is None


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_nothing_is_left_to_learn_from_an_equal_teacher(base, kind):
    model = load_model(base)
    step = step_of(distill_run(model, base, base, divergence=kind), model, [collate(random_examples())])
    assert abs(step.loss) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in step.gradients.values())


# ---- the student's own answers ----


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    unanswered = [{"messages": [{"role": "user", "content": sentence(i, 3)}]} for i in range(9)]
    (folder / "unanswered.jsonl").write_text("".join(json.dumps(each) + "\n" for each in unanswered))
    return {
        "data": records(folder / "data.jsonl", 24, 0),
        "val": records(folder / "val.jsonl", 9, 500),
        "unanswered": folder / "unanswered.jsonl",
    }


class Started(NamedTuple):
    """A run before its first step, and the micro-batches that the data give to it."""

    settings: Settings
    model: Transformer
    tokenizer: Tokenizer
    data: TrainingData
    objective: OwnAnswersRun
    batches: list[Batch]


@pytest.fixture
def start(base, files, capsys):
    """start(words): what train.train makes of a command line up to the first step."""

    def begin(*words, model: Path = base) -> Started:
        given = ["--objective", "distill", "--model", model, "--data", files["data"], "--val", files["val"]]
        given += ["--dtype", "fp32", "--batch-size", 5, "--steps", 3, *words]
        if "--own-answers" in words:
            given += ["--max-new-tokens", 9]
        inputs = train.read_inputs(parse_flags(list(map(str, given))), CPU)
        settings = resolve_defaults(inputs.flags, inputs.folder, inputs.data, CPU)
        student = load_trainable(settings, inputs.folder, CPU)
        objective = objective_of_run(settings, student, inputs.tokenizer, inputs.data)
        loader = MicroBatches(inputs.data.train, inputs.data.sampler, CPU, settings.batch_size, settings.accumulate)
        return Started(settings, student, inputs.tokenizer, inputs.data, objective, loader.step(0))

    return begin


def take_steps(started: Started, rate: float = 0.05) -> None:
    """Trains two steps, of the same prompts, as the loop does."""
    trained = [p for p in started.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    started.model.train()
    for step in range(2):
        gradients = step_of(started.objective, started.model, started.batches, step).gradients
        assert any(gradient.any() for gradient in gradients.values())
        optimizer.step()


def records_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def hf_logits(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """transformers' logits of each token of an answer, [tokens, V]."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("group_size", [1, 2])
def test_what_is_trained_are_tokens_that_the_student_has_written(base, start, files, group_size):
    started = start("--teacher", base, "--own-answers", "--method", "full", "--group-size", group_size)
    move(started.model)  # so that its answers are not those of the base
    batches, totals = started.objective.begin_step(started.model, started.batches, 0, 0)
    asked = [example for batch in started.batches for example in batch.examples]
    found = [example for batch in batches for example in batch.examples]
    assert len(found) == 5 * group_size and totals.num_trained == sum(len(each.sampled.logps) for each in found)
    prompts = {tuple(map(int, example.ids)) for example in asked}
    stop_ids = started.tokenizer.stop_ids
    by_prompt: dict[tuple, set] = {}
    for batch in batches:
        of_batch = [list(example.ids)[-len(example.sampled.logps) :] for example in batch.examples]
        assert batch.targets.tolist() == [id for answer in of_batch for id in answer]
        recorded = torch.tensor([logp for example in batch.examples for logp in example.sampled.logps])
        torch.testing.assert_close(token_logps(started.model, batch).detach(), recorded, rtol=1e-5, atol=1e-5)
        for example, answer in zip(batch.examples, of_batch, strict=True):
            prompt = tuple(example.ids[: -len(answer)])
            assert prompt in prompts
            by_prompt.setdefault(prompt, set()).add(tuple(answer))
            assert not stop_ids & set(answer[:-1])
            assert example.sampled.is_cut == (answer[-1] not in stop_ids)
            assert len(answer) == 9 or not example.sampled.is_cut
    # The answers of a group are drawn by numbers of their own.
    assert sum(map(len, by_prompt.values())) == 5 * group_size
    # As the template writes the prompts, without their answers.
    assert prompts <= shown_by_prompt(base, files["data"]).keys()


def test_other_steps_have_other_answers_and_the_same_step_the_same(base, start):
    started = start("--teacher", base, "--own-answers", "--method", "full")

    def answers(step: int) -> list[list[int]]:
        batches, _ = started.objective.begin_step(started.model, started.batches, step, 0)
        return [list(map(int, example.ids)) for batch in batches for example in batch.examples]

    assert answers(0) == answers(0) != answers(1)


def shown_by_prompt(base: Path, file: Path) -> dict[tuple[int, ...], list[int]]:
    """As transformers writes them: the ids of each record's prompt, and of the one that shows the answer."""
    template = transformers.AutoTokenizer.from_pretrained(base)
    shown = {}
    for record in records_of(file):
        texts = (record["prompt"], ASKS_AS_TEACHER.format(record["prompt"], record["completion"]))
        chats = [[{"role": "user", "content": text}] for text in texts]
        plain, with_answer = (
            template.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats
        )
        shown[tuple(plain)] = with_answer
    return shown


@pytest.mark.parametrize("words", ["--rank 4", "--method full"])
def test_the_teacher_reads_the_same_answers_behind_a_prompt_that_shows_the_reference(base, start, files, words):
    started = start("--teacher", "self", "--own-answers", *words.split())
    objective = started.objective
    batches, _ = objective.begin_step(started.model, started.batches, 0, 0)
    hf = hf_model(base)
    shown = shown_by_prompt(base, files["data"])
    for batch in batches:
        read = objective.teacher_batch(batch)
        assert torch.equal(read.targets, batch.targets) and len(read.examples) == len(batch.examples)
        wanted = []
        for mine, theirs in zip(batch.examples, read.examples, strict=True):
            answer = list(mine.ids)[-len(mine.sampled.logps) :]
            prompt = shown[tuple(map(int, mine.ids[: -len(answer)]))]
            assert list(map(int, theirs.ids)) == prompt + answer
            wanted.append(hf_logits(hf, prompt, answer))
        logits = objective.teacher.hidden(read) @ objective.teacher.head().T
        torch.testing.assert_close(logits, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_a_validation_shows_the_references_of_its_own_records(base, start, files, monkeypatch):
    started = start("--teacher", "self", "--own-answers", "--rank", 4)
    objective, read = started.objective, []
    compute = objective.teacher.hidden
    monkeypatch.setattr(objective.teacher, "hidden", lambda batch: read.append(batch) or compute(batch))
    asked = list(started.data.val.examples)
    found = [objective.validate(started.model, [collate(asked)], lambda sums: None) for _ in range(2)]
    # The same random numbers each time.
    assert found[0] == found[1] and found[0]["loss"] > 0.1
    examples = [example for batch in read[: len(read) // 2] for example in batch.examples]
    shown = shown_by_prompt(base, files["val"])
    prompts = []
    answer_tokens = 0
    for example in examples:
        count = len(example.sampled.logps)
        prompts.append(list(map(int, example.ids[:-count])))
        answer_tokens += count
    assert sorted(prompts) == sorted(shown[tuple(map(int, example.ids))] for example in asked)
    assert found[0]["answer_tokens"] == pytest.approx(answer_tokens / 9) and 0 <= found[0]["cut"] <= 1


def test_the_loss_of_own_answers_is_that_of_transformers_logits(base, larger, start):
    """The reverse divergence, its default, from a teacher that is shown the reference, and from another model."""
    started = start("--teacher", larger, "--own-answers", "--method", "full")
    assert started.settings.divergence == "reverse"
    student, teacher = hf_model(base), hf_model(larger)
    batches, _ = started.objective.begin_step(started.model, started.batches, 0, 0)
    losses = []
    for example in (example for batch in batches for example in batch.examples):
        count = len(example.sampled.logps)
        prompt, answer = list(example.ids)[:-count], list(example.ids)[-count:]
        of_student, of_teacher = (
            hf_logits(model, prompt, answer)[:, :ROWS].log_softmax(-1) for model in (student, teacher)
        )
        losses.append(F.kl_div(of_teacher, of_student, reduction="none", log_target=True).sum(-1))
    wanted = float(torch.cat(losses).mean())
    step = step_of(started.objective, started.model, started.batches)
    assert step.loss == pytest.approx(wanted, rel=1e-5)
    lengths = [len(each) for each in losses]
    reported = step.losses.extra(step.totals)
    assert float(reported["answer_tokens"]) == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize(
    "words",
    [
        "--rank 4",
        "--method qlora --rank 4",
        "--method ia3",
        "--rank 4 --train-tokens <|im_end|>",
        "--rank 4 --modules-to-save embed_tokens,lm_head",
        "--rank 4 --add-tokens TOKENS",
    ],
)
def test_under_an_adapter_the_teacher_is_the_base_to_the_bit(base, start, tmp_path, words):
    (tmp_path / "tokens.txt").write_text("fox jumps\n12 7\n")
    started = start(
        "--teacher", "self", "--own-answers", *words.replace("TOKENS", str(tmp_path / "tokens.txt")).split()
    )
    teacher = started.objective.teacher
    assert teacher.model is started.model
    batch = started.objective.teacher_batch(started.objective.begin_step(started.model, started.batches, 0, 0)[0][0])
    before = teacher.hidden(batch), teacher.head().clone()
    if "add-tokens" not in words:
        plain = load_model(base, quant=started.settings.quant)
        with torch.no_grad():
            hidden = plain.flat(batch.tokens, batch.documents).index_select(0, batch.logit_positions)
            assert torch.equal(before[0], hidden) and torch.equal(before[1], plain.head_weight())
    take_steps(started)
    move(started.model)
    assert torch.equal(teacher.hidden(batch), before[0]) and torch.equal(teacher.head(), before[1])
    assert started.model.training
    # The student itself is another one by now.
    with torch.no_grad():
        hidden = started.model.flat(batch.tokens, batch.documents).index_select(0, batch.logit_positions)
    assert (hidden - before[0]).abs().max() > 0.01


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter that peft has written."""
    torch.manual_seed(0)
    model = peft.get_peft_model(hf_model(base), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path):
    return peft.PeftModel.from_pretrained(hf_model(base), adapter).eval()


@pytest.mark.parametrize("words", ["--method full", "--rank 4 --init pissa", "--rank 4 --dora", "--adapter ADAPTER"])
def test_a_teacher_that_was_the_student_stays_as_it_was(base, adapter, start, words):
    started = start("--teacher", "self", "--own-answers", *words.replace("ADAPTER", str(adapter)).split())
    teacher = started.objective.teacher
    assert teacher.model is not started.model
    batch = started.objective.teacher_batch(started.objective.begin_step(started.model, started.batches, 0, 0)[0][0])
    with torch.no_grad():
        student = started.model.flat(batch.tokens, batch.documents).index_select(0, batch.logit_positions)
    before = teacher.hidden(batch), teacher.head().clone()
    # It is the student before step 1: PiSSA and DoRA begin as the base but for rounding.
    torch.testing.assert_close(before[0], student, rtol=1e-3, atol=1e-3)
    oracle = peft_model(base, adapter) if "ADAPTER" in words else hf_model(base)
    ids = list(map(int, batch.examples[0].ids))
    answer = ids[-len(batch.examples[0].sampled.logps) :]
    wanted = hf_logits(oracle, ids[: -len(answer)], answer)
    found = (before[0] @ before[1].T)[: len(answer)]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    weights = {name: parameter.detach().clone() for name, parameter in teacher.model.named_parameters()}
    take_steps(started)
    move(started.model)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in teacher.model.named_parameters())
    assert torch.equal(teacher.hidden(batch), before[0])
    with torch.no_grad():
        moved = started.model.flat(batch.tokens, batch.documents).index_select(0, batch.logit_positions)
    assert (moved - before[0]).abs().max() > 0.01


# ---- teachers ----


def teacher_logits(run: DistillRun, example: Example) -> torch.Tensor:
    return run.teacher.hidden(collate([example])) @ run.teacher.head().T


@pytest.mark.parametrize("kind", ["folder", "adapter", "gguf"])
def test_teachers_of_every_kind_are_those_of_transformers(
    base, larger, adapter, start, tmp_path, monkeypatch, capsys, kind
):
    if kind == "gguf":
        monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
        output_of(convert, monkeypatch, capsys, "to-gguf", base, tmp_path / "teacher.gguf", "--type", "f32")
    named, oracle = {
        "folder": (larger, lambda: hf_model(larger)),
        "adapter": (adapter, lambda: peft_model(base, adapter)),
        "gguf": (tmp_path / "teacher.gguf", lambda: hf_model(base)),
    }[kind]
    started = start("--teacher", named, "--rank", 4)
    assert type(started.objective) is DistillRun and not started.objective.teacher.model.training
    (example,) = random_examples(1)
    count = int(sum(example.loss_weights))
    wanted = hf_logits(oracle(), example.ids[:-count], example.ids[-count:])
    torch.testing.assert_close(teacher_logits(started.objective, example), wanted, rtol=1e-4, atol=1e-4)


def test_a_student_in_4_bits_has_a_teacher_in_4_bits(larger, start):
    started = start("--teacher", larger, "--method", "qlora", "--rank", 4)
    found = quantized_linears(started.objective.teacher.model)
    # Rows of 112 numbers are no whole blocks.
    assert len(found) == 3 * 6
    batch = collate(random_examples(1))
    logits = []
    for quant in ("nf4", None):
        model = load_model(larger, quant=quant)
        with torch.no_grad():
            hidden = model.flat(batch.tokens, batch.documents).index_select(0, batch.logit_positions)
        logits.append(hidden @ model.head_weight().T)
    found_logits = teacher_logits(started.objective, batch.examples[0])
    assert torch.equal(found_logits, logits[0]) and not torch.equal(found_logits, logits[1])


# ---- what is refused ----


@pytest.fixture(scope="module")
def bad(base, tmp_path_factory) -> dict[str, Path]:
    """Folders that are no teachers of the base."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(base, folder / "words")
    file = folder / "words/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = "!", "#"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    config = transformers.AutoConfig.from_pretrained(base)
    for name, labels in (("classifier", 3), ("reward", 1)):
        config.num_labels, config.pad_token_id = labels, 0
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder / name)
        for each in TOKENIZER:
            shutil.copy(base / each, folder / name / each)
    (folder / "empty").mkdir()
    gpt2 = transformers.GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "short")
    for each in TOKENIZER:
        shutil.copy(base / each, folder / "short" / each)
    return {name: folder / name for name in ("words", "classifier", "reward", "empty", "short", "nowhere")}


OWN = "--teacher self --own-answers"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--objective distill: whose probabilities are learnt? --teacher MODEL, or --teacher self with"),
        ("--own-answers", "--objective distill: whose probabilities are learnt?"),
        ("--teacher self", "--teacher self: shown the reference, it knows each of its tokens, as sft does; add --own"),
        ("--teacher WORDS", "words: has another vocabulary than the student (token 3 is '!' here, '#' there)"),
        ("--teacher CLASSIFIER", "classifier: the model has a head for sequence classification and no LM head"),
        ("--teacher REWARD", "reward: the model has a head for sequence classification and no LM head"),
        ("--teacher EMPTY", "empty: no config.json in it"),
        ("--teacher NOWHERE", "nowhere: no such folder, nor a GGUF file"),
        ("--teacher SHORT", "short: takes texts of 64 tokens, and those of the data may have 512; add --seq-len 64"),
        ("--teacher BASE --own-answers --seq-len 600", "--seq-len 600: the model has 512 positions"),
        (f"{OWN} --data UNANSWERED", "unanswered.jsonl line 1: has no answer that the teacher could be shown"),
        (f"{OWN} --val UNANSWERED", "unanswered.jsonl line 1: has no answer that the teacher could be shown"),
        (f"{OWN} --max-new-tokens 470", "tokens with its reference, and the model has room for 42 before an answer"),
        (f"{OWN} --max-new-tokens 512", "--max-new-tokens 512: leaves no room for a prompt in --seq-len 512"),
        (f"{OWN} --max-new-tokens 0", "--max-new-tokens 0: must be"),
        (f"{OWN} --group-size 0", "--group-size 0: must be"),
        (f"{OWN} --dropout 0.1", "--dropout 0.1: the model that answers would be another one"),
        (f"{OWN} --replay DATA=0.2", "--replay: mixes in texts whose tokens are trained"),
        (
            f"{OWN} --method full --add-tokens TOKENS",
            "--add-tokens: the model before step 1, which --teacher self learns",
        ),
        ("--teacher BASE --max-new-tokens 8", "--max-new-tokens: is for --own-answers"),
        ("--teacher BASE --group-size 2", "--group-size: is for --own-answers"),
        ("--teacher BASE --divergence both", "--divergence: invalid choice: 'both'"),
        ("--teacher BASE --label-smoothing 0.1", "--label-smoothing: is for --objective"),
        ("--teacher BASE --beta 0.1", "--beta: is for --objective"),
        ("--teacher BASE --objective sft", "--teacher: is for --objective distill, not for --objective sft"),
        ("--divergence reverse --objective sft", "--divergence: is for --objective distill, not for --objective sft"),
        ("--own-answers --objective sft", "--own-answers: is for --objective distill, not for --objective sft"),
    ],
)
def test_what_is_no_distillation_ends_with_one_line(base, files, bad, tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "tokens.txt").write_text("fox jumps\n")
    names = bad | files | {"base": base, "tokens": tmp_path / "tokens.txt"}
    given = [str(names[word.lower()]) if word.lower() in names and word.isupper() else word for word in words.split()]
    given = [word.replace("DATA=", f"{files['data']}=") for word in given]
    defaults = {"--objective": "distill", "--data": files["data"], "--val": files["val"]}
    more = [word for name, value in defaults.items() if name not in given for word in (name, value)]
    line = refusal_of(
        train, monkeypatch, capsys, "--model", base, "--dtype", "fp32", *more, *given, "--out", tmp_path / "run"
    )
    assert said in line
    assert not (tmp_path / "run").exists()


def test_context_parallel_is_refused():
    given = parse_flags(["--objective", "distill", "--teacher", "x", "--context-parallel", "2"])
    with pytest.raises(UserError, match="--context-parallel: shares the tokens of a text; not with --objective dis"):
        check_objective(given)


# ---- whole runs ----


@pytest.fixture
def run(base, files, tmp_path, monkeypatch, capsys):
    """run(name, words): a run that ends well, in this folder, and what it prints."""

    def start(name: str, *words) -> tuple[Path, str]:
        given = ["--objective", "distill", "--model", base, "--data", files["data"], "--val", files["val"]]
        given += ["--batch-size", 6, "--dtype", "fp32", "--out", tmp_path / name, *words]
        return tmp_path / name, output_of(train, monkeypatch, capsys, *given)

    return start


@pytest.fixture(scope="module")
def near(base, tmp_path_factory) -> Path:
    """A teacher whose weights lie near those of the student."""
    model = hf_model(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("near")
    model.save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copy(base / file, folder / file)
    return folder


@pytest.mark.parametrize(("words", "most"), [("", 0.5), ("--own-answers --max-new-tokens 12", 0.7)])
def test_the_divergence_from_the_teacher_falls(run, near, words, most):
    given = ["--method", "full", "--lr", 5e-3, "--steps", 16, "--eval-every", 16, "--save-every", 0]
    folder, said = run("run", "--teacher", near, *given, *words.split())
    found = lines(folder)
    first, last = (line["val_loss"] for line in found if "val_loss" in line)
    assert 0 < last < most * first
    steps = [line for line in found if "loss" in line]
    assert len(steps) == 16 and all(("answer_tokens" in line) == bool(words) for line in steps)
    kind = "reverse; own answers" if words else "forward"
    assert f"teacher   {near}: llama" in said and f"divergence {kind}" in said


RESUMED = {
    "own answers": "--teacher LARGER --own-answers --max-new-tokens 6 --rank 4 --group-size 2",
    "self, full": "--teacher self --own-answers --max-new-tokens 6 --method full --lr 1e-3",
    "self, going on": "--teacher self --own-answers --max-new-tokens 6 --adapter ADAPTER",
}
COMPARED = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens", "trained_tokens", "answer_tokens", "cut")
COMPARED += ("val_answer_tokens", "val_cut")
SLOW = ("own answers", "self, going on")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in RESUMED])
def test_a_resumed_run_is_the_run_that_was_not_stopped(run, larger, adapter, tmp_path, monkeypatch, capsys, case):
    """Of given answers, tests/test_resume.py has one."""
    names = {"LARGER": str(larger), "ADAPTER": str(adapter)}
    words = [names.get(word, word) for word in RESUMED[case].split()]
    whole, _ = run("whole", *words, "--steps", 4, "--save-every", 2, "--eval-every", 2)
    cut = shutil.copytree(whole, tmp_path / "cut", symlinks=True)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints/step-4")
    # Another teacher would be another run.
    line = refusal_of(train, monkeypatch, capsys, "--out", cut, "--resume", "--teacher", "elsewhere")
    assert "--teacher elsewhere (it was" in line
    out = output_of(train, monkeypatch, capsys, "--out", cut, "--resume")
    assert "resumed   after step 2 of 4" in out
    mine, theirs = ([[line.get(name) for name in COMPARED] for line in lines(each)] for each in (whole, cut))
    assert mine == theirs and len(mine) == 7
    (file,) = (whole / "final").glob("*.safetensors")
    mine, theirs = load_file(file), load_file(cut / "final" / file.name)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
