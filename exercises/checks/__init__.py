"""What each check has in common: how it says that an exercise is wrong.

`check_NNx.py` holds `check(exercise)`, which gets the imported exercise and raises `Wrong`. It is
deterministic, asks no server, and takes less than five seconds. A comment in it names a plausible
wrong solution that it refuses; tests/exercises/wrong_NNx.py holds that one, and the tests try it.
"""


def shown(what: object) -> str:
    return what if isinstance(what, str) else repr(what)


class Wrong(Exception):
    """An exercise does not do what it should. Text is shown as it is, all else by its repr."""

    def __init__(self, call: object, expected: object, actual: object) -> None:
        super().__init__(
            f"call:      {shown(call)}\nexpected:  {shown(expected)}\nactual:    {shown(actual)}"
        )
