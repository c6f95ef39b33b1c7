"""The choice of SIMD level, and that no wide instruction leaks out of its level."""

import re
import shutil
import subprocess

import pytest
from conftest import SIMD_LEVELS

from ssd_ext import _C

PRINT_LEVEL = "import ssd_ext; print(ssd_ext._C.simd_level())"


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_environment_variable_forces_the_level(python, level):
    assert python("-c", PRINT_LEVEL, SSD_EXT_SIMD=level).stdout.strip() == level


def test_unknown_level_is_refused_at_import(python):
    failed = python("-c", PRINT_LEVEL, SSD_EXT_SIMD="mmx")
    assert "SSD_EXT_SIMD must be baseline, avx2 or avx512, got 'mmx'" in failed.stderr


def test_unknown_level_is_refused_at_run_time(simd):
    with pytest.raises(ValueError, match="must be baseline, avx2 or avx512, got 'sse9'"):
        simd("sse9")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif("sanitizers" in _C.build_info(), reason="sanitizers keep inline functions out of line")
@pytest.mark.skipif(SIMD_LEVELS == ["baseline"], reason="one level alone")
def test_wide_registers_stay_within_their_level():
    """A standard-library function compiled for AVX-512 and shared by the linker would crash older CPUs."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    offenders, levels_seen, function = set(), set(), ""
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
        elif wide := re.search(r"%([yz]mm)\d", line):
            level = re.search(r"::(avx512|avx2)::", function)
            if level is None or (wide[1] == "zmm" and level[1] == "avx2"):
                offenders.add(function)
            else:
                levels_seen.add(level[1])
    assert levels_seen == {"avx2", "avx512"}
    assert not offenders
