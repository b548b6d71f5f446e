"""The sandbox: rights that a process gives away, once, in order, before the application's code serves anybody."""
