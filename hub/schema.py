"""The tables of the hub's database. Keys and whatever is asked for by value are columns; the rest of a row of
`hub.effects` is its msgpack bytes in `body`, so that a row is read back exactly as the machine saved it.

Join tokens are kept as SHA-256 only: who steals the database cannot join with it. The ledger is append-only.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

VERSION: Final = 1
METADATA: Final = sa.MetaData()

META: Final = sa.Table(
    "meta",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
CAMPAIGNS: Final = sa.Table(
    "campaigns",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("closed", sa.Boolean, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
BLOCS: Final = sa.Table(
    "blocs",
    METADATA,
    sa.Column("campaign", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
ROUNDS: Final = sa.Table(
    "rounds",
    METADATA,
    sa.Column("transcript", sa.LargeBinary, primary_key=True),
    sa.Column("campaign", sa.Text, nullable=False),
    sa.Column("bloc", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("campaign", "bloc", "round"),  # two OPENs of one round would open two sums
)
DEVICES: Final = sa.Table(
    "devices",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
LEDGER: Final = sa.Table(
    "ledger",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("campaign", sa.Text, nullable=False),
    sa.Column("bloc", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),  # JSON
    sqlite_autoincrement=True,  # an id is never used twice, so a reader's "after" stays true
)
ASKED: Final = sa.Table(
    "asked",  # the operator's inbox: campaigns that the running hub has yet to take
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("taken", sa.Boolean, nullable=False, default=False),
    sqlite_autoincrement=True,
)
TOKENS: Final = sa.Table(
    "tokens",
    METADATA,
    sa.Column("hash", sa.LargeBinary, primary_key=True),  # SHA-256 of the secret
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Column("device", sa.Text),  # empty until used
    sa.Column("request", sa.LargeBinary),  # SHA-256 of the request that used it
    sa.Column("reply", sa.LargeBinary),  # so that the same request after a cut gets the same answer
)
CERTIFICATES: Final = sa.Table(
    "certificates",
    METADATA,
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("serial", sa.Integer, nullable=False),  # of the fleet certificate
    sa.Column("tls_serial", sa.Text, nullable=False),  # of the X.509 one, hexadecimal: above 64 bits
    sa.Column("issued_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
)
