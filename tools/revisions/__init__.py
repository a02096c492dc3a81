"""Compares two revisions of the library on one machine.

    python -m tools.revisions.bits BASE [REVISION]
    python -m tools.revisions.speed BASE [REVISION]

`bits` checks that both give bit-identical results. `speed` checks that REVISION is as fast as BASE.
BASE and REVISION are git revisions; REVISION defaults to the working tree. The exit code is 0 if no
difference is found. Builds are cached in build/revisions. For each revision, `bits` runs `digest`
and `speed` runs `repeat`, which use only the public interface of the library.
"""
