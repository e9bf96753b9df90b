"""The export in a child process: torch's gigabyte goes back to the system when it is done."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.errors import UnavailableError
from fedge.lora import LoraConfig


def quantize_in_child(
    source: str, out: Path, key: bytes, name: str, tell: Callable[[str, float], None]
) -> None:
    """`quantize.bundle.quantize`, elsewhere. Raises what it raises, UnavailableError when the child is killed."""
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(there, source, out, key, name), daemon=True)
    child.start()
    there.close()
    failure: Exception | None = None
    while True:
        try:
            said = here.recv()
        except EOFError:
            break
        if isinstance(said, Exception):
            failure = said
        else:
            tell(*said)
    child.join()
    if failure is not None:
        raise failure
    if child.exitcode:
        raise UnavailableError(
            "the export was ended from outside",
            field="exit_code",
            value=child.exitcode,
            hint="it needs about 2 GB of memory",
        )


def _work(pipe: Connection, source: str, out: Path, key: bytes, name: str) -> None:
    from quantize.bundle import quantize

    def tell(phase: str, share: float) -> None:
        pipe.send((phase, share))

    try:
        quantize(
            source,
            out,
            Ed25519PrivateKey.from_private_bytes(key),
            lora=LoraConfig(),
            name=name,
            progress=tell,
        )
    except Exception as error:  # whatever it is, it is the parent's to say
        pipe.send(error)
