"""Steps that a GPU takes by itself (decoding.stream_ahead), on the CPU: with recorded operations in place of CUDA
graphs, against the plain path; and what is done where a capture fails."""

import contextlib
from itertools import pairwise

import pytest
import torch
import transformers
from support.helpers import SHAPES, llama, record_graphs

import decoding
from checkpoint import load_model
from decoding import FusedWeights, can_concatenate, fused_bytes
from kernels.nf4 import nf4_linear
from kernels.onednn_linear import can_join
from model import Linear
from quant import quantize

LENGTHS = (1, 7, 30, 8, 3, 12)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


def test_lines_that_end_are_computed_on_until_half_have_ended(tmp_path, monkeypatch):
    """What is yielded at each step is what the plain path yields, and the batch shrinks by halves."""
    llama(tmp_path, **SHAPES["grouped"])
    model, prompts = load_model(tmp_path), prompts_of(*LENGTHS)
    free = model.generate(prompts, 40)
    stop = {free[2][2], free[0][6], free[4][9], free[1][21]}
    wanted = [*model.stream(prompts, 40, stop=stop)]
    ends = sorted(sum(any(i == row for i, _ in step) for step in wanted) for row in range(len(prompts)))
    assert ends[0] < 4 and ends[-1] > 20, "the lines should end at different steps"
    graphs, lines = record_graphs(monkeypatch), []
    launch = decoding.Steps.launch
    monkeypatch.setattr(decoding.Steps, "launch", lambda self: lines.append(len(self.tokens)) or launch(self))
    assert [*model.stream(prompts, 40, stop=stop)] == wanted
    shapes = [*dict.fromkeys(lines)]
    assert shapes[0] == 6 and 2 <= len(shapes) <= 3 and all(2 * b <= a for a, b in pairwise(shapes))
    assert len(graphs) >= len(shapes)


def test_a_stop_id_in_the_first_token_and_in_all_lines(tmp_path, monkeypatch):
    llama(tmp_path)
    model, prompts = load_model(tmp_path), prompts_of(4, 9)
    first = [token for _, token in next(model.stream(prompts, 5))]
    record_graphs(monkeypatch)
    assert [*model.stream(prompts, 20, stop={*first})] == [[(0, first[0]), (1, first[1])]]


@pytest.mark.parametrize("learned", [False, True])
def test_texts_end_at_the_last_position(tmp_path, monkeypatch, learned):
    """Lines that have ended there go on beside the others, and must not ask for a position that there is not."""
    if learned:
        torch.manual_seed(0)
        sizes = {"vocab_size": 96, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    else:
        llama(tmp_path, max_position_embeddings=40)
    model, prompts = load_model(tmp_path), prompts_of(38, 5, 10, 39, 2)
    wanted = [*model.stream(prompts, 60)]
    assert [len(row) for row in model.generate(prompts, 60)] == [2, 35, 30, 1, 38]
    graphs = record_graphs(monkeypatch)
    assert [*model.stream(prompts, 60)] == wanted and len(graphs) > 1


def test_short_answers_are_not_captured(tmp_path, monkeypatch):
    llama(tmp_path)
    model, prompts = load_model(tmp_path), prompts_of(3, 5)
    wanted = [model.generate(prompts, n) for n in (1, 2, 3)]
    graphs = record_graphs(monkeypatch)
    assert [model.generate(prompts, n) for n in (1, 2, 3)] == wanted and graphs == []


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.7}, {}])
def test_sampling_with_a_seed_is_the_same(tmp_path, monkeypatch, settings):
    llama(tmp_path)
    model, prompts = load_model(tmp_path), prompts_of(3, 9, 5)
    settings = {"temperature": 0.8, "seed": 7, **settings}
    wanted = model.generate(prompts, 30, **settings)
    graphs = record_graphs(monkeypatch)
    assert model.generate(prompts, 30, **settings) == wanted and graphs
    stop = {wanted[0][5], wanted[1][8], wanted[2][4]}  # where batches shrink, other numbers are drawn: but all goes on
    assert all(row[-1] in stop or len(row) == 30 for row in model.generate(prompts, 30, stop=stop, **settings))
    assert model.generate(prompts, 30, **settings | {"seed": 8}) != wanted


def test_a_prompt_with_a_seed_of_its_own_draws_alone(tmp_path, monkeypatch):
    """Whatever else is in the batch, in which order, and wherever lines end; also where a GPU is a step ahead."""
    llama(tmp_path, std=0.1)
    model, prompts, seeds = load_model(tmp_path), prompts_of(*LENGTHS), [5, 6, 7, 8, 9, 5]
    settings = {"temperature": 0.9, "top_k": 40}
    alone = [model.generate([p], 30, seed=s, **settings)[0] for p, s in zip(prompts, seeds)]
    assert model.generate(prompts, 30, seeds=seeds, **settings) == alone
    assert model.generate(prompts[::-1], 30, seeds=seeds[::-1], **settings) == alone[::-1]
    stop = {alone[0][5], alone[1][8], alone[2][4], alone[3][20]}
    cut = [row[: 1 + next((i for i, token in enumerate(row) if token in stop), 99)] for row in alone]
    assert len({*map(len, cut)}) > 3
    assert model.generate(prompts, 30, seeds=seeds, stop=stop, **settings) == cut
    graphs = record_graphs(monkeypatch)
    assert model.generate(prompts, 30, seeds=seeds, stop=stop, **settings) == cut and graphs
    other = model.generate(prompts, 30, seeds=[1, *seeds[1:]], stop=stop, **settings)
    assert other[1:] == cut[1:] and other[0] != cut[0]


def test_draws_are_those_of_multinomial():
    probs = (3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    got = decoding.sample_from(probs, torch.Generator().manual_seed(1))
    wanted = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    assert torch.equal(got, wanted) and len({*got.tolist()}) > 20


@pytest.mark.parametrize("settings", [{"lookup": 3}, {"repetition_penalty": 1.2}])
def test_what_the_host_decides_takes_the_plain_path(tmp_path, monkeypatch, settings):
    llama(tmp_path)
    model = load_model(tmp_path)
    wanted = model.generate([[3, 4, 5]], 20, **settings)
    graphs = record_graphs(monkeypatch)
    assert model.generate([[3, 4, 5]], 20, **settings) == wanted and graphs == []


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass


@pytest.mark.parametrize("where", ["begin", "inside", "end"])
def test_a_capture_that_fails_is_said_once_and_the_text_goes_on(tmp_path, monkeypatch, capsys, where):
    """As torch raises it: at the beginning, in an operation, or of one only at the end of the capture."""
    llama(tmp_path)
    model, prompts = load_model(tmp_path), prompts_of(3, 9)
    wanted = model.generate(prompts, 30)
    record, capturing, tried = decoding.run_and_capture, [], []
    record_graphs(monkeypatch)
    launch = decoding.Steps.launch

    @contextlib.contextmanager
    def graph(graph, stream):
        tried.append(graph)
        if where == "begin":
            raise RuntimeError("no capture\nmore")
        capturing.append(True)
        try:
            yield
        finally:
            capturing.clear()
            if where == "end":
                raise RuntimeError("a previous error")

    def launch_or_raise(self):
        if capturing:  # a capture computes nothing
            raise RuntimeError("no capture") if where != "begin" else AssertionError
        launch(self)

    capsys.readouterr()
    monkeypatch.setattr(decoding, "run_and_capture", record)
    monkeypatch.setattr(decoding, "failed_graphs", [])
    monkeypatch.setattr(decoding.Steps, "launch", launch_or_raise)
    for name, fake in {
        "current_stream": FakeStream,
        "Stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": object,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert model.generate(prompts, 30) == wanted and len(tried) == 1 == len(decoding.failed_graphs)
    err = capsys.readouterr().err
    assert err.startswith("NOTE: steps can't be captured in a CUDA graph (no capture); ") and err.count("\n") == 1
    assert model.generate(prompts, 30) == wanted and len(tried) == 1 and capsys.readouterr().err == ""


# ---- matrices that read the same input, in one ----


def linear(out: int, size: int, bias: bool, dtype: torch.dtype, seed: int, double: bool | None = None) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(size, out, bias).requires_grad_(False).to(dtype)
    layer.weight.copy_(torch.randn(out, size, generator=generator))
    if bias:
        layer.bias.copy_(torch.randn(out, generator=generator))
    if double is not None:
        layer.quantize(quantize(layer.weight, double))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double", [None, False, True])
@torch.no_grad()
def test_joined_weights_are_the_same_numbers(bias, double):
    """Of three matrices whose nested blocks, of 256 blocks of 64, begin and end inside rows."""
    layers = [linear(out, 192, bias, torch.bfloat16, i, double) for i, out in enumerate((100, 30, 30))]
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(9)).bfloat16()
    joined = FusedWeights(layers, packed=False)
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], -1))
    assert joined.linear is (nf4_linear if double is not None else torch.nn.functional.linear)
    tensors = [joined.weight] if double is None else joined.weight[:2]
    assert sum(map(fused_bytes, layers)) == sum(tensor.nbytes for tensor in tensors)


def test_only_what_is_alike_is_joined():
    bf16, fp32 = torch.bfloat16, torch.float32
    plain, other, quantised = (linear(64, 64, True, *rest) for rest in ((bf16, 0), (fp32, 1), (bf16, 2, True)))
    assert can_concatenate([plain, plain], bf16) and can_concatenate([quantised, quantised], bf16)
    assert (
        not can_concatenate([plain, quantised], bf16)
        and not can_concatenate([plain, other], bf16)
        and not can_concatenate([plain], fp32)
    )
    assert not can_concatenate([plain, plain], torch.float16) and not can_concatenate(
        [other], fp32
    )  # products in fp32 gain nothing


def test_matrices_are_joined_where_twice_their_size_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert can_join(500, torch.device("cuda")) and not can_join(501, torch.device("cuda"))
    assert not can_join(1, torch.device("cpu"))
