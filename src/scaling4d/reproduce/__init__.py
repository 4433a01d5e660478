"""RELEASED FILES -> A PUBLISHED NUMBER: targets with expected value, tolerance, source, downloads; a command each."""
