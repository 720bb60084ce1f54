"""What was done, as data, tables and plots."""
