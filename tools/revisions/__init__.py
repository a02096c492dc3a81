"""Compares two revisions of the library on one machine, bit for bit and in speed.

`python -m tools.revisions bits BASE` says whether both revisions compute the same bits, and
`python -m tools.revisions speed BASE` says whether the newer revision is as fast. This package
imports nothing from the rest of `benchmarks`, because its programs drive revisions that have
another `benchmarks` folder or none.
"""
