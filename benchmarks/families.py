"""Model families: how near the shipped graphs come to torch, on small random models with every oddity switched on.

    python benchmarks/families.py [--families llama,gemma3] [--json]

Per family: the worst relative error of an adapter gradient and of the loss against torch autograd through
transformers' own modules, over three shapes that reach beyond any sliding window; the features at the worst
position; the decoding graph against the training graphs, where the family has one; CPU seconds of the export.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from time import process_time

from report import ROOT, Row, parser, print_report, progress

sys.path.insert(0, str(ROOT / "tests"))  # the families are those of the tests

import families
import numpy as np
import tiny

SHAPES = ((1, 5), (3, 40), (2, 64))


def main() -> int:
    """Print the report."""
    flags = parser(__doc__ or "", runs=1)
    flags.add_argument("--families", default=",".join(families.FAMILIES), help="which, with commas")
    arguments = flags.parse_args()
    logging.getLogger("torch.__trace").propagate = False
    names = arguments.families.split(",")
    rows: list[Row] = []
    for name in names[:2] if arguments.quick else names:
        progress(name)
        with tempfile.TemporaryDirectory() as folder:
            rows += _measure(name, Path(folder), arguments.seed)
    print_report("families", rows, arguments)
    return 0


def _measure(name: str, folder: Path, seed: int) -> list[Row]:
    from torch_twin import torch_twin

    from edge_agent.bundle import open_bundle
    from fedge.io.weight_file import map_weights
    from fedge.lora import LoraConfig
    from quantize.bundle import quantize
    from quantize.reference import Batch, random_adapter, torch_gradients
    from quantize.runner import Runner

    family = families.FAMILIES[name]
    model = tiny.write_model(folder / "model", family.config())
    lora = LoraConfig(r=4, alpha=8.0, targets=family.targets)
    before = process_time()
    manifest = quantize(
        str(model),
        folder / "bundle",
        tiny.PUBLISHER,
        lora=lora,
        weights_format=family.weights_format,
        head_rows=tiny.HEAD_ROWS,
    )
    seconds = process_time() - before
    twin = torch_twin(open_bundle(folder / "bundle"), model)
    runner = Runner(
        folder / "bundle",
        map_weights(folder / "bundle" / "weights.bin", manifest.tensors),
        manifest.layers,
        manifest.head_rows,
        kinds=manifest.layer_kinds,
        cap=manifest.logit_cap,
    )
    draw = np.random.default_rng(seed)
    adapter = random_adapter(twin, lora, draw, scale=0.05)
    gradient_errors, loss_errors = [], []
    for count, width in SHAPES:
        batch = Batch.of([draw.integers(2, 300, width - 3 * row).tolist() for row in range(count)], pad=0)
        loss, expected = torch_gradients(twin, lora, adapter, batch)
        found_loss, found = runner.gradients(batch.ids, batch.mask, batch.labels, adapter)
        loss_errors.append(abs(found_loss - loss))
        gradient_errors += [
            float(np.linalg.norm(found[tensor] - value) / np.linalg.norm(value))
            for tensor, value in expected.items()
        ]
    case = f"{name} {family.weights_format}"
    torch_says = "torch autograd through transformers"
    rows = [
        Row.of(
            "gradient_error", case, [max(gradient_errors)], "relative", goal="<= 1e-5", baseline=torch_says
        ),
        Row.of("loss_error", case, [max(loss_errors)], "nats", goal="<= 1e-5", baseline=torch_says),
        Row.of("position_error", case, [manifest.gates["position_error"]], "relative", goal="<= 1e-5"),
        Row.of("export_cpu", case, [seconds], "s"),
    ]
    if "decode_error" in manifest.gates:
        rows.append(
            Row.of("decode_error", case, [manifest.gates["decode_error"]], "relative", goal="<= 1e-5")
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
