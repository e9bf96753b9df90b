"""Sentence vectors before and after a few steps on pairs, by the device's trainer; torch with peft beside it.

    python benchmarks/retrieval.py --data FOLDER [--steps 20] [--rows 16] [--json]

FOLDER holds CLINC150, as `classification.py` has it. Of each of 150 intents 20 utterances are drawn, and 10 of the test
part that look for their neighbour among them by cosine: the figure is how many find one of their own intent. What is
trained on are the 20 in pairs; two pairs of a batch may be of one intent, which nobody tells the trainer. Both sides
see the same batches at the same rate; torch, in float32, trains A and B, ours B alone (`ffa`) or both (`fedit`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any, Final

import numpy as np
from classification import MODEL, read_data
from report import Row, parser, print_report, progress

INDEX, QUERIES = 20, 10  # of each intent
WINDOW: Final = 64
RULES: Final = ("ffa", "fedit")
Vectors = Callable[[Sequence[str]], Any]


def main() -> int:
    """Print the report."""
    flags = parser(__doc__ or "", runs=1)
    flags.add_argument("--data", type=Path, metavar="FOLDER", help="with CLINC150's data_full.json[.gz]")
    flags.add_argument("--model", default=MODEL, help=f"an encoder, as `fedge quantize` takes it ({MODEL})")
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--rows", type=int, default=16, help="pairs in a step (16)")
    arguments = flags.parse_args()
    data = read_data("retrieval", arguments)
    if data is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(_Utterances(data, arguments.seed, arguments.quick), Path(folder), arguments)
    print_report("retrieval", rows, arguments)
    return 0


class _Utterances:
    """What is looked for, and what it is looked for among: (text, intent)."""

    def __init__(self, data: dict[str, list[list[str]]], seed: int, quick: bool) -> None:
        draw = np.random.default_rng(seed)
        intents = sorted({intent for _, intent in data["train"]})[: 10 if quick else None]

        def of(part: str, count: int) -> list[tuple[str, str]]:
            found = []
            for intent in intents:
                texts = [text for text, label in data[part] if label == intent]
                found += [(texts[index], intent) for index in draw.choice(len(texts), count, replace=False)]
            return found

        self.index, self.queries = of("train", INDEX), of("test", QUERIES)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Neighbours in the index, which are of one intent."""
        texts = [text for text, _ in self.index]
        return list(zip(texts[::2], texts[1::2], strict=True))

    def found(self, vectors: Vectors) -> float:
        """Percent of the queries whose nearest neighbour is of their intent."""
        index, queries = (vectors([text for text, _ in part]) for part in (self.index, self.queries))
        nearest = (_units(queries) @ _units(index).T).argmax(axis=1)
        hits = [self.index[at][1] == intent for at, (_, intent) in zip(nearest, self.queries, strict=True)]
        return 100 * float(np.mean(hits))


def _units(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _measure(texts: _Utterances, folder: Path, arguments: Any) -> list[Row]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edge_agent.bundle import open_bundle
    from edge_agent.embedder import Embedder
    from fedge.io.model_source import resolve_model
    from fedge.lora import LoraConfig
    from fedge.rules import usual_rate
    from quantize.bundle import quantize

    progress("quantising")
    key, out = Ed25519PrivateKey.generate(), folder / "bundle"
    quantize(arguments.model, out, key, lora=LoraConfig(), weights_format="int8g", task="embed")
    bundle = open_bundle(out)

    def ours(adapter: Any = None) -> Vectors:
        embedder = Embedder(bundle, adapter=adapter)
        return lambda given: np.stack([embedder(text) for text in given])

    peer, model = "torch float32 with peft, same batches", resolve_model(arguments.model).path
    plain = texts.found(ours())
    progress(f"ours as it is: {plain:.1f} %")
    torch_plain, torch_trained, torch_seconds = _torch(
        bundle, str(model), texts, arguments, usual_rate("fedit", "embed")
    )
    progress(f"torch: {torch_plain:.1f} %, trained {torch_trained:.1f} %")
    rows = [
        Row.of("found_percent", "int8g as it is", [plain], "%", baseline=peer, baseline_value=torch_plain)
    ]
    for rule in RULES:
        adapter, seconds = _train(bundle, texts, arguments, rule)
        found = texts.found(ours(adapter))
        progress(f"ours, {rule}: {found:.1f} %")
        case = f"int8g, {arguments.steps} steps of {arguments.rows} pairs, {rule}"
        rows += [
            Row.of("found_percent", case, [found], "%", baseline=peer, baseline_value=torch_trained),
            Row.of("train_cpu_s", case, [seconds], "s", baseline=peer, baseline_value=torch_seconds),
        ]
    return rows


def _batches(bundle: Any, texts: _Utterances, arguments: Any) -> Any:
    from edge_agent.dataset import batches, load_encoder
    from edge_agent.dataset.pair_rows import pair_row

    encode = load_encoder(bundle.tokenizer)

    def ids(text: str) -> Any:
        return np.array([*encode.before, *encode(text)[: WINDOW - 2], *encode.after], np.int32)

    rows = [pair_row(ids(anchor), ids(positive)) for anchor, positive in texts.pairs]
    endless = batches(rows, size=arguments.rows, seed=arguments.seed, pad_id=bundle.manifest.pad_id)
    return islice(endless, arguments.steps)


def _train(bundle: Any, texts: _Utterances, arguments: Any, rule: str) -> tuple[Any, float]:
    """A, B of our trainer, and its CPU seconds."""
    from edge_agent.trainer import Trainer
    from edge_agent.trainer.rules import train_by_rule
    from fedge.messages import Training
    from fedge.rules import rule_of, usual_rate

    trainer, training = Trainer(bundle), Training(rate=usual_rate(rule, "embed"), rule=rule)
    by, at = rule_of(rule, trainer.layout, training.a_seed), process_time()
    outcome = train_by_rule(trainer, by.initial(), _batches(bundle, texts, arguments), training)
    seconds = process_time() - at
    return by.tensors(by.apply(by.part(1, probing=False), by.initial(), outcome.delta, 1.0)), seconds


def _torch(
    bundle: Any, model: str, texts: _Utterances, arguments: Any, rate: float
) -> tuple[float, float, float]:
    """(percent as it is, percent after training, CPU seconds of the training)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = get_peft_model(
        AutoModel.from_pretrained(model), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    ).eval()

    def pooled(ids: Any, mask: Any) -> Any:
        ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
        states, weights = base(input_ids=ids, attention_mask=mask).last_hidden_state, mask[:, :, None]
        return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1))

    def vectors(given: Sequence[str]) -> Any:
        from edge_agent.dataset import load_encoder

        encode, found = load_encoder(bundle.tokenizer), []
        with torch.no_grad():
            for text in given:
                ids = np.array([[*encode.before, *encode(text), *encode.after]])
                found.append(pooled(ids, np.ones_like(ids))[0].numpy())
        return np.stack(found)

    plain, at = texts.found(vectors), process_time()
    trained = [value for value in base.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    for batch in _batches(bundle, texts, arguments):
        anchors, positives = pooled(batch.ids, batch.mask).chunk(2)
        loss = torch.nn.functional.cross_entropy(20 * anchors @ positives.T, torch.arange(len(anchors)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = process_time() - at
    return plain, texts.found(vectors), seconds


if __name__ == "__main__":
    raise SystemExit(main())
