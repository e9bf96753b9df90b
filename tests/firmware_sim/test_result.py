"""result.json is strict JSON whatever the run did: diverged is a word, missing is null, and nothing else is let in."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
from run_result import run_values

from fedge.errors import DataError, NoInputError
from firmware_sim.processes.result import (
    DIVERGED,
    as_result,
    change_text,
    decode_result,
    encode_result,
    figure_text,
    read_result,
    write_result,
)


def strict(data: bytes) -> Any:
    """Parse as a browser does: NaN and Infinity are errors."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    return json.loads(data, parse_constant=refuse)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = as_result(run_values())
    write_result(result, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result


def test_plain_values_keep_their_shape() -> None:
    values = run_values()
    assert strict(encode_result(as_result(values))) == values


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_diverged_and_missing_are_told_apart(bad: float) -> None:
    values = run_values()
    values["loss"]["took_part"] = bad
    values["loss"]["pooled_reference"] = None
    values["round_log"][1]["training_loss"] = bad
    values["round_log"][2]["training_loss"] = None
    values["people"][0]["after"] = bad
    plain = strict(encode_result(as_result(values)))
    assert plain["loss"]["took_part"] == DIVERGED
    assert plain["loss"]["pooled_reference"] is None
    assert [entry["training_loss"] for entry in plain["round_log"]][1:3] == [DIVERGED, None]
    assert plain["people"][0]["after"] == DIVERGED


def test_a_struct_that_holds_nan_is_written_as_diverged_too() -> None:
    import msgspec

    result = as_result(run_values())
    result = msgspec.structs.replace(result, loss=msgspec.structs.replace(result.loss, never_seen=math.nan))
    assert strict(encode_result(result))["loss"]["never_seen"] == DIVERGED


def test_large_integers_keep_every_digit() -> None:
    values = run_values()
    values["seed"] = 2**63 - 1
    values["bytes"]["down_total_per_device"] = 2**53 + 1
    plain = strict(encode_result(as_result(values)))
    assert (plain["seed"], plain["bytes"]["down_total_per_device"]) == (2**63 - 1, 2**53 + 1)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("loss", "took_part", "good"),
        ("bytes", "bundle", 1.5),
        ("seconds", "total", math.nan),
        ("model", "surprise", 1),
    ],
)
def test_another_shape_is_refused_by_name(part: str, name: str, value: object) -> None:
    values = run_values()
    values[part][name] = value
    with pytest.raises(DataError, match=rf"\$\.{part}|{name}"):
        as_result(values)


def test_files_that_are_no_result(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match=r"result\.json"):
        read_result(tmp_path / "result.json")
    with pytest.raises(DataError):
        decode_result(b'{"fedge": NaN}')


def test_figures_as_people_read_them() -> None:
    assert [figure_text(value) for value in (4.6021, None, DIVERGED, math.nan)] == [
        "4.602",
        "not measured",
        "diverged",
        "diverged",
    ]
    assert change_text(4.6, 3.75) == "−0.850"
    assert change_text(4.6, DIVERGED) == "diverged"
    assert change_text(4.6, None) == "not measured"
