"""Manifests: what a bundle consists of, and the signature that makes it believable.

A bundle is a folder: one weight file, the graphs that read it, the tokenizer, `manifest.json` and `manifest.sig`.
The manifest names every file with its SHA-256 and every tensor with its place in the weight file; the detached
Ed25519 signature covers the manifest's bytes. So one 32-byte hash of the manifest pins everything that a device
will ever run. Nothing is opened before its hash is right.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedge.audio import AudioInput, check_audio
from fedge.chat import ChatFormat
from fedge.errors import IntegrityError, UnsupportedError
from fedge.limits import BUNDLE_FILE_BYTES_MAX, MANIFEST_BYTES_MAX
from fedge.lora import LAYER_PATH, AdapterLayout, LoraConfig

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
WEIGHTS: Final = "weights.bin"
TOKENIZER: Final = "tokenizer.json"
FORMAT: Final = 2
TASKS: Final = ("generate", "classify", "embed")
_DOMAIN: Final = b"fedge bundle manifest v1\x00"

# Everything a bundle's graphs may be made of: stock operators that compute from their inputs alone. No loops, no
# branches, nothing that reads files, no custom libraries, no nested model formats.
OPERATORS_ALLOWED: Final = frozenset(
    str.split(
        """
        Abs Add And ArgMax AveragePool BitShift BitwiseAnd Cast Clip Concat Constant ConstantOfShape Conv Cos
        CumSum DequantizeLinear Div Equal Erf Exp Expand Flatten Gather GatherElements GatherND Gelu Gemm Greater
        GreaterOrEqual Identity IsNaN LayerNormalization Less LessOrEqual Log MatMul MatMulInteger Max Min Mul
        Neg Not Or Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape
        ScatterElements ScatterND Shape Sigmoid Sign Sin Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile
        Transpose Trilu Unsqueeze Where
        com.microsoft:DynamicQuantizeMatMul com.microsoft:FastGelu com.microsoft:FusedMatMul
        com.microsoft:GatherBlockQuantized com.microsoft:Gelu com.microsoft:GroupQueryAttention
        com.microsoft:MatMulBnb4 com.microsoft:MatMulIntegerToFloat com.microsoft:MatMulNBits
        com.microsoft:QuickGelu
        com.microsoft:RotaryEmbedding com.microsoft:SkipLayerNormalization
        com.microsoft:SkipSimplifiedLayerNormalization SimplifiedLayerNormalization
        """
    )
)


class TensorPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor lies in the weight file: `dtype` is a numpy name, the layout is C order."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle gives for `probe_tokens`: mean loss, and norm of the gradient by every B, where B is zero and A is
    that of a seed of zeros. `tolerance` is relative.
    """

    tokens: int
    loss: float
    gradient_norm: float
    tolerance: float


class SentenceVectors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The vector that a bundle makes of a text: the mean over its tokens or the state of the first, of length one if
    `normalised`.
    """

    pooling: Literal["mean", "cls"] = "mean"
    normalised: bool = True


def probe_tokens(count: int, vocabulary: int) -> list[int]:
    """The fixed input: ids from all over the vocabulary, the same everywhere."""
    return [(i * 7_919 + 11) % vocabulary for i in range(count)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a device must know about a bundle before it opens any other file of it."""

    format: int
    model: str
    architecture: str
    licence: str
    source_sha256: str
    weights_format: str  # of the blocks, e.g. "int4d"
    embedding_format: str  # of embedding and head, e.g. "int8g"
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    positions_max: int
    head_tied: bool
    eos_id: int
    pad_id: int
    lora: LoraConfig
    lora_shapes: dict[str, tuple[int, int]]  # target module path in a block -> (out, in)
    aux: tuple[str, ...]  # outputs of the prologue that every block reads beside x
    head_rows: int  # vocabulary rows per pass of the streamed cross-entropy
    operators: tuple[str, ...]
    runtime_min: str
    tensors: dict[str, TensorPlace]
    files: dict[str, FileEntry]
    gates: dict[str, float]
    publisher: str  # Ed25519 public key, hexadecimal
    task: str = "generate"  # what it is for: one of TASKS
    layer_kinds: tuple[str, ...] = ()  # per layer: its input n is aux "n@kind" where that is; () = all alike
    logit_cap: float = 0.0  # c of the soft-cap c tanh(z / c) on logits; 0 = none
    classes: tuple[str, ...] = ()  # label names of a classifier, by index
    dense: dict[str, tuple[int, ...]] = {}  # trained in full, too; starts at tensor "dense/NAME"
    chat: ChatFormat | None = None  # how a conversation is written; None: the model has no chat template
    probe: Probe | None = None  # a fixed input and what it must give; None: not checked
    layer_path: str = LAYER_PATH  # of the list of layers, from the model's root: PEFT's names are made of it
    # What a classifier of recordings hears. Not in the manifests of texts, so that a device which knows nothing of it
    # refuses the one and takes the other.
    audio: AudioInput | msgspec.UnsetType = msgspec.UNSET
    # What a bundle for sentence vectors makes of a text; not in other manifests, for the same reason.
    vectors: SentenceVectors | msgspec.UnsetType = msgspec.UNSET

    @property
    def hears(self) -> AudioInput | None:
        """How recordings are given to the model; None for a model of texts."""
        return None if isinstance(self.audio, msgspec.UnsetType) else self.audio

    @property
    def embeds(self) -> SentenceVectors | None:
        """What the vector of a text is; None for a model that gives none."""
        return None if isinstance(self.vectors, msgspec.UnsetType) else self.vectors

    @property
    def layout(self) -> AdapterLayout:
        """The order of the adapter's numbers. Raises UnsupportedError when it is out of range."""
        return AdapterLayout.of(
            self.layers, self.lora_shapes, self.lora, layer_path=self.layer_path, dense=self.dense
        )


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes: sorted keys, so the same bundle has the same hash."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)


def bundle_digest(manifest: Manifest) -> str:
    """The name of a bundle: SHA-256 of its manifest's bytes, in hexadecimal."""
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()


def sign_manifest(data: bytes, key: Ed25519PrivateKey) -> bytes:
    """Detached 64-byte Ed25519 signature over the manifest's bytes (RFC 8032)."""
    return key.sign(_DOMAIN + data)


def open_manifest(
    data: bytes, signature: bytes, *, publisher: bytes | None = None, sha256: bytes | None = None
) -> Manifest:
    """The manifest in `data`, verified. `publisher` (32 bytes) and `sha256` pin signer and content when known.

    Raises IntegrityError for a wrong hash, signer or signature, UnsupportedError for a newer format.
    """
    if len(data) > MANIFEST_BYTES_MAX:
        raise IntegrityError("manifest is too large", field="bytes", value=len(data))
    if sha256 is not None and hashlib.sha256(data).digest() != sha256:
        raise IntegrityError(
            "manifest is not the one announced", field="sha256", value=hashlib.sha256(data).hexdigest()
        )
    try:
        _require_format(msgspec.json.decode(data, type=_Format).format)
        manifest = msgspec.json.decode(data, type=Manifest)
        signer = bytes.fromhex(manifest.publisher)
    except (msgspec.MsgspecError, ValueError) as error:
        raise IntegrityError("manifest cannot be read", field=MANIFEST, value=str(error)) from error
    if publisher is not None and signer != publisher:
        raise IntegrityError(
            "bundle was signed by somebody else", field="publisher", value=manifest.publisher
        )
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, _DOMAIN + data)
    except (InvalidSignature, ValueError) as error:
        raise IntegrityError(
            "manifest signature is wrong", field=SIGNATURE, value=signature[:8].hex()
        ) from error
    _check(manifest)
    return manifest


class _Format(msgspec.Struct):
    """Read before the rest: another format may have fields that are not known here."""

    format: int


def _require_format(found: int) -> None:
    if found != FORMAT:
        newer = "The bundle is newer: update fedge on this machine"
        older = "The bundle is older: make it again with `fedge quantize`"
        raise UnsupportedError(
            "bundle format is not known here",
            field="format",
            value=found,
            hint=newer if found > FORMAT else older,
        )


def _check(manifest: Manifest) -> None:
    if manifest.task not in TASKS:
        raise UnsupportedError("task of the bundle is not known here", field="task", value=manifest.task)
    if manifest.hears is not None:
        check_audio(manifest.hears, manifest.positions_max)
        if manifest.task != "classify" or not manifest.classes:
            raise UnsupportedError(
                "a bundle that hears tells classes apart", field="task", value=manifest.task
            )
    if (manifest.embeds is not None) != (manifest.task == "embed"):
        raise UnsupportedError(
            "a bundle for vectors says what they are", field="vectors", value=manifest.task
        )
    if manifest.layer_kinds and len(manifest.layer_kinds) != manifest.layers:
        raise IntegrityError(
            "a kind for every layer, or none", field="layer_kinds", value=manifest.layer_kinds
        )
    for name, entry in manifest.files.items():
        if "/" in name or name.startswith(".") or name in (MANIFEST, SIGNATURE):
            raise IntegrityError("file name is not allowed in a bundle", field="files", value=name)
        if not 0 <= entry.size <= BUNDLE_FILE_BYTES_MAX or len(entry.sha256) != 64:
            raise IntegrityError("file entry is out of range", field=name, value=entry)
