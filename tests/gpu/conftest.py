"""Lets the GPU tests import the module of the table of resources."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
