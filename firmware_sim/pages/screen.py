"""What a person sees while a fleet works: bars on a terminal, plain lines everywhere else. All on standard error."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Screen:
    """Named bars. Setting one creates it; where no terminal is, its text is printed when it changes."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.fields[name]:<11}"),
            BarColumn(28),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def bar(self, name: str, done: float, total: float, text: str = "") -> None:
        """Sets a bar; `text` says what is being done."""
        if name not in self._bars:
            self._bars[name] = self.progress.add_task(text, total=total, name=name)
        self.progress.update(self._bars[name], completed=done, total=total, description=text)
        if done >= total or (text and self._said.get(name) != text):
            self._line(name, text)
            self._said[name] = text

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False)

    def _line(self, name: str, text: str) -> None:
        if not self.live and self._said.get(name) != text:
            print(f"{name}: {text}", file=sys.stderr, flush=True)
