"""Change the code one operator or constant at a time, and see which quick tests notice.

    python tests/mutation.py                            # all of MODULES: an hour or more
    python tests/mutation.py fedkd/losses/robust.py     # one
    python tests/mutation.py --sample 40 fedkd/wire/codecs.py  # a sample, the same every time (--seed 1: another)
    python tests/mutation.py --survivors                # what the last run of a module left, again

cosmic-ray makes the changes. Its own way to try one, a new process and a changed file on disk, would take a day. Here a
process that has read everything forks, the child changes the function, or reads what depends on a changed module anew,
and runs the quick tests that execute the changed statement, shortest first, until one fails. Which those are is
measured once per version of the code. Processes that a test starts (workers, Flower) see the code as it is on disk.

A survivor is a test to write, or a line in ``equivalent.toml`` with the reason why nobody could see the difference.
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "mutation"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")

MODULES = [
    *(f"strategies/{name}.py" for name in (
        "consensus", "fedavg", "gossip", "matching", "pairwise", "strategy", "topology",
    )),
    *(f"strategies/relay/{name}.py" for name in (
        "asynchronous", "controls", "hosts", "introductions", "ledger", "mailbox", "participation", "post", "resuming",
        "roster", "rounds", "sealed", "trials", "window",
    )),
    *(f"fedkd/losses/{name}.py" for name in ("robust", "teachers", "weighing")), "fedkd/training/belief.py",
    *(f"fedkd/wire/{name}.py" for name in ("codecs", "features", "identities", "messages", "sealing")),
    "fedkd/metrics.py", "fedkd/privacy.py", "fedkd/results/folder.py",
    *(f"clients/{name}.py" for name in ("attacks", "keys", "learner", "releases", "state")),
    "experiments/analysis/statistics.py",
]  # fmt: skip

# A change of each kind that says something; of eleven other signs in the place of a plus, one is enough.
_BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul FloorDiv_Div Mod_FloorDiv Pow_Mul BitAnd_BitOr LShift_RShift"
_COMPARE = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
OPERATORS = [
    *(f"ReplaceBinaryOperator_{name}" for name in _BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in _COMPARE.split()),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("USub", "Not", "Invert")),
    "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop", "ExceptionReplacer",
]  # fmt: skip

HEAVY = (
    "torch", "torchvision", "numpy", "scipy.stats", "scipy.special", "scipy.optimize", "sklearn.datasets", "networkx",
    "pandas", "matplotlib.pyplot", "hypothesis", "hypothesis.extra.numpy", "typer", "rich", "safetensors.numpy",
    "safetensors.torch", "flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.clientapp", "flwr.simulation",
    "dp_accounting.pld.privacy_loss_mechanism", "cryptography.hazmat.primitives.ciphers.aead", "pytest",
    "pytest_cov.plugin",
)  # fmt: skip
HELPERS = tuple(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_"))
PLUGINS = ("-p", "pytest_timeout", "-p", "pytest_cov.plugin", "-p", "_hypothesis_pytestplugin", "-p", "xdist.plugin")


@dataclass(frozen=True)
class Mutant:
    """One changed module: ``before`` and ``after`` are the changed lines, ``line`` the number of the first."""

    path: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str
    code: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.operator}\n    - {self.before}\n    + {self.after}"


@dataclass(frozen=True)
class Measured:
    """Which tests execute which lines, and how long a test takes."""

    lines: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]

    def tests(self, mutant: Mutant, budget: float) -> list[str]:
        """Return the tests that execute a mutant, shortest first, within so many seconds, but at least one."""
        by_line = self.lines.get(mutant.path, {})
        statement = _statement(mutant)
        found = set().union(*(by_line.get(line, ()) for line in statement or by_line)) & set(self.seconds)
        chosen, total = [], 0.0
        for test in sorted(found, key=lambda test: (self.seconds[test], test)):
            total += self.seconds[test]
            if chosen and total > budget:
                break
            chosen.append(test)
        return chosen


def positions(path: str) -> list[tuple[str, int]]:
    """Return where the operators could change a file: (operator, occurrence)."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    nodes = list(ast_nodes(get_ast((ROOT / path).read_text(encoding="utf-8"))))
    found = []
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        found += [(name, occurrence) for occurrence in range(count)]
    return found


def mutants(path: str, chosen: Sequence[tuple[str, int]]) -> Iterator[Mutant]:
    """Yield the mutants at some of a file's positions, without those that are the same program."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / path).read_text(encoding="utf-8")
    for name, occurrence in chosen:
        try:
            code = mutate_code(source, get_operator(f"core/{name}")(), occurrence)
        except AttributeError:
            continue  # cosmic-ray 8.7 cannot replace an exception with a dot in its name
        if code is None or _same(source, code):
            continue
        old, new = source.splitlines(), code.splitlines()
        first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
        yield Mutant(path, name, occurrence, first + 1, old[first].strip(), new[first].strip(), code)


def _same(source: str, code: str) -> bool:
    """Whether the change is none: an annotation, which nothing reads."""
    try:
        trees = [ast.parse(text) for text in (source, code)]
    except SyntaxError:
        return True  # not Python: it says nothing of the tests
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.arg | ast.AnnAssign):
                node.annotation = ast.Constant(None)
            elif isinstance(node, ast.FunctionDef):
                node.returns = None
            elif isinstance(node, ast.arguments):  # nor do callers care whether they may leave out a name
                node.args, node.posonlyargs, node.kwonlyargs = [*node.posonlyargs, *node.args, *node.kwonlyargs], [], []
                node.defaults, node.kw_defaults = [*node.defaults, *filter(None, node.kw_defaults)], []
    one, other = map(ast.dump, trees)
    return one == other


def _statement(mutant: Mutant) -> range | None:
    """Return the lines of the statement that is changed, or None where importing the module executes it."""
    found: ast.stmt | None = None
    inside = False
    for function in ast.walk(ast.parse((ROOT / mutant.path).read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.body[0].lineno <= mutant.line <= (
            function.end_lineno or 0
        ):
            inside = True
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.stmt)
                    and node is not function
                    and node.lineno <= mutant.line <= (node.end_lineno or 0)
                ):
                    found = node if found is None or node.lineno >= found.lineno else found
    if not inside or found is None:
        return None
    body = getattr(found, "body", None)
    last = body[0].lineno - 1 if body and body[0].lineno > mutant.line else (found.end_lineno or found.lineno)
    return range(found.lineno, max(last, found.lineno) + 1)


class _Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from changed source."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.path.removesuffix(".py").replace("/", "."), str(ROOT / mutant.path))
        self._code = mutant.code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> Any:
        return compile(self._code, self.path, "exec")


def _first(hook: Any) -> Any:
    import pytest

    return pytest.hookimpl(tryfirst=True)(hook)


class _Watch:
    """Puts a changed module in its place, picks the tests, has hypothesis look for less long, and notes the times."""

    def __init__(self, mutant: Mutant | None = None, tests: Sequence[str] = ()) -> None:
        self._mutant, self._order = mutant, {test: place for place, test in enumerate(tests)}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_configure(self) -> None:
        if self._mutant is not None:
            sys.meta_path.insert(
                0, _Changed(self._mutant)
            )  # before pytest's own, which reads a doctest's module from disk
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("hasty", settings(), phases=phases, derandomize=True, max_examples=30)
        settings.load_profile("hasty")

    @_first
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:  # doctests, which tests/conftest.py does not see on their own
            if not any(map(item.get_closest_marker, ("slow", "flower"))):
                item.add_marker("quick")
        if self._order:
            items[:] = sorted(
                (item for item in items if item.nodeid in self._order), key=lambda i: self._order[i.nodeid]
            )

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def _in_child(work: Callable[[], int], seconds: float) -> int | None:
    """Run something in a fork that is killed, with all that it started, when it is done or late; its exit code."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 99
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            code = int(work())
        finally:
            os._exit(code)
    ends = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < ends:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _pytest(arguments: Sequence[str], watch: _Watch) -> int:
    import pytest

    folder = tempfile.mkdtemp(prefix="mu")
    common = ["-q", "-m", "quick", "-p", "no:cacheprovider", *PLUGINS, f"--basetemp={folder}/t"]
    try:
        return int(pytest.main([*common, *arguments], plugins=[watch]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_mutant(mutant: Mutant, measured: Measured, budget: float) -> bool:
    """Return whether a quick test notices."""
    tests = measured.tests(mutant, budget)
    if not tests:
        return False

    def work() -> int:
        anew = not _put_in_place(mutant)
        if anew:
            rooms = ("fedkd", "clients", "strategies", "experiments", "conftest", "test_", *HELPERS)
            for name in [name for name in sys.modules if name.startswith(rooms)]:
                del sys.modules[name]
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return _pytest(["-x", *files], _Watch(mutant if anew else None, tests))

    return _in_child(work, 30 + 8 * sum(measured.seconds[test] for test in tests)) != 0


def _put_in_place(mutant: Mutant) -> bool:
    """Give a function that is imported already its changed code; False where that is not all that has changed."""
    module = sys.modules.get(mutant.path.removesuffix(".py").replace("/", "."))
    statement = _statement(mutant)
    if module is None or statement is None:
        return False
    old, new = (_functions(text) for text in ((ROOT / mutant.path).read_text(encoding="utf-8"), mutant.code))
    changed = [name for name in new if new[name] != old.get(name)]
    if len(changed) != 1 or old.keys() != new.keys():
        return False
    found: Any = module
    for part in changed[0].split("."):
        found = vars(found).get(part)
        if found is None:
            return False
    for inner in ("fget", "__func__", "func", "__wrapped__"):
        found = getattr(found, inner, found)
    if not isinstance(found, types.FunctionType) or found.__code__.co_name != changed[0].split(".")[-1]:
        return False
    found.__code__ = new[changed[0]].replace(co_filename=found.__code__.co_filename)
    return True


def _functions(source: str) -> dict[str, types.CodeType]:
    """Return the code of the functions of a module and of its classes' methods, by qualified name."""
    found = {}
    waiting = [compile(source, "", "exec")]
    while waiting:
        for constant in waiting.pop().co_consts:
            if isinstance(constant, types.CodeType):
                if constant.co_flags & inspect.CO_NEWLOCALS:
                    found[constant.co_qualname] = constant
                else:
                    waiting.append(constant)  # a class
    return found


def measure(only: str = "") -> Measured:
    """Run the quick tests, a file at a time, and note which lines each executes; what has not changed is not run."""
    from coverage import CoverageData

    code = hashlib.sha256()
    for folder in ("fedkd", "clients", "strategies", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            code.update(path.read_bytes())
    units = [[str(p.relative_to(ROOT))] for p in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(only, p.name)]
    units.append(["fedkd", "strategies", "clients"])
    measured = Measured({}, {})
    for unit in units:
        one = code.copy()
        for part in unit:
            one.update((ROOT / part).read_bytes() if part.endswith(".py") else part.encode())
        data, clock = (STATE / f"{one.hexdigest()[:16]}.{kind}" for kind in ("coverage", "json"))
        if not clock.exists():
            print(f"measuring {' '.join(unit)}", flush=True)
            _in_child(lambda unit=unit, data=data, clock=clock: _measure(unit, data, clock), 1800)
        if not data.exists():
            continue
        measured.seconds.update(json.loads(clock.read_text()))
        content = CoverageData(str(data))
        content.read()
        for file in content.measured_files():
            by_line = measured.lines.setdefault(str(Path(file).relative_to(ROOT)), {})
            for line, contexts in content.contexts_by_lineno(file).items():
                by_line.setdefault(line, set()).update(context.partition("|")[0] for context in contexts if context)
    return measured


def _measure(unit: Sequence[str], data: Path, clock: Path) -> int:
    os.environ["COVERAGE_FILE"] = str(data)
    watch = _Watch()
    code = _pytest([*unit, "--cov", "--cov-context=test", "--cov-report="], watch)
    partial = clock.with_suffix(".partial")
    partial.write_text(json.dumps({test: s for test, s in watch.seconds.items() if test not in watch.failed}))
    partial.rename(clock)
    return code


def _is_equivalent(mutant: Mutant, known: Sequence[dict[str, Any]]) -> bool:
    """Whether ``equivalent.toml`` names the line, and the change where it names one."""
    named = [one for one in known if one["file"] in (mutant.path, "*") and one["line"] == mutant.before]
    return any(mutant.after in one.get("becomes", [mutant.after]) for one in named)


def _module(path: str, chosen: Sequence[Mutant], measured: Measured, budget: float, known: Any) -> tuple[int, int]:
    """Try the mutants of a module and print what survived; return how many counted and how many were killed."""
    survivors = []
    began = time.monotonic()
    equivalent = [mutant for mutant in chosen if _is_equivalent(mutant, known)]
    counted = [mutant for mutant in chosen if mutant not in equivalent]
    source = (ROOT / path).read_text(encoding="utf-8")
    if counted and try_mutant(replace(counted[0], code=source), measured, budget):
        raise SystemExit(f"{path}: its tests fail on the code as it is")
    for mutant in counted:
        if not try_mutant(mutant, measured, budget):
            survivors.append(mutant)
            print(mutant, flush=True)
    killed = len(counted) - len(survivors)
    share, seconds = killed / max(1, len(counted)), time.monotonic() - began
    print(
        f"{path}: {killed} of {len(counted)} noticed ({share:.0%}), {len(equivalent)} equivalent, {seconds:.0f} s",
        flush=True,
    )
    _note(path).write_text(json.dumps([[mutant.operator, mutant.occurrence] for mutant in survivors]))
    return len(counted), killed


def _note(path: str) -> Path:
    return STATE / f"{path.replace('/', '.')}.survivors"


def main() -> int:
    """Try mutants; return 1 if fewer than nine of ten were noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="FILE", help="default: all that decide numbers or guard data")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants of each, drawn with a seed")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; another one has other mutants")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    parser.add_argument("--tests", default="", metavar="REGEX", help="only test files whose name it is found in")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of tests for one mutant, at most")
    options = parser.parse_args()

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.update({"CI": "1", "OMP_NUM_THREADS": "1"})
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # pytest collects twice, and half a million of the libraries' objects take it seconds
    STATE.mkdir(parents=True, exist_ok=True)
    measured = measure(options.tests)
    _pytest(["--collect-only", "-qq", *dict.fromkeys(test.partition("::")[0] for test in measured.seconds)], _Watch())
    gc.freeze()
    known = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutant", [])
    total = noticed = 0
    for path in options.modules or MODULES:
        where = positions(path)
        if options.survivors:
            last = json.loads(_note(path).read_text()) if _note(path).exists() else []
            where = [one for one in where if list(one) in last]
        elif 0 < options.sample < len(where):
            where = random.Random(options.seed).sample(where, options.sample)
        chosen = sorted(mutants(path, where), key=lambda mutant: mutant.line)
        counted, killed = _module(path, chosen, measured, options.budget, known)
        total, noticed = total + counted, noticed + killed
    print(f"{noticed} of {total} changes noticed")
    return int(noticed < 0.9 * total)


if __name__ == "__main__":
    raise SystemExit(main())
