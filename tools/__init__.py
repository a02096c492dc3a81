"""Programs for developers, which are not in the wheel."""
