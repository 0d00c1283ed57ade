"""Errors that a user can mend. Each message names the value, the limit and what to do."""


class HprError(ValueError):
    """The base class: bad input of any kind. The command line prints the message and exits with code 2."""


class BudgetError(HprError):
    """A budget that cannot be read, or that no plan can meet."""


class PlanError(HprError):
    """A plan that contradicts itself or does not fit its model."""


class DataError(HprError):
    """Data that cannot be read, or that the model cannot take."""


class CheckpointError(HprError):
    """A folder or file that is not what it should be, or that must not be written."""
