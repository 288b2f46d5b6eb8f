"""The command line: each command module declares its arguments and calls the package that does the work."""
