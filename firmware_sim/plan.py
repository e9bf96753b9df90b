"""What to buy: two fleets of boards in the same place with the same campaign, over the same seeds.

The scenario gives the place (presence, power, links, owners, heat) and the campaign; a purchase gives the boards. A
board counts as better when every seed says so, and the price is that of the bare boards in BOARDS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fedge.errors import ConfigError, UsageError
from firmware_sim.compare import Measure, Row, Side, common_target
from firmware_sim.pages.compare_report import Comparison, compared
from firmware_sim.parts.board import BOARDS
from firmware_sim.problems import nearest
from firmware_sim.scenario import Group, Scenario

Purchase = dict[str, int]  # board -> how many


def parse_purchase(words: Sequence[str]) -> Purchase:
    """`pi5=40 orin=2` as boards and numbers; the beginning of a board's name is enough. Raises UsageError."""
    found: Purchase = {}
    for word in words:
        name, equals, count = word.partition("=")
        if not equals or not count.isascii() or not count.isdecimal() or not 1 <= int(count) <= 1_000_000:
            raise UsageError(
                "this is no purchase", field="purchase", value=word, hint="Write BOARD=NUMBER: pi5=40"
            )
        board = _board(name)
        found[board] = found.get(board, 0) + int(count)
    return found


def _board(name: str) -> str:
    if name in BOARDS:
        return name
    begun = [board for board in BOARDS if name and board.startswith(name)]
    if len(begun) == 1:
        return begun[0]
    hint = f"Boards: {', '.join(BOARDS)}"
    raise UsageError(f"no such board{nearest(name, BOARDS)}", field="board", value=name, hint=hint)


def purchase_text(purchase: Mapping[str, int]) -> str:
    """40 × Pi 5 and 2 × Jetson Orin Nano."""
    return " and ".join(f"{count:,} × {BOARDS[board].label}" for board, count in purchase.items())


def price(purchase: Mapping[str, int]) -> float:
    """US dollars, boards alone."""
    return sum(BOARDS[board].price * count for board, count in purchase.items())


def bought(scenario: Scenario, purchase: Purchase, *, where: str = "", beside: bool = False) -> Scenario:
    """The scenario with these boards: as its whole fleet, or `beside` the fleet that it has.

    `where` names the group in whose place the new boards stand; without it they share all places alike, and those
    beside a fleet stand in the first group's. Raises ConfigError.
    """
    groups = scenario.groups
    if where and where not in [group.name for group in groups]:
        known = [group.name for group in groups]
        raise ConfigError(
            f"no such group{nearest(where, known)}",
            field="where",
            value=where,
            hint=f"Groups: {', '.join(known)}",
        )
    count = sum(purchase.values())
    boards = {board: float(number) for board, number in purchase.items()}
    places = [group for group in groups if group.name == where] if where else list(groups)
    if not beside:
        fleet = tuple(msgspec.structs.replace(group, boards=boards) for group in places)
        return _of_size(msgspec.structs.replace(scenario, groups=fleet, devices=count))
    share = sum(group.share for group in groups) * count / scenario.devices
    new = msgspec.structs.replace(places[0], name=_free_name(groups), boards=boards, share=share)
    whole = msgspec.structs.replace(scenario, groups=(*groups, new), devices=scenario.devices + count)
    return _of_size(whole)


def answer(
    scenario: Scenario, purchases: Sequence[Purchase], sides: Sequence[Side], target: float | None
) -> Comparison:
    """Which of two purchases is better at what, price first; `target` is the loss to reach, None the common one."""
    first, second = (side.name for side in sides)
    reach = common_target(sides) if target is None else target
    place = f"in the place and with the campaign of {scenario.name}"
    return compared(f"{first}, or {second}, {place}?", sides, reach, [_price_row(*map(price, purchases))])


def _price_row(base: float, other: float) -> Row:
    ratio = other / base
    measure = Measure("price, boards alone", lambda run: None, "less", lambda v: f"{v:,.0f} US$", "cost less")
    return Row(measure, base, other, ratio, ratio, ratio)


def _free_name(groups: Sequence[Group]) -> str:
    names = {group.name for group in groups}
    return next(name for name in ("bought", *(f"bought-{n}" for n in range(2, 99))) if name not in names)


def _of_size(scenario: Scenario) -> Scenario:
    bloc = scenario.campaign.bloc
    if scenario.devices < bloc:
        raise ConfigError(
            f"a bloc of {bloc} devices needs as many boards",
            field="boards",
            value=scenario.devices,
            hint="Buy more, or make `campaign.bloc` smaller (at least 5)",
        )
    return scenario
