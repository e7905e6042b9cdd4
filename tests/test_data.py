"""data.py and dataset/token_cache.py: what is trained, what is left out, the rows on disk, the split, and the flat
batches.
"""

import errno
import gzip
import json
import multiprocessing
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import SHARED, llama, micro_batches, needs_shared, relative

from checkpoint import load_model
from common.errors import UserError
from data import collate, load, split
from dataset import token_cache as rows
from dataset import tokenize_pool
from dataset.examples import Dataset, Example
from dataset.formats import open_source
from dataset.records import Record
from dataset.token_cache import prompt_hash, tokenized_rows
from interop.resolve import model_folder
from objectives import mean_loss, token_losses
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder(None))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(rows, "cache_folder", lambda: folder)
    return folder


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def written(folder: Path, records: list[dict], name: str = "data.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def loaded(folder: Path, records: list[dict], tokenizer, seq_len: int = 100, **more) -> Dataset:
    return load([written(folder, records)], tokenizer, seq_len, **more)


def trained_text(example: Example, tokenizer) -> str:
    return tokenizer.decode([i for i, yes in zip(example.ids, example.loss_weights, strict=True) if yes])


# ---- what is trained ----


def test_the_answer_and_its_end_are_trained_and_nothing_else(tmp_path, tokenizer):
    record = {"instruction": "Say <|im_end|>", "input": "", "output": "No:\n1. <|im_end|> 2."}
    (example,) = loaded(tmp_path, [record], tokenizer).examples
    assert trained_text(example, tokenizer) == "No:\n1. <|im_end|> 2.<|im_end|>"
    ends = [*example.ids].count(tokenizer.special_tokens["<|im_end|>"])
    assert ends == 3  # the turns' own: of system, user, assistant


def test_train_on_says_whose_turns(tmp_path, tokenizer):
    records = [{"messages": [{"role": "system", "content": "s"}, *chat("one?", "1", "two?", "2")]}]
    texts = {how: trained_text(loaded(tmp_path, records, tokenizer, train_on=how).examples[0], tokenizer)
             for how in ("answers", "last-answer", "all-turns")}  # fmt: skip
    assert texts == {
        "answers": "1<|im_end|>2<|im_end|>",
        "last-answer": "2<|im_end|>",
        "all-turns": "one?<|im_end|>1<|im_end|>two?<|im_end|>2<|im_end|>",
    }


def test_the_last_answer_is_the_last_even_where_it_has_no_weight(tmp_path, tokenizer):
    turns = chat("a", "b", "c", "d")
    turns[3]["weight"] = 0
    for how in ("answers", "last-answer"):
        records = [{"messages": turns}, {"messages": chat("e", "f")}]
        data = loaded(tmp_path, records, tokenizer, train_on=how)
        texts = [trained_text(example, tokenizer) for example in data.examples]
        assert texts == (["b<|im_end|>", "f<|im_end|>"] if how == "answers" else ["f<|im_end|>"])
    assert data.dropped == {"without a trained token": 1}


def test_a_prompts_own_answers_are_not_taught_and_its_users_turns_may_be(tmp_path, tokenizer):
    prompt, answer = chat("a", "b", "c"), [{"role": "assistant", "content": "d"}]
    for record in (
        {"prompt": prompt, "completion": answer, "system": "s"},
        {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": "e"}], "system": "s"},
        {"messages": prompt + answer, "label": True, "system": "s"},
    ):
        for how, wanted in (("answers", "d<|im_end|>"), ("all-turns", "a<|im_end|>c<|im_end|>d<|im_end|>")):
            (example,) = loaded(tmp_path, [record], tokenizer, train_on=how).examples
            assert trained_text(example, tokenizer) == wanted and "system\ns<|im_end|>" in tokenizer.decode(example.ids)
        silent = json.loads(json.dumps(record))
        silent.get("messages", silent.get("completion", silent.get("chosen")))[-1]["weight"] = 0
        with pytest.raises(UserError, match="without a trained token"):
            loaded(tmp_path, [silent], tokenizer)


@needs_shared
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "mistral_nemo"])
def test_all_turns_on_real_templates_trains_words_and_their_ends(tmp_path, name):
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name)
    turns = chat(" a question?", "an answer", "and (2)?", "two")
    (example,) = loaded(tmp_path, [{"messages": turns}], tokenizer, train_on="all-turns").examples
    said = tokenizer.decode([i for i, yes in zip(example.ids, example.loss_weights) if yes], skip_special=True)
    said = re.sub(r"</?think>|\s", "", said)  # Qwen 3's empty thought before the last answer
    assert said == "aquestion?ananswerand(2)?two"


def test_all_turns_where_a_users_words_follow_a_space(tmp_path, tokenizer):
    """As in Llama 2's and Mistral's first templates, [INST] words [/INST]: the space is a part of the word's token."""
    folder = tmp_path / "folder"
    shutil.copytree(model_folder(None), folder)
    user, answer = "'[INST] ' + m.content + ' [/INST]'", "' ' + m.content + eos_token"
    template = f"{{% for m in messages %}}{{{{ {user} if m.role == 'user' else {answer} }}}}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template)
    records = [{"messages": chat("one?", "1", "two?", "2")}]
    (example,) = loaded(tmp_path, records, load_tokenizer(folder), train_on="all-turns").examples
    assert trained_text(example, tokenizer) == " one? 1<|im_end|> two? 2<|im_end|>"


def test_weights_of_turns_and_records_reach_the_tokens(tmp_path, tokenizer):
    turns = chat("a", "b", "c", "d", "e", "f")
    turns[1]["weight"], turns[3]["weight"] = 0, 0.5
    (example,) = loaded(tmp_path, [{"messages": turns, "weight": 3}], tokenizer).examples
    assert [*example.loss_weights[example.loss_weights > 0]] == [1.5, 1.5, 3, 3]
    assert trained_text(example, tokenizer) == "d<|im_end|>f<|im_end|>"
    found = loaded(tmp_path, [{"messages": turns, "weight": 0}, {"messages": turns}], tokenizer)
    assert len(found) == 1 and found.examples.rows[0].stats.dropped == {"without a trained token": 1}


def test_weighted_loss_is_the_weighted_mean(tmp_path):
    theirs, generator = llama(tmp_path, std=0.1), torch.Generator().manual_seed(0)
    model, examples, sums = load_model(tmp_path), [], torch.zeros(2, dtype=torch.float64)
    for weight in (0.0, 0.5, 1.0, 4.0):
        ids = torch.randint(0, 96, (20,), generator=generator)
        weights = torch.tensor([0.0] * 8 + [weight] * 5 + [1.0] * 7)
        losses = torch.nn.functional.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        sums += torch.stack([(losses * weights[1:]).sum(), weights[1:].sum()]).double()
        examples.append(Example(ids.tolist(), weights.tolist()))
    for size in (1, 3):
        assert mean_loss(model, micro_batches(examples, size)) == pytest.approx(
            float((sums[0] / sums[1]).detach()), rel=1e-5
        )
    batch = collate(examples)
    token_losses(model, batch)[0].backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for weight, example in zip((0.0, 0.5, 1.0, 4.0), examples):
        for part, times in ((slice(8, 13), weight), (slice(13, 20), 1.0)):
            mask = [i in range(20)[part] for i in range(20)]
            (times * token_losses(model, collate([Example(example.ids, mask)]))[0]).backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, got[name]) < 1e-5, name


def test_an_answer_beyond_the_limit_is_dropped_and_counted(tmp_path, tokenizer):
    short, long = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": "word " * 100}
    data = loaded(tmp_path, [short, long, long], tokenizer, 60)
    assert len(data) == 1 and data.dropped == {"whose answer does not fit into --seq-len 60": 2}
    assert [*data.examples[0].ids] == [*loaded(tmp_path, [short], tokenizer, 2048).examples[0].ids]
    with pytest.raises(UserError, match="no record can be trained on"):
        loaded(tmp_path, [long], tokenizer, 60)


def test_a_long_conversation_keeps_its_whole_answers(tmp_path, tokenizer):
    turns = chat(*("word " * n for n in (3, 3, 3, 99)))
    data = loaded(tmp_path, [{"messages": turns}], tokenizer, 80)
    assert trained_text(data.examples[0], tokenizer).count("<|im_end|>") == 1
    assert data.dropped == {"cut to the messages that fit into --seq-len 80": 1}
    with pytest.raises(UserError, match="no record can be trained on"):
        loaded(tmp_path, [{"messages": turns}], tokenizer, 80, train_on="last-answer")


def test_plain_text_is_trained_whole_in_pieces(tmp_path, tokenizer):
    text = " ".join(str(i) for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    examples = load([tmp_path / "a.txt"], tokenizer, 50).examples
    ids = [i for example in examples for i in example.ids]
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] in tokenizer.stop_ids
    assert all([*example.loss_weights] == [0] + [1] * (len(example.ids) - 1) for example in examples)


def test_no_token_of_a_text_is_lost_at_its_end(tmp_path, tokenizer):
    """A last piece of one token would train nothing; the one before it gives up a token instead."""
    (tmp_path / "a.txt").write_text("7" * 50)  # with the end token 51
    data = load([tmp_path / "a.txt"], tokenizer, 25)
    assert [*data.lengths] == [25, 24, 2] and [*data.num_trained] == [24, 23, 1] and not data.dropped
    assert data.examples[2].ids[-1] in tokenizer.stop_ids and [*data.examples[2].loss_weights] == [0, 1]


def test_a_long_text_comes_in_parts_that_make_the_whole(tmp_path, tokenizer, monkeypatch, cache):
    text = "".join(f"line {i}, é\n" for i in range(500))
    monkeypatch.setattr("dataset.readers.PART", 1000)
    (tmp_path / "b.txt").write_text(text * 300)
    made = tokenized_rows(open_source(tmp_path / "b.txt"), tokenizer)
    assert len(made) > 1 and tokenizer.decode(made.ids[:-1].tolist()) == text * 300
    assert made.ids[-1] == tokenizer.eos_id and [*made.ids].count(tokenizer.eos_id) == 1


# ---- rows on disk ----


def test_rows_are_made_once_and_made_anew_when_something_changes(tmp_path, tokenizer, cache):
    record = {"instruction": "a", "output": "b"}
    file = written(tmp_path, [record, record | {"output": ""}])
    made, again = (tokenized_rows(open_source(file), tokenizer) for _ in range(2))
    assert not made.cached and again.cached and len(again) == 1 and again.where(0) == f"{file} line 1"
    assert again.stats.dropped == {"empty answer": 1} and [*made.ids] == [*again.ids]
    assert not tokenized_rows(open_source(file), tokenizer, ("user", "assistant")).cached
    assert not tokenized_rows(open_source(file), load_tokenizer(model_folder(None), "plain")).cached
    written(tmp_path, [record | {"output": "c"}])
    assert not tokenized_rows(open_source(file), tokenizer).cached
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_file_that_can_not_be_read_leaves_nothing_behind(tmp_path, tokenizer, cache):
    file = written(tmp_path, [{"instruction": "a", "output": "b"}] * 3 + [{"instruction": "a", "output": 1}])
    for _ in range(2):
        with pytest.raises(UserError, match="line 4: output is a number"):
            tokenized_rows(open_source(file), tokenizer)
    assert not [*cache.iterdir()]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "ids.bin one byte short": (lambda folder: os.truncate(folder / "ids.bin", 5), "ids.bin had 5 bytes, not "),
    "ids.bin longer": (lambda folder: os.truncate(folder / "ids.bin", 10_000), "ids.bin had 10,000 bytes, not "),
    "starts.bin empty": (lambda folder: os.truncate(folder / "starts.bin", 0), "starts.bin had 0 bytes, not "),
    "spans.bin gone": (lambda folder: (folder / "spans.bin").unlink(), "spans.bin could not be read (No such file"),
    "ids.bin flipped": (lambda folder: flip(folder / "ids.bin", 4), "ids.bin was damaged"),
    "weights.bin flipped": (lambda folder: flip(folder / "weights.bin", -1), "weights.bin was damaged"),
    "prompts.bin flipped": (lambda folder: flip(folder / "prompts.bin", 0), "prompts.bin was damaged"),
    "meta.json cut": (lambda folder: os.truncate(folder / "meta.json", 20), "meta.json was damaged"),
    "meta.json empty": (lambda folder: os.truncate(folder / "meta.json", 0), "meta.json was damaged"),
    "meta.json other": (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json was damaged"),
    "meta.json gone": (lambda folder: (folder / "meta.json").unlink(), "meta.json could not be read (No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_rows_that_are_damaged_are_made_afresh(tmp_path, tokenizer, cache, name):
    damage, wanted = DAMAGE[name]
    file = written(tmp_path, [{"instruction": f"question {i}", "output": "yes"} for i in range(5)])
    made = tokenized_rows(open_source(file), tokenizer)
    ids = [*made.ids]
    (folder,) = cache.iterdir()
    damage(folder)
    said = []
    data = load([file], tokenizer, 100, print_fn=said.append)
    assert f"NOTE: {folder}/{wanted}" in said[1] and said[1].endswith("; tokenised afresh")
    again = tokenized_rows(open_source(file), tokenizer)
    assert again.cached and again.notes == [] and [*again.ids] == ids and len(data) == 5
    assert [*cache.iterdir()] == [folder]


def test_a_number_in_the_description_of_rows_is_checked_too(tmp_path, tokenizer, cache):
    file = written(tmp_path, [{"instruction": "a", "output": "b"}])
    tokenized_rows(open_source(file), tokenizer)
    (folder,) = cache.iterdir()
    meta = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(meta.replace('"largest": ', '"largest": 1'))
    assert tokenized_rows(open_source(file), tokenizer).notes == [f"{folder}/meta.json was damaged; tokenised afresh"]


def test_without_a_cache_that_can_be_written_to_rows_are_the_run_s_own(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").touch()
    folder = tmp_path / "file/cache"
    monkeypatch.setattr(rows, "cache_folder", lambda: folder)
    file = written(tmp_path, [{"instruction": "a", "output": "b"}])
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(rows.tempfile, "tempdir", str(tmp_path / "own"))
    made = tokenized_rows(open_source(file), tokenizer)
    assert len(made) == 1 and not made.cached
    (own,) = (tmp_path / "own").iterdir()
    problem = f"{folder}: the cache can't be written to (Not a directory); set PLAINTUNE_CACHE to another folder"
    assert made.notes == [f"{problem}; this run's token rows are in {own} until it ends"]
    monkeypatch.setattr(rows.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="neither the cache nor a temporary folder can be written to .*PLAINTUNE_CACHE"):
        tokenized_rows(open_source(file), tokenizer)


def test_rows_of_a_cache_that_can_only_be_read_are_used(tmp_path, tokenizer, cache, monkeypatch):
    file = written(tmp_path, [{"instruction": "a", "output": "b"}])
    tokenized_rows(open_source(file), tokenizer)

    def refuse(folder):
        raise UserError("read-only")

    monkeypatch.setattr(rows, "check_cache_takes_files", refuse)
    again = tokenized_rows(open_source(file), tokenizer)
    assert again.cached and again.notes == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_cache_without_room_is_named(tmp_path, tokenizer, cache, monkeypatch, number):
    def write(source, tokenizer, roles, with_heads, kind, folder):
        (folder / "ids.bin").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rows, "write", write)
    file = written(tmp_path, [{"instruction": "a", "output": "b"}])
    with pytest.raises(UserError, match="cache: the cache has no room left .*free some space, or set PLAINTUNE_CACHE"):
        tokenized_rows(open_source(file), tokenizer)
    assert not [*cache.iterdir()]


def test_what_crashed_processes_left_goes_and_so_does_what_is_too_much(tmp_path, tokenizer, cache, monkeypatch):
    cache.mkdir()
    for name in (".rows-abc.partial-999999999", f".rows-abc.partial-{os.getppid()}", ".rows-new.partial-999999998"):
        (cache / name).mkdir()
        if "new" not in name:  # one that is not old may be alive on another machine
            os.utime(cache / name, (1, 1))
    for name, age in (("rows-new", 10), ("rows-old", 1000)):
        (cache / name).mkdir()
        (cache / name / "ids.bin").write_bytes(bytes(600))
        os.utime(cache / name, (os.stat(cache).st_mtime - age,) * 2)
    monkeypatch.setattr(rows, "KEPT", 1000)
    rows.make_room(cache)
    left = [f".rows-abc.partial-{os.getppid()}", ".rows-new.partial-999999998", "rows-new"]
    assert sorted(path.name for path in cache.iterdir()) == left


def test_two_processes_at_once_make_rows_once(tmp_path, tokenizer, cache):
    file = written(tmp_path, [{"instruction": f"question {i}", "output": "yes " * 50} for i in range(3000)])
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def work():
        tokenizer.forget_processes()
        made = tokenized_rows(open_source(file), tokenizer)
        results.put((made.cached, len(made), int(made.ids.sum(dtype=np.int64))))

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    got = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(cached for cached, *_ in got) == [False, True, True] and len({each[1:] for each in got}) == 1
    assert len([*cache.iterdir()]) == 1


def test_several_processes_give_what_one_gives(tmp_path, tokenizer, cache, monkeypatch):
    """Order, drops and the first fault too."""
    draw = random.Random(0)
    records = [{"instruction": f"q {i}", "output": "a " * draw.randrange(0, 60)} for i in range(4000)]
    file, results = written(tmp_path, records), []
    for alone in (0, 1 << 40):
        monkeypatch.setattr(tokenize_pool, "ALONE", alone)
        monkeypatch.setattr(rows, "ROWS_FORMAT", f"test {alone}")
        results.append(tokenized_rows(open_source(file), tokenizer))
    for name in ("ids", *rows.ARRAYS):
        assert np.array_equal(getattr(results[0], name), getattr(results[1], name)), name
    assert results[0].stats == results[1].stats and results[0].stats.dropped["empty answer"] > 10
    monkeypatch.setattr(tokenize_pool, "ALONE", 0)
    records[2500]["output"], records[3900]["output"] = None, 7
    with pytest.raises(UserError, match="line 2501: output is null"):
        tokenized_rows(open_source(written(tmp_path, records)), tokenizer)
    lines = [json.dumps(record) for record in records]
    lines[2500] = json.dumps(records[2500])
    lines[3000:] = [b"\xff" * 10]  # what can't be read at all, behind what can't be used
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    with pytest.raises(UserError, match="line 2501: output is null"):
        tokenized_rows(open_source(file), tokenizer)


def test_classes_and_tokenizer_files_are_part_of_the_key(tmp_path, tokenizer, cache):
    (tmp_path / "a.tsv").write_text("1\tred thing\n2\tblue thing\n")
    for names in ("Red\nBlue\n", "Rot\nBlau\n"):
        (tmp_path / "classes.txt").write_text(names)
        made = tokenized_rows(open_source(tmp_path / "a.tsv"), tokenizer)
        assert not made.cached and names.split()[0] in tokenizer.decode(made.ids[: made.starts[1]].tolist())
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a.tsv", "classes.txt"):
        (tmp_path / name).rename(moved / name)
    again = tokenized_rows(open_source(moved / "a.tsv"), tokenizer)
    assert again.cached and again.where(0) == f"{moved / 'a.tsv'} row 1"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, cache, monkeypatch):
    file, real = written(tmp_path, [{"instruction": "a", "output": "b"}]), rows.write

    def write(*arguments):
        real(*arguments)
        file.write_text(file.read_text() + "\n\n")

    monkeypatch.setattr(rows, "write", write)
    with pytest.raises(UserError, match="changed while it was read"):
        tokenized_rows(open_source(file), tokenizer)
    assert not [*cache.iterdir()]


def test_a_worker_that_dies_is_an_error_not_a_wait():
    with pytest.raises(UserError, match="ended, killed"):
        list(tokenize_pool.in_order(lambda chunk: os._exit(9), iter(range(5)), 2))
    with pytest.raises(UserError, match="ended, killed"):
        list(tokenize_pool.in_order(len, iter("abcdefgh"), 2, lambda: os._exit(9)))
    with pytest.raises(UserError, match="chunk 1"):  # and of two faults the first

        def faulty():
            yield from range(3)
            raise UserError("reader")

        def work(chunk):
            if chunk == 1:
                raise UserError("chunk 1")

        list(tokenize_pool.in_order(work, faulty(), 2))


def test_where_no_process_can_be_started_the_reason_is_said(monkeypatch):
    def start(self):
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", start)
    with pytest.raises(OSError, match="no more processes"):
        list(tokenize_pool.in_order(len, iter("abc"), 2))


# ---- the split ----


def one_token(*turns: str) -> Example:
    return Example([1, 2], [False, True], "", prompt_hash(Record(chat(*turns), None, "")))


def prompts_of(data: Dataset) -> set[int]:
    return set(data.prompts.tolist())


def test_the_split_keeps_equal_prompts_together_and_ignores_order():
    examples = [one_token(f"  Question {i % 50} ", f"answer {i}") for i in range(200)] + [one_token("question 7", "x")]
    train, val = split(Dataset(examples), 0.2)
    assert not prompts_of(train) & prompts_of(val) and len(prompts_of(train) | prompts_of(val)) == 50
    assert 3 <= len(prompts_of(val)) <= 20
    random.Random(0).shuffle(examples)
    assert {id(e) for e in split(Dataset(examples), 0.2)[1].examples} == {id(e) for e in val.examples}
    assert not len(split(Dataset(examples), 0)[1])
    alone = [one_token(f"q {i}", "a") for i in range(9)]
    assert len(split(Dataset(alone), 1e-9)[1]) == 1
    with pytest.raises(UserError, match="leaves none of 9 prompts"):
        split(Dataset(alone), 0.999)


def test_a_prompt_that_many_share_is_trained_on():
    """Whatever the hash of the common prompt: never nearly all to validation, never an error."""
    for common in ("Hi", "Hello", "Write a limerick.", "a", "b", "c"):
        examples = [one_token(common, f"answer {i}") for i in range(99)] + [one_token("Good morning", "x")]
        train, val = split(Dataset(examples), 0.05)
        assert len(train) == 99 and len(val) == 1
        alike = split(Dataset(examples[:99]), 0.05)
        assert len(alike[0]) == 99 and not len(alike[1])


def test_conversations_that_begin_with_an_answer_are_parted_by_what_follows(tmp_path, tokenizer):
    greeting = {"role": "assistant", "content": "How can I help?"}
    records = [{"messages": [greeting, *chat(f"question {i}", "yes")]} for i in range(40)]
    assert 1 <= len(split(loaded(tmp_path, records, tokenizer), 0.1)[1]) <= 8


@pytest.mark.parametrize("texts", [1, 2])
def test_long_texts_are_parted_by_their_pieces(tmp_path, tokenizer, texts):
    for i in range(texts):
        (tmp_path / f"{i}.txt").write_text(" ".join(str(k * k + i) for k in range(3000)))
    data = load([tmp_path / f"{i}.txt" for i in range(texts)], tokenizer, 50)
    train, val = split(data, 0.1)
    assert len(train) + len(val) == len(data) and 0.02 * len(data) <= len(val) <= 0.2 * len(data)
    assert train.tokens + val.tokens == data.tokens and train.trained_tokens + val.trained_tokens == data.trained_tokens


def test_tokens_that_no_piece_of_a_text_can_hold_are_said(tmp_path, tokenizer):
    """With --seq-len 2 a piece that gives a token keeps one; with more, nothing is lost."""
    counts = [2, 3, 7, 8]
    texts = [tokenizer.decode(tokenizer.encode("a b c d e f g h")[: n - 1]) for n in counts]
    assert [len(tokenizer.encode(text)) + 1 for text in texts] == counts  # with the end token
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    said = []
    data = load([tmp_path / "a.jsonl"], tokenizer, 2, print_fn=said.append)
    assert data.tokens == sum(counts) - 2 == 18
    reason = "cut by 2 tokens in all, each a piece of --seq-len 2 by itself"
    assert data.dropped == {reason: 2} and f"          shortened: 2 records {reason}" in said
    for seq_len in (3, 4, 5, 6, 7, 100):
        data = load([tmp_path / "a.jsonl"], tokenizer, seq_len)
        assert data.tokens == sum(counts) and data.dropped == {}


# ---- batches ----


def test_a_batch_of_long_examples_is_cut_and_none_is_lost(monkeypatch):
    """By tokens as well as by examples; one that is longer than the limit stands alone."""
    monkeypatch.setattr("data.max_tokens_per_micro_batch", lambda device: 100)
    lengths = [30, 50, 40, 20, 120, 10, 9]
    examples = [Example([i] * n, [False] + [True] * (n - 1)) for i, n in enumerate(lengths)]
    batches = micro_batches(examples, 5)
    assert [batch.documents.lengths for batch in batches] == [[9, 10, 20, 30], [40], [50], [120]]
    assert sorted(i for batch in batches for i in batch.tokens.tolist()) == sorted(
        i for i, n in enumerate(lengths) for _ in range(n)
    )


def test_a_batch_is_flat_and_its_rows_predict_the_trained_tokens():
    a = Example([1, 2, 3], [False, True, True])
    b = Example([4, 5, 6, 7], [True, False, False, True])  # a first token can't be predicted
    batch = collate([a, b])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7] and batch.documents.lengths == [3, 4]
    assert batch.logit_positions.tolist() == [0, 1, 5] and batch.targets.tolist() == [2, 3, 7]
    assert batch.loss_weights is None and batch.loss_weight_sum == 3


def test_loss_equals_transformers_labels_and_no_batch_size_matters(tmp_path):
    theirs, generator = llama(tmp_path, std=0.1), torch.Generator().manual_seed(0)
    model, examples = load_model(tmp_path), []
    for n in (3, 90, 17, 40, 5, 60, 8):
        ids = torch.randint(0, 96, (n,), generator=generator).tolist()
        examples.append(Example(ids, [False] * (n // 2) + [True] * (n - n // 2)))
    total, count = 0.0, 0
    for example in examples:
        labels = torch.where(torch.tensor(example.loss_weights), torch.tensor(example.ids), -100)[None]
        count += sum(example.loss_weights)
        total += float(theirs(torch.tensor([example.ids]), labels=labels).loss.detach()) * sum(example.loss_weights)
    for size in (1, 3, 8):
        assert mean_loss(model, micro_batches(examples, size)) == pytest.approx(total / count, rel=1e-6)


def test_gradients_of_a_flat_batch_are_the_sum_of_its_examples(tmp_path):
    llama(tmp_path, std=0.1, num_key_value_heads=2)
    model, generator = load_model(tmp_path), torch.Generator().manual_seed(0)
    examples = []
    for n in (4, 50, 48, 9, 7):
        ids = torch.randint(0, 96, (n,), generator=generator).tolist()
        examples.append(Example(ids, [False] + [True] * (n - 1)))
    token_losses(model, collate(examples))[0].backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for example in examples:
        token_losses(model, collate([example]))[0].backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, together[name]) < 1e-5, name


@needs_shared
def test_real_alpaca_records_train_their_answers(tokenizer):
    data = load([SHARED / "alpaca_en_1k.json"], tokenizer, 2048)
    answers = [record["output"] for record in json.loads((SHARED / "alpaca_en_1k.json").read_text())]
    assert len(data) == 999
    for example, answer in zip(data.examples, answers, strict=True):
        assert trained_text(example, tokenizer) == answer + "<|im_end|>"


def test_a_packed_file_is_read_as_the_plain_one(tmp_path, tokenizer):
    file = written(tmp_path, [{"instruction": f"q {i}", "output": "a"} for i in range(30)])
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    plain, unpacked = (load([each], tokenizer, 100) for each in (file, packed))
    assert [[*e.ids] for e in plain.examples] == [[*e.ids] for e in unpacked.examples]
