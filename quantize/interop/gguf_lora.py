"""GGUF LoRA adapters, as llama.cpp and what is built on it load them (`--lora FILE`).

The file (llama.cpp `convert_lora_to_gguf.py`, `llama-adapter.cpp`): `general.type` = "adapter", `adapter.type` =
"lora", `adapter.lora.alpha`, and for each matrix `blk.N.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r). The
runtime computes the scale as alpha / r with r from the tensor, so one alpha serves all matrices: it is chosen to give
the config's own scale, and where a matrix has another scale the difference goes into its B.

llama.cpp stores some rows in another order than transformers (Llama's query and key rows with rotary pairs
interleaved, GPT-NeoX's query, key and value apart): the rows of B follow the rows of the matrix. The head counts are
kept in the file too, which the runtime ignores and `read_gguf_lora` needs to put the rows back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader, GGUFType, GGUFWriter, Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray

from fedge.errors import DataError, UnsupportedError
from fedge.io import durable
from fedge.io.adapter_file import Adapter
from quantize.interop.factors import Factors, Floats, Opened

Order = NDArray[np.int64]
RowOrder = Callable[
    [str, int, int, int], "Order | None"
]  # module, rows, heads, kv_heads -> rows as llama.cpp has them


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp: where transformers keeps its blocks, its matrices, and the order of their rows."""

    arch: MODEL_ARCH
    layer_path: str
    modules: tuple[str, ...]
    order: RowOrder

    @property
    def name(self) -> str:
        """`general.architecture`."""
        return str(MODEL_ARCH_NAMES[self.arch])

    def tensors(self, layers: int) -> dict[tuple[int, str], str]:
        """(layer, module) -> name of the matrix in a GGUF, without `.weight`."""
        names = get_tensor_name_map(self.arch, layers)
        found = {
            (layer, module): names.get_name(f"{self.layer_path}.{layer}.{module}")
            for layer in range(layers)
            for module in self.modules
        }
        return {place: str(name) for place, name in found.items() if name is not None}


def _as_they_are(module: str, rows: int, heads: int, kv_heads: int) -> Order | None:
    return None


def _rotary_pairs(module: str, rows: int, heads: int, kv_heads: int) -> Order | None:
    """Query and key rows: per head, first and second half interleaved (llama.cpp `LlamaModel.permute`)."""
    count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(module)
    if count is None:
        return None
    return np.arange(rows).reshape(count, 2, rows // count // 2).swapaxes(1, 2).reshape(-1)


def _apart(module: str, rows: int, heads: int, kv_heads: int) -> Order | None:
    """GPT-NeoX's fused rows: per head query, key, value -> all queries, all keys, all values."""
    if module != "attention.query_key_value":
        return None
    return np.arange(rows).reshape(heads, 3, rows // heads // 3).swapaxes(0, 1).reshape(-1)


_SPLIT: Final = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_GATED: Final = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED: Final = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_GPT2: Final = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_NEOX: Final = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

FAMILIES: Final = {
    "LlamaForCausalLM": Family(MODEL_ARCH.LLAMA, "model.layers", _SPLIT + _GATED, _rotary_pairs),
    "MistralForCausalLM": Family(MODEL_ARCH.LLAMA, "model.layers", _SPLIT + _GATED, _rotary_pairs),
    "Qwen2ForCausalLM": Family(MODEL_ARCH.QWEN2, "model.layers", _SPLIT + _GATED, _as_they_are),
    "Qwen3ForCausalLM": Family(MODEL_ARCH.QWEN3, "model.layers", _SPLIT + _GATED, _as_they_are),
    "Phi3ForCausalLM": Family(MODEL_ARCH.PHI3, "model.layers", _FUSED, _as_they_are),
    "GemmaForCausalLM": Family(MODEL_ARCH.GEMMA, "model.layers", _SPLIT + _GATED, _as_they_are),
    "Gemma2ForCausalLM": Family(MODEL_ARCH.GEMMA2, "model.layers", _SPLIT + _GATED, _as_they_are),
    "Gemma3ForCausalLM": Family(MODEL_ARCH.GEMMA3, "model.layers", _SPLIT + _GATED, _as_they_are),
    "GPT2LMHeadModel": Family(MODEL_ARCH.GPT2, "transformer.h", _GPT2, _as_they_are),
    "GPTNeoXForCausalLM": Family(MODEL_ARCH.GPTNEOX, "gpt_neox.layers", _NEOX, _apart),
}


def write_gguf_lora(path: Path, adapter: Adapter) -> None:
    """Write `adapter` as a GGUF LoRA, whole or not at all.

    Raises UnsupportedError for an architecture, module or dense part that llama.cpp's adapters do not have.
    """
    header, layout = adapter.header, adapter.header.layout
    family = FAMILIES.get(header.architecture)
    if family is None:
        raise UnsupportedError(
            "no GGUF LoRA for this architecture",
            field="architecture",
            value=header.architecture,
            hint=f"There is one for {', '.join(FAMILIES)}",
        )
    if layout.dense:
        raise UnsupportedError(
            "a GGUF LoRA has no place for what is trained in full",
            field="dense",
            value=[n for n, _ in layout.dense],
        )
    names, scale = family.tensors(header.layers), header.lora.scale
    # alpha / r is computed from each tensor's own rank; with one rank for all, alpha is just what gives our scale.
    alpha = float(np.float32(scale * header.lora.r))
    with durable.appearing(path) as part:
        writer = GGUFWriter(part, family.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(header.model)
        writer.add_head_count(header.heads)
        writer.add_head_count_kv(header.kv_heads)
        for slot in layout.slots:
            name = names.get((slot.layer, slot.path))
            if name is None:
                raise UnsupportedError("no GGUF name for this module", field="module", value=slot.path)
            a, b = adapter.tensors[f"{slot.name}.A"], adapter.tensors[f"{slot.name}.B"]
            order = family.order(slot.path, slot.out, header.heads, header.kv_heads)
            b = b if order is None else b[order]
            if (factor := slot.scale * slot.r / alpha) != 1.0:
                b = b * np.float32(factor)
            writer.add_tensor(f"{name}.weight.lora_a", np.ascontiguousarray(a, np.float32))
            writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(b, np.float32))
        _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_lora(path: Path) -> Opened:
    """A GGUF LoRA by our keys, its rows in transformers' order where the file says the head counts."""
    try:
        reader = GGUFReader(path)
        fields = {name: value.contents() for name, value in reader.fields.items()}
        tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise DataError("the GGUF cannot be read", field="path", value=f"{path.name}: {error}") from error
    for key, expected in ((Keys.General.TYPE, "adapter"), (Keys.Adapter.TYPE, "lora")):
        if fields.get(key) != expected:
            raise DataError(f"{path} is no LoRA", field=key, value=fields.get(key))
    alpha = float(fields.get(Keys.Adapter.LORA_ALPHA, 0.0))
    pairs: dict[str, dict[str, Floats]] = {}
    for name, values in tensors.items():
        matrix, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b") or values.dtype not in (np.float32, np.float16):
            raise UnsupportedError(f"{path}: a tensor that is not read", field=name, value=values.dtype.name)
        pairs.setdefault(matrix.removesuffix(".weight"), {})[half] = values.astype(np.float32)
    arch = str(fields.get(Keys.General.ARCHITECTURE, ""))
    known = _known(arch, 1 + max((_layer_of(name) for name in pairs), default=0))
    factors = {}
    notices: set[str] = set()
    for name, pair in sorted(pairs.items()):
        if set(pair) != {"lora_a", "lora_b"}:
            raise DataError(f"{path}: half of a pair is missing", field=name, value=sorted(pair))
        key, b = name, pair["lora_b"]
        if name in known:
            layer, module, family = known[name]
            key = f"L{layer}/{module}"
            b, notice = _put_back(family, module, b, fields, arch)
            notices |= {notice} - {""}
        # llama.cpp: alpha 0 means a scale of 1
        factors[key] = Factors(name, pair["lora_a"], b, alpha / b.shape[1] if alpha else 1.0)
    about = {"model": fields.get(Keys.General.NAME, ""), "architecture": arch, "alpha": alpha}
    return Opened("gguf", about, factors, {}, path.stat().st_size, tuple(sorted(notices)))


def _put_back(
    family: Family, module: str, b: Floats, fields: Mapping[str, Any], arch: str
) -> tuple[Floats, str]:
    heads = fields.get(Keys.Attention.HEAD_COUNT.format(arch=arch))
    kv_heads = fields.get(Keys.Attention.HEAD_COUNT_KV.format(arch=arch), heads)
    if heads is None:
        asked = family.order(module, len(b), 1, 1) is not None
        notice = "head counts are not in the file: rows of queries and keys are in llama.cpp's order"
        return b, notice if asked else ""
    order = family.order(module, len(b), int(heads), int(kv_heads))
    if order is None:
        return b, ""
    back = np.empty_like(b)
    back[order] = b
    return back, ""


def _known(arch: str, layers: int) -> dict[str, tuple[int, str, Family]]:
    """Name of a matrix -> layer, module, family. The families of one architecture agree on names and order."""
    for family in FAMILIES.values():
        if family.name == arch:
            return {name: (*place, family) for place, name in family.tensors(layers).items()}
    return {}


def _layer_of(name: str) -> int:
    block, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if block == "blk" and number.isdigit() else 0
