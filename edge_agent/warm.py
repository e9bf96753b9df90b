"""What a warm worker keeps from one job to the next: the trainer of its bundle, and the rows of the data file.

Both are kept for memory as much as for time. A second tokenizer beside a loaded runtime would add 30 MB, and a second
set of sessions 20 MB, because the runtime's arena is shared and what the first set left in it does not fit the second.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.jobs import BundleJob, Job
from fedge.errors import ConfigError

if TYPE_CHECKING:
    from edge_agent.bundle import Bundle
    from edge_agent.dataset import Dataset
    from edge_agent.trainer import Trainer


class Warm:
    """At most one of each; another bundle or file takes the old one's place."""

    def __init__(self) -> None:
        self._trainer: tuple[object, Trainer] | None = None
        self._dataset: tuple[object, Dataset] | None = None

    def open(self, job: Job) -> tuple[Bundle, Dataset, Trainer]:
        """What `job` works with. The bundle is verified for every job; rows are read before sessions are loaded."""
        bundle = _verified(job)
        return bundle, self._rows_of(bundle, job), self._trainer_of(bundle, job)

    def open_trainer(self, job: BundleJob) -> tuple[Bundle, Trainer]:
        """The same for a job that needs no data."""
        bundle = _verified(job)
        return bundle, self._trainer_of(bundle, job)

    def _rows_of(self, bundle: Bundle, job: Job) -> Dataset:
        from edge_agent.dataset import load_dataset, load_encoder, load_recordings

        path, window = Path(job.data), job.training.window_tokens
        key = _look(path), job.reading, job.training.template, window, bundle.stamp.manifest_sha256
        if self._dataset is not None and self._dataset[0] == key:
            return self._dataset[1]
        self._dataset = None
        manifest = bundle.manifest
        if manifest.hears is not None:
            dataset = load_recordings(path, manifest.hears, manifest.classes, reading=job.reading)
        else:
            dataset = load_dataset(
                path,
                job.training.template,
                load_encoder(bundle.tokenizer),
                eos_id=manifest.eos_id,
                window=window,
                reading=job.reading,
                chat=manifest.chat,
                classes=manifest.classes,
                pairs=manifest.task == "embed",
            )
        give_back_memory()
        self._dataset = key, dataset
        return dataset

    def _trainer_of(self, bundle: Bundle, job: BundleJob) -> Trainer:
        from edge_agent.probe import check_probe
        from edge_agent.trainer import Trainer

        # The stamp has every file's inode and times: the same files.
        key = bundle.stamp, job.threads, job.plan, job.scratch
        if self._trainer is not None and self._trainer[0] == key:
            trainer = self._trainer[1]
            trainer.freeze_a(job.training.a_seed)
            return trainer
        self._trainer = None
        scratch = Path(job.scratch) if job.scratch else None
        seed = job.training.a_seed
        trainer = Trainer(bundle, job.threads, a_seed=seed, plan=job.plan, folder=scratch)
        if job.verified != bundle.stamp:  # the first use since the agent began
            check_probe(trainer)
        self._trainer = key, trainer
        return trainer


def _verified(job: BundleJob) -> Bundle:
    from edge_agent.bundle import open_bundle
    from fedge.rules import least_rows

    bundle = open_bundle(
        Path(job.bundle), publisher=job.publisher, sha256=job.manifest, verified=job.verified
    )
    window, rows = job.training.window_tokens, job.training.batch_rows
    if rows < least_rows(bundle.manifest.task):
        raise ConfigError(
            "a batch of one pair has nothing to be told from",
            field="batch_rows",
            value=rows,
            hint="Take 2 at the least; 16 to 64 learn more",
        )
    if bundle.manifest.hears is None and window > bundle.manifest.positions_max:
        raise ConfigError("window is longer than the model's", field="window_tokens", value=window)
    return bundle


def give_back_memory() -> None:
    """Let the C library return freed pages; without this a tokenizer's 40 MB stay ours for the whole round."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _look(path: Path) -> tuple[str, int, int, int]:
    """What changes when the owner writes the file anew; reading it tells what is wrong with it."""
    try:
        stat = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns
