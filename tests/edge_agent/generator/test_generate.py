"""The device's generator on a tiny bundle: the trainer's loss, its own cache, every ending and every limit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.generator import Decoding, Ending, Generator, Request, Sampling, adapter_feeds
from edge_agent.generator import decoding as decoding_module
from edge_agent.trainer import Trainer
from fedge.errors import DataError, UnsupportedError, UsageError
from fedge.lora import LoraConfig

SEED = bytes(range(16))
# Activations are rounded to 8 bits: a last bit before may be a step after. Logits are of size 1 to 5.
ROUNDING = 0.03
IDS = np.random.default_rng(5).integers(1, 290, 40).tolist()


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def adapter(bundle: Bundle) -> dict[str, np.ndarray]:
    """A of the campaign's seed, and B that has learnt something."""
    layout = bundle.layout
    b = np.random.default_rng(3).normal(0, 0.5, layout.numbers).astype(np.float32)
    return {**layout.frozen(SEED), **layout.split(b)}


@pytest.fixture(scope="module")
def generator(bundle: Bundle) -> Generator:
    return Generator(bundle)


def nll(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    rows = logits[:-1].astype(np.float64)
    return np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), ids[1:]]


def test_an_adapter_is_read_as_the_trainer_reads_it(bundle: Bundle, adapter: dict[str, np.ndarray]) -> None:
    """Within what 8-bit activations change; the exporter's gate compares the exact graphs to 1e-5."""
    found = nll(Decoding(bundle, adapter=adapter_feeds(bundle.layout, adapter)).read_all(IDS), IDS)
    batch = tiny_batch(IDS)
    trainer = Trainer(bundle, a_seed=SEED)
    b = {name: value for name, value in adapter.items() if name.endswith(".B")}
    expected, labels = trainer.row_losses(batch, b)
    bare, _ = trainer.row_losses(batch, {name: np.zeros_like(value) for name, value in b.items()})
    assert abs(found.sum() - expected[0]) / labels[0] < 0.1 < abs(bare[0] - expected[0]) / labels[0]


def tiny_batch(ids: list[int]) -> object:
    from edge_agent.dataset import Batch

    row = np.array([ids], np.int64)
    labels = np.full_like(row, -100)
    labels[:, :-1] = row[:, 1:]
    return Batch(row, np.ones_like(row), labels)


def test_cached_decoding_equals_one_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over prompt pieces, single tokens, growing buffers and a step back."""
    monkeypatch.setattr(decoding_module, "_ROOM_TOKENS", 8)
    monkeypatch.setattr(decoding_module, "PREFILL_TOKENS", 5)
    whole = Decoding(bundle).read_all(IDS)
    found = Decoding(bundle)
    assert np.allclose(found.read(IDS[:12]), whole[11], atol=ROUNDING)
    for place in range(12, 30):
        assert np.allclose(found.read([IDS[place]]), whole[place], atol=ROUNDING)
    found.keep(7)
    assert np.allclose(found.read(IDS[7:]), whole[-1], atol=ROUNDING)
    found.reset()
    assert np.allclose(found.read(IDS[:3]), whole[2], atol=ROUNDING)


def test_a_cache_that_stays_where_it_is_is_never_copied(bundle: Bundle) -> None:
    found = Decoding(bundle)
    found.read(IDS[:4])
    places = {name: value.data_ptr() for name, value in found._cache.items()}
    for token in IDS[4:20]:
        found.read([token])
    assert {name: value.data_ptr() for name, value in found._cache.items()} == places


def test_greedy_text_is_the_argmax_again_and_again(bundle: Bundle, generator: Generator) -> None:
    stream = generator.stream("the quick", Request(max_tokens=12)).finish()
    ids = list(stream.prompt)
    for token in stream.ids:
        logits = Decoding(bundle).read(ids)
        logits[bundle.manifest.eos_id] = min(logits) if token != bundle.manifest.eos_id else np.inf
        known = np.array([generator.encoder.stands_for_text(i) for i in range(len(logits))])
        assert token == np.where(known, logits, -np.inf).argmax()
        ids.append(token)


def test_pieces_joined_are_the_text_and_the_same_prompt_gives_the_same_text(bundle: Bundle) -> None:
    request = Request(Sampling(temperature=1.5, seed=4), max_tokens=30)
    stream = Generator(bundle).stream("how are", request)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == Generator(bundle).stream("how are", request).finish().text
    assert stream.ending in (Ending.MAX_TOKENS, Ending.EOS)
    other = Request(Sampling(temperature=1.5, seed=5), 30)
    assert Generator(bundle).stream("how are", other).finish().ids != stream.ids


def test_streams_that_take_turns_do_not_disturb_each_other(generator: Generator) -> None:
    alone = [generator.stream(text, Request(max_tokens=8)).finish().ids for text in ("how", "the")]
    both = [generator.stream(text, Request(max_tokens=8)) for text in ("how", "the")]
    rest: list[Iterator[str]] = list(both)
    while rest:
        rest = [stream for stream in rest if next(stream, None) is not None]
    assert [stream.ids for stream in both] == alone


def test_a_stop_string_ends_the_text_and_is_not_in_it(generator: Generator) -> None:
    request = Request(Sampling(temperature=1.0, seed=1), max_tokens=40)
    text = generator.stream("the", request).finish().text
    stop = text[10:13]
    stream = generator.stream("the", changed(request, stop=(stop,))).finish()
    assert stream.text == text[: text.index(stop)]
    assert stream.ending is Ending.STOP


def changed(request: Request, **changes: object) -> Request:
    return dataclasses.replace(request, **changes)


def test_the_end_of_text_token_and_further_ones_end_it(generator: Generator) -> None:
    first = generator.stream("the", Request(max_tokens=4)).finish().ids
    stream = generator.stream("the", Request(max_tokens=4, stop_ids=(first[2],))).finish()
    assert stream.ids == first[: first.index(first[2])]
    assert stream.ending is Ending.EOS


def test_rows_beyond_the_tokenizer_are_never_written(bundle: Bundle, generator: Generator) -> None:
    """F08c: the table has rows that no token of the tokenizer stands for."""
    silent = generator._silent
    assert silent.any(), "the tiny model has more rows than tokens"
    stream = generator.stream("the", Request(Sampling(temperature=50.0, seed=2), max_tokens=100)).finish()
    assert len(stream.ids) > 20
    assert not silent[stream.ids].any()


def test_generation_stops_at_the_end_of_the_position_table_and_says_so(generator: Generator) -> None:
    """F13: 128 positions, a prompt of 100 tokens, 100 more asked for."""
    stream = generator.stream(([*IDS] * 3)[:100], Request(Sampling(temperature=9.0, seed=3), 100)).finish()
    assert stream.ending is Ending.POSITIONS
    assert len(stream.ids) == 28


@pytest.mark.parametrize("tokens", [128, 500])
def test_a_prompt_that_leaves_no_position_is_refused_or_cut(generator: Generator, tokens: int) -> None:
    """F13: never an error of the runtime."""
    prompt = (IDS * 20)[:tokens]
    with pytest.raises(DataError, match=r"position table.*128 positions"):
        generator.stream(prompt)
    stream = generator.stream(prompt, Request(max_tokens=10, long="cut")).finish()
    assert stream.prompt == prompt[-118:]
    assert stream.cut == tokens - 118
    assert len(generator.stream(prompt, Request(max_tokens=500, long="cut")).prompt) == 64


def test_an_empty_prompt_and_senseless_requests_are_refused(generator: Generator, bundle: Bundle) -> None:
    with pytest.raises(DataError, match="no prompt"):
        generator.stream("")
    with pytest.raises(UsageError, match="max-tokens"):
        Request(max_tokens=0)
    with pytest.raises(UsageError, match="refused or cut"):
        Request(long="shorten")  # type: ignore[arg-type]


def test_the_next_turn_reads_only_what_is_new(generator: Generator) -> None:
    read: list[int] = []
    whole = generator.decoding.read
    generator.decoding.read = lambda ids: (read.append(len(ids)), whole(ids))[1]  # type: ignore[method-assign]
    try:
        first = generator.stream(IDS[:20], Request(max_tokens=5)).finish()
        generator.stream([*first.prompt, *first.ids, *IDS[20:24]], Request(max_tokens=1)).finish()
    finally:
        del generator.decoding.read
    assert read[0] == 20
    assert read[-1] == len(first.ids) - (len(read) - 2) + 4


def test_an_owner_can_stop_between_tokens(bundle: Bundle) -> None:
    class Stop(Exception):
        pass

    runs = []

    def pause() -> None:
        runs.append(1)
        if len(runs) == 3:
            raise Stop

    stream = Generator(bundle, pause=pause).stream("the quick", Request(max_tokens=50))
    with pytest.raises(Stop):
        stream.finish()
    assert len(runs) == 3


def test_an_adapter_of_another_rank_and_scale_is_the_same_change(bundle: Bundle) -> None:
    """Rank 3, alpha 12: scale 4 where the graph has 2 built in."""
    config = LoraConfig(r=3, alpha=12.0, targets=tiny.LORA.targets)
    layout = bundle.layout.like(config)
    draw = np.random.default_rng(1)
    tensors = {
        n: draw.normal(0, 0.1, s).astype(np.float32) for n, s in (layout.a_shapes | layout.b_shapes).items()
    }
    wide = bundle.layout
    same = {}
    for name in wide.a_shapes:
        b = name.removesuffix(".A") + ".B"
        same[name] = np.concatenate([tensors[name], np.zeros((5, tensors[name].shape[1]), np.float32)])
        same[b] = np.concatenate([tensors[b] * 2, np.zeros((tensors[b].shape[0], 5), np.float32)], axis=1)
    found = Decoding(bundle, adapter=adapter_feeds(bundle.layout, tensors, layout)).read_all(IDS)
    expected = Decoding(bundle, adapter=adapter_feeds(bundle.layout, same)).read_all(IDS)
    assert np.abs(found - Decoding(bundle).read_all(IDS)).max() > 0.01
    assert np.allclose(found, expected, atol=ROUNDING)


def test_no_part_of_an_adapter_is_dropped(bundle: Bundle, adapter: dict[str, np.ndarray]) -> None:
    name = next(iter(adapter))
    with pytest.raises(DataError, match=r"does not fit.*" + name.replace(".", r"\.")):
        adapter_feeds(bundle.layout, {n: v for n, v in adapter.items() if n != name})
    with pytest.raises(DataError, match=r"no place.*L9/mlp"):
        adapter_feeds(bundle.layout, {**adapter, "L9/mlp.A": adapter[name]})


def test_a_bundle_without_an_inference_graph_says_so(bundle: Bundle) -> None:
    manifest = bundle.manifest
    files = {name: entry for name, entry in manifest.files.items() if name != "infer.onnx"}
    bare = Bundle(
        bundle.folder, msgspec.structs.replace(manifest, files=files), bundle.stamp, bundle._weights
    )
    with pytest.raises(UnsupportedError, match=r"lacks a graph.*infer\.onnx"):
        Decoding(bare)
