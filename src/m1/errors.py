"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """Raised for input that the user can fix: an option, a file or a setting.

    The message is one line: the value, what is wrong with it, and how to fix it. The command line prints the message
    and exits with code 2. A subclass of ValueError.
    """
