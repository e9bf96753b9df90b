"""Errors that say who is at fault, what was found and what to do next.

Four kinds (after h11's local and remote errors): the *caller's input*, *their protocol breach*, *the world*
(try again), *integrity* (stop). A bug of ours is any exception that is not one of these. The command line maps
each class to the exit code in `exit_code`; `docs/exit-codes.md` has a line per code, and a test keeps the two equal.
"""

from __future__ import annotations

from typing import ClassVar


class FedgeError(Exception):
    """Abstract root. `what` went wrong, at which `field`, with which `value`, and `hint`: the next step."""

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, field: str = "", value: object = None, hint: str = "") -> None:
        self.what, self.field, self.value, self.hint = what, field, value, hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[object, ...]:
        """So that an error crosses from a child process whole: the class, and every field."""
        return _made_again, (type(self), {**vars(self)})

    def __str__(self) -> str:
        where = f" ({self.field}={_short(self.value)})" if self.field else ""
        return f"{self.what}{where}" + (f". {self.hint}" if self.hint else "")


class UsageError(FedgeError):
    """A flag or a combination of flags that cannot mean anything."""

    exit_code = 64


class DataError(FedgeError):
    """The user's data file is not what it says it is."""

    exit_code = 65


class NoInputError(FedgeError):
    """A named file, folder, model or data set does not exist."""

    exit_code = 66


class UnsupportedError(FedgeError):
    """A model, format or value that this version does not handle, refused before any work."""

    exit_code = 67


class UnavailableError(FedgeError):
    """A service is not there: broker gone, port taken, registry out of reach. Trying again may help."""

    exit_code = 69


class StorageError(FedgeError):
    """The disk said no: full, read-only, no permission."""

    exit_code = 74


class ProtocolError(FedgeError):
    """The other side broke the protocol. `name` is the stable name of the refusal, as tests and logs use it."""

    exit_code = 76

    def __init__(
        self, name: str, what: str, *, field: str = "", value: object = None, hint: str = ""
    ) -> None:
        self.name = name
        super().__init__(what, field=field, value=value, hint=hint)


class PolicyError(FedgeError):
    """The device owner's policy does not allow this."""

    exit_code = 77


class ConfigError(FedgeError):
    """A configuration whose values contradict each other or pass a limit."""

    exit_code = 78


class IntegrityError(FedgeError):
    """A hash or signature does not match. Nothing was believed and nothing was opened."""

    exit_code = 79


class InvariantBroken(FedgeError):
    """Something that must hold whatever goes wrong did not: a bug of ours, found in a simulated world.

    `invariant` names it; `event` (its number), `at` (seconds) and `seed` say where; `trail` holds what happened
    before, oldest first; `replay` is the command that shows it again.
    """

    exit_code = 80

    def __init__(
        self,
        invariant: str,
        what: str,
        *,
        seed: int = 0,
        event: int = 0,
        at: float = 0.0,
        trail: tuple[str, ...] = (),
        replay: str = "",
    ) -> None:
        self.invariant, self.seed, self.event, self.at = invariant, seed, event, at
        self.text, self.trail, self.replay = what, trail, replay
        super().__init__(
            f"{invariant}: {what} (seed {seed}, event {event}, {at:.3f} s)",
            hint=f"Replay it: {replay}" if replay else "",
        )


def _made_again(kind: type[FedgeError], fields: dict[str, object]) -> FedgeError:
    error = kind.__new__(kind)
    error.__dict__.update(fields)
    return error


def _short(value: object, chars_max: int = 240) -> str:
    text = repr(value)
    return text if len(text) <= chars_max else text[: chars_max - 3] + "..."
