"""The DataModules and their loader."""
