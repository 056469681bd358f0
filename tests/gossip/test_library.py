"""gala_mpi.Gossip in a training loop of the user's own: what may be relied on, on 1 to 4 ranks and both libraries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Mpi, Once

import gala_mpi

PROGRAM = Path(__file__).parent / "programs" / "library.py"
COMMAND = ("-W", "error", "-m", "mpi4py", str(PROGRAM))
SCENARIOS = re.search(r"^SCENARIOS.*?= \((.*?)^\)", PROGRAM.read_text("utf-8"), re.M | re.S)


# The largest first: all ranks load then what is loaded late, and at once.
SIZES = (4, 3, 2, 1)


def output_of_all_sizes(once: Once, mpi: Mpi) -> str:
    """Of one launch, in which all scenarios run on as many of its ranks as each size says."""

    def make(folder: Path) -> None:
        done = mpi.run(max(SIZES), *COMMAND, "--sizes", *map(str, SIZES), timeout_s=280)
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / "output").write_text(done.stdout)

    return (once(f"library-{mpi.name}", make) / "output").read_text()


@pytest.mark.parametrize("size", SIZES)
def test_what_a_user_may_rely_on(mpi: Mpi, size: int, once: Once) -> None:
    assert SCENARIOS is not None
    expected = re.findall(r"\w+", SCENARIOS.group(1))
    assert len(expected) > 10
    assert re.findall(rf"^ok {size} (\w+)", output_of_all_sizes(once, mpi), re.M) == expected


@pytest.mark.parametrize("size", [1, 3])
def test_an_exception_in_the_loop_ends_the_job(mpi: Mpi, size: int) -> None:
    # Without the abort the others would go on for ever.
    done = mpi.run(size, *COMMAND, "--raise", timeout_s=120)
    assert done.returncode != 0 and "the user's own mistake" in done.stderr


def test_the_package_offers_it_without_importing_anything_before_it_is_used() -> None:
    code = (
        "import sys, gala_mpi\n"
        "assert {'Gossip', 'DivergedError', 'DisagreementError'} <= set(dir(gala_mpi)) & set(gala_mpi.__all__)\n"
        "assert not hasattr(gala_mpi, 'Gossips')\n"
        "assert not {'mpi4py', 'torch', 'numpy'} & set(sys.modules)\n"
        "import mpi4py\n"
        "mpi4py.rc.initialize = False\n"
        "from gala_mpi import DisagreementError, DivergedError, Gossip\n"
        "import gala_mpi.gossip.gossip\n"
        "assert Gossip is gala_mpi.gossip.gossip.Gossip and issubclass(DisagreementError, ValueError)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gossips'"):
        gala_mpi.Gossips  # noqa: B018
