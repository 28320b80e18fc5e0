"""Law 9: the shims re-export the canonical objects and hold no logic; an old worker runs on them as it is."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compat.run_governance_facade
import compat.transaction_coordinator
import spine.governance.facade
import spine.governance.transactions
from spine import Spine
from spine.governance.transactions import CompleteRun
from spine.journal.verify import verify
from tests.compat.records import alike, bodies

LEGACY = Path(__file__).parent.parent / "compat" / "legacy"
COORDINATOR, FACADE = compat.transaction_coordinator, compat.run_governance_facade
EXPORTS = {
    COORDINATOR: {
        "RAC_ROLLBACK_AUDIT_ENABLED",
        "TRANSACTION_COORDINATOR_ENABLED",
        "TransactionPhase",
        "TransactionFailed",
        "RollbackNotSupportedError",
        "DomainResult",
        "TransactionResult",
        "RollbackAction",
        "RunCompletionTransaction",
        "get_transaction_coordinator",
        "create_transaction_coordinator",
    },
    FACADE: {"RAC_ENABLED", "RunGovernanceFacade", "get_run_governance_facade"},
}
CANONICAL = {COORDINATOR: spine.governance.transactions, FACADE: spine.governance.facade}
LINES = {COORDINATOR: 75, FACADE: 52}
STATEMENTS = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.Return)

STATUSES = ("succeeded", "failed", "halted", "cancelled", "no such word")
RUNS = [
    {
        "run_id": f"run-{n}",
        "tenant_id": "acme" if n % 3 else "globex",
        "run_status": STATUSES[n % 5],
        "agent_id": "a7" if n % 2 else None,
        "error_code": None if n % 5 == 0 else "E_TOOL",
        "error_message": None if n % 5 == 0 else "the tool said “no” – 不",
        "trace_id": f"trace-{n}" if n % 4 == 0 else None,
        "is_synthetic": n % 7 == 0,
        "synthetic_scenario_id": "S-1" if n % 7 == 0 else None,
        "utilization": (0.0, 90.0, 12.5)[n % 3],
    }
    for n in range(20)
]

shims = pytest.mark.parametrize("shim", [COORDINATOR, FACADE], ids=lambda shim: shim.__name__)


def source(shim: object) -> str:
    return Path(shim.__file__).read_text(encoding="utf-8")  # type: ignore[attr-defined]


@shims
def test_exactly_the_old_names_are_exported(shim: object) -> None:
    assert sorted(shim.__all__) == sorted(EXPORTS[shim])  # type: ignore[attr-defined,index]


@shims
def test_what_is_exported_is_the_canonical_object_itself(shim: object) -> None:
    for name in EXPORTS[shim]:  # type: ignore[index]
        if not name.startswith(("get_", "create_")):
            assert getattr(shim, name) is getattr(CANONICAL[shim], name), name  # type: ignore[index]


@shims
def test_a_shim_is_short(shim: object) -> None:
    assert len(source(shim).splitlines()) <= LINES[shim]  # type: ignore[index]


@shims
def test_a_shim_holds_no_logic(shim: object) -> None:
    tree = ast.parse(source(shim))
    found = [type(node).__name__ for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert set(found) <= {kind.__name__ for kind in STATEMENTS}
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.IfExp, ast.BoolOp, ast.Compare, ast.Lambda, ast.comprehension))
        if isinstance(node, ast.FunctionDef):
            assert len(node.body) == 2, f"{node.name}: a docstring and one return"


def test_getters_give_the_one_and_create_another() -> None:
    assert COORDINATOR.get_transaction_coordinator() is COORDINATOR.get_transaction_coordinator()
    assert COORDINATOR.create_transaction_coordinator() is not COORDINATOR.get_transaction_coordinator()
    assert type(COORDINATOR.create_transaction_coordinator()) is spine.governance.transactions.RunCompletionTransaction
    assert FACADE.get_run_governance_facade() is FACADE.get_run_governance_facade()


def test_importing_a_shim_starts_nothing_and_loads_no_database() -> None:
    script = (
        "import sys, threading, compat.transaction_coordinator, compat.run_governance_facade\n"
        "print(threading.active_count(), 'sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
    assert list(Path.cwd().iterdir()) == []


def test_the_old_modules_are_one_line_each() -> None:
    folder = LEGACY / "app" / "services" / "governance"
    for module in (folder / "transaction_coordinator.py", folder / "run_governance_facade.py"):
        (line,) = module.read_text(encoding="utf-8").splitlines()
        assert line.startswith(f"from compat.{module.stem} import *")


def test_the_worker_never_imports_spine() -> None:
    for module in (LEGACY / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [name for name in names if name.split(".")[0] in ("spine", "actors")], module
            assert "compat" not in [name.split(".")[0] for name in names] or module.parent.name == "governance"


def test_the_old_modules_give_the_canonical_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LEGACY))
    for shim in (COORDINATOR, FACADE):
        module = importlib.import_module(f"app.services.governance.{shim.__name__.rpartition('.')[2]}")
        assert {name for name in vars(module) if not name.startswith("_")} == EXPORTS[shim]
        assert all(getattr(module, name) is getattr(shim, name) for name in EXPORTS[shim])


def work(url: str, threads: int = 3, **environment: str) -> list[dict[str, object]]:
    """Run the worker of the fixture in a process of its own; what it told."""
    Path("runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in RUNS), encoding="utf-8")
    paths = os.pathsep.join([str(LEGACY), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "app.worker.runner", "runs.jsonl", "told.jsonl", str(threads)],
        env={**os.environ, "PYTHONPATH": paths, "SPINE_DATABASE_URL": url, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in Path("told.jsonl").read_text(encoding="utf-8").splitlines()]


async def whys(spine: Spine) -> dict[str, object]:
    told = {}
    for run in RUNS:
        answer = (await spine.why(str(run["run_id"]))).to_dict()
        del answer["evidence"]
        answer["cause"].pop("seq", None)
        told[str(run["run_id"])] = alike(answer)
    return told


@pytest.mark.anyio
async def test_the_worker_completes_its_runs_with_the_verdicts_of_the_async_calls(
    database_url: str, tmp_path: Path
) -> None:
    told = work(database_url)
    assert [answer["run_id"] for answer in told] == [run["run_id"] for run in RUNS]
    assert all(answer["complete"] for answer in told)
    assert [bool(answer["lesson_id"]) for answer in told] == [run["utilization"] > 0 for run in RUNS]
    assert verify(database_url).ok

    direct = f"sqlite+aiosqlite:///{tmp_path / 'direct.db'}"
    fields = CompleteRun.__slots__
    async with Spine(direct) as spine:
        for run in RUNS:
            await spine.ask(CompleteRun(**{name: value for name, value in run.items() if name in fields}))
        await spine.flush()
        expected = await whys(spine)
    async with Spine(database_url) as spine:
        assert await whys(spine) == expected

    ours, theirs = await bodies(database_url), await bodies(direct)
    for run in RUNS:
        one, two = ([body for body in each if body.get("run_id") == run["run_id"]] for each in (ours, theirs))
        assert alike(one) == alike(two)


@pytest.mark.anyio
async def test_the_old_switch_still_switches(sqlite_url: str) -> None:
    told = work(sqlite_url, TRANSACTION_COORDINATOR_ENABLED="false")
    assert all(answer["policy_id"] and "phase" not in answer for answer in told)
    assert not [body for body in await bodies(sqlite_url) if body["kind"].startswith("tx.")]


def test_a_worker_without_a_database_goes_on(tmp_path: Path) -> None:
    told = work(f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/x.db", TRANSACTION_COORDINATOR_ENABLED="false")
    assert [answer["policy_id"] for answer in told] == [None] * len(RUNS)
