"""``spine replay``: a recorded day through one authority, as often as one likes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import COMMAND, RECORDED, ok, on_terminal, recording, refused, run, told

KEYS = [
    "runs", "operations", "allowed", "denied", "degraded", "failed_operations", "committed", "rolled_back", "parked",
    "events", "rejected_lines", "journal_rows", "seconds",
]  # fmt: skip


def timeless(totals: dict[str, Any]) -> dict[str, Any]:
    assert list(totals) == KEYS
    assert totals.pop("seconds") >= 0
    return totals


@pytest.mark.timeout(180)
def test_the_recorded_day_is_found_again_run_by_run() -> None:
    if not RECORDED.exists():
        pytest.skip(f"the recorded runs are not beside this checkout: {RECORDED}")
    first = timeless(told("replay", RECORDED, "--db", "day.db", timeout=120))
    assert first == {
        "runs": 150, "operations": 862, "allowed": 862, "denied": 0, "degraded": 0, "failed_operations": 54,
        "committed": 150, "rolled_back": 0, "parked": 0, "events": 150, "rejected_lines": 0,
        "journal_rows": first["journal_rows"],
    }  # fmt: skip
    assert timeless(told("replay", RECORDED, "--db", "day.db", timeout=120)) == first
    report = told("verify", "--db", "day.db")
    assert (report["ok"], report["rows"], report["breaks"]) == (True, first["journal_rows"], [])
    recorded = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    statuses = {line["run_id"]: line["run_status"] for line in recorded if line["type"] == "run.completed"}
    listed = {item["run_id"]: item["verdict"] for item in told("runs", "--db", "day.db")}
    assert listed == statuses
    for run_id in sorted(statuses)[::50]:
        why = told("why", run_id, "--db", "day.db", code=0 if statuses[run_id] == "succeeded" else 4)
        sent = [line for line in recorded if line["run_id"] == run_id and line["type"] == "operation"]
        assert [decision["operation"] for decision in why["decisions"]] == [line["operation"] for line in sent]
        assert [decision["outcome"]["success"] for decision in why["decisions"]] == [
            line["outcome"]["success"] for line in sent
        ]
        assert why["evidence"]["intact"] is True


@pytest.mark.postgresql
def test_a_replay_on_postgresql_gives_the_same_totals(postgresql_url: str, tmp_path: Path) -> None:
    file = recording(tmp_path / "day.jsonl")
    first = timeless(told("replay", file, "--db", postgresql_url))
    assert first == timeless(told("replay", file, "--db", "lite.db"))
    assert first == timeless(told("replay", file, "--db", postgresql_url))
    assert told("verify", "--db", postgresql_url)["ok"] is True


def test_what_is_printed_describes_the_file_as_journaled(tmp_path: Path) -> None:
    file = recording(tmp_path / "day.jsonl")
    first = timeless(told("replay", file))
    assert first == {
        "runs": 6, "operations": 24, "allowed": 24, "denied": 0, "degraded": 0, "failed_operations": 6, "committed": 6,
        "rolled_back": 0, "parked": 0, "events": 6, "rejected_lines": 0, "journal_rows": first["journal_rows"],
    }  # fmt: skip
    assert timeless(told("replay", file)) == first
    text = ok("replay", file)
    assert "operations         24\n" in text
    assert "\x1b" not in text
    recording(tmp_path / "more.jsonl", runs=2)
    assert told("replay", tmp_path / "more.jsonl")["runs"] == 2


def test_the_lines_of_a_run_keep_their_order(tmp_path: Path) -> None:
    told("replay", recording(tmp_path / "day.jsonl", runs=40, operations=5))
    why = told("why", "run-0001")
    assert [decision["operation"] for decision in why["decisions"]] == [f"shop.tool_{n % 3}" for n in range(5)]
    outcomes = [decision["outcome"] for decision in why["decisions"]]
    assert [outcome["success"] for outcome in outcomes] == [True, True, True, False, True]
    assert outcomes[3]["error_code"] == "TOOL_ERROR"


BAD = [
    (b"{", "not JSON"),
    (b"[]", "not a JSON object but a list"),
    (b'{"type":"operation","run_id":"run-0000","operation":"shop.tool_0","params":{},"outcome":{}}', "outcome.success"),
    (b'{"type":"operation","run_id":"run-0000","operation":"shop.tool_0","params":{"x":NaN},"outcome":{}}', "NaN"),
    (b'{"type":"nothing","run_id":"run-0000"}', "'nothing'"),
    (b'{"type":"run.completed","run_id":"never","run_status":"failed"}', "was not started on an earlier line"),
    (b'{"type":"run.started","run_id":"run-0000","tenant_id":"other"}', "already started"),
    (b"x" * (2 << 20), "longer than 1048576 bytes"),
    (
        b'{"type":"operation","run_id":"run-0000","operation":"a.b","params":{"n":18014398509481984},"outcome":{"success":true}}',
        "2**53",
    ),
]


def test_bad_lines_are_refused_by_number_and_reason_without_losing_the_rest(tmp_path: Path) -> None:
    good = recording(tmp_path / "day.jsonl").read_bytes().splitlines()
    lines = [good[0], *(raw for raw, _ in BAD[:7]), *good[1:-1], *(raw for raw, _ in BAD[7:]), good[-1]]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"\n".join(lines))
    done = run("replay", file, "--json")
    assert done.returncode == 0, done.stderr
    totals = timeless(json.loads(done.stdout))
    assert (totals["runs"], totals["operations"], totals["rejected_lines"]) == (6, 24, len(BAD))
    refusals = done.stderr.splitlines()
    numbers = [2, 3, 4, 5, 6, 7, 8, len(lines) - 2, len(lines) - 1]
    assert sorted(int(line.split()[2].rstrip(":")) for line in refusals) == numbers
    for (_, reason), number in zip(BAD, numbers, strict=True):
        assert any(line.startswith(f"spine: line {number}: ") and reason in line for line in refusals), (
            reason,
            refusals,
        )
    assert all(len(line) < 500 for line in refusals)
    assert timeless(told("replay", file)) == totals


def test_strict_stops_at_the_first_bad_line(tmp_path: Path) -> None:
    good = recording(tmp_path / "day.jsonl").read_text().splitlines()
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*good[:12], "{", *good[12:], "{"]))
    done = run("replay", file, "--strict", "--json")
    assert done.returncode == 1
    totals = timeless(json.loads(done.stdout))
    assert (totals["runs"], totals["operations"], totals["committed"], totals["rejected_lines"]) == (2, 8, 2, 1)
    assert [line.startswith("spine: line 13: not JSON") for line in done.stderr.splitlines()] == [True]


def test_a_line_repaired_later_does_not_shift_the_others(tmp_path: Path) -> None:
    good = recording(tmp_path / "day.jsonl", runs=2).read_text().splitlines()
    broken = json.loads(good[2])
    broken["outcome"] = {}
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*good[:2], json.dumps(broken), *good[3:]]))
    assert told("replay", file)["operations"] == 7
    repaired = timeless(told("replay", tmp_path / "day.jsonl"))
    assert (repaired["operations"], repaired["rejected_lines"]) == (8, 0)


def test_an_edited_file_is_refused_line_by_line(tmp_path: Path) -> None:
    file = recording(tmp_path / "day.jsonl", runs=2)
    first = timeless(told("replay", file))
    file.write_text(file.read_text().replace('"ordinal": 1}', '"ordinal": 9}').replace('"succeeded"', '"failed"'))
    again = run("replay", file, "--json")
    assert "IDEMPOTENCY_CONFLICT" in again.stderr
    assert "another payload" in again.stderr
    assert timeless(json.loads(again.stdout)) == {**first, "rejected_lines": 4}


APP = """
from spine import AuthorityDecision, OperationResult, Spine
from spine.domains import Refused

class Ledger:
    name = "ledger"
    after = ()
    def plan(self, run):
        if run.run_id == "run-0001":
            raise Refused("CLOSED", "the books are closed")
        return ()

spine = Spine(domains=[Ledger()])

@spine.rule("shop.tool_1")
def never(ctx):
    return AuthorityDecision.deny("tool 1 is not allowed", code="NO_TOOL")

@spine.operation("shop.tool_0")
async def own(ctx):
    return OperationResult.fail("own handler", "OWN")

@spine.operation("shop.other")
async def other(ctx):
    return {}
"""


def test_an_application_brings_its_rules_operations_and_domains(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(textwrap.dedent(APP))
    file = recording(tmp_path / "day.jsonl")
    first = timeless(told("replay", file, "--app", "shop:spine", "--db", "app.db"))
    assert first == {
        "runs": 6, "operations": 24, "allowed": 18, "denied": 6, "degraded": 0, "failed_operations": 12, "committed": 5,
        "rolled_back": 1, "parked": 0, "events": 5, "rejected_lines": 0, "journal_rows": first["journal_rows"],
    }  # fmt: skip
    assert timeless(told("replay", file, "--app", "shop:spine", "--db", "app.db")) == first
    why = told("why", "run-0001", "--db", "app.db", code=4)
    assert (why["verdict"], why["cause"]["code"]) == ("rolled_back", "CLOSED")
    why = told("why", "run-0002", "--db", "app.db", code=3)
    assert (why["verdict"], why["cause"]["code"]) == ("denied", "NO_TOOL")
    names = {item["operation"]: item["registered"] for item in told("ops", "--app", "shop:spine", "--db", "app.db")}
    assert names == {"shop.tool_0": True, "shop.tool_1": False, "shop.tool_2": False, "shop.other": True}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("shop", "is not MODULE:ATTR"),
        ("nowhere.at.all:spine", "importing nowhere.at.all failed: ModuleNotFoundError"),
        ("shop:nothing", "has no nothing"),
        ("shop:Ledger", "neither a Spine nor a function that returns one"),
        ("broken:spine", "importing broken failed: ZeroDivisionError"),
    ],
)
def test_a_wrong_application_is_named(tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "shop.py").write_text(textwrap.dedent(APP))
    (tmp_path / "broken.py").write_text("1 / 0")
    assert reason in refused("replay", recording(tmp_path / "day.jsonl"), "--app", target, "--db", "app.db")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "missing.jsonl" in refused("replay", tmp_path / "missing.jsonl")
    assert str(tmp_path) in refused("replay", tmp_path)
    assert "no/such" in refused("replay", recording(tmp_path / "day.jsonl"), "--db", "no/such/folder/x.db")


def test_an_empty_file_and_standard_input(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert told("replay", tmp_path / "empty.jsonl")["runs"] == 0
    assert told("replay", "-", stdin=recording(tmp_path / "day.jsonl").read_bytes())["runs"] == 6


def test_a_terminal_sees_progress_and_a_pipe_does_not(tmp_path: Path) -> None:
    file = recording(tmp_path / "day.jsonl", runs=40)
    seen = on_terminal("replay", file)
    assert "replaying" in seen
    assert "\x1b[" in seen
    assert "replaying" not in on_terminal("replay", file, NO_COLOR="1")
    done = run("replay", file)
    assert done.stderr == ""


def started(file: Path, db: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "replay", str(file), "--db", db, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_rows(db: str, rows: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if Path(db).exists():
            try:
                connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
                found = connection.execute("SELECT size FROM journal_head").fetchone()
                connection.close()
            except sqlite3.Error:
                found = None
            if found is not None and found[0] >= rows:
                return
        time.sleep(0.005)
    raise AssertionError("nothing was written in time")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_replay_keeps_what_was_acknowledged_and_goes_on_later(
    tmp_path: Path, sent: signal.Signals
) -> None:
    file = recording(tmp_path / "day.jsonl", runs=240)
    process = started(file, "cut.db")
    wait_for_rows("cut.db", 300)
    os.kill(process.pid, sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    partial = json.loads(next(line for line in err.splitlines() if line.startswith("{")))
    assert 0 < partial["operations"] < 960
    assert err.splitlines()[-1].startswith("spine: interrupted")
    assert told("verify", "--db", "cut.db")["rows"] == partial["journal_rows"]
    listed = told("runs", "--db", "cut.db")
    assert sum(item["operations"] for item in listed) == partial["operations"]
    whole = timeless(told("replay", file, "--db", "cut.db"))
    assert (whole["runs"], whole["operations"], whole["committed"], whole["events"]) == (240, 960, 240, 240)
    assert (whole["failed_operations"], whole["rejected_lines"]) == (240, 0)
    assert timeless(told("replay", file, "--db", "cut.db")) == whole


def test_a_second_interrupt_gives_up_calls_that_hang(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(
        "import anyio\nfrom spine import Spine\nspine = Spine()\n"
        "@spine.operation('shop.tool_1')\nasync def hang(ctx):\n    await anyio.sleep(60)\n"
    )
    file = recording(tmp_path / "day.jsonl")
    process = subprocess.Popen(
        [*COMMAND, "replay", str(file), "--app", "hang:spine", "--db", "cut.db"], stderr=subprocess.PIPE, text=True
    )
    wait_for_rows("cut.db", 30)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 9
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("spine: interrupted: ")
    assert told("verify", "--db", "cut.db")["ok"] is True


@pytest.mark.timeout(180)
def test_a_killed_replay_loses_nothing_and_is_finished_by_the_next(tmp_path: Path) -> None:
    file = recording(tmp_path / "day.jsonl", runs=240)
    process = started(file, "cut.db")
    wait_for_rows("cut.db", 300)
    process.kill()
    process.communicate(timeout=30)
    assert told("verify", "--db", "cut.db")["ok"] is True
    whole = timeless(told("replay", file, "--db", "cut.db", timeout=150))
    # What was cut off has an INTERRUPTED outcome and a second attempt, hence more rows, and the same endings.
    assert whole.pop("journal_rows") >= 5_040
    assert whole == {
        "runs": 240, "operations": 960, "allowed": 960, "denied": 0, "degraded": 0, "failed_operations": 240,
        "committed": 240, "rolled_back": 0, "parked": 0, "events": 240, "rejected_lines": 0,
    }  # fmt: skip
    assert told("verify", "--db", "cut.db")["ok"] is True
