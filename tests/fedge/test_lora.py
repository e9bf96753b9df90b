"""The adapter's order of numbers and its frozen half."""

import hashlib

import numpy as np
import pytest

from fedge.errors import DataError, UnsupportedError
from fedge.lora import ALL_LINEAR, AdapterLayout, LoraConfig, frozen_a, module_scale

SHAPES = {"self_attn.v_proj": (6, 16), "self_attn.q_proj": (12, 16)}
SEED = bytes(range(16))
KNOWN = "d903e64aecd06fc68588a7fc65dbf91b040673777e0ffb504d476696387b030d"


def layout() -> AdapterLayout:
    return AdapterLayout.of(2, SHAPES, 4)


def test_the_order_is_layer_by_layer_with_sorted_modules() -> None:
    assert list(layout().b_shapes) == [
        "L0/self_attn.q_proj.B",
        "L0/self_attn.v_proj.B",
        "L1/self_attn.q_proj.B",
        "L1/self_attn.v_proj.B",
    ]
    assert layout().numbers == 2 * 4 * (12 + 6)
    assert layout().a_shapes["L1/self_attn.v_proj.A"] == (4, 16)


def test_split_gives_views_and_join_takes_them_back() -> None:
    vector = np.arange(layout().numbers, dtype=np.float32)
    parts = layout().split(vector)
    assert all(np.shares_memory(part, vector) for part in parts.values())
    assert parts["L0/self_attn.v_proj.B"][0, 0] == 48
    np.testing.assert_array_equal(layout().join(dict(reversed(parts.items()))), vector)


def test_join_and_split_refuse_what_does_not_fit() -> None:
    parts = layout().split(np.zeros(layout().numbers, np.float32))
    with pytest.raises(DataError, match=r"L0/self_attn\.q_proj\.B"):
        layout().join({name: part for name, part in parts.items() if name != "L0/self_attn.q_proj.B"})
    with pytest.raises(DataError, match="surplus"):
        layout().join({**parts, "surplus": np.zeros(1, np.float32)})
    with pytest.raises(DataError, match=r"L1/self_attn\.v_proj\.B"):
        layout().join({**parts, "L1/self_attn.v_proj.B": np.zeros((4, 6), np.float32)})
    with pytest.raises(DataError, match="numbers"):
        layout().split(np.zeros(layout().numbers + 1, np.float32))


@pytest.mark.parametrize(("layers", "r"), [(0, 4), (2, 0), (2, 7), (10_000_000, 4)])
def test_sizes_out_of_range_are_refused(layers: int, r: int) -> None:
    with pytest.raises(UnsupportedError):
        AdapterLayout.of(layers, SHAPES, r)


def test_frozen_a_has_orthonormal_rows() -> None:
    a = frozen_a(SEED, "L0/self_attn.q_proj.A", 8, 576).astype(np.float64)
    np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-7)
    square = frozen_a(SEED, "x", 16, 16).astype(np.float64)
    np.testing.assert_allclose(square @ square.T, np.eye(16), atol=1e-6)


def test_frozen_a_is_the_same_on_every_machine() -> None:
    """Known answer; elementwise IEEE arithmetic leaves no room for another one."""
    data = frozen_a(SEED, "L3/self_attn.v_proj.A", 8, 576).astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest() == KNOWN


def test_frozen_a_agrees_with_householder_qr() -> None:
    """The same row space and the same rows, up to the sign that ours fixes, as LAPACK's QR of the same draws."""
    a = frozen_a(SEED, "n", 3, 5)
    public = b"fedge frozen A v1\x00" + SEED + b"n|3|5"
    draws = np.frombuffer(hashlib.shake_256(public).digest(8 * 15), "<i2").reshape(3, 5, 4).sum(2)
    q, r = np.linalg.qr(draws.T.astype(np.float64))
    np.testing.assert_allclose(a, (q * np.sign(np.diag(r))).T, atol=1e-6)


def test_every_matrix_of_a_seed_is_another_one() -> None:
    tensors = layout().frozen(SEED)
    assert tensors.keys() == layout().a_shapes.keys()
    assert len({tensor.tobytes() for tensor in tensors.values()}) == len(tensors)
    assert not np.array_equal(frozen_a(bytes(16), "n", 2, 4), frozen_a(SEED, "n", 2, 4))
    with pytest.raises(DataError, match="a_seed"):
        frozen_a(b"short", "n", 2, 4)


# ---------------------------------------------------------------- which matrices, and how strongly
def test_the_scale_is_computed_once_for_both_kinds() -> None:
    assert LoraConfig(r=16, alpha=16).scale == module_scale(16, 16, rslora=False) == 1.0
    assert LoraConfig(r=16, alpha=16, rslora=True).scale == 4.0
    named = LoraConfig(r=16, alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\.mlp": 64})
    assert named.scale_of("model.layers.0.self_attn.q_proj") == 4.0
    assert named.scale_of("model.layers.1.mlp") == 4.0
    assert named.scale_of("model.layers.11.mlp") == 1.0  # a pattern begins at a dot


PATHS = [
    f"model.layers.{layer}.{path}"
    for layer in range(12)
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]
CONFIGS: tuple[dict[str, object], ...] = (
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["self_attn.q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["model.layers.3.mlp.up_proj", "v_proj"], "layers_to_transform": [2]},
    {"target_modules": r".*\.[13]\..*(q|up)_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]},
)
PATTERNS = (
    "q_proj",
    r"layers\.1\.self_attn\.v_proj",
    r"1.*up_proj",
    "proj",
    r"^model\.layers\.2\.mlp\.up_proj",
)


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(fields["target_modules"]))
def test_targets_and_layers_mean_what_they_mean_in_peft(fields: dict[str, object]) -> None:
    from peft import LoraConfig as Theirs
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = Theirs(**fields)  # type: ignore[arg-type]
    targets = fields["target_modules"]
    ours = LoraConfig(
        targets=targets if isinstance(targets, str) else tuple(targets),  # type: ignore[arg-type]
        layers=tuple(fields.get("layers_to_transform", ())),  # type: ignore[arg-type]
        modules_to_save=tuple(fields.get("modules_to_save", ())),  # type: ignore[arg-type]
    )
    for layer, path in enumerate(PATHS):
        expected = check_target_module_exists(theirs, path)
        wanted = bool(expected) and type(expected).__name__ != "_ExcludedModule"
        assert ours.adapts(path, layer // 3) == wanted, path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_peft(pattern: str) -> None:
    """F01: every override per module."""
    from peft.utils.other import get_pattern_key

    ours = LoraConfig(rank_pattern={pattern: 3}, alpha_pattern={pattern: 30.0})
    found = {path: (3, 10.0) if get_pattern_key([pattern], path) == pattern else (8, 2.0) for path in PATHS}
    assert {path: (ours.rank_of(path), ours.scale_of(path)) for path in PATHS} == found
    assert ((3, 10.0) in found.values()) == (pattern != "proj")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*c", "a*a*a*a*a*b", "x" * 300, "(q_proj", "(ab){9}"])
def test_a_pattern_that_might_never_end_is_refused_unread(pattern: str) -> None:
    for fields in ({"targets": pattern}, {"rank_pattern": {pattern: 2}}, {"alpha_pattern": {pattern: 2.0}}):
        with pytest.raises((UnsupportedError, DataError), match="pattern"):
            LoraConfig(**fields)


def test_a_pattern_for_targets_names_the_layers_itself() -> None:
    with pytest.raises(UnsupportedError, match="layers"):
        LoraConfig(targets=".*q_proj", layers=(1,))
    assert LoraConfig(targets=ALL_LINEAR, layers=(1,)).adapts("model.layers.1.mlp.up_proj", 1)
    assert not LoraConfig(targets=ALL_LINEAR, layers=(1,)).adapts("model.layers.0.mlp.up_proj", 0)


# ---------------------------------------------------------------- layers that differ
MIXED = LoraConfig(
    r=4,
    alpha=8,
    targets=("q_proj", "v_proj"),
    layers=(0, 2),
    rank_pattern={r"layers\.2\.self_attn\.q_proj": 2},
    alpha_pattern={r"0\.self_attn\.v_proj": 2.0},
)


def mixed() -> AdapterLayout:
    return AdapterLayout.of(3, SHAPES, MIXED, dense={"score.weight": (3, 16), "score.bias": (3,)})


def test_every_slot_has_its_own_rank_and_the_dense_part_comes_last() -> None:
    assert mixed().shapes == {
        "L0/self_attn.q_proj.B": (12, 4),
        "L0/self_attn.v_proj.B": (6, 4),
        "L2/self_attn.q_proj.B": (12, 2),
        "L2/self_attn.v_proj.B": (6, 4),
        "dense/score.bias": (3,),
        "dense/score.weight": (3, 16),
    }
    assert mixed().numbers == 4 * (12 + 6) + 2 * 12 + 4 * 6 + 3 + 48
    vector = np.arange(mixed().numbers, dtype=np.float32)
    np.testing.assert_array_equal(mixed().join(mixed().split(vector)), vector)
    assert (mixed().split(vector)["dense/score.bias"] == vector[-51:-48]).all()
    assert not mixed().uniform
    assert layout().uniform


def test_what_is_fed_to_one_graph_computes_each_slots_own_change() -> None:
    """W' - W = scale B A for every slot, in a graph that knows one rank and one scale a module; 0 elsewhere."""
    draw = np.random.default_rng(0)
    tensors = {
        name: draw.standard_normal(shape).astype(np.float32)
        for name, shape in {**mixed().shapes, **mixed().a_shapes}.items()
    }
    fed, graph = mixed().fed(tensors), mixed().graph
    assert (graph["self_attn.q_proj"].r, graph["self_attn.q_proj"].scale) == (
        4,
        1.0,
    )  # 8/4 and 8/2: it differs
    for layer in range(3):
        for path, module in graph.items():
            name = f"L{layer}/{path}"
            assert (fed[name + ".A"].shape, fed[name + ".B"].shape) == (
                (module.r, module.n_in),
                (module.out, module.r),
            )
            change = module.scale * fed[name + ".B"] @ fed[name + ".A"]
            slot = next((slot for slot in mixed().slots if slot.name == name), None)
            expected = slot.scale * tensors[name + ".B"] @ tensors[name + ".A"] if slot else 0 * change
            np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fed["dense/score.bias"], tensors["dense/score.bias"])


def test_gradients_come_back_by_the_chain_rule() -> None:
    """Of f = sum(G * W'): by A it is scale B^T G, by B scale G A^T, as the graph computes them for what it was fed."""
    draw = np.random.default_rng(1)
    tensors = {
        name: draw.standard_normal(shape).astype(np.float32)
        for name, shape in {**mixed().b_shapes, **mixed().a_shapes}.items()
    }
    fed, graph = mixed().fed(tensors), mixed().graph
    slopes = {f"L{i}/{p}": draw.standard_normal((m.out, m.n_in)) for i in range(3) for p, m in graph.items()}
    found: dict[str, np.ndarray] = {}
    for name, g in slopes.items():
        scale = graph[name.partition("/")[2]].scale
        found[name + ".A"] = scale * fed[name + ".B"].T @ g
        found[name + ".B"] = scale * g @ fed[name + ".A"].T
    taken = mixed().taken(found)
    assert taken.keys() == {*mixed().a_shapes, *mixed().b_shapes}
    for slot in mixed().slots:
        a, b, g = tensors[slot.name + ".A"], tensors[slot.name + ".B"], slopes[slot.name]
        np.testing.assert_allclose(taken[slot.name + ".A"], slot.scale * b.T @ g, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(taken[slot.name + ".B"], slot.scale * g @ a.T, rtol=1e-4, atol=1e-5)


def test_the_same_model_under_another_config() -> None:
    other = mixed().like(LoraConfig(r=2, targets=("v_proj",)))
    assert [slot.name for slot in other.slots] == [f"L{i}/self_attn.v_proj" for i in range(3)]
    assert other.dense == ()
    with pytest.raises(UnsupportedError, match="rank"):
        mixed().like(LoraConfig(r=7, targets=("v_proj",)))
