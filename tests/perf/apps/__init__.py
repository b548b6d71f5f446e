"""One application for each server of the rig; all of them answer the same paths with the same bodies."""
