"""What each weight format costs: stored bits, KL to the source and loss on real text, time to quantise, time of a step.

SmolLM2-135M's GGUF is on a 4-bit grid (Q4_1), which int4d and int8d hold exactly. For the refits it would be too
easy or too odd a source, so they get the same model with its channels shuffled: residual stream, MLP and heads in
another order, the same function to the last digits, and no block of 32 on a grid any more. Judged by the held-out
messages of BYU chit-chat: KL(source || format) over the whole vocabulary at every label, and the loss of the graphs
that a device runs. A step is one forward and backward pass over 4 x 64 tokens, one thread.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before a library loads
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from report import Row, parser, print_report, progress  # noqa: E402

from edge_agent.dataset import TextExample, load_encoder, render  # noqa: E402
from fedge.io import assets  # noqa: E402
from fedge.lora import LoraConfig  # noqa: E402
from fedge.messages import Template  # noqa: E402
from firmware_sim.processes.people import read_people, split_people  # noqa: E402
from quantize.blocks import linears_of, matrix_of  # noqa: E402
from quantize.fit import fit  # noqa: E402
from quantize.formats import FORMATS, Parts, WeightFormat, converted, decode, encode  # noqa: E402
from quantize.reference import Batch, random_adapter  # noqa: E402
from quantize.runner import IGNORE, Runner  # noqa: E402
from quantize.source import Source, load  # noqa: E402
from quantize.training import training_graphs  # noqa: E402
from quantize.weights import quantise  # noqa: E402

MODEL = "smollm2-135m"
MEGABYTE = 1_000_000
PEOPLE, MESSAGES, BATCH = 12, 12, 16
STEP_ROWS, STEP_TOKENS = 4, 64


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table: a format, how weights come to it, and from which source."""

    format: str
    method: str  # "import", "nearest" or "fit"
    kl_goal: str | None = None
    loss_goal: str | None = None
    device: bool = True  # whether the graphs are built and run

    @property
    def name(self) -> str:
        return f"{self.format}, {self.method}"


CASES = (
    Case("int4d", "import", loss_goal="<= 0.001"),
    Case("int8g", "nearest", kl_goal="<= 0.005", loss_goal="<= 0.005"),
    Case("int8d", "nearest", device=False),
    Case("int8c", "nearest"),
    Case("int4d", "nearest", device=False),
    Case("int4d", "fit", loss_goal="<= 0.02"),
    Case("int4gz", "nearest", device=False),
    Case("int4gz", "fit"),
    Case("nf4", "nearest"),
)


def shuffled(source: Source, seed: int) -> Source:
    """The same function with its channels in another order: a Llama's residual stream, MLP and value channels."""
    model, draw = source.model, np.random.default_rng(seed)
    config = model.config
    hidden = torch.from_numpy(draw.permutation(config.hidden_size))
    width, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(table[:, hidden])
        model.model.norm.weight.copy_(model.model.norm.weight[hidden])
        for layer in model.model.layers:
            inner = torch.from_numpy(draw.permutation(config.intermediate_size))
            value = torch.from_numpy(
                np.concatenate(
                    [draw.permutation(width) + width * head for head in range(config.num_key_value_heads)]
                )
            )
            read = value.reshape(-1, 1, width).expand(-1, shared, -1) % width
            output = (read.reshape(-1, width) + width * torch.arange(len(read) * shared)[:, None]).reshape(-1)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(norm.weight[hidden])
            attention, mlp = layer.self_attn, layer.mlp
            for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                module.weight.copy_(module.weight[:, hidden])
            for module in (attention.o_proj, mlp.down_proj):
                module.weight.copy_(module.weight[hidden])
            attention.v_proj.weight.copy_(attention.v_proj.weight[value])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, output])
            for module in (mlp.gate_proj, mlp.up_proj):
                module.weight.copy_(module.weight[inner])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inner])
    source.exact.clear()
    return source


def messages(tokenizer: bytes, folder: Path, people: int, count: int) -> list[Batch]:
    """Held-out messages in batches; a label for every token of the person's own words, and the end."""
    (folder / "tokenizer.json").write_bytes(tokenizer)
    encode_text = load_encoder(folder / "tokenizer.json")
    splits, _ = split_people(read_people(assets.pull("data", "chitchat")), people, 0, encode=encode_text)
    rows = []
    for split in splits:
        for turn in split.heldout[:count]:
            prompt, completion = render(Template(), TextExample(turn.prompt, turn.completion))
            rows.append((encode_text(prompt), [*encode_text(completion), 0]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    return [labelled(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]


def labelled(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """A batch whose labels are the completions only."""
    batch = Batch.of([prompt + completion for prompt, completion in rows], pad=0)
    for row, (prompt, _) in enumerate(rows):
        batch.labels[row, : len(prompt) - 1] = IGNORE
    return batch


def log_probabilities(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p [labels, V] in half the precision that matters, labels)."""
    labels = torch.from_numpy(batch.labels)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
    return torch.log_softmax(logits[labels != IGNORE], -1), labels[labels != IGNORE]


def judge(model: Any, batches: Sequence[Batch], before: Sequence[torch.Tensor]) -> tuple[float, float]:
    """(KL(source || model), loss), nats a label."""
    divergence, loss, count = 0.0, 0.0, 0
    for batch, log_p in zip(batches, before, strict=True):
        log_q, labels = log_probabilities(model, batch)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        loss -= float(log_q.gather(-1, labels[:, None]).sum())
        count += len(labels)
    return divergence / count, loss / count


def weight_error(source: Source, original: dict[str, torch.Tensor]) -> float:
    """|w - ŵ| / |w| over all matrices of the blocks."""
    lost = whole = 0.0
    for name, value in source.model.named_parameters():
        if name in original:
            lost += float(((value - original[name]) ** 2).sum())
            whole += float((original[name] ** 2).sum())
    return float((lost / whole) ** 0.5)


def matrices(source: Source) -> dict[str, torch.Tensor]:
    """Every matrix of the blocks, by parameter name."""
    anatomy = source.anatomy
    return {
        f"{anatomy.layers_path}.{index}.{name}.weight": matrix_of(module).detach()
        for index, layer in enumerate(anatomy.layers)
        for name, module in linears_of(layer).items()
    }


def parts_of(source: Source, case: Case, fmt: WeightFormat) -> dict[str, Parts]:
    """The source's matrices in a format, by the case's method; its model gets the same values."""
    if case.method == "fit":
        return fit(source, fmt, lambda phase, fraction: progress(f"{case.name} {fraction:.0%}"))
    found: dict[str, Parts] = {}
    for name, value in matrices(source).items():
        known = source.exact.get(name)
        kept = converted(*known, fmt) if known is not None else None
        found[name] = kept or encode(value.numpy(), fmt)
        with torch.no_grad():
            value.copy_(torch.from_numpy(decode(found[name], fmt)))
    return found
