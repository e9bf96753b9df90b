"""The systemd unit of an agent, with this machine's paths in it."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from edge_agent.home import Home

TEMPLATE: Final = Path(__file__).with_name("data") / "fedge-agent.service"


def unit_text(home: Home, data: Path, more: Sequence[str] = ()) -> str:
    """The unit file for an agent in `home` that trains on `data`, run by the user who asks; `more` words for `run`."""
    command = [sys.executable, "-m", "edge_agent", "run", "--home", str(home.folder.resolve())]
    words = [*command, "--data", str(data.resolve()), *more]
    text = TEMPLATE.read_text("utf-8")
    text = text.replace("@COMMAND@", " ".join(_quoted(word).replace("$", "$$") for word in words))
    return text.replace("@HOME@", _quoted(str(home.folder.resolve()))).replace("@USER@", getpass.getuser())


def _quoted(word: str) -> str:
    """A word as systemd reads it: `%` stands for itself, spaces and quotes are kept (systemd.syntax(7))."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{plain}"' if any(c in plain for c in " \t\"'\\;") else plain
