"""The former place of :mod:`fedkd.losses.divergences`, until 1.0."""

import warnings

from fedkd.losses.divergences import *  # noqa: F403

warnings.warn("fedkd.divergences is fedkd.losses now, and goes with version 1.0", DeprecationWarning, stacklevel=2)
