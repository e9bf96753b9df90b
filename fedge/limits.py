"""A limit on everything that comes from outside, in one place, units last, each with its reason."""

from __future__ import annotations

from typing import Final

FRAME_BYTES_MAX: Final = 65_536  # below every cloud broker's message cap (AWS IoT: 128 KB), with room
FRAME_BYTES_HARD_MAX: Final = 98_304  # a receiver refuses above this before it parses
HEADER_BYTES_MAX: Final = 4_096  # frame header; the largest real one is under 400
MESSAGE_BYTES_MAX: Final = 65_536  # any control message, OPEN with a full roster included
CHUNK_BODY_BYTES: Final = 61_440  # body of a full chunk: 60 KB and a header stay below FRAME_BYTES_MAX
TRANSFER_CHUNKS_MAX: Final = 64
TRANSFER_BYTES_MAX: Final = TRANSFER_CHUNKS_MAX * CHUNK_BODY_BYTES  # 3.9 MB; larger things go over HTTPS
CHUNK_WINDOW: Final = 8  # chunks in flight; 4 to 8 measured best on lossy links

ID_CHARS_MAX: Final = 64
NAME_CHARS_MAX: Final = 128
TEXT_CHARS_MAX: Final = 2_048
BOARD_CHARS_MAX: Final = 64  # 64 READYs with the longest names fit a message, and so a card or an OPEN
VERSION_CHARS_MAX: Final = 32

BLOC_DEVICES_DEFAULT: Final = 8
BLOC_DEVICES_MIN: Final = 5  # law 1: below this a bloc sum says too much about one person
BLOC_DEVICES_MAX: Final = 64
PLAN_SHARE_MAX: Final = 2.0  # no member's planned share of the work may exceed 2/k

FORMATIONS_MAX: Final = 1_024  # of one campaign: the length of its chain of beacons
PATH_HASHES_MAX: Final = 32  # of a bloc card: enough for 2^32 blocs

STEPS_MAX: Final = 10_000
ROUNDS_MAX: Final = 100_000
WINDOW_SECONDS_MAX: Final = 7 * 86_400
ADAPTER_NUMBERS_MAX: Final = 50_000_000
ADAPTER_MATRICES_MAX: Final = 65_536  # layers times targets; the largest open models have a few thousand

RING_BITS: Final = (8, 16)  # word widths on the wire; packed widths come later
META_WORDS_MAX: Final = 256
STRATA: Final = 64  # check-sums that show a wrapped or badly unmasked sum

MANIFEST_BYTES_MAX: Final = 4_194_304
BUNDLE_FILE_BYTES_MAX: Final = 8 * 1024**3
HTTP_PIECE_BYTES: Final = 4 * 1024**2

DATA_LINE_BYTES_MAX: Final = 1_048_576
CLOCK_SKEW_SECONDS_MAX: Final = 600
