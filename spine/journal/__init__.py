"""The journal: the append-only, hash-chained, durable record, and everything that is derived from it."""
