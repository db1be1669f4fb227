"""Lets the tests here import decoding.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
