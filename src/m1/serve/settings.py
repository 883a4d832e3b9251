"""The options of `m1 serve`."""

import ipaddress
from dataclasses import dataclass

from m1.errors import UserError
from m1.options import check_range, option
from m1.sampling_options import LoadOptions

KEY_VARIABLE = "M1_API_KEY"
MOST_SECONDS = 86_400.0


@dataclass(frozen=True, kw_only=True)
class ServeOptions(LoadOptions):
    """How `m1 serve` listens, whom it lets in, and how much it takes on.

    Raises:
        UserError: a value out of range, or an address that others can reach without a key.
    """

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 for a free one.")
    api_key: list[str] = option([], "A key that clients may use. Repeatable. Default: $M1_API_KEY, if set.")
    no_key: bool = option(False, "Let everyone in who reaches the address, also beyond this machine.")
    served_model_name: list[str] = option([], "Names of the models, in their order. Default: as they were given.")
    max_num_seqs: int = option(64, "Maximum number of samples decoded in parallel, per model.")
    max_model_len: int | None = option(
        None, "Maximum tokens of a prompt with its sample. Default: the model's, up to 8192."
    )
    max_waiting: int = option(256, "Maximum number of samples that wait for a slot; a request beyond gets status 429.")
    max_n: int = option(256, "Maximum number of samples per request, and per vote.")
    max_body: int = option(4 * 2**20, "Maximum bytes of a request's body.")
    timeout: float = option(600.0, "Maximum seconds per request; unfinished samples are dropped.")
    drain: float = option(30.0, "Seconds to finish open requests after SIGTERM or Ctrl-C.")
    cors_origin: list[str] = option([], "Web origin whose pages may call the server, or *. Repeatable.")

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_waiting", "max_n", "max_body"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("timeout", "drain"):
            if not 0 < getattr(self, name) <= MOST_SECONDS:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0, and {MOST_SECONDS:g} at most")
        check_range("port", self.port, 0, 65535)

    def check_access(self, keys: list[str]) -> None:
        """Raises UserError if others than this machine could use the server without a key."""
        if not keys and not self.no_key and not is_loopback(self.host):
            raise UserError(
                f"host={self.host} is reachable from other machines: give --api-key (or $M1_API_KEY), or --no-key to "
                "let everyone in"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
