"""What a training step costs a device: memory of a fresh worker process, and CPU time of one thread.

SmolLM2-135M, LoRA r=8 on q and v, rule `ffa`, 4 rows of 63 tokens: the longest that a window of 64 takes. Memory is
the worker's own (`VmHWM`; `RssAnon` at its highest after a step); CPU time is that of a long job less that of a short
one, over the steps between. Beside it torch with peft in float32 on the same weights, when both can be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import process_time

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_variable] = "1"  # before a library loads; children inherit it

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from report import ROOT, Row, parser, print_report, progress  # noqa: E402

from edge_agent.bundle import open_bundle  # noqa: E402
from edge_agent.dataset import TextExample, load_encoder, render  # noqa: E402
from edge_agent.jobs import Failed, Progress, Train, Trained  # noqa: E402
from edge_agent.worker import memory_used  # noqa: E402
from fedge.messages import Template, Training  # noqa: E402

MODEL = "smollm2-135m"
ROWS, TOKENS, SHORT_STEPS = 4, 63, 2
PEAK_GOAL, ANONYMOUS_GOAL = "<= 235", "<= 95"  # the agent's own 30 MB come on top
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process: bytes, and CPU seconds a step."""

    peak: int
    anonymous: int
    step_seconds: float


def write_data(bundle: Path, path: Path) -> None:
    """Rows of exactly `TOKENS` tokens, end of text included."""
    encode = load_encoder(open_bundle(bundle).tokenizer)
    words: list[str] = []
    while True:
        example = TextExample("Hi! How are you?", " ".join([*words, "well"]))
        prompt, completion = render(Template(), example)
        length = len(encode(prompt)) + len(encode(completion)) + 1
        if length == TOKENS:
            break
        words.append("very")
    row = {"prompt": example.prompt, "completion": example.completion}
    path.write_text("\n".join([json.dumps(row)] * ROWS))


def run_worker(job: Train) -> tuple[Trained, int, float]:
    """The answer, the highest anonymous memory after a step, and the process's CPU seconds."""
    command = [sys.executable, "-m", "edge_agent.worker"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(job) + b"\n")
    child.stdin.close()
    answers = [msgspec.json.decode(line, type=Progress | Trained | Failed) for line in child.stdout]
    child.stdout.close()
    _, _, usage = os.wait4(child.pid, 0)
    last = answers[-1]
    if not isinstance(last, Trained):
        raise SystemExit(f"training_step: {last}")
    return last, max(answer.memory.anonymous for answer in answers[:-1]), usage.ru_utime + usage.ru_stime


def measure_worker(job: Train, steps: int) -> Cost:
    """Two fresh processes, a short and a long one."""
    _, _, short = run_worker(msgspec.structs.replace(job, steps=SHORT_STEPS))
    last, anonymous, long = run_worker(msgspec.structs.replace(job, steps=SHORT_STEPS + steps))
    return Cost(last.memory.peak, anonymous, (long - short) / steps)


def measure_torch(steps: int) -> Cost:
    """A fresh process that runs `torch_child`."""
    command = [sys.executable, __file__, "--torch-child", str(steps)]
    done = subprocess.run(command, capture_output=True, check=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Cost)


def torch_child(steps: int) -> None:
    """The same step in torch and peft; prints its Cost."""
    import torch
    from peft import LoraConfig, get_peft_model

    from quantize.source import load

    torch.set_num_threads(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load(MODEL).model, config).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.016)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 40_000, (ROWS, TOKENS)))
    seconds, anonymous = [], 0
    for _ in range(SHORT_STEPS + steps):
        began = process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(process_time() - began)
        anonymous = max(anonymous, memory_used().anonymous)
    cost = Cost(memory_used().peak, anonymous, sum(seconds[SHORT_STEPS:]) / steps)
    print(msgspec.json.encode(cost).decode())


def rows_of(costs: Sequence[Cost], other: Cost | None) -> list[Row]:
    """One row a figure."""
    case = f"{MODEL} int4d, {ROWS} x {TOKENS} tokens, 1 thread"
    peer = "torch + peft float32" if other else "torch + peft float32, not installed here"
    figures = (
        ("worker_peak_rss_mb", PEAK_GOAL, "MB", [cost.peak / MEGABYTE for cost in costs]),
        ("worker_anonymous_mb", ANONYMOUS_GOAL, "MB", [cost.anonymous / MEGABYTE for cost in costs]),
        ("step_cpu_s", None, "s", [cost.step_seconds for cost in costs]),
    )
    theirs = (other.peak / MEGABYTE, other.anonymous / MEGABYTE, other.step_seconds) if other else (None,) * 3
    return [
        Row.of(figure, case, values, unit, goal=goal, baseline=peer, baseline_value=value)
        for (figure, goal, unit, values), value in zip(figures, theirs, strict=True)
    ]


def measure(args: Namespace, folder: Path) -> list[Row]:
    """All figures; `folder` is scratch."""
    bundle = args.bundle or _new_bundle(folder)
    write_data(bundle, folder / "data.jsonl")
    np.zeros(open_bundle(bundle).layout.numbers, "<f4").tofile(folder / "adapter.f32")
    job = Train(
        bundle=str(bundle),
        adapter=str(folder / "adapter.f32"),
        data=str(folder / "data.jsonl"),
        training=Training(batch_rows=ROWS),
        delta=str(folder / "delta.f32"),
        steps=1,
        data_seed=args.seed,
    )
    steps = 2 if args.quick else 8
    costs = []
    for run in range(1 if args.quick else args.runs):
        progress(f"worker, run {run + 1}")
        costs.append(measure_worker(job, steps))
    other = None
    if find_spec("torch") and find_spec("peft"):
        progress("torch + peft")
        other = measure_torch(steps)
    return rows_of(costs, other)


def _new_bundle(folder: Path) -> Path:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    progress(f"quantizing {MODEL}; --bundle spares this")
    quantize(MODEL, folder / "bundle", Ed25519PrivateKey.generate(), lora=LoraConfig())
    return folder / "bundle"


def main() -> None:
    """Measure and print."""
    flags: ArgumentParser = parser(__doc__ or "", runs=3)
    flags.add_argument("--bundle", type=Path, help="a bundle of SmolLM2-135M that is there already")
    flags.add_argument("--torch-child", type=int, help="(for the benchmark itself)")
    args = flags.parse_args()
    if args.torch_child:
        torch_child(args.torch_child)
        return
    with tempfile.TemporaryDirectory() as folder:
        print_report("training_step", measure(args, Path(folder)), args)


if __name__ == "__main__":
    main()
