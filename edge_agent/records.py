"""The readers of `edge_agent.dataset` under their first names."""

from __future__ import annotations

from edge_agent.dataset.reading import read_records
from edge_agent.dataset.record import Conversation as Record, TextExample

__all__ = ["Record", "TextExample", "read_records"]
