"""The engines that wait for readiness and then make the system call themselves: one driver, and a poller a platform.

`driver` is neutral; `epoll` is the small file that knows Linux. Where io_uring is forbidden the same server runs here.
"""
