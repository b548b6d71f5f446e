"""What a process of the server gives up before it serves: each layer is a file, and confinement.py has their order."""
