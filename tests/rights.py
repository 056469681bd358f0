"""Programs without the rights that let root read and write anywhere: `[*without_rights(), sys.executable, ...]`."""

from __future__ import annotations

import os
import shutil

import pytest


def without_rights() -> list[str]:
    """What stands before a command, so that permissions hold for it. Skips the test where root cannot drop its rights.

    Nothing for who is not root.
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root can read and write anywhere, and there is no setpriv here (package util-linux)")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
