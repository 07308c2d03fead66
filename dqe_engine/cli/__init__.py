"""Command lines. Importing a command's module is cheap: the engine is imported when it runs, not for `--help`."""
