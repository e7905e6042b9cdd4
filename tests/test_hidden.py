"""What a chat template leaves out or adds is counted and said: parts that it does not show, empty think blocks, the
date; and chats that are rendered already.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.chat_cases import CHATML
from support.helpers import SHARED, chat_base, command, needs_shared

import data
import evaluate
import generate
import train
from dataset.formats import open_source
from dataset.markup import holds_rendered_chat
from dataset.token_cache import tokenized_rows
from tokenization import hidden
from tokenizer import load_tokenizer

NOT_SHOWN = " not shown by the template"
QUESTION = {"role": "user", "content": "What is the weather?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "name": "station", "content": '{"t": "21 °C"}', "tool_call_id": "abcdefghi"}
TOOL = {"type": "function", "function": {"name": "forecast", "description": "", "parameters": {"type": "object"}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    RESULT,
    {"role": "assistant", "content": "21 degrees.", "reasoning_content": "The tool says so."},
    {"role": "user", "content": "And tomorrow?"},
    {"role": "assistant", "content": "I don't know.", "reasoning_content": "It is not in the result."},
]
ANSWER = "{{ '<|im_start|>assistant\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
ANSWER += "{{ '<call>' + c.function.name }}{% endfor %}{{ '<|im_end|>\n' }}"
PROMPTED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DROPS_ALL = "{% for m in messages %}{% if m.role == 'assistant' %}" + ANSWER + "{% endif %}{% endfor %}" + PROMPTED
SHOWS_ALL = (
    "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{{ (m.reasoning_content or '') + (m.content or '') }}{{ m.tool_calls | tojson if m.tool_calls }}{{ '<|im_end|>' }}"
    "{% else %}{{ m | tojson }}{% endif %}{% endfor %}" + PROMPTED
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))


def with_template(base: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def written(file: Path, *records: dict) -> Path:
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def hidden_counts(ours, messages: list[dict], tools: list | None = None) -> Counter:
    (result,) = ours.render_each([(messages, tools)])
    return result.hidden


# ---- parts that the template does not show ----


def test_each_kind_of_part_that_a_template_drops_is_counted(base, tmp_path):
    ours = load_tokenizer(with_template(base, tmp_path / "drops", DROPS_ALL))
    wanted = {
        "system messages": 1,
        "user messages": 2,
        "tool results": 1,
        "names of tool results": 1,
        "ids of tool results": 1,
        "ids of tool calls": 1,
        "arguments of tool calls": 1,
        "thoughts of earlier answers": 1,
        "thoughts": 1,
        "lists of tools": 1,
    }
    assert hidden_counts(ours, TALK, [TOOL]) == wanted
    ours = load_tokenizer(with_template(base, tmp_path / "shows", SHOWS_ALL))
    assert hidden_counts(ours, TALK, [TOOL]) == {}


def test_what_a_template_writes_in_another_form_or_place_is_shown(base, tmp_path):
    """In capitals, without line ends, the system message behind the user's, tool results as JSON."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %}" + ANSWER + "{% else %}"
        "{{ m.content | upper | replace('\n', ' ') }}{% endif %}{% endfor %}{{ messages[0].content | tojson }}"
        + PROMPTED
    )
    ours = load_tokenizer(with_template(base, tmp_path / "other", template))
    talk = [
        {"role": "system", "content": 'Say "yes" or "no" only.'},
        {"role": "user", "content": "Is this a\nquestion of mine?"},
        {"role": "assistant", "content": "yes"},
    ]
    # Not by chance in the cache of proofs: 20 times.
    for _ in range(20):
        assert hidden_counts(ours, talk) == {}
    hides = template.replace("{{ messages[0].content | tojson }}", "")
    ours = load_tokenizer(with_template(base, tmp_path / "hides", hides))
    for _ in range(20):
        assert hidden_counts(ours, talk) == {"system messages": 1}


def test_words_that_stand_in_the_text_by_chance_are_counted(base, tmp_path):
    """A system message that the user's repeats, or of a letter; and a template that drops it only sometimes."""
    drops = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    drops += "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPTED
    ours = load_tokenizer(with_template(base, tmp_path / "drops", drops))
    answer = {"role": "assistant", "content": "Yes, answer briefly."}
    for words in ("a", "user", "Answer briefly.", "answer briefly."):
        talk = [{"role": "system", "content": words}, {"role": "user", "content": f"Why? {words} Why?"}, answer]
        assert hidden_counts(ours, talk) == {"system messages": 1}, words
    sometimes = drops.replace(
        "for m in messages if m.role != 'system'", "for m in messages if m.role != 'system' or n"
    ).replace("{% for", "{% set n = messages | length > 3 %}{% for", 1)
    ours = load_tokenizer(with_template(base, tmp_path / "sometimes", sometimes))
    for words, more, count in (("Be brief.", 0, 1), ("Be brief.", 1, 0), ("Be brief.", 0, 1), ("x", 1, 0), ("x", 0, 1)):
        talk = [{"role": "system", "content": words}, *[QUESTION, answer] * (more + 1)]
        assert hidden_counts(ours, talk)["system messages"] == count, (words, more)


def test_a_thought_that_the_answer_repeats_is_not_taken_for_shown(base, tmp_path):
    ours = load_tokenizer(with_template(base, tmp_path / "drops", DROPS_ALL))
    turns = [{"role": "assistant", "content": "Rain, rain.", "reasoning_content": "Rain, rain."}]
    assert hidden_counts(ours, [QUESTION, *turns])["thoughts"] == 1
    ours = load_tokenizer(with_template(base, tmp_path / "shows", SHOWS_ALL))
    assert hidden_counts(ours, [QUESTION, *turns])["thoughts"] == 0


def test_thoughts_in_the_content_are_parts_too(base, tmp_path):
    """As Qwen 3's template has it: those of earlier answers go, the last one stays."""
    cuts = CHATML.replace(
        "message['content']",
        "(message.content if loop.last or '</think>' not in message.content else"
        " message.content.split('</think>')[-1].lstrip('\n'))",
    )
    ours = load_tokenizer(with_template(base, tmp_path / "cuts", cuts))
    turns = [QUESTION, {"role": "assistant", "content": "<think>\nWeather of where?\n</think>\n\nRain."}]
    assert hidden_counts(ours, turns) == {}
    assert hidden_counts(ours, turns + turns) == {"thoughts of earlier answers": 1}


def test_words_before_and_between_thoughts_are_parts_too(base, tmp_path):
    """Qwen 3's template keeps the last words alone of an answer that thinks twice."""
    cuts = CHATML.replace(
        "message['content']",
        "('<think>\n' + message.content.split('</think>')[0].split('<think>')[-1] + '\n</think>\n\n'"
        " + message.content.split('</think>')[-1] if '</think>' in message.content else message.content)",
    )
    for template, count in ((cuts, 1), (CHATML, 0)):
        ours = load_tokenizer(with_template(base, tmp_path / str(count), template))
        lost = {"parts of answers before or between thoughts": count} if count else {}
        twice = "<think>Weather of where?</think>Let me see.<think>Paris, of course.</think>Rain."
        for answer in (twice, "I will think.<think>Weather of where?</think>Rain."):
            assert hidden_counts(ours, [QUESTION, {"role": "assistant", "content": answer}]) == lost, answer
        answer = "<think>Weather of where?</think>Rain."
        assert hidden_counts(ours, [QUESTION, {"role": "assistant", "content": answer}]) == {}


def test_proofs_are_not_sought_without_end(base, tmp_path, monkeypatch):
    """Of a kind that is left out again and again, a record costs no rendering more."""
    ours = load_tokenizer(with_template(base, tmp_path / "drops", DROPS_ALL))
    jobs = []
    change = hidden.changed
    monkeypatch.setattr(hidden, "changed", lambda *each: jobs.append(each) or change(*each))
    talk = [{"role": "system", "content": "Be very brief."}, QUESTION, {"role": "assistant", "content": "Rain."}]
    for _ in range(40):
        assert hidden_counts(ours, talk) == {"system messages": 1, "user messages": 1}
    assert len(jobs) == hidden.ENOUGH_PROOFS


@needs_shared
@pytest.mark.parametrize(
    "tokenizer, template, wanted",
    [
        ("qwen3", None, {"names of tool results": 1, "ids of tool calls": 1}),
        ("qwen2_5", None, {"thoughts": 1}),
        # It writes the system message before the last message, if that is the user's: never before an answer.
        ("mistral_nemo", None, {"thoughts": 1, "system messages": 1}),
        ("llama3_1", "llama3_1", {"thoughts": 1}),
    ],
)
def test_real_templates(tokenizer, template, wanted, tmp_path):
    for file in (SHARED / "tokenizers" / tokenizer).glob("*.json"):
        shutil.copy(file, tmp_path / file.name)
    if template:
        shutil.copy(SHARED / "chat_templates" / f"{template}.jinja", tmp_path / "chat_template.jinja")
    counts = hidden_counts(load_tokenizer(tmp_path), TALK, [TOOL])
    assert counts["thoughts of earlier answers"] == 1 and counts["tool results"] == 0
    assert counts["system messages"] == wanted.get("system messages", 0)
    assert counts["arguments of tool calls"] == counts["lists of tools"] == counts["user messages"] == 0
    assert counts["thoughts"] == wanted.get("thoughts", 0)
    for kind in wanted:
        assert counts[kind] == wanted[kind], counts


def test_the_file_s_line_says_what_is_not_shown(base, tmp_path, monkeypatch, capsys):
    folder = with_template(base, tmp_path / "drops", DROPS_ALL)
    file = written(tmp_path / "a.jsonl", *[{"messages": TALK, "tools": [TOOL]}] * 3)
    out, err, code = command(data, monkeypatch, capsys, "inspect", file, "--model", folder, "--show", 0)
    assert code == 0, err
    for count, kind in ((3, "system messages"), (6, "user messages"), (3, "tool results"), (3, "lists of tools")):
        assert f", {count} {kind}{NOT_SHOWN}" in out.splitlines()[0]


# ---- empty think blocks ----

THINKS = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if loop.last and message.role == 'assistant' and '</think>' not in message.content"
    " else '') + message['content'] +",
)


def test_empty_think_blocks_are_counted_and_trained_or_not(base, tmp_path, monkeypatch, capsys):
    folder = with_template(base, tmp_path / "thinks", THINKS)
    turns = [QUESTION, {"role": "assistant", "content": "Rain."}]
    thought = [QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nRain."}]
    own = [QUESTION, {"role": "assistant", "content": "<think>\n</think>\n\n  Sun."}]
    file = written(tmp_path / "a.jsonl", *({"messages": each} for each in (turns, turns * 2, thought, own)))
    trained = {}
    for choice, said in (("train", "answers trained to begin with an empty <think></think>"),
                         ("mask", "answers behind an empty <think></think> that is not trained")):  # fmt: skip
        ours = load_tokenizer(folder, empty_think=choice)
        made = tokenized_rows(open_source(file), ours)
        assert made.stats.altered == {said: 3}
        spans = zip(made.spans, made.starts[:-1].repeat([1, 2, 1, 1]), strict=True)
        trained[choice] = [ours.decode(made.ids[first + a : first + b].tolist()) for (a, b), first in spans]
        ids = made.ids.tolist()
        words = ["inspect", file, "--model", folder, "--empty-think", choice]
        out, err, code = command(data, monkeypatch, capsys, *words, "--show", 0)
        assert code == 0 and f", 3 {said}" in out, err
    block, end = "<think>\n\n</think>\n\n", "<|im_end|>"
    last = ["<think>\nHm.\n</think>\n\nRain." + end]
    wanted = [block + "Rain." + end, "Rain." + end, block + "Rain." + end, *last, "<think>\n</think>\n\n  Sun." + end]
    assert trained["train"] == wanted
    assert trained["mask"] == ["Rain." + end, "Rain." + end, "Rain." + end, *last, "  Sun." + end]
    assert ids == tokenized_rows(open_source(file), load_tokenizer(folder)).ids.tolist()


def test_a_template_that_asks_in_other_words_than_it_writes_is_said(base, tmp_path):
    """As of models that always think: a server's prompt is no beginning of what is trained."""
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    ours = load_tokenizer(with_template(base, tmp_path / "asks", template))
    plain, thought = (
        {"messages": [QUESTION, {"role": "assistant", "content": content}]}
        for content in ("Rain.", "<think>\nHm.\n</think>\n\nRain.")
    )
    made = tokenized_rows(open_source(written(tmp_path / "a.jsonl", plain, thought, plain)), ours)
    assert made.stats.altered == {"answers that the template asks for in other words than it writes before them": 2}


# ---- the date ----

DATED = CHATML.replace("{% for", "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{% for", 1)


@pytest.fixture
def another_day(monkeypatch):
    """Sets the clock's date."""

    def set_day(day: str) -> None:
        for module in ("tokenization.chat_template", "tokenizer", "training.run_folder"):
            monkeypatch.setattr(f"{module}.today", lambda: day)

    return set_day


def test_rows_of_another_day_are_others_only_where_the_date_is_written(base, tmp_path, another_day):
    file = written(tmp_path / "a.jsonl", {"messages": [QUESTION, {"role": "assistant", "content": "Rain."}]})
    mentions = CHATML + "{# not strftime_now #}"
    for template, is_dated in ((DATED, True), (CHATML, False), (mentions, False)):
        folder = with_template(base, tmp_path / f"{len(template)}", template)
        made = []
        for day in ("2026-11-29", "2026-11-29", "2026-11-30"):
            another_day(day)
            ours = load_tokenizer(folder)
            made.append(tokenized_rows(open_source(file), ours))
            assert ours.writes_date == is_dated
            assert (f"Today: {day[8:]} Nov 2026\n" in ours.decode(made[-1].ids.tolist())) == is_dated
        assert [rows.cached for rows in made] == [False, True, not is_dated]


def test_a_run_keeps_its_date_when_it_is_resumed(base, tmp_path, another_day, monkeypatch, capsys):
    """A run that is stopped and goes on three days later; then what evaluates and asks its adapter."""
    folder = with_template(base, tmp_path / "dated", DATED)
    record = {"messages": [QUESTION, {"role": "assistant", "content": "Rain."}]}
    file = written(tmp_path / "a.jsonl", *[record | {"id": i} for i in range(12)])
    run = tmp_path / "run"
    words = ["--device", "cpu", "--out", run]
    first = ["--model", folder, "--data", file, "--val-fraction", 0, "--steps", 4, "--save-every", 2, "--batch-size", 2]
    another_day("2026-11-29")
    out, err, code = command(train, monkeypatch, capsys, *words, *first, "--resume", "auto")
    assert code == 0 and "date 2026-11-29 in the prompt, from the template" in out, err
    assert json.loads((run / "config.json").read_text())["date"] == "2026-11-29"
    shutil.rmtree(run / "final")
    another_day("2026-12-02")
    for resume in ("auto", "on"):
        out, err, code = command(train, monkeypatch, capsys, *words, "--resume", resume)
        assert code == 0 and "date 2026-11-29 in the prompt" in out and "tokenised before" in out, err
        assert json.loads((run / "final" / "plaintune.json").read_text())["date"] == "2026-11-29"
        shutil.rmtree(run / "final") if resume == "auto" else None
    _, err, code = command(train, monkeypatch, capsys, *words, *first, "--overwrite", "--date", "2.12.2026")
    assert code == 2 and "--date 2.12.2026: is no date; write it as 2026-11-29" in err
    asks = ["--adapter", run / "final", "--device", "cpu"]
    for more, said in (([], "date 2026-11-29 in the prompt, from the template, as in training"),
                       (["--date", "2027-01-01"], "date 2027-01-01 in the prompt, from the template")):  # fmt: skip
        _, err, code = command(generate, monkeypatch, capsys, *asks, *more, "--prompt", "x", "--max-new-tokens", 1)
        assert code == 0 and err.rstrip().endswith(said), err
        out, err, code = command(
            evaluate, monkeypatch, capsys, "loss", "--data", file, *asks, *more, "--versus", "base"
        )
        assert code == 0 and said in out, out + err
        assert out.count(said.removesuffix(", as in training")) == 2
    # What goes on from the adapter asks as it was trained, and its own final/ says so.
    other = ["--data", file, "--val-fraction", 0, "--steps", 1, "--adapter", run / "final", "--out", tmp_path / "other"]
    out, err, code = command(train, monkeypatch, capsys, *other, "--device", "cpu")
    assert code == 0 and "date 2026-11-29 in the prompt" in out, err
    _, err, code = command(train, monkeypatch, capsys, *other[:-1], run / "best", "--device", "cpu")
    assert code == 2 and f"--out {run / 'best'}: is a part of the run in {run}; name another folder" in err


def test_without_a_date_in_the_template_none_is_said(base, tmp_path, monkeypatch, capsys):
    record = {"messages": [QUESTION, {"role": "assistant", "content": "Rain."}]}
    file = written(tmp_path / "a.jsonl", record)
    words = ["--model", base, "--data", file, "--val-fraction", 0, "--steps", 1, "--out", tmp_path / "run"]
    out, err, code = command(train, monkeypatch, capsys, *words, "--device", "cpu")
    assert code == 0 and "in the prompt" not in out, err
    assert "date" not in json.loads((tmp_path / "run" / "final" / "plaintune.json").read_text())


# ---- chats that are rendered already ----

RENDERED = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<s>[INST] Hi [/INST] Ho</s>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo",
    "<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>",
    "<｜User｜>Hi<｜Assistant｜>Ho",
    "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Ho",
    "### Instruction:\nSay hi.\n\n### Response:\nHi",
    "A chat. USER: Hi ASSISTANT: Ho</s>",
    "### Human: Hi\n### Assistant: Ho",
    "\n\nHuman: Hi\n\nAssistant: Ho",
    "<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHo",
    "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Ho",
)
PLAIN = (
    "The token <|im_start|> begins a message.",
    "USER: is a variable. ASSISTANT is none.",
    "### Instruction: stir",
    "a <|start|> of <start_of_turn> things; list[INSTANCE]",
    "",
)


def test_markup_of_templates_is_found_and_talk_about_it_is_not():
    assert [text for text in RENDERED if not holds_rendered_chat(text)] == []
    assert [text for text in PLAIN if holds_rendered_chat(text)] == []


def test_rendered_chats_are_said_before_training_by_file(base, tmp_path, monkeypatch, capsys):
    texts = written(tmp_path / "texts.jsonl", *({"text": text} for text in (PLAIN[0], *RENDERED)))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": RENDERED[0]}]
    chats = written(tmp_path / "chats.jsonl", {"messages": turns}, {"messages": [QUESTION, *turns[1:]]})
    fine = written(tmp_path / "fine.jsonl", {"messages": [QUESTION, {"role": "assistant", "content": "Rain."}]})
    words = ["--model", base, "--data", texts, chats, fine, "--val-fraction", 0, "--steps", 1, "--device", "cpu"]
    out, err, code = command(train, monkeypatch, capsys, *words, "--out", tmp_path / "run")
    assert code == 0, err
    warnings = [line for line in out.splitlines() if "markup of a chat template" in line]
    assert len(warnings) == 2
    share = f"{len(RENDERED)} of {len(RENDERED) + 1} records"
    assert f"WARNING: {share} hold the markup of a chat template, the first in {texts} line 2" in warnings[0]
    assert f"WARNING: 2 of 2 records hold the markup of a chat template, the first in {chats} line 1" in warnings[1]
    assert all("give the chats as messages" in line for line in warnings)
    out, err, code = command(data, monkeypatch, capsys, "inspect", texts, "--model", base, "--show", 0)
    assert code == 0 and "! chats rendered already" in out, err


def test_the_model_s_own_markup_is_known_whatever_it_is(base, tmp_path, monkeypatch, capsys):
    template = "{% for m in messages %}{{ '~~' + m.role + '~~ ' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '~~assistant~~ ' }}{% endif %}"
    folder = with_template(base, tmp_path / "own", template)
    file = written(tmp_path / "a.jsonl", {"text": "~~user~~ Hi~~assistant~~ Ho"}, {"text": "Hi ~~ Ho"})
    out, err, code = command(data, monkeypatch, capsys, "inspect", file, "--model", folder, "--show", 0)
    assert code == 0 and "! chats rendered already           1 (trained as plain characters" in out, err
