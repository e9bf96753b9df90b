"""`fedge agent personalise`: own steps on top of the fleet's adapter, and alone. No network; nothing leaves the device.

Every fifth conversation is held out, and at most `edge_agent.trial.HELD_OUT_MAX` of their rows choose. A file is
written only when something was better on them than the fleet's adapter, which stays as it is either way.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec

from edge_agent import jobs, trial
from edge_agent.alone import OwnAdapter
from edge_agent.dataset import Reading
from edge_agent.resources import threads_allowed
from edge_agent.trial import OnProgress
from fedge.io import durable
from fedge.messages import Training
from fedge.release import WEIGHTS, Manifest


class Personal(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: losses are nats per label (a token, a classified row, or a pair) of `held_out_rows` rows."""

    model: str
    task: str
    kept: str
    tried: dict[str, float]
    held_out_rows: int
    training_rows: int
    adapter: str = ""  # the file that was written


def text(found: Personal) -> str:
    """The same for people."""
    width = max(map(len, found.tried))
    tried = "\n".join(f"  {name:<{width}}  {loss:.3f}" for name, loss in found.tried.items())
    outcome = f"kept: {found.adapter}" if found.adapter else "the fleet's adapter stays"
    return (
        f"{found.model}: held-out loss in nats per {trial.UNITS[found.task]} over {found.held_out_rows} rows\n{tried}\n"
        f"{outcome} ({found.kept})"
    )


def personalise_once(
    bundle: Path,
    data: Path,
    start: Path,
    out: Path,
    *,
    steps: tuple[int, ...] = (),
    alone_steps: tuple[int, ...] | None = None,
    training: Training,
    threads: int = 0,
    progress: OnProgress = lambda what, done, of: None,
    reading: Reading | None = None,
) -> Personal:
    """Try own steps from the adapter at `start` and others from the base model; write `out` when one is better.

    `steps` () and `alone_steps` None are the usual; () alone is none. `training` is of the rule `fedit`, and its rate
    that of steps on top of the fleet's. Raises what the worker's job raises, the refusals of
    `OwnAdapter.of`, UsageError when `out` would replace something else.
    """
    import numpy as np

    from edge_agent.personal import ALONE_STEPS, STEPS

    manifest = trial.open_bundle_manifest(bundle)
    trial.check_target(out)
    fleet = OwnAdapter.of(manifest, training, start, bundle / WEIGHTS)
    folder = Path(tempfile.mkdtemp(prefix="fedge-personal-"))  # 0700
    try:
        recordings = trial.write_halves(folder, data, reading)
        durable.write_bytes(folder / "start.f32", fleet.state.astype("<f4").tobytes(), secret=True)
        job = jobs.Personalise(
            bundle=str(bundle.resolve()),
            adapter=str(folder / "start.f32"),
            data=str(folder / "train.jsonl"),
            held_out=str(folder / "held_out.jsonl"),
            out=str(folder / "own.f32"),
            steps=steps or STEPS,
            training=training,
            plan=trial.planned(manifest, training),
            scratch=str(folder),
            threads=threads_allowed(threads),
            reading=recordings,
            data_seed=training.data_seed,
            alone_steps=ALONE_STEPS if alone_steps is None else alone_steps,
        )
        reply = trial.one_job(job, "steps", progress)
        assert isinstance(reply, jobs.Personalised)
        if reply.own:
            own = np.fromfile(folder / "own.f32", "<f4").astype(np.float32)
            replace(fleet, state=own).keep(out, made_by="")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _personal(manifest, reply, out)


def _personal(manifest: Manifest, reply: jobs.Personalised, out: Path) -> Personal:
    return Personal(
        model=manifest.model,
        task=manifest.task,
        kept=reply.kept,
        tried=reply.tried,
        held_out_rows=reply.held_out_rows,
        training_rows=reply.samples,
        adapter=str(out) if reply.own else "",
    )
