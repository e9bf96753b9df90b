"""The training graphs of a sentence encoder, and its gates.

`pool.onnx` makes the vectors of the last block's output, `pool_bwd.onnx` the gradient by that output from the one by
the vectors. The loss compares the texts of a whole batch with each other, so it is no graph of pieces: the device
computes it from the vectors (`edge_agent.trainer.pairs`), and here torch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx
import torch
from torch import Tensor

from fedge.lora import LoraConfig
from quantize.anatomy import Anatomy
from quantize.classifier_gates import (
    BLOCK_GRAPHS,
    ClassifierExam,
    ClassifierRunner,
    LabelledBatch,
    logits_of,
)
from quantize.classify import encoder_graphs, read_only
from quantize.formats import WeightFormat
from quantize.graph import expand_powers, fold, select
from quantize.inputs import MASK, example, name_of, sizes
from quantize.joint import EXAMPLE, outer_dimensions, traced_graph
from quantize.runner import Array
from quantize.tail import Tail
from quantize.watching import untraceable
from quantize.weights import Progress

POOL, POOL_BACKWARD = "pool", "pool_bwd"
SCALE: Final = 20.0  # of the similarities, as sentence-transformers has it


def sentence_graphs(
    anatomy: Anatomy, lora: LoraConfig, fmt: WeightFormat, tell: Progress
) -> dict[str, onnx.ModelProto]:
    """File name -> graph: those of an encoder, and the pooling there and back."""
    joint = expand_powers(fold(export_pooling(anatomy)))
    there, back = (read_only(select(joint, [name])) for name in ("v", "gh"))
    return encoder_graphs(anatomy, lora, fmt, tell, {f"{POOL}.onnx": there, f"{POOL_BACKWARD}.onnx": back})


def export_pooling(anatomy: Anatomy) -> onnx.ModelProto:
    """Inputs h, input_ids, attention_mask, gv [B, D], frozen NAME; outputs v [B, D], gh."""
    tail = Tail(anatomy.model, anatomy.layers, tuples=anatomy.tuples)
    own, frozen = dict(tail.skeleton.named_parameters()), anatomy.tail.frozen

    def joint(h: Tensor, ids: Tensor, mask: Tensor, gv: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        h = h.detach().requires_grad_()
        v = tail(h, ids, mask, dict(zip(frozen, tensors, strict=True)))
        return v, torch.autograd.grad(v, h, gv)[0]

    given, mask = example(anatomy.model, *EXAMPLE)
    h = torch.randn(*mask.shape, anatomy.hidden)
    values = [own[name].detach() for name in frozen]
    tensors = (h, given, torch.ones_like(mask), torch.randn(EXAMPLE[0], anatomy.hidden), *values)
    b, s = outer_dimensions(anatomy)
    axes = sizes(anatomy.model, b, s)
    shapes = (axes, axes, axes, {0: b}, *[None] * len(frozen))
    names = ("h", name_of(anatomy.model), MASK, "gv", *frozen)
    try:
        return traced_graph(joint, tensors, shapes, names, ("v", "gh"), pure=True)
    except Exception as error:  # whatever a model's own code may raise under a tracer
        raise untraceable("what comes after the layers", anatomy.model, error) from error


class PairBatch(LabelledBatch):
    """Texts of which the second half are what belongs to the first half, one each; labels say nothing."""

    def loss(self, logits: Tensor) -> Tensor:
        """The mean loss of vectors [2 P, D]: each of P texts is to find its own among the others' as well.

        In-batch negatives, by cosine (Henderson et al. 2017, arXiv 1705.00652, section 4.4).
        """
        found, wanted = torch.nn.functional.normalize(logits).chunk(2)
        return torch.nn.functional.cross_entropy(SCALE * found @ wanted.t(), torch.arange(len(found)))


class SentenceRunner(ClassifierRunner):
    """Loss, vectors and gradients by the graphs of a bundle; the loss between the graphs is torch's."""

    graphs: ClassVar[tuple[str, ...]] = (*BLOCK_GRAPHS, POOL, POOL_BACKWARD)

    def answers(
        self, batch: LabelledBatch, adapter: Mapping[str, Array]
    ) -> tuple[Array, Array, dict[str, Array]]:
        """(mean loss [1], vectors [B, D], gradients of the mean loss)."""
        inputs, aux = self.forward(batch.ids, batch.mask, adapter)
        feeds = {"h": inputs[-1], "input_ids": batch.ids, MASK: batch.mask}
        vectors = self._run(POOL, feeds)[0]
        leaf = torch.from_numpy(vectors).requires_grad_()
        loss = batch.loss(leaf)
        gv = torch.autograd.grad(loss, leaf)[0].numpy()
        flow = self._run(POOL_BACKWARD, feeds, gv=gv)[0]
        return loss.detach().numpy()[None], vectors, self.backward(flow, inputs, aux, adapter)


@dataclass(frozen=True, slots=True)
class SentenceExam(ClassifierExam):
    """The exam of a sentence encoder: its vectors are the logits that `ClassifierExam` speaks of."""

    runner: ClassVar[type[ClassifierRunner]] = SentenceRunner
    batches: ClassVar[type[LabelledBatch]] = PairBatch
    cut_shapes: ClassVar = ((4, 5), (6, 17), (4, 40))  # a lone pair would have no loss

    def _quantisation(self) -> dict[str, float]:
        found = ClassifierExam._quantisation(self)
        vectors = logits_of(self.source.model, self.batch)
        cosine = torch.nn.functional.cosine_similarity(vectors, self.logits).min().item()
        return {"vector_change": found["logits_change"], "vector_cosine": cosine}

    def _whole(self, runner: ClassifierRunner) -> dict[str, float]:
        found = ClassifierExam._whole(self, runner)
        return {name.replace("logits", "vector"): value for name, value in found.items()}
