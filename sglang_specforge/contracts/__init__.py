"""What crosses processes: messages and their layout on the wire."""
