"""Live comparison of draft versions: windows in random order, and when enough is known to stop."""
