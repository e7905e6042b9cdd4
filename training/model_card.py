"""The model card: README.md in final/ and best/, which the Hub shows as the repository's page.

It says what the weights are and what they were made from (base, data, command, by their hashes), the
losses, and how to load them. Of what was not measured it says that. Nothing of this machine goes
into it: files are called by their names, not by their paths, and text from outside (names of files,
what a GGUF file says of itself) is escaped, so that it is shown and not interpreted.
"""

import contextlib
import functools
import json
import platform
import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import distributed
from adapter_files import OWN_BASE
from adapting.stacked_experts import why_peft_can_t
from adapting.tables import has_tables
from checkpoint import read_config
from common.errors import printable, read_json_if_there
from common.origin import SOURCE_FILE
from common.remote_names import is_remote, shown
from data import TrainingData
from dataset.encoding import AS_CLASSES, AS_PROMPTS
from dataset.token_cache import Rows
from evals.table import EVALUATIONS
from families import Config
from flags import OPTIONS, dashed, existing_file
from interop.resolve import stated_license
from lora import parse_pattern
from methods import ADAPTERHUB, lora_words, method_name, method_of, starts_with_loftq
from model import Transformer
from objectives import OBJECTIVES
from tokenizer import Tokenizer
from training.defaults import Settings
from training.metrics import MetricsLogger
from training.plots import read_metrics
from training.state import TrainState

FILE_NAME = "README.md"
# Options that say where a run was and who watched it, not what it trained.
UNTOLD = (
    "out", "overwrite", "resume", "wandb", "tensorboard", "push", "timeout", "plan", "gpus", "profile",
)  # fmt: skip
# Settings that shape what is trained, in the order of the card.
TOLD = (
    ("epochs", "epochs"),
    ("objective", "objective"),
    ("lr", "peak learning rate"),
    ("schedule", "schedule"),
    ("warmup", "warm-up steps"),
    ("optimizer", "optimizer"),
    ("weight_decay", "weight decay"),
    ("clip", "gradient clipping, largest norm"),
    ("seq_len", "longest example, tokens"),
    ("train_on", "trained on"),
    ("seed", "seed"),
    ("dtype", "computed in"),
    ("save_dtype", "stored in"),
)
# Ranks that vLLM takes; beyond its default, 16, it must be told.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
UNMEASURED = (
    "Nothing else was measured by the training: not how often answers are right, nor what the model"
    " has forgotten, nor whether it answers harmful requests, nor how it does on anything unlike the"
    " examples. What limits the base limits this as well."
)
# What Markdown or HTML would take for more than text, within a line: marks, tags, addresses that
# become links, and names that are mentioned.
MARKDOWN = re.compile(r"([\\`*_\[\]|~$<>&@]|:(?=//)|(?<=www)\.)")


@dataclass
class ModelCard:
    """What the cards of a run say, as far as it is known before the run.

    origin: what the run is made from, as plaintune.json has it.
    folder: of the base.
    peft_problem: why peft can't load the adapter as it is; "" where it can.
    labels: of the score head; None where the model has an output head.
    model_vocabulary: the rows of the embedding table, where these are more than the base's; else None.
    metrics, state: are read when a card is written.
    first_answers: to the prompts of the run's page, of the model before step 1; nothing where its base can be
        asked at the end as well.
    """

    settings: Settings
    origin: dict
    folder: Path
    data: TrainingData
    tokenizer: Tokenizer
    metrics: MetricsLogger
    state: TrainState
    first_answers: list[str] = field(default_factory=list)
    model_vocabulary: int | None = None
    peft_problem: str = ""
    labels: tuple[str, ...] | None = None

    def see(self, model: Transformer, config: Config) -> None:
        """Notes what the cards say of a run's model. config: of the base."""
        if model.config.vocab_size > config.vocab_size:
            self.model_vocabulary = model.config.vocab_size
        self.peft_problem = why_peft_can_t(model)
        if model.score is not None:
            self.labels = tuple(model.score.labels)  # type: ignore[arg-type]

    def write(self, tmp: Path, name: str) -> None:
        """Writes README.md into the folder `tmp`, which will be called `name`: final or best."""
        lines = [
            *self.front_matter(),
            "",
            f"# {escape(self.base_name)}, fine-tuned ({method_name(self.settings)})",
            "",
            *self.summary(name),
            "",
            "## How to load it",
            "",
            *self.loading(),
            "",
            "## What it was made from",
            "",
            *self.base_lines(),
            "",
            *self.data_lines(),
            "",
            "## How it was trained",
            "",
            *fenced("", self.command()),
            "",
            *self.settings_lines(),
            "",
            "## What was measured, and what was not",
            "",
            *self.loss_lines(),
            "",
        ]
        (tmp / FILE_NAME).write_text("\n".join(lines), encoding="utf-8")

    @property
    def is_adapter(self) -> bool:
        return method_of(self.settings).freezes_base

    @property
    def is_lora(self) -> bool:
        return method_of(self.settings).file_type == "LORA"

    @property
    def brings_tables(self) -> bool:
        """True if the folder holds embeddings, which servers take merged alone."""
        settings = self.settings
        if settings.adapter:
            return has_tables(settings.adapter)
        return bool(settings.add_tokens or settings.train_tokens or settings.modules_to_save)

    @property
    def brings_base(self) -> bool:
        """True if the folder holds the base as well."""
        return starts_with_loftq(self.settings)

    @property
    def library(self) -> str:
        """The package that loads the weights."""
        if not self.is_adapter:
            return "transformers"
        return "adapters" if method_of(self.settings).file_type == ADAPTERHUB else "peft"

    @property
    def base_name(self) -> str:
        """What the base is called: its name on the Hub, or that of its file or folder."""
        if "base_revision" in self.origin:
            return self.origin["base"]
        return Path(self.origin["base"]).name

    def front_matter(self) -> list[str]:
        """Returns the lines of YAML that the Hub reads. A JSON string is one of YAML as well."""
        fields: dict[str, object] = {
            "library_name": self.library,
            "pipeline_tag": "text-generation" if self.labels is None else "text-classification",
        }
        # Only a name that others find. The base of another kind is described in the text.
        if "base_revision" in self.origin:
            fields["base_model"] = self.origin["base"]
            fields["base_model_relation"] = "adapter" if self.is_adapter else "finetune"
        license_name = stated_license(self.folder)
        if license_name:
            fields["license"] = license_name
        tags = ["plaintune"]
        if self.is_adapter:
            tags.append("lora" if self.is_lora else self.settings.method)
        fields["tags"] = tags
        return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"]

    def summary(self, name: str) -> list[str]:
        """Returns what the weights are."""
        settings = self.settings
        base = escape(self.base_name)
        if not self.is_adapter:
            which = "All weights" if not settings.train else "Some weights"
            text = f"{which} of {base} were trained, and are all here."
        elif settings.adapter:
            title = method_of(settings).title
            text = f"A {title} for {base}, which went on from an earlier one."
        else:
            shape = method_of(settings).describe(settings)
            if self.is_lora:
                shape = f"rank {settings.rank}, alpha {settings.alpha:g}{lora_words(settings)}"
            text = (
                f"A {method_of(settings).title} ({shape}) for {base}. The base itself is not in it."
            )
        if self.labels is not None:
            text += self.head_words()
        moment = f"after step {self.state.step:,} of {settings.steps:,}"
        if name == "best":
            text += f" These are the weights of the lowest validation loss, {moment}."
        else:
            text += f" These are the weights {moment}."
        return [f"{text} Made with plaintune, by the command below."]

    def head_words(self) -> str:
        """Returns what the score head says of a text."""
        assert self.labels is not None
        if self.settings.objective == "reward":
            return (
                " It is a reward model: its one score of a conversation, which the chat template has"
                " written, is higher for better answers. It writes no text."
            )
        names = ", ".join(escape(printable(label)) for label in self.labels)
        return (
            " It classifies texts, and writes none. A text alone it reads as it stands, several messages (also"
            " a system message and a text) as the chat template writes them."
            f" Its classes in their order: {names}."
        )

    # ---- how to load it ----

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the model."""
        kind = "CausalLM" if self.labels is None else "SequenceClassification"
        return f"AutoModelFor{kind}"

    def scoring(self) -> list[str]:
        """Returns the lines of Python that score texts."""
        if self.settings.objective != "reward" and self.tokenizer.system:
            system = json.dumps(self.tokenizer.system)
            return [
                f'messages = [{{"role": "system", "content": {system}}},',
                '            {"role": "user", "content": "a text"}]',
                "text = tokenizer.apply_chat_template(messages, tokenize=False)",
                'inputs = tokenizer([text], padding=True, add_special_tokens=False, return_tensors="pt")',
                "probabilities = model(**inputs).logits.softmax(-1)",
            ]
        if self.settings.objective != "reward":
            return [
                'inputs = tokenizer(["a text", "another"], padding=True, return_tensors="pt")',
                "probabilities = model(**inputs).logits.softmax(-1)",
            ]
        return [
            'messages = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            "text = tokenizer.apply_chat_template(messages, tokenize=False)",
            'inputs = tokenizer([text], padding=True, add_special_tokens=False, return_tensors="pt")',
            "rewards = model(**inputs).logits[:, 0]",
        ]

    def loading(self) -> list[str]:
        """Returns how transformers with peft, plaintune, vLLM and llama.cpp load the weights."""
        if not self.is_adapter:
            return self.loading_model()
        lines = [*self.get_base_lines(), *self.rope_lines()]
        quantized = "quant" in self.origin_numbers and not self.brings_base
        base = json.dumps(self.base_argument)
        revision = self.origin.get("base_revision")
        where = f", revision={json.dumps(revision)}" if revision else ""
        code = [
            "import adapters" if self.library == "adapters" else "from peft import PeftModel",
            f"from transformers import {self.auto_class}, AutoTokenizer",
        ]
        for name, value in self.rope_settings.items():
            where += f", {name}={value!r}"
        if self.labels is not None:
            where += f", num_labels={len(self.labels)}"
        if quantized:
            code[1] = f"{code[1]}, BitsAndBytesConfig"
            code += [
                "",
                'four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",',
                "                               bnb_4bit_use_double_quant=True)",
            ]
            where += ", quantization_config=four_bits"
        code += [
            "",
            f"base = {self.auto_class}.from_pretrained({base}{where})",
            *self.put_on_base(),
            'tokenizer = AutoTokenizer.from_pretrained("THIS")',
        ]
        if self.labels is not None:
            code.append("base.config.pad_token_id = tokenizer.pad_token_id")
            return self.loading_scorer(lines, code)
        shell_base = shlex.quote(self.base_argument)
        numbers = f" --quant {self.settings.quant}" if quantized else ""
        shell = [f"python generate.py --model {shell_base} --adapter THIS{numbers}"]
        what = "With plaintune, where THIS is a folder: talk to it"
        if method_of(self.settings).can_merge:
            shell.append(f"python convert.py merge THIS MERGED --model {shell_base}")
            what += ", merge it into its base"
        if self.is_lora:
            export = f"{shell_base} MODEL.gguf --adapter THIS"
            if self.brings_base or self.brings_tables:
                export = "MERGED MODEL.gguf"
            shell.append(f"python convert.py to-gguf {export} --type q8_0")
            what += ", or write"
        lines += ["THIS is this folder, or the name of this repository on the Hub.", ""]
        lines += [*fenced("python", *code), ""]
        if self.peft_problem:
            lines += [
                f"But peft can't load it as it is: {self.peft_problem}. Merge it, as below.",
                "",
            ]
        lines += [what, "one file for llama.cpp:"] if self.is_lora else [f"{what}:"]
        lines += ["", *fenced("", *shell), ""]
        if quantized:
            lines.append(
                "The adapter was trained on the numbers that 4 bits (NF4) stand for, and makes up for"
                " their errors: on the 16-bit weights it is not what was trained. Servers take it"
                " best merged, as above."
            )
            return lines
        # vLLM takes neither other adapters nor DoRA.
        if not self.is_lora or self.settings.dora:
            return lines[:-1]
        if self.brings_tables:
            lines.append(
                "It holds trained embeddings beside LoRA's matrices, which vLLM does not take in an"
                " adapter: serve MERGED."
            )
            return lines
        rank = "" if self.settings.adapter else vllm_rank(largest_rank(self.settings))
        lines += ["With vLLM:", ""]
        overrides = ""
        if self.rope_settings:
            overrides = f" --hf-overrides {shlex.quote(json.dumps(self.rope_settings))}"
        lines += fenced(
            "", f"vllm serve {shell_base}{overrides} --enable-lora{rank} --lora-modules tuned=THIS"
        )
        return lines

    def rope_lines(self) -> list[str]:
        """Returns that the base is stretched for longer texts, if it is."""
        if not self.rope_settings:
            return []
        stretch = self.origin["rope_scaling"]
        text = (
            f"The base's positions are stretched for longer texts ({stretch}). plaintune does so by"
            " itself; elsewhere its configuration must say so, as below, or the adapter is not what was"
            " trained."
        )
        return [text, ""]

    @functools.cached_property
    def rope_settings(self) -> dict:
        """What of its config.json says that the base is stretched for longer texts; {} where it isn't, or
        where the folder holds its base as well."""
        if "rope_scaling" not in self.origin or self.brings_base:
            return {}
        raw = read_config(self.folder).raw
        names = ("rope_parameters", "rope_scaling", "max_position_embeddings")
        return {name: raw[name] for name in names if name in raw}

    def loading_scorer(self, lines: list[str], code: list[str]) -> list[str]:
        """Returns how a model with a score head is loaded. lines: what stands before. code: of Python."""
        shell = []
        words = "THIS"
        if self.is_adapter:
            base = shlex.quote(self.base_argument)
            shell.append(f"python convert.py merge THIS MERGED --model {base}")
            words = f"{base} --adapter THIS"
        if self.settings.objective == "classify":
            shell.append(f"python evaluate.py classify --model {words} --data FILE")
        lines = [*lines, "THIS is this folder, or the name of this repository on the Hub.", ""]
        lines += fenced("python", *code, "", *self.scoring())
        if shell:
            lines += ["", "With plaintune, where THIS is a folder:", "", *fenced("", *shell)]
        return lines

    def put_on_base(self) -> list[str]:
        """Returns the lines of Python that put the adapter on its base."""
        if self.library == "peft":
            put_on = 'model = PeftModel.from_pretrained(base, "THIS")'
            rows = self.model_vocabulary
            if rows is None:
                return [put_on]
            return [
                f"base.resize_token_embeddings({rows})    # the adapter has the new rows",
                put_on,
            ]
        return [
            "model = base",
            "adapters.init(model)",
            'name = model.load_adapter("THIS", use_safetensors=True)',
            "model.set_active_adapters(name)",
        ]

    def loading_model(self) -> list[str]:
        """Returns how a whole model is loaded."""
        code = [
            f"from transformers import {self.auto_class}, AutoTokenizer",
            "",
            f'model = {self.auto_class}.from_pretrained("THIS")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS")',
        ]
        if self.labels is not None:
            return self.loading_scorer([], code)
        shell = [
            "vllm serve THIS",
            "python generate.py --model THIS                            # plaintune",
            "python convert.py to-gguf THIS MODEL.gguf --type q8_0      # for llama.cpp",
        ]
        lines = ["THIS is this folder, or the name of this repository on the Hub.", ""]
        return [*lines, *fenced("python", *code), "", *fenced("", *shell)]

    @property
    def base_argument(self) -> str:
        """What is given as the base where the adapter is loaded: its name on the Hub, or a word that
        stands for a folder."""
        if self.brings_base:
            return f"THIS/{OWN_BASE}"
        return self.origin["base"] if "base_revision" in self.origin else "BASE"

    def get_base_lines(self) -> list[str]:
        """Returns how the base is had, where that is not by its name on the Hub."""
        if self.brings_base:
            text = (
                f"The adapter belongs to the base in 4 bits that lies in its folder, {OWN_BASE}, which"
                " was computed together with it (LoftQ): on the original weights it is not what was"
                " trained."
            )
            return [text, ""]
        if "base_revision" in self.origin:
            return []
        gguf = self.origin.get("base_gguf")
        if gguf is None:
            base = escape(self.base_name)
            return [
                f"BASE is the folder of the model that it was trained on, {base}, or any other"
            ] + ["with the same weights; their hash is below.", ""]
        lines = [
            f"BASE is a folder that is made of the GGUF file {escape(gguf['file'])}, with plaintune:",
            "",
        ]
        make = gguf["make"].removesuffix(" FOLDER") + " BASE"
        if "get" in gguf:
            return [
                *lines,
                *fenced("", f"{gguf['get']}    # the file is in this package", make),
                "",
            ]
        return [*lines, *fenced("", make), ""]

    # ---- what it was made from ----

    @property
    def origin_numbers(self) -> dict:
        """{"quant": kind} where the base was in 4 bits, else {}."""
        return {"quant": self.settings.quant} if self.settings.quant else {}

    def base_lines(self) -> list[str]:
        """Returns the base, by name and hash."""
        rows = [("base", escape(self.base_name))]
        if "base_revision" in self.origin:
            rows.append(("commit", self.origin["base_revision"]))
        whose = (
            "of the weights that its 4 bits were made of" if self.brings_base else "of its weights"
        )
        rows.append((f"SHA-256 {whose}", self.origin["base_sha256"]))
        if "other_sha256" in self.origin:
            role = (
                "the teacher's weights" if self.settings.teacher else "the reward model's weights"
            )
            rows.append((f"SHA-256 of {role}", self.origin["other_sha256"]))
        gguf = self.origin.get("base_gguf")
        if gguf is not None:
            rows.append(("made of the GGUF file", escape(gguf["file"])))
            rows.append(("SHA-256 of that file", gguf["sha256"]))
            rows.append(("its tensors", escape(tensor_types(self.folder))))
        if self.settings.quant:
            rows.append(("its linears in training", f"4 bits ({self.settings.quant})"))
        return two_columns(rows)

    def data_lines(self) -> list[str]:
        """Returns the files of the examples, and how many examples there were of them."""
        train, val = self.data.train, self.data.val
        lines = ["| file | for | records | SHA-256 |", "| --- | --- | --- | --- |"]
        sources = sources_of(train)
        num_trained = len(sources) - getattr(train.examples, "replays", 0)
        uses = ["training"] * num_trained + ["replay"] * (len(sources) - num_trained)
        # What of a training file was held out to validate is no file of its own.
        told = set(map(id, sources))
        for rows in sources_of(val):
            if id(rows) not in told:
                sources.append(rows)
                uses.append("validation")
        for rows, use in zip(sources, uses, strict=True):
            lines += file_lines(rows, use)
        examples = f"{len(train):,} examples to train on, with {train.tokens:,} tokens"
        trained = f"of which {train.trained_tokens:,} were trained"
        if train.kind == AS_PROMPTS:
            examples = f"{len(train):,} prompts, which the model answered while it was trained"
            trained = f"({train.tokens:,} tokens)"
        elif train.kind == AS_CLASSES:
            trained = f"in {len(train.label_names):,} classes"
        held_out = ""
        if len(val) and "validation" not in uses:
            held_out = ", held out of the same files"
        read = ""
        limit = self.settings.val_limit
        if 0 < limit < len(val):
            read = f"; each validation read {limit:,} of them"
        lines += ["", f"{examples} {trained}. To validate: {len(val):,}{held_out}{read}."]
        if train.chat and train.kind != AS_CLASSES:
            template = escape(self.tokenizer.template_name)
            date = f"; {escape(self.tokenizer.date_note)}" if self.tokenizer.writes_date else ""
            lines.append(f"Prompts go through the chat template in this folder ({template}{date}).")
        return lines

    # ---- how it was trained ----

    def command(self) -> str:
        """Returns the command as it was typed, with the names of files in place of their paths, and
        without what only concerned this machine; of a resumed run with all that was ever typed."""
        words = ["python train.py"]
        given = read_json_if_there(self.metrics.out / "config.json").get("given", [])
        for name, option in OPTIONS.items():
            if name not in given or name in UNTOLD:
                continue
            value = getattr(self.settings, name)
            if isinstance(value, bool):
                words.append(dashed(name) if value else dashed("no_" + name))
                continue
            values = value if isinstance(value, list | tuple) else [value]
            typed = []
            for each in values:
                text = str(each)
                if option.metadata.get("is_path"):
                    text = without_folders(text, name)
                typed.append(shlex.quote(printable(text)))
            words.append(f"{dashed(name)} {' '.join(typed)}")
        return " ".join(words)

    def settings_lines(self) -> list[str]:
        """Returns the settings that shaped the training, chosen or typed, and what it took."""
        settings = self.settings
        ranks = distributed.dp_size()
        step = f"{settings.steps:,} of {settings.batch_size} x {settings.accumulate}"
        unit = "rows" if settings.pack else "examples"
        rows = [("steps", f"{step} x {ranks} {unit}")]
        of_objective = [
            (name, name.replace("_", " ")) for name in OBJECTIVES[settings.objective].options
        ]
        for name, label in [*TOLD, *of_objective]:
            value = getattr(settings, name)
            if (name, label) in of_objective and not value:
                continue
            if OPTIONS[name].metadata.get("is_path") and value is not None:
                value = without_folders(str(value), name)
            if name == "epochs":
                value = f"{settings.steps / settings.steps_per_epoch:.2f}"
            if name == "clip" and not value:
                value = "none"
            if value is not None:
                rows.append(
                    (label, escape(f"{value:g}" if isinstance(value, float) else str(value)))
                )
        seconds = time.perf_counter() - self.metrics.start
        rows.append(("took", f"{self.state.tokens:,} tokens in {seconds:,.0f} s"))
        rows.append(("on", escape(self.machine())))
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        rows.append(("with", escape(versions)))
        return two_columns(rows)

    def machine(self) -> str:
        """Returns the kind and number of processors."""
        device = self.metrics.device
        count = distributed.world_size()
        what = f"CPU, threads used: {torch.get_num_threads()}"
        if device.type == "cuda":
            what = torch.cuda.get_device_name(device)
        elif device.type != "cpu":
            what = device.type
        return what if count == 1 else f"{count} processes, each {what}"

    # ---- losses ----

    def loss_lines(self) -> list[str]:
        """Returns the losses, and what a reader must not take for measured."""
        rows = []
        metrics = []
        # A disk that is full may have cost some of it, which must not cost the weights.
        with contextlib.suppress(OSError, ValueError):
            metrics = read_metrics(self.metrics.out / "metrics.jsonl")
        validations = [line for line in metrics if "val_loss" in line]
        trained = [line for line in metrics if "loss" in line and line["loss"] is not None]
        if validations:
            first, last = validations[0], validations[-1]
            best = min(validations, key=lambda line: line["val_loss"])
            moments = {"before training": first, "lowest": best, "newest": last}
            key = f"val_{self.settings.eval_metric}"
            if any(key in line for line in validations):
                del moments["lowest"]
                best = max(validations, key=lambda line: (line.get(key, -1), -line["val_loss"]))
                moments["at the highest score"] = best
            if first["step"] > 0:
                del moments["before training"]
            for label, line in moments.items():
                value = f"{line['val_loss']:.4f} (step {line['step']:,})"
                rows.append((f"validation loss, {label}", value))
                rows += self.other_measures(line, label)
                if "replay_val_loss" in line:
                    rows.append(
                        (f"loss on the replayed data, {label}", f"{line['replay_val_loss']:.4f}")
                    )
        if trained:
            line = trained[-1]
            rows.append(("training loss, newest", f"{line['loss']:.4f} (step {line['step']:,})"))
        if self.state.skipped:
            rows.append(("steps skipped, for they held no numbers", f"{self.state.skipped:,}"))
        lines = two_columns(rows) if rows else []
        where = f"Losses are {OBJECTIVES[self.settings.objective].loss_unit}."
        if not validations:
            where += " Nothing was validated."
        unmeasured = UNMEASURED
        if self.settings.eval_metric is not None:
            # The score stands above.
            unmeasured = unmeasured.replace(
                " not how often answers are right, nor what", " not what"
            )
        return [*lines, "", f"{where} {unmeasured}"]

    def other_measures(self, line: dict, label: str) -> list[tuple[str, str]]:
        """Returns what a validation has measured beside the loss. line: of metrics.jsonl."""
        rows = []
        metric = self.settings.eval_metric
        score = line.get(f"val_{metric}")
        if metric is not None and score is not None:
            rows.append((f"{EVALUATIONS[metric].score}, {label}", f"{score:.2f}"))
        rise = line.get("general_loss_rise")
        if rise is not None:
            value = f"{line['general_loss']:.4f} ({rise:+.4f})"
            rows.append((f"loss on general data, {label}", value))
        return rows


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return MARKDOWN.sub(escape_character, printable(text))


def escape_character(match: re.Match) -> str:
    """Returns a character that stands for itself. A backslash stops no tag and no link."""
    character = match[1]
    return f"&#{ord(character)};" if character in "<>&@:." else f"\\{character}"


def fenced(language: str, *lines: str) -> list[str]:
    """Returns lines as a block of code, with a fence that is longer than any in them."""
    text = [printable(line) for line in lines]
    longest = max((len(run) for line in text for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, *text, fence]


def two_columns(rows: list[tuple[str, str]]) -> list[str]:
    """Returns a table of names and values, which are Markdown already."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def largest_rank(settings: Settings) -> int:
    """Returns the largest rank of a new LoRA's layers in its file."""
    ranks = [settings.rank, *parse_pattern(settings.rank_pattern, "--rank-pattern").values()]
    return int(max(ranks)) * (2 if settings.init == "pissa" else 1)


def vllm_rank(rank: int | None) -> str:
    """Returns what vLLM must be told of an adapter's rank, with a space before it; "" if nothing."""
    if rank is None or rank <= 16:
        return ""
    taken = next((each for each in VLLM_RANKS if each >= rank), rank)
    return f" --max-lora-rank {taken}"


def sources_of(dataset) -> list[Rows]:
    """Returns the token rows that a dataset's examples are made of; none of those made in memory."""
    return list(getattr(getattr(dataset, "examples", None), "rows", []))


def file_lines(rows: Rows, use: str) -> list[str]:
    """Returns a line of the table for each file of a source. The records are those of all its
    files."""
    lines = []
    for i, (name, sha256) in enumerate(rows.files):
        count = f"{rows.stats.records:,}" if i == 0 else "as above"
        lines.append(f"| {escape(name)} | {use} | {count} | {sha256} |")
    return lines


def tensor_types(folder: Path) -> str:
    """Returns the types of a converted GGUF file's tensors, as "210 Q4_1, 61 F32"."""
    source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    counts = source.get("tensor_types", {})
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def without_folders(word: str, name: str) -> str:
    """Returns FILE, FILE=W or FILE.py:NAME with the file's name alone; a name on the Hub as it is.

    name: of the option.
    """
    if is_remote(word):
        return shown(word)
    file = existing_file(word)
    if file:
        return Path(file).resolve().name + word[len(file) :]
    # A file that is gone by now. Only --model may be a name that no disk knows.
    return (
        word if name in ("model", "teacher") and not Path(word).is_absolute() else Path(word).name
    )
