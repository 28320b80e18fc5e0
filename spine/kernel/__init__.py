"""The actor kernel: envelopes, mailboxes, actors, the router and the supervisor; it knows nothing of governance."""
