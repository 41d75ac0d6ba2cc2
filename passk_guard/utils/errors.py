"""The two errors of a guard: the user's mistake, and a refresh without an estimate."""


class GuardError(ValueError):
    """Misuse, raised at construction or at train begin with what to pass instead."""


class FailedRefresh(Exception):
    """A refresh that gave no estimate. It is logged with its reason, and training goes on."""
