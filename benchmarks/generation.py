"""What a token costs a device: CPU time to read a prompt and to write on, load time, memory, beside onnxruntime-genai.

SmolLM2-135M in our own 4-bit weights with an adapter bound, and the same model from onnxruntime-genai's model builder
at its default int4, installed into an environment of its own. Both run in child processes of one thread that take
turns, a few tokens each, so that what else the machine does meets both; a ratio is the median over the turns. Memory
is that of the child after it has written: `VmHWM`, and `RssAnon`. The first run of each is not counted: among other
things our generator asks the kernel for large pages under the weights while it writes a long text
(`edge_agent.generator.pages`), which the peer leaves as the machine gives them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_variable] = "1"  # before a library loads; children inherit it

from report import Row, parser, print_report, progress  # noqa: E402

MODEL = "smollm2-135m"
GENAI = "0.18.0"
PROMPT_TOKENS, TURN_TOKENS = 64, 16
MEGABYTE = 1_000_000


@dataclass(slots=True)
class Figures:
    """Of one child: CPU ms a token of prompts and of turns, seconds to load, bytes."""

    load: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: int = 0
    anonymous: int = 0


# ---------------------------------------------------------------- the two children, in their own processes
def ours(folder: str) -> None:
    """Answers "prompt" and "turn" with the CPU seconds that they took, "memory" with bytes."""
    import numpy as np

    from edge_agent.bundle import open_bundle
    from edge_agent.generator import Decoding, adapter_feeds

    bundle = open_bundle(Path(folder))
    layout, draw = bundle.layout, np.random.default_rng(0)
    b = draw.normal(0, 0.01, layout.numbers).astype(np.float32)
    adapter = adapter_feeds(layout, {**layout.frozen(bytes(16)), **layout.split(b)})
    began = process_time()
    decoding = Decoding(bundle, threads=1, adapter=adapter)
    print(process_time() - began, flush=True)
    logits = np.zeros(1, np.float32)
    for line in iter(sys.stdin.readline, ""):
        began = process_time()
        if line.startswith("prompt"):
            decoding.reset()
            logits = decoding.read(list(range(3, 3 + PROMPT_TOKENS)))
        elif line.startswith("turn"):
            for _ in range(TURN_TOKENS):
                logits = decoding.read([int(logits.argmax())])
        print(_memory() if line.startswith("memory") else process_time() - began, flush=True)


def genai(folder: str) -> None:
    """The same with onnxruntime-genai."""
    import onnxruntime_genai as og

    began = process_time()
    model = og.Model(folder)
    print(process_time() - began, flush=True)
    generator = None
    for line in iter(sys.stdin.readline, ""):
        began = process_time()
        if line.startswith("prompt"):
            choices = og.GeneratorParams(model)
            choices.set_search_options(max_length=PROMPT_TOKENS + 64 * TURN_TOKENS, do_sample=False)
            generator = og.Generator(model, choices)
            generator.append_tokens(list(range(3, 3 + PROMPT_TOKENS)))
        elif line.startswith("turn"):
            for _ in range(TURN_TOKENS):
                generator.generate_next_token()
        print(_memory() if line.startswith("memory") else process_time() - began, flush=True)


def _memory() -> str:
    text = Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in text.splitlines())
    return " ".join(str(int(found[name].split()[0]) * 1024) for name in ("VmHWM", "RssAnon"))


class Child:
    """A child process that is asked one thing at a time."""

    def __init__(self, python: str, word: str, folder: Path) -> None:
        command = [python, __file__, word, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.figures = Figures(load=float(self._answer()))

    def ask(self, word: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._answer()

    def finish(self) -> Figures:
        self.figures.peak, self.figures.anonymous = map(int, self.ask("memory").split())
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        return self.figures

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("generation: a child process ended early")
        return line


def take_turns(children: Sequence[Child], runs: int, turns: int) -> None:
    """Each run reads the prompt anew and then writes `turns` turns, all children in step."""
    for run in range(runs + 1):
        for child in children:
            seconds = float(child.ask("prompt"))
            if run:  # the first is for warming up
                child.figures.prefill.append(1000 * seconds / PROMPT_TOKENS)
        for turn in range(turns):
            for child in children if turn % 2 else list(reversed(children)):
                seconds = float(child.ask("turn"))
                if run:
                    child.figures.decode.append(1000 * seconds / TURN_TOKENS)


# ---------------------------------------------------------------- the peer
def build_peer(work: Path, cache: Path) -> tuple[str, Path] | str:
    """(python, model folder) of onnxruntime-genai, made once in `cache`; or why there is none."""
    python, folder = cache / "venv" / "bin" / "python", cache / "model"
    if (folder / "ready").exists():
        return str(python), folder
    shutil.rmtree(cache, ignore_errors=True)
    try:
        _run([sys.executable, "-m", "venv", str(cache / "venv")])
        pip = [str(python), "-m", "pip", "install", "-qq", "--no-input"]
        # Its builder needs a newer transformers than ours; torch is taken from this environment.
        _run([*pip, f"onnxruntime-genai=={GENAI}", "transformers>=5.2,<6", "onnx-ir"])
        site = next((cache / "venv" / "lib").glob("python*/site-packages"))
        here = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "zz_builder.pth").write_text(f"{here}\n")
        source = _model_folder(work)
        builder = site / "onnxruntime_genai" / "models" / "builder.py"
        words = ["-i", str(source), "-o", str(folder), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
        _run([str(python), str(builder), *words])
        _one_thread(folder / "genai_config.json")
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        tail = getattr(error, "stderr", None) or str(error) or type(error).__name__
        return f"not available: {tail.strip().splitlines()[-1][:80]}"
    (folder / "ready").touch()
    return str(python), folder


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _model_folder(work: Path) -> Path:
    """The model as transformers has it, dequantised: what the builder reads."""
    from quantize.source import load

    source = load(MODEL)
    source.model.save_pretrained(work / "model")
    (work / "model" / "tokenizer.json").write_bytes(source.tokenizer)
    return work / "model"


def _one_thread(path: Path) -> None:
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    path.write_text(json.dumps(config))


# ---------------------------------------------------------------- the figures
def rows(mine: Figures, peer: Figures | None, why: str) -> list[Row]:
    """`why` there is no peer, where there is none."""
    name = f"onnxruntime-genai {GENAI} int4" + (f" ({why})" if why else "")
    case = f"{MODEL} int4d, adapter r=8, prompt {PROMPT_TOKENS}, 1 thread"

    def row(
        figure: str, values: Sequence[float], unit: str, theirs: float | None, goal: str | None = None
    ) -> Row:
        return Row.of(figure, case, values, unit, goal=goal, baseline=name, baseline_value=theirs)

    found = [
        row("decode_cpu_ms_per_token", mine.decode, "ms", peer and statistics.median(peer.decode)),
        row("prefill_cpu_ms_per_token", mine.prefill, "ms", peer and statistics.median(peer.prefill)),
        row("load_cpu_s", [mine.load], "s", peer and peer.load),
        row("anonymous_mb", [mine.anonymous / MEGABYTE], "MB", peer and peer.anonymous / MEGABYTE),
        row("peak_mb", [mine.peak / MEGABYTE], "MB", peer and peer.peak / MEGABYTE),
    ]
    if peer is not None:
        ratios = [a / b for a, b in zip(mine.decode, peer.decode, strict=True)]
        found.insert(1, Row.of("decode_ratio_to_peer", case, ratios, "1", goal="<= 1.1", baseline=name))
    return found


def measure(args: Namespace) -> list[Row]:
    """Both children in step."""
    work = Path(tempfile.mkdtemp(prefix="fedge-generation-"))
    try:
        bundle = args.bundle or work / "bundle"
        if args.bundle is None:
            progress(f"generation: quantising {MODEL}")
            words = ["quantize", MODEL, "--out", str(bundle), "--quiet"]
            _run([sys.executable, "-m", "fedge", *words])
        progress(f"generation: onnxruntime-genai {GENAI}")
        peer = build_peer(work, args.peer_cache or work / "peer")
        children = [Child(sys.executable, "--ours", bundle)]
        if not isinstance(peer, str):
            children.append(Child(peer[0], "--genai", peer[1]))
        progress("generation: measuring")
        take_turns(children, 1 if args.quick else args.runs, 2 if args.quick else 8)
        figures = [child.finish() for child in children]
        return rows(
            figures[0], figures[1] if len(figures) > 1 else None, peer if isinstance(peer, str) else ""
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """`--ours` and `--genai` are the children."""
    if sys.argv[1:2] in (["--ours"], ["--genai"]):
        (ours if sys.argv[1] == "--ours" else genai)(sys.argv[2])
        return
    flags: ArgumentParser = parser(str(__doc__).split("\n")[0])
    flags.add_argument("--bundle", type=Path, help=f"a bundle of {MODEL} that is there already")
    flags.add_argument("--peer-cache", type=Path, help="folder that keeps the peer between runs")
    args = flags.parse_args()
    print_report("generation", measure(args), args)


if __name__ == "__main__":
    main()
