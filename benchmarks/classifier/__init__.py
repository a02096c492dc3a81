"""The names classifier at full speed: programs that train and use it, against each other."""
