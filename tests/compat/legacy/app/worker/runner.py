# ruff: noqa: TID252  a worker of the old kind imports its own package relatively
"""A worker as it was before: synchronous, in its own threads, knowing only its services package.

python -m app.worker.runner RUNS.jsonl TOLD.jsonl [THREADS]: completes each run, writes one JSON object a run.
"""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from ..services.governance.run_governance_facade import get_run_governance_facade
from ..services.governance.transaction_coordinator import (
    TRANSACTION_COORDINATOR_ENABLED,
    TransactionFailed,
    get_transaction_coordinator,
)

logger = logging.getLogger("app.worker.runner")


class RunRunner:
    """Ends one run: governance records, then lessons."""

    def __init__(self, run):
        self.run = run

    def finish(self):
        told = {"run_id": self.run["run_id"], "lesson_id": self._lesson()}
        if TRANSACTION_COORDINATOR_ENABLED:
            told.update(self._records_atomic())
        else:
            told.update(self._records_one_by_one())
        return told

    def _records_atomic(self):
        try:
            result = get_transaction_coordinator().execute(
                run_id=self.run["run_id"],
                tenant_id=self.run["tenant_id"],
                run_status=self.run["run_status"],
                agent_id=self.run.get("agent_id"),
                error_code=self.run.get("error_code"),
                error_message=self.run.get("error_message"),
                trace_id=self.run.get("trace_id"),
                is_synthetic=self.run.get("is_synthetic", False),
                synthetic_scenario_id=self.run.get("synthetic_scenario_id"),
            )
        except TransactionFailed as error:
            logger.warning("run %s not completed: %s", self.run["run_id"], error)
            return {"failed": error.phase.value}
        return {
            "phase": result.phase.value,
            "complete": result.is_complete and result.all_domains_succeeded,
            "incident_id": result.incident_result.result_id,
            "policy_id": result.policy_result.result_id,
        }

    def _records_one_by_one(self):
        policy_id = get_run_governance_facade().create_policy_evaluation(
            run_id=self.run["run_id"], tenant_id=self.run["tenant_id"], run_status=self.run["run_status"]
        )
        return {"policy_id": policy_id}

    def _lesson(self):
        utilization = self.run.get("utilization", 0.0)
        facade = get_run_governance_facade()
        source = uuid5(NAMESPACE_URL, self.run["run_id"])
        if 85.0 <= utilization < 100.0:
            lesson_id = facade.emit_near_threshold_lesson(
                tenant_id=self.run["tenant_id"],
                metric="budget",
                utilization=utilization,
                threshold_value=100.0,
                current_value=utilization,
                source_event_id=source,
                window="24h",
            )
        elif 0.0 < utilization < 30.0:
            lesson_id = facade.emit_critical_success_lesson(
                tenant_id=self.run["tenant_id"],
                success_type="cost_efficiency",
                metrics={"utilization": utilization},
                source_event_id=source,
            )
        else:
            return None
        return str(lesson_id) if lesson_id else None


def main():
    runs = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    threads = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    with ThreadPoolExecutor(threads) as pool, Path(sys.argv[2]).open("w", encoding="utf-8") as told:
        told.writelines(json.dumps(answer) + "\n" for answer in pool.map(lambda run: RunRunner(run).finish(), runs))


if __name__ == "__main__":
    main()
