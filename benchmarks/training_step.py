"""What a training step costs a device: memory of a fresh process, and CPU time of one thread.

SmolLM2-135M, LoRA r=8 on q and v. Memory is the process's own (`VmHWM`; `RssAnon` at its highest after a run of a
session). CPU time of ours, of torch with peft (sdpa) in float32 and bfloat16, and of a product of two matrices, are
taken in turn in one process, so that what else the machine does falls on all alike; `fast` is there with a bundle in
int8c (`--fast-bundle`). Every prediction of the planner stands beside its measurement. `--large` adds the shapes of
Qwen2.5-0.5B and Llama-3.2-3B with random weights: some minutes and 4 GB of memory for the export.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any, Final

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_variable] = "1"  # before a library loads; children inherit it

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from report import ROOT, Row, parser, print_report, progress  # noqa: E402
from synthetic_bundle import write_bundle  # noqa: E402

from edge_agent.bundle import open_bundle  # noqa: E402
from edge_agent.planner import Plan, matrices, need  # noqa: E402
from edge_agent.trainer import Trainer  # noqa: E402
from edge_agent.trainer.batch import Piece  # noqa: E402
from edge_agent.worker import memory_used  # noqa: E402
from fedge.lora import LoraConfig  # noqa: E402
from fedge.messages import Training  # noqa: E402

MODEL: Final = "smollm2-135m"
MEGABYTE: Final = 1e6
ROWS, TOKENS = 4, 64
FILED: Final = Plan(checkpoints="file", head_rows=1_024)
SHAPES: Final = (
    (4, 64, 1.0, Plan()),
    (1, 64, 1.0, Plan()),
    (1, 512, 1.0, Plan()),
    (8, 128, 1.0, Plan()),
    (1, 512, 1.0, FILED),
    (2, 256, 1.0, Plan(checkpoints="half")),
    (4, 64, 1.0, Plan(keep=30)),
    (4, 128, 1.0, Plan(keep=10)),
    (8, 256, 0.5, Plan(rows=2, head_rows=1_024)),
    (1, 1_024, 0.3, Plan(head_rows=1_024)),
    (8, 64, 0.3, Plan(rows=4)),
)
GOALS: Final = {(4, 64): ("<= 260", "<= 110", Plan()), (1, 512): ("<= 300", "<= 100", FILED)}
LARGE: Final = (
    ("qwen2.5-0.5b", 256, 1.0, "<= 136", "best published: arXiv 2602.13069", 136.0),
    ("llama-3.2-3b", 2_048, 0.3, "<= 1000", "best published: arXiv 2606.19528", 1_010.0),
)


class Asked(msgspec.Struct, frozen=True):
    """What a child process is to do: steps on one batch, and say what they took."""

    bundle: str
    rows: int
    tokens: int
    label_share: float
    plan: Plan
    seed: int
    scratch: str
    steps: int = 2  # the second meets what the first one left in the runtime's arena


class Cost(msgspec.Struct, frozen=True):
    """Of one process: bytes, and CPU seconds of loading all sessions and of a step."""

    peak: int
    anonymous: int
    load_seconds: float
    step_seconds: float
    predicted_peak: int
    predicted_anonymous: int


# ---------------------------------------------------------------- in a child
def batch_of(asked: Asked, vocabulary: int) -> Piece:
    """Random tokens; the last part of each row has labels."""
    ids = np.random.default_rng(asked.seed).integers(0, vocabulary, (asked.rows, asked.tokens))
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels[:, : int(asked.tokens * (1 - asked.label_share))] = -100
    return Piece(ids, np.ones_like(ids), labels)


def child(asked: Asked) -> Cost:
    """Steps in this process."""
    bundle = open_bundle(Path(asked.bundle))
    began = process_time()
    trainer = Trainer(bundle, plan=asked.plan, folder=Path(asked.scratch))
    loaded = process_time() - began
    batch = batch_of(asked, bundle.manifest.vocabulary)
    vector = np.zeros(trainer.layout.numbers, np.float32)
    anonymous, began = memory_used().anonymous, process_time()
    for _ in range(asked.steps):
        for _ in trainer.steps(batch, trainer.layout.split(vector)):
            anonymous = max(anonymous, memory_used().anonymous)
    took = (process_time() - began) / asked.steps
    foreseen = need(
        bundle.manifest,
        Training(batch_rows=asked.rows, window_tokens=asked.tokens),
        asked.plan,
        label_share=asked.label_share,
        data=False,
    )
    memory = memory_used()
    return Cost(
        memory.peak,
        max(anonymous, memory.anonymous),
        loaded,
        took,
        foreseen.peak,
        foreseen.anonymous,
    )


def run_child(asked: Asked) -> Cost:
    """A fresh process that does what is asked."""
    command = [sys.executable, __file__, "--child", msgspec.json.encode(asked).decode()]
    done = subprocess.run(
        command, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Cost)


# ---------------------------------------------------------------- memory
def memory_rows(args: Namespace, bundle: Path, scratch: str) -> Iterator[Row]:
    """Peaks at the two shapes with goals, loading, and the planner on all shapes."""
    for rows, tokens, share, chosen in SHAPES[:2] if args.quick else SHAPES:
        progress(f"memory of {rows} x {tokens}, {share:.0%} learnt, {_words(chosen)}")
        asked = Asked(str(bundle), rows, tokens, share, chosen, args.seed, scratch)
        costs = [run_child(asked) for _ in range(1 if args.quick else args.runs)]
        case = f"{MODEL}, {rows} x {tokens} tokens, {share:.0%} learnt, {_words(chosen)}"
        peak_goal, anonymous_goal, planned = GOALS.get((rows, tokens), (None, None, None))
        if chosen != planned:
            peak_goal = anonymous_goal = None
        yield Row.of(
            "peak_rss_mb",
            case,
            [c.peak / MEGABYTE for c in costs],
            "MB",
            goal=peak_goal,
            baseline="prediction",
            baseline_value=costs[0].predicted_peak / MEGABYTE,
        )
        yield Row.of(
            "anonymous_mb",
            case,
            [c.anonymous / MEGABYTE for c in costs],
            "MB",
            goal=anonymous_goal,
            baseline="prediction",
            baseline_value=costs[0].predicted_anonymous / MEGABYTE,
        )
        off = [100 * abs(c.predicted_anonymous / c.anonymous - 1) for c in costs]
        yield Row.of("prediction_off_percent", case, off, "%", goal="<= 10")
        if (rows, tokens, chosen) == (ROWS, TOKENS, Plan()):
            yield Row.of("load_cpu_s", case, [c.load_seconds for c in costs], "s", goal="<= 0.1")


def large_rows(args: Namespace, folder: Path) -> Iterator[Row]:
    """The shapes of larger models, one step each."""
    for shape, tokens, share, goal, source, published in LARGE:
        progress(f"{shape}: exporting")
        bundle = write_bundle(shape, folder / shape, LoraConfig(), args.large_format)
        progress(f"{shape}: a step on {tokens} tokens")
        cost = run_child(Asked(str(bundle), 1, tokens, share, FILED, args.seed, str(folder), steps=1))
        case = f"{shape} shape, {args.large_format}, 1 x {tokens} tokens, {share:.0%} learnt, {_words(FILED)}"
        anonymous = [cost.anonymous / MEGABYTE]
        yield Row.of(
            "anonymous_mb", case, anonymous, "MB", goal=goal, baseline=source, baseline_value=published
        )
        yield Row.of(
            "peak_rss_mb",
            case,
            [cost.peak / MEGABYTE],
            "MB",
            baseline="prediction",
            baseline_value=cost.predicted_peak / MEGABYTE,
        )
        yield Row.of("step_cpu_s", case, [cost.step_seconds], "s")


# ---------------------------------------------------------------- time
def time_rows(args: Namespace, bundle: Path, folder: str) -> Iterator[Row]:
    """CPU of a step, of torch's and of a large product, in turn in this process."""
    works = dict(_ours(args, bundle, folder))
    if find_spec("torch") and find_spec("peft"):
        progress("torch + peft")
        works |= dict(_torch(args))
    square = np.random.default_rng(args.seed).standard_normal((1_024, 1_024)).astype(np.float32)
    works["sgemm"] = lambda: square @ square
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(2 if args.quick else 2 + args.runs):
        progress(f"time, turn {turn + 1}")
        for name, work in works.items():
            began = process_time()
            work()
            if turn:
                seconds[name].append(process_time() - began)
    case = f"{MODEL}, {ROWS} x {TOKENS} tokens, 1 thread"
    goals = {
        "exact": "<= 0.6",
        "exact, products kept": "<= 0.6",
        "fast": "<= 0.33",
        "fast, products kept": "<= 0.33",
    }
    theirs = {name: float(np.median(values)) for name, values in seconds.items()}
    for name in seconds.keys() - {"sgemm"}:
        yield Row.of(
            "step_cpu_s",
            f"{case}, {name}",
            seconds[name],
            "s",
            baseline="torch + peft float32",
            baseline_value=theirs.get("torch float32"),
        )
        if "torch float32" in theirs and not name.startswith("torch"):
            ratio = [theirs[name] / theirs["torch float32"]]
            yield Row.of("cpu_to_torch_ratio", f"{case}, {name}", ratio, "x", goal=goals.get(name))
    yield from _share_of_peak(bundle, theirs["sgemm"], case, args)


def _ours(args: Namespace, bundle: Path, folder: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    found = [("exact", bundle, Plan()), ("exact, products kept", bundle, Plan(keep=30))]
    if args.fast_bundle:
        found += [
            ("fast", args.fast_bundle, Plan()),
            ("fast, products kept", args.fast_bundle, Plan(keep=30)),
        ]
    for name, path, chosen in found:
        opened = open_bundle(path)
        if chosen.keep and "block_bwd_keep.onnx" not in opened.manifest.files:
            continue
        trainer = Trainer(opened, plan=chosen, folder=Path(folder))
        asked = Asked(str(path), ROWS, TOKENS, 1.0, chosen, args.seed, folder)
        batch = batch_of(asked, opened.manifest.vocabulary)
        b = trainer.layout.split(np.zeros(trainer.layout.numbers, np.float32))
        yield name, lambda trainer=trainer, batch=batch, b=b: trainer.loss_and_gradients(batch, b)


def _torch(args: Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    from quantize.source import load

    torch.set_num_threads(1)
    ids = torch.from_numpy(np.random.default_rng(args.seed).integers(3, 40_000, (ROWS, TOKENS)))
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        config = PeftConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        plain = load(MODEL).model.to(dtype)
        plain.set_attn_implementation("sdpa")
        model = get_peft_model(plain, config).train()
        model.config.use_cache = False
        yield name, lambda model=model: model(input_ids=ids, labels=ids).loss.backward()


def _share_of_peak(bundle: Path, sgemm_seconds: float, case: str, args: Namespace) -> Iterator[Row]:
    """Of the products with frozen matrices that the two graphs of a block carry out, there and back."""
    opened = open_bundle(bundle)
    trainer, streamer_seconds = Trainer(opened), list[float]()
    asked = Asked(str(bundle), ROWS, TOKENS, 0.02, Plan(), args.seed, "")
    batch = batch_of(asked, opened.manifest.vocabulary)
    b = trainer.layout.split(np.zeros(trainer.layout.numbers, np.float32))
    for _ in range(2 if args.quick else 2 + args.runs):
        marks = [process_time()]
        for _ in trainer.steps(batch, b):
            marks.append(process_time())
        took = np.diff(marks)
        layers = opened.manifest.layers
        streamer_seconds.append(float(np.median(took[1 : 1 + layers]) + np.median(took[-layers - 1 : -1])))
    weights = sum(rows * columns for rows, columns in matrices(opened.manifest))
    last = next(n for n in opened.manifest.tensors if n.startswith("L0/") and "down_proj.w.q" in n)
    rows = opened.manifest.tensors[last].shape[0]
    recomputed = weights - rows * max(c for r, c in matrices(opened.manifest) if r == rows)
    done = 2 * ROWS * TOKENS * (2 * weights + recomputed)
    peak = 2 * 1_024**3 / sgemm_seconds
    shares = [100 * done / seconds / peak for seconds in streamer_seconds[1:]]
    yield Row.of("share_of_sgemm_peak_percent", f"{case}, a block", shares, "%", goal=">= 70")


def _words(chosen: Plan) -> str:
    told = [
        f"{key} {value}" for key, value in msgspec.to_builtins(chosen).items() if value not in (0, "plain")
    ]
    return ", ".join(told) or "plain plan"


# ---------------------------------------------------------------- all
def measure(args: Namespace, folder: Path) -> list[Row]:
    """All figures; `folder` is scratch."""
    bundle = args.bundle or _new_bundle(folder)
    rows = list(memory_rows(args, bundle, str(folder)))
    rows += time_rows(args, bundle, str(folder))
    if args.large:
        rows += large_rows(args, folder)
    return rows


def _new_bundle(folder: Path) -> Path:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from quantize.bundle import quantize

    progress(f"quantizing {MODEL}; --bundle spares this")
    quantize(MODEL, folder / "bundle", Ed25519PrivateKey.generate(), lora=LoraConfig())
    return folder / "bundle"


def main() -> None:
    """Measure and print."""
    flags: ArgumentParser = parser(__doc__ or "", runs=3)
    flags.add_argument("--bundle", type=Path, help="a bundle of SmolLM2-135M that is there already")
    flags.add_argument("--fast-bundle", type=Path, help="one in int8c")
    flags.add_argument("--large", action="store_true", help="also 0.5-B and 3-B shapes")
    flags.add_argument("--large-format", default="int4d", help="weight format of the large shapes (int4d)")
    flags.add_argument("--child", help="(for the benchmark itself)")
    args = flags.parse_args()
    if args.child:
        print(json.dumps(msgspec.to_builtins(child(msgspec.json.decode(args.child, type=Asked)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print_report("training_step", measure(args, Path(folder)), args)


if __name__ == "__main__":
    main()
