"""An explanation as lines of text that no recorded value can forge: control characters are shown escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spine.explain.decisions import DecisionLine
from spine.kernel.printable import printable

_OTHERS_MOST = 10
# They stand nowhere else: not even --json has more of them.
_OTHER_LONGEST = 4_000

Line = tuple[str, str]
"""A style name (``head``, ``good``, ``bad``, ``warn``, ``dim`` or empty) and the text."""


def verdict_style(verdict: str) -> str:
    """Return the style in which a verdict is shown."""
    return {"succeeded": "good", "pending": "warn"}.get(verdict, "bad")


def explanation_lines(
    answer: Mapping[str, Any], decisions: Sequence[DecisionLine], notes: Sequence[str], others: Sequence[str] = ()
) -> list[Line]:
    """Return the answer as styled lines: verdict, cause, then what led to them; shape as ``Explanation.to_dict``.

    ``others`` tells of the attempts to complete the run that the answer does not show, the last ten of them.
    """
    verdict, cause, evidence = answer["verdict"], answer["cause"], answer["evidence"]
    intact = {True: "intact", False: "BROKEN", None: "not checked"}[evidence["intact"]]
    lines: list[Line] = [
        (verdict_style(verdict), f"run {printable(answer['run_id'])} {verdict.replace('_', ' ')}"),
        ("", f"cause: {printable(cause['code'])}: {printable(cause['text'])} ({_place(cause['seq'])})"),
        ("dim", f"tenant {printable(answer['tenant_id'])}" + "".join(f"; {printable(note)}" for note in notes)),
        ("", ""),
        ("head", f"decisions ({len(decisions)})"),
    ]
    for decision in decisions:
        lines += _decision(decision)
    lines += [("", ""), *_completion(answer["transaction"]), *_others(others)]
    lines += [*_contract(answer["contract"]), *_events(answer["events"])]
    first, last = evidence["first"], evidence["last"]
    place = f"evidence: journal {printable(evidence['stream'])} #{first} to #{last}, {intact}"
    lines += [("", ""), ("bad" if evidence["intact"] is False else "dim", place)]
    lines.append(("head", f"next: {printable(answer['next'])}"))
    return lines


def _place(seq: int | None) -> str:
    return "journal row unknown" if seq is None else f"journal #{seq}"


def _decision(decision: DecisionLine) -> list[Line]:
    style, word = _standing(decision)
    head = f"  #{decision.seq} {printable(decision.operation)}: {word}"
    if decision.allowed is not True or decision.degraded:
        head += f" {printable(decision.code)}: {printable(decision.reason)}"
    lines = [(style, head + _ending(decision))]
    for rule in decision.rules:
        if rule.get("determined"):
            version = f" version {printable(rule['version'])}" if rule.get("version") is not None else ""
            because = f": {printable(rule['reason'])}" if rule.get("reason") else ""
            stands = f"{printable(rule.get('mode'))} -> {printable(rule.get('outcome'))}"
            lines.append(("dim", f"      rule {printable(rule.get('id'))}{version} {stands}{because}"))
    if decision.would_have:
        code, reason = decision.would_have.get("code"), decision.would_have.get("reason")
        lines.append(("warn", f"      would have been denied: {printable(code)}: {printable(reason)}"))
    if decision.missing_inputs:
        lines.append(
            ("warn", "      missing inputs: " + ", ".join(printable(name) for name in decision.missing_inputs))
        )
    return lines


def _standing(decision: DecisionLine) -> tuple[str, str]:
    if decision.allowed is None:
        return "warn", "unknown"
    if not decision.allowed:
        return "bad", "denied"
    effect = f" ({decision.effect.replace('_', ' ')})" if decision.effect in ("bypassed", "failed_open") else ""
    failed = decision.outcome is not None and decision.outcome["success"] is False
    style = "bad" if failed else "warn" if decision.degraded or effect else ""
    return style, ("allowed, degraded" if decision.degraded else "allowed") + effect


def _ending(decision: DecisionLine) -> str:
    outcome = decision.outcome
    if outcome is None:
        return "" if decision.final else "; no outcome recorded"
    late = " late, after another process had recorded it as INTERRUPTED," if decision.late else ""
    if outcome["success"] is True:
        end = f"; succeeded{late}"
    else:
        end = f"; failed{late} {printable(outcome['error_code'])}: {printable(decision.error)}"
    return end + f" (queue {_ms(outcome['queue_ms'])}, handler {_ms(outcome['handle_ms'])})"


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} ms"


def _reached(state: str, phase: str) -> str:
    """How far a completion went; of one that was undone nothing is left, however far it had come."""
    return f", reached {phase}" if state == "COMMITTED" and phase != state else ""


def _completion(transaction: Mapping[str, Any] | None) -> list[Line]:
    if transaction is None:
        return [("head", "completion: none recorded")]
    state, phase = printable(transaction["state"]), printable(transaction["phase"])
    lines: list[Line] = [("head", f"completion {state}" + _reached(state, phase))]
    for domain in transaction["domains"]:
        error = f": {printable(domain['error'])}" if domain["error"] is not None else ""
        result = f" {printable(domain['result_id'])}" if domain["result_id"] is not None else ""
        who = f"{printable(domain['name'])} ({printable(domain['class'])})"
        lines.append(("bad" if error else "", f"  {who} {printable(domain['state'])}{result}{error}"))
    return lines


def _others(others: Sequence[str]) -> list[Line]:
    if not others:
        return []
    cut = len(others) - _OTHERS_MOST
    before = f", the last {_OTHERS_MOST} of them" if cut > 0 else ""
    return [
        ("head", f"other attempts ({len(others)}){before}"),
        *(("dim", f"  {printable(other, longest=_OTHER_LONGEST)}") for other in others[max(cut, 0) :]),
    ]


def _contract(contract: Mapping[str, Any] | None) -> list[Line]:
    if contract is None:
        return [("head", "contract: nothing was promised")]
    promises = contract["expectations"]
    unmet = [promise for promise in promises if promise["status"] != "met"]
    met = f"{len(promises) - len(unmet)} of {len(promises)} met"
    lines: list[Line] = [("head", f"contract {printable(contract['overall'])}, {met}")]
    for promise in unmet:
        style = "warn" if promise["status"] == "pending" else "bad"
        lines.append((style, f"  {printable(promise['domain'])}/{printable(promise['action'])} {promise['status']}"))
    return lines


def _events(events: Sequence[Mapping[str, Any]]) -> list[Line]:
    if not events:
        return [("head", "events: none")]
    published = sum(1 for event in events if event["published"])
    return [("head", f"events: {len(events)}, {published} published")]
