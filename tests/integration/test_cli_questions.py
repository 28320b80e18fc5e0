"""The commands that ask, on the database alone: why, runs, ops, verify, health."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.integration.command import COMMAND, inside, ok, on_terminal, recording, refused, run, told

ENDINGS = {
    "run-small-refund": ("succeeded", 0, "SUCCEEDED"),
    "run-large-refund": ("denied", 3, "REFUND_LIMIT"),
    "run-mail-down": ("failed", 4, "HANDLER_EXCEPTION:ConnectionRefusedError"),
    "run-through-the-incident": ("succeeded", 0, "SUCCEEDED"),
    "run-too-late": ("denied", 3, "DEGRADED_NEW_RUN"),
    "run-split-refund": ("rolled_back", 4, "REFUND_NOT_BOOKED"),
}


@pytest.fixture(scope="module")
def recorded_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("day") / "day.db"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*COMMAND, "demo", "--db", str(path)], check=True, capture_output=True, env=environment, timeout=60)
    return path


@pytest.fixture
def day(recorded_day: Path, tmp_path: Path) -> Path:
    """The demo's database, the test's own copy."""
    return Path(shutil.copy(recorded_day, tmp_path / "day.db"))


@pytest.mark.parametrize("run_id", sorted(ENDINGS))
def test_why_tells_the_ending_and_exits_with_its_code(day: Path, run_id: str) -> None:
    verdict, code, cause = ENDINGS[run_id]
    why = told("why", run_id, "--db", day, code=code)
    assert (why["run_id"], why["tenant_id"], why["verdict"], why["cause"]["code"]) == (run_id, "acme", verdict, cause)
    assert why["evidence"]["intact"] is True
    assert list(why) == [
        "run_id", "tenant_id", "verdict", "cause", "decisions", "transaction", "contract", "events", "evidence", "next",
    ]  # fmt: skip
    text = run("why", run_id, "--db", day)
    assert text.returncode == code
    first, second, *_ = text.stdout.splitlines()
    assert first == f"run {run_id} {verdict.replace('_', ' ')}"
    assert second.startswith(f"cause: {cause}: ")


def test_why_shows_rules_times_and_the_refusing_domain(day: Path) -> None:
    why = told("why", "run-split-refund", "--db", day, code=4)
    lookup, large, small = why["decisions"]
    assert lookup["outcome"]["handle_ms"] >= 3
    assert lookup["outcome"]["queue_ms"] >= 0
    assert (large["allowed"], large["code"], large["outcome"]) == (False, "REFUND_LIMIT", None)
    assert large["rules"] == [
        {"id": "small_refunds_only", "version": "2", "mode": "enforce", "outcome": "deny", "determined": True}
    ]
    assert small["outcome"]["success"] is True
    ledger = next(domain for domain in why["transaction"]["domains"] if domain["name"] == "ledger")
    assert "250.00" in ledger["error"]
    assert why["transaction"]["state"] == "ABORTED"
    assert why["events"] == []
    text = run("why", "run-split-refund", "--db", day).stdout
    assert "rule small_refunds_only version 2 enforce -> deny: refund over 100.00 needs a person" in text
    assert "next: Repair domain ledger" in text


def test_a_beginning_of_an_id_is_enough_when_it_is_unique(day: Path) -> None:
    assert told("why", "run-sm", "--db", day)["run_id"] == "run-small-refund"
    assert told("why", "run-too", "--db", day, code=3)["run_id"] == "run-too-late"
    line = refused("why", "run-", "--db", day)
    assert all(run_id in line for run_id in ENDINGS)
    assert "no run 'nope'" in refused("why", "nope", "--db", day, code=6)
    assert "no run '%'" in refused("why", "%", "--db", day, code=6)
    assert "no run 'run-\\udcff'" in refused("why", "run-\udcff", "--db", day, code=6)


def test_runs_lists_every_run_with_its_verdict(day: Path) -> None:
    listed = told("runs", "--db", day)
    assert {item["run_id"]: item["verdict"] for item in listed} == {
        run_id: verdict for run_id, (verdict, _, _) in ENDINGS.items() if run_id != "run-too-late"
    }
    assert [item["run_id"] for item in told("runs", "--db", day, "--limit", "2")] == [i["run_id"] for i in listed[:2]]
    assert [item["run_id"] for item in told("runs", "--db", day, "--verdict", "denied")] == ["run-large-refund"]
    assert {item["run_id"]: item["contract"] for item in listed} == {
        item["run_id"]: told("why", item["run_id"], "--db", day, code=ENDINGS[item["run_id"]][1])["contract"]["overall"]
        for item in listed
    }
    header, *lines = ok("runs", "--db", day).splitlines()
    assert header.split()[:5] == ["run", "tenant", "verdict", "status", "contract"]
    assert len(lines) == len(listed)
    assert "'lost' is none of" in refused("runs", "--db", day, "--verdict", "lost")


def test_ops_counts_what_the_journal_saw(day: Path) -> None:
    seen = {item.pop("operation"): item for item in told("ops", "--db", day)}
    assert set(seen) >= {"orders.lookup", "refunds.issue", "mail.send"}
    lookup = seen["orders.lookup"]
    assert (lookup["calls"], lookup["allowed"], lookup["denied"], lookup["failed"]) == (5, 5, 0, 0)
    assert lookup["p50_handle_ms"] >= 3
    assert lookup["registered"] is None
    assert seen["refunds.issue"]["denied"] == 2
    assert seen["mail.send"]["failed"] == 1
    assert "refunds.issue" in ok("ops", "--db", day)


def test_health_tells_state_head_and_counts(day: Path) -> None:
    health = told("health", "--db", day)
    assert health["governance"]["state"] == "active"
    assert health["governance"]["actor"] == "ops@acme"
    assert health["rows"] == told("verify", "--db", day)["rows"]
    assert health["runs"] == 5
    assert health["decisions_open"] == 0
    contracts = [health[f"contracts_{overall}"] for overall in ("pending", "complete", "incomplete", "stale")]
    assert sum(contracts) == 5
    assert ok("health", "--db", day).startswith("authority active\n")


def test_a_changed_row_breaks_why_and_verify(day: Path) -> None:
    with sqlite3.connect(day) as connection:
        (seq,) = connection.execute(
            "SELECT seq FROM journal WHERE run_id = 'run-small-refund' AND kind = 'outcome' LIMIT 1"
        ).fetchone()
        connection.execute("UPDATE journal SET body = replace(body, 'true', 'false') WHERE seq = ?", (seq,))
    connection.close()
    why = told("why", "run-small-refund", "--db", day, code=7)
    assert why["evidence"]["intact"] is False
    assert "spine verify" in why["next"]
    report = told("verify", "--db", day, code=1)
    assert report["ok"] is False
    assert {"stream": "main", "seq": seq, "kind": "hash"} in report["breaks"]
    assert f"main #{seq} hash" in run("verify", "--db", day).stdout
    assert told("why", "run-mail-down", "--db", day, code=4)["evidence"]["intact"] is True


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_a_removed_row_is_found(day: Path, which: str) -> None:
    with sqlite3.connect(day) as connection:
        (size,) = connection.execute("SELECT size FROM journal_head").fetchone()
        connection.execute(
            "DELETE FROM journal WHERE seq = ?", ({"first": 1, "middle": size // 2, "last": size}[which],)
        )
    connection.close()
    report = told("verify", "--db", day, code=1)
    assert report["breaks"]
    assert all(set(found) == {"stream", "seq", "kind"} for found in report["breaks"])


def test_a_run_whose_rows_are_gone_is_broken_not_missing(day: Path) -> None:
    with sqlite3.connect(day) as connection:
        connection.execute("DELETE FROM journal WHERE run_id = 'run-small-refund'")
    connection.close()
    assert "its journal rows are gone" in refused("why", "run-small-refund", "--db", day, code=7)


def test_a_row_that_is_no_json_is_explained_as_broken(day: Path) -> None:
    with sqlite3.connect(day) as connection:
        connection.execute("UPDATE journal SET body = '{' WHERE run_id = 'run-small-refund'")
    connection.close()
    why = told("why", "run-small-refund", "--db", day, code=7)
    assert (why["run_id"], why["verdict"], why["evidence"]["intact"]) == ("run-small-refund", "pending", False)
    assert run("runs", "--db", day).returncode == 0
    assert run("ops", "--db", day).returncode == 0


def test_a_checkpoint_kept_outside_is_compared(day: Path) -> None:
    last = ok("verify", "--db", day).splitlines()[-1]
    assert last.startswith("checkpoint ")
    checkpoint = last.split()[1]
    assert told("verify", "--db", day, "--checkpoint", checkpoint)["ok"] is True
    size, digest = checkpoint.split(":")
    forged = f"{size}:{'0' * 64}"
    assert [b["kind"] for b in told("verify", "--db", day, "--checkpoint", forged, code=1)["breaks"]] == ["checkpoint"]
    assert "is not SIZE:HASH" in refused("verify", "--db", day, "--checkpoint", digest)


READING = [("why", "x"), ("runs",), ("ops",), ("verify",), ("health",)]
SWITCHING = [(name, "--reason", "r", "--actor", "a") for name in ("bypass", "degrade", "halt", "restore")]


@pytest.mark.parametrize("command", [*READING, *SWITCHING], ids=lambda command: command[0])
def test_a_missing_database_is_told_and_not_created(tmp_path: Path, command: tuple[str, ...]) -> None:
    for args in ((), ("--db", str(tmp_path / "gone.db")), ("--db", f"sqlite+aiosqlite:///{tmp_path}/no/dir.db")):
        assert "there is no" in refused(*command, *args, by=inside)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", READING, ids=lambda command: command[0])
def test_what_is_no_journal_is_told(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "text.db").write_text("not a database at all" * 100)
    refused(*command, "--db", tmp_path / "text.db", by=inside)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t(x)").connection.close()
    assert "no journal" in refused(*command, "--db", tmp_path / "other.db", by=inside)
    assert "is not a database URL" in refused(*command, "--db", "sqlite://x://", by=inside)
    assert "cannot be kept in" in refused(*command, "--db", "mysql://root@localhost/x", by=inside)
    refused(*command, "--db", "postgresql+psycopg://nobody@127.0.0.1:1/none", by=inside)


def test_a_newer_schema_cannot_be_verified(day: Path) -> None:
    with sqlite3.connect(day) as connection:
        connection.execute("UPDATE spine_meta SET value = '999'")
    connection.close()
    assert "upgrade" in refused("verify", "--db", day)


def test_the_database_is_taken_from_the_environment(day: Path) -> None:
    assert told("why", "run-sm", SPINE_DATABASE_URL=f"sqlite+aiosqlite:///{day}")["verdict"] == "succeeded"
    assert "there is no" in refused(
        "why", "run-sm", "--db", "other.db", SPINE_DATABASE_URL=f"sqlite+aiosqlite:///{day}"
    )


def test_reading_changes_nothing(day: Path, tmp_path: Path) -> None:
    before = day.read_bytes()
    for command in READING:
        run(*command, "--db", day)
    assert day.read_bytes() == before
    assert "run-small" in ok("runs", "--db", day)


def test_colours_only_for_a_terminal_that_wants_them(day: Path) -> None:
    for command in (("why", "run-large-refund"), ("runs",)):
        plain = run(*command, "--db", day)
        assert "\x1b" not in plain.stdout + plain.stderr
        assert "\x1b[" in on_terminal(*command, "--db", day)
        for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            assert on_terminal(*command, "--db", day, **setting).replace("\r\n", "\n") == plain.stdout
    for name in ("ops", "verify", "health"):
        assert "\x1b" not in ok(name, "--db", day)


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    told("replay", recording(tmp_path / "day.jsonl", runs=60, operations=1))
    for command in (["runs", "--json"], ["runs"], ["why", "run-0001"]):
        process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        process.wait(30)


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    line = {"type": "run.started", "run_id": "läuft-\u4e2d", "tenant_id": "acme"}
    (tmp_path / "day.jsonl").write_text(json.dumps(line))
    told("replay", tmp_path / "day.jsonl")
    assert "l\\xe4uft-\\u4e2d" in ok("runs", PYTHONIOENCODING="ascii")
    assert "läuft-中" in ok("runs", PYTHONIOENCODING="utf-8")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("frob",), "No such command 'frob'"),
        (("why",), "Missing argument"),
        (("why", "x", "--frob"), "No such option"),
        (("runs", "--limit", "many"), "limit"),
        (("halt", "--reason", "x"), "--actor"),
        (("bypass", "--reason", "x", "--actor", "y", "--for-s", "99999"), "for-s"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args: tuple[str, ...], reason: str) -> None:
    assert reason in refused(*args, by=inside)


@pytest.mark.parametrize("name", ["TRANSACTION_COORDINATOR_ENABLED", "RAC_ENABLED", "RAC_ROLLBACK_AUDIT_ENABLED"])
@pytest.mark.parametrize("command", [("parked",), ("why", "x"), ("replay", os.devnull)], ids=lambda command: command[0])
def test_a_switch_in_the_environment_that_is_not_understood_is_one_line_and_exit_2(
    command: tuple[str, ...], name: str
) -> None:
    """Every command that needs it names the variable, its value and what it may be; ``--help`` does not need it."""
    error = refused(*command, **{name: "maybe"})
    assert f"{name} is 'maybe': set it to true or false" in error
    assert ok("--help", **{name: "maybe"}) == ok("--help")


def test_help_names_every_command() -> None:
    text = ok("--help")
    for name in ("demo", "replay", "why", "runs", "ops", "verify", "health", "bypass", "degrade", "halt", "restore"):
        assert f"  {name}" in text
        assert inside(name, "--help").stdout.startswith("Usage: spine ")
    assert ok() == text


def test_the_command_starts_without_the_heavy_imports() -> None:
    done = subprocess.run(
        [COMMAND[0], "-X", "importtime", *COMMAND[1:], "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"sqlalchemy", "pydantic", "structlog", "anyio", "rich", "alembic", "orjson"}
