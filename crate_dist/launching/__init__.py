"""What every way to start a run shares: options, checks before it, ranks of this machine, memory. Imports no torch."""
