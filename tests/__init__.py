"""The tests, importable so that bench shares their cases."""
