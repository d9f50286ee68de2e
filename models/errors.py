"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake of the user, told in one line that says what is wrong and what to do about it."""
