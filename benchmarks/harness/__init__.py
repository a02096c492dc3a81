"""What every benchmark shares: grid, workload, gate, race, machine, tables, pages."""
