"""A classifier's head in two graphs: where it is cut, where it cannot be, and the gate on the halves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_agent.bundle import open_bundle
from fedge.io.weight_file import map_weights
from fedge.lora import DENSE, LoraConfig
from quantize.classifier_gates import ClassifierExam, ClassifierRunner
from quantize.features import FEATURES, HEAD, features_and_head
from quantize.formats import FORMATS
from quantize.gates import GateError
from quantize.source import load


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "bare"])
def test_the_halves_give_the_bits_of_the_whole(classifier_folder: Callable[[str], Path], name: str) -> None:
    """First token and pooler, first token and two layers, the mean: one vector for each row in all of them."""
    bundle = open_bundle(classifier_folder(name) / "bundle")
    whole, first, second = (onnx.load(bundle.folder / file) for file in ("classify.onnx", FEATURES, HEAD))
    draw = np.random.default_rng(0)
    mask = np.ones((3, 7), np.int64)
    mask[2, 5:] = 0
    feeds: dict[str, np.ndarray] = {
        "h": draw.standard_normal((3, 7, 64)).astype(np.float32),
        "input_ids": draw.integers(2, 300, (3, 7)),
        "attention_mask": mask,
        "labels": np.array([0, 2, 1]),
    }
    for dense, shape in bundle.manifest.dense.items():
        feeds[DENSE + dense] = draw.standard_normal(shape).astype(np.float32)
    expected = run(whole, feeds)
    vector = run(first, feeds)["f"]
    assert vector.shape == (3, 64)
    found = run(second, {name: value for name, value in feeds.items() if name != "h"} | {"f": vector})
    assert found.keys() == expected.keys() - {"gh"}
    for output, value in found.items():
        assert np.array_equal(value, expected[output]), output


def test_a_head_that_meets_every_token_stays_whole(classifier_folder: Callable[[str], Path]) -> None:
    folder = classifier_folder("llama") / "bundle"
    assert not {FEATURES, HEAD} & set(open_bundle(folder).manifest.files)
    assert features_and_head(onnx.load(folder / "classify.onnx")) == {}


def test_a_half_that_computes_something_else_does_not_pass(
    classifier_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = classifier_folder("bare")
    bundle, source = (
        open_bundle(folder / "bundle"),
        load(str(folder / "model"), ("lights", "music", "weather")),
    )
    lora = LoraConfig(r=4, alpha=8.0, targets=("query", "value"))
    exam = ClassifierExam.of(source, exact=False, fmt=FORMATS["int8g"], lora=lora)
    tensors = map_weights(bundle.folder / "weights.bin", bundle.manifest.tensors)
    runner = ClassifierRunner(bundle.folder, tensors, bundle.manifest.layers)
    assert exam._halves(runner) == {"head_error": 0.0}
    real = ClassifierRunner.head_in_two

    def slightly_off(*given: object) -> dict[str, np.ndarray]:
        return {name: value * np.float32(1.0001) for name, value in real(*given).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(ClassifierRunner, "head_in_two", slightly_off)
    with pytest.raises(GateError, match="head_error"):
        exam._halves(runner)
