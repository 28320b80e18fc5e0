"""The pure model: decisions, operations, transactions, the audit contract; nothing here waits or writes."""
