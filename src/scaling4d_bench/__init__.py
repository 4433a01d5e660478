"""SPEED AND MEMORY beside other libraries: the same work, in turns, in one run.

Only scaling4d's command line imports this package. The arguments of each `bench` are its command's options, see cli.
"""
