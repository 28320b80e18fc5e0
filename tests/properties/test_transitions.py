"""Whatever moves are tried, the transition table lets nothing be half; and order, digest and verdict are functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spine.governance.contract import FINALIZE, Ack, AckStatus, Due, reconcile
from spine.governance.transactions import (
    STEP_MOVES,
    TX_MOVES,
    CompleteRun,
    DomainResult,
    IllegalTransition,
    StepState,
    TransactionPhase,
    TransactionResult,
    TxState,
    completion_digest,
    moment,
    move_step,
    move_tx,
    plan_order,
)

T, S = TxState, StepState


class Coordinator(RuleBasedStateMachine):
    """Tries any move at any time beside a reference that knows only which effects may be live."""

    def __init__(self) -> None:
        super().__init__()
        self.tx = T.EXECUTING
        self.steps: list[StepState] = []
        self.sent: list[bool] = []
        self.undone: list[bool] = []
        self.aborted_decided = False

    @initialize(count=st.integers(1, 4))
    def begin(self, count: int) -> None:
        self.steps = [S.PLANNED] * count
        self.sent = [False] * count
        self.undone = [False] * count

    @rule(data=st.data())
    def move_on(self, data: st.DataObject) -> None:
        """Something the table allows: random tries alone hardly ever come far."""
        legal: list[tuple[int, StepState]] = [
            (n, move.target)
            for n, state in enumerate(self.steps)
            for move in STEP_MOVES
            if state in move.sources and move.within is self.tx
        ]
        if legal:
            self.step(*data.draw(st.sampled_from(legal)))

    @rule(to=st.sampled_from(T))
    def try_transaction_move(self, to: TxState) -> None:
        try:
            self.tx = move_tx(self.tx, to, self.steps)
        except IllegalTransition:
            return
        if to is T.COMPENSATING:
            self.aborted_decided = True

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), to=st.sampled_from(S))
    def try_step_move(self, data: st.DataObject, to: StepState) -> None:
        self.step(data.draw(st.integers(0, len(self.steps) - 1)), to)

    def step(self, n: int, to: StepState) -> None:
        try:
            self.steps[n] = move_step(self.steps[n], to, self.tx)
        except IllegalTransition:
            return
        if to is S.INTENT:
            self.sent[n] = True
        if to is S.RB_INTENT:
            assert self.aborted_decided, "a rollback before the abort decision"
        if to is S.ROLLED_BACK:
            self.undone[n] = True

    @invariant()
    def never_half(self) -> None:
        live = [sent and not undone for sent, undone in zip(self.sent, self.undone, strict=True)]
        if self.tx is T.COMMITTED:
            assert all(live), self.steps
            assert all(step is S.DONE for step in self.steps)
        if self.tx is T.ABORTED:
            assert not any(live), self.steps
        if self.tx is T.PARKED:
            assert S.PARKED in self.steps


TestCoordinator = Coordinator.TestCase
TestCoordinator.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_every_state_is_reached_and_every_state_leads_to_an_end() -> None:
    reached, frontier = {T.EXECUTING}, [T.EXECUTING]
    while frontier:
        state = frontier.pop()
        for move in TX_MOVES:
            if move.source is state and move.target not in reached:
                reached.add(move.target)
                frontier.append(move.target)
    assert reached == set(T)
    ending = {state for state in T if state.final}
    for _ in T:
        ending |= {move.source for move in TX_MOVES if move.target in ending}
    assert ending == set(T)
    steps = {S.PLANNED}
    for _ in S:
        steps |= {move.target for move in STEP_MOVES if move.sources & steps}
    assert steps == set(S)


@dataclass
class Named:
    name: str
    after: tuple[str, ...]


@st.composite
def graphs(draw: st.DrawFn) -> list[Named]:
    """Domains that wait only for earlier ones, declared in any order."""
    count = draw(st.integers(0, 8))
    domains = [
        Named(f"d{i}", tuple(f"d{j}" for j in draw(st.sets(st.integers(0, max(0, i - 1)), max_size=i))))
        for i in range(count)
    ]
    return draw(st.permutations(domains))


@given(graphs())
def test_the_plan_keeps_every_after_and_is_a_permutation(domains: list[Named]) -> None:
    ordered = plan_order(domains)
    place = {domain.name: n for n, domain in enumerate(ordered)}
    assert sorted(place) == sorted(domain.name for domain in domains)
    assert all(place[other] < place[domain.name] for domain in domains for other in domain.after)
    assert plan_order(ordered) == ordered


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
maybe = st.none() | texts
completions = st.builds(
    CompleteRun, texts, texts, texts, maybe, maybe, maybe, maybe, st.booleans(), maybe, st.booleans(), texts
)


@given(completions, completions)
def test_the_digest_is_equal_exactly_when_the_payload_is(one: CompleteRun, two: CompleteRun) -> None:
    def payload(request: CompleteRun) -> tuple[object, ...]:
        return tuple(getattr(request, name) for name in request.__slots__ if name not in ("run_id", "completion_key"))

    assert (completion_digest(one) == completion_digest(two)) == (payload(one) == payload(two))


results = st.builds(
    DomainResult,
    st.sampled_from(["incidents", "policies", "traces", "billing"]),
    texts,
    maybe,
    st.booleans(),
    maybe,
    st.none() | st.integers(0, 4_102_444_800_000_000).map(moment),
    maybe,
    st.sampled_from([None, *(s.value for s in S)]),
    st.sampled_from(["LOCAL", "EXTERNAL", "POST"]),
)


@given(
    st.lists(results, max_size=5, unique_by=lambda r: r.domain),
    st.sampled_from(TransactionPhase),
    st.integers(0, 10**9),
)
def test_a_result_survives_the_journal(domains: list[DomainResult], phase: TransactionPhase, duration: int) -> None:
    result = TransactionResult.of(
        "r", domains, phase=phase, duration_ms=duration, metadata={"authority_degraded": False}
    )
    assert TransactionResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


keys = st.sampled_from([("a", "x"), ("b", "y"), ("c", "z"), FINALIZE])
reports = st.builds(
    lambda key, status, result, tx: Ack(*key, status, result_id=result, tx_id=tx),
    keys,
    st.sampled_from(AckStatus),
    st.sampled_from([None, "1", "2"]),
    st.sampled_from([None, "t"]),
)
dues = st.lists(
    st.builds(lambda key, at: Due(*key, at), keys, st.integers(0, 20)), unique_by=lambda d: (d.domain, d.action)
)


@given(dues, st.lists(reports, max_size=8), st.integers(0, 30), st.randoms(use_true_random=False))
def test_the_verdict_is_whole_and_knows_no_order_but_that_of_one_transactions_words_on_one_action(
    expected: list[Due], acks: list[Ack], now: int, random: Random
) -> None:
    verdict = reconcile(expected, acks, now)
    groups = [verdict.missing, verdict.failed, verdict.stale, verdict.pending]
    found = [(f.domain, f.action) for group in groups for f in group]
    assert len(found) == len(set(found))
    delivered = {(d.domain, d.action) for d in expected} - set(found)
    assert all(any((a.domain, a.action) == key and a.status is AckStatus.SUCCESS for a in acks) for key in delivered)
    assert (verdict.overall.value == "COMPLETE") == (not found)
    words: dict[object, list[Ack]] = {}
    for ack in acks:
        words.setdefault((ack.key, ack.tx_id), []).append(ack)
    turns = [(ack.key, ack.tx_id) for ack in acks]
    random.shuffle(turns)
    again = reconcile(expected, [words[turn].pop(0) for turn in turns], now)
    assert [
        {(f.domain, f.action) for f in g}
        for g in (again.missing, again.failed, again.stale, again.pending, again.drift)
    ] == [{(f.domain, f.action) for f in g} for g in (*groups, verdict.drift)]
