"""io_uring through liburing: the structures, the ring, the buffers, the probe, and the driver on top of them."""
