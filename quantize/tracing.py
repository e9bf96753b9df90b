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
from importlib import import_module
from typing import Any, Final

import onnx
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from quantize.placeholder import translations

OPSET: Final = 18  # the lowest that torch's exporter writes; older runtimes read it too


@contextmanager
def tracing() -> Iterator[None]:
    """Within, torch traces fast: its cache of shapes costs a third of an export and is hardly ever hit."""
    with ExitStack() as settings:
        settings.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        settings.enter_context(_without_stack_traces())
        settings.enter_context(_collector_resting())
        yield


def program_of(traced: GraphModule, sizes: ShapeEnv) -> ExportedProgram | None:
    """The trace as it is, as an exported program; None where `torch.export` has to look at it.

    That is a trace with tensors of its own, one that changes a tensor in place, and one that holds for some sizes
    only: tracing it once more is how torch lifts, functionalises and refuses those.
    """
    plain = all(map(changes_nothing, traced.graph.nodes))
    if sizes.guards or sizes.replacements or not plain or not _ask_inputs_for_sizes(traced):
        return None
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    *_, end = traced.graph.nodes
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in end.args[0]],
    )
    return ExportedProgram(traced, traced.graph, signature, {}, {}, [])


def changes_nothing(node: Node) -> bool:
    """Whether the node is an input, the output, or an operator that changes nothing."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable


def _ask_inputs_for_sizes(traced: GraphModule) -> bool:
    """Read every size off an input, and compute every product of sizes once.

    A trace reads sizes off whatever is at hand, so that a gradient would wait for a tensor of which it needs the
    length alone. Like `torch.export` the batch is asked of the first input that has it, and a length of the last: a
    bundle is the same, bit for bit, by either way. Returns False when only an inner tensor has some size.
    """
    graph, places, known = traced.graph, dict[Any, tuple[Node, int]](), dict[Any, Node]()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and not (axis == 0 and size.node.expr in places):
                places[size.node.expr] = (node, axis)
    with graph.inserting_before(inputs[-1].next):
        for expression, (node, axis) in places.items():
            known[expression] = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
            known[expression].meta["val"] = node.meta["val"].shape[axis]
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        first = known.setdefault(value.node.expr, node)
        if first is not node:
            node.replace_all_uses_with(first)
        elif node.target is torch.ops.aten.sym_size.int and value.node.expr not in places:
            return False
    graph.eliminate_dead_code()
    traced.recompile()
    return True


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
    registry = _registry()
    if registry is None:  # a torch that keeps its table elsewhere reads it for every graph
        yield
        return
    read = registry.__dict__["from_torchlib"]

    def copy_of_table(opset_version: int = OPSET) -> Any:
        table = copy.copy(_table(read.__get__(None, registry), opset_version))
        table.functions = {operator: list(found) for operator, found in table.functions.items()}
        return table

    registry.from_torchlib = staticmethod(copy_of_table)
    try:
        yield
    finally:
        registry.from_torchlib = read


def _registry() -> Any:
    """torch's class of tables of translations, or None. It is private: another version may have it elsewhere."""
    try:
        home = import_module("torch.onnx._internal.exporter._registration")
    except ImportError:
        return None
    found = getattr(home, "ONNXRegistry", None)
    return found if "from_torchlib" in getattr(found, "__dict__", {}) else None


@cache
def _table(read: Any, opset_version: int) -> Any:
    return read(opset_version=opset_version)


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
