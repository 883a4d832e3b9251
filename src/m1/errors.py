"""The one exception for what a user can put right. The command line prints it in one line and exits with code 2."""


class UserError(ValueError):
    """Bad input: the message names the value and says what to do about it."""
