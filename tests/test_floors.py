"""Files of the native core use only what is included before them."""

import re
from pathlib import Path

import pytest

PYX = Path(__file__).parent.parent / "pyx"
FILES = re.findall(r'^include "(.+)"', (PYX / "_native.pyx").read_text(), re.M)

# What a file defines: functions, structs and enumerations, types of functions, values.
DEFINITIONS = (
    r"^cdef (?:inline )?(?:const )?[\w*]+(?: [\w*]+)* \*?(\w+)(?: \"\w+\")?\(",
    r"^(?:cdef|ctypedef) (?:struct|enum) (\w+)",
    r"^ctypedef .*\(\*(\w+)\)",
)


def code(name):
    """Returns a file without docstrings and comments; first also without the members of structs
    and what C declares."""
    text = re.sub(r'""".*?"""', "", (PYX / name).read_text(), flags=re.S)
    text = re.sub(r"#.*", "", text)
    members = r"^c(?:type)?def (?:struct|extern)[^\n]*:\n(?:    .*\n|\n)+"
    return re.sub(members, "", text, flags=re.M), text


def defined(name):
    text = code(name)[1]
    enums = re.findall(r"^cdef enum[^\n]*:\n((?:    .*\n|\n)+)", text, re.M)
    values = {value for enum in enums for value in re.findall(r"^    (\w+)", enum, re.M)}
    return values.union(*(re.findall(pattern, text, re.M) for pattern in DEFINITIONS))


def test_definitions_are_found():
    assert {"round_up", "ALIGN"} <= defined("sizes.pxi")
    assert {"Quantize", "quantize", "COMPUTED"} <= defined("quantize.pxi")
    assert {"sum_fn", "Gemm", "gemm_run"} <= defined("gemm.pxi")


@pytest.mark.parametrize("name", FILES)
def test_uses_what_comes_before(name):
    later = {}
    for other in FILES[FILES.index(name) + 1 :]:
        later |= dict.fromkeys(defined(other), other)
    known = {found for other in FILES[: FILES.index(name) + 1] for found in defined(other)}
    used = set(re.findall(r"(?<![.\w])(\w+)", code(name)[0])) - known
    assert not {found: later[found] for found in used & set(later)}
