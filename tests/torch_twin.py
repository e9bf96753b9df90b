"""The same model in torch: a float model whose matrices are those that a bundle's bytes decode to."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_agent.bundle import Bundle
from edge_agent.trainer import BatchArrays
from fedge.io.peft_folder import write_peft
from fedge.lora import AdapterLayout, LoraConfig
from quantize.blocks import linears_of, matrix_of
from quantize.formats import FORMATS, decode
from quantize.source import load

IGNORE = -100


def torch_twin(bundle: Bundle, source: Path) -> Any:
    """The model at `source` (a folder or a GGUF) with the bundle's decoded weights in it."""
    loaded = load(str(source))
    model, anatomy = loaded.model, loaded.anatomy
    matrices = {
        "EMB": anatomy.embedding.weight,
        "HEAD": None if anatomy.head is None else anatomy.head.weight,
    }
    for index, layer in enumerate(anatomy.layers):
        matrices |= {f"L{index}/{path}.w": matrix_of(module) for path, module in linears_of(layer).items()}
    manifest = bundle.manifest
    for name in {name.rpartition(".")[0] for name in manifest.tensors if name.endswith(".q")}:
        fmt = FORMATS[manifest.embedding_format if name in ("EMB", "HEAD") else manifest.weights_format]
        parts = {part: bundle.tensor(f"{name}.{part}") for part in fmt.suffixes}
        matrices[name].data.copy_(torch.from_numpy(decode(parts, fmt)))
    model.config.use_cache = False
    return model.eval()


def mean_loss(model: Any, batch: BatchArrays) -> torch.Tensor:
    """Mean cross-entropy over the labels, which are already shifted."""
    logits = model(
        input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
    ).logits.float()
    labels = torch.from_numpy(batch.labels).flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE)


def b_gradients(model: Any, batch: BatchArrays) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and the gradient of every lora_B of a PEFT model, under our names."""
    model.zero_grad()
    loss = mean_loss(model, batch)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            layer, _, path = name.partition(".layers.")[2].partition(".")
            found[f"L{layer}/{path.partition('.lora_B')[0]}.B"] = parameter.grad.numpy()
    return loss.item(), found


def write_vector(
    folder: Path, layout: AdapterLayout, config: LoraConfig, a_seed: bytes, vector: np.ndarray, base: str
) -> None:
    """A PEFT folder of an adapter under the rule `ffa`."""
    write_peft(folder, {**layout.frozen(a_seed), **layout.split(vector)}, config, base, layout=layout)
