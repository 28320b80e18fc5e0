"""Parked rollbacks from the command line: listed, explained, tried again, or ended on evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import inside, ok, refused, told
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
