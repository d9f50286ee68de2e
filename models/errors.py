"""The one exception for a user's mistake."""

from importlib.util import find_spec


class UserError(ValueError):
    """A mistake of the user, told in one line that says what is wrong and what to do about it."""


class NoWeightsError(UserError):
    """Published weights that cannot be had.

    Attributes:
        problem: what is wrong, without what to do: a caller with flags knows other ways out than one in Python.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}; give checkpoint_path=FILE for weights you have, or pretrained=False for random ones"
        )
        self.problem = problem


def require(*names: str) -> None:
    """Raise a UserError that names what is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; pip install -r requirements.txt")
