"""Errors as users read them."""

from collections.abc import Callable

import pytest

from scaling4d.records import UserError


def refused(work: Callable, *arguments: object, **options: object) -> str:
    """The message of the UserError that work raises. One line, short whatever a file holds."""
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    return message
