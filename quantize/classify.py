"""The training graphs of an encoder, and the head of a classifier as one graph.

`classify.onnx` takes the last layer's output and everything that is trained in full, and gives loss and logits of every
row, the gradient by the hidden states, and the gradient by each trained tensor. Gradients are of the *sum* of the
losses: sums add up over pieces of a batch, means do not.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from fedge.lora import DENSE, LoraConfig
from quantize.anatomy import Anatomy
from quantize.blocks import block_parameters, frozen_block
from quantize.features import features_and_head
from quantize.formats import EMBEDDING_FORMAT, WeightFormat
from quantize.graph import canonical, expand_powers, fold, select
from quantize.inputs import MASK, example, name_of, sizes
from quantize.joint import EXAMPLE, export_block, outer_dimensions, traced_graph
from quantize.late import late_weights
from quantize.lower import lower
from quantize.pieces import block_in_pieces
from quantize.prologue import TABLE, export_prologue
from quantize.tail import Tail
from quantize.variants import block_variants
from quantize.watching import untraceable
from quantize.weights import Progress


def classifier_graphs(
    anatomy: Anatomy, lora: LoraConfig, fmt: WeightFormat, tell: Progress
) -> dict[str, onnx.ModelProto]:
    """File name -> graph: those of an encoder, and the head, in two as well if it can."""
    whole = expand_powers(fold(export_head(anatomy)))
    return encoder_graphs(anatomy, lora, fmt, tell, {"classify.onnx": whole, **features_and_head(whole)})


def encoder_graphs(
    anatomy: Anatomy,
    lora: LoraConfig,
    fmt: WeightFormat,
    tell: Progress,
    ending: Mapping[str, onnx.ModelProto],
) -> dict[str, onnx.ModelProto]:
    """File name -> graph: prologue, block there and back with its variants, and the `ending` behind the last block."""
    block = block_in_pieces(anatomy, frozen_block(anatomy, lora))
    _, frozen = block_parameters(block)
    shapes = {name: tuple(value.shape) for name, value in frozen.items() if name.endswith(".w")}
    joint = expand_powers(fold(export_block(anatomy, block)))
    tell("export", 0.5)
    backward = [value.name for value in joint.graph.output if value.name != "y"]
    table = {} if anatomy.embedding is None else {TABLE: ("V", anatomy.hidden)}
    graphs = {
        "prologue.onnx": lower(fold(export_prologue(anatomy)), table, EMBEDDING_FORMAT),
        "block_fwd.onnx": lower(select(joint, ["y"]), shapes, fmt.name),
        "block_bwd.onnx": lower(select(joint, backward), shapes, fmt.name),
        **ending,
    }
    variants = block_variants(joint)
    graphs |= {f"{name}.onnx": lower(graph, shapes, fmt.name) for name, graph in variants.items()}
    tell("export", 0.9)
    return {name: canonical(late_weights(graph)) for name, graph in graphs.items()}


def export_head(anatomy: Anatomy) -> onnx.ModelProto:
    """Inputs h, input_ids, attention_mask, labels [B], dense/NAME, frozen NAME; outputs nll, logits, gh, g:dense/NAME.

    What the head does not read is no input.
    """
    tail = Tail(anatomy.model, anatomy.layers, tuples=anatomy.tuples)
    own = dict(tail.skeleton.named_parameters())
    trained, frozen = anatomy.tail.trained, anatomy.tail.frozen

    def joint(h: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        h = h.detach().requires_grad_()
        leaves = {n: t.detach().requires_grad_() for n, t in zip(trained, tensors, strict=False)}
        fixed = dict(zip(frozen, tensors[len(trained) :], strict=True))
        logits = tail(h, ids, mask, {**leaves, **fixed})
        # Spelt out: the derivative of aten.nll_loss and of gather become longer graphs.
        lower = logits - logits.detach().amax(-1, keepdim=True)
        chosen = (labels[:, None] == torch.arange(logits.shape[-1])[None]).to(logits.dtype)
        nll = lower.exp().sum(-1).log() - (lower * chosen).sum(-1)
        return (nll, logits, *torch.autograd.grad(nll.sum(), [h, *leaves.values()]))

    given, mask = example(anatomy.model, *EXAMPLE)
    tensors = (
        torch.randn(*mask.shape, anatomy.hidden),
        given,
        torch.ones_like(mask),
        torch.zeros(EXAMPLE[0], dtype=torch.long),
        *(own[name].detach() for name in (*trained, *frozen)),
    )
    b, s = outer_dimensions(anatomy)
    axes = sizes(anatomy.model, b, s)
    shapes = (axes, axes, axes, {0: b}, *[None] * (len(tensors) - 4))
    dense = [DENSE + name for name in trained]
    names = ("h", name_of(anatomy.model), MASK, "labels", *dense, *frozen)
    outputs = ("nll", "logits", "gh", *(f"g:{name}" for name in dense))
    try:
        # What the embeddings still do for stubs that do not listen is left out.
        return read_only(traced_graph(joint, tensors, shapes, names, outputs, pure=True))
    except Exception as error:  # whatever a head's own code may raise under a tracer
        raise untraceable("what comes after the layers", anatomy.model, error) from error


def read_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without inputs that nothing reads."""
    used = {name for node in model.graph.node for name in node.input}
    for value in [value for value in model.graph.input if value.name not in used]:
        model.graph.input.remove(value)
    return model
