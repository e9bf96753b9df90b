"""Bundle and people of the learning benchmark, prepared once: who takes part, who is never seen, and their files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from report import progress

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Encode, Row, load_dataset, load_encoder
from edge_agent.personal import STEPS
from fedge.io import assets
from fedge.lora import LoraConfig
from fedge.messages import Training
from firmware_sim.processes.evaluation import PersonLoss, evaluate_people, pooled
from firmware_sim.processes.local_training import Plan
from firmware_sim.processes.people import read_people, split_people, write_person

MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done: the demo's default, or a smoke test."""

    devices: int = 16
    bloc_devices: int = 8
    unseen: int = 8
    rounds: int = 8
    steps: int = 5
    heldout: int = 24
    own_steps: tuple[int, ...] = STEPS  # of a person, on top of the fleet's adapter


QUICK = Scale(devices=4, bloc_devices=2, unseen=2, rounds=2, steps=1, heldout=4, own_steps=(1, 2))


class Bench:
    """Where the work is done: `folder` holds people's files, `processes` work at a time.

    `trained` is the bundle that devices train on, the very one or its `int8c`; losses are always of `bundle`.
    """

    def __init__(
        self, bundle: Path | None, scale: Scale, folder: Path, processes: int, trained: Path | None = None
    ) -> None:
        self.scale, self.folder, self.processes = scale, folder, processes
        self.bundle = open_bundle(bundle or make_bundle(folder / "bundle"))
        self.trained = open_bundle(trained) if trained else self.bundle
        self._encode = load_encoder(self.bundle.tokenizer)
        part, unseen = _write_people(scale, folder, self._encode)
        self.groups = {"took part": part, "never seen": unseen}

    @property
    def facts(self) -> dict[str, object]:
        """What a kept result depends on, beside its own settings."""
        return {
            "scale": self.scale,
            "bundle": self.bundle.stamp.manifest_sha256.hex(),
            "trained": self.trained.stamp.manifest_sha256.hex(),
            "words": self.digest("train", "heldout"),
        }

    def digest(self, *names: str) -> str:
        """Of everybody's files of these names."""
        found = hashlib.sha256()
        for person in (person for people in self.groups.values() for person in people):
            for name in names:
                found.update((self.folder / person / f"{name}.jsonl").read_bytes())
        return found.hexdigest()

    def plan(self, training: Training, *, depth: int = 0) -> Plan:
        """The rounds of those who take part."""
        people = {name: self.folder / name / "train.jsonl" for name in self.groups["took part"]}
        return Plan(self.trained.folder, people, training, self.scale.rounds, self.scale.steps, depth)

    def rows(self, person: str, name: str, training: Training) -> tuple[Row, ...]:
        """Rows of one of a person's files: train, validation or heldout."""
        return load_dataset(
            self.folder / person / f"{name}.jsonl",
            training.template,
            self._encode,
            eos_id=self.bundle.manifest.eos_id,
            window=training.window_tokens,
        ).rows

    def losses(self, adapter: bytes, training: Training) -> dict[str, PersonLoss]:
        """Of everybody, on held-out messages."""
        path = self.folder / "adapter.f32"
        path.write_bytes(adapter)
        names = [name for people in self.groups.values() for name in people]
        files = {name: self.folder / name / "heldout.jsonl" for name in names}
        return evaluate_people(
            self.bundle.folder, files, path, training, processes=self.processes, progress=told("held-out")
        )


def loss_of(run: dict[str, Any], people: list[str]) -> float:
    """Loss per token of these people in a kept result."""
    return pooled(PersonLoss(*run["losses"][name]) for name in people)


def bytes_of(run: dict[str, Any]) -> float:
    """What a device sent."""
    return float(run["bytes_up"])


def told(name: str) -> Callable[[int, int], None]:
    """Progress of `name`."""
    return lambda done, total: progress(f"{name} {done}/{total}")


def make_bundle(folder: Path, weights_format: str | None = None) -> Path:
    """A bundle of the model in this format, None = its own grid."""
    from quantize.bundle import quantize  # torch and transformers: only when there is no bundle yet

    source = assets.pull("models", MODEL)
    progress(f"quantizing {MODEL}{f' to {weights_format}' if weights_format else ''}, a minute or two")
    key = Ed25519PrivateKey.generate()
    quantize(str(source), folder, key, lora=LoraConfig(), weights_format=weights_format)
    return folder


def _write_people(scale: Scale, folder: Path, encode: Encode) -> tuple[list[str], list[str]]:
    data = assets.pull("data", "chitchat")
    groups = split_people(read_people(data), scale.devices, scale.unseen, encode=encode)
    for split in (*groups[0], *groups[1]):
        write_person(
            folder / split.person, dataclasses.replace(split, heldout=split.heldout[: scale.heldout])
        )
    return [split.person for split in groups[0]], [split.person for split in groups[1]]
