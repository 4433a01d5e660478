"""Pickles that would run something."""

from collections.abc import Callable


class Payload:
    """A pickle of this calls the function when it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call
