"""`convert.py recipe`: configurations of torchtune, Axolotl, LLaMA-Factory and trl become command lines of train.py
that train the same, and whatever of them does not is named."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from common.errors import UserError
from flags import parse_flags
from interop.recipe import read_recipe, recipe_lines
from interop.recipe_programs import OTHER_PROGRAMS

ROOT = Path(__file__).resolve().parents[1]

TORCHTUNE = """
output_dir: /runs/mine  # all goes here
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /models/one/original/tokenizer.model
  max_seq_len: 4096
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/one
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3_2
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
seed: 7
shuffle: True
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
epochs: 2
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: 0.5
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.WandBLogger
  project: tuned
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
"""
AXOLOTL = """
base_model: org/one
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
adapter: qlora
datasets:
  - path: org/chats
    name: english
    split: train_sft
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - path: json
    data_files: mine.jsonl
    ds_type: json
    type: alpaca
val_set_size: 0.05
output_dir: ./out
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
weight_decay: 0.1
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: unsloth
flash_attention: true
wandb_project: tuned
evals_per_epoch: 4
fsdp_config:
  fsdp_state_dict_type: FULL_STATE_DICT
special_tokens:
  pad_token: <pad>
  eos_token: <end>
my_own_key: 5
"""
LLAMA_FACTORY = """
model_name_or_path: org/one
stage: sft
do_train: true
finetuning_type: lora
quantization_bit: 4
lora_rank: 16
lora_target: q_proj,v_proj
dataset: mine,theirs
dataset_dir: data
template: llama3
cutoff_len: 1024
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/mine
logging_steps: 10
save_steps: 500
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 1800
val_size: 0.1
eval_strategy: steps
eval_steps: 500
deepspeed: ds_z3.json
"""
TRL = """
model_name_or_path: org/one
model_revision: v2
torch_dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
dataset_name: org/chats
dataset_config: english
dataset_train_split: train_sft
max_steps: 200
num_train_epochs: 1
learning_rate: 2.0e-05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
per_device_train_batch_size: 2
gradient_accumulation_steps: 16
warmup_ratio: 0.03
max_length: 4096
packing: true
assistant_only_loss: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
report_to: [wandb]
push_to_hub: true
seed: 3
max_grad_norm: 0.2
save_strategy: 'no'
run_name: first
"""
FILES = {"torchtune": TORCHTUNE, "Axolotl": AXOLOTL, "LLaMA-Factory": LLAMA_FACTORY, "trl": TRL}


def recipe_of(text: str, folder: Path):
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return read_recipe(file)


def printed(text: str, folder: Path) -> str:
    file = folder / "recipe.yaml"
    return "\n".join(recipe_lines(recipe_of(text, folder), file))


def flags_of_script(script: str, folder: Path):
    """The Flags of the command that a script starts, as a shell reads it."""
    words = run_script(script, folder)
    assert words[:2] == ["python", "train.py"]
    return parse_flags(words[2:])


def run_script(script: str, folder: Path) -> list[str]:
    """The words that a shell hands to `python`, of which the script sees another one."""
    file = folder / "run.sh"
    file.write_text('python() { printf "%s\\0" python "$@"; }\n' + script + "\n")
    done = subprocess.run(["sh", file], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", FILES)
def test_every_value_of_a_file_is_carried_over_or_named(name, tmp_path):
    recipe = recipe_of(FILES[name], tmp_path)
    assert recipe.program.name == name
    places = [*recipe.carried, *recipe.anyway, *recipe.left_out, *recipe.off]
    assert sorted(places) == sorted(recipe.leaves)
    text = printed(FILES[name], tmp_path)
    for key in recipe.leaves:
        assert key in text, key
    for reason in (*recipe.left_out.values(), *recipe.anyway.values()):
        assert reason
    # What is named as left out is not in the command as well.
    assert not set(recipe.left_out) & set(recipe.carried)


def test_a_torchtune_file_trains_the_same_here(tmp_path):
    flags = flags_of_script(printed(TORCHTUNE, tmp_path), tmp_path)
    assert (flags.model, flags.out, flags.method) == ("/models/one", "/runs/mine", "lora")
    assert (flags.rank, flags.alpha, flags.dropout) == (64, 128, 0)
    assert flags.targets == "q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert list(flags.data) == ["hf:yahma/alpaca-cleaned"] and flags.train_on == "all-turns"
    assert (flags.batch_size, flags.accumulate, flags.epochs, flags.steps) == (4, 8, 2, None)
    assert (flags.lr, flags.schedule, flags.warmup, flags.clip, flags.seed) == (3e-4, "cosine", 100, 0.5, 7)
    assert (flags.pack, flags.seq_len, flags.wandb, flags.device) == (True, 4096, "tuned", "cuda")
    assert (flags.dtype, flags.compile, flags.activation_checkpointing) == ("bf16", "off", "full")
    # torch.optim.AdamW's own, and no validation: what torchtune does where the file says nothing.
    assert (flags.optimizer, flags.weight_decay, flags.val_fraction) == ("adamw", 0.01, 0)


def test_builders_of_torchtune_say_method_and_data(tmp_path):
    def converted(*replacements):
        text = TORCHTUNE
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        return recipe_of(text, tmp_path)

    qlora = converted(("lora_llama3_2_1b", "qlora_llama3_2_1b"), ("'output_proj']", "'k_proj', 'output_proj']"))
    assert (qlora.flags["--method"], qlora.flags["--targets"]) == (["qlora"], ["all"])
    full = converted(("lora_llama3_2_1b", "llama3_2_1b"))
    assert full.flags["--method"] == ["full"] and "--rank" not in full.flags
    assert full.left_out["model.lora_rank"] == "means nothing to --method full"
    assert any("--weights bf16 takes half the memory" in text for text in full.differs)
    own = converted(("alpaca_cleaned_dataset\n", "chat_dataset\n  source: json\n  data_files: a.json\n"))
    assert own.flags["--data"] == ["a.json"] and "--train-on" not in own.flags
    offloaded = converted(("offloading: False", "offloading: True"))
    assert offloaded.flags["--activation-checkpointing"] == ["offload"]
    constant = TORCHTUNE[: TORCHTUNE.index("lr_scheduler:")] + TORCHTUNE[TORCHTUNE.index("loss:") :]
    assert recipe_of(constant, tmp_path).filled["lr_scheduler_type"] == "--schedule constant"
    assert recipe_of(constant, tmp_path).filled["warmup_steps"] == "--warmup 0"
    preference = converted(("modules.loss.LinearCrossEntropyLoss", "rlhf.loss.DPOLoss"))
    assert preference.flags["--objective"] == ["dpo"] and not any("WARNING" in text for text in preference.differs)
    other = converted(("modules.loss.LinearCrossEntropyLoss", "rlhf.loss.RSOLoss"))
    assert "this loss is not there" in other.left_out["loss._component_"]
    assert any(text.startswith("WARNING: the file is for RSOLoss") for text in other.differs)


def test_values_that_name_others_are_put_together(tmp_path):
    text = TORCHTUNE.replace("/models/one\n", "${output_dir}/model-${seed}\n", 1)
    assert recipe_of(text, tmp_path).flags["--model"] == ["/runs/mine/model-7"]
    # What is not there, or is asked for without end, stays as it is.
    text = "base_model: ${no.such}/${no}\nlearning_rate: 1\nlong: " + "x" * 4000 + "\nmany: " + "${long}" * 9000
    recipe = recipe_of(text, tmp_path)
    assert recipe.flags["--model"] == ["${no.such}/${no}"] and len(recipe.leaves["many"]) < 200_000


def test_several_data_sets_of_torchtune(tmp_path):
    data = "dataset:\n  _component_: torchtune.datasets.alpaca_cleaned_dataset\n  packed: True\n"
    several = (
        "dataset:\n- _component_: torchtune.datasets.slimorca_dataset\n  packed: True\n"
        "- _component_: torchtune.datasets.instruct_dataset\n  source: org/two\n  split: test[:10%]+train\n"
    )
    recipe = recipe_of(TORCHTUNE.replace(data, several), tmp_path)
    assert recipe.flags["--data"] == ["hf:Open-Orca/SlimOrca-Dedup", "hf:org/two::test"]
    assert recipe.carried["dataset[0].packed"] == "--pack"
    assert recipe.left_out["dataset[1].split"] == "the whole split is read"


def test_an_axolotl_file_trains_the_same_here(tmp_path):
    flags = flags_of_script(printed(AXOLOTL, tmp_path), tmp_path)
    assert (flags.model, flags.out, flags.method, flags.quant) == ("org/one", "./out", "qlora", "nf4")
    assert list(flags.data) == ["hf:org/chats:english:train_sft", "mine.jsonl"]
    assert (flags.rank, flags.alpha, flags.dropout, flags.targets) == (32, 16, 0.05, "all")
    assert (flags.batch_size, flags.accumulate, flags.epochs) == (2, 4, 3)
    assert (flags.lr, flags.schedule, flags.warmup, flags.weight_decay) == (2e-4, "cosine", 10, 0.1)
    assert (flags.optimizer, flags.pack, flags.seq_len, flags.val_fraction) == ("adamw8bit", True, 2048, 0.05)
    assert (flags.dtype, flags.activation_checkpointing, flags.wandb) == ("auto", "offload", "tuned")
    assert (flags.train_on, flags.seed) == ("answers", 42)
    recipe = recipe_of(AXOLOTL, tmp_path)
    assert recipe.left_out == {
        "fsdp_config.fsdp_state_dict_type": "FSDP2 is used: `torchrun --nproc-per-node N train.py` starts a process for"
        " each GPU, see --shard",
        "evals_per_epoch": "--eval-every: it counts steps; without it, a fifth of the run",
        "special_tokens.eos_token": "the special tokens are those of the model's own tokenizer",
        "my_own_key": "is not known here",
    }
    assert recipe.off == ["load_in_8bit", "tf32"]


def test_axolotl_without_adapter_trains_all_weights(tmp_path):
    text = AXOLOTL.replace("adapter: qlora", "adapter:").replace("load_in_4bit: true", "load_in_4bit: false")
    recipe = recipe_of(text, tmp_path)
    assert recipe.flags["--method"] == ["full"] and "adapter" in recipe.off
    assert recipe.left_out["lora_r"] == "means nothing to --method full"
    recipe = recipe_of(AXOLOTL.replace("adapter: qlora", "adapter: lora"), tmp_path)
    assert recipe.flags["--method"] == ["qlora"]
    recipe = recipe_of(AXOLOTL + "lora_model_dir: earlier\n", tmp_path)
    assert recipe.flags["--adapter"] == ["earlier"] and "--rank" not in recipe.flags
    assert recipe.left_out["lora_r"] == "the adapter that training goes on from has its own"
    recipe = recipe_of(AXOLOTL + "test_datasets:\n- path: held_out.jsonl\n  type: alpaca\n", tmp_path)
    assert recipe.flags["--val"] == ["held_out.jsonl"]
    assert recipe.left_out["val_set_size"] == "there is a file of validation examples, or no file to part"
    # Its batch_size is that of a whole step.
    recipe = recipe_of(AXOLOTL + "batch_size: 64\n", tmp_path)
    assert recipe.left_out["batch_size"] == "a step is --batch-size x --accumulate x processes"


def test_a_llama_factory_file_trains_the_same_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    described = {"mine": {"file_name": "mine.json"}, "theirs": {"hf_hub_url": "org/theirs"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    flags = flags_of_script(printed(LLAMA_FACTORY, tmp_path), tmp_path)
    assert list(flags.data) == ["data/mine.json", "hf:org/theirs"]
    assert (flags.method, flags.rank, flags.alpha, flags.dropout) == ("qlora", 16, 32, 0)
    assert (flags.targets, flags.seq_len, flags.val_fraction, flags.pack) == ("q_proj,v_proj", 1024, 0.1, False)
    assert (flags.batch_size, flags.accumulate, flags.epochs, flags.lr) == (1, 8, 3, 1e-4)
    assert (flags.save_every, flags.eval_every, flags.timeout, flags.dtype) == (500, 500, 1800, "bf16")
    assert (flags.weight_decay, flags.seed, flags.warmup, flags.overwrite) == (0, 42, None, False)
    left_out = recipe_of(LLAMA_FACTORY, tmp_path).left_out
    assert set(left_out) == {"template", "max_samples", "overwrite_output_dir", "warmup_ratio", "deepspeed"}
    more = recipe_of(LLAMA_FACTORY + "use_galore: true\nuse_badam: false\n", tmp_path)
    assert more.left_out["use_galore"] == "--optimizer is adamw, adamw8bit or muon" and "use_badam" in more.off
    assert more.anyway["eval_strategy"] == "as --eval-every has it"
    # Without its description a name can't be followed, and the command does not train something else.
    (tmp_path / "data" / "dataset_info.json").unlink()
    text = printed(LLAMA_FACTORY, tmp_path)
    assert "# WARNING: mine is a name in data/dataset_info.json, which does not lead to it from here" in text
    assert "--data mine theirs" in text


def test_a_trl_file_trains_the_same_here(tmp_path):
    flags = flags_of_script(printed(TRL, tmp_path), tmp_path)
    assert (flags.model, flags.method, list(flags.data)) == ("org/one@v2", "lora", ["hf:org/chats:english:train_sft"])
    # Its Trainer's own: steps before epochs, a share that warms up rounded up.
    assert (flags.steps, flags.epochs, flags.warmup) == (200, None, 6)
    assert (flags.rank, flags.alpha, flags.dropout, flags.targets) == (16, 32, 0.05, "q_proj,v_proj")
    assert (flags.batch_size, flags.accumulate, flags.lr, flags.schedule) == (2, 16, 2e-5, "cosine")
    assert (flags.seq_len, flags.pack, flags.train_on, flags.clip, flags.seed) == (4096, True, "answers", 0.2, 3)
    assert (flags.save_every, flags.wandb, flags.val_fraction) == (0, "plaintune", 0)
    recipe = recipe_of(TRL, tmp_path)
    assert recipe.left_out["num_train_epochs"] == "the run ends after 200 steps"
    assert recipe.left_out["lr_scheduler_kwargs.min_lr_rate"].startswith("--schedule is cosine")
    assert {"push_to_hub", "run_name"} <= set(recipe.left_out)


def test_what_trl_leaves_open_is_filled_and_said(tmp_path):
    text = "model_name_or_path: org/one\ndataset_name: org/two\nlearning_rate: 1e-4\n"
    recipe = recipe_of(text, tmp_path)
    assert recipe.filled == {
        "num_train_epochs": "--epochs 3",
        "lr_scheduler_type": "--schedule linear",
        "warmup_steps": "--warmup 0",
        "weight_decay": "--weight-decay 0",
        "seed": "--seed 42",
        "packing": "--no-pack",
        "max_length": "--seq-len 1024",
        "val_set_size": "--val-fraction 0",
    }
    assert recipe.flags["--method"] == ["full"]
    assert any("trl trains whole conversations unless assistant_only_loss is set" in each for each in recipe.differs)
    assert recipe_of(text.replace("org/two", "imdb"), tmp_path).flags["--data"] == ["hf:imdb"]
    # A file for another trainer is not taken for supervised fine-tuning without a word.
    recipe = recipe_of(text + "beta: 0.1\n", tmp_path)
    assert any(each.startswith("WARNING: the file is for preference optimization") for each in recipe.differs)
    # What it says and could not be carried over is not filled with a default.
    assert "warmup_steps" not in recipe_of(text + "warmup_ratio: 0.1\n", tmp_path).filled
    assert "lr_scheduler_type" not in recipe_of(text + "lr_scheduler_type: polynomial\n", tmp_path).filled


def test_mixtures_of_the_alignment_handbook(tmp_path):
    text = """
model_name_or_path: org/one
learning_rate: 1e-4
dataset_mixture:
  datasets:
    - {id: org/a, config: SFT, split: one, weight: 1.0, columns: [messages]}
    - {id: org/b, split: train, weight: 0.5}
  test_split_size: 1000
"""
    recipe = recipe_of(text, tmp_path)
    assert recipe.flags["--data"] == ["hf:org/a:SFT:one", "hf:org/b"]
    assert recipe.left_out["dataset_mixture.datasets[1].weight"].startswith("all records are read")
    assert "dataset_mixture.datasets[0].weight" in recipe.anyway
    assert recipe.left_out["dataset_mixture.test_split_size"] == "--val-fraction takes a share of the prompts"
    text = "model_name_or_path: org/one\nlearning_rate: 1e-4\ndataset_mixer: {org/a: 1.0, org/b-v1.5: 0.5}\n"
    recipe = recipe_of(text, tmp_path)
    assert recipe.flags["--data"] == ["hf:org/a", "hf:org/b-v1.5"]
    assert "dataset_mixer.org/b-v1.5: a share of 0.5 there; here all records are read" in recipe.differs


def test_a_json_file_is_read_as_well(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(
        json.dumps({"model_name_or_path": "org/one", "learning_rate": 1e-4, "per_device_train_batch_size": 3})
    )
    recipe = read_recipe(file)
    assert recipe.flags["--batch-size"] == ["3"] and recipe.flags["--lr"] == ["0.0001"]
    assert any("names no data" in each for each in recipe.differs)


def test_a_value_that_train_py_refuses_is_named(tmp_path):
    text = "model_name_or_path: org/one\nlearning_rate: fast\nper_device_train_batch_size: 2.5\nseed: -1\n"
    recipe = recipe_of(text, tmp_path)
    assert recipe.left_out == {
        "learning_rate": "--lr: a number is wanted, not 'fast'",
        "per_device_train_batch_size": "--batch-size: a whole number is wanted, not '2.5'",
        "seed": "--seed -1: must be 0 or more",
    }
    text = "model_name_or_path: org/one\nlearning_rate: 1e-4\noptim: muon\npure_bf16: true\ndataset_name: org/a\n"
    warnings = [each for each in recipe_of(text, tmp_path).differs if each.startswith("WARNING")]
    assert len(warnings) == 1 and warnings[0].startswith("WARNING: train.py refuses this command: --weights bf16: Muon")
    # Two keys that say different things: the first one stands.
    text = "model_name_or_path: org/one\nlearning_rate: 1e-4\nmax_length: 512\nmax_seq_length: 1024\n"
    assert recipe_of(text, tmp_path).left_out["max_seq_length"] == "--seq-len is 512 by another key"


def test_what_is_printed_is_a_shell_script_whatever_the_file_holds(tmp_path):
    nasty = {
        "model_name_or_path": "a b; touch owned $(touch owned) `touch owned`",
        "learning_rate": 1e-4,
        "dataset_name": "--help",
        "output_dir": "x'y\ntouch owned",
        "unknown\ntouch owned": "\ntouch owned\n",
        "run_name": "\u2028touch owned \x1b[2J \r touch owned",
    }
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(nasty))
    script = "\n".join(recipe_lines(read_recipe(file), file))
    words = run_script(script, tmp_path)
    assert not (tmp_path / "owned").exists()
    assert "a b; touch owned $(touch owned) `touch owned`" in words and "x'y\ntouch owned" in words
    flags = parse_flags(words[2:])
    assert list(flags.data) == ["--help"]
    assert "\x1b" not in script and "\u2028" not in script


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not YAML at line 1 column 6"),
        ("a: 1\na: 2\n", "line 2: a is given twice; remove one"),
        ("model: {lr: 1}\nmodel.lr: 2\n", "model.lr is given twice; remove one"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n", "line 3: merges another part of the file (<<); write its keys out"),
        ("- a\n- b\n", "holds a YAML list; a configuration is key: value"),
        ("", "holds a YAML NoneType; a configuration is key: value"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML at line 1 column 4"),
        ("a: 2024-13-45", "not YAML (month must be in 1..12)"),
        ("a: \x01", "not YAML ("),
        ("a: &a [*a]", "is deeper or larger than a configuration"),
        ("a: " + "[" * 3000, "YAML nested too deep"),
        ("zero_stage: 3\noffload: true\n", "is no configuration of torchtune (_component_), Axolotl (base_model)"),
        ("base_model: a\nx: [" + "{a: 1}, " * 6000 + "]", "is deeper or larger than a configuration"),
        ("a: &a [{b: 1}, {b: 1}]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [" + f"*{chr(97 + i)}, " * 9 + "]\n" for i in range(9)
        ), "is deeper or larger than a configuration"),
        ("model: {_component_: a.b}\nprompt: hello\n", "is a configuration of torchtune, but of no training"),
        ("model_name_or_path: a\ntemplate: llama3\ninfer_backend: vllm\n", "of no training: do_train is not true"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_ends_in_one_line(text, said, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(200_000))
    with pytest.raises(UserError, match="model.safetensors: has 0.2 MB, at most 0.13 MB are read"):
        read_recipe(file)
    with pytest.raises(UserError, match="no such file"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_the_command_prints_it(tmp_path, capsys, monkeypatch):
    file = tmp_path / "recipe.yml"
    file.write_text(AXOLOTL)
    monkeypatch.setattr(sys, "argv", ["convert.py", "recipe", str(file)])
    convert.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"# {file}, a configuration of Axolotl with 43 values: 27 carried over, 4 not carried over, 10 so here"
        " anyway, 2 not set or off"
    )
    assert lines[1:4] == [
        "python train.py \\",
        "    --model org/one \\",
        "    --data hf:org/chats:english:train_sft mine.jsonl \\",
    ]
    assert "#   my_own_key: 5 -> is not known here" in lines
    assert all(line.startswith(("#", "    --", "python train.py")) for line in lines)


def test_each_program_has_rows_that_lead_somewhere():
    for program in OTHER_PROGRAMS:
        for key, row in program.rows.items():
            assert row.flag or row.note, (program.name, key)


def test_the_words_are_quoted_for_a_shell():
    from common.known_names import TRAIN_NAMES

    for name in ("model_name_or_path", "output_dir", "dataset_name", "lora_target_modules", "train_file"):
        words = shlex.split(TRAIN_NAMES[name].translate("a;b"))
        assert len(words) == 2 and words[1] == "a;b", name
