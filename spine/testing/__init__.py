"""For tests of a user's own domains: the participant contract as a check to run.

``await check_domain(domain)`` in an asynchronous test, ``asyncio.run(check_domain(domain))`` in any other.
"""

from __future__ import annotations

from spine.testing.check import check_domain
from spine.testing.report import ContractViolated, Finding, Report

__all__ = ["ContractViolated", "Finding", "Report", "check_domain"]
