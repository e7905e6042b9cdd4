"""LoRA on routed experts whose weights are one three-dimensional parameter (transformers 5), in the
form that PEFT writes for them (`target_parameters`).

There the matrices of all experts of a layer stand in two parameters: gate_up_proj [E, 2 F, D], each
expert's gate above its up, and down_proj [E, D, F]. An adapter of one has for each expert an A [r, in]
and a B [out, r]; so gate and up of an expert share their A. In the file A is [E r, in], one expert
after the other, and B is [out, r E], whose columns go through the experts first.

Here each linear of an expert is a LoRALinear all the same, and those of gate and up have one parameter
for their A. The other form, a pair of matrices for every linear, is what `--targets` gives.

In shapes: E experts, D hidden size, F intermediate size of an expert, r rank.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapter_files import PREFIX
from checkpoint import all_finite, hf_name
from common.errors import UserError
from model import Experts, Transformer

# {a three-dimensional parameter: the linears of an expert that stand in it, by our names}
PARTS_OF_EXPERTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class ExpertPlace(NamedTuple):
    """Where PEFT has a linear of an expert.

    parameter: the published name of the three-dimensional parameter.
    owns_A: the first of the linears of its expert in it, whose A is the others' as well.
    """

    parameter: str
    owns_A: bool


def stacked_parameters(model: Transformer) -> dict[str, list[list[str]]]:
    """Returns {published name of a three-dimensional parameter: our names of the linears that stand in it,
    a list for each expert}, in the model's order. Only of experts with gate, up and down."""
    found: dict[str, list[list[str]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Experts) or module.experts[0].kind != "gated":
            continue
        for parameter, parts in PARTS_OF_EXPERTS.items():
            linears = [
                [f"{name}.experts.{expert}.{part}" for part in parts]
                for expert in range(module.rules.count)
            ]
            found[f"{stacked_module(model, name)}.{parameter}"] = linears
    return found


def stacked_module(model: Transformer, name: str) -> str:
    """Returns the published name of the experts of a layer in transformers 5. name: ours of the layer's
    MLP."""
    # Mixtral's files call the MLP block_sparse_moe, which transformers 5 does not any more.
    router = hf_name(model, f"{name}.router").replace("block_sparse_moe", "mlp")
    return f"{router.rpartition('.')[0]}.experts"


def match_parameters(model: Transformer, targets: str | Iterable[str] | None) -> list[str]:
    """Returns the parameters that --target-parameters names, in the model's order.

    targets: ends of published names, as a list or with commas; None: none.
    Raises UserError if one matches none.
    """
    if not targets:
        return []
    if isinstance(targets, str):
        targets = targets.split(",")
    known = stacked_parameters(model)
    matched: set[str] = set()
    for target in targets:
        target = str(target).strip()
        if not target:
            raise UserError("--target-parameters: a name in it is empty")
        names = [name for name in known if name == target or name.endswith(f".{target}")]
        if not names:
            if not known:
                problem = "the model has no routed experts"
            elif target.endswith("gate.weight"):
                problem = "is the router, which is not adapted here"
            else:
                example = " and ".join(
                    "mlp." + name.partition(".mlp.")[2] for name in list(known)[:2]
                )
                problem = f"matches none of the experts' parameters ({example})"
            raise UserError(f"--target-parameters {target[:100]}: {problem}")
        matched.update(names)
    return [name for name in known if name in matched]


def short_parameter_names(model: Transformer, names: list[str]) -> list[str]:
    """Returns what target_parameters must be for these parameters: ends of their names, if no others have
    these, else the whole names."""
    ends = {f"mlp.experts.{name.rpartition('.')[2]}" for name in names}
    meant = [name for name in stacked_parameters(model) if name.endswith(tuple(ends))]
    return sorted(ends) if meant == names else names


def share_A(model: Transformer) -> None:
    """Makes one parameter of the A of linears that stand in one three-dimensional parameter. (A model that
    gets its memory late has one for each again.)"""
    for linears in stacked_parameters(model).values():
        for of_expert in linears:
            layers: list[Any] = [model.get_submodule(each) for each in of_expert]
            if getattr(layers[0], "place", None) is not None:
                for layer in layers[1:]:
                    layer.lora_A = layers[0].lora_A


# ---- PEFT's files ----


def file_names(model: Transformer, adapted: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns {parameter: the names in PEFT's file of its A and its B}. adapted: all parameters that are
    adapted. Where both of a layer are, gate_up_proj stands inside down_proj."""
    adapted = set(adapted)
    names = {}
    for name in adapted:
        module, _, parameter = name.rpartition(".")
        is_inside = parameter == "gate_up_proj" and f"{module}.down_proj" in adapted
        place = f"{PREFIX}{module}{'.base_layer' if is_inside else ''}"
        names[name] = (f"{place}.lora_A.weight", f"{place}.lora_B.weight")
    return names


def pack_experts(
    model: Transformer, adapted: list[str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns an adapter's tensors with those of experts in PEFT's stacked form.

    adapted: the parameters that are adapted.
    tensors: of every linear, by its own name in the file.
    """
    packed = dict(tensors)
    known = stacked_parameters(model)
    for name, (name_of_A, name_of_B) in file_names(model, adapted).items():
        all_A, all_B = [], []
        for of_expert in known[name]:
            places = [f"{PREFIX}{hf_name(model, linear)}" for linear in of_expert]
            # One A, under the name of each.
            own_A = [packed.pop(f"{place}.lora_A.weight") for place in places]
            all_A.append(own_A[0])
            all_B.append(torch.cat([packed.pop(f"{place}.lora_B.weight") for place in places]))
        packed[name_of_A] = torch.cat(all_A)
        B = torch.stack(all_B)  # [E, out, r]
        packed[name_of_B] = B.permute(1, 2, 0).flatten(1).contiguous()
    return packed


def unpack_experts(model: Transformer, adapted: list[str], tensors: dict[str, Tensor]) -> None:
    """Replaces the stacked tensors of experts by those of every linear: the reverse of `pack_experts`.

    model: has the adapter already.
    Raises UserError for one that has another shape than it must have, or holds NaN.
    """
    known = stacked_parameters(model)
    for name, (name_of_A, name_of_B) in file_names(model, adapted).items():
        if name_of_A not in tensors or name_of_B not in tensors:
            continue
        linears = known[name]
        layers: list[Any] = [model.get_submodule(each) for each in linears[0]]
        rank, inner = layers[0].lora_A.shape
        rows = [layer.base.out_features for layer in layers]
        count = len(linears)
        needed = {name_of_A: [count * rank, inner], name_of_B: [sum(rows), count * rank]}
        for file_name, shape in needed.items():
            tensor = tensors[file_name]
            if list(tensor.shape) != shape:
                raise UserError(
                    f"{file_name} has shape {list(tensor.shape)}, this model needs {shape}"
                )
            if tensor.is_floating_point() and not all_finite(tensor.float()):
                raise UserError(f"{file_name} holds NaN or infinite weights")
        A = tensors.pop(name_of_A)
        B = tensors.pop(name_of_B).view(sum(rows), rank, count)
        for expert, of_expert in enumerate(linears):
            parts = B[:, :, expert].split(rows)
            for linear, part in zip(of_expert, parts, strict=True):
                place = f"{PREFIX}{hf_name(model, linear)}"
                own = f"{place}.lora_A.weight"
                if own in tensors:
                    raise UserError(f"{own} is there beside {name_of_A}")
                tensors[own] = A[expert * rank : (expert + 1) * rank]
                tensors[f"{place}.lora_B.weight"] = part.contiguous()


# ---- what peft can load ----


def why_peft_can_t(model: Transformer) -> str:
    """Returns why peft, with transformers 5, would load an adapter on routed experts wrongly or not at all;
    "" where it loads it, or there are no such experts.

    It makes one parameter of gate and up of all experts, and of down; of the names that experts' linears
    have it knows no others, and takes the common rank and alpha.
    """
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layers[name] = module
    own = {name: layer for name, layer in layers.items() if not layer.place}
    of_experts = {name: layer for name, layer in own.items() if ".experts." in name}
    has_experts = bool(of_experts) or len(own) < len(layers)
    parts = {part for of_parameter in PARTS_OF_EXPERTS.values() for part in of_parameter}
    dense = [name for name in own if ".experts." not in name and name.rpartition(".")[2] in parts]
    if has_experts and dense:
        return f"it takes {hf_name(model, dense[0])}, which is none of the experts, for one"
    if not of_experts:
        return ""
    common, _ = Counter((layer.rank, layer.alpha) for layer in layers.values()).most_common(1)[0]
    if any((layer.rank, layer.alpha) != common for layer in of_experts.values()):
        return "experts have another rank or alpha than most layers"
    if next(iter(own.values())).variant.rslora:
        return "it scales gate and up of experts otherwise with rsLoRA"
    for linears in stacked_parameters(model).values():
        adapted = [linear in of_experts for of_expert in linears for linear in of_expert]
        if any(adapted) and not all(adapted):
            return "not all of the experts are adapted, or gate without up"
    return ""
