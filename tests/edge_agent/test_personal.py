"""A person's own part: kept only when rows that were not trained on agree."""

from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from quadratic import OneLabel, Quadratic

from edge_agent.bundle import open_bundle
from edge_agent.personal import mean_loss, personalise
from edge_agent.personal_once import personalise_once, text
from edge_agent.trainer.trainer import Trainer
from fedge.errors import ConfigError, DataError
from fedge.io.adapter_file import adapter_of, read_adapter, write_adapter
from fedge.lora import AdapterLayout, LoraConfig
from fedge.rules import Ffa

LAYOUT = AdapterLayout.of(2, {"self_attn.q_proj": (24, 32)}, LoraConfig(r=4, alpha=8.0))


class Person(Quadratic):
    """Trains on one task and is measured on another: `held_out` is whose rows the losses are of."""

    def with_held_out(self, other: Quadratic) -> "Person":
        object.__setattr__(self, "_other", other)
        return self

    def row_losses(self, batch: Any, adapter: Any) -> tuple[np.ndarray, np.ndarray]:
        other = self._other  # type: ignore[attr-defined]
        other.freeze_a(bytes(16))
        return np.array([other.loss_and_gradients(batch, adapter).loss_sum]), np.array([1])


def trainer(held_out: Quadratic, own: int = 1) -> Trainer:
    return cast(Trainer, Person(LAYOUT, own).with_held_out(held_out))


def start() -> dict[str, np.ndarray]:
    rule = Ffa(LAYOUT, bytes(16))
    return rule.tensors(rule.initial())


def test_steps_that_help_on_held_out_rows_are_kept() -> None:
    choice = personalise(trainer(Quadratic(LAYOUT, 1)), start(), [OneLabel()] * 10, [OneLabel()], rate=0.02)
    assert choice.kept.name == "10 steps"
    assert list(choice.tried) == ["fleet", "half of 5 steps", "5 steps", "half of 10 steps", "10 steps"]
    assert choice.kept.loss == min(choice.tried.values()) < choice.tried["fleet"]
    moved = {
        name[-1] for name, value in choice.kept.tensors.items() if not np.array_equal(value, start()[name])
    }
    assert moved == {"A", "B"}


def test_the_fleets_adapter_stays_when_held_out_rows_disagree() -> None:
    class Opposite(Quadratic):
        def target(self, name: str) -> np.ndarray:
            return -super().target(name)

    choice = personalise(trainer(Opposite(LAYOUT, 1)), start(), [OneLabel()] * 10, [OneLabel()], rate=0.02)
    assert choice.kept.name == "fleet"
    for name, value in start().items():
        np.testing.assert_array_equal(choice.kept.tensors[name], value)


def test_what_left_the_numbers_is_never_kept() -> None:
    class Broken(Quadratic):
        def loss_and_gradients(self, batch: Any, adapter: Any, depth: int = 0) -> Any:
            found = super().loss_and_gradients(batch, adapter, depth)
            moved = any(value.any() for name, value in adapter.items() if name.endswith(".B"))
            return type(found)(float("nan"), 1, found.gradients) if moved else found

    choice = personalise(trainer(Broken(LAYOUT, 1)), start(), [OneLabel()] * 10, [OneLabel()])
    assert choice.kept.name == "fleet"
    assert choice.tried["5 steps"] == float("inf")


def test_another_candidate_may_be_the_best() -> None:
    task = Quadratic(LAYOUT, 1)
    alone = personalise(trainer(task), start(), [OneLabel()] * 40, [OneLabel()], steps=(40,), rate=0.02).kept
    choice = personalise(
        trainer(task), start(), [OneLabel()] * 10, [OneLabel()], others={"alone": alone.tensors}
    )
    assert choice.kept.name == "alone"


def test_senseless_steps_and_no_held_out_rows_are_refused() -> None:
    for steps in ((), (5, 5), (0,), (10, 5)):
        with pytest.raises(ConfigError, match="steps"):
            personalise(trainer(Quadratic(LAYOUT, 1)), start(), [], [OneLabel()], steps=steps)
    with pytest.raises(DataError, match="held_out"):
        mean_loss(trainer(Quadratic(LAYOUT, 1)), start(), [])


# ---------------------------------------------------------------- the command, through a real worker
def test_own_steps_through_the_worker_are_kept_in_a_file_of_their_own(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    layout = manifest.layout
    fleet = adapter_of(manifest, np.zeros(layout.numbers, np.float32), a_seed=bytes(16))
    write_adapter(tmp_path / "fleet.safetensors", fleet)
    data = tmp_path / "own.jsonl"
    lines = [{"prompt": f"how are you {line}", "completion": "i am fine thank you"} for line in range(40)]
    data.write_bytes(msgspec.json.Encoder().encode_lines(lines))
    out = tmp_path / "mine.safetensors"
    found = personalise_once(
        tiny_bundle, data, tmp_path / "fleet.safetensors", out, steps=(20, 40), threads=1
    )
    assert found.adapter == str(out)
    assert found.kept == min(found.tried, key=lambda name: found.tried[name])
    assert found.tried[found.kept] < found.tried["fleet"] - 0.01
    assert (found.held_out_rows, found.training_rows) == (8, 32)
    mine = read_adapter(out, manifest)
    moved = {n[-1] for n, value in mine.tensors.items() if not np.array_equal(value, fleet.tensors[n])}
    assert moved == {"A", "B"}
    assert "own steps are kept" in text(found)


def test_without_five_conversations_nothing_is_begun(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    zero = adapter_of(manifest, np.zeros(manifest.layout.numbers, np.float32), a_seed=bytes(16))
    write_adapter(tmp_path / "fleet.safetensors", zero)
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="too little data"):
        personalise_once(
            tiny_bundle, tmp_path / "own.jsonl", tmp_path / "fleet.safetensors", tmp_path / "mine"
        )
    assert not (tmp_path / "mine").exists()
