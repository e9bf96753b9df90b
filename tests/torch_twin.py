"""The same model in torch: a float model whose matrices are those that a bundle's bytes decode to."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_agent.bundle import Bundle
from edge_agent.trainer import BatchArrays
from quantize.formats import FORMATS, decode
from quantize.source import load

IGNORE = -100


def torch_twin(bundle: Bundle, source: Path) -> Any:
    """The model at `source` (a folder or a GGUF) with the bundle's decoded weights in it."""
    model = load(str(source)).model
    manifest = bundle.manifest
    for name in {name.rpartition(".")[0] for name in manifest.tensors if name.endswith(".q")}:
        fmt = FORMATS[manifest.embedding_format if name == "EMB" else manifest.weights_format]
        parts = {part: bundle.tensor(f"{name}.{part}") for part in fmt.suffixes}
        parameter = model.get_parameter(_parameter(name))
        parameter.data.copy_(torch.from_numpy(decode(parts, fmt)))
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


def _parameter(name: str) -> str:
    if name == "EMB":
        return "model.embed_tokens.weight"
    layer, _, path = name.partition("/")
    return f"model.layers.{layer[1:]}.{path.removesuffix('.w')}.weight"
