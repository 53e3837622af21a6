"""The one kind of error that programs show without a traceback."""


class UserError(Exception):
    """An error that tells who started the program what is wrong and what would do; a traceback would add nothing."""
