"""The error that a user can mend."""


class UsageError(Exception):
    """Bad input: the message names the argument, what was expected and what came. The command exits with code 2."""
