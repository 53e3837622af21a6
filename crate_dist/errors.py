"""The one kind of error that programs show without a traceback."""


class UserError(Exception):
    """Says what is wrong, and what would do, to the person who started the program; a traceback would add nothing."""
