"""The numbers: each figure of this library beside a peer's, measured in one run on one machine."""
