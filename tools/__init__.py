"""Command lines, installed as `ssmvision_tools`: each parses its arguments and calls the engine."""
