"""The rig: runs kore and its peers side by side under load and prints how they compare, as ratios within one run.

`make bench`, or `python -m tests.perf --help`. It is no part of the tests: timing is measured, never asserted.
"""
