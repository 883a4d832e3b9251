"""The exception for errors that the user can fix, and the warning for what the user should know."""


class UserError(ValueError):
    """Raised for input that the user can fix: an option, a file or a setting.

    The message is one line: the value, what is wrong with it, and how to fix it. The command line prints the message
    and exits with code 2. A subclass of ValueError.
    """


class M1Warning(UserWarning):
    """Given where a request can't be followed to the letter. The command line prints the message as one line."""


def is_panic(error: BaseException) -> bool:
    """Whether Rust code, such as that of tokenizers, panicked. Its exception is no Exception."""
    return type(error).__name__ == "PanicException"
