"""What every test may ask for: `playbook` and `tiny` are importable; one tiny model and its bundle per test run.

An export takes some 10 seconds, so all workers of pytest-xdist share the first one's result, and what reads the same
bundle runs on the same worker, lest one waits while the other exports. Treat all folders as read-only; copy them
before changing a byte.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
from hypothesis import settings

# Every run draws the same examples, so that a red test is red for all; `--hypothesis-profile explore` draws new ones.
settings.register_profile("explore", settings.get_profile("default"))
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# One worker a core, and tiny models: threads of torch would wait for each other, and use the cores up by waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch's tracer writes a record for every step, and only if somebody listens. pytest listens to every logger.
logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]


def pytest_configure(config: pytest.Config) -> None:
    """Marks that are pytest-xdist's, for runs without it."""
    config.addinivalue_line("markers", "xdist_group(name): tests of one name run on one worker")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one shared bundle are one group of pytest-xdist; the longest tests do not come last and alone."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None and (group := _bundle_of(item)):
            item.add_marker(pytest.mark.xdist_group(group))


def _bundle_of(item: pytest.Item) -> str | None:
    fixtures = getattr(item, "fixturenames", ())
    if "smollm2_bundle" in fixtures:
        return "smollm2"
    if "classifier_folder" in fixtures:
        return "classifiers"
    if "sentence_folder" in fixtures:
        return "sentences"
    if "audio_folder" in fixtures:
        return "audio"
    call = getattr(item, "callspec", None)
    if "family_folder" in fixtures and call is not None:
        named = [
            value for value in call.params.values() if isinstance(value, str) and value in families.FAMILIES
        ]
        return f"family {named[0]}" if named else None
    return None


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python's collector need not walk torch whenever a test makes objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that all workers of this run share, made by whoever comes first."""
    base = factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            make(base / name)
    return base / name


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: Llama with 2 layers, 4 query and 2 key heads, 304 embedding rows. Read-only."""
    from transformers import LlamaConfig

    return _once(tmp_path_factory, "tiny-model", lambda out: tiny.write_model(out, LlamaConfig(**tiny.SIZES)))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The bundle of `tiny_model` in int4d, signed by `tiny.PUBLISHER`. Read-only."""
    from quantize.bundle import quantize

    def make(out: Path) -> None:
        quantize(
            str(tiny_model),
            out,
            tiny.PUBLISHER,
            lora=tiny.LORA,
            name="tiny",
            weights_format="int4d",
            head_rows=tiny.HEAD_ROWS,
        )

    return _once(tmp_path_factory, "tiny-bundle", make)


_TRACES: dict[tuple[str, ...], Any] = {}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose graphs were traced in this process is not traced again: for tests of what happens to the graphs.

    A trace depends on the model's configuration and the adapter's shape alone, neither on weights nor on their format.
    """
    import onnx

    from quantize import decode, training
    from quantize.blocks import FrozenLinear

    def kept(name: str, trace: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
        def of(part: Any, *more: Any) -> onnx.ModelProto:
            block = more[0] if name == "export_block" else None
            adapters = (
                [(p, m.lora) for p, m in block.named_modules() if type(m) is FrozenLinear] if block else []
            )
            config = getattr(part, "model", None) and part.model.config.to_json_string()
            key = (name, str(config or part), str(adapters))
            found = _TRACES.get(key)
            if found is None:
                found = _TRACES[key] = trace(part, *more)
            copy = onnx.ModelProto()
            copy.CopyFrom(found)
            return copy

        return of

    places = {training: ("export_block", "export_norm", "export_prologue"), decode: ("export_start",)}
    for module, names in places.items():
        for name in names:
            monkeypatch.setattr(module, name, kept(name, getattr(module, name)))


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """(name in `families.FAMILIES`) -> a folder with that family's `model` and its `bundle`. Read-only."""
    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    def of(name: str) -> Path:
        family = families.FAMILIES[name]

        def make(out: Path) -> None:
            out.mkdir()
            quantize(
                str(tiny.write_model(out / "model", family.config())),
                out / "bundle",
                tiny.PUBLISHER,
                lora=LoraConfig(r=4, alpha=8.0, targets=family.targets, rslora=True),
                weights_format=family.weights_format,
                head_rows=tiny.HEAD_ROWS,
            )

        return _once(tmp_path_factory, f"family-{name}", make)

    return of


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """(name in `encoders.ENCODERS`) -> a folder with that classifier's `model` and its `bundle`. Read-only."""
    import encoders

    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    def of(name: str) -> Path:
        def make(out: Path) -> None:
            out.mkdir()
            quantize(
                str(encoders.write_model(out / "model", name)),
                out / "bundle",
                tiny.PUBLISHER,
                lora=LoraConfig(r=4, alpha=8.0),
                weights_format="int8g",
                classes=encoders.CLASSES if name == "bare" else (),
            )

        return _once(tmp_path_factory, f"classifier-{name}", make)

    return of


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """(name in `encoders.POOLINGS`) -> a folder with that sentence encoder's `model` and its `bundle`. Read-only."""
    import encoders

    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    def of(name: str) -> Path:
        def make(out: Path) -> None:
            out.mkdir()
            quantize(
                str(encoders.write_sentences(out / "model", name)),
                out / "bundle",
                tiny.PUBLISHER,
                lora=LoraConfig(r=4, alpha=8.0),
                weights_format="int8g",
                task="embed",
            )

        return _once(tmp_path_factory, f"sentences-{name}", make)

    return of


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whispers`' tiny Whisper, as it is for transcribing, in `model`, and its `bundle`. Read-only."""
    import whispers

    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    def make(out: Path) -> None:
        out.mkdir()
        quantize(
            str(whispers.write_model(out / "model", "WhisperForConditionalGeneration")),
            out / "bundle",
            tiny.PUBLISHER,
            lora=LoraConfig(r=4, alpha=8.0),
            weights_format="int8g",
            classes=whispers.CLASSES,
            seconds=whispers.SECONDS,
        )

    return _once(tmp_path_factory, "audio", make)


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the real SmolLM2-135M-Instruct; for tests marked `real`. Read-only."""
    from quantize.bundle import quantize

    def make(out: Path) -> None:
        quantize("smollm2-135m", out, tiny.PUBLISHER, lora=tiny.LORA, name="smollm2-135m")

    return _once(tmp_path_factory, "smollm2-bundle", make)
