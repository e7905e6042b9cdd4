"""--objective grpo --reward: what a user's function may do and get, reward models, what is refused, and a reward that
rises. (tests/test_grpo.py has the loss, the draws and the answers.)"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import chat_base, command, output_of, refusal_of
from support.runs import lines, preferences
from support.sampled import on_policy, questions
from support.training_runs import CPU
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train
from common.errors import UserError
from common.files import process_exists
from dataset.records import Record
from flags import parse_flags
from objectives import check_objective
from training import rewards
from training.rewards import AskedQuestion, GivenAnswer, RewardFunction, RewardModel

QUICK = "--steps 2 --eval-every 0 --dtype fp32 --device cpu --compile off --batch-size 2 --group-size 3".split()
QUICK += "--max-new-tokens 6 --val-fraction 0.2".split()
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the red fox"}]
QUESTION = AskedQuestion(Record(MESSAGES, None, "file, line 3"), MESSAGES, ["a", "b"], {"number": 7})
ANSWER = GivenAnswer(QUESTION, "the answer", True)


def function(folder: Path, body: str, timeout: float = 20) -> RewardFunction:
    (folder / "my.py").write_text(body)
    return RewardFunction(f"{folder / 'my.py'}:reward", timeout)


def value_of(folder: Path, body: str, answer: GivenAnswer = ANSWER, timeout: float = 20) -> float:
    found = function(folder, body, timeout)
    try:
        (reward,) = found([answer])
        return reward
    finally:
        found.end()


# ---- what a function gets ----


@pytest.mark.parametrize(
    ("name", "expression", "value"),
    [
        ("answer", "answer == 'the answer'", 1),
        ("reference", "reference == 'a'", 1),
        ("references", "len(references)", 2),
        ("prompt", "prompt == 'the red fox'", 1),
        ("messages", "[m['role'] for m in messages] == ['system', 'user']", 1),
        ("record", "record['number']", 7),
        ("is_cut", "is_cut", 1),
    ],
)
def test_a_function_names_what_it_wants_to_see(tmp_path, name, expression, value):
    assert value_of(tmp_path, f"def reward({name}):\n    return {expression}\n") == value


def test_a_function_may_take_all_and_have_arguments_of_its_own(tmp_path):
    assert value_of(tmp_path, "def reward(**all):\n    return len(all)\n") == len(rewards.REWARD_FACTS)
    assert value_of(tmp_path, "def reward(answer, *rest, weight=3, is_cut=False):\n    return weight + is_cut\n") == 4
    no_reference = GivenAnswer(AskedQuestion(QUESTION.record, MESSAGES, [], None), "x")
    assert value_of(tmp_path, "def reward(reference, references):\n    return reference is None and references == []\n",
                    no_reference) == 1  # fmt: skip


def test_numbers_of_other_kinds_are_numbers(tmp_path):
    body = "import numpy, torch\ndef reward(answer):\n    return {}\n"
    assert value_of(tmp_path, body.format("numpy.float32(0.5)")) == 0.5
    assert value_of(tmp_path, body.format("torch.tensor([2.5])")) == 2.5
    assert value_of(tmp_path, body.format("True")) == 1.0 == np.float64(1)


def test_what_it_prints_and_reads_and_changes_is_its_own(tmp_path, capfd):
    body = (
        "import sys\ncount = 0\ndef reward(answer, messages):\n    global count\n    count += 1\n"
        "    print('x' * 200_000)\n    sys.stdout.flush()\n    messages.append('more')\n"
        "    assert sys.stdin.read() == ''\n"
        "    return count + len(messages) / 10\n"
    )
    found = function(tmp_path, body)
    assert found([ANSWER] * 3) == pytest.approx([1.3, 2.3, 3.3])
    found.end()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("x") == 600_000 and len(MESSAGES) == 2


def test_what_it_has_started_ends_with_it(tmp_path):
    body = (
        "import subprocess\ndef reward(answer):\n    child = subprocess.Popen(['sleep', '600'])\n    return child.pid\n"
    )
    found = function(tmp_path, body)
    (child,) = found([ANSWER])
    assert process_exists(int(child))
    found.end()
    deadline = time.monotonic() + 10
    while process_exists(int(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    # A child that nobody has waited for is a zombie, which no process is any more.
    state = Path(f"/proc/{int(child)}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


# ---- functions that are none ----


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def other(answer):\n    return 1\n", "has no function reward"),
        ("reward = 3\n", "has no function reward"),
        ("def reward(answer:\n", "SyntaxError"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("raise ValueError('not today')\n", "not today"),
        (
            "def reward(answer, colour):\n    return 1\n",
            "wants colour, which there is not; there are answer",
        ),
        ("def reward(answer, /):\n    return 1\n", "takes answer by its place alone; leave out the / behind it"),
    ],
)
def test_a_file_without_such_a_function_ends_with_one_line(tmp_path, body, said):
    with pytest.raises(UserError) as error:
        function(tmp_path, body)
    assert said in str(error.value) and "--reward" in str(error.value) and "\n" not in str(error.value)


def test_an_import_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "IMPORT_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(UserError, match="did not return within 1.5 s .* when it was imported"):
        function(tmp_path, "import time\ntime.sleep(600)\n", timeout=1.5)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('amount')", "KeyError: 'amount', for the answer \"the answer\" to file, line 3"),
        ("return None", "TypeError: it returned NoneType; a number is wanted"),
        ("return '1'", "TypeError: it returned str; a number is wanted"),
        ("return [1]", "TypeError: it returned list; a number is wanted"),
        ("return float('nan')", "returned nan, a number up to 1e+30 is wanted, for the answer"),
        ("return float('-inf')", "returned -inf, a number up to 1e+30 is wanted"),
        ("return 1e31", "returned 1e+31, a number up to 1e+30 is wanted"),
        ("import time\n    time.sleep(600)", "did not return within 1 s (--reward-timeout) for the answer"),
        ("import os\n    os._exit(0)", "has ended its process for the answer"),
        ("import os\n    os.kill(os.getpid(), 9)", "has ended its process for the answer"),
        ("import sys\n    sys.exit(3)", "SystemExit: 3, for the answer"),
        ("return answer.\\\n    colour", "AttributeError: 'str' object has no attribute 'colour'"),
        ("def f(): return f()\n    return f()", "RecursionError"),
    ],
)
def test_what_is_no_reward_ends_with_one_line_that_names_the_record(tmp_path, body, said):
    found = function(tmp_path, f"def reward(answer):\n    {body}\n", timeout=1)
    with pytest.raises(UserError) as error:
        found([ANSWER])
    message = str(error.value)
    assert said in message and f"--reward {found.name}" in message and "file, line 3" in message and "\n" not in message
    found.end()


# ---- through the command line ----


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    chat_base(folder / "base")
    questions(folder / "questions.jsonl", 16)
    preferences(folder / "pairs.jsonl", 16, 0)
    (folder / "good.py").write_text(
        "def reward(answer):\n    return len(set(answer))\ndef same(answer):\n    return 2\n"
    )
    (folder / "bad.py").write_text("def reward(answer, record):\n    return 1 / (record['number'] < 0)\n")
    return folder


def words(files, out, *more, reward="good.py:reward", data="questions.jsonl") -> list:
    base = ["--model", files / "base", "--data", files / data, "--objective", "grpo"]
    given = ["--reward", files / reward] if reward else []
    return [*base, *given, *QUICK, "--out", out, *more]


REFUSED = [
    ("", None, "--objective grpo: what scores the answers? --reward FILE.py:NAME, or the folder of a reward model"),
    ("", "none.py:reward", "none.py"),
    ("--group-size 1", "good.py:reward", "--group-size 1: an answer is compared with others of its group; 2 or more"),
    ("--dropout 0.1", "good.py:reward", "--dropout 0.1: the model that answers would be another one"),
    ("--replay QUESTIONS=0.1", "good.py:reward", "--replay: "),
    ("--train-on all-turns", "good.py:reward", "--train-on: --objective grpo takes whole answers; leave it out"),
    ("--truncate prompt", "good.py:reward", "--truncate: --objective grpo takes whole answers; leave it out"),
    ("--beta 0.1 --method full", "good.py:reward", "--beta 0.1: wants the model before step 1 in every step"),
    ("--forget-limit 1", "good.py:reward", "--forget-limit: --objective grpo has no answers of others"),
    ("--max-new-tokens 512", "good.py:reward", "--max-new-tokens 512: leaves no room for a prompt in --seq-len 512"),
    ("--reward-timeout 0", "good.py:reward", "--reward-timeout 0: must be above 0"),
    ("--objective sft", "good.py:reward", "is for --objective grpo or distill, not for --objective sft"),
    ("", "bad.py:reward", "ZeroDivisionError: division by zero, for the answer"),
    ("", "good.py:other", "has no function other"),
]


@pytest.mark.parametrize(("more", "reward", "said"), REFUSED, ids=[f"{m}, {r}" for m, r, _ in REFUSED])
def test_what_is_no_reinforcement_ends_with_one_line(files, tmp_path, monkeypatch, capsys, more, reward, said):
    more = more.replace("QUESTIONS", str(files / "questions.jsonl")).split()
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run", *more, reward=reward))
    assert said in refused
    if "ZeroDivision" not in said:
        assert not (tmp_path / "run").exists()


def test_a_text_that_processes_share_is_refused(files, tmp_path):
    # By itself: the command line counts the processes before it looks at the objective.
    flags = parse_flags([str(word) for word in words(files, tmp_path / "run", "--context-parallel", 2)])
    with pytest.raises(UserError, match="--context-parallel: shares the tokens of a text; not with --objective grpo"):
        check_objective(flags)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("".join(json.dumps({"text": "only words"}) + "\n" for _ in range(4)), "plain text"),
        ("".join(json.dumps({"question": "the red fox " * 400}) + "\n" for _ in range(4)), "--seq-len"),
    ],
)
def test_data_that_ask_nothing_are_refused(files, tmp_path, monkeypatch, capsys, text, said):
    name = "no_question.jsonl"
    (files / name).write_text(text)
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run", data=name))
    assert said in refused and not (tmp_path / "run").exists()


def test_prompts_without_answers_conversations_and_several_references_are_asked(files, tmp_path, monkeypatch, capsys):
    rows = [
        {"question": "the red fox"},
        {"messages": [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "runs"}]},
        {"messages": [{"role": "user", "content": "never"}]},
        {"question": "blue", "answers": ["green", "red"]},
    ]
    names = []
    for i, row in enumerate(rows):
        names.append(files / f"kind-{i}.jsonl")
        names[-1].write_text((json.dumps(row) + "\n") * 4)
    body = "def reward(reference, references, messages):\n    assert messages[-1]['role'] == 'user'\n"
    body += "    known = {None: 0, 'runs': 1, 'green': 2}\n    return 10 * known[reference] + len(references)\n"
    (files / "kinds.py").write_text(body)
    more = ("--batch-size", 16, "--steps", 1, "--data", *names[1:])
    start = words(files, tmp_path / "run", *more, reward="kinds.py:reward", data=names[0])
    start[start.index("--val-fraction") + 1] = 0
    output_of(train, monkeypatch, capsys, *start)
    # Of four kinds 0, 11, 0 and 22 on average, whatever the answers are.
    assert lines(tmp_path / "run")[0]["reward"] == pytest.approx((0 + 11 + 0 + 22) / 4)


def test_groups_of_equal_rewards_are_counted_and_move_nothing(files, tmp_path, monkeypatch, capsys):
    start = words(files, tmp_path / "run", "--method", "full", "--weight-decay", 0, reward="good.py:same")
    output_of(train, monkeypatch, capsys, *start)
    steps = [line for line in lines(tmp_path / "run") if "reward" in line]
    assert [(line["reward"], line["alike"], line["grad_norm"]) for line in steps] == [(2.0, 1.0, 0.0)] * 2
    from safetensors.torch import load_file

    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, value in load_file(files / "base" / "model.safetensors").items():
        assert torch.equal(value, trained[name])


@pytest.fixture(scope="module", params=["full", "lora"])
def reward_model(request, files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "run"
    base = ["--model", files / "base", "--data", files / "pairs.jsonl", "--objective", "reward", "--steps", 3]
    more = ["--method", request.param, "--dtype", "fp32", "--device", "cpu", "--eval-every", 0, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *map(str, [*base, *more, "--lr", "1e-2"])])
        train.main()
    return out / "final"


def test_a_reward_model_s_scores_are_those_of_transformers(files, reward_model):
    answers = [GivenAnswer(QUESTION, text) for text in ("the dog", "never runs always", "über 河 12", "")]
    scores = RewardModel(str(reward_model), torch.float32, CPU, 64)(answers)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    if (reward_model / "adapter_config.json").is_file():
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(files / "base", num_labels=1, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, reward_model).eval()
    else:
        theirs = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32).eval()
    for answer, score in zip(answers, scores, strict=True):
        said = [*MESSAGES, {"role": "assistant", "content": answer.text}]
        text = tokenizer.apply_chat_template(said, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        theirs.config.pad_token_id = 0
        with torch.no_grad():
            assert theirs(input_ids=ids["input_ids"]).logits[0, 0].item() == pytest.approx(score, abs=1e-5)


def test_grpo_takes_a_reward_model(files, reward_model, tmp_path, monkeypatch, capsys):
    start = words(files, tmp_path / "run", "--reward", reward_model, reward=None)
    output_of(train, monkeypatch, capsys, *start)
    assert all(np.isfinite(line["reward"]) for line in lines(tmp_path / "run") if "reward" in line)


def test_folders_that_are_no_reward_models_end_with_one_line(files, tmp_path, monkeypatch, capsys):
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run", reward="base"))
    assert "has an output head; a reward model has one score (train.py --objective reward)" in refused
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=306, num_labels=3, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(files / "three")
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run", reward="three"))
    assert "has a score head with 3 labels; a reward model has one score" in refused
    (tmp_path / "empty").mkdir()
    out, err, code = command(train, monkeypatch, capsys, *words(files, tmp_path / "run", reward=tmp_path / "empty"))
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists(), out


def test_a_reward_rises(tmp_path):
    """Answers with many e are rewarded: they get more of them."""
    base = chat_base(tmp_path / "base", std=0.05)
    file = questions(tmp_path / "questions.jsonl", 8)

    def count(answers) -> list[float]:
        return [answer.text.count("e") / 8 for answer in answers]

    run = on_policy(base, file, count, max_new_tokens=8, group_size=8)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=3e-3)
    means = []
    from objectives import Losses

    for step in range(20):
        batches, totals = run.run.begin_step(run.model, run.prompts(8, step), step, 0)
        losses = Losses(CPU)
        for batch in batches:
            run.run(run.model, batch, totals, losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(losses.extra(totals)["reward"]))
    assert np.mean(means[-4:]) > np.mean(means[:4]) + 0.15, means
