"""What is written and drawn from results, and the table of capabilities."""
