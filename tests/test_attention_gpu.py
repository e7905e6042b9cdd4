"""Attention's ways on GPUs, as far as they can be computed without one.

FlashAttention's operator is replaced by a reference that is written from its documentation, so that what it is given is
seen to be right; FlexAttention computes its forward without a kernel. tests/test_cuda_offline.py has the rest: dtypes,
devices and launches. With a GPU, test_flash_attention_on_a_gpu computes with the operator itself.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import chat_base, command

import train
from common.errors import UserError
from kernels import attention, flash_versions, flex
from kernels import context_parallel as context
from kernels.attention import Documents, QuerySuffix, Scores, document_attention, group_attention, suffix_attention

LENGTHS = [5, 33, 60, 1, 60, 7]


def flash_reference(
    q, k, v, q_bounds, k_bounds, longest_q, longest_k, dropout, causal, debug, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    """aten::_flash_attention_forward of documents: a query i of the last n_q of n_k keys sees the key j where
    i + n_k - n_q - left <= j <= i + n_k - n_q + right, a negative bound being none; causal puts right at 0."""
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and dropout == 0.0 and not debug
    assert q_bounds.dtype == k_bounds.dtype == torch.int32
    share, parts = q.shape[1] // k.shape[1], []
    lengths = [torch.diff(bounds).tolist() for bounds in (q_bounds, k_bounds)]
    assert longest_q == max(lengths[0]) and longest_k == max(lengths[1])
    for *qkv, n_q, n_k in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), *lengths, strict=True):
        query, key, value = (x.transpose(0, 1) for x in qkv)
        key, value = (x.repeat_interleave(share, 0) for x in (key, value))
        at = torch.arange(n_q)[:, None] + n_k - n_q
        keys = torch.arange(n_k)
        right = 0 if causal else window_size_right
        seen = keys <= at + right if right >= 0 else keys <= n_k
        seen = seen & (keys >= at - window_size_left) if window_size_left >= 0 else seen
        weights = (scale * query @ key.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append((weights @ value).transpose(0, 1))
    return torch.cat(parts), None, None, None, None


@pytest.fixture
def flash(monkeypatch):
    """Attention thinks that FlashAttention takes its inputs; gives the operator's calls."""
    calls = []

    def called(*args, **settings):
        calls.append(settings)
        return flash_reference(*args, **settings)

    monkeypatch.setattr(attention, "flash_supports", lambda q: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", called)
    return calls


def made(lengths, heads=4, kv_heads=2, d=8, dtype=torch.float64):
    torch.manual_seed(0)
    n = sum(lengths)
    return [torch.randn(n, h, d, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def output_and_gradients(way, inputs, cotangent):
    out = way(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("window", [None, 1, 7, 59, 60, 1000])
@pytest.mark.parametrize("d", [8, 22, 24, 200])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (4, 1)])
def test_one_call_of_flash_attention_is_attention_in_all_documents(flash, window, d, heads, kv_heads):
    qkv, scores = made(LENGTHS, heads, kv_heads, d), Scores(0.3, window)
    cotangent = torch.randn(sum(LENGTHS), heads, d, dtype=torch.float64)
    documents = Documents(LENGTHS)
    got = output_and_gradients(lambda *x: document_attention(*x, scores, documents), qkv, cotangent)
    wanted = output_and_gradients(lambda *x: group_attention(*x, scores, documents), qkv, cotangent)
    torch.testing.assert_close(got, wanted)
    assert len(flash) == 1 and flash[0]["window_size_left"] == (-1 if window is None or window >= 60 else window - 1)


@pytest.mark.parametrize("window", [None, 7, 60])
def test_pieces_of_a_document_by_flash_attention(flash, window):
    q, k, v = made([50])
    scores = Scores(0.3, window)
    wanted = group_attention(q, k, v, scores, Documents([50]))
    for start, stop in ((0, 1), (1, 20), (20, 50)):
        piece = QuerySuffix(stop - start, stop)
        torch.testing.assert_close(
            suffix_attention(q[start:stop], k[:stop], v[:stop], scores, piece), wanted[start:stop]
        )
    assert len(flash) == 2  # a single query goes another way


def test_processes_that_share_a_batch_attend_by_flash_attention(flash, monkeypatch):
    """All processes of `--context-parallel` in this one, which are handed whole keys."""
    lengths = [40, 9, 31]
    q, k, v = made(lengths)
    scores = Scores(0.3, 11)
    wanted = group_attention(q, k, v, scores, Documents(lengths))
    monkeypatch.setattr(context.AllGatherTokens, "apply", lambda x, shared: x)
    for place in (0, 1):
        shared = context.ContextParallel(2, place)
        documents = context.ShardedDocuments(Documents(lengths), shared)
        torch.testing.assert_close(documents.attend(shared.take(q), k, v, scores), shared.take(wanted))
    assert flash


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 5.0), (31, 5.0)])
@pytest.mark.parametrize("d", [64, 22, 256])
def test_attention_on_a_gpu(window, softcap, d):
    """bf16 on the GPU by whatever way is taken there, against the groups in fp32."""
    lengths = [*LENGTHS, 300, 129]
    documents, scores = Documents(lengths, "cuda"), Scores(d**-0.5, window, softcap)
    qkv = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in made(lengths, 4, 2, d)]
    cotangent = torch.randn(sum(lengths), 4, d, device="cuda")
    got = output_and_gradients(lambda *x: document_attention(*x, scores, documents), qkv, cotangent.bfloat16())
    wide = [x.detach().float().requires_grad_() for x in qkv]
    wanted = output_and_gradients(lambda *x: group_attention(*x, scores, documents), wide, cotangent)
    for a, b in zip(got, wanted, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 2e-2


# ---- soft-caps ----


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.one_of(st.none(), st.integers(1, 500)))
def test_the_block_mask_is_that_which_torch_finds_by_trying_all_pairs(lengths, window):
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = sum(lengths)
    ours = flex.block_mask(lengths, window, torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, 1, 1, tokens, tokens, device="cpu", BLOCK_SIZE=flex.MASK_BLOCK)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention without a kernel: no compiler, all pairs; it has no gradients on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    flex.passes_trial.cache_clear()
    yield
    flex.passes_trial.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 100, 250])
def test_flex_attention_is_the_slices(eager_flex, window):
    lengths = [130, 200, 3, 57]
    q, k, v = (x.detach() for x in made(lengths, d=16))
    mask = flex.block_mask(lengths, window, q.device)
    got = flex.attention(q, k, v, 0.3, 5.0, mask)
    wanted = attention.sliced_reference(q, k, v, 0.3, 5.0, window, lengths)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # its softmax is in fp32


def test_where_flex_attention_fails_the_slices_compute_and_a_note_says_so(eager_flex, capsys):
    """On a CPU its backward is refused, which stands for whatever the compiler may end with."""
    q, k, _ = (x.detach().float() for x in made([300]))
    assert not flex.works(q, k, attention.sliced_reference) and not flex.works(q, k, attention.sliced_reference)
    said = capsys.readouterr().err
    assert said.count("NOTE: FlexAttention does not work here (") == 1


def test_where_flex_attention_computes_something_else_it_is_not_used(eager_flex, monkeypatch, capsys):
    scaled = [1.0]
    reference = attention.sliced_reference
    monkeypatch.setattr(flex, "attention", lambda q, k, v, scale, cap, mask: scaled[0] * reference(
        q, k, v, scale, cap, TRIAL_WINDOWS[mask.seq_lengths[0]], TRIAL_LENGTHS[mask.seq_lengths[0]]))  # fmt: skip
    q, k, _ = (x.detach().float() for x in made([300]))
    assert flex.works(q, k, reference)
    flex.passes_trial.cache_clear()
    scaled[0] = 1.1
    assert not flex.works(q, k, reference) and "its numbers differ by" in capsys.readouterr().err


TRIAL_LENGTHS = {sum(lengths): lengths for lengths, _ in flex.TRIALS}
TRIAL_WINDOWS = {sum(lengths): window for lengths, window in flex.TRIALS}


# ---- other versions ----


def test_flash3_is_refused_on_a_cpu(tmp_path, monkeypatch, capsys):
    base = chat_base(tmp_path / "base")
    (tmp_path / "data.json").write_text('[{"instruction": "say it", "output": "it"}]')
    words = ["--model", base, "--data", tmp_path / "data.json", "--val-fraction", 0, "--steps", 1, "--device", "cpu"]
    _, err, code = command(train, monkeypatch, capsys, *words, "--attention", "flash3", "--out", tmp_path / "run")
    assert code == 2 and "--attention flash3: is for GPUs, and this run computes on cpu" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("factor, accepted", [(1.001, True), (1.2, False), (float("nan"), False)])
def test_another_version_is_held_against_version_2(monkeypatch, factor, accepted):
    """A step that computes with factor times the right gradients once the version is in place."""
    state = {"factor": 1.0}
    monkeypatch.setattr(flash_versions, "activate_version", lambda name: state.update(factor=factor))
    step = lambda: [torch.tensor(2.0), torch.tensor([3.0, 4.0]) * state["factor"]]
    if accepted:
        assert flash_versions.use("flash3", torch.device("cuda"), step) == pytest.approx(factor - 1, rel=1e-3)
    else:
        with pytest.raises(UserError, match="differ by (2.0e-01|nan) from FlashAttention 2"):
            flash_versions.use("flash3", torch.device("cuda"), step)


def test_a_version_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # as if it were not there
    with pytest.raises(UserError, match="--attention flash3: torch .* finds no such kernels here"):
        flash_versions.activate_version("flash3")
