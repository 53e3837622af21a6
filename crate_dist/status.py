"""Exit statuses by which a launcher knows what to do next. Imports nothing.

srun's own status is the highest of its tasks'. So a rank that needs a person outranks those that ended because of it:
they have lost it (TRY_AGAIN), or were killed by a signal (128 and its number).
"""

TRY_AGAIN = 75
"""EX_TEMPFAIL: the run is not complete, and nobody need do anything but start it again."""
NEEDS_A_PERSON = 200
"""Started again, it would fail again."""
