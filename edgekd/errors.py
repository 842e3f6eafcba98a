"""Errors a user can mend: each says what is wrong, where, and what to do. The CLI prints them and exits with 2."""


class EdgekdError(Exception):
    """One clear sentence for the user, with an optional remedy.

    Args:
        cause: what is wrong and where (file and key).
        remedy: what to do about it.
    """

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{cause} {remedy}".strip())


class SpecError(EdgekdError):
    """The spec, or a file it names, is wrong."""


class MissingExtra(EdgekdError):
    """An optional runtime is not installed.

    Args:
        package: the distribution that is missing.
        extra: the extra of edgekd that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed.", f'Run: pip install "edgekd[{extra}]"')


class Unsupported(EdgekdError):
    """A target cannot hold this model; raised before anything is loaded."""


class DoesNotFit(EdgekdError):
    """The work needs more memory or disk than the machine has; raised before the work."""


class BadArtifact(EdgekdError):
    """A folder is not a valid artifact: no manifest, a changed file, a path that leaves the folder."""


class GateFailed(EdgekdError):
    """A measured figure missed its threshold: what, where, by how much."""

    exit_code = 1
