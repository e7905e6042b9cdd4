"""The words that people type: options of other programs, several mistakes at once, and --help without a wait."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import optimizers
from common import choices, known_names
from common.cli import parse_args
from common.device import DTYPES, STORAGE_DTYPES
from common.errors import UserError
from common.script_flags import conversion_arguments, generation_arguments
from evals.arguments import evaluation_arguments
from evals.table import EVALUATIONS, GENERATE
from flags import OPTIONS, dashed, make_parser, parse_flags
from interop import gguf_export
from kernels import flash_versions
from methods import METHODS
from objectives import OBJECTIVES
from tokenization.chat_template import NAMED

ROOT = Path(__file__).resolve().parents[1]


def refusal(line: str, parse=parse_flags) -> str:
    with pytest.raises(UserError) as caught:
        parse(shlex.split(line))
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--learning-rate 1e-4", "--lr 1e-4"),
        ("--learning_rate=1e-4", "--lr 1e-4"),
        ("--per-device-train-batch-size 4", "--batch-size 4"),
        ("--micro-batch-size 4", "--batch-size 4"),
        ("--gradient-accumulation-steps 8", "--accumulate 8"),
        ("--num-train-epochs 3", "--epochs 3"),
        ("--num-epochs 3", "--epochs 3"),
        ("--max-steps 100", "--steps 100"),
        ("--lr-scheduler-type constant_with_warmup", "--schedule constant"),
        ("--warmup-steps 10", "--warmup 10"),
        ("--max-grad-norm 0.3", "--clip 0.3"),
        ("--optim adamw_bnb_8bit", "--optimizer adamw8bit"),
        ("--optim paged_adamw_32bit", "--optimizer adamw"),
        ("--model-name-or-path org/model", "--model org/model"),
        ("--base-model org/model", "--model org/model"),
        ("--dataset-name org/data", "--data hf:org/data"),
        ("--train-file 'my data.json'", "--data 'my data.json'"),
        ("--validation-file b.json", "--val b.json"),
        ("--val-set-size 0.1", "--val-fraction 0.1"),
        ("--max-seq-length 512", "--seq-len 512"),
        ("--cutoff-len 512", "--seq-len 512"),
        ("--sequence-len 512", "--seq-len 512"),
        ("--packing", "--pack"),
        ("--sample-packing false", "--no-pack"),
        ("--train-on-inputs", "--train-on all-turns"),
        ("--train-on-inputs false", "--train-on answers"),
        ("--finetuning-type full", "--method full"),
        ("--load-in-4bit", "--method qlora"),
        ("--quantization-bit 4", "--method qlora"),
        ("--lora-r 16", "--rank 16"),
        ("--lora-alpha 32", "--alpha 32"),
        ("--lora-dropout 0.05", "--dropout 0.05"),
        ("--lora-target-modules q_proj v_proj --seed 1", "--targets q_proj,v_proj"),
        ("--lora-target-modules all-linear", "--targets all"),
        ("--lora-target all", "--targets all"),
        ("--output-dir x", "--out x"),
        ("--overwrite-output-dir", "--overwrite"),
        ("--eval-steps 50", "--eval-every 50"),
        ("--save-steps 50", "--save-every 50"),
        ("--save-strategy no", "--save-every 0"),
        ("--save-total-limit 3", "--keep 3"),
        ("--early-stopping-patience 3", "--patience 3"),
        ("--metric-for-best-model eval_rouge1", "--eval-metric rouge"),
        ("--resume-from-checkpoint True", "--resume"),
        ("--report-to wandb", "--wandb plaintune"),
        ("--wandb-project mine", "--wandb mine"),
        ("--bf16", "--dtype bf16"),
        ("--torch-dtype float32", "--dtype fp32"),
        ("--gradient-checkpointing", "--activation-checkpointing full"),
        ("--torch-compile", "--compile on"),
        ("--full-determinism", "--deterministic"),
        ("--ddp-timeout 1800", "--timeout 1800"),
        ("--data-seed 7", "--seed 7"),
    ],
)
def test_options_of_other_programs_are_answered_with_ours(typed, ours):
    flag = re.split("[ =]", typed)[0]
    message = refusal(typed)
    assert message.partition(" (")[0] == f"{flag}: no such flag; here it is {ours}"
    # What is offered is accepted.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")
        words = shlex.split(ours)
        if words[0] == "--resume":
            words += ["--out", "nowhere"]
        if words[0] == "--val-fraction":
            words += ["--data", "a.json"]
        parse_flags(words)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--deepspeed z3.json", "FSDP2 is used: `torchrun --nproc-per-node N train.py` starts a process"),
        ("--fsdp full_shard", "FSDP2 is used"),
        ("--fp16", "float16 overflows and is not offered; --dtype bf16 or fp32"),
        ("--load-in-8bit", "a frozen base is in 16 bits, or with --method qlora in 4"),
        ("--warmup-ratio 0.1", "here it is --warmup (--warmup counts steps; without it, they are 5 %"),
        ("--lr-scheduler-type polynomial", "here it is --schedule (--schedule is cosine, linear or constant"),
        ("--optim adafactor", "here it is --optimizer (--optimizer is adamw, adamw8bit or muon)"),
        ("--max-samples 100", "--limit N trains on N examples of all files together"),
        ("--logging-steps 10", "it is not needed: every step is a line of metrics.jsonl; --log-every N prints"),
        ("--flash-attn fa2", "it is not needed: the fastest attention of PyTorch"),
        ("--group-by-length", "it is not needed: nothing is padded"),
        ("--trust-remote-code", "code from a model's folder is never run"),
        ("--config sft.yaml", "settings are flags; `python convert.py recipe FILE` makes them of a configuration file"),
        ("--val-set-size 500", "here it is --val-fraction (it takes a share, not a number)"),
        ("--chat-template llama3", "here it is --template (the model's own chat template is used"),
        ("--learning-rate", "here it is --lr"),
        ("--dataset-name --seed 1", "here it is --data"),
        ("--lora-target-modules", "here it is --targets"),
        ("--train-on-inputs", "here it is --train-on all-turns"),
        ("--lrr 3", "did you mean --lr?"),
        ("--batch_size 3", "here it is --batch-size 3"),
        ("--no-such-thing-at-all 3", "see --help"),
    ],
)
def test_what_has_no_counterpart_says_so_in_words(typed, said):
    flag = typed.split()[0]
    assert refusal(typed).startswith(f"{flag}: no such flag; {said}")


def test_all_unknown_flags_are_named_at_once():
    line = "--learning-rate 1e-4 --steps 3 --output-dir=x --fooo 3 --packing"
    assert refusal(line) == (
        "4 flags are not known: --learning-rate: here it is --lr 1e-4 | --output-dir: here it is --out x"
        " | --fooo: see --help | --packing: here it is --pack"
    )


def test_settings_as_torchtune_has_them_are_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("batch_size=4") == "batch_size=4: no such flag; options are written --batch-size 4 here"
    assert refusal("--data a.json optimizer.lr=3e-4 model.lora_rank=8") == (
        "2 flags are not known: optimizer.lr: options are written --lr 3e-4 here | model.lora_rank: here it is --rank 8"
    )
    # A value of an option that takes one, and a file with a weight, are none.
    assert parse_flags(["--out", "lr=3"]).out == "lr=3"
    (tmp_path / "lr").write_text("a")
    assert parse_flags(["--data", "lr=3"]).data == ["lr=3"]
    # Nor is the name that generate.py is told to give to an adapter.
    (tmp_path / "final").mkdir()
    assert generation_arguments(["--adapter", "lora=final", "seed=final"]).adapter == ["lora=final", "seed=final"]


def test_a_configuration_file_is_answered_with_the_command_that_reads_it():
    assert refusal("'my sft.yaml' --lr 3") == (
        "my sft.yaml: settings are flags here; `python convert.py recipe 'my sft.yaml'` makes them of another program's"
        " file"
    )
    assert parse_flags(["--val", "a.json"]).val == "a.json"


def test_what_a_script_does_not_have_is_not_offered():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    message = refusal("--use-dora", lambda words: parse_args(parser, words, known_names.TRAIN_NAMES))
    assert message == "--use-dora: no such flag; there is no such option here"
    parser.add_argument("--dora")
    message = refusal("--use-dora", lambda words: parse_args(parser, words, known_names.TRAIN_NAMES))
    assert message == "--use-dora: no such flag; here it is --dora"


def test_a_long_value_is_cut_and_control_characters_are_escaped():
    message = refusal("--learning-rate " + "9" * 500)
    assert message == "--learning-rate: no such flag; here it is --lr " + "9" * 55 + "..."
    assert "\x1b" not in refusal("--learning-rate \x1b[2J")


@pytest.mark.parametrize(
    ("parse", "typed", "said"),
    [
        (generation_arguments, "--max-length 9", "here it is --max-new-tokens 9 (the prompt does not count)"),
        (generation_arguments, "--lora-path x", "here it is --adapter x"),
        (generation_arguments, "--do-sample", "here it is --temperature 1"),
        (generation_arguments, "--load-in-4bit", "here it is --quant nf4"),
        (generation_arguments, "--num-beams 4", "answers are drawn token by token, without beams"),
        (
            evaluation_arguments,
            "--tasks mmlu",
            "`choices --data FILE --task NAME` asks MMLU, HellaSwag, ARC and other multiple choice of a file",
        ),
        (
            evaluation_arguments,
            "--num_fewshot 5",
            "here it is --shots 5 (`choices` takes it; --shots-data FILE holds the examples, of MMLU its dev folder)",
        ),
        (evaluation_arguments, "--max-samples 9", "here it is --limit 9"),
        (evaluation_arguments, "--peft-model x", "did you mean"),
        (conversion_arguments, "merge a b c --quantt nf4", "did you mean --quant?"),
    ],
)
def test_the_other_scripts_know_such_names_too(parse, typed, said):
    flag = next(word for word in typed.split() if word.startswith("--"))
    if "peft" in flag:
        said = "here it is --adapter x"
    assert refusal(typed, parse) == f"{flag}: no such flag; {said}"


def test_convert_ends_with_one_line():
    assert refusal("merge a", conversion_arguments).startswith("the following arguments are required: ")
    assert refusal("fly", conversion_arguments).startswith("invalid choice: 'fly'")


def test_names_of_others_are_options_of_ours_or_say_why_not():
    parser = make_parser()
    coming = {"--dora", "--rslora", "--lora-plus", "--init", "--system", "--push"}
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for name, row in known_names.TRAIN_NAMES.items():
        assert re.fullmatch(r"[a-z0-9_]+", name), name
        assert not row.flag or row.flag in flags | coming, name
        assert row.flag or row.note, name
        # A row for an option of ours is only read in a configuration file, where it must mean the same.
        if name in OPTIONS:
            assert row.flag == dashed(name), name


def test_the_words_of_options_are_the_keys_of_their_tables():
    assert set(choices.METHOD_NAMES) == set(METHODS)
    assert set(choices.OBJECTIVE_NAMES) == set(OBJECTIVES)
    assert set(choices.OPTIMIZER_NAMES) == set(optimizers.DESCRIPTIONS)
    assert set(choices.SCHEDULE_NAMES) == set(optimizers.SCHEDULES)
    assert set(choices.DTYPE_NAMES) == set(DTYPES)
    assert set(choices.STORAGE_DTYPE_NAMES) == set(STORAGE_DTYPES)
    assert set(choices.FLASH_NAMES) == set(flash_versions.VERSIONS)
    assert set(choices.GGUF_TYPES) == set(gguf_export.TYPES)
    assert set(choices.TEMPLATE_NAMES) == set(NAMED)
    assert [*choices.EVAL_METRICS] == [name for name, row in EVALUATIONS.items() if row.kind == GENERATE]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "generate.py", "convert.py", "data.py", "sweep.py"])
def test_help_and_mistakes_are_answered_without_torch(script):
    # Imports of torch, and of anything else that computes or draws, fail.
    heavy = ("torch", "triton", "transformers", "huggingface_hub", "matplotlib", "pyarrow", "wandb", "gguf", "yaml")
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({heavy}))\nsys.argv = sys.argv[1:]\n"
    program += f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    for words, code in (["--help"], 0), (["--no-such-flag"], 2):
        done = subprocess.run(
            [sys.executable, "-c", program, script, *words],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr == "error: --no-such-flag: no such flag; see --help\n"
        else:
            assert "--" in done.stdout and script in done.stdout.split("\n")[0]
