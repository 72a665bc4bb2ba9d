"""This module defines the base class of the errors that a command reports in one line."""

from typing import ClassVar


class ReportedError(Exception):
    """An error whose text is complete for a user: what happened, with the value, and what to do next."""

    exit_status: ClassVar[int] = 1
    """Exit status of a command that ends with this error."""
