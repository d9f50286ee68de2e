"""The one exception for a user's mistake."""


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
