"""The commands of `python -m namernn_fast.names`, one module each.

Each module has `add_parser(commands)`, which adds the command with its options, and
`run(arguments)`, which runs the command.
"""
