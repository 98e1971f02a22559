"""A command that ends with the one that started it, however that ends.

The starter holds one end of a pipe and hands the other one down. Nothing is ever written to it: when the starter ends,
also by SIGKILL, the kernel closes its end, and the command kills itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

_VARIABLE = "LOGIT_CACHE_LIFELINE"


class Lifeline:
    """The starter's side; closing it ends the commands that are still running."""

    def __init__(self) -> None:
        self.descriptor, self._ours = os.pipe()

    def variables(self) -> Mapping[str, str]:
        """For the environment of a command, which has to inherit `descriptor`."""
        return {_VARIABLE: str(self.descriptor)}

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._ours)


def end_with_the_starter() -> bool:
    """Watch the lifeline that this command was given, if any, which is returned. Processes of its own are not given it.

    A command with one leaves it to its starter to say that Ctrl-C, which reaches both, has ended them.
    """
    descriptor = os.environ.pop(_VARIABLE, None)
    if descriptor is not None:

        def wait() -> None:
            os.read(int(descriptor), 1)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=wait, name="lifeline", daemon=True).start()
    return descriptor is not None
