"""What each weight format costs: stored bits, KL to the source and loss on real text, time to quantise, time of a step.

SmolLM2-135M's GGUF is on a 4-bit grid (Q4_1), which int4d and int8d hold exactly. For the refits it would be too
easy or too odd a source, so they get the same model with its channels shuffled: residual stream, MLP and heads in
another order, the same function to the last digits, and no block of 32 on a grid any more. Judged by the held-out
messages of BYU chit-chat: KL(source || format) over the whole vocabulary at every label, and the loss of the graphs
that a device runs. A step is one forward and backward pass over 4 x 64 tokens, one thread. HQQ and AWQ stand beside our
fit as others have them (`format_peers.py`).
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before a library loads
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from format_peers import awq, hqq  # noqa: E402
from report import Row, parser, print_report, progress  # noqa: E402

from edge_agent.dataset import TextExample, load_encoder, render  # noqa: E402
from fedge.io import assets  # noqa: E402
from fedge.lora import LoraConfig  # noqa: E402
from fedge.messages import Template  # noqa: E402
from firmware_sim.processes.people import read_people, split_people  # noqa: E402
from quantize.blocks import graph_config, linears_of, matrix_of  # noqa: E402
from quantize.choice import weight_bytes  # noqa: E402
from quantize.fit import Calibration, fit, own_text  # noqa: E402
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
    method: str  # "import", "nearest", "fit"; "hqq", "awq" (then nearest) or "awq then gptq"
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
    Case("int4d", "hqq", device=False),
    Case("int4d", "awq", device=False),
    Case("int4d", "awq then gptq", device=False),
    Case("int4d", "fit", loss_goal="<= 0.02"),
    Case("int4gz", "nearest", device=False),
    Case("int4gz", "fit"),
    Case("nf4", "nearest"),
)
QUICK = (
    Case("int8g", "nearest"),
    Case("int4d", "hqq", device=False),
    Case("int4d", "awq then gptq", device=False),
    Case("int4d", "fit", device=False),
)
HEAD_ROWS = 4096


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
            lost += float(((value.detach() - original[name]) ** 2).sum())
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
    """The source's matrices in a format, by the case's method; its model gets the same values. AWQ leaves no parts."""
    if case.method == "fit":
        return fit(source, fmt, lambda phase, fraction: progress(f"{case.name} {fraction:.0%}"))
    if case.method.startswith("awq"):
        awq(source, own_text(source, Calibration()), fmt, fitted=case.method != "awq")
        return {}
    found: dict[str, Parts] = {}
    for name, value in matrices(source).items():
        known = source.exact.get(name)
        kept = converted(*known, fmt) if known is not None else None
        found[name] = kept or (hqq(value, fmt) if case.method == "hqq" else encode(value.numpy(), fmt))
        with torch.no_grad():
            value.copy_(torch.from_numpy(decode(found[name], fmt)))
    return found


class Bench:
    """One source in two forms, on its own grid and shuffled off it, and the text that both are judged by."""

    def __init__(self, args: Namespace, folder: Path) -> None:
        self._folder, self._runs = folder, 1 if args.quick else args.runs
        name = str(_tiny_model(folder / "model")) if args.quick else MODEL
        self.cases = QUICK if args.quick else CASES
        progress("loading the source twice")
        self._imported = load(name)
        self._batches = (
            _made_up(self._imported)
            if args.quick
            else messages(self._imported.tokenizer, folder, PEOPLE, MESSAGES)
        )
        self._before = [log_probabilities(self._imported.model, batch)[0] for batch in self._batches]
        self.source_loss = judge(self._imported.model, self._batches, self._before)[1]
        self._shuffled = shuffled(load(name), args.seed)
        self._kept = {
            form: {name: value.detach().clone() for name, value in source.model.named_parameters()}
            for form, source in (("imported", self._imported), ("shuffled", self._shuffled))
        }

    def rows(self, case: Case) -> list[Row]:
        """All figures of one case."""
        form = "imported" if case.method == "import" else "shuffled"
        source = self._imported if case.method == "import" else self._shuffled
        with torch.no_grad():
            for name, value in source.model.named_parameters():
                value.copy_(self._kept[form][name])
        fmt = FORMATS[case.format]
        original = {name: self._kept[form][name] for name in matrices(source)}
        progress(f"{case.name}: quantising")
        began = process_time()
        parts = parts_of(source, case, fmt)
        seconds = process_time() - began
        divergence, loss = judge(source.model, self._batches, self._before)

        def row(figure: str, value: float, unit: str, goal: str | None = None) -> Row:
            return Row.of(figure, case.name, [value], unit, goal=goal)

        found = [
            row("bits_per_weight", fmt.bits_per_weight(source.anatomy.hidden), "bits"),
            row("weights_mb", weight_bytes(source, fmt) / MEGABYTE, "MB"),
            row("kl_nats", divergence, "nats", case.kl_goal),
            row("weight_error_ratio", weight_error(source, original), "of the norm"),
            row("quantise_cpu_s", seconds, "s"),
        ]
        if not case.device:
            return [*found, row("zeroshot_loss_nats", loss, "nats")]
        runner = self._runner(source, fmt, parts, self._folder / case.name.replace(", ", "-"))
        device_loss = self._device_loss(source, runner)
        change = Row.of(
            "zeroshot_change_nats",
            case.name,
            [abs(device_loss - self.source_loss)],
            "nats",
            goal=case.loss_goal,
            baseline="loss of the source",
            baseline_value=self.source_loss,
        )
        step = Row.of("step_cpu_s", case.name, self._steps(source, runner), "s")
        return [*found, row("zeroshot_loss_nats", device_loss, "nats"), change, step]

    def _runner(self, source: Source, fmt: WeightFormat, parts: dict[str, Parts], place: Path) -> Runner:
        """The graphs of a bundle and its tensors, unsigned."""
        progress(f"{place.name}: graphs")
        place.mkdir()
        anatomy, lora = source.anatomy, graph_config(source.model, LoraConfig())
        tensors = quantise(source, fmt, _silent, parts)
        for name, graph in training_graphs(anatomy, lora, fmt, _silent).items():
            (place / name).write_bytes(graph.SerializeToString())
        return Runner(
            place, tensors, len(anatomy.layers), HEAD_ROWS, kinds=anatomy.kinds, cap=anatomy.logit_cap
        )

    def _device_loss(self, source: Source, runner: Runner) -> float:
        adapter = self._adapter(source, scale=0.0)
        losses = [
            runner.losses(batch.ids, batch.mask, batch.labels, adapter).astype(np.float64)
            for batch in self._batches
        ]
        return float(np.concatenate(losses).mean())

    def _steps(self, source: Source, runner: Runner) -> list[float]:
        """CPU seconds of a forward and backward pass, after one that is not counted."""
        adapter = self._adapter(source, scale=0.01)
        ids = np.random.default_rng(0).integers(1, source.anatomy.vocabulary, (STEP_ROWS, STEP_TOKENS))
        batch, seconds = Batch.of(ids.tolist(), pad=0), []
        for _ in range(1 + self._runs):
            began = process_time()
            runner.gradients(batch.ids, batch.mask, batch.labels, adapter)
            seconds.append(process_time() - began)
        return seconds[1:]

    def _adapter(self, source: Source, scale: float) -> dict[str, np.ndarray]:
        lora = graph_config(source.model, LoraConfig())
        return random_adapter(source.model, lora, np.random.default_rng(0), scale=scale)


def _tiny_model(folder: Path) -> Path:
    """A random Llama for the smoke run."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{number}": number for number in range(320)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def _made_up(source: Source) -> list[Batch]:
    draw = np.random.default_rng(0)
    rows = draw.integers(1, source.anatomy.vocabulary, (8, 24)).tolist()
    return [labelled([(row[:8], row[8:]) for row in rows])]


def _silent(phase: str, fraction: float) -> None:
    pass


def main() -> None:
    """Measure and print."""
    flags = parser((__doc__ or "").split("\n", maxsplit=1)[0], runs=3, seed=1)
    flags.add_argument("--case", action="append", help="only cases that begin so, as in `int4d, fit`")
    args = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedge-formats-") as folder:
        bench = Bench(args, Path(folder))
        chosen = [case for case in bench.cases if not args.case or case.name.startswith(tuple(args.case))]
        rows = [Row.of("zeroshot_loss_nats", "source", [bench.source_loss], "nats")]
        for case in chosen:
            rows += bench.rows(case)
        print_report("formats", rows, args)


if __name__ == "__main__":
    main()
