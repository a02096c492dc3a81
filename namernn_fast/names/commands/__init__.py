"""The commands of `python -m namernn_fast.names`, one module each.

Each has `add_parser(commands)`, which adds its options, and `run(arguments)`, which does the work.
"""
