"""A person's own part: kept only when rows that were not trained on agree."""

from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from quadratic import OneLabel, Quadratic

from edge_agent.bundle import open_bundle
from edge_agent.personal import Choice, choose, mean_loss, mean_of, own_rate, own_steps
from edge_agent.personal_once import personalise_once, text
from edge_agent.trainer.trainer import Trainer
from fedge.errors import ConfigError, DataError
from fedge.io.adapter_file import adapter_of, read_adapter, write_adapter
from fedge.io.peft_folder import export_peft
from fedge.lora import AdapterLayout, LoraConfig
from fedge.messages import Training
from fedge.release import WEIGHTS
from fedge.rules import Ffa

TRAINING = Training(rule="fedit", rate=own_rate("generate"))
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


def choice_of(person: Trainer, *, alone: int = 0) -> Choice:
    """After 5 and 10 own steps, and so many alone."""
    own = own_steps(person, start(), [OneLabel()] * 10, steps=(5, 10), rate=0.02)
    by_itself = own_steps(person, None, [OneLabel()] * alone, steps=(5, alone), rate=0.02) if alone else {}
    return choose(person, start(), own, by_itself, [OneLabel()])


def test_steps_that_help_on_held_out_rows_are_kept() -> None:
    choice = choice_of(trainer(Quadratic(LAYOUT, 1)))
    assert choice.kept.name == "10 steps"
    assert list(choice.tried) == ["fleet", "5 steps", "10 steps"]
    assert choice.kept.loss == min(choice.tried.values()) < choice.tried["fleet"]
    moved = {
        name[-1] for name, value in choice.kept.tensors.items() if not np.array_equal(value, start()[name])
    }
    assert moved == {"A", "B"}


def test_the_fleets_adapter_stays_when_held_out_rows_disagree() -> None:
    class Opposite(Quadratic):
        def target(self, name: str) -> np.ndarray:
            return -super().target(name)

    choice = choice_of(trainer(Opposite(LAYOUT, 1)), alone=10)
    assert choice.kept.name == "fleet"
    for name, value in start().items():
        np.testing.assert_array_equal(choice.kept.tensors[name], value)


def test_what_left_the_numbers_is_never_kept() -> None:
    class Broken(Quadratic):
        def loss_and_gradients(self, batch: Any, adapter: Any, depth: int = 0) -> Any:
            found = super().loss_and_gradients(batch, adapter, depth)
            moved = any(value.any() for name, value in adapter.items() if name.endswith(".B"))
            return type(found)(float("nan"), 1, found.gradients) if moved else found

    choice = choice_of(trainer(Broken(LAYOUT, 1)))
    assert choice.kept.name == "fleet"
    assert choice.tried["5 steps"] == float("inf")


MEAN = "mean of 10 steps and 40 steps alone"


def test_who_trained_alone_may_be_the_best() -> None:
    choice = choice_of(trainer(Quadratic(LAYOUT, 1)), alone=40)
    assert list(choice.tried) == ["fleet", "5 steps", "10 steps", "5 steps alone", "40 steps alone", MEAN]
    assert choice.kept.name == "40 steps alone"


def test_a_mean_of_two_that_err_in_other_ways_is_better_than_both() -> None:
    layout, tasks = AdapterLayout.of(1, {"q_proj": (24, 32)}, LoraConfig(r=4, alpha=8.0)), range(1, 3)
    ends = [
        own_steps(
            cast(Trainer, Quadratic(layout, seed, noise=1.0)), None, [OneLabel()] * 80, steps=(80,), rate=0.05
        )[80]
        for seed in tasks
    ]
    person = cast(Trainer, Person(layout, 3).with_held_out(Quadratic(layout, 3, noise=0.0)))
    choice = choose(person, ends[0], {}, {80: ends[1]}, [OneLabel()])
    assert choice.kept.name == "mean of fleet and 80 steps alone"


def test_the_mean_is_of_the_products_and_of_what_is_dense() -> None:
    layout = AdapterLayout.of(2, {"q_proj": (24, 32)}, LoraConfig(r=4, alpha=8.0), dense={"head.bias": (3,)})
    rng = np.random.default_rng(5)

    def drawn(rank: int) -> dict[str, np.ndarray]:
        shapes = {**layout.shapes, **layout.a_shapes}
        made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for name in layout.shapes:
            if name.endswith(".B"):
                made[name][:, rank:] = 0
        return made

    one, other = drawn(2), drawn(2)
    mean = mean_of(layout, one, other)
    for slot in layout.slots:
        products = [t[f"{slot.name}.B"] @ t[f"{slot.name}.A"] for t in (one, other, mean)]
        np.testing.assert_allclose(products[2], (products[0] + products[1]) / 2, atol=1e-5)
    assert set(mean) == set(one)
    for name in layout.dense_shapes:
        np.testing.assert_allclose(mean[name], (one[name] + other[name]) / 2, rtol=1e-6)


def test_senseless_steps_and_no_held_out_rows_are_refused() -> None:
    for steps in ((), (5, 5), (0,), (10, 5)):
        with pytest.raises(ConfigError, match="steps"):
            own_steps(trainer(Quadratic(LAYOUT, 1)), start(), [], steps=steps, rate=0.02)
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
        tiny_bundle,
        data,
        tmp_path / "fleet.safetensors",
        out,
        steps=(20, 40),
        alone_steps=(2,),
        training=TRAINING,
        threads=1,
    )
    assert list(found.tried)[:4] == ["fleet", "20 steps", "40 steps", "2 steps alone"]
    assert found.adapter == str(out)
    assert found.kept == min(found.tried, key=lambda name: found.tried[name])
    assert found.tried[found.kept] < found.tried["fleet"] - 0.01
    assert (found.held_out_rows, found.training_rows) == (8, 32)
    mine = read_adapter(out, manifest)
    moved = {n[-1] for n, value in mine.tensors.items() if not np.array_equal(value, fleet.tensors[n])}
    assert moved == {"A", "B"}
    assert f"kept: {out}" in text(found)
    assert "nats per token" in text(found)


def test_a_peft_folder_is_a_start_as_good_as_the_file(tiny_bundle: Path, tmp_path: Path) -> None:
    """What an operator exports: PEFT; what `train-once`, `generate` and `personalise` begin with: either."""
    manifest = open_bundle(tiny_bundle).manifest
    numbers = np.random.default_rng(1).standard_normal(manifest.layout.numbers).astype(np.float32) * 0.1
    fleet = adapter_of(manifest, numbers, a_seed=bytes(range(16)))
    write_adapter(tmp_path / "fleet.fedge", fleet)
    folder, weights = tmp_path / "peft", tiny_bundle / WEIGHTS
    export_peft(folder, fleet.tensors, manifest.lora, manifest, weights, layout=manifest.layout)
    data = tmp_path / "own.jsonl"
    lines = [{"prompt": f"how are you {line}", "completion": "i am fine thank you"} for line in range(20)]
    data.write_bytes(msgspec.json.Encoder().encode_lines(lines))
    found = [
        personalise_once(
            tiny_bundle,
            data,
            start,
            tmp_path / "mine",
            steps=(2,),
            alone_steps=(),
            training=TRAINING,
            threads=1,
        )
        for start in (tmp_path / "fleet.fedge", tmp_path / "peft")
    ]
    assert found[0].tried == pytest.approx(found[1].tried, abs=1e-6)


def test_without_five_conversations_nothing_is_begun(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    zero = adapter_of(manifest, np.zeros(manifest.layout.numbers, np.float32), a_seed=bytes(16))
    write_adapter(tmp_path / "fleet.safetensors", zero)
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="too little data"):
        personalise_once(
            tiny_bundle,
            tmp_path / "own.jsonl",
            tmp_path / "fleet.safetensors",
            tmp_path / "mine",
            training=TRAINING,
        )
    assert not (tmp_path / "mine").exists()
