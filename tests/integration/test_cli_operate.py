"""The operator's switches from the command line: journaled before they act, on the database alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.command import inside, ok, recording, refused, run, told

WHO = ("--reason", "provider down", "--actor", "ops@acme")


@pytest.fixture
def replayed(tmp_path: Path) -> Path:
    file = recording(tmp_path / "day.jsonl", runs=2)
    told("replay", file)
    return file


def more(tmp_path: Path) -> Path:
    """A day whose runs are not yet in the database."""
    file = recording(tmp_path / "more.jsonl", runs=4)
    file.write_text(file.read_text().replace("run-000", "late-000"))
    return file


def test_halt_binds_the_next_process_until_it_is_restored(replayed: Path, tmp_path: Path) -> None:
    state = told("halt", *WHO)
    assert (state["state"], state["reason"], state["actor"]) == ("halted", "provider down", "ops@acme")
    assert told("health")["governance"]["state"] == "halted"
    totals = told("replay", more(tmp_path))
    assert (totals["runs"], totals["allowed"], totals["denied"]) == (4, 0, 16)
    why = told("why", "late-0002", code=3)
    assert (why["verdict"], why["cause"]["code"]) == ("denied", "HALTED")
    assert "spine restore" in why["next"]
    assert ok("restore", "--reason", "provider back", "--actor", "ops@acme").startswith("authority active, epoch ")
    assert told("verify")["ok"] is True


def test_degrade_refuses_new_runs(replayed: Path, tmp_path: Path) -> None:
    assert told("degrade", *WHO)["state"] == "degraded"
    totals = told("replay", more(tmp_path))
    assert totals["denied"] == 16
    assert told("why", "late-0002", code=3)["cause"]["code"] == "DEGRADED_NEW_RUN"
    assert told("replay", more(tmp_path)) | {"seconds": 0} == totals | {"seconds": 0}


def test_bypass_has_an_end_and_restore_tells_what_it_let_through(replayed: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from spine import AuthorityDecision, Spine\n"
        "spine = Spine()\n"
        "@spine.rule('shop.tool_0')\n"
        "def never(ctx):\n"
        "    return AuthorityDecision.deny('not today', code='NO_TOOL')\n"
    )
    state = told("bypass", *WHO, "--for-s", "600")
    assert state["state"] == "bypassed"
    assert state["expires_at"] - state["since_at"] == 600_000_000
    totals = told("replay", more(tmp_path), "--app", "shop:spine")
    assert (totals["allowed"], totals["denied"]) == (16, 0)
    assert "(bypassed)" in run("why", "late-0000").stdout
    restored = told("restore", *WHO)
    assert [item["code"] for item in restored["would_have_denied"]] == ["NO_TOOL"] * 8
    assert told("verify")["ok"] is True


def test_health_shows_the_state_that_binds_though_nobody_has_ended_the_expired_bypass(replayed: Path) -> None:
    told("bypass", *WHO)
    assert told("health")["governance"]["state"] == "bypassed"
    with closing(sqlite3.connect("spine.db", isolation_level=None)) as file:
        file.execute("UPDATE governance SET expires_at = since_at")
    shown = told("health")["governance"]
    assert (shown["state"], shown["epoch"], shown["expires_at"]) == ("active", 2, shown["since_at"])
    assert ok("health").startswith("authority active\n")


@pytest.mark.parametrize("command", ["bypass", "degrade", "halt", "restore"])
def test_reason_and_actor_are_needed(replayed: Path, command: str) -> None:
    assert "--reason" in refused(command, "--actor", "a", by=inside)
    assert "--actor" in refused(command, "--reason", "r", by=inside)
    assert "reason" in refused(command, "--actor", "a", "--reason", "  ")
    assert "actor" in refused(command, "--actor", "", "--reason", "r")
