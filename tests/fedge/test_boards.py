"""Plans are made for the boards that are simulated."""

import pytest

from fedge.boards import BOARDS, PARAMETERS_OF_THE_SPEED, board
from fedge.errors import UsageError
from firmware_sim.parts import board as simulated


def test_the_two_tables_of_boards_are_one() -> None:
    ours = {b.name: (b.label, b.memory_bytes, b.tokens_per_second) for b in BOARDS.values()}
    theirs = {
        b.name: (b.label, b.memory_mb * 1_000_000, b.tokens_per_second) for b in simulated.BOARDS.values()
    }
    assert ours == theirs


def test_a_step_takes_longer_in_proportion_to_tokens_and_parameters() -> None:
    pi = board("pi4")
    assert pi.step_seconds(PARAMETERS_OF_THE_SPEED, 27) == pytest.approx(1.0)
    assert pi.step_seconds(2 * PARAMETERS_OF_THE_SPEED, 54) == pytest.approx(4.0)


@pytest.mark.parametrize(("name", "said"), [("pi6", "Did you mean pi"), ("toaster", "zero2w")])
def test_another_board_is_refused_with_what_there_is(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        board(name)
