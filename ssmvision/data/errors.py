"""The one error class for what a user can repair."""


class UserError(ValueError):
    """A failure that the user can repair: its text is one clear message, and tools print it without a traceback."""


class DataError(UserError):
    """The images on disk are not what training, validation or prediction needs."""
