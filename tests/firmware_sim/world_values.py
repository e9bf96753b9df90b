"""A result of a world as a run would give it, made by hand: nights, blocs that sweep, a hot noon, a few never come."""

import msgspec

from firmware_sim.world.outcome import (
    Breaker,
    ClassFigures,
    Point,
    Rounds,
    Strip,
    Violation,
    WorldResult,
)
from firmware_sim.world.streams import Stream

BOARDS = ("zero2w", "pi4", "pi4", "pi5", "pi5", "orin-nano")
COLUMNS = 288


def world_result(devices: int = 96, seed: int = 0, shown: int = 96, days: float = 2.0) -> WorldResult:
    """Every figure in it is consistent enough to be looked at."""
    shown = min(shown, devices)
    boards = [BOARDS[number % len(BOARDS)] for number in range(devices)]
    return WorldResult(
        fedge="0.3.0",
        scenario="phones",
        about="Phone-like devices that charge by night.",
        devices=devices,
        days=days,
        seed=seed,
        crypto="hashed",
        task="mlp",
        traces="the generative models of the scenario",
        crc="9f3a12c4",
        events=devices * 1_440,
        cpu_seconds=12.5,
        wall_seconds=14.0,
        bytes_per_device=2_900.0,
        blocs=devices // 8,
        devices_in_blocs=devices // 8 * 8,
        formations=3,
        adapter_version=412,
        classes={board: _class(boards.count(board), seed) for board in dict.fromkeys(boards)},
        rounds=_rounds(devices),
        loss=_loss(days, seed),
        funnel=_funnel(devices),
        why_not_hours={
            "resting": 310.5 * devices / 96,
            "in no bloc": 204.0,
            "its bloc waits for a member": 1_020.25,
            "power: on battery": 480.0,
            "no slot": 77.0,
        },
        breakers=[
            Breaker(device=f"d{number:06d}", board=boards[number], bloc=f"b{number // 8}", hours=30.0 / (number + 1))
            for number in range(min(6, devices))
        ],
        starving_hours=1.5,
        faults={"power-cut": 41, "loss": 230, "broker-restart": 2, "bit-flip": 3},
        refusals={"bad-signature": 3, "late": 11},
        violations=[],
        strip=_strip(boards[:shown], days, seed),
    )  # fmt: skip


def bare_result() -> WorldResult:
    """One device, nothing opened, nothing measured."""
    nothing = ClassFigures(
        devices=1, in_blocs=0, served=0, rounds_mean=0.0, energy_kj_mean=0.0, upload_mb_mean=0.0,
        download_mb_mean=0.0, hottest_celsius=21.0, throttled_hours=0.0, on_hours_mean=0.0,
    )  # fmt: skip
    rounds = Rounds(tried=0, opened=0, sat_out=0, updates_started=0, updates_finished=0, updates_opened=0)
    return msgspec.structs.replace(
        world_result(), devices=1, blocs=0, devices_in_blocs=0, formations=0, adapter_version=0,
        classes={"pi5": nothing}, rounds=rounds, loss=[], funnel={"devices": 1, "joined": 0}, why_not_hours={},
        breakers=[], starving_hours=0.0, faults={}, refusals={}, strip=None,
    )  # fmt: skip


def violation() -> Violation:
    return Violation(
        invariant="no update counted twice", event=40_321, at=90_061.5, text="d000003 twice in b1 <7>"
    )


def _class(count: int, seed: int) -> ClassFigures:
    draw = Stream(seed, count, "class")
    served = int(count * draw.uniform(0.7, 1.0))
    return ClassFigures(
        devices=count,
        in_blocs=served,
        served=served,
        rounds_mean=draw.uniform(2, 9),
        energy_kj_mean=draw.uniform(1, 30),
        upload_mb_mean=draw.uniform(0.3, 1.4),
        download_mb_mean=draw.uniform(95, 99),
        hottest_celsius=draw.uniform(55, 84),
        throttled_hours=draw.uniform(0, 12),
        on_hours_mean=draw.uniform(20, 46),
    )


def _rounds(devices: int) -> Rounds:
    tried = devices * 5
    opened = int(tried * 0.94)
    return Rounds(
        tried=tried,
        opened=opened,
        sat_out=tried - opened,
        updates_started=tried * 8,
        updates_finished=int(tried * 7.8),
        updates_opened=opened * 8,
        yield_=0.965,
        drop=0.025,
        waste=0.021,
        jain=0.71,
        never_served=0.08,
        seconds_median=412.0,
    )


def _loss(days: float, seed: int) -> list[Point]:
    draw = Stream(seed, 0, "loss")
    points = []
    for step in range(61):
        hour = days * 24 * step / 60
        loss = 0.55 + 1.75 * 2.718 ** (-hour / 9) + 0.015 * draw.normal()
        figures = {"loss": loss, "accuracy": 1 - loss / 2.5, "rare_accuracy": 0.9 - loss / 3}
        points.append(Point(hour=hour, energy_kj=20.3 * hour, version=step * 7, figures=figures))
    return points


def _funnel(devices: int) -> dict[str, int]:
    shares = (1, 0.99, 0.97, 0.94, 0.93, 0.92)
    names = ("devices", "joined", "ready once", "in a bloc", "trained once", "served once")
    return {name: round(devices * share) for name, share in zip(names, shares, strict=True)}


def _strip(boards: list[str], days: float, seed: int) -> Strip:
    seconds = days * 86_400 / COLUMNS
    rows = [_row(number, seed, seconds) for number in range(len(boards))]
    return Strip(
        seconds=seconds,
        devices=[f"d{number:06d}" for number in range(len(boards))],
        boards=boards,
        rows=rows,
        opened=[sum(row[column] == "a" for row in rows) // 7 for column in range(COLUMNS)],
        blocs=[f"b{number // 8}" if number < len(boards) // 8 * 8 else "" for number in range(len(boards))],
    )


def _row(number: int, seed: int, seconds: float) -> str:
    own, bloc = Stream(seed, number, "row"), number // 8
    wakes, rests = 22 + own.uniform(-1, 1), 7 + own.uniform(-1, 1)
    letters, day = [], "."
    for column in range(COLUMNS):
        hour = column * seconds / 3_600 % 24
        beat = (column + bloc * 5) % 23
        if number % 31 == 17 and column > 120:
            letters.append("x")
        elif rests < hour < wakes:
            day = day if column % 9 else own.pick("n...i")
            letters.append(day)
        elif beat < 6 and number % 29:
            letters.append(
                "l"[: beat < 1] or ("h" if number % 11 == 3 and beat > 2 else "tttsa"[min(4, beat - 1)])
            )
        else:
            letters.append("w")
    return "".join(letters)
