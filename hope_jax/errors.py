"""One class for mistakes of the caller, and the closest-name hint its messages use."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What came, what was expected, what to do. The command line prints it as one sentence and exits with 2."""


def closest(name: str, names: Iterable[str]) -> str:
    """A hint such as ``did you mean 'hope-tiny'?``, or the list of known names when none is close."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known names: " + ", ".join(known)
