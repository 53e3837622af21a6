"""Exit statuses by which a launcher knows what to do next. Imports nothing.

srun's own status is the highest of its tasks'. So a rank that needs a person outranks those that ended because of it:
they have lost it (TRY_AGAIN), or were killed by a signal (128 and its number).
"""

TRY_AGAIN = 75
"""EX_TEMPFAIL: a fault that may pass ended the run before it was complete; it goes on when it is started again."""
STOPPED = 76
"""The run was told to stop, has saved, and goes on when it is started again. Nothing has failed."""
LEAVE_NODE = 77
"""This node is unfit, and another one would do: the run goes on there. Above STOPPED: the ranks of other nodes are told
to stop meanwhile."""
NEEDS_A_PERSON = 200
"""Started again, it would fail again."""
LOST_THE_RUN = 201
"""The run folder belongs to another job now. Never started again: the other one goes on with the run."""
