"""Compares two revisions of the library on one machine, bit for bit and in speed.

`python -m benchmarks.revisions bits BASE` says whether both revisions compute the same bits, and
`python -m benchmarks.revisions speed BASE` says whether the newer revision is as fast. This package
imports nothing from the rest of `benchmarks`, because its programs drive revisions that have
another `benchmarks` folder or none.
"""
