"""The Hub's client, kept in its place: a checked environment, a quiet screen, and its failures in our own words.

The client's texts quote addresses and headers, which may hold secrets, so none of them is passed on; neither is its
exception, which `--debug` would print. Nothing here is imported from the client before it is needed.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lora_cli.errors import DiskFullError, HubError, LoraCliError, UsageError, WriteError

_ENDPOINT = re.compile(
    r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?(?:/[\w./~-]*)?", re.ASCII | re.IGNORECASE
)


def check_environment() -> None:
    """Refuse settings that break the client, or that would send its token to something that is no plain address.

    Raises:
        UsageError: HF_ENDPOINT or one of the client's timeouts is not what it should be.
    """
    try:
        from huggingface_hub import constants

        usable = _ENDPOINT.fullmatch(constants.ENDPOINT)
    except ValueError:  # on import the client takes numbers and addresses from the environment
        usable = None
    if not usable:  # the value is not shown: what makes it unusable may be a password in it
        raise UsageError(
            "An environment variable of the Hub's client has a value that cannot be used",
            expected="HF_ENDPOINT=https://HOST without user name, password or query; HF_HUB_*_TIMEOUT in whole seconds",
            hint="unset HF_ENDPOINT, or correct it; to log in, run `hf auth login`",
        )


def is_model_id(text: str) -> bool:
    """Whether the Hub could have a repository of this name, by the client's own rules.

    Raises:
        UsageError: The environment is not fit for the client.
    """
    check_environment()
    from huggingface_hub.utils._validators import validate_repo_id

    with suppress(ValueError):
        validate_repo_id(text)
        return text.isascii()  # older clients let other letters through
    return False


@contextmanager
def client_calls(name: str, repo: str, *, bars: bool = False, warnings: bool = True) -> Iterator[None]:
    """Around calls of the client: what it shows is chosen here, and what it raises becomes a `LoraCliError`.

    Args:
        name: What messages call the thing wanted.
        repo: The id of its repository.
        bars: Whether the client shows its progress bars, if it would.
        warnings: Whether it shows warnings, such as how long it waits before it tries again.
    """
    try:
        with _manners(bars=bars, warnings=warnings):
            yield
    except LoraCliError:
        raise
    except Exception as error:  # noqa: BLE001 (three HTTP libraries over its releases, and Rust code, raise through it)
        raise _translated(error, name, repo) from None


@contextmanager
def _manners(*, bars: bool, warnings: bool) -> Iterator[None]:
    """Set what the client shows, without secrets; on leaving, it is as it was before."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, progress_bar_states

    def discreet(record: logging.LogRecord) -> bool:
        # The part after the question mark signs an address. A server's own words may hold control characters.
        text = re.sub(r"\?\S+", "?…", record.getMessage())
        record.msg, record.args = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text), None
        return warnings or record.levelno >= logging.ERROR

    before, handlers = dict(progress_bar_states), list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:
        handler.addFilter(discreet)
    if not bars and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # what the environment says is not overruled
        disable_progress_bars()
    try:
        yield
    finally:
        progress_bar_states.clear()
        progress_bar_states.update(before)
        for handler in handlers:
            handler.removeFilter(discreet)


def _translated(error: Exception, name: str, repo: str) -> LoraCliError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    while isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache either" hides why it could not be fetched
    local = _of_the_disk(error)
    if local is not None:
        return local
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{constants.ENDPOINT}/{repo}"
    cases = (
        (
            isinstance(error, hub.GatedRepoError),
            f"{name} is gated",
            f"accept its terms at {page}, then run `hf auth login`",
        ),
        (
            isinstance(error, hub.RepositoryNotFoundError),
            f"{name} is not on the Hub, or is private",
            "check the name and that no local path was meant; for a private one run `hf auth login`",
        ),
        (
            isinstance(error, hub.RevisionNotFoundError),
            f"{name} does not exist: the repository has no such branch, tag or commit",
            f"see {page}/tree/main for its branches and tags",
        ),
        (
            isinstance(error, hub.EntryNotFoundError),
            f"{name} lacks a file that it lists",
            "run again; if that does not help, tell its owner",
        ),
        (isinstance(error, UnicodeError), "The token cannot be sent", "run `hf auth login`, or correct HF_TOKEN"),
        (status == 401, "The Hub does not accept the token", "run `hf auth login`, or correct HF_TOKEN"),
        (status == 403, f"The token may not read {name}", f"look at {page} and at the rights of the token"),
        (
            status == 429,
            "The Hub asks to come back later: too many requests",
            "wait some minutes; after `hf auth login` more are allowed",
        ),
        (status is not None, f"The Hub answered with an error (HTTP {status})", "try again later"),
        (
            _is_of_tls(error),
            "The Hub cannot be reached safely: TLS fails",
            "behind a proxy with a certificate of its own, set SSL_CERT_FILE to that; else check HTTPS_PROXY",
        ),
        (
            True,
            f"The Hub cannot be reached, or did not answer as a Hub does ({type(error).__name__})",
            "check the network, HTTPS_PROXY and HF_ENDPOINT; with HF_HUB_OFFLINE=1 only the cache is used",
        ),
    )
    message, hint = next((message, hint) for applies, message, hint in cases if applies)
    return HubError(message, file=name, hint=hint)


def _is_of_tls(error: BaseException | None) -> bool:
    import ssl

    for _ in range(16):  # the HTTP libraries wrap it in errors of their own
        if error is None or isinstance(error, ssl.SSLError):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, ssl.SSLError)


def _of_the_disk(error: Exception) -> LoraCliError | None:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
        return DiskFullError("No space is left in the Hub's cache", hint="free some, or set HF_HOME to another disk")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WriteError("The Hub's cache cannot be written", hint="set HF_HOME to a folder that you may write to")
    return None
