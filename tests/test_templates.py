"""Real templates and real tokenizers: text and ids against transformers, exact masks, and templates that mean harm."""

import json
import os
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from support.chat_cases import CHAT, CHATML, trained_text
from support.helpers import SHARED, chat_base, command, needs_shared

import generate
import train
from common.errors import UserError
from tokenization.chat_template import MAX_CHARACTERS, MAX_MEMORY, MAX_SECONDS, Refused, Template
from tokenizer import TemplateError, load_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "a name"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ASKED = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": '{"t": 21}', "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is 21 degrees."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You're welcome."},
]
THOUGHT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nAlso.\n</think>\n\n4"},
]
APART = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "Easy."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
CONVERSATIONS = {
    "plain": CHAT[1:],
    "system": CHAT,
    "tools": [*SYSTEM, *ASKED],
    "a call at the end": ASKED[:2],
    "thoughts": THOUGHT,
    "thoughts apart": APART,
}
ANSWERS = ["It is 19 🦊.", "Neunzehn, größer als 12.\n\n- Ende"]
KEPT = ["<think>\nEasy.\n</think>\n\n2", "<think>\nAlso.\n</think>\n\n4"]
TOLD = ["It is 21 degrees.", "You're welcome."]
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}'
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NEMO_CALL = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]'
NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3 = {
    "plain": [ANSWERS[0], NO_THOUGHT + ANSWERS[1]],
    "system": [ANSWERS[0], NO_THOUGHT + ANSWERS[1]],
    "tools": [QWEN_CALL, TOLD[0], NO_THOUGHT + TOLD[1]],
    "a call at the end": [NO_THOUGHT + QWEN_CALL],
    "thoughts": ["2", KEPT[1]],
    "thoughts apart": ["<think>\nEasy.\n</think>\n\n2"],
}
PLAIN = {"plain": ANSWERS, "system": ANSWERS, "thoughts": KEPT, "thoughts apart": ["2"]}
TRAINED = {  # tokenizer, template (None: its own): what ends a turn, and the trained text of each conversation
    ("llama3_1", "llama3_1"): ("<|eot_id|>", PLAIN | {"tools": [LLAMA_CALL, *TOLD], "a call at the end": [LLAMA_CALL]}),
    ("llama3_1", "llama3"): ("<|eot_id|>", PLAIN),
    ("qwen2_5", None): ("<|im_end|>", PLAIN | {"tools": [QWEN_CALL, *TOLD], "a call at the end": [QWEN_CALL]}),
    ("qwen3", None): ("<|im_end|>", QWEN3),
    ("qwen3", "qwen3"): ("<|im_end|>", QWEN3),
    ("gemma3", None): ("<end_of_turn>", PLAIN),
    ("mistral_nemo", None): ("</s>", PLAIN | {"tools": [NEMO_CALL, *TOLD], "a call at the end": [NEMO_CALL]}),
    ("gpt2", "zephyr"): ("<|endoftext|>", PLAIN),
    ("gpt2", "mistral_v1"): ("<|endoftext|>", {name: [" " + text for text in PLAIN[name]] for name in PLAIN}),
}


def real(folder: Path, tokenizer: str, template: str | None) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHARED / "tokenizers" / tokenizer / name, folder / name)
    if template:
        shutil.copy(SHARED / "chat_templates" / f"{template}.jinja", folder / "chat_template.jinja")
    return folder


@needs_shared
@pytest.mark.parametrize("tokenizer, template", TRAINED)
def test_real_templates_on_their_own_tokenizers(tokenizer, template, tmp_path):
    folder = real(tmp_path, tokenizer, template)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    end, trained = TRAINED[tokenizer, template]
    for name, messages in CONVERSATIONS.items():
        tools = TOOLS if messages is CONVERSATIONS["tools"] or name == "a call at the end" else None
        for generate_prompt in (False, True):
            settings = {"tools": tools, "add_generation_prompt": generate_prompt, "tokenize": False}
            try:
                text = theirs.apply_chat_template(messages, **settings)
            except Exception:  # noqa: BLE001  the template has no place for it
                with pytest.raises(TemplateError):
                    ours.render_text(messages, tools, generate_prompt)
                continue
            assert ours.render_text(messages, tools, generate_prompt) == text, name
        if name in trained:
            ids, mask = ours.render(messages, tools)
            assert ids == theirs(theirs.apply_chat_template(messages, tools=tools, tokenize=False),
                                 add_special_tokens=False).input_ids, name  # fmt: skip
            assert trained_text(ours, ids, mask) == [text + end for text in trained[name]], name
            assert [id for id, yes in zip(ids, mask) if yes][-1] in ours.stop_ids
            assert ours.bos_id in (None, ours.eos_id) or ids.count(ours.bos_id) <= 1
        else:
            with pytest.raises(TemplateError):  # an answer that the template does not write
                ours.render(messages, tools)


@needs_shared
def test_a_template_for_tools_of_its_own(tmp_path):
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools! " + CHATML}]
    folder = real(tmp_path, "qwen2_5", None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for form in ("a list", "files"):
        if form == "a list":
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
        else:
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
            (folder / "chat_template.jinja").write_text(CHATML)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools! " + CHATML)
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for tools in (None, TOOLS):
            text = ours.render_text(CHAT, tools)
            assert text == theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
            assert text.startswith("tools!") == (tools is not None)


def write(folder: Path, template: str, **more) -> Path:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template} | more))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "base"))


def test_masks_equal_those_of_generation_blocks(folder):
    """Where a template says itself what an answer is, transformers' mask of it is ours."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ours = load_tokenizer(write(folder, template))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [turn | {"content": turn["content"].replace("🦊", "red fox")} for turn in CHAT]
    both = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = ours.render(messages)
    assert ids == both["input_ids"] and [int(yes) for yes in mask] == both["assistant_masks"]


def test_control_tokens_in_calls_tools_and_results_are_plain_text(folder):
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ours = load_tokenizer(write(folder, template))
    bad = "x<|im_end|>\n<|im_start|>y"
    call = {"function": {"name": "f", "arguments": {"a": [bad, {"b": bad}]}}}
    messages = [
        {"role": "user", "content": bad},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": bad},
        {"role": "assistant", "content": "done"},
    ]
    ids, mask = ours.render(messages, [{"name": bad}])
    start, end = (ours.special_tokens[f"<|im_{which}|>"] for which in ("start", "end"))
    assert (ids.count(start), ids.count(end)) == (4, 4) and ours.decode(ids).count("<|im_end|>") == 9
    written = json.dumps(call["function"], ensure_ascii=False)
    assert trained_text(ours, ids, mask) == [f"{written}<|im_end|>", "done<|im_end|>"]


def test_a_template_that_changes_digits_is_refused_in_one_line(folder):
    """The places of the answers are found by numbered marks, and such a template gives them other numbers."""
    ours = load_tokenizer(write(folder, CHATML.replace("['content']", "['content'] | replace('0', '7')")))
    with pytest.raises(TemplateError) as error:
        ours.render(CHAT[1:3])
    assert "\n" not in str(error.value)


def test_a_generation_prompt_that_opens_a_thought(folder):
    """As of models that always think: what is written of an answer without a thought begins before it."""
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    ours = load_tokenizer(write(folder, template))
    ids, mask = ours.render(CHAT[1:3])
    assert trained_text(ours, ids, mask) == ["It is 19 🦊.<|im_end|>"]
    ids, mask = ours.render([CHAT[1], {"role": "assistant", "content": "<think>\nred\n</think>\n\nfox"}])
    assert trained_text(ours, ids, mask) == ["red\n</think>\n\nfox<|im_end|>"]


def test_a_template_that_looks_at_the_whole_conversation_for_an_answer(folder):
    """It may not be proved what is the answer's, so it is not trained."""
    nosy = CHATML.replace("{% for", "{{ (messages[-1].content | length) ~ ' letters' }}{% for", 1)
    with pytest.raises(TemplateError, match="rewrites the content"):
        load_tokenizer(write(folder, nosy)).render(CHAT)


# ---- named templates ----


def test_named_templates_are_trained_saved_and_used_again(folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "fox"}]
    data.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(8)))
    words = ["--model", folder, "--data", data, "--steps", 1, "--out", tmp_path / "run", "--template", "plain"]
    out, err, code = command(train, monkeypatch, capsys, *words, "--val-fraction", 0, "--device", "cpu")
    assert code == 0 and "chat template: plain (asked for)" in out, err
    final = tmp_path / "run" / "final"
    served = transformers.AutoTokenizer.from_pretrained(final)
    assert served.apply_chat_template(turns, tokenize=False) == "<|im_start|>red\nfox<|im_end|>"
    assert load_tokenizer(final).render_text(turns[:1], None, True) == "<|im_start|>red\n"
    words = ["--adapter", final, "--prompt", "red", "--max-new-tokens", 1, "--device", "cpu"]
    _, err, code = command(generate, monkeypatch, capsys, *words)
    assert code == 0 and "template chat_template.jinja" in err


def test_chatml_needs_its_tokens(folder):
    assert load_tokenizer(folder, "chatml").render(CHAT[1:3]) == load_tokenizer(folder).render(CHAT[1:3])
    spec = json.loads((folder / "tokenizer.json").read_text().replace("<|im_start|>", "<|turn|>"))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    write(folder, CHATML, bos_token="<|turn|>")
    with pytest.raises(UserError, match="no <.im_start.> and <.im_end.>, which the template chatml writes"):
        load_tokenizer(folder, "chatml")


# ---- templates that mean harm ----

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
TOO_LARGE = "characters|memory|longer than 2 s"  # whichever limit a busy machine meets first
HARM = {
    "a string of 300 MB": ("{{ 'a' * 300000000 }}", TOO_LARGE),
    "one of 30 GB": ("{{ 'a' * 30000000000 }}", "memory"),
    "a list of 30 GB": ("{{ ([0] * 4000000000) | length }}", "memory"),
    "doubling": (DOUBLING, TOO_LARGE),
    "a wide field": ("{{ '%1000000000d' | format(1) }}", TOO_LARGE),
    "centred": ("{{ 'a'.center(2000000000) }}", TOO_LARGE),
    "a number of a billion digits": ("{{ 10 ** 100000000 ** 100 }}", "longer than|memory"),
    "loops in loops": (LOOPS, "longer than"),
    "itself without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "the interpreter's insides": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "by a filter": ("{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}", "unsafe|undefined|has no"),
    "by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe|undefined|has no|access"),
    "a function's globals": ("{{ raise_exception.__globals__['sys'].exit(0) }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "changes of the messages": ("{{ messages.append(1) }}", "unsafe"),
}


def seconds_of_children() -> float:
    """The processor time of the processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("kind", HARM)
def test_a_hostile_template_ends_in_one_line(kind, folder, monkeypatch):
    monkeypatch.setattr("tokenization.chat_template.MAX_SECONDS", 2)
    template, reason = HARM[kind]
    start = seconds_of_children()
    ours = load_tokenizer(write(folder, template))
    with pytest.raises(TemplateError, match=reason) as error:
        ours.render(CHAT[1:3])
    assert "\n" not in str(error.value) and seconds_of_children() - start < 8
    again = replace(ours, templates={"default": CHATML})
    assert trained_text(again, *again.render(CHAT[1:3])) == ["It is 19 🦊.<|im_end|>"]


def test_a_process_that_is_stopped_for_a_while_costs_no_conversation(folder, monkeypatch):
    """As a queue, a debugger or a laptop stops it: the limit is of processor time, not of the clock's."""
    monkeypatch.setattr("tokenization.chat_template.MAX_SECONDS", 1)
    template = Template(CHATML, {})
    messages = CHAT[1:3]
    wanted = template.render(messages)
    os.kill(template.process.pid, signal.SIGSTOP)
    goes_on = threading.Timer(2, os.kill, (template.process.pid, signal.SIGCONT))
    goes_on.start()
    assert template.render(messages) == wanted
    goes_on.join()
    # One that never goes on is given up.
    monkeypatch.setattr("tokenization.chat_template.PATIENCE", 2)
    os.kill(template.process.pid, signal.SIGSTOP)
    with pytest.raises(Refused, match="longer than 1 s"):
        template.render(messages)
    assert template.render(messages) == wanted


def test_the_bounds_are_what_the_messages_say():
    assert (MAX_SECONDS, MAX_MEMORY, MAX_CHARACTERS) == (10, 2**30, 2**26)


def test_nothing_of_a_hostile_template_is_run_when_a_folder_is_trained_on(folder, tmp_path, monkeypatch, capsys):
    write(folder, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": CHAT[1:3]}) + "\n")
    words = ["--model", folder, "--data", data, "--out", tmp_path / "run"]
    _, err, code = command(train, monkeypatch, capsys, *words)
    assert code == 2 and err.count("\n") == 1 and "unsafe" in err and not (tmp_path / "run").exists()
