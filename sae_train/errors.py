"""The one exception for mistakes a user can mend; the command line prints it as a sentence and exits with 2."""


class UserError(Exception):
    """Say in one sentence what was wrong, what is allowed, and how to mend it."""
