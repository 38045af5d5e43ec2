"""What every room may use: errors, units, records, output files."""
