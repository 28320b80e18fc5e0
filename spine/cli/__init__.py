"""The command ``spine``: what the journal tells, from the database alone, and the operator's switches."""
