"""The callbacks, one public class a file; all work in any Lightning project."""
