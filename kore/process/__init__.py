"""The processes of a server: the parent that owns listeners, logs and workers, and what a worker does with its life."""
