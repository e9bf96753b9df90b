"""Everything that can be wrong with a bundle's folder, found without opening any of it with a runtime.

The checks are those of `edge_agent.bundle`, which stops at the first fault; `audit` goes on and lists all, for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from edge_agent.bundle import GRAPH_SUFFIX, check_age, check_graph_file, check_hash, check_places, look
from fedge.errors import FedgeError, IntegrityError, NoInputError, UnsupportedError
from fedge.io.durable import storage_error
from fedge.release import MANIFEST, OPERATORS_ALLOWED, SIGNATURE, Manifest


def audit(folder: Path, manifest: Manifest, runtime: str | None = None) -> list[FedgeError]:
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
        look(path, entry)
        check_hash(path, entry)
    except OSError as error:
        return storage_error(error, path, verb="read")
    except FedgeError as error:
        return error
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
