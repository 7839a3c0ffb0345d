"""Conversations into token ids and loss masks: what ``sglang-specforge prepare-data`` does."""
