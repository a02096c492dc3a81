"""Plants a change of one last place in the C++ of a copied tree, which `bits` has to notice."""

import re
import struct
from pathlib import Path

# The polynomial of tanh in float: everything up to its list of coefficients, then the list.
POLYNOMIAL = re.compile(
    r"(struct\s+Tanh<float>\s*\{(?:(?!struct).)*?\bc\[\]\s*=\s*\{)([^}]*)\}", re.DOTALL
)


class PlantError(RuntimeError):
    """The place for a planted change was not found."""


def next_float(value: float) -> float:
    """Returns the float32 that follows a positive number rounded to float32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", bits + 1))[0]


def plant_in(source: str) -> tuple[str, str] | None:
    """Changes the second coefficient of the polynomial of tanh in float32 by one last place.

    Args:
        source: the text of a C++ file.

    Returns:
        The changed text and a sentence about the change, or None if the file has no such
        polynomial.
    """
    found = POLYNOMIAL.search(source)
    if found is None:
        return None
    terms = [term.strip() for term in found[2].split(",")]
    before = terms[1]
    terms[1] = f"{next_float(float(before.rstrip('fF'))).hex()}f"
    changed = source[: found.start(2)] + ", ".join(terms) + source[found.end(2) :]
    return changed, f"tanh's coefficient {before} becomes {terms[1]}, one last place more"


def plant(sources: Path) -> str:
    """Plants the change in the one file below a folder that has the polynomial.

    Args:
        sources: the folder csrc of a copied tree.

    Returns:
        A sentence about the change.

    Raises:
        PlantError: no file, or more than one, has the polynomial.
    """
    files = [path for path in sorted(sources.rglob("*")) if path.suffix in (".h", ".cpp")]
    planted = {path: change for path in files if (change := plant_in(path.read_text()))}
    if len(planted) != 1:
        raise PlantError(f"{len(planted)} files below {sources} have the polynomial of tanh")
    ((path, (changed, sentence)),) = planted.items()
    path.write_text(changed)
    return f"Planted in {path.relative_to(sources.parent)}: {sentence}."
