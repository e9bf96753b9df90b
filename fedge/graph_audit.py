"""What an ONNX graph would do, read from its bytes before any runtime opens it.

A runtime that is handed a graph loads the operators that it names and the files that its tensors point to. So both are
read first, by a walk over the protocol-buffer wire format (protobuf.dev "Encoding"; `onnx.proto3`) that knows a dozen
fields and no library: a board has none. Whatever the walk does not know it passes over by its length; what could hold
other code or other files (functions, sub-graphs, training parts, sparse or external tensors) it names.

The rule: a graph of a bundle computes from its inputs and from the bundle's weight file with operators of one list,
and reads nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fedge.errors import IntegrityError, UnsupportedError
from fedge.release import OPERATORS_ALLOWED, WEIGHTS

Value = int | memoryview
GRAPH_BYTES_MAX: Final = (
    256 * 1024**2
)  # of one graph file; the largest real one is under 2 MB, a rotary table more
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX: Final = 10
_DEFAULT_DOMAINS: Final = ("", "ai.onnx")

# Field numbers of onnx.proto3.
_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTIONS = 1, 7, 8, 20, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_EXTERNAL: Final = 1  # TensorProto.DataLocation


@dataclass(frozen=True, slots=True)
class External:
    """A tensor whose numbers lie in another file, as the graph says it; a length of -1 is none given."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass(slots=True)
class GraphFacts:
    """`operators` as "Name" or "domain:Name"; `odd` names parts that no bundle has."""

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    operators: set[str] = field(default_factory=set)
    external: list[External] = field(default_factory=list)
    odd: set[str] = field(default_factory=set)


def graph_facts(data: bytes | memoryview) -> GraphFacts:
    """Read a serialised ModelProto. Raises IntegrityError when the bytes are no such message."""
    facts = GraphFacts()
    try:
        for number, value in _fields(memoryview(data)):
            if number == _MODEL_IR:
                facts.ir_version = _int(value)
            elif number == _MODEL_OPSET:
                _opset(_message(value), facts)
            elif number == _MODEL_GRAPH:
                _graph(_message(value), facts)
            elif number == _MODEL_TRAINING:
                facts.odd.add("training part")
            elif number == _MODEL_FUNCTIONS:
                facts.odd.add("functions of its own")
    except (_Malformed, UnicodeDecodeError, ValueError) as error:
        raise IntegrityError("graph cannot be read", field="graph", value=str(error)) from error
    if not facts.operators:
        raise IntegrityError("graph cannot be read: it has no node", field="graph")
    return facts


def check_graph(name: str, facts: GraphFacts, *, weights_bytes: int) -> None:
    """Refuse a graph of a bundle that would use anything but allowed operators, its inputs and the weight file.

    Raises UnsupportedError for an operator or part, IntegrityError for a file or a place in it; both name graph and
    tensor.
    """
    for operator in sorted(facts.operators - OPERATORS_ALLOWED):
        raise UnsupportedError(
            f"{name} has an operator that is not allowed on a device", field="operator", value=operator
        )
    for odd in sorted(facts.odd):
        raise UnsupportedError(f"{name} has a part that is not allowed on a device", field="part", value=odd)
    for external in facts.external:
        if external.location != WEIGHTS:
            raise IntegrityError(
                f"{name} reads a file that is not the bundle's: tensor {external.tensor}",
                field="location",
                value=external.location,
            )
        length = max(external.length, 0)
        if external.offset < 0 or external.length < -1 or external.offset + length > weights_bytes:
            raise IntegrityError(
                f"{name} reads outside the weight file",
                field=external.tensor,
                value=(external.offset, external.length),
            )


class _Malformed(Exception):
    """The bytes break the wire format."""


def _opset(data: memoryview, facts: GraphFacts) -> None:
    found = dict(_fields(data))
    domain, version = found.get(_OPSET_DOMAIN, memoryview(b"")), found.get(_OPSET_VERSION, 0)
    facts.opsets[_text(domain)] = _int(version)


def _graph(data: memoryview, facts: GraphFacts) -> None:
    for number, value in _fields(data):
        if number == _GRAPH_NODE:
            _node(_message(value), facts)
        elif number == _GRAPH_TENSOR:
            _tensor(_message(value), facts)
        elif number == _GRAPH_SPARSE:
            facts.odd.add("sparse tensor")


def _node(data: memoryview, facts: GraphFacts) -> None:
    operator, domain = "", ""
    for number, value in _fields(data):
        if number == _NODE_OPERATOR:
            operator = _text(value)
        elif number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_ATTRIBUTE:
            _attribute(_message(value), facts)
    facts.operators.add(operator if domain in _DEFAULT_DOMAINS else f"{domain}:{operator}")


def _attribute(data: memoryview, facts: GraphFacts) -> None:
    for number, value in _fields(data):
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _tensor(_message(value), facts)
        elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            facts.odd.add("graph inside a node")
        elif number in _ATTRIBUTE_SPARSE:
            facts.odd.add("sparse tensor")


def _tensor(data: memoryview, facts: GraphFacts) -> None:
    name, outside, entries = "", False, {}
    for number, value in _fields(data):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_LOCATION:
            outside = outside or _int(value) == _EXTERNAL
        elif number == _TENSOR_EXTERNAL:
            entry = dict(_fields(_message(value)))
            key, text = (_text(entry.get(n, memoryview(b""))) for n in (_ENTRY_KEY, _ENTRY_VALUE))
            if key in entries:
                facts.odd.add("tensor with two places")
            entries[key] = text
    if outside or entries:
        numbers = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
        facts.external.append(External(name, entries.get("location", ""), *numbers))


# ---------------------------------------------------------------- the wire format
def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise _Malformed(f"wire type {kind}")
        if size > end - at:
            raise _Malformed("a field is longer than its message")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 7 * _VARINT_BYTES_MAX, 7):
        if at >= len(data):
            raise _Malformed("a number is cut off")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise _Malformed("a number is too long")


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise _Malformed("bytes where a number belongs")
    return value


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number where a message belongs")
    return value


def _text(value: Value) -> str:
    return bytes(_message(value)).decode()
