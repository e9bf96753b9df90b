"""A classifier's head, alone and with LoRA, trained by the device's trainer; torch with peft beside it.

    python benchmarks/classification.py --data FOLDER [--draws 3] [--formats int8g,int4d] [--json]

FOLDER holds CLINC150 (`data_full.json` or `data_full.json.gz` of github clinc/oos-eval, CC BY 3.0); without it nothing
is measured, and the report says so. The model is the registered `all-minilm-l6-v2` unless `--model` names another
encoder. Of each of 150 intents 20 utterances are drawn to train on and 10 of the test part to be measured on, anew for
each of the draws; the spread is over the draws. Ours and torch's are fresh processes on one thread that see the same
rows in the same order, with the same rates. First the head trains alone, then head and LoRA (r=8 on query and value)
from a head that is a few epochs old: one that knows its rows by heart leaves LoRA nothing to learn from. Both sides
train A and B; `--rule ffa` trains B alone on ours.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any, Final

import msgspec
import numpy as np
from report import Row, parser, print_report, progress

MODEL: Final = "all-minilm-l6-v2"
TRAIN_ROWS, TEST_ROWS = 20, 10  # of each class
BATCH: Final = 32
DECAY: Final = 0.01
GOAL: Final = ">= 93.0"
_FILES: Final = ("data_full.json.gz", "data_full.json")
_SEED: Final = bytes(16)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What one process trains on and how; `source` is a bundle for ours, a model folder for torch."""

    source: str
    rows: str
    head_epochs: int
    head_rate: float
    warm_epochs: int
    lora_epochs: int  # 0 = the head alone
    lora_rate: float
    rule: str = "fedit"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracies as shares; CPU seconds of training; bytes resident at the peak."""

    head: float
    head_seconds: float
    head_peak: int
    lora: float | None = None  # None: was left out
    lora_seconds: float = 0.0
    lora_peak: int = 0


class Utterances(msgspec.Struct, frozen=True):
    """Token ids and classes of what is trained on and of what is measured on."""

    classes: int
    train: list[tuple[list[int], int]]
    test: list[tuple[list[int], int]]


def main() -> int:
    """Print the report."""
    flags = parser(__doc__ or "", runs=1)
    flags.add_argument("--data", type=Path, metavar="FOLDER", help="with CLINC150's data_full.json[.gz]")
    flags.add_argument("--model", default=MODEL, help=f"an encoder, as `fedge quantize` takes it ({MODEL})")
    flags.add_argument("--formats", default="int8g,int4d", help="of the weights, with commas")
    flags.add_argument("--draws", type=int, default=3, help="of training and test rows (3)")
    flags.add_argument("--lora-draws", type=int, default=1, help="so many of them with LoRA, too (1)")
    flags.add_argument("--head-epochs", type=int, default=12)
    flags.add_argument("--head-rate", type=float, default=1e-2)
    flags.add_argument("--warm-epochs", type=int, default=3, help="of the head alone, before LoRA joins it")
    flags.add_argument("--lora-epochs", type=int, default=4)
    flags.add_argument("--lora-rate", type=float, default=2e-3)
    flags.add_argument("--rule", default="fedit", choices=("fedit", "ffa"), help="A and B train, or B alone")
    flags.add_argument("--child", nargs=2, metavar=("SIDE", "SPEC"), help="used by the benchmark itself")
    arguments = flags.parse_args()
    if arguments.child:
        side = {"ours": _ours, "torch": _torch}[arguments.child[0]]
        print(msgspec.json.encode(side(msgspec.json.decode(arguments.child[1], type=Spec))).decode())
        return 0
    data = read_data("classification", arguments)
    if data is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(data, Path(folder), arguments)
    print_report("classification", rows, arguments)
    return 0


def read_data(benchmark: str, arguments: Any) -> dict[str, list[list[str]]] | None:
    """Parts of CLINC150 in the folder `--data`: (utterance, intent). Without it, prints an empty report."""
    folder: Path | None = arguments.data
    for path in (folder / name for name in _FILES) if folder is not None else ():
        if path.is_file():
            packed = path.read_bytes()
            content = gzip.decompress(packed) if path.suffix == ".gz" else packed
            found: dict[str, list[list[str]]] = json.loads(content)
            return found
    progress("skipped: --data must name a folder with data_full.json or data_full.json.gz of CLINC150")
    print_report(benchmark, [], arguments)
    return None


def _measure(data: dict[str, list[list[str]]], folder: Path, arguments: Any) -> list[Row]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedge.io.model_source import resolve_model
    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    classes = sorted({intent for _, intent in data["train"]})
    classes = classes[:10] if arguments.quick else classes
    formats = arguments.formats.split(",")
    for name in formats:
        progress(f"quantising to {name}")
        key = Ed25519PrivateKey.generate()
        quantize(
            arguments.model,
            folder / name,
            key,
            lora=LoraConfig(r=8, alpha=16.0),
            weights_format=name,
            classes=classes,
        )
    model = resolve_model(arguments.model).path
    found: dict[str, list[Found]] = {side: [] for side in ("torch", *formats)}
    for draw in range(1 if arguments.quick else arguments.draws):
        rows = folder / f"draw-{draw}.json"
        drawn = _draw(data, classes, folder / formats[0] / "tokenizer.json", arguments.seed + draw)
        rows.write_bytes(msgspec.json.encode(drawn))
        for side in found:
            source = model if side == "torch" else folder / side
            spec = _spec(str(source), str(rows), arguments, lora=draw < arguments.lora_draws)
            result = _child("torch" if side == "torch" else "ours", spec)
            both = "" if result.lora is None else f", head and LoRA {result.lora:.2%}"
            progress(f"draw {draw}, {side}: head {result.head:.2%}{both}")
            found[side].append(result)
    return [row for name in formats for row in _rows(name, found[name], found["torch"])]


def _draw(data: dict[str, list[list[str]]], classes: list[str], tokenizer: Path, seed: int) -> Utterances:
    from edge_agent.dataset import load_encoder

    draw, encode = np.random.default_rng(seed), load_encoder(tokenizer)

    def of(part: str, count: int) -> list[tuple[list[int], int]]:
        found = []
        for number, intent in enumerate(classes):
            texts = [text for text, label in data[part] if label == intent]
            for index in draw.choice(len(texts), count, replace=False):
                found.append((encode.before + encode(texts[index]) + encode.after, number))
        return found

    return Utterances(len(classes), of("train", TRAIN_ROWS), of("test", TEST_ROWS))


def _spec(source: str, rows: str, arguments: Any, *, lora: bool) -> Spec:
    return Spec(
        source=source,
        rows=rows,
        head_epochs=arguments.head_epochs,
        head_rate=arguments.head_rate,
        warm_epochs=arguments.warm_epochs,
        lora_epochs=lora * (1 if arguments.quick else arguments.lora_epochs),
        lora_rate=arguments.lora_rate,
        rule=arguments.rule,
    )


def _child(side: str, spec: Spec) -> Found:
    words = [sys.executable, __file__, "--child", side, msgspec.json.encode(spec).decode()]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Found)


def _rows(name: str, ours: list[Found], theirs: list[Found]) -> list[Row]:
    peer = "torch float32 with peft, same rows"
    rows = []
    for part, case in (("head", f"{name} head"), ("lora", f"{name} head + LoRA r=8")):
        mine, other = (
            [
                (
                    100 * getattr(one, part),
                    getattr(one, f"{part}_seconds"),
                    getattr(one, f"{part}_peak") / 1e6,
                )
                for one in side
                if getattr(one, part) is not None
            ]
            for side in (ours, theirs)
        )
        if not mine:
            continue
        accuracy, seconds, peaks = map(list, zip(*mine, strict=True))
        torch_has = [float(np.median(column)) for column in zip(*other, strict=True)]
        gaps = [a[0] - b[0] for a, b in zip(mine, other, strict=True)]
        rows += [
            Row.of("accuracy_percent", case, accuracy, "%", goal=GOAL, baseline=peer, baseline_value=torch_has[0]),
            Row.of("accuracy_gap_points", case, gaps, "points", goal=">= -0.5"),
            Row.of("train_cpu_s", case, seconds, "s", baseline=peer, baseline_value=torch_has[1]),
            Row.of("peak_mb", case, peaks, "MB", baseline=peer, baseline_value=torch_has[2]),
        ]  # fmt: skip
    return rows


# ---------------------------------------------------------------- both sides
@dataclass(frozen=True, slots=True)
class _Order:
    """The same batches for both sides."""

    given: Utterances
    pad: int

    def batches(self, epochs: int, seed: int) -> Iterator[Any]:
        from edge_agent.dataset import batches

        rows = _texts(self.given.train)
        return islice(batches(rows, size=BATCH, seed=seed, pad_id=self.pad), self.steps(epochs))

    def steps(self, epochs: int) -> int:
        return epochs * -(-len(self.given.train) // BATCH)

    def test(self) -> Iterator[Any]:
        from edge_agent.dataset import evaluation_batches

        rows = _texts(self.given.test)
        return (batch for _, batch in evaluation_batches(rows, size=BATCH, pad_id=self.pad))


def _texts(rows: list[tuple[list[int], int]]) -> list[Any]:
    from edge_agent.dataset.row import Row as Text

    return [Text(np.array(ids, np.int32), 0, "", label=label) for ids, label in rows]


def _peak() -> int:
    """Bytes resident at most, of this program alone: what `getrusage` tells includes who started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _ours(spec: Spec) -> Found:
    from edge_agent.bundle import open_bundle
    from edge_agent.trainer import HEAD_ONLY, Recipe, Schedule, Trainer
    from edge_agent.trainer.rules import train_by_rule
    from fedge.messages import Training
    from fedge.rules import rule_of

    bundle = open_bundle(Path(spec.source))
    order = _Order(msgspec.json.decode(Path(spec.rows).read_bytes(), type=Utterances), bundle.manifest.pad_id)
    trainer = Trainer(bundle, a_seed=_SEED)
    rule = rule_of(spec.rule, trainer.layout, _SEED)

    def train(start: Any, epochs: int, rate: float, seed: int, depth: int = 0) -> Any:
        recipe = Recipe(schedule=Schedule(rate, "cosine", steps=order.steps(epochs)))
        training = Training(rate=rate, weight_decay=DECAY, a_seed=_SEED, rule=spec.rule)
        outcome = train_by_rule(
            trainer, start, order.batches(epochs, seed), training, depth=depth, recipe=recipe
        )
        return rule.apply(rule.part(1, probing=False), start, outcome.delta, 1.0)

    def accuracy(state: Any) -> float:
        adapter = rule.held(state)
        right = [trainer.answers(batch, adapter).right for batch in order.test()]
        return float(np.concatenate(right).mean())

    zero, at = rule.initial(), process_time()
    head = train(zero, spec.head_epochs, spec.head_rate, 0, HEAD_ONLY)
    seconds = process_time() - at
    found = Found(head=accuracy(head), head_seconds=seconds, head_peak=_peak())
    if not spec.lora_epochs:
        return found
    at = process_time()
    warm = train(zero, spec.warm_epochs, spec.head_rate, 1, HEAD_ONLY)
    both = train(warm, spec.lora_epochs, spec.lora_rate, 2)
    seconds = process_time() - at
    return msgspec.structs.replace(found, lora=accuracy(both), lora_seconds=seconds, lora_peak=_peak())


class _Pooled:
    """The mean over each text of a batch, computed once: the encoder stands still."""

    def __init__(self, base: Any) -> None:
        self._base, self._known = base, dict[bytes, Any]()

    def __call__(self, batch: Any) -> Any:
        import torch

        keys = [i[m > 0].tobytes() for i, m in zip(batch.ids, batch.mask, strict=True)]
        if not all(key in self._known for key in keys):
            kept: list[Any] = []
            hook = self._base.classifier.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
            with torch.no_grad():
                self._base(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
            hook.remove()
            self._known.update(zip(keys, kept[0], strict=True))
        return torch.stack([self._known[key] for key in keys])


def _torch(spec: Spec) -> Found:
    import torch
    from peft import LoraConfig, get_peft_model

    from quantize.encoders import MeanPooled

    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = msgspec.json.decode(Path(spec.rows).read_bytes(), type=Utterances)
    base = MeanPooled.from_folder(spec.source, given.classes)
    order = _Order(given, int(base.config.pad_token_id or 0))
    start = {name: value.clone() for name, value in base.classifier.state_dict().items()}
    pooled = _Pooled(base)

    def whole(batch: Any) -> Any:
        return model(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits

    def train(run: Any, weights: Any, epochs: int, rate: float, seed: int) -> None:
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=DECAY)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, order.steps(epochs))
        for batch in order.batches(epochs, seed):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run(batch), torch.from_numpy(batch.classes)).backward()
            optimizer.step()
            falling.step()

    def accuracy(run: Any) -> float:
        with torch.no_grad():
            right = [run(b).argmax(-1) == torch.from_numpy(b.classes) for b in order.test()]
        return float(torch.cat(right).float().mean())

    def of_vector(batch: Any) -> Any:
        return base.classifier(pooled(batch))

    at = process_time()
    train(of_vector, base.classifier.parameters(), spec.head_epochs, spec.head_rate, 0)
    seconds = process_time() - at
    found = Found(head=accuracy(of_vector), head_seconds=seconds, head_peak=_peak())
    if not spec.lora_epochs:
        return found
    base.classifier.load_state_dict(start)
    at = process_time()
    train(of_vector, base.classifier.parameters(), spec.warm_epochs, spec.head_rate, 1)
    how = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(base, how)
    train(whole, [p for p in model.parameters() if p.requires_grad], spec.lora_epochs, spec.lora_rate, 2)
    seconds = process_time() - at
    model.eval()
    return msgspec.structs.replace(found, lora=accuracy(whole), lora_seconds=seconds, lora_peak=_peak())


if __name__ == "__main__":
    raise SystemExit(main())
