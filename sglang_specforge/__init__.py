"""A serving engine that improves its own speculative decoding while it serves."""
