"""How torch's tracer and its ONNX exporter are put to work: nothing is done twice, nothing kept that is thrown away.

Rule: no setting here changes a graph. The exporter would read the sources of two thousand translations anew for each
of the four to six graphs of a bundle; the tracer would note where each node was written, which `graph.canonical`
takes out again; and Python's collector of cycles would walk all of torch, over and over, as a trace makes objects.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Final

import onnx
import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

from quantize.placeholder import translations

OPSET: Final = 18  # the lowest that torch's exporter writes; older runtimes read it too
_read_table: Final = ONNXRegistry.from_torchlib


@contextmanager
def tracing() -> Iterator[None]:
    """Within, torch traces fast: its cache of shapes costs a third of an export and is hardly ever hit."""
    with ExitStack() as settings:
        settings.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        settings.enter_context(_without_stack_traces())
        settings.enter_context(_collector_resting())
        yield


def onnx_of(program: ExportedProgram) -> onnx.ModelProto:
    """The ONNX graph of an exported program, its values named after the program's."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # one line per missing torchvision operator
    with warnings.catch_warnings(), tracing(), _translations_read_once():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    model: onnx.ModelProto = exported.model_proto
    return model


@contextmanager
def _translations_read_once() -> Iterator[None]:
    """Within, the exporter gets a copy of torch's table of translations; it adds to it those of this package."""
    read = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_copy_of_table)
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = read


def _copy_of_table(opset_version: int = OPSET) -> ONNXRegistry:
    table = copy.copy(_table(opset_version))
    table.functions = {operator: list(found) for operator, found in table.functions.items()}
    return table


@cache
def _table(opset_version: int) -> ONNXRegistry:
    return _read_table(opset_version=opset_version)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    settings, name = torch.fx.config, "do_not_emit_stack_traces"
    before = getattr(settings, name, None)
    if before is None:  # a torch that does not have the setting
        yield
        return
    setattr(settings, name, True)
    try:
        yield
    finally:
        setattr(settings, name, before)


@contextmanager
def _collector_resting() -> Iterator[None]:
    """A trace holds one layer, without numbers: what waits for the collector meanwhile is small."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
