"""Results of long runs, kept as they finish, so that a benchmark that is stopped goes on where it was.

One JSON file a result, named by everything that it depends on; adapters beside it. Without a folder nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import progress


class Kept:
    """A folder of results, or none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def result(
        self, what: str, facts: dict[str, object], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of `make`, from the folder when it was made before with the same `facts`."""
        if self._folder is None:
            return make()
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
        path = self._folder / f"{what.replace(' ', '-')}-{key}.json"
        if path.exists():
            progress(f"{what}: from {path}")
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        made = make()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(made))
        partial.replace(path)
        return made
