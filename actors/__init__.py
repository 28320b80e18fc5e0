"""The three deciders: the registry says whether and runs, the coordinator completes, the audit actor remembers."""
