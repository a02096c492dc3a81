"""Compares two revisions of the library on one machine.

    python -m tools.revisions.bits BASE [REVISION]
    python -m tools.revisions.speed BASE [REVISION]

`bits` says whether both compute the same bits, `speed` whether REVISION is as fast. Both are what
git names so; without REVISION it is the working tree as it stands. The exit code is 0 if all is
well. Each builds the revisions in build/revisions, or finds them there. `digest` and `stopwatch`
are what they run for each revision; these two use only the public interface of the library.
"""
