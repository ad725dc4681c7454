"""The adapters (LoRA) of a student as a file that peft and diffusers read, beside the pipeline with merged weights.

Keys are X.lora_A.weight and X.lora_B.weight, X the name of a layer in the teacher's network: of a network of diffusers
as in a pipeline, ``unet.`` or ``transformer.`` and diffusers' own name. The file's metadata has rank and alpha under
``lora_adapter_metadata``, as diffusers writes it: the arguments of a ``peft.LoraConfig`` as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from distillbench.networks.adapters import Adapters, adapters_of
from distillbench.networks.architectures import DiT, OfDiffusers

FILE = "adapters.safetensors"
METADATA = "lora_adapter_metadata"  # diffusers' name


def write_adapters(
    folder: Path, method: nn.Module, network: nn.Module, adapters: Adapters, state: Mapping[str, Tensor]
) -> None:
    """Write the adapters of `network`, a module of `method`, from `state`, the state dict of the method in training."""
    (name,) = (name for name, module in method.named_modules() if module is network)
    inner = "inner." if isinstance(network, DiT | OfDiffusers) else ""
    prefix = f"{name}.{inner}"
    own = {key.removeprefix(prefix): tensor for key, tensor in adapters_of(state).items() if key.startswith(prefix)}
    layers = sorted({key.rpartition(".lora_")[0] for key in own})
    settings = {"peft_type": "LORA", "r": adapters.rank, "lora_alpha": adapters.alpha, "target_modules": layers}
    metadata = {"format": "pt", METADATA: json.dumps(settings)}
    save_file({key: tensor.cpu().contiguous().clone() for key, tensor in own.items()}, folder / FILE, metadata)
