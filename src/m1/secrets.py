"""Keeps secrets out of what is printed, logged or stored as settings: `redact` removes them."""

import os
import re
from typing import Any

from m1.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
HIDDEN = "***"
SECRET_NAME = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
SECRET_SETTING = re.compile(r"(?:hub_token|api_key|password|secret)$", re.IGNORECASE)  # not pad_token
SHORTEST = 8  # minimum characters of a secret in the environment: shorter values are words and numbers
USERINFO = re.compile(r"(?<=://)[^/?#@\s\"']+(?=@)")
QUERY_SECRET = re.compile(
    r"([?&][\w.-]*(?:key|token|secret|password|passwd|signature|sig|auth|credential)[\w.-]*=)[^&#\s\"'\\]+",
    re.IGNORECASE,
)
BEARER = re.compile(r"(\bBearer\s+)[^\s\"'\\]+", re.IGNORECASE)


def api_key() -> str | None:
    """Returns the key in $OPENAI_API_KEY without spaces around it; None if there is none.

    Raises:
        UserError: the key has a character that an HTTP header can't hold. The message doesn't quote the key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    for position, character in enumerate(key, start=1):
        if not "!" <= character <= "~":
            raise UserError(f"${KEY_VARIABLE}: its character {position} can't be part of a key: set it again")
    return key or None


def redact(text: str) -> str:
    """Removes secrets from a text.

    Secrets are the values of environment variables with a name such as API_KEY or TOKEN, userinfo and secret parameters
    in URLs, and bearer tokens.
    """
    for name, value in os.environ.items():
        value = value.strip()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    text = BEARER.sub(rf"\1{HIDDEN}", QUERY_SECRET.sub(rf"\1{HIDDEN}", text))
    return USERINFO.sub(HIDDEN, text)


def redact_settings(value: Any) -> Any:
    """Removes secrets from JSON: from all texts, and whatever stands under a name such as hub_token or api_key."""
    if isinstance(value, dict):
        hidden = {key for key, inner in value.items() if isinstance(inner, str) and SECRET_SETTING.search(key)}
        return {key: HIDDEN if key in hidden else redact_settings(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact_settings(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value
