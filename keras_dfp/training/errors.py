"""What can be wrong through no fault of the program, said so that the user can act."""


class TrainingError(ValueError):
    """The message says what is wrong, and what would be right."""


class DataError(TrainingError):
    """It is the data."""


class RunError(TrainingError):
    """It is the run: its settings, its folder or its checkpoint."""
