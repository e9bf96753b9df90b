"""Federated rules, device and hub together: what a round's sum does to the model is what the mean of the devices did.

The model is a stand-in with one quadratic loss per matrix, so that every gradient is known in closed form; the loop is
the shipped one, and so are both ends of every rule.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
from quadratic import OneLabel, Quadratic

from edge_agent.trainer.rules import local_part, train_by_rule
from edge_agent.trainer.trainer import Trainer
from fedge.errors import DataError, UnsupportedError
from fedge.lora import RULES, AdapterLayout, LoraConfig, split
from fedge.messages import Training
from fedge.rules import Core, Rule, rule_of, sketch_sizes, started_from

SEED = bytes(range(16))
SHAPES = {"self_attn.q_proj": (24, 32), "self_attn.v_proj": (16, 32)}
PLAIN = AdapterLayout.of(2, SHAPES, LoraConfig(r=4, alpha=8.0), dense={"score.bias": (3,)})
MIXED = AdapterLayout.of(
    2,
    SHAPES,
    LoraConfig(
        r=4, alpha=8.0, rank_pattern={"v_proj": 2}, alpha_pattern={r"1\.self_attn\.q_proj": 2.0}, layers=()
    ),
)
DEVICES = 6


def training(rule: str, rate: float = 0.02) -> Training:
    return Training(rule=rule, a_seed=SEED, rate=rate, weight_decay=0.0)


def deltas(
    rule: str, layout: AdapterLayout, state: np.ndarray, number: int, steps: int = 4
) -> list[np.ndarray]:
    found = []
    for device in range(DEVICES):
        toy = cast(Trainer, Quadratic(layout, device))
        found.append(
            train_by_rule(toy, state, [OneLabel()] * steps, training(rule), round_number=number).delta
        )
    return found


def products(rule: Rule, state: np.ndarray) -> dict[str, np.ndarray]:
    """scale B A of every matrix, in float64."""
    found = rule.tensors(state)
    return {
        s.name: s.scale * found[f"{s.name}.B"].astype(float) @ found[f"{s.name}.A"].astype(float)
        for s in rule.layout.slots
    }


def federated(rule: Rule, name: str, rounds: int) -> Iterator[np.ndarray]:
    """The adapter file after each round, under plain means."""
    state = rule.initial()
    for number in range(1, rounds + 1):
        part = rule.part(number, probing=rule.probing(state))
        total = np.sum(deltas(name, rule.layout, state, number), axis=0)
        assert total.size == part.numbers
        state = rule.apply(part, state, total, 1 / DEVICES)
        yield state


def loss(layout: AdapterLayout, rule: Rule, state: np.ndarray) -> float:
    toys = [Quadratic(layout, device) for device in range(DEVICES)]
    for toy in toys:
        toy.freeze_a(SEED)
    return sum(toy.loss_and_gradients(None, rule.tensors(state)).loss_sum for toy in toys) / DEVICES


# ---------------------------------------------------------------- all rules
@pytest.mark.parametrize("layout", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", RULES)
def test_a_file_begins_as_the_untouched_model_and_rounds_learn(name: str, layout: AdapterLayout) -> None:
    rule = rule_of(name, layout, SEED)
    state = rule.initial()
    assert state.dtype == np.float32
    assert all(not product.any() for product in products(rule, state).values())
    before = loss(layout, rule, state)
    *_, last = federated(rule, name, 8)
    assert last.size == rule.numbers == state.size
    assert loss(layout, rule, last) < 0.97 * before
    if layout.dense:
        moved = rule.tensors(last)["dense/score.bias"]
        assert (moved > 0.2).all(), "what is dense trains along"
        assert (rule.tensors(state)["dense/score.bias"] == 0).all()


@pytest.mark.parametrize("name", ["ffa", "alternating", "core"])
def test_the_mean_that_travels_is_the_mean_of_the_products(name: str) -> None:
    """Exact: what the hub makes of the sum is the mean of what the devices have, but for rounding."""
    rule = rule_of(name, PLAIN, SEED)
    state = rule.initial()
    for number in range(1, 5):
        probing = rule.probing(state)
        part = rule.part(number, probing=probing)
        sent = deltas(name, PLAIN, state, number)
        new = rule.apply(part, state, np.sum(sent, axis=0), 1 / DEVICES)
        if not probing:
            mean: dict[str, np.ndarray] = {}
            for delta in sent:
                own = products(rule, rule.apply(part, state, delta, 1.0))
                mean = {slot: mean.get(slot, 0) + product / DEVICES for slot, product in own.items()}
            for slot, product in products(rule, new).items():
                np.testing.assert_allclose(product, mean[slot], atol=2e-6 * np.abs(mean[slot]).max() + 1e-9)
        state = new


def test_averaging_both_factors_apart_is_not_the_mean_of_the_products() -> None:
    """Why `fedit` is the baseline and not a rule to choose."""
    rule = rule_of("fedit", PLAIN, SEED)
    *_, state = federated(rule, "fedit", 2)
    sent = deltas("fedit", PLAIN, state, 3)
    part = rule.part(3, probing=False)
    mean = sum(products(rule, rule.apply(part, state, delta, 1.0))["L0/self_attn.q_proj"] for delta in sent)
    got = products(rule, rule.apply(part, state, np.sum(sent, axis=0), 1 / DEVICES))["L0/self_attn.q_proj"]
    assert np.linalg.norm(got - mean / DEVICES) > 1e-4 * np.linalg.norm(got)


def test_a_sketch_gives_back_the_best_rank_of_the_mean_change() -> None:
    rule = rule_of("sketch", PLAIN, SEED)
    *_, state = federated(rule, "sketch", 3)
    part = rule.part(4, probing=False)
    trained = []
    for device in range(DEVICES):
        toy = cast(Trainer, Quadratic(PLAIN, device))
        local = local_part(rule, state, 4, 0.02)
        kept: dict[str, np.ndarray] = {}
        done = train_by_rule(
            toy,
            state,
            [OneLabel()] * 4,
            training("sketch"),
            keep=lambda s, kept=kept: kept.update(v=s.vector.copy()),
        )
        after = local.feeds(kept["v"])
        trained.append((done.delta, after))
    new = products(rule, rule.apply(part, state, np.sum([d for d, _ in trained], axis=0), 1 / DEVICES))
    for slot in PLAIN.slots:
        mean = (
            sum(
                slot.scale * t[f"{slot.name}.B"].astype(float) @ t[f"{slot.name}.A"].astype(float)
                for _, t in trained
            )
            / DEVICES
        )
        s = np.linalg.svd(mean, compute_uv=False)
        best = np.linalg.norm(s[slot.r :])
        assert np.linalg.norm(new[slot.name] - mean) <= 3 * best + 1e-4 * np.linalg.norm(mean)
        assert np.linalg.norm(new[slot.name] - mean) < 0.2 * np.linalg.norm(mean)


def test_devices_of_other_ranks_take_part_in_a_sketch() -> None:
    """Mixed ranks: only the product counts, so a device may train fewer columns."""
    rule = rule_of("sketch", PLAIN, SEED)
    draw = np.random.default_rng(0)
    before = rule.tensors(rule.initial())
    means = {slot.name: np.zeros((slot.out, slot.n_in)) for slot in PLAIN.slots}
    total = np.zeros(rule.part(1, probing=False).numbers, np.float32)
    for rank in (1, 2, 4):
        after = dict(before)
        for slot in PLAIN.slots:
            b, a = draw.standard_normal((slot.out, rank)), draw.standard_normal((rank, slot.n_in))
            after[f"{slot.name}.B"], after[f"{slot.name}.A"] = b.astype(np.float32), a.astype(np.float32)
            means[slot.name] += slot.scale * b @ a / 3
        total += rule.change(before, after)  # type: ignore[attr-defined]
    new = products(rule, rule.apply(rule.part(1, probing=False), rule.initial(), total, 1 / 3))
    for slot in PLAIN.slots:
        s = np.linalg.svd(means[slot.name], compute_uv=False)
        best = np.linalg.norm(s[slot.r :])
        assert np.linalg.norm(new[slot.name] - means[slot.name]) < 3 * best


# ---------------------------------------------------------------- what travels
def test_what_travels_has_the_size_that_the_rule_says() -> None:
    b = PLAIN.numbers
    a = 2 * 4 * (32 + 32)
    found = {
        name: [rule_of(name, PLAIN, SEED).part(n, probing=False).numbers for n in (1, 2)] for name in RULES
    }
    slots = [(slot.out, slot.n_in, *sketch_sizes(slot)) for slot in PLAIN.slots]
    sketch = 3 + sum(out * k + width * n_in for out, n_in, k, width in slots)
    assert found == {
        "ffa": [b, b],
        "fedit": [a + b, a + b],
        "alternating": [b, a],
        "core": [4 * 16 + 3] * 2,
        "sketch": [sketch, sketch],
    }
    assert rule_of("core", PLAIN, SEED).part(1, probing=True).numbers == a + b - 3


def test_only_the_half_whose_turn_it_is_moves() -> None:
    rule = rule_of("alternating", PLAIN, SEED)
    states = [rule.initial(), *federated(rule, "alternating", 3)]
    for number, (before, after) in enumerate(pairwise(states), 1):
        old, new = rule.tensors(before), rule.tensors(after)
        moved = {name[-1] for name in new if name[0] == "L" and not np.array_equal(old[name], new[name])}
        assert moved == ({"B"} if number % 2 else {"A"})


@pytest.mark.parametrize("name", ["ffa", "fedit", "core", "alternating"])
def test_with_a_depth_only_the_top_layers_move(name: str) -> None:
    rule = rule_of(name, PLAIN, SEED)
    *_, state = federated(rule, name, 2)
    toy = cast(Trainer, Quadratic(PLAIN, 0))
    number = 3
    part = rule.part(number, probing=False)
    delta = train_by_rule(toy, state, [OneLabel()] * 2, training(name), round_number=number, depth=1).delta
    old, new = rule.tensors(state), rule.tensors(rule.apply(part, state, delta, 1.0))
    moved = {tensor[:2] for tensor in new if not np.array_equal(old[tensor], new[tensor])}
    assert moved == {"L1", "de"}


# ---------------------------------------------------------------- core
def test_the_basis_holds_the_first_gradient() -> None:
    """A random basis would hold r / in of it."""
    rule = rule_of("core", PLAIN, SEED)
    state = next(federated(rule, "core", 1))
    found = rule.split(state)
    assert not rule.probing(state)
    for slot in PLAIN.slots:
        u, v = found[f"{slot.name}.U"].astype(float), found[f"{slot.name}.V"].astype(float)
        np.testing.assert_allclose(u.T @ u, np.eye(slot.r), atol=1e-6)
        np.testing.assert_allclose(v @ v.T, np.eye(slot.r), atol=1e-6)
        gradient = np.mean([Quadratic(PLAIN, d).target(slot.name) for d in range(DEVICES)], axis=0)
        assert np.linalg.norm(u @ (u.T @ gradient @ v.T) @ v) > 0.8 * np.linalg.norm(gradient)


def test_a_probe_that_comes_after_the_basis_changes_nothing() -> None:
    rule = rule_of("core", PLAIN, SEED)
    state = next(federated(rule, "core", 1))
    probe = rule.part(1, probing=True)
    late = np.random.default_rng(0).standard_normal(probe.numbers).astype(np.float32)
    np.testing.assert_array_equal(rule.apply(probe, state, late, 1.0), state)


def test_a_probe_is_as_long_on_every_device_and_in_both_halves() -> None:
    """So that the campaign's first codec holds it, and its rounding drowns neither half."""
    rule = rule_of("core", PLAIN, SEED)
    part = rule.part(1, probing=True)
    for delta in deltas("core", PLAIN, rule.initial(), 1):
        assert np.linalg.norm(delta) == pytest.approx(0.02 * part.numbers**0.5, rel=1e-5)
        sketches = split(part.shapes, delta)
        halves = [
            np.linalg.norm([np.linalg.norm(v) for n, v in sketches.items() if n[-1] == x]) for x in "UV"
        ]
        assert 0.3 < halves[0] / halves[1] < 3


# ---------------------------------------------------------------- a campaign that starts from an adapter
@pytest.mark.parametrize("name", RULES)
def test_a_start_is_the_same_function_under_every_rule(name: str) -> None:
    """F01: of lower rank, other scale and fewer matrices than the bundle has; the product is what counts."""
    theirs = PLAIN.like(LoraConfig(r=3, alpha=3.0, rslora=True, targets=("q_proj",)))
    draw = np.random.default_rng(0)
    tensors = {
        n: draw.standard_normal(shape).astype(np.float32)
        for n, shape in {**theirs.a_shapes, **theirs.b_shapes}.items()
    }
    state = started_from(name, PLAIN, SEED, theirs, tensors)
    rule = rule_of(name, PLAIN, SEED, numbers=state.size)
    found = products(rule, state)
    for slot in PLAIN.slots:
        other = next((one for one in theirs.slots if one.name == slot.name), None)
        expected = np.zeros((slot.out, slot.n_in))
        if other is not None:
            a, b = tensors[f"{slot.name}.A"].astype(float), tensors[f"{slot.name}.B"].astype(float)
            expected = other.scale * b @ a
        np.testing.assert_allclose(found[slot.name], expected, atol=1e-5)
    assert not rule.probing(state)


def test_a_start_under_ffa_has_its_own_a_with_orthonormal_rows_and_trains() -> None:
    theirs = PLAIN.like(LoraConfig(r=4, alpha=8.0))
    draw = np.random.default_rng(0)
    tensors = {
        n: draw.standard_normal(shape).astype(np.float32)
        for n, shape in {**theirs.a_shapes, **theirs.b_shapes}.items()
    }
    state = started_from("ffa", PLAIN, SEED, theirs, tensors)
    assert state.size == PLAIN.numbers + 2 * 4 * 64
    rule = rule_of("ffa", PLAIN, SEED, numbers=state.size)
    a = rule.tensors(state)["L1/self_attn.v_proj.A"].astype(float)
    np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-6)
    assert rule.part(1, probing=False).numbers == PLAIN.numbers
    sent = deltas("ffa", PLAIN, state, 1)
    new = rule.apply(rule.part(1, probing=False), state, np.sum(sent, axis=0), 1 / DEVICES)
    np.testing.assert_array_equal(rule.tensors(new)["L1/self_attn.v_proj.A"], a.astype(np.float32))
    assert loss(PLAIN, rule, new) < loss(PLAIN, rule, state)


def test_what_the_bundle_has_no_room_for_is_refused_by_name() -> None:
    for config in (LoraConfig(r=5), LoraConfig(r=2, targets=("q_proj",))):
        theirs = PLAIN.like(config)
        tensors = {n: np.ones(s, np.float32) for n, s in {**theirs.a_shapes, **theirs.b_shapes}.items()}
        room = PLAIN.like(LoraConfig(r=4, targets=("v_proj",)))
        with pytest.raises(UnsupportedError, match=r"L0/self_attn\.q_proj"):
            started_from("ffa", room, SEED, theirs, tensors)


def test_an_unknown_rule_and_a_file_of_another_size_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="flora"):
        rule_of("flora", PLAIN, SEED)
    for name in RULES:
        with pytest.raises(DataError, match="numbers"):
            rule_of(name, PLAIN, SEED, numbers=rule_of(name, PLAIN, SEED).numbers + 1)
    assert isinstance(rule_of("core", PLAIN, SEED), Core)
