from compat.transaction_coordinator import *  # noqa: F403
