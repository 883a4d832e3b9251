"""Text of users, models and servers is only text: no secrets, terminal commands or halves of characters."""

import logging
import re
from contextlib import suppress
from typing import Any

from m1.errors import UserError
from m1.secrets import redact

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and newline
NAME = re.compile(r"[^\W_][\w.-]*")  # a plain file name, and a label that matplotlib shows as it is


def clean(text: str) -> str:
    """The text without secrets and without control characters, which could rewrite the terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", redact(text))


def encodable(text: str) -> bool:
    """Whether a text can be written to a file: whether it has no lone surrogates, which are halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_name(name: str, where: str) -> None:
    """Raises UserError for a name of a model or stage that isn't a NAME. The message begins with `where`."""
    if not NAME.fullmatch(name):
        raise UserError(f"{where} {name!r}: a name begins with a letter or digit and has only these and . - _")


def clean_logs() -> None:
    """Cleans all log records, including those of libraries."""
    logging.setLogRecordFactory(_clean_record)


def _clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    with suppress(Exception):  # arguments that don't fit the message, which logging itself reports
        record.msg, record.args = clean(record.getMessage()), None
        if record.exc_info:
            record.exc_text = clean(logging.Formatter().formatException(record.exc_info))
    return record
