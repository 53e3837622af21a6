"""One run: its folder, its one writer, the statuses that it ends with, and which faults may pass. Imports no torch."""
