from compat.run_governance_facade import *  # noqa: F403
