"""The command line: thin commands, one file each, flags made from the recipe's settings."""
