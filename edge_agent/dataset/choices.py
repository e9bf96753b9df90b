"""What the owner may say about a data file, where the file does not say it itself. It never leaves the device.

Nothing is guessed that the owner would have to know about: which column is which, who an unusual role is, and how many
bad lines may be passed over are said here or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypedDict

import msgspec
from msgspec import Meta

from fedge.errors import UsageError

Form = Literal["auto", "json-lines", "json", "table", "text", "parquet"]
FORMS: Final = ("auto", "json-lines", "json", "table", "text", "parquet")
FIELDS: Final = (
    "prompt",
    "completion",
    "text",
    "audio",
    "anchor",
    "positive",
    "negative",
    "label",
    "system",
    "instruction",
    "input",
    "output",
    "conversation",
)
ROLES: Final = ("system", "user", "assistant", "tool")


class Skip(TypedDict, total=False):
    """What Reading says of bad lines."""

    skip_lines: int
    skip_share: float


class Reading(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read a data file.

    `columns`: field -> name of a column (or key of a JSON object), or its number from 1. `separator`: of a table's
    cells, "" = found out. `roles`: a role word of the file -> one of ROLES. With `join_runs`, turns of one role in a
    row are one, joined by a line break: some models know nothing else than turn and turn about. Up to `skip_lines` bad
    lines, or a `skip_share` of all records, are passed over and counted. `folder` is where the paths of recordings
    begin, "" = at the list that names them.
    """

    form: Form = "auto"
    separator: Annotated[str, Meta(max_length=1)] = ""
    header: bool = True
    columns: dict[str, str] = {}
    roles: dict[str, str] = {}
    join_runs: bool = False
    skip_lines: Annotated[int, Meta(ge=0)] = 0
    skip_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    folder: str = ""

    def __post_init__(self) -> None:
        for field in self.columns:
            if field not in FIELDS:
                raise UsageError(
                    "no such field of an example",
                    field="columns",
                    value=field,
                    hint=f"One of {', '.join(FIELDS)}",
                )
        for role in self.roles.values():
            if role not in ROLES:
                raise UsageError("no such role", field="roles", value=role, hint=f"One of {', '.join(ROLES)}")

    def root(self, data: Path) -> Path:
        """Where the paths of the recordings of the file or folder `data` begin."""
        if self.folder:
            return Path(self.folder)
        return data if data.is_dir() else data.parent


AS_IT_IS: Final = Reading()


def skip_from(text: str) -> Skip:
    """`5` or `1%` as fields of Reading. Raises UsageError."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        if percent:
            share = float(number) / 100
            if not 0 <= share <= 1:
                raise ValueError(text)
            return {"skip_share": share}
        if int(number) < 0:
            raise ValueError(text)
        return {"skip_lines": int(number)}
    except ValueError as error:
        raise UsageError(
            "not a number of bad lines", field="skip-bad", value=text, hint="Such as 5, or 1% of all records"
        ) from error


def pairs_from(text: str, flag: str) -> dict[str, str]:
    """`a=b,c=d` as a dict. Raises UsageError."""
    found: dict[str, str] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise UsageError("not NAME=VALUE,NAME=VALUE", field=flag, value=text)
        found[name.strip()] = value.strip()
    return found
