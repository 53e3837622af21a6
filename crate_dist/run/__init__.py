"""One run: its folder and record, its one writer, its exit statuses, and which faults may pass. Imports no torch."""
