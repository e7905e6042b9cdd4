"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): --ewc LAMBDA holds the
weights near their start, each the more strongly the more the model's predictions on general text
depend on it. A step minimizes

    loss + lambda / 2 * sum_i F_i (theta_i - theta0_i)^2        (their equation 3)

where theta0 are the weights before step 1 and F is the diagonal of their Fisher information:

    F_i = sum over sequences of (d log p(y | x) / d theta_i)^2 / number of their predicted tokens

The labels y are drawn from the model itself, which is what makes it the Fisher information (Kunstner
et al. 2019, arXiv 1905.12558), and a gradient is that of a whole sequence, squared before it is
averaged. Divided by tokens, the penalty has the loss's unit: with all of F in place of its diagonal,
lambda 1 would make it KL(base || tuned) on that text, in nats a token, to second order. A diagonal
leaves out how weights act together, and is smaller.

Under LoRA theta is the adapted weight, whose change is D = s (B A - B0 A0); the Fisher information of
A itself is zero at the start, where B is. The gradient of one sequence for a weight W that is not
trained is dY^T X, with its inputs X [tokens, in] and the gradients of its outputs dY [tokens, out]:
it is squared and forgotten layer by layer, also for W in 4 bits.

The penalty's gradients are known in closed form, so they are added to those of the loss, after
gradient accumulation and before clipping, without a backward of their own.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import data
import distributed
from common.console import format_duration, number_of
from common.errors import UserError, describe_os_error
from common.files import atomic_file, save_tensors
from common.progress import progress
from common.remote_names import shown
from dataset.examples import Dataset, Example
from evals.forgetting import CHUNK_NUMBERS, log_probabilities
from flags import parse_replay
from interop.remote_data import fetch_data
from kernels.cross_entropy import linear_cross_entropy
from kernels.linear import mm_as
from lora import LoRALinear, lora_layers
from methods import method_of
from model import Transformer, eager_mode, eval_mode
from optimizers import round_stochastically
from planning import memory, multi_gpu
from planning.report import recipe_and_layout
from tokenizer import Tokenizer
from training.checkpointer import format_bytes
from training.defaults import Settings

EWC_FILE = "ewc.safetensors"
# What is read where neither --ewc-data nor --replay names anything.
DEFAULT_DATA = data.ASSETS / "general.txt"
# Plain text is read in sequences of so many tokens: each gives one square, however long it is.
TEXT_LENGTH = 128
# Numbers of a matrix that are computed at a time.
NUMBERS_AT_ONCE = 1 << 24
# A gradient for a frozen weight takes a backward half as long again.
BACKWARD_TO_FROZEN = 1.5


class EWC:
    """Computes F before step 1, keeps it for a resumed run, and adds the penalty's gradients.

    It has to be made before the weights of a checkpoint are loaded or a step is taken; faults of its
    data are reported then, and the work is done by `begin`.

    held: what is held near its start, by name.
    sequences: on which F is computed; empty where a run is resumed.
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        tokenizer: Tokenizer,
        device: torch.device,
    ):
        self.settings = settings
        self.model = model
        self.device = device
        check_fits(settings, model, device)
        self.held = held_near_start(settings, model)
        self.sequences: list[Example] = []
        # Whose they are.
        self.where = ""
        if not settings.resume:
            vocab_size = model.config.vocab_size
            self.sequences, self.where = read_sequences(settings, tokenizer, vocab_size)

    def begin(self, out: Path) -> None:
        """Computes F, and writes it into the run's folder for a resumed run, which reads it."""
        if self.settings.resume:
            with distributed.synced_errors():
                self.read(out / EWC_FILE)
            print(
                f"ewc       lambda {self.settings.ewc:g}: Fisher information as {EWC_FILE} holds it"
            )
            return
        self.print_start()
        measure_fisher(self.model, self.held, self.sequences, self.settings.seed, self.device)
        kept = distributed.run_on_rank0(functools.partial(self.write, out / EWC_FILE))
        size = sum(tensor.nbytes for each in self.held.values() for tensor in each.memory())
        print(f"          {format_bytes(size)} of memory{kept}", flush=True)

    def print_start(self) -> None:
        """Prints from what the Fisher information is computed, and how long that takes."""
        settings = self.settings
        tokens = sum(len(example.ids) for example in self.sequences)
        pace = settings.expected_seconds / settings.workload.tokens
        factor = BACKWARD_TO_FROZEN if method_of(settings).freezes_base else 1.0
        took = format_duration(factor * pace * tokens)
        print(
            f"ewc       lambda {settings.ewc:g}: a penalty on the weights' distance from their start, each"
            " by its Fisher information on"
        )
        print(
            f"          {number_of(len(self.sequences), 'sequence')}, {tokens:,} tokens, of"
            f" {self.where}: about {took}",
            flush=True,
        )

    def add_gradients(self) -> Tensor:
        """Adds the penalty's gradients to those of the trained parameters, which all ranks have in
        full. Returns the penalty, a float32 scalar."""
        return torch.stack([each.pull(self.settings.ewc) for each in self.held.values()]).sum()

    def write(self, path: Path) -> str:
        """Writes what a resumed run has to know. Returns a clause about it. A disk that is full ends
        nothing.

        Also without --save-every: a run that a signal stops can be resumed all the same."""
        tensors = {}
        for name, each in self.held.items():
            for key, tensor in each.state().items():
                tensors[f"{key} {name}"] = tensor.cpu().contiguous()
        size = format_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        try:
            with atomic_file(path) as tmp:
                save_tensors(tensors, tmp)
        except OSError as error:
            why = describe_os_error(error, path)
            return f"; WARNING: not kept, so this run can't be resumed: {why}"
        return f"; {EWC_FILE} keeps {size} of it for --resume"

    def read(self, path: Path) -> None:
        """Reads what `write` wrote. Raises UserError if it is not there, or not whole."""
        lost = "the run can't go on as it began; put the file back, or begin anew"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            raise UserError(f"--resume: {path} is missing or damaged, {lost}") from None
        for name, each in self.held.items():
            state = each.state()
            for key, tensor in state.items():
                stored = tensors.get(f"{key} {name}")
                is_same = stored is not None and stored.shape == tensor.shape
                if not is_same or stored.dtype != tensor.dtype:
                    raise UserError(f"--resume: {path} is of another model or method, {lost}")
                tensor.copy_(stored)


# ---- what is held ----


@dataclass
class HeldWeight:
    """A trained weight that is held near its start.

    start: its numbers before step 1, in its dtype.
    fisher: likewise, of its shape and dtype.
    """

    parameter: nn.Parameter
    start: Tensor
    fisher: Tensor

    def memory(self) -> list[Tensor]:
        """Returns the tensors that are kept for the whole run."""
        return [self.start, self.fisher]

    def state(self) -> dict[str, Tensor]:
        """Returns what a resumed run can't compute again; the base it loads is the start."""
        return {"fisher": self.fisher}

    def watch(
        self, add_square: Callable[[Tensor, Tensor], None]
    ) -> torch.utils.hooks.RemovableHandle:
        """Lets each backward give the gradient to add_square(fisher, gradient), and forget it.
        Returns the handle that ends this."""

        def take(parameter: Tensor) -> None:
            add_square(self.fisher, parameter.grad)
            parameter.grad = None

        return self.parameter.register_post_accumulate_grad_hook(take)

    @torch.no_grad()
    def pull(self, strength: float) -> Tensor:
        """Adds strength * F * (theta - theta0) to the gradient. Returns the penalty, a float32
        scalar."""
        parameter = self.parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        penalty = torch.zeros((), device=parameter.device)
        for rows in row_slices(parameter):
            change = parameter[rows].float() - self.start[rows].float()
            force = change * self.fisher[rows] * strength
            parameter.grad[rows].add_(force)
            penalty += (force * change).sum() / 2
        return penalty


@dataclass
class HeldUpdate:
    """An adapted layer whose weight is held near its start: what is penalized is the change of the
    update, D = s (B A - B0 A0).

    start: A0 [rank, in] and B0 [out, rank]; None where the run began with B at zero.
    fisher: of the adapted weight, [out, in].
    """

    layer: LoRALinear
    start: tuple[Tensor, Tensor] | None
    fisher: Tensor

    def memory(self) -> list[Tensor]:
        """Returns the tensors that are kept for the whole run."""
        return [*(self.start or ()), self.fisher]

    def state(self) -> dict[str, Tensor]:
        """Returns what a resumed run can't compute again."""
        if self.start is None:
            return {"fisher": self.fisher}
        A0, B0 = self.start
        return {"A0": A0, "B0": B0, "fisher": self.fisher}

    def watch(
        self, add_square: Callable[[Tensor, Tensor], None]
    ) -> torch.utils.hooks.RemovableHandle:
        """Lets each backward give the gradient of the adapted weight to add_square(fisher, gradient).
        Returns the handle that ends this."""

        def take(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()  # [tokens, in]
            # dW = dY^T X, [out, in]
            output.register_hook(
                lambda dy: add_square(self.fisher, mm_as(dy.t(), x, torch.float32))
            )

        return self.layer.register_forward_hook(take)

    @torch.no_grad()
    def pull(self, strength: float) -> Tensor:
        """Adds the penalty's gradients to those of A and B. Returns the penalty, a float32 scalar.

        With G = strength * F * D, the gradient for D: that for B is s G A^T, and for A s B^T G.
        """
        A, B, scale = self.layer.lora_A, self.layer.lora_B, self.layer.scale
        for parameter in (A, B):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        penalty = torch.zeros((), device=A.device)
        for rows in row_slices(self.fisher):
            change = scale * (B[rows] @ A)  # [rows, in]
            if self.start is not None:
                A0, B0 = self.start
                change -= scale * (B0[rows] @ A0)
            force = change * self.fisher[rows] * strength
            B.grad[rows].add_(force @ A.t(), alpha=scale)
            A.grad.add_(B[rows].t() @ force, alpha=scale)
            penalty += (force * change).sum() / 2
        return penalty


Held = HeldWeight | HeldUpdate


def check_fits(settings: Settings, model: Transformer, device: torch.device) -> None:
    """Raises UserError if the run has no room for what is kept, and would have room without it."""
    recipe, layout = recipe_and_layout(settings)
    expected = multi_gpu.memory_per_process(
        model, recipe, layout, settings.workload, device.type, settings.context_parallel
    )
    room = memory.device_memory(device)
    if expected.peak - expected.held <= room < expected.peak:
        sizes = [f"{size / 1e9:.1f} GB" for size in (expected.held, expected.peak, room)]
        raise UserError(
            f"--ewc: keeps {sizes[0]} more, so that the run would take {sizes[1]} of the {sizes[2]} here;"
            " adapt fewer layers (--targets) or train fewer weights (--train)"
        )


def held_near_start(settings: Settings, model: Transformer) -> dict[str, Held]:
    """Returns what is held near its start, by name, with a Fisher information of zeros.

    Raises UserError where the method or the model has no change of weights that could be held.
    """
    kind = method_of(settings).held
    if kind is None:
        why = "it holds the weights of full fine-tuning and the updates of LoRA alone"
        raise UserError(f"--ewc: is not for --method {settings.method}, {why}")
    held: dict[str, Held] = {}
    if kind == "weights":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                start = parameter.detach().clone()
                held[name] = HeldWeight(parameter, start, torch.zeros_like(start))
        return held
    for name, layer in lora_layers(model).items():
        if layer.variant.dora or layer.variant.start != "random":
            raise UserError(
                "--ewc: is not for DoRA, PiSSA or LoftQ, whose start is no update of zero"
            )
        if ".experts." in name:
            advice = "--targets q_proj,k_proj,v_proj,o_proj, without --target-parameters, leaves them out"
            raise UserError(f"--ewc: is not for adapters on routed experts; {advice}")
        start_of_update = None
        if settings.adapter:
            start_of_update = (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
        base = layer.base
        shape = (base.out_features, base.in_features)
        fisher = torch.zeros(
            shape, dtype=memory.fisher_dtype(model.dtype), device=layer.lora_A.device
        )
        held[name] = HeldUpdate(layer, start_of_update, fisher)
    return held


def row_slices(x: Tensor) -> Iterator[slice]:
    """Yields slices of the rows of a tensor, of about NUMBERS_AT_ONCE numbers each."""
    rows = max(1, NUMBERS_AT_ONCE * len(x) // max(1, x.numel()))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)


# ---- the Fisher information ----


def measure_fisher(
    model: Transformer,
    held: dict[str, Held],
    sequences: Sequence[Example],
    seed: int,
    device: torch.device,
) -> None:
    """Fills `fisher` of all that is held. Each of several ranks computes its share of the sequences.

    The random numbers of the run are not touched. seed: of the labels.
    """
    tokens = sum(len(data.collate([example]).targets) for example in sequences)

    def add_square(fisher: Tensor, gradient: Tensor) -> None:
        gradient = gradient.float()
        if fisher.dtype == torch.float32:
            fisher.addcmul_(gradient, gradient, value=1 / tokens)
            return
        # To the nearest bf16, small squares would be lost beside a large sum.
        total = fisher.float().addcmul_(gradient, gradient, value=1 / tokens)
        fisher.copy_(round_stochastically(total))

    devices = [device] if device.type == "cuda" else []
    checkpointing = model.activation_checkpointing
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(seed)
        stack.enter_context(eval_mode(model))
        stack.enter_context(eager_mode(model))
        for each in held.values():
            stack.callback(each.watch(add_square).remove)
        # A layer that is computed twice would be counted twice.
        model.activation_checkpointing = "none"
        stack.callback(setattr, model, "activation_checkpointing", checkpointing)
        mine = range(distributed.rank(), len(sequences), distributed.world_size())
        bar = progress("Fisher", len(mine), "sequence", shown=distributed.is_rank0())
        stack.enter_context(bar)
        for number in mine:
            backward_of_sampled(model, data.collate([sequences[number]], device), seed, number)
            # Of adapters, whose own gradients are not asked for.
            model.zero_grad(set_to_none=True)
            bar.update()
    if distributed.world_size() > 1:
        for each in held.values():
            for rows in row_slices(each.fisher):
                each.fisher[rows] = distributed.all_reduce_sum(each.fisher[rows].float())


def backward_of_sampled(model: Transformer, batch: data.Batch, seed: int, number: int) -> None:
    """Computes the gradients of -log p(y | x) of one sequence, with labels y that are drawn from the
    model at each place that is predicted. seed, number: of the sequence, decide what is drawn."""
    hidden = model.flat(batch.tokens, batch.documents)  # [N, D]
    to_head = hidden.index_select(0, batch.logit_positions)  # [K, D]
    head = model.head_weight()
    softcap = model.config.logit_softcap
    key = hashlib.blake2b(f"ewc {seed} {number}".encode(), digest_size=7).digest()
    generator = torch.Generator(to_head.device).manual_seed(int.from_bytes(key, "little"))
    labels = sample_labels(to_head.detach(), head.detach(), softcap, generator)
    loss_sum, _ = linear_cross_entropy(to_head, head, labels, softcap)
    loss_sum.backward()


@torch.no_grad()
def sample_labels(
    hidden: Tensor, head: Tensor, softcap: float | None, generator: torch.Generator
) -> Tensor:
    """Returns an id for each of K places, drawn from what the model predicts there, int64 [K].

    hidden: [K, D]. head: [V, D].
    """
    head = head.to(hidden.dtype)
    numbers = CHUNK_NUMBERS.get(hidden.device.type, CHUNK_NUMBERS["cuda"])
    labels = []
    for part in hidden.split(max(1, numbers // len(head))):
        probabilities = log_probabilities(part, head, softcap).exp_()
        labels.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
    return torch.cat(labels)


# ---- the sequences ----


def read_sequences(
    settings: Settings, tokenizer: Tokenizer, vocab_size: int
) -> tuple[list[Example], str]:
    """Returns --ewc-samples sequences, and a clause that says whose they are. They are chosen by
    their hash, and taken several times where there are fewer, with other labels each time.

    Of conversations the answers are predicted, as in training, and of plain text every token.
    """
    files, what = files_of(settings)
    fetch = functools.partial(fetch_data, keeps=bool(settings.resume))
    with distributed.local_rank0_first():
        dataset = data.load(
            files, tokenizer, settings.seq_len, trees=settings.trees, print_fn=print, fetch=fetch,
            truncate=settings.truncate, skip_bad=settings.skip_bad,
        )  # fmt: skip
    names = ", ".join(map(shown, files)) if files != [DEFAULT_DATA] else "assets/general.txt"
    data.check_tokens(dataset, vocab_size, names)
    count = settings.ewc_samples
    pieces = cut_text(data.sample_by_hash(dataset, count))
    if not pieces:
        raise UserError(f"--ewc-data {names}: has no text of two tokens or more")
    chosen = [pieces[i * len(pieces) // count] for i in range(count)]
    several = ""
    if len(pieces) < count:
        times = f"{count / len(pieces):,.1f}".removesuffix(".0")
        several = f"; of {len(pieces):,} there, each is read {times} times with other labels"
    return chosen, f"{names} ({what}{several})"


def files_of(settings: Settings) -> tuple[list[str | Path], str]:
    """Returns the files that the Fisher information is computed on, and why these."""
    if settings.ewc_data:
        return [settings.ewc_data], "--ewc-data"
    if settings.replay:
        files, _ = parse_replay(settings.replay)
        return [*files], "--replay"
    return [DEFAULT_DATA], "bundled; --ewc-data FILE names another"


def cut_text(dataset: Dataset) -> list[Example]:
    """Returns the examples of a dataset, those of plain text in pieces of TEXT_LENGTH tokens."""
    if dataset.chat:
        return [*dataset.examples]
    pieces = []
    for example in dataset.examples:
        for start in range(0, len(example.ids), TEXT_LENGTH):
            ids = example.ids[start : start + TEXT_LENGTH]
            if len(ids) > 1:
                pieces.append(Example(ids, [True] * len(ids), example.source, example.prompt))
    return pieces


def expected_fisher_seconds(settings: Settings) -> float:
    """Returns about how long the Fisher information takes on plain text; 0 without --ewc."""
    if not settings.ewc:
        return 0.0
    factor = BACKWARD_TO_FROZEN if method_of(settings).freezes_base else 1.0
    pace = settings.expected_seconds / settings.workload.tokens
    return factor * pace * settings.ewc_samples * TEXT_LENGTH
