"""Parked rollbacks from the command line: listed, explained, tried again, or ended on evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.governed import SQLITE, journal
from tests.integration.command import inside, ok, refused, run, told
from tests.integration.shop import FAILURE, Shop, lines_of, made

WHO = ("--reason", "card network repaired", "--actor", "ops@acme")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Ten runs were replayed while the tenth could be neither paid nor taken back."""
    shop = made(tmp_path, lines_of(10))
    totals = shop.replay(PAYDAY_STUCK="yes")
    assert (totals["committed"], totals["rolled_back"], totals["parked"]) == (9, 0, 1)
    return shop


def parked(shop: Shop) -> dict[str, Any]:
    (item,) = told("parked", "--db", shop.db)
    return dict(item)


def why(shop: Shop) -> dict[str, Any]:
    return dict(told("why", "run-009", "--db", shop.db, code=4))


def test_a_parked_rollback_is_listed_and_explained(shop: Shop) -> None:
    """Nothing expires: it is in parked, why, runs and health, and why names the commands that end it."""
    item = parked(shop)
    assert (item["run_id"], item["tenant_id"], item["domain"]) == ("run-009", "acme", "payments")
    assert "card network is gone" in item["error"]
    assert item["tx_id"] in ok("parked", "--db", shop.db)
    told_why = why(shop)
    assert (told_why["verdict"], told_why["cause"]["code"]) == ("parked", FAILURE)
    assert "does not answer for run-009" in told_why["cause"]["text"]
    assert f"spine resolve {item['tx_id']}" in told_why["next"]
    assert told_why["transaction"]["state"] == "PARKED"
    assert shop.verdicts()["run-009"] == "parked"
    health = told("health", "--db", shop.db)
    assert (health["transactions_parked"], health["runs_parked"]) == (1, 1)
    # A replay meets it as it is.
    assert shop.replay()["parked"] == 1


def test_a_parked_rollback_is_tried_again_by_the_application_that_has_the_domain(shop: Shop) -> None:
    """The command only records the word; whichever application starts next carries it out."""
    item = parked(shop)
    retried = told("resolve", item["tx_id"][:30], "--retry", *WHO, "--db", shop.db)
    assert (retried["tx_id"], retried["state"]) == (item["tx_id"], "COMPENSATING")
    assert told("why", "run-009", "--db", shop.db, code=5)["verdict"] == "pending"
    totals = shop.replay()
    assert (totals["committed"], totals["rolled_back"], totals["parked"]) == (9, 1, 0)
    told_why = why(shop)
    assert told_why["verdict"] == "rolled_back"
    assert told("parked", "--db", shop.db) == []
    assert ok("parked", "--db", shop.db) == "nothing is parked\n"
    assert told("verify", "--db", shop.db)["ok"]


def test_a_parked_transaction_is_ended_on_evidence(shop: Shop) -> None:
    """Who, why and what shows it are on the record and in the answer; the run may be completed again."""
    item = parked(shop)
    evidence = "refund 4711 of 2026-01-02 seen in the bank's statement"
    resolved = told("resolve", item["tx_id"], "--evidence", evidence, *WHO, "--db", shop.db)
    assert resolved["state"] == "ABORTED_MANUAL"
    told_why = why(shop)
    assert told_why["verdict"] == "rolled_back"
    assert evidence in told_why["cause"]["text"]
    assert "ops@acme" in told_why["cause"]["text"]
    assert told("parked", "--db", shop.db) == []
    assert "not PARKED" in refused("resolve", item["tx_id"], "--evidence", "x", *WHO, "--db", shop.db)
    assert told("verify", "--db", shop.db)["ok"]


def test_an_operator_must_say_which_what_why_and_who(shop: Shop) -> None:
    """Nothing is moved by a word that is incomplete, of both kinds, or about nothing."""
    tx_id = parked(shop)["tx_id"]
    db = ("--db", shop.db)
    assert "--reason" in refused("resolve", tx_id, "--retry", "--actor", "a", *db, by=inside)
    assert "--actor" in refused("resolve", tx_id, "--retry", "--reason", "r", *db, by=inside)
    assert "--evidence" in refused("resolve", tx_id, *WHO, *db, by=inside)
    assert "--evidence" in refused("resolve", tx_id, "--retry", "--evidence", "e", *WHO, *db, by=inside)
    assert "evidence" in refused("resolve", tx_id, "--evidence", "  ", *WHO, *db)
    assert "no transaction" in refused("resolve", "01000000", "--retry", *WHO, *db)
    assert parked(shop)["tx_id"] == tx_id


def test_a_beginning_of_an_id_means_a_parked_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed ones that begin so are no candidates; of several parked ones some are named, and how many more."""
    shop = made(tmp_path, lines_of(30))
    assert shop.replay(PAYDAY_STUCK="yes")["parked"] == 3
    ids = sorted(item["tx_id"] for item in told("parked", "--db", shop.db))
    command = ("--retry", *WHO, "--db", shop.db)
    error = refused("resolve", ids[0][:1], *command, by=inside)
    assert error.endswith(f"begins several parked transactions: {', '.join(ids)}")
    monkeypatch.setattr("spine.cli.parking._AMBIGUOUS_SHOWN", 2)
    assert refused("resolve", ids[0][:1], *command, by=inside).endswith(f"{', '.join(ids[:2])} and 1 more")
    for tx_id in ids[:2]:
        told("resolve", tx_id, "--evidence", "seen", *WHO, "--db", shop.db)
    assert told("resolve", ids[2][:1], *command)["tx_id"] == ids[2]


def test_a_transaction_that_is_not_parked_is_named_with_its_state(shop: Shop) -> None:
    """By its whole id or the beginning of it; an empty id means none, even where only one is parked."""
    (tx_id,) = [body["tx_id"] for body in journal(f"{SQLITE}{shop.db}", "tx.committed") if body["run_id"] == "run-003"]
    for given in (tx_id, tx_id[:-1]):
        error = refused("resolve", given, "--retry", *WHO, "--db", shop.db, by=inside)
        assert f"transaction {tx_id} of run 'run-003' is COMMITTED, not PARKED" in error
        assert "spine why run-003" in error
    assert "empty" in refused("resolve", "", "--retry", *WHO, "--db", shop.db, by=inside)
    assert parked(shop)


def test_a_list_that_is_cut_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are listed, and one line on stderr tells that there are more; a whole list has no such line."""
    shop = made(tmp_path, lines_of(20))
    assert shop.replay(PAYDAY_STUCK="yes")["parked"] == 2
    whole = run("parked", "--db", shop.db, "--json")
    assert whole.stderr == ""
    monkeypatch.setattr("spine.cli.parking._SHOWN", 1)
    cut = inside("parked", "--db", shop.db, "--json")
    assert json.loads(cut.stdout) == json.loads(whole.stdout)[:1]
    assert cut.stderr == "spine: more than 1 rollbacks are parked: these are the oldest\n"
