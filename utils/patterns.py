"""Regular expressions that users write: checked, and stopped when they take too long."""

import regex  # type: ignore[import-untyped]

from utils.errors import ConfigError

PATIENCE = 1.0  # seconds for one name; patterns such as (a+)+$ take exponential time


def check_pattern(pattern: str, key: str) -> None:
    """Raise `ConfigError` if the value of `key` is not a regular expression."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"{key}: must be a regular expression, got '{pattern}' ({error})") from None


def matches(pattern: str, name: str, key: str) -> bool:
    """True if the pattern is found in the name.

    Args:
        pattern: regular expression.
        name: dotted name of a parameter.
        key: dotted path of the pattern in the config, for error messages.

    Raises:
        ConfigError: the search takes longer than a second.
    """
    try:
        return regex.search(pattern, name, timeout=PATIENCE) is not None
    except TimeoutError:
        raise ConfigError(
            f"{key}: must be a regular expression that is quick to search, got '{pattern}', which takes longer than "
            f"{PATIENCE:.0f} s on '{name}'; avoid nested repetitions such as (a+)+"
        ) from None
