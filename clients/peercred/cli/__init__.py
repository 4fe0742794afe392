"""The command line of peercred."""
