"""Everything that can be wrong with a bundle's folder, found without opening any of it with a runtime.

`audit` goes on after the first fault and lists all, for people; `check_graph_file` is the part that a device runs for
every graph before it opens one, so that a signed lie about the operators of a graph is found out as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from fedge.errors import FedgeError, IntegrityError, NoInputError, UnsupportedError
from fedge.graph_audit import GRAPH_BYTES_MAX, check_graph, graph_facts
from fedge.io.durable import storage_error
from fedge.release import MANIFEST, OPERATORS_ALLOWED, SIGNATURE, WEIGHTS, Manifest

GRAPH_SUFFIX: Final = ".onnx"


def check_graph_file(folder: Path, name: str, manifest: Manifest) -> set[str]:
    """The operators of the graph `name`, which are allowed and announced. Raises UnsupportedError, IntegrityError.

    Its tensors must lie in the bundle's own weight file: no other path, absolute, relative or escaping, is followed.
    """
    path = folder / name
    try:
        if path.stat().st_size > GRAPH_BYTES_MAX:
            raise IntegrityError("graph is too large", field=name, value=path.stat().st_size)
        facts = graph_facts(path.read_bytes())
    except OSError as error:
        raise storage_error(error, path, verb="read") from error
    weights = manifest.files.get(WEIGHTS)
    check_graph(name, facts, weights_bytes=weights.size if weights else 0)
    hidden = sorted(facts.operators - set(manifest.operators))
    if hidden:
        raise IntegrityError(
            f"{name} has an operator that the manifest does not name", field="operators", value=hidden[0]
        )
    return facts.operators


def audit(
    folder: Path, manifest: Manifest, check_places: Callable[[Manifest], None], runtime: str | None = None
) -> list[FedgeError]:
    """All faults of the folder, the gravest first: missing and changed files, graphs, tensors, the runtime's age."""
    found: list[FedgeError] = []
    whole: set[str] = set()
    for name in sorted(manifest.files):
        fault = _file_fault(folder / name, manifest)
        if fault is None:
            whole.add(name)
        else:
            found.append(fault)
    seen: set[str] = set()
    for name in sorted(name for name in whole if name.endswith(GRAPH_SUFFIX)):
        try:
            seen |= check_graph_file(folder, name, manifest)
        except FedgeError as error:
            found.append(error)
    found += _faults_of_operators(manifest, seen, all_read=not found)
    found += _raised(lambda: check_places(manifest))
    found += _strangers(folder, manifest)
    if runtime is not None:
        found += _raised(lambda: check_age(manifest.runtime_min, runtime))
    return found


def check_age(minimum: str, installed: str) -> None:
    """Raises UnsupportedError when the installed runtime is older than the bundle needs."""
    if _version(installed) < _version(minimum):
        raise UnsupportedError(
            "ONNX Runtime here is too old for this bundle",
            field="runtime_min",
            value=minimum,
            hint=f"Installed is {installed}: upgrade onnxruntime",
        )


def _file_fault(path: Path, manifest: Manifest) -> FedgeError | None:
    entry = manifest.files[path.name]
    if path.is_symlink():
        return IntegrityError(
            "file of the bundle is a link",
            field=path.name,
            value=str(path.readlink()),
            hint="Copy the file itself",
        )
    if not path.is_file():
        return NoInputError("file of the bundle is missing", field="files", value=path.name)
    try:
        if (size := path.stat().st_size) != entry.size:
            return IntegrityError("file of the bundle has another size", field=path.name, value=size)
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return storage_error(error, path, verb="read")
    if found != entry.sha256:
        return IntegrityError(
            "file of the bundle is not what the manifest says",
            field=path.name,
            value=found,
            hint="Fetch the bundle again",
        )
    return None


def _faults_of_operators(manifest: Manifest, seen: set[str], *, all_read: bool) -> Iterator[FedgeError]:
    for operator in sorted(set(manifest.operators) - OPERATORS_ALLOWED):
        yield UnsupportedError("operator is not allowed on a device", field="operators", value=operator)
    if all_read and (unused := sorted(set(manifest.operators) - seen)):
        yield IntegrityError(
            "the manifest names an operator that no graph has", field="operators", value=unused[0]
        )


def _strangers(folder: Path, manifest: Manifest) -> Iterator[FedgeError]:
    known = {*manifest.files, MANIFEST, SIGNATURE}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield IntegrityError(
                "a file that the manifest does not know", field="files", value=path.name, hint="Remove it"
            )


def _raised(check: Callable[[], None]) -> Iterator[FedgeError]:
    try:
        check()
    except FedgeError as error:
        yield error


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
