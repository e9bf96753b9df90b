"""GGUF: tensors taken over bit for bit where their grid is ours, and the metadata that says how to read them.

Q4_0, Q4_1 and Q8_0 become int4d or int8g without any change of value; every other type is dequantised to float32.
llama.cpp stores query and key rows with rotary pairs interleaved; transformers keeps the two halves apart, so the
rows are put back (also when they stay quantised: the permutation moves whole rows).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers import LlamaConfig

from fedge.errors import DataError, UnsupportedError
from quantize import tokenizer as tokenizers
from quantize.chat_template import tokens_in_gguf
from quantize.formats import BLOCK, FORMATS, Parts, assemble, decode
from quantize.source import Source, build_model, file_digest
from quantize.supported import check_config, unsupported_architecture

_BLOCK_NAMES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}

# Keys of the llama architecture that are read; any other key with a meaning of its own is refused by name.
_KEYS: Final = {
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size",
    "llama.attention.layer_norm_rms_epsilon", "llama.rope.dimension_count", "llama.attention.key_length",
    "llama.attention.value_length",
}  # fmt: skip

Blocks = npt.NDArray[np.uint8]


class _Fields(dict[str, Any]):
    """GGUF metadata; asking for a value that is not there is the file's fault."""

    def __missing__(self, key: str) -> NoReturn:
        raise DataError("the GGUF lacks a value", field="key", value=key)


def load_gguf(path: Path, *, licence: str = "") -> Source:
    """A Llama-architecture GGUF. Raises UnsupportedError or DataError before any weight is read."""
    try:
        reader = GGUFReader(path)
        fields = _Fields({name: value.contents() for name, value in reader.fields.items()})
    except (ValueError, IndexError, KeyError) as error:
        raise DataError("the GGUF cannot be read", field="model", value=f"{path.name}: {error}") from error
    config = _config(fields, {tensor.name for tensor in reader.tensors})
    vocabulary = tokenizers.from_gguf(fields)
    tokenizers.check_ids(vocabulary, config.vocab_size)
    model = build_model(config)
    exact = _fill(model, reader, config)
    return Source(
        model=model,
        architecture=config.architectures[0],
        tokenizer=vocabulary,
        name=str(fields.get("general.basename") or fields.get("general.name") or path.stem),
        licence=licence or str(fields.get("general.license", "unknown")),
        sha256=file_digest(path),
        eos_id=config.eos_token_id,
        pad_id=config.pad_token_id,
        exact=exact,
        chat_template=str(fields.get("tokenizer.chat_template", "")),
        template_tokens=tokens_in_gguf(fields),
    )


def _config(fields: dict[str, Any], tensors: set[str]) -> LlamaConfig:
    family = str(fields.get("general.architecture"))
    if family != "llama":
        raise unsupported_architecture(f"{family} (GGUF)")
    unknown = sorted(key for key in fields if key.startswith("llama.") and key not in _KEYS)
    if unknown:
        raise UnsupportedError("this GGUF value is not handled", field=unknown[0], value=fields[unknown[0]])
    if "output.weight" in tensors:
        raise UnsupportedError(
            "a head of its own is not handled yet",
            field="tensor",
            value="output.weight",
            hint="Only models that share the head with the embedding",
        )
    heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
    head_dim = int(fields.get("llama.attention.key_length", hidden // heads))
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if int(fields.get(key, head_dim)) != head_dim:
            raise UnsupportedError("this GGUF value is not handled", field=key, value=fields[key])
    eos = int(fields["tokenizer.ggml.eos_token_id"])
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_hidden_layers=int(fields["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        max_position_embeddings=int(fields["llama.context_length"]),
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        attention_bias="blk.0.attn_q.bias" in tensors,
        tie_word_embeddings=True,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        pad_token_id=int(fields.get("tokenizer.ggml.padding_token_id", eos)),
    )
    check_config({key: value for key, value in config.to_diff_dict().items() if value is not None})
    return config


def _fill(model: Any, reader: GGUFReader, config: LlamaConfig) -> dict[str, tuple[str, Parts]]:
    """Copy every tensor into the model; return those that came over exactly."""
    exact: dict[str, tuple[str, Parts]] = {}
    parameters = dict(model.named_parameters())
    filled = set()
    for tensor in reader.tensors:
        name = _parameter_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise UnsupportedError("this GGUF tensor is not handled", field=tensor.name, value=shape)
        order = _row_order(name, shape[0], config)
        read = _EXACT.get(tensor.tensor_type)
        if read is None:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)[order]
        else:
            format_name, parts = read(np.asarray(tensor.data).reshape(shape[0], -1)[order])
            exact[name] = (format_name, parts)
            values = decode(parts, FORMATS[format_name])
        with torch.no_grad():
            parameters[name].copy_(torch.from_numpy(np.array(values)))
        filled.add(name)
    missing = sorted(parameters.keys() - filled)
    if missing:
        raise DataError("the GGUF lacks tensors", field="tensors", value=missing[:4])
    return exact


def _parameter_name(tensor: str) -> str:
    if tensor in _TOP_NAMES:
        return _TOP_NAMES[tensor]
    prefix, _, rest = tensor.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, kind = rest.partition(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES.get(module, module)}.{kind}" if prefix == "blk" else tensor


def _row_order(name: str, rows: int, config: LlamaConfig) -> npt.NDArray[np.int64] | slice:
    """Rows in transformers' order: the two halves of each head apart, where llama.cpp interleaves rotary pairs."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return slice(None)
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _halves(blocks: Blocks, start: int, size: int) -> npt.NDArray[np.float32]:
    """A float16 field of every quantisation block, as float32 (rows, blocks)."""
    return np.ascontiguousarray(blocks[..., start : start + size]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: Blocks) -> Blocks:
    """Codes (rows, blocks, 32): low nibbles are elements 0 to 15 of a block, high nibbles 16 to 31."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(rows: Blocks) -> tuple[str, Parts]:
    blocks = rows.reshape(len(rows), -1, 2 + BLOCK // 2)
    return "int4d", assemble(_nibbles(blocks[..., 2:]), _halves(blocks, 0, 2), None, FORMATS["int4d"])


def _q4_1(rows: Blocks) -> tuple[str, Parts]:
    blocks = rows.reshape(len(rows), -1, 4 + BLOCK // 2)
    scale, low = _halves(blocks, 0, 2), _halves(blocks, 2, 2)
    codes, fmt = _nibbles(blocks[..., 4:]), FORMATS["int4d"]
    return "int4d", assemble(codes, scale, low + fmt.zero * scale, fmt)


def _q8_0(rows: Blocks) -> tuple[str, Parts]:
    blocks = rows.reshape(len(rows), -1, 2 + BLOCK)
    codes = blocks[..., 2:] ^ np.uint8(128)  # two's complement -> offset 128
    return "int8g", assemble(codes, _halves(blocks, 0, 2), None, FORMATS["int8g"])


_EXACT: Final[dict[Any, Callable[[Blocks], tuple[str, Parts]]]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}
