"""`fedge sim demo`: the main job, whole, on one machine and in one command.

A real 4-bit language model, real people's messages, one process for each person, a real broker, masked sums; in the
end a standard PEFT adapter, a page and a table. Each stage leaves something durable in the run's folder, so that a run
that was stopped, or killed, goes on where it was.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fedge.errors import DataError, UnavailableError, UsageError
from fedge.io import assets, durable
from fedge.io.model_source import resolve_model
from fedge.io.wheels import Progress
from fedge.limits import BLOC_DEVICES_MAX, BLOC_DEVICES_MIN
from fedge.messages import Training
from fedge.release import MANIFEST, TOKENIZER, Manifest
from firmware_sim.pages.screen import Screen
from firmware_sim.processes import people as chitchat
from firmware_sim.processes.cgroups import Cgroups, Limits
from firmware_sim.processes.evaluation import PersonLoss, evaluate_people
from firmware_sim.processes.export import quantize_in_child
from firmware_sim.processes.fleet import LocalFleet
from firmware_sim.processes.outcome import Parts, result_of
from firmware_sim.processes.process_faults import ProcessFaults, draw_strikes, needs_lines
from firmware_sim.processes.report import write_report
from firmware_sim.processes.result import Result, read_result, write_result
from firmware_sim.processes.shaper import LINES, Line
from firmware_sim.processes.watch import Watch
from hub.blobs import Blobs
from hub.campaigns import Wish
from hub.export import export_adapter

CAMPAIGN: Final = "demo"
SETTINGS: Final = "run.json"
RESULT: Final = "result.json"
_LOOK_SECONDS: Final = 0.3


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for; kept in the run's folder."""

    devices: Annotated[int, Meta(ge=BLOC_DEVICES_MIN, le=256)] = 16
    unseen: Annotated[int, Meta(ge=1, le=256)] = 8
    rounds: Annotated[int, Meta(ge=1, le=1_000)] = 8
    steps: Annotated[int, Meta(ge=1, le=1_000)] = 5
    bloc: Annotated[int, Meta(ge=BLOC_DEVICES_MIN, le=BLOC_DEVICES_MAX)] = 8
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    model: str = "smollm2-135m"
    broker: str = "auto"
    reference: bool = False
    faults: dict[
        str, Annotated[int, Meta(ge=1)]
    ] = {}  # firmware_sim.processes.process_faults: name -> how many
    # One of firmware_sim.processes.shaper.LINES: how every device reaches the broker; empty = directly.
    line: str = ""
    memory_mb: Annotated[int, Meta(ge=0)] = 0  # of each agent, by cgroup; 0 = no bound
    cpus: Annotated[float, Meta(ge=0)] = 0.0

    def numbers(self) -> dict[str, int]:
        """What the result repeats of it."""
        names = {"seed": self.seed, "devices": self.devices, "bloc_devices": self.bloc}
        return {**names, "rounds": self.rounds, "steps": self.steps}


def run(folder: Path, settings: Settings, *, resume: bool, fresh: bool) -> Result:
    """Runs the demo in `folder` and returns what came out. UsageError when it must be told how to treat an old run."""
    if settings.devices % settings.bloc:
        raise UsageError(
            "devices must fill whole blocs",
            field="devices",
            value=settings.devices,
            hint=f"Take a multiple of --bloc {settings.bloc}",
        )
    if settings.line and settings.line not in LINES:
        raise UsageError(
            "no such line", field="line", value=settings.line, hint=f"There are {', '.join(LINES)}"
        )
    settings = _enter(folder, settings, resume=resume, fresh=fresh)
    if (folder / RESULT).exists():
        return read_result(folder / RESULT)
    with Screen() as screen:
        try:
            return _Demo(folder, settings, screen).run()
        except KeyboardInterrupt:
            screen.note(f"stopped; go on with: fedge sim demo --resume --out {folder}")
            raise


def _enter(folder: Path, settings: Settings, *, resume: bool, fresh: bool) -> Settings:
    known = folder / SETTINGS
    if folder.exists() and any(folder.iterdir()) and not known.exists():
        raise UsageError(
            "the folder holds something else", field="out", value=str(folder), hint="Choose another --out"
        )
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if known.exists():
        if not resume and not (folder / RESULT).exists():
            raise UsageError(
                "an unfinished run is in this folder",
                field="out",
                value=str(folder),
                hint="Go on with it: --resume, or throw it away: --fresh",
            )
        return _read_settings(known)
    durable.make_folder(folder, secret=True)
    durable.write_bytes(known, msgspec.json.encode(settings))
    return settings


def _read_settings(path: Path) -> Settings:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} cannot be read: {error}", hint="Start anew: --fresh") from error


class _Demo:
    """One run: its folder, its settings, and how long its parts took."""

    def __init__(self, folder: Path, settings: Settings, screen: Screen) -> None:
        self.folder, self.settings, self.screen = folder, settings, screen
        self.seconds: dict[str, float] = {}
        self.cores = len(os.sched_getaffinity(0))
        self.bundle = folder / "bundle"
        self.adapter = folder / "adapter.f32"

    def run(self) -> Result:
        began = time.monotonic()
        with self._timed("prepare"):
            source = resolve_model(self.settings.model, progress=self._told("model"))
            data = assets.pull("data", "chitchat", progress=self._told("messages"))
        with self._timed("quantize"):
            manifest = self._quantize(str(source.path or source.hub_id))
        part, unseen = self._people(data)
        everyone = {name: self.folder / "people" / name / "heldout.jsonl" for name in (*part, *unseen)}
        with self._timed("evaluate"):
            before = self._evaluate("before", everyone, manifest, Training())
        with self._timed("train"):
            watch, fleet = self._train(part)
        campaign = fleet.campaign(CAMPAIGN)
        assert campaign is not None
        blobs = Blobs(fleet.hub_home / "blobs")
        durable.write_bytes(self.adapter, blobs.read(campaign.adapter))
        durable.make_folder(self.folder / "adapter")
        export_adapter(campaign, blobs, self.folder / "adapter")
        with self._timed("evaluate"):
            after = self._evaluate("after", everyone, manifest, campaign.training)
            reference = self._reference(part, everyone, manifest, campaign.training)
        self.seconds["total"] = time.monotonic() - began
        parts = Parts(
            manifest=manifest,
            watch=watch,
            figures=list(fleet.figures().values()),
            part=part,
            before=before,
            after=after,
            reference=reference,
            seconds=self.seconds,
            broker=self.broker,
            restarts=fleet.supervisor.restarts,
        )
        result = result_of(parts, self.settings.numbers())
        write_result(result, self.folder / RESULT)
        write_report(result, self.folder / "report.html")
        return result

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began

    def _told(self, name: str) -> Progress:
        def tell(phase: str, done: int, total: int) -> None:
            self.screen.bar(name, done, total or 1, phase)

        return tell

    # ------------------------------------------------------------ stages
    def _quantize(self, source: str) -> Manifest:
        if not (self.bundle / MANIFEST).exists():
            quantize_in_child(
                source,
                self.bundle,
                self._publisher(),
                self.settings.model,
                lambda phase, share: self.screen.bar("quantize", share, 1.0, phase),
            )
        self.screen.bar("quantize", 1.0, 1.0, "4-bit bundle, checked against torch and signed")
        return msgspec.json.decode((self.bundle / MANIFEST).read_bytes(), type=Manifest)

    def _publisher(self) -> bytes:
        """The Ed25519 key that signs this run's bundle."""
        path = self.folder / "publisher.key"
        if not path.exists():
            durable.write_bytes(path, os.urandom(32), secret=True)
        return path.read_bytes()

    def _people(self, data: Path) -> tuple[list[str], list[str]]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.bundle / TOKENIZER))
        part, unseen = chitchat.split_people(
            chitchat.read_people(data),
            self.settings.devices,
            self.settings.unseen,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        )
        for split in (*part, *unseen):
            chitchat.write_person(self.folder / "people" / split.person, split)
        self.screen.bar("people", 1, 1, f"{len(part)} take part, {len(unseen)} are never seen")
        return [split.person for split in part], [split.person for split in unseen]

    def _evaluate(
        self, when: str, people: dict[str, Path], manifest: Manifest, training: Training
    ) -> dict[str, PersonLoss]:
        kept = self.folder / f"heldout-{when}.json"
        if kept.exists():
            return msgspec.json.decode(kept.read_bytes(), type=dict[str, PersonLoss])
        layout = manifest.layout
        adapter = self.adapter
        if when == "before":
            adapter = self.folder / "zero.f32"
            durable.write_bytes(adapter, bytes(4 * layout.numbers))
        found = evaluate_people(
            self.bundle,
            people,
            adapter,
            training,
            processes=self.cores,
            progress=lambda done, total: self.screen.bar(when, done, total, f"held-out loss {when} training"),
        )
        if all(math.isfinite(loss.nll) for loss in found.values()):  # JSON has no word for the others
            durable.write_bytes(kept, msgspec.json.encode(found))
        return found

    def _train(self, part: list[str]) -> tuple[Watch, LocalFleet]:
        settings = self.settings
        fleet, watch = self._fleet(part), Watch(settings.rounds)
        strikes = draw_strikes(settings.faults, part, settings.rounds * len(part), settings.seed)
        faults = ProcessFaults(fleet, strikes)
        try:
            self._begin(fleet, len(part))
            while not watch.closed:
                entries = fleet.look()
                watch.take(entries)
                for strike in faults.look(entries):
                    self.screen.note(f"fault: {strike.fault} {strike.device}".rstrip())
                watch.show(self.screen, fleet.figures())
                time.sleep(_LOOK_SECONDS)
            if faults.left:
                self.screen.note(f"{faults.left} faults came too late or found nothing to strike")
        finally:
            faults.end()
            fleet.stop()
        return watch, fleet

    def _fleet(self, part: list[str]) -> LocalFleet:
        settings = self.settings
        line = LINES[settings.line] if settings.line else Line() if needs_lines(settings.faults) else None
        return LocalFleet(
            self.folder / "fleet",
            {name: self.folder / "people" / name / "train.jsonl" for name in part},
            broker=settings.broker,
            line=line,
            cgroups=self._cgroups(),
            seed=settings.seed,
        )

    def _cgroups(self) -> Cgroups | None:
        limits = Limits(self.settings.memory_mb, self.settings.cpus)
        if limits == Limits():
            return None
        try:
            return Cgroups.here(limits)
        except UnavailableError as error:
            self.screen.note(str(error))
            return None

    def _begin(self, fleet: LocalFleet, devices: int) -> None:
        """The hub, the devices' homes, the campaign, the agents: whatever of it is not there yet."""
        settings, joined = self.settings, 0
        self.broker = fleet.start_hub().broker

        def progress(new: int) -> None:
            nonlocal joined
            joined += new
            self.screen.bar("join", joined, devices, f"{joined} devices joined with their own keys")

        fleet.enroll(progress)
        fleet.start_campaign(
            self.bundle,
            Wish(
                CAMPAIGN,
                rounds=settings.rounds,
                steps=settings.steps,
                bloc=settings.bloc,
                devices=settings.devices,
                seed=settings.seed,
            ),
        )
        fleet.start_agents()

    def _reference(
        self, part: list[str], everyone: dict[str, Path], manifest: Manifest, training: Training
    ) -> dict[str, PersonLoss] | None:
        if not self.settings.reference:
            return None
        from firmware_sim.processes import reference
        from firmware_sim.processes.local_training import Plan

        plan = Plan(
            bundle=self.bundle,
            people={name: self.folder / "people" / name / "train.jsonl" for name in part},
            training=training,
            rounds=self.settings.rounds,
            steps=self.settings.steps,
        )
        found = reference.pooled(
            plan,
            processes=self.cores,
            progress=lambda done, total: self.screen.bar("reference", done, total, "the same data, pooled"),
        )
        self.adapter = self.folder / "reference.f32"
        durable.write_bytes(self.adapter, found.adapter)
        return self._evaluate("reference", everyone, manifest, training)
