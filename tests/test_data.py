"""data.py: what is trained, what is left out, the split, and the flat batches."""

import json
import random

import pytest
import torch
from helpers import SHARED, llama, needs_shared, relative

from checkpoint import load_model
from convert import model_folder
from data import Dataset, Example, collate, encode, load_sources, micro_batches, place, split
from errors import UserError
from formats import Record
from objectives import mean_loss, token_loss_sum
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder(None))


def chat(*turns: str, where: str = "here") -> Record:
    roles = ("user", "assistant")
    return Record([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], None, where)


def written(folder, records: list[dict]):
    file = folder / "data.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    return load_sources([file])


def trained_text(example: Example, tokenizer) -> str:
    return tokenizer.decode([i for i, yes in zip(example.ids, example.trained, strict=True) if yes])


def test_the_answer_and_its_end_are_trained_and_nothing_else(tmp_path, tokenizer):
    sources = written(tmp_path, [{"instruction": "Say <|im_end|>", "input": "", "output": "No:\n1. <|im_end|> 2."}])
    (example,) = encode(sources, tokenizer, 100).examples
    assert trained_text(example, tokenizer) == "No:\n1. <|im_end|> 2.<|im_end|>"
    assert example.ids.count(tokenizer.special_tokens["<|im_end|>"]) == 3  # the turns' own: of system, user, assistant


def test_an_answer_beyond_the_limit_is_dropped_and_counted(tmp_path, tokenizer):
    short, long = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": "word " * 100}
    data = encode(written(tmp_path, [short, long, long]), tokenizer, 60)
    assert len(data.examples) == 1 and data.dropped == {"whose answer does not fit into --seq-len 60": 2}
    assert data.examples[0].ids == encode(written(tmp_path, [short]), tokenizer, 2048).examples[0].ids
    with pytest.raises(UserError, match="no record can be trained on"):
        encode(written(tmp_path, [long]), tokenizer, 60)


def test_a_long_conversation_keeps_its_whole_answers(tmp_path, tokenizer):
    turns = [
        {"role": role, "content": "word " * n}
        for role, n in (("user", 3), ("assistant", 3), ("user", 3), ("assistant", 99))
    ]
    data = encode(written(tmp_path, [{"messages": turns}]), tokenizer, 80)
    assert trained_text(data.examples[0], tokenizer).count("<|im_end|>") == 1
    assert data.dropped == {"cut to the turns that fit into --seq-len 80": 1}


def test_plain_text_is_trained_whole_in_pieces(tmp_path, tokenizer):
    text = " ".join(str(i) for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    examples = encode(load_sources([tmp_path / "a.txt"]), tokenizer, 50).examples
    ids = [i for example in examples for i in example.ids]
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] in tokenizer.stop_ids
    assert all(example.trained == [False] + [True] * (len(example.ids) - 1) for example in examples)


def test_the_split_keeps_equal_prompts_together_and_ignores_order():
    records = [chat(f"  Question {i % 50} ", f"answer {i}") for i in range(200)] + [chat("question 7", "x")]
    examples = [one_token(record) for record in records]
    train, val = split(Dataset(examples), 0.2)
    sides = [{place(e) for e in side.examples} for side in (train, val)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 50 and 3 <= len(sides[1]) <= 20
    random.Random(0).shuffle(examples)
    assert {id(e) for e in split(Dataset(examples), 0.2)[1].examples} == {id(e) for e in val.examples}
    assert not split(Dataset(examples), 0)[1].examples
    alone = [one_token(chat(f"q {i}", "a")) for i in range(9)]
    assert len(split(Dataset(alone), 1e-9)[1].examples) == 1
    with pytest.raises(UserError, match="leaves none of 9 prompts"):
        split(Dataset(alone), 0.999)


def one_token(record: Record) -> Example:
    return Example([1, 2], [False, True], record)


def test_a_prompt_that_many_share_is_trained_on():
    """Whatever the hash of the common prompt: never nearly all to validation, never an error."""
    for common in ("Hi", "Hello", "Write a limerick.", "a", "b", "c"):
        examples = [one_token(chat(common, f"answer {i}")) for i in range(99)] + [one_token(chat("Good morning", "x"))]
        train, val = split(Dataset(examples), 0.05)
        assert len(train.examples) == 99 and len(val.examples) == 1
        alike = split(Dataset(examples[:99]), 0.05)
        assert len(alike[0].examples) == 99 and not alike[1].examples


def test_conversations_that_begin_with_an_answer_are_parted_by_what_follows():
    greeting = {"role": "assistant", "content": "How can I help?"}
    records = [Record([greeting, *chat(f"question {i}", "yes").messages], None, "") for i in range(40)]
    assert 1 <= len(split(Dataset([one_token(r) for r in records]), 0.1)[1].examples) <= 8


def test_one_long_text_is_parted_by_its_pieces(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" ".join(str(i * i) for i in range(3000)))
    data = encode(load_sources([tmp_path / "a.txt"]), tokenizer, 50)
    train, val = split(data, 0.1)
    assert len(train.examples) + len(val.examples) == len(data.examples)
    assert 0.02 * len(data.examples) <= len(val.examples) <= 0.2 * len(data.examples)


def test_no_token_of_a_text_is_lost_at_its_end(tmp_path, tokenizer):
    """A last piece of one token would train nothing; the one before it gives up a token instead."""
    (tmp_path / "a.txt").write_text("7" * 50)  # with the end token 51
    data = encode(load_sources([tmp_path / "a.txt"]), tokenizer, 25)
    assert [len(example.ids) for example in data.examples] == [25, 24, 2] and not data.dropped
    assert data.examples[-1].ids[-1] in tokenizer.stop_ids and data.examples[-1].trained == [False, True]


def test_a_batch_of_long_examples_is_cut_and_none_is_lost(monkeypatch):
    """By tokens as well as by examples; one that is longer than the limit stands alone."""
    monkeypatch.setattr("data.most_tokens", lambda device: 100)
    lengths = [30, 50, 40, 20, 120, 10, 9]
    examples = [Example([i] * n, [False] + [True] * (n - 1), chat("a", "b")) for i, n in enumerate(lengths)]
    batches = micro_batches(examples, 5)
    assert [batch.documents.lengths for batch in batches] == [[9, 10, 20, 30], [40], [50], [120]]
    assert sorted(i for batch in batches for i in batch.tokens.tolist()) == sorted(
        i for i, n in enumerate(lengths) for _ in range(n)
    )


def test_a_batch_is_flat_and_its_rows_predict_the_trained_tokens():
    a = Example([1, 2, 3], [False, True, True], chat("a", "b"))
    b = Example([4, 5, 6, 7], [True, False, False, True], chat("a", "b"))  # a first token can't be predicted
    batch = collate([a, b])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7] and batch.documents.lengths == [3, 4]
    assert batch.rows.tolist() == [0, 1, 5] and batch.targets.tolist() == [2, 3, 7]


def test_loss_equals_transformers_labels_and_no_batch_size_matters(tmp_path):
    theirs, generator = llama(tmp_path, std=0.1), torch.Generator().manual_seed(0)
    model, examples = load_model(tmp_path), []
    for n in (3, 90, 17, 40, 5, 60, 8):
        ids = torch.randint(0, 96, (n,), generator=generator).tolist()
        examples.append(Example(ids, [False] * (n // 2) + [True] * (n - n // 2), chat("a", "b")))
    total, count = 0.0, 0
    for example in examples:
        labels = torch.where(torch.tensor(example.trained), torch.tensor(example.ids), -100)[None]
        count += sum(example.trained)
        total += float(theirs(torch.tensor([example.ids]), labels=labels).loss.detach()) * sum(example.trained)
    for size in (1, 3, 8):
        assert mean_loss(model, micro_batches(examples, size)) == pytest.approx(total / count, rel=1e-6)


def test_gradients_of_a_flat_batch_are_the_sum_of_its_examples(tmp_path):
    llama(tmp_path, std=0.1, num_key_value_heads=2)
    model, generator = load_model(tmp_path), torch.Generator().manual_seed(0)
    examples = []
    for n in (4, 50, 48, 9, 7):
        examples.append(
            Example(
                torch.randint(0, 96, (n,), generator=generator).tolist(), [False] + [True] * (n - 1), chat("a", "b")
            )
        )
    token_loss_sum(model, collate(examples)).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for example in examples:
        token_loss_sum(model, collate([example])).backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, together[name]) < 1e-5, name


@needs_shared
def test_real_alpaca_records_train_their_answers(tokenizer):
    data = encode(load_sources([SHARED / "alpaca_en_1k.json"]), tokenizer, 2048)
    assert len(data.examples) + sum(data.dropped.values()) == 999
    for example in data.examples:
        assert trained_text(example, tokenizer) == example.record.messages[-1]["content"] + "<|im_end|>"
