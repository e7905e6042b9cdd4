"""The sampler and packing: nothing lost, nothing twice, the position in constant time, packed equal to unpacked."""

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.helpers import SHARED, batches_of_rows, llama, micro_batches, needs_shared, relative

from common.errors import UserError
from data import collate, load
from dataset import sampler as order
from dataset import token_cache as rows
from dataset.examples import Example
from dataset.sampler import Sampler, allocate_samples, epoch_order, pack_rows
from interop.resolve import model_folder
from model import Config, Transformer
from objectives import Losses, StepTotals, supervised_loss, token_losses
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder(None))


def epoch(stream: Sampler, per_step: int) -> list[list[list[int]]]:
    """The steps of the epoch at hand."""
    steps, at = [], stream.epoch
    while stream.epoch == at:
        steps.append(stream.step(per_step))
    return steps


def plain(count: int, seed: int = 0, **more) -> Sampler:
    return Sampler(np.arange(count) % 50 + 1, [count], [count], seed, **more)


def flat(steps) -> list[int]:
    return [i for step in steps for row in step for i in row]


# ---- an epoch ----


def test_an_epoch_draws_each_example_once_and_no_step_mixes_epochs():
    stream = plain(43, 5)
    epochs = [epoch(stream, 8) for _ in range(3)]
    for steps in epochs:
        assert sorted(flat(steps)) == list(range(43)) and [len(step) for step in steps] == [8] * 5 + [3]
    assert epochs[0] != epochs[1] and epoch(plain(43, 5), 8) == epochs[0] != epoch(plain(43, 6), 8)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    seq_len=st.sampled_from([None, 50, 64]),
    seed=st.integers(0, 99),
    window=st.sampled_from([7, 32, 4096]),
)
def test_the_order_is_one_for_all_processes_and_accumulations(sizes, weights, seq_len, seed, window):
    """The steps of 1, 2 and 3 processes, each with its slice of the rows, put together again."""
    order.WINDOW_SAMPLES = window
    try:
        draws = allocate_samples(sizes, weights[: len(sizes)])
        lengths = np.arange(sum(sizes)) * 7 % 50 + 1
        make = lambda: Sampler(lengths, sizes, draws, seed, seq_len)
        first = make()
        one = [first.step(6) for _ in range(30)]
        for processes in (2, 3):
            # 6 rows a step in all, as 6 / processes x 1 or as 1 x 6 / processes: of the same rows in the same order
            streams = [make() for _ in range(processes)]
            for step in one:
                dealt = [stream.step(6 // processes * processes) for stream in streams]
                assert all(each == step for each in dealt)
        steps = epoch(make(), 4)
        assert len(flat(steps)) == sum(sizes) and all(sum(lengths[row]) <= (seq_len or 50) for s in steps for row in s)
        edges = np.cumsum([0, *sizes])
        drawn = Counter(np.searchsorted(edges, flat(steps), side="right") - 1)
        assert [drawn[s] for s in range(len(sizes))] == draws
    finally:
        order.WINDOW_SAMPLES = 4096


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_step", [1, 3, 8])
def test_packed_epochs_train_each_example_as_often_as_asked(monkeypatch, seed, per_step):
    """Epochs of several windows have a few rows more or fewer than the first one; their steps are counted by
    themselves."""
    monkeypatch.setattr(order, "WINDOW_SAMPLES", 64)
    lengths = np.random.default_rng(seed).integers(3, 60, 300)
    stream = Sampler(lengths, [300], [300], seed, 64)
    rows = {stream.epoch_rows(e) for e in range(3)}
    assert len(rows) > 1  # else this test would show nothing
    for epochs in (1, 2, 3):
        stream = Sampler(lengths, [300], [300], seed, 64)
        steps = stream.steps_of_epochs(epochs, per_step)
        drawn = Counter(i for _ in range(steps) for row in stream.step(per_step) for i in row)
        assert drawn == dict.fromkeys(range(300), epochs)
        assert (stream.epoch, stream.window, stream.row) == (epochs, 0, 0)
        assert steps / stream.steps_per_epoch(steps, per_step) == pytest.approx(epochs, abs=1e-12)
    half = stream.steps_of_epochs(2.5, per_step)
    whole = stream.steps_of_epochs(2, per_step)
    assert half == whole + round(0.5 * np.ceil(stream.epoch_rows(2) / per_step))
    assert half / stream.steps_per_epoch(half, per_step) == pytest.approx(2.5, abs=per_step / 100)


def test_epochs_that_are_alike_are_packed_once_at_most(monkeypatch):
    calls = []
    monkeypatch.setattr(order, "pack_rows", lambda *words, real=order.pack_rows: calls.append(1) or real(*words))
    one_window, unpacked = plain(1_000, seq_len=64), plain(100_000)
    assert one_window.steps_of_epochs(10**6, 4) == 10**6 * -(-one_window.epoch_rows() // 4) and len(calls) == 1
    assert unpacked.steps_of_epochs(0.001, 8) == 12 and unpacked.steps_of_epochs(1e-9, 8) == 1
    assert unpacked.steps_per_epoch(10**9, 8) == 12_500 and len(calls) == 1


def test_a_position_is_three_numbers_and_the_rest_follows(monkeypatch):
    """Wherever a run stops, one that begins there goes on alike; mixing and packing included."""
    monkeypatch.setattr(order, "WINDOW_SAMPLES", 64)
    lengths = np.arange(500) * 13 % 97 + 3
    for seq_len in (None, 128):
        stream = Sampler(lengths, [400, 100], allocate_samples([400, 100], [1, 2]), 3, seq_len)
        for _ in range(120):
            at = stream.epoch, stream.window, stream.row
            assert Sampler(lengths, stream.sizes, stream.samples_per_epoch, 3, seq_len, *at).step(5) == stream.step(5)
        assert stream.epoch >= 1


def test_resuming_a_million_examples_late_reads_one_window():
    stream = plain(1_000_000, seq_len=512, epoch=7, window=200, row=11)
    stream.window_rows = lambda *at, real=stream.window_rows: calls.append(at[1:]) or real(*at)
    calls: list = []
    stream.step(8)
    assert calls == [(7, 200)]


# ---- mixing ----


def test_shares_are_whole_draws_and_as_many_as_the_data_has():
    assert allocate_samples([300, 100], None) == [300, 100]
    assert allocate_samples([300, 100], [3, 1]) == [300, 100] and allocate_samples([300, 100], [1, 1]) == [200, 200]
    assert allocate_samples([300, 100, 50], None, [0.1]) == [270, 90, 40]
    assert allocate_samples([4, 100], None, [0.1]) == [3, 1] and allocate_samples([100, 9**5, 50], [1e6, 1, 1])[1:] == [
        1,
        1,
    ]
    with pytest.raises(UserError, match="too short for 3 files"):
        allocate_samples([1, 1, 5], None, [0.5])
    assert (
        allocate_samples([10, 10, 10], [1, 1, 1]) == [10, 10, 10] and sum(allocate_samples([7, 5, 3], [1, 2, 4])) == 15
    )


def test_a_source_gives_all_its_examples_before_any_comes_again():
    sizes, draws = [40, 7], allocate_samples([40, 7], [1, 1])  # 24 and 23 of 47
    drawn = np.concatenate([epoch_order(sizes, draws, 1, e) for e in range(10)])
    for first, size in ((0, 40), (40, 7)):
        mine = drawn[(drawn >= first) & (drawn < first + size)]
        for start in range(0, len(mine) - size, size):
            assert sorted(mine[start : start + size]) == list(range(first, first + size))
    spread = np.flatnonzero(epoch_order(sizes, draws, 1, 0) >= 40)
    assert len(spread) == draws[1] and 15 < spread.mean() < 32 and spread.min() < 8 and spread.max() > 38


# ---- packing ----


def test_rows_are_full_and_nothing_is_lost():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 700, 3000).tolist()
    packed = pack_rows(lengths, 2048)
    assert sorted(i for row in packed for i in row) == list(range(3000))
    totals = [sum(lengths[i] for i in row) for row in packed]
    assert max(totals) <= 2048 and sum(totals) / (len(packed) * 2048) > 0.995
    assert pack_rows([], 5) == [] and pack_rows([5, 5], 5) == [[0], [1]]


def test_an_epoch_of_a_tiny_source_takes_no_square():
    """A source of one example among many, half of all draws: 16 times the draws take about 16 times as long."""

    def seconds(count):
        start = time.process_time()
        order = epoch_order([count, 1], [count // 2, count // 2], 0, 3)
        assert (order == count).sum() == count // 2
        return time.process_time() - start

    assert seconds(64_000) < 64 * min(seconds(4_000) for _ in range(3)) + 0.1


TINY = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
FAMILIES = {
    "Llama": TINY | {"model_type": "llama"},
    "sliding windows": TINY | {"model_type": "mistral", "sliding_window": 24},
    "learned positions": {"model_type": "gpt2", "vocab_size": 49152, "n_embd": 32, "n_layer": 2, "n_head": 4,
                          "n_positions": 2048},
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize(
    "family, count",
    [("sliding windows", 60), *(pytest.param(name, 500, marks=pytest.mark.slow) for name in FAMILIES)],
)
def test_packed_equals_unpacked_on_real_examples(tokenizer, family, count):
    """Total loss and every parameter's gradient, in fp32."""
    data = load([SHARED / "alpaca_en_1k.json"], tokenizer, 2048).take(np.arange(count))
    stream = Sampler(data.lengths, [count], [count], 0, 2048)
    packed = [[data.examples[i] for i in row] for row in stream.step(10**6)]
    assert sum(map(len, packed)) == count
    assert count < 500 or data.tokens / (2048 * len(packed)) >= 0.97
    torch.manual_seed(0)
    model = Transformer(Config.from_hf(FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    results = []
    # one by one; as batches; packed
    for batches in ([collate([e]) for e in data.examples], batches_of_rows(packed, 4)):
        model.zero_grad()
        total, count = 0.0, sum(batch.loss_weight_sum for batch in batches)
        for batch in batches:
            loss = token_losses(model, batch)[0] / count
            loss.backward()
            total += float(loss.detach())
        results.append((total, count, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (alone, number, grads), (together, same, others) = results
    assert number == same == data.trained_tokens and together == pytest.approx(alone, rel=1e-5)
    assert max(len(batch.documents.lengths) for batch in batches_of_rows(packed, 4)) > 5
    for name, grad in grads.items():
        assert relative(others[name], grad) < 1e-5, name


def test_in_a_row_no_example_sees_another(tmp_path):
    """Another first example moves nothing of the second one's loss."""
    llama(tmp_path, std=0.1)
    from checkpoint import load_model

    model, second = load_model(tmp_path), Example(list(range(20, 50)), [False] * 10 + [True] * 20)
    found = []
    for first in (range(20), range(50, 95)):
        (batch,) = batches_of_rows([[Example(list(first), [False] * len(first)), second]], 1)
        found.append(float(token_losses(model, batch)[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(float(token_losses(model, collate([second]))[0]), rel=1e-6)


# ---- from conversations to rows and back ----

words = st.text(st.characters(codec="utf-8", max_codepoint=0x2FFFF), min_size=1, max_size=40)
turn_texts = st.lists(words.filter(lambda text: text.strip() == text and text), min_size=2, max_size=6)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chats=st.lists(turn_texts, min_size=1, max_size=8))
def test_any_conversations_survive_the_way_to_packed_rows_and_back(tokenizer, tmp_path_factory, chats):
    # SmolLM2 has no token for some control characters
    chats = [[t for t in chat if tokenizer.decode(tokenizer.encode(t)) == t] for chat in chats]
    chats = [chat for chat in chats if len(chat) > 1]
    assume(chats)
    folder = tmp_path_factory.mktemp("chats")
    (folder / "cache").mkdir()
    rows.cache_folder = lambda: folder / "cache"
    turns = [[{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(chat[: len(chat) // 2 * 2])]
             for chat in chats]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    data = load([folder / "a.jsonl"], tokenizer, 100_000)
    dropped = sum(data.examples.rows[0].stats.dropped.values())
    assert len(data) + dropped == len(turns) and dropped == 0
    stream = Sampler(data.lengths, [len(data)], [len(data)], 0, int(data.lengths.max()) + 50)
    back = {}
    for row in stream.step(1000):
        (batch,) = batches_of_rows([[data.examples[i] for i in row]], 1, "cpu")
        trained = torch.zeros(len(batch.tokens), dtype=torch.bool)
        trained[batch.logit_positions + 1] = True
        assert torch.equal(batch.tokens[trained], batch.targets)
        for i, ids, mask in zip(row, *(each.split(batch.documents.lengths) for each in (batch.tokens, trained))):
            assert i not in back
            back[i] = (tokenizer.decode(ids.tolist()), tokenizer.decode(ids[mask].tolist()))
    assert back.keys() == set(range(len(turns)))
    for i, messages in enumerate(turns):
        answers = "".join(turn["content"] + "<|im_end|>" for turn in messages[1::2])
        assert back[i][1] == answers
        assert back[i][0] == tokenizer.render_text(messages).removesuffix("\n")


# ---- replay's loss apart ----


def test_the_loss_of_a_replay_is_known_apart(tmp_path):
    llama(tmp_path, std=0.1)
    from checkpoint import load_model

    model, generator = load_model(tmp_path), torch.Generator().manual_seed(0)
    examples = []
    for i in range(6):
        ids = torch.randint(0, 96, (10 + i,), generator=generator).tolist()
        examples.append(Example(ids, [False] * 4 + [0.5 + i % 2] * (6 + i), is_replay=i % 3 == 0))
    replay, total = 0.0, 0.0
    for batch in micro_batches(examples, 4):
        losses = Losses(torch.device("cpu"))
        supervised_loss(model, batch, StepTotals(1, 1.0, 1), losses)
        total += float(losses.loss)
        replay += float(losses.replay_loss)
    wanted = sum(float(token_losses(model, collate([each]))[0]) for each in examples if each.is_replay)
    assert replay == pytest.approx(wanted, rel=1e-5)
    assert total == pytest.approx(sum(float(token_losses(model, collate([e]))[0]) for e in examples), rel=1e-5)
    assert sum(batch.replay_weight_sum for batch in micro_batches(examples, 4)) == 6 * 0.5 + 9 * 1.5
