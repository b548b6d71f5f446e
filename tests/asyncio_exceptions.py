"""What of CPython's asyncio tests is not run with kore's loop, and what fails with it, each with its reason.

Names are those of 3.11 to 3.13; what a version does not have is not missed. A test that is named here and passes all
the same is an error too, so the list cannot grow old.
"""

from __future__ import annotations

MODULES = (
    "test_base_events",
    "test_buffered_proto",
    "test_context",
    "test_eager_task_factory",
    "test_events",
    "test_free_threading",
    "test_futures",
    "test_futures2",
    "test_locks",
    "test_queues",
    "test_runners",
    "test_sendfile",
    "test_server",
    "test_sock_lowlevel",
    "test_ssl",
    "test_sslproto",
    "test_staggered",
    "test_streams",
    "test_subprocess",
    "test_taskgroups",
    "test_tasks",
    "test_threads",
    "test_timeouts",
    "test_unix_events",
    "test_waitfor",
)
"""What is run, where the Python at hand has it."""

MODULES_LEFT_OUT = {
    "test_pep492": "makes no event loop but a fake one of its own",
    "test_proactor_events": "the inside of Windows' loop",
    "test_protocols": "makes no event loop",
    "test_selector_events": "the inside of the selector loop",
    "test_transports": "makes no event loop",
    "test_windows_events": "Windows",
    "test_windows_utils": "Windows",
}

_SAME_SELECTOR = "the same tests again for another selector; our loop takes no notice of the selector"
_SAME_WATCHER = "the same tests again for another child watcher; our loop uses none"
_SAME_TASK = "the same tests again for another mixture of the task's and the future's C and Python implementations"
_MOCK_SOCKET = "gives the loop a mock for a socket, whose fd is 1: a kernel cannot poll that"

LEFT_OUT = {
    "test_*.SelectEventLoopTests.*": _SAME_SELECTOR,
    "test_*.PollEventLoopTests.*": _SAME_SELECTOR,
    "test_subprocess.SubprocessThreadedWatcherTests.*": _SAME_WATCHER,
    "test_subprocess.SubprocessSafeWatcherTests.*": _SAME_WATCHER,
    "test_subprocess.SubprocessFastWatcherTests.*": "its watcher reaps every child of the process, ours as well",
    "test_tasks.*Subclass*_Tests.*": _SAME_TASK,
    "test_tasks.*_SubclassTests.*": _SAME_TASK,
    "test_tasks.CTask_PyFuture_Tests.*": _SAME_TASK,
    "test_tasks.PyTask_CFuture_Tests.*": _SAME_TASK,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_connection_bluetooth": _MOCK_SOCKET,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_connection_ip_addr": _MOCK_SOCKET,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_connection_ipv6_scope": _MOCK_SOCKET,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_connection_no_inet_pton": _MOCK_SOCKET,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_connection_service_name": _MOCK_SOCKET,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_datagram_endpoint_ip_addr": _MOCK_SOCKET,
    "test_base_events.BaseEventLoopWithSelectorTests.test_create_server_soreuseport_only_defined": _MOCK_SOCKET,
    "test_unix_events.UnixReadPipeTransportTests.*": "the inside of the selector loop's pipes, on a fake loop",
    "test_unix_events.UnixWritePipeTransportTests.*": "the inside of the selector loop's pipes, on a fake loop",
    "test_unix_events.*Watcher*.*": "the inside of asyncio's child watchers; our loop uses none",
}
"""Patterns of tests that are not run, each with the reason."""

_SIGNALS = "test_unix_events.SelectorEventLoopSignalTests."
_SENDFILE = "test_unix_events.SelectorEventLoopUnixSockSendfileTests."
_HANDLERS = "looks into _signal_handlers or calls _handle_signal, the inside of the selector loop"
_SIGNAL_MOCK = "replaces the module `signal` inside of asyncio.unix_events, which our loop does not call"
_SENDFILE_IMPL = "calls _sock_sendfile_native_impl, the inside of the selector loop"
_ACCEPT = "calls _accept_connection, the inside of the selector loop"

FAILS = {
    "test_events.EPollEventLoopTests.test_timeout_rounding": "asks for the name of loop._selector",
    "test_events.KqueueEventLoopTests.test_timeout_rounding": "asks for the name of loop._selector",
    "test_base_events.BaseEventLoopWithSelectorTests.test_accept_connection_exception": _ACCEPT,
    "test_base_events.BaseEventLoopWithSelectorTests.test_accept_connection_retry": _ACCEPT,
    "test_subprocess.GenericWatcherTests.test_create_subprocess_fails_with_inactive_watcher": (
        "wants a child watcher to be needed; our loop uses none"
    ),
    _SIGNALS + "test_add_signal_handler": _HANDLERS,
    _SIGNALS + "test_add_signal_handler_install_error": _SIGNAL_MOCK,
    _SIGNALS + "test_add_signal_handler_install_error2": _HANDLERS,
    _SIGNALS + "test_add_signal_handler_install_error3": _SIGNAL_MOCK,
    _SIGNALS + "test_add_signal_handler_setup_error": _SIGNAL_MOCK,
    _SIGNALS + "test_close": _HANDLERS,
    _SIGNALS + "test_close_on_finalizing": _HANDLERS,
    _SIGNALS + "test_handle_signal_cancelled_handler": _HANDLERS,
    _SIGNALS + "test_handle_signal_no_handler": _HANDLERS,
    _SIGNALS + "test_remove_signal_handler": _SIGNAL_MOCK,
    _SIGNALS + "test_remove_signal_handler_2": _HANDLERS,
    _SIGNALS + "test_remove_signal_handler_error": _SIGNAL_MOCK,
    _SIGNALS + "test_remove_signal_handler_error2": _SIGNAL_MOCK,
    _SENDFILE + "test_sock_sendfile_blocking_error": _SENDFILE_IMPL,
    _SENDFILE + "test_sock_sendfile_cancel1": _SENDFILE_IMPL,
    _SENDFILE + "test_sock_sendfile_cancel2": _SENDFILE_IMPL,
    _SENDFILE + "test_sock_sendfile_exception": _SENDFILE_IMPL,
    _SENDFILE + "test_sock_sendfile_not_available": "takes os.sendfile out of asyncio.unix_events, not out of our loop",
    _SENDFILE + "test_sock_sendfile_os_error_first_call": _SENDFILE_IMPL,
    _SENDFILE + "test_sock_sendfile_os_error_next_call": _SENDFILE_IMPL,
    "test_unix_events.SelectorEventLoopUnixSocketTests.test_create_unix_server_bind_error": (
        "replaces the module `socket` inside of asyncio.unix_events, which our loop does not call"
    ),
}
"""What is run and fails, each with the reason."""

SKIPS = {
    f"test_events.{name}EventLoopTests.test_internal_fds": "asks for the fds of a selector loop's own, and skips others"
    for name in ("EPoll", "Kqueue")
}
"""What skips itself when it sees our loop, each with the reason."""
