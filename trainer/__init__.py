"""The draft trainer: a separate process that learns from what a running server computes."""
