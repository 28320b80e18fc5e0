"""The revisions, one for each schema version."""
