"""The built wheel, installed where no source tree is: it works alone, and says so when somebody else owns its names."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import spine

SOURCE = Path(next(iter(spine.__path__))).parent
START = "import spine; spine.Spine(); print('started')"

# Building the wheel and installing its dependencies is counted to the first test that needs them.
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (SOURCE / "pyproject.toml").exists(), reason="only a source tree can build the wheel"),
]


@dataclass(frozen=True)
class Installed:
    """A virtual environment holding the wheel and its dependencies, nothing else."""

    folder: Path
    wheel: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next((self.folder / "lib").glob("python3*/site-packages"))

    def run(self, *command: str, cwd: Path, ok: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, without the source tree on any path."""
        clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        done = subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env={**clean, "NO_COLOR": "1", **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert (done.returncode == 0) is ok, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(SOURCE)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    target = Installed(folder / "env", wheel)
    subprocess.run(
        [str(target.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return target


@pytest.fixture
def foreign_actors(tmp_path: Path) -> Path:
    """An application's folder with an ``actors`` package of its own."""
    package = tmp_path / "application" / "actors"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the foreign package was imported')\n")
    return package


def test_the_wheel_holds_the_three_typed_packages_and_nothing_else(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"spine", "actors", "compat", "hoc_spine-0.1.0.dist-info"}
    assert {"spine/py.typed", "actors/py.typed", "compat/py.typed"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_every_module_of_the_source_is_in_the_wheel(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
    modules = {
        path.relative_to(SOURCE).as_posix()
        for package in ("spine", "actors", "compat")
        for path in (SOURCE / package).rglob("*.py")
    }
    assert modules <= names


def test_the_demo_runs_from_the_wheel_alone(installed, tmp_path):
    shown = installed.run("spine", "demo", cwd=tmp_path).stdout
    assert "journal" in shown.lower()
    where = installed.run("python", "-c", "import spine; print(spine.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.packages)


def test_an_actors_folder_of_somebody_else_is_named_with_the_remedy(installed, tmp_path, foreign_actors):
    # `python -c` puts the working directory first on sys.path, as `python -m` does for an application's.
    refused = installed.run("python", "-c", START, cwd=foreign_actors.parent, ok=False)
    assert "ConfigurationError" in refused.stderr
    assert str(foreign_actors) in refused.stderr
    assert "Rename that package" in refused.stderr
    assert "the foreign package was imported" not in refused.stderr


def test_a_compat_module_of_somebody_else_is_named_too(installed, tmp_path):
    (tmp_path / "compat.py").write_text("raise SystemExit('imported')\n")
    refused = installed.run("python", "-c", START, cwd=tmp_path, ok=False)
    assert "ConfigurationError" in refused.stderr
    assert str(tmp_path / "compat.py") in refused.stderr


def test_files_written_over_by_another_distribution_are_named(installed, tmp_path):
    entry = installed.packages / "actors" / "__init__.py"
    ours = entry.read_bytes()
    entry.write_text("raise SystemExit('imported')\n")
    try:
        refused = installed.run("python", "-c", START, cwd=tmp_path, ok=False)
    finally:
        entry.write_bytes(ours)
    assert "ConfigurationError" in refused.stderr
    assert str(entry) in refused.stderr
    assert "--force-reinstall" in refused.stderr


def test_importing_spine_loads_no_database_library(installed, tmp_path):
    loaded = installed.run("python", "-c", "import sys, spine; print(*sys.modules)", cwd=tmp_path).stdout.split()
    assert "spine" in loaded
    assert not {"sqlalchemy", "aiosqlite", "alembic", "psycopg", "sqlite3", "typer", "rich"} & set(loaded)


def test_the_help_of_the_command_loads_no_database_library(installed, tmp_path):
    report = installed.run("spine", "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert "why" in report.stdout
    imported = {
        line.rpartition("|")[2].strip() for line in report.stderr.splitlines() if line.startswith("import time:")
    }
    assert "spine" in imported
    assert not {"sqlalchemy", "aiosqlite", "alembic", "psycopg", "sqlite3"} & imported


def test_an_installed_shim_needs_no_import_of_spine_by_the_worker(installed, tmp_path):
    names = "from compat.transaction_coordinator import get_transaction_coordinator, TransactionFailed"
    installed.run("python", "-c", f"{names}; print(get_transaction_coordinator)", cwd=tmp_path)


def test_a_postgresql_url_without_the_extra_names_it_everywhere(installed, tmp_path):
    url, extra = "postgresql+psycopg://user:secret@127.0.0.1:1/none", "install hoc-spine[postgres]"
    start = "import anyio, spine; anyio.run(spine.Spine().start)"
    shim = "from compat.transaction_coordinator import get_transaction_coordinator as get; get()"
    complete = f"{shim}.execute(run_id='r', tenant_id='t', run_status='succeeded')"
    asked = [("python", "-c", code) for code in (start, complete)]
    asked += [("spine", name) for name in ("verify", "health", "runs")]
    asked.append(("spine", "halt", "--reason", "r", "--actor", "a"))
    for command in asked:
        told = installed.run(*command, cwd=tmp_path, ok=False, SPINE_DATABASE_URL=url).stderr
        assert extra in told, command
        assert "secret" not in told
        assert command[0] == "spine" or "ConfigurationError" in told
    facade = "from compat.run_governance_facade import get_run_governance_facade as get"
    record = f"{facade}; print(get().create_policy_evaluation('r', 't', 'succeeded'))"
    told = installed.run("python", "-c", record, cwd=tmp_path, SPINE_DATABASE_URL=url).stdout
    assert extra in told
    assert told.endswith("None\n")
