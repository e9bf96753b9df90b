"""A model becomes a signed bundle folder, or nothing.

Order: refuse -> quantise -> export -> write -> gates -> sign -> rename. Everything happens in a hidden sibling of
the target, and the target appears by one rename when every gate has passed and every byte is on disk. A failure
removes the sibling; what a killed export leaves is removed by the next one. The same input gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.errors import UnsupportedError, UsageError
from fedge.io import durable
from fedge.io.weight_file import map_weights
from fedge.lora import DENSE, LoraConfig
from fedge.release import (
    FORMAT,
    MANIFEST,
    SIGNATURE,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    TensorPlace,
    encode_manifest,
    sign_manifest,
)
from quantize import gates
from quantize.audio_gates import AudioExam
from quantize.blocks import adapted_modules, check_layers, graph_config
from quantize.chat import chat_format
from quantize.choice import Choice, choose, is_exact
from quantize.classifier_gates import ClassifierExam, longest_text
from quantize.classify import classifier_graphs
from quantize.decode import centred_matrices, inference_graph
from quantize.encoders import with_targets
from quantize.fit import FITTED, fit
from quantize.formats import EMBEDDING_FORMAT, WeightFormat
from quantize.graph import operators
from quantize.probe import make_probe
from quantize.reference import positions_max
from quantize.sentence_graphs import SentenceExam, sentence_graphs
from quantize.source import Source, file_digest, load
from quantize.training import head_dim, training_graphs
from quantize.weights import Progress, quantise, write_weights

# 1.22.1 has no GatherBlockQuantized over uint8; 1.23.2, 1.24.1 and 1.32.0 give the same digits.
RUNTIME_MIN: Final = "1.23.2"
HEAD_ROWS: Final = 4096  # 4096 x 64 positions of logits are 1 MB: they stay in cache


def quantize(
    source: str,
    out: Path,
    key: Ed25519PrivateKey,
    *,
    lora: LoraConfig,
    name: str = "",
    weights_format: str | None = None,
    memory_bytes: int | None = None,
    head_rows: int = HEAD_ROWS,
    progress: Progress | None = None,
    chosen: Callable[[Choice], None] | None = None,
    classes: Sequence[str] = (),
    seconds: float = 0,
    task: str = "",
) -> Manifest:
    """Write the bundle of the model `source` to the folder `out`, signed by `key`, and return its manifest.

    `progress(phase, fraction)` is told how far each phase is, `chosen` which format was taken and why; `memory_bytes`
    is that of the smallest board; `classes` are names for what a classifier tells apart, `seconds` the window of one
    that hears; `task` is what the bundle is for, "" = what the folder says.

    Raises UsageError when `out` exists, the refusals of `source.load`, GateError when the graphs do not compute what
    torch computes, StorageError. Nothing is left behind.
    """
    tell = progress or _silent
    if out.exists():
        raise UsageError(
            "the bundle folder exists already", field="out", value=str(out), hint="Choose another one"
        )
    tell("read", 0.0)
    loaded = load(source, classes, seconds, task)
    check_layers(loaded.model)
    _ = loaded.anatomy  # refuses what cannot be taken apart before anything is written
    choice = choose(loaded, weights_format, memory_bytes=memory_bytes)
    fmt = choice.format
    if chosen is not None:
        chosen(choice)
    if loaded.task != "generate":
        lora = with_targets(loaded.model, lora)
        lora = msgspec.structs.replace(lora, modules_to_save=loaded.anatomy.tail.modules)
    shapes = adapted_modules(loaded.model, graph_config(loaded.model, lora))
    tell("read", 1.0)
    with torch.random.fork_rng(), _staging(out) as folder:
        torch.manual_seed(0)
        files = _Build(loaded, lora, fmt, head_rows, folder, tell)
        manifest = files.manifest(shapes, name or loaded.name, key.public_key().public_bytes_raw().hex())
        data = encode_manifest(manifest)
        _write(folder / MANIFEST, data)
        _write(folder / SIGNATURE, sign_manifest(data, key))
    tell("sign", 1.0)
    return manifest


class _Build:
    """The files of one bundle, in its staging folder."""

    def __init__(
        self,
        source: Source,
        lora: LoraConfig,
        fmt: WeightFormat,
        head_rows: int,
        folder: Path,
        tell: Progress,
    ) -> None:
        self._source, self._lora, self._format, self._head_rows = source, lora, fmt, head_rows
        self._folder = folder
        lora = graph_config(source.model, lora)  # of here on: what the graphs are made for
        exam = _exam_for(source).of(source, exact=is_exact(source, fmt.name), fmt=fmt, lora=lora)
        # A fit needs text that the model writes.
        fits = fmt.name in FITTED and not exam.exact and source.task == "generate"
        fitted = fit(source, fmt, tell) if fits else None
        tensors = quantise(source, fmt, tell, fitted)
        self._places: Mapping[str, TensorPlace] = write_weights(folder / WEIGHTS, tensors)
        centred = centred_matrices(tensors, fmt)
        del tensors
        infer = None
        if source.task != "generate":
            make = classifier_graphs if source.classes else sentence_graphs
            graphs = make(source.anatomy, lora, fmt, tell)
        else:
            graphs = training_graphs(source.anatomy, lora, fmt, tell)
            try:
                infer = inference_graph(source.anatomy, lora, fmt, self._places, centred=centred)
                graphs["infer.onnx"] = infer
            except UnsupportedError as refusal:
                # It trains all the same; manifest.files says that it cannot write.
                tell(refusal.what, 1.0)
        tell("export", 1.0)
        self._operators: set[str] = set()
        for file, graph in graphs.items():
            self._add(file, graph)
        if source.tokenizer:
            _write(folder / TOKENIZER, source.tokenizer)
        draft = gates.Draft(folder, self._places, frozenset(self._operators), infer, head_rows)
        self._gates = exam.run(draft, tell)

    def _add(self, file: str, graph: onnx.ModelProto) -> None:
        _write(self._folder / file, graph.SerializeToString(deterministic=True))
        self._operators |= operators(graph)

    def manifest(self, shapes: dict[str, tuple[int, int]], name: str, publisher: str) -> Manifest:
        source, anatomy = self._source, self._source.anatomy
        config = source.model.config
        made = Manifest(
            format=FORMAT,
            model=name,
            architecture=source.architecture,
            licence=source.licence,
            source_sha256=source.sha256,
            weights_format=self._format.name,
            embedding_format=EMBEDDING_FORMAT,
            layers=len(anatomy.layers),
            hidden=anatomy.hidden,
            vocabulary=anatomy.vocabulary,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim(source.model),
            positions_max=positions_max(config) if source.task == "generate" else longest_text(source),
            head_tied=anatomy.head_tied,
            layer_path=anatomy.layers_path,
            layer_kinds=anatomy.kinds,
            logit_cap=anatomy.logit_cap,
            eos_id=source.eos_id,
            pad_id=source.pad_id,
            lora=self._lora,
            lora_shapes=shapes,
            aux=anatomy.aux_outputs,
            head_rows=self._head_rows if source.task == "generate" else 0,
            operators=tuple(sorted(self._operators)),
            runtime_min=RUNTIME_MIN,
            tensors=dict(self._places),
            files={
                path.name: FileEntry(size=path.stat().st_size, sha256=file_digest(path))
                for path in sorted(self._folder.iterdir())
            },
            gates=self._gates,
            chat=chat_format(source.chat_template, source.template_tokens, source.tokenizer, source.eos_id),
            publisher=publisher,
            task=source.task,
            classes=source.classes,
            dense={name: self._places[DENSE + name].shape for name in anatomy.tail.trained},
            audio=source.audio or msgspec.UNSET,
            vectors=source.vectors or msgspec.UNSET,
        )
        if source.task != "generate":
            return made
        tensors = map_weights(self._folder / WEIGHTS, self._places)
        probe = make_probe(self._folder, tensors, anatomy, made.layout, self._format, self._head_rows)
        return msgspec.structs.replace(made, probe=probe)


def _exam_for(source: Source) -> type[gates.Exam | ClassifierExam]:
    if source.task == "generate":
        return gates.Exam
    if source.vectors is not None:
        return SentenceExam
    return AudioExam if source.audio else ClassifierExam


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` that becomes `out` when the block ends well and vanishes when it does not."""
    durable.make_folder(out.parent)
    durable.sweep(out.parent)
    part = durable.part_name(out)
    try:
        part.mkdir()
        yield part
        durable.sync_folder(part)
        part.rename(out)
        durable.sync_folder(out.parent)
    except OSError as error:
        raise durable.storage_error(error, out) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _silent(phase: str, fraction: float) -> None:
    pass
