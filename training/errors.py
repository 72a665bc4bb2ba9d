"""This module defines the base class of the errors that a command reports in one line."""

WRONG_USAGE = 2
"""Exit status for a command that cannot be understood."""


class ReportedError(Exception):
    """An error whose text is complete for a user: what happened, with the value, and what to do next."""

    exit_status: int = 1
    """Exit status of a command that ends with this error."""


class UsageError(ReportedError):
    """A command has options that do not fit together."""

    exit_status = WRONG_USAGE
