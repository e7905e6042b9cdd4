"""What several test files share: random Llama-family checkpoints made by transformers, and a script run in-process."""

import json
import os
import random
import sys
import traceback
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils._pytree import tree_leaves

import data
import decoding
from common.errors import run
from objectives import Losses, StepTotals, supervised_loss

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {  # name: what differs from the smallest Llama
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "odd_head_dim": {"head_dim": 22},
    "llama3_rope": {"rope_scaling": LLAMA3, "max_position_embeddings": 512, "rope_theta": 500_000.0},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "the red green blue fox dog runs jumps über 河 never always 12 7 2024".split()


def llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.3, **changes):
    """A random Llama checkpoint written by transformers; returns its model, eager attention, in eval mode."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**(sizes | changes), attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases too, so that ignoring one shows
            parameter.normal_(1.0 if "norm" in name else 0.0, std)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of the difference against the length of b."""
    return float((a - b).detach().norm() / b.detach().norm())


def sentence(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def chat_base(folder: Path, **changes) -> Path:
    """A random Llama with a byte-level BPE of its own and a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([sentence(i, 20) for i in range(50)], trainer)
    sizes = {"std": 0.2, "max_position_embeddings": 512} | changes
    llama(folder, vocab_size=bpe.get_vocab_size(), eos_token_id=2, bos_token_id=1, **sizes)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    settings |= {"add_bos_token": False, "chat_template": CHATML, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def sentencepiece_json(file: Path, legacy: bool) -> Tokenizer:
    """The BPE that published Llama 2 folders have: merges ordered by score, a space before each piece (or, not legacy,
    before the first). transformers 5 itself makes another out of a bare tokenizer.model, that forgets the scores."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocab = {pieces.id_to_piece(id): id for id in range(len(pieces))}
    splits = [(p[:k], p[k:]) for p, id in vocab.items() if not pieces.is_byte(id) for k in range(1, len(p))]
    merges = [split for split in splits if vocab.keys() >= set(split)]
    merges.sort(key=lambda split: (-pieces.get_score(vocab["".join(split)]), vocab[split[0]], vocab[split[1]]))
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    bpe.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe


def move(model) -> None:
    """Moves what is trained by a little."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def child_life(work) -> None:
    """The whole life of a forked process that calls work(): its exit code, or 1 and the traceback."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(script, monkeypatch, capsys, *words) -> tuple[str, str, int]:
    """stdout, stderr and exit code of a script, in this process."""
    capsys.readouterr()  # what the test printed before is not the script's
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    code = 0
    try:
        run(script.main)
    except SystemExit as end:
        code = end.code
    out = capsys.readouterr()
    return out.out, out.err, code


def output_of(script, monkeypatch, capsys, *words) -> str:
    """stdout of a script that ends well."""
    out, err, code = command(script, monkeypatch, capsys, *words)
    assert code == 0, err
    return out


def refusal_of(script, monkeypatch, capsys, *words) -> str:
    """The one line with which a script refuses its words."""
    _, err, code = command(script, monkeypatch, capsys, *words)
    assert code == 2 and err.count("\n") == 1, err
    return err


def batches_of_rows(rows, batch_size: int, device="cpu", max_tokens: int | None = None) -> list:
    """Rows of examples, sorted by length, in flat batches of at most batch_size rows, as one rank of one process
    takes them in a step; where rows are long, of about max_tokens tokens."""
    if not max_tokens:
        max_tokens = data.max_tokens_per_micro_batch(device)
    sizes = [sum(len(example.ids) for example in row) for row in rows]
    batches = []
    for group in data.split_micro_batches(sizes, batch_size, max_tokens):
        examples = [example for i in group for example in rows[i]]
        batches.append(data.collate(examples, device))
    return batches


def micro_batches(examples, batch_size: int, device="cpu") -> list:
    """Flat batches of at most batch_size examples."""
    return batches_of_rows([[example] for example in examples], batch_size, device)


def batch_loss(model, batch, loss_weight_sum: float | None = None, num_tokens: int | None = None) -> torch.Tensor:
    """The loss of a step that is one micro-batch, the balance of routed experts included."""
    weight = batch.loss_weight_sum if loss_weight_sum is None else loss_weight_sum
    totals = StepTotals(len(batch.targets), weight, num_tokens or len(batch.tokens))
    return supervised_loss(model, batch, totals, Losses(batch.tokens.device))


class RecordedGraph(torch.utils._python_dispatch.TorchDispatchMode):
    """A CUDA graph as the CPU can have it: the operations of one run, with the numbers and in the memory that they had,
    which a replay runs again. What the run itself changed is as it was before, for a capture computes nothing."""

    def __init__(self, launch):
        super().__init__()
        self.calls, self.replays, changed = [], 0, []
        self.changed = changed
        with self:
            launch()
        for tensor, before in reversed(changed):
            tensor.copy_(before)

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        schema = function._schema.arguments
        given = [*zip(schema, arguments), *((a, settings[a.name]) for a in schema if a.name in settings)]
        for argument, tensor in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.changed.append((tensor, tensor.clone()))
        out = function(*arguments, **settings)
        self.calls.append((function, arguments, settings, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for function, arguments, settings, out in self.calls:
            again = function(*arguments, **settings)
            for a, b in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if torch.is_tensor(a) and a.data_ptr() != b.data_ptr():  # else it is where it was
                    a.copy_(b)


def record_graphs(monkeypatch, slots: int = 16) -> list[RecordedGraph]:
    """Lets models on the CPU write as on a GPU, with graphs that are recorded: those of each shape come in the list."""
    graphs = []

    def run_and_record(launch, device):
        launch()
        graphs.append(RecordedGraph(launch))
        return graphs[-1]

    monkeypatch.setattr(decoding, "GRAPH_ROUND", slots)
    monkeypatch.setattr(decoding, "GRAPH_STEPS", 2)
    monkeypatch.setattr(decoding, "can_run_ahead", lambda model: True)
    monkeypatch.setattr(decoding, "run_and_capture", run_and_record)
    return graphs
