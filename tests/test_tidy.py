"""The house's rules as tests: who may import whom, sizes, banned calls and names, each with what to use instead.

Every rule is a function from a parsed module to its offences, and is first shown a snippet that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fedge", "edge_agent", "hub", "quantize", "firmware_sim")
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60

MAY_IMPORT = {
    "fedge": {"fedge"},
    "edge_agent": {"fedge", "edge_agent"},
    "hub": {"fedge", "hub"},
    "quantize": {"fedge", "quantize"},
    "firmware_sim": {"fedge", "edge_agent", "hub", "firmware_sim"},  # quantize: inside functions only
}
# What the base install brings; `tokenizers` is the extra `text`, `pyarrow` the extra `parquet`.
DEVICE_PACKAGES = {"numpy", "onnxruntime", "paho", "cryptography", "msgspec", "tokenizers", "pyarrow"}
EXPORT_ONLY = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "optimum", "bitsandbytes", "gguf"}

# Decide without doing: time and randomness are arguments, files and sockets belong to drivers.
PURE = re.compile(
    r"fedge/(?!io/|cli\.py|assets_cli\.py|__main__\.py).*"
    r"|edge_agent/(agent|round|checks|effects)\.py"
    r"|hub/(hub|book|rounds|admission|forming|scheduler|aggregation|standing|effects)\.py"
)
WORLD = {
    "asyncio",
    "http",
    "importlib",
    "io",
    "multiprocessing",
    "os",
    "paho",
    "pathlib",
    "queue",
    "random",
    "secrets",
}
WORLD |= {
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "sqlalchemy",
    "sqlite3",
    "ssl",
    "subprocess",
    "sys",
}
WORLD |= {"tempfile", "threading", "time", "urllib"}
IO_USERS = {"fedge/cli.py", "fedge/assets_cli.py"}

BANNED_CALLS = {
    "eval": "parse the text: msgspec, ast.literal_eval",
    "exec": "import a function and call it",
    "marshal.loads": "msgspec",
    "os.popen": "subprocess.run with a list",
    "os.system": "subprocess.run with a list",
    "pickle.dump": "msgspec or safetensors",
    "pickle.dumps": "msgspec or safetensors",
    "pickle.load": "msgspec or safetensors",
    "pickle.loads": "msgspec or safetensors",
    "tempfile.mktemp": "tempfile.mkdtemp, or durable.part_name",
    "torch.load": "safetensors",
    "torch.save": "safetensors",
    "yaml.load": "tomllib or msgspec",
    "datetime.utcnow": "datetime.now(UTC)",
    "datetime.datetime.utcnow": "datetime.now(UTC)",
}
CLOCK_CALLS = {"datetime.now", "datetime.today", "datetime.datetime.now", "date.today", "datetime.date.today"}
SEEDED = {"random.Random", "random.SystemRandom", "np.random.default_rng", "numpy.random.default_rng"}
SEEDED |= {"np.random.Generator", "np.random.PCG64", "np.random.Philox", "np.random.SeedSequence"}
SEEDED |= {"torch.random.fork_rng"}
BANNED_NAMES = {
    "utils",
    "util",
    "helpers",
    "helper",
    "manager",
    "managers",
    "misc",
    "common",
    "stuff",
    "tools",
}
# Written in place on purpose, each with its reason.
PLAIN_WRITES = {
    "quantize/dry_run.py": "a draft in a temporary folder that is gone in a moment",
    "quantize/interop/merging.py": "inside a hidden folder, which is flushed and renamed as a whole or removed",
    "quantize/interop/optimum_folder.py": "inside a hidden folder, which is flushed and renamed as a whole or removed",
    "quantize/gates.py": "inside the staging folder, which is flushed and renamed as a whole or removed",
    "edge_agent/stats.py": "figures for people, replaced every few seconds: syncing them would wear a flash card out",
    "hub/mosquitto.py": "the broker's process number: checked against the living process, never believed",
}


@dataclass(frozen=True)
class Module:
    path: str  # relative, with slashes
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def room(self) -> str:
        return self.path.partition("/")[0]


Rule = Callable[[Module], Iterator[str]]


def modules(*folders: str) -> list[Module]:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "."
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def lines_inside_functions(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def rooms_stay_apart(module: Module) -> Iterator[str]:
    lazy = lines_inside_functions(module.tree)
    for line, name in imports(module.tree):
        room = name.partition(".")[0]
        if room == "quantize" and module.room == "firmware_sim" and line in lazy:
            continue
        if room in ROOMS and room not in MAY_IMPORT[module.room]:
            yield f"{line}: {module.room} imports {room}; put what both need into fedge/"


def devices_stay_light(module: Module) -> Iterator[str]:
    for line, name in imports(module.tree):
        package = name.partition(".")[0]
        if package in EXPORT_ONLY and module.room != "quantize":
            yield f"{line}: {package} lives in quantize/ only"
        outside = package not in sys.stdlib_module_names and package not in ROOMS
        if module.room in ("fedge", "edge_agent") and outside and package not in DEVICE_PACKAGES:
            yield f"{line}: {package} is not in the base install; a board has {sorted(DEVICE_PACKAGES)}"


def machines_are_pure(module: Module) -> Iterator[str]:
    if not PURE.fullmatch(module.path):
        return
    for line, name in imports(module.tree):
        if name.partition(".")[0] in WORLD or name.startswith("fedge.io"):
            yield f"{line}: imports {name}; return an effect, and let the driver do it"
    for call, name in calls(module.tree):
        if name in CLOCK_CALLS:
            yield f"{call.lineno}: {name}() reads a clock; take `now` as an argument"
        if name in ("open", "print", "input"):
            yield f"{call.lineno}: {name}() touches the world; return an effect"


def io_is_for_drivers(module: Module) -> Iterator[str]:
    if module.room == "fedge" and not module.path.startswith("fedge/io/") and module.path not in IO_USERS:
        for line, name in imports(module.tree):
            if name.startswith("fedge.io"):
                yield f"{line}: only {sorted(IO_USERS)} may import fedge.io inside fedge/ (docs/adr/0004)"


def no_banned_call(module: Module) -> Iterator[str]:
    for call, name in calls(module.tree):
        if name in BANNED_CALLS:
            yield f"{call.lineno}: {name}() is banned; use {BANNED_CALLS[name]}"
        for keyword in call.keywords:
            on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg == "shell" and on:
                yield f"{call.lineno}: shell=True is banned; give a list of words"
            if keyword.arg in ("allow_pickle", "trust_remote_code") and on:
                yield f"{call.lineno}: {keyword.arg}=True runs foreign code; use safetensors or a plain .npy"


def randomness_is_seeded(module: Module) -> Iterator[str]:
    hidden = {name for _, name in imports(module.tree)}  # a Generator may be called `random`
    for call, name in calls(module.tree):
        drawn = re.match(r"(random|np\.random|numpy\.random|torch\.random)\.\w+$", name)
        if drawn and name not in SEEDED and (drawn[1] != "random" or "random" in hidden):
            yield f"{call.lineno}: {name}() has a hidden state; take a random.Random or a Generator as an argument"
        if name in ("random.Random", "np.random.default_rng") and not call.args:
            yield f"{call.lineno}: {name}() without a seed; pass one, or use random.SystemRandom for secrets"


def state_is_written_durably(module: Module) -> Iterator[str]:
    if module.path.startswith("fedge/io/") or module.path in PLAIN_WRITES:
        return
    for call, name in calls(module.tree):
        function = name.rpartition(".")[2]
        if function in ("write_text", "write_bytes") and name not in ("write_bytes", "durable.write_bytes"):
            yield f"{call.lineno}: {name}() can leave half a file; use fedge.io.durable.write_bytes"
        if function == "open":
            modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            modes += [key.value.value for key in call.keywords if isinstance(key.value, ast.Constant)]
            if any(re.fullmatch(r"[rwbt+]*[w+][rwbt+]*", mode) for mode in modes if isinstance(mode, str)):
                yield f"{call.lineno}: {name}() in place can leave half a file; use fedge.io.durable.replacing"


def no_any_in_the_common_ground(module: Module) -> Iterator[str]:
    if module.room == "fedge":
        for line, name in imports(module.tree):
            if name == "typing.Any":
                yield f"{line}: Any in fedge/; use object, a protocol or a msgspec struct"


def sizes_are_readable(module: Module) -> Iterator[str]:
    count = module.text.count("\n")
    if count > MODULE_LINES_MAX:
        yield f"{count} lines; split it by what it owns (the most is {MODULE_LINES_MAX})"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > FUNCTION_LINES_MAX:
                yield f"{node.lineno}: {node.name} has {size} lines; the most is {FUNCTION_LINES_MAX}"


def names_say_something(module: Module) -> Iterator[str]:
    for part in Path(module.path).with_suffix("").parts:
        if part in BANNED_NAMES:
            yield f"{part} says nothing; name it by what it owns"


def a_module_says_what_it_owns(module: Module) -> Iterator[str]:
    if module.text.strip() and not ast.get_docstring(module.tree):
        yield "no docstring; say what the module owns and which rule it keeps"


def nothing_is_put_off(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.text.splitlines(), 1):
        if re.search(r"#.*\b([T]ODO|[F]IXME|[X]XX|[H]ACK)\b", line):
            yield f"{number}: do it, or file an issue"


PRODUCT: list[tuple[Rule, str, str]] = [
    (rooms_stay_apart, "hub/x.py", "from edge_agent import agent"),
    (rooms_stay_apart, "fedge/x.py", "def f():\n    import hub.store"),
    (rooms_stay_apart, "firmware_sim/x.py", "import quantize"),
    (rooms_stay_apart, "edge_agent/x.py", "import firmware_sim"),
    (devices_stay_light, "edge_agent/x.py", "def f():\n    import torch"),
    (devices_stay_light, "fedge/x.py", "import requests"),
    (devices_stay_light, "hub/x.py", "from transformers import AutoModel"),
    (machines_are_pure, "fedge/secagg/x.py", "import os"),
    (machines_are_pure, "edge_agent/agent.py", "from time import monotonic"),
    (machines_are_pure, "hub/hub.py", "from fedge.io import durable"),
    (machines_are_pure, "hub/scheduler.py", "now = datetime.now(UTC)"),
    (machines_are_pure, "fedge/x.py", "open('f')"),
    (io_is_for_drivers, "fedge/x.py", "from fedge.io.link import Link"),
    (no_banned_call, "hub/x.py", "pickle.loads(b'')"),
    (no_banned_call, "hub/x.py", "eval('1')"),
    (no_banned_call, "hub/x.py", "subprocess.run('ls', shell=True)"),
    (no_banned_call, "quantize/x.py", "torch.load('f')"),
    (no_banned_call, "quantize/x.py", "np.load('f', allow_pickle=True)"),
    (randomness_is_seeded, "hub/x.py", "import random\nrandom.shuffle([])"),
    (randomness_is_seeded, "hub/x.py", "np.random.normal()"),
    (randomness_is_seeded, "hub/x.py", "random.Random()"),
    (state_is_written_durably, "hub/x.py", "path.write_text('x')"),
    (state_is_written_durably, "hub/x.py", "open('f', 'w')"),
    (state_is_written_durably, "hub/x.py", "path.open(mode='r+b')"),
    (no_any_in_the_common_ground, "fedge/x.py", "from typing import Any"),
    (a_module_says_what_it_owns, "hub/x.py", "x = 1"),
]
EVERYWHERE: list[tuple[Rule, str, str]] = [
    (sizes_are_readable, "tests/x.py", "x = 1\n" * 401),
    (sizes_are_readable, "hub/x.py", "def f():\n" + "    x = 1\n" * 60),
    (names_say_something, "hub/utils.py", ""),
    (names_say_something, "fedge/misc/x.py", ""),
    (nothing_is_put_off, "hub/x.py", "x = 1  # FIX" + "ME: later"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PRODUCT + EVERYWHERE)
def test_each_rule_sees_what_it_forbids(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Module(path, text)))


@pytest.mark.parametrize(
    "rule", dict.fromkeys(rule for rule, _, _ in PRODUCT), ids=lambda rule: rule.__name__
)
def test_the_product(rule: Rule) -> None:
    assert [f"{module.path}:{offence}" for module in modules(*ROOMS) for offence in rule(module)] == []


@pytest.mark.parametrize(
    "rule", dict.fromkeys(rule for rule, _, _ in EVERYWHERE), ids=lambda rule: rule.__name__
)
def test_everything(rule: Rule) -> None:
    found = modules(*ROOMS, "tests", "benchmarks")
    assert [f"{module.path}:{offence}" for module in found for offence in rule(module)] == []


def test_the_rules_see_the_whole_house() -> None:
    assert {module.room for module in modules(*ROOMS)} == set(ROOMS)
    assert all((ROOT / path).is_file() for path in [*IO_USERS, *PLAIN_WRITES])


CHECKERS = [["ruff", "check", "--output-format=concise"], ["ruff", "format", "--check", "--quiet"], ["mypy"]]


@pytest.mark.parametrize("words", CHECKERS, ids=lambda words: " ".join(words[:2]))
def test_the_checkers_are_content(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
